/* What decoder.c works on, operations of a list and the tokens of a step, and what all kinds of operations need. */
#pragma once
#include "vector.h"

#include <immintrin.h>

#define GROUP 32      /* 4-bit weights that share a scale and a minimum, and their inputs that share a scale */
#define WIDE_GROUP 64 /* inputs that share a scale with 8-bit weights, if they divide: half of the scaling */

enum { NORM, MATMUL, ROPE, ATTENTION, QUANTIZE };
enum { STORE, ADD, GATED_SILU, GATED_GELU_TANH }; /* what becomes of a product */

typedef struct {
    int64_t kind;
    const void *in;     /* ATTENTION: bfloat16 [n, heads, dim], scaled by log2(e) / sqrt(dim) or the like */
    void *out;          /* ATTENTION: likewise */
    const void *weight; /* NORM: [width]; MATMUL: packed; ROPE: of the norm of heads, [heads + kv_heads, dim] or null */
    const float *bias;  /* MATMUL: [tiles * 32] or null */
    const float *table; /* ROPE: [positions, 2, dim], cos and signed sin */
    uint16_t *keys, *values; /* ROPE writes them, ATTENTION reads them */
    const void *scales;  /* MATMUL of 8 or 4 bits: see panel_rounded */
    float *row_scales;   /* written by QUANTIZE, read by the product; [n, inner / group] */
    int32_t *group_sums; /* likewise, of a group of rounded inputs: for 8 bits -128 * sum, for 4 the float scale * sum */
    int64_t bits;   /* MATMUL, QUANTIZE: of a weight, 16, 8 or 4 */
    int64_t width;  /* NORM: of a row; MATMUL: of a row of the output */
    int64_t inner;  /* MATMUL: of a row of the input, even */
    int64_t effect; /* MATMUL: what becomes of the product; NORM: STORE bfloat16, or ADD to float32 */
    int64_t heads, kv_heads, dim, window; /* window 0: the whole context */
    float eps, scale, softcap;            /* softcap 0: none; in base 2, like the scores */
} Op;

typedef struct {
    const int64_t *positions, *slots; /* [n]; a slot is page * page_size + offset */
    const int32_t *block_table;       /* [rows, table_width] */
    const int32_t *cu_q;              /* [rows + 1] */
    const int32_t *seq_lens;          /* [rows], new tokens included */
    int64_t n, rows, table_width, page_size;
} Step;

static inline int64_t group_of(int64_t inner, int64_t bits) {
    return bits == 8 && inner % WIDE_GROUP == 0 ? WIDE_GROUP : GROUP;
}

static inline void store_bfloat16(uint16_t *at, vec x) {
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

static inline __m512 widen(const uint16_t *at) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}

/* 2^x to 1.1e-4, far closer than a weight's rounding to bfloat16, and 1 for 0: 2^n times a cubic for 2^f, |f| <= 1/2. */
static inline __m512 exp2_of(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.055008948f), _mm512_set1_ps(0.242211f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932829f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Lanes from..to-1 of those that there are. */
static inline __mmask16 lanes(int64_t from, int64_t to) {
    const uint32_t below = to <= 0 ? 0 : to >= LANES ? 0xffff : (1u << to) - 1;
    return (__mmask16)(from <= 0 ? below : from >= LANES ? 0 : below & ~((1u << from) - 1));
}
