/* Causal attention over the paged pool, in bfloat16 dot products, for decoder.c.
 *
 * The pool's layout is made for it (a page holds `page_size` tokens, a multiple of 16; one head after the other):
 *   keys   [page][head][dim / 2][token][2]: pairs of numbers of 16 tokens make one vector, as the scores want them;
 *   values [page][head][token / 2][dim][2]: pairs of tokens of 16 dimensions make one vector, as the sums want them.
 *
 * Each (token, head) is computed in one fixed order, whatever else is in the call: keys in blocks of 64 positions that
 * begin at multiples of 64, with a running maximum between blocks (Milakov and Gimelshein, "Online normalizer
 * calculation for softmax", 2018). Weights are rounded before they are summed up, so that they add up to one.
 */
#include "vector.h"

#include <immintrin.h>

#define BLOCK 64
#define PARTS (BLOCK / LANES)
#define TILE_TOKENS 32
#define MOST_ROWS 6 /* (token, head) pairs taken at once: 24 accumulators */

typedef struct {
    const int64_t *positions, *slots; /* [n]; a slot is page * page_size + offset */
    const int32_t *block_table;       /* [rows, table_width] */
    const int32_t *cu_q;              /* [rows + 1] */
    const int32_t *seq_lens;          /* [rows], new tokens included */
    int64_t n, rows, table_width, page_size;
} Step;

typedef struct {
    const uint16_t *query; /* [tokens, heads, dim], scaled */
    uint16_t *out;         /* [tokens, heads, dim] */
    const uint16_t *keys, *values;
    int64_t heads, kv_heads, dim, window; /* window 0: the whole context */
    float softcap;                        /* 0: none */
} Heads;

static inline void store_bfloat16(uint16_t *at, vec x) {
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

static inline __m512 widen(const uint16_t *at) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}

static inline __m512bh pair_of(const uint16_t *at) {
    int32_t pair;
    memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

static inline __m512bh load_pairs(const uint16_t *at) { return (__m512bh)_mm512_loadu_si512(at); }

static void store_key(uint16_t *keys, int64_t heads, int64_t head, int64_t dim, const Step *step, int64_t token,
                      const float *key) {
    const int64_t size = step->page_size, page = step->slots[token] / size, offset = step->slots[token] % size;
    uint16_t *at = keys + (page * heads + head) * size * dim + 2 * offset;
    for (int64_t d = 0; d < dim; d += 2, at += 2 * size) at[0] = to_bfloat16(key[d]), at[1] = to_bfloat16(key[d + 1]);
}

static void store_value(uint16_t *values, int64_t heads, int64_t head, int64_t dim, const Step *step, int64_t token,
                        const float *value) {
    const int64_t size = step->page_size, page = step->slots[token] / size, offset = step->slots[token] % size;
    uint16_t *at = values + (page * heads + head) * size * dim + offset / 2 * 2 * dim + offset % 2;
    for (int64_t d = 0; d < dim; d++) at[2 * d] = to_bfloat16(value[d]);
    /* The other half of the last token's pairs is multiplied with a weight of zero: it must not hold a stale NaN. */
    if (offset % 2 == 0 && (token + 1 == step->n || step->slots[token + 1] != step->slots[token] + 1))
        for (int64_t d = 0; d < dim; d++) at[2 * d + 1] = 0;
}

/* scores[r][0..63] = q[r] . keys; part i's 16 keys begin at `keys[i]`, their pairs `stride` apart. */
static inline __attribute__((always_inline)) void score_rows(const uint16_t *q, const uint16_t *const *keys,
                                                             int64_t stride, int64_t dim, __m512 scores[][PARTS],
                                                             const int rows) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PARTS; i++) scores[r][i] = _mm512_setzero_ps();
    for (int64_t d = 0, at = 0; d < dim; d += 2, at += stride) {
        __m512bh k[PARTS];
        for (int i = 0; i < PARTS; i++) k[i] = load_pairs(keys[i] + at);
        for (int r = 0; r < rows; r++) {
            const __m512bh x = pair_of(q + r * dim + d);
            for (int i = 0; i < PARTS; i++) scores[r][i] = _mm512_dpbf16_ps(scores[r][i], x, k[i]);
        }
    }
}

/* sums[r] = sums[r] * keep[r] + weights[r] . values over `pairs` pairs of tokens. */
static inline __attribute__((always_inline)) void add_values(const uint16_t *weights, const uint16_t *const *values,
                                                             int64_t pairs, int64_t dim, const float *keep, float *sums,
                                                             const int rows) {
    for (int64_t d = 0; d < dim; d += BLOCK) {
        const int parts = dim - d < BLOCK ? (int)(dim - d) / LANES : PARTS;
        __m512 sum[MOST_ROWS][PARTS];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PARTS; i++)
                sum[r][i] = i < parts ? _mm512_mul_ps(_mm512_loadu_ps(sums + r * dim + d + i * LANES),
                                                      _mm512_set1_ps(keep[r]))
                                      : _mm512_setzero_ps();
        for (int64_t j = 0; j < pairs; j++) {
            const uint16_t *v = values[j / (LANES / 2)] + (j % (LANES / 2) * dim + d) * 2;
            __m512bh part[PARTS];
            for (int i = 0; i < PARTS; i++) part[i] = load_pairs(v + (i < parts ? i : 0) * 2 * LANES);
            for (int r = 0; r < rows; r++) {
                const __m512bh w = pair_of(weights + r * BLOCK + 2 * j);
                for (int i = 0; i < PARTS; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], w, part[i]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < parts; i++) _mm512_storeu_ps(sums + r * dim + d + i * LANES, sum[r][i]);
    }
}

/* exp(x) to 5e-6, far closer than a weight's rounding to bfloat16: 2^n * 2^f with the Taylor polynomial of 2^f. */
static inline __m512 exp_of(__m512 x) {
    const __m512 t = x * 1.44269504f, n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = t - n;
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(1.3333558e-3f), _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static vec soft_cap(vec x, float cap) {
    const vec u = x / cap, magnitude = (vec)((ivec)u & 0x7fffffff), e = exp_vec(-2.0f * magnitude);
    const vec t = (1.0f - e) / (1.0f + e);
    return cap * (vec)(((ivec)u & (int32_t)0x80000000) | (ivec)t);
}

/* One row's scores become weights exp(score - max), zero outside of from..to-1. Updates its maximum and sum; returns
 * what its sums so far are to be multiplied with. */
static float weigh(__m512 *scores, int64_t from, int64_t to, float softcap, uint16_t *weights, float *max, float *sum) {
    __mmask16 mask[PARTS];
    __m512 top = _mm512_set1_ps(*max);
    for (int i = 0; i < PARTS; i++) {
        const int64_t low = from - i * LANES, high = to - i * LANES;
        const uint32_t below = high <= 0 ? 0 : high >= LANES ? 0xffff : (1u << high) - 1;
        mask[i] = (__mmask16)(low <= 0 ? below : low >= LANES ? 0 : below & ~((1u << low) - 1));
        if (softcap > 0) scores[i] = (__m512)soft_cap((vec)scores[i], softcap);
        top = _mm512_mask_max_ps(top, mask[i], top, scores[i]);
    }
    const float highest = _mm512_reduce_max_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < PARTS; i++) {
        const __m512 weight = _mm512_maskz_mov_ps(mask[i], exp_of(scores[i] - highest));
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weight);
        _mm256_storeu_si256((__m256i *)(weights + i * LANES), rounded);
        total = _mm512_add_ps(total, widen(weights + i * LANES));
    }
    const float keep = _mm512_cvtss_f32(exp_of(_mm512_set1_ps(*max - highest)));
    *max = highest;
    *sum = *sum * keep + _mm512_reduce_add_ps(total);
    return keep;
}

typedef struct {
    const Heads *heads;
    const uint16_t *q, *keys[PARTS], *values[PARTS];
    uint16_t *weights;
    float *sums, *max, *sum;
    int64_t stride, first, count, group, position; /* `position`: of row 0; `group` rows share one */
} Block;

/* Where the keys and values of the 16 tokens from `position` on begin, for one head of one row. */
static inline void locate(const Heads *h, const Step *step, int64_t row, int64_t kv, int64_t position,
                          const uint16_t **keys, const uint16_t **values) {
    const int64_t size = step->page_size, offset = position % size;
    const int64_t page = step->block_table[row * step->table_width + position / size];
    *keys = h->keys + (page * h->kv_heads + kv) * size * h->dim + 2 * offset;
    *values = h->values + ((page * h->kv_heads + kv) * size + offset) * h->dim;
}

/* Pages lie scattered, and the processor cannot guess the next one. (Of pages of 16 tokens; of larger ones it can.) */
static void fetch_ahead(const Heads *h, const Step *step, int64_t row, int64_t kv, int64_t from, int64_t end) {
    for (int64_t position = from; position < end && position < from + BLOCK; position += LANES) {
        const uint16_t *keys, *values;
        locate(h, step, row, kv, position, &keys, &values);
        for (int64_t i = 0; i < LANES * h->dim; i += 32) {
            _mm_prefetch((const char *)(keys + i), _MM_HINT_T1);
            _mm_prefetch((const char *)(values + i), _MM_HINT_T1);
        }
    }
}

/* Rows i..i+rows-1 of a tile over one block of keys. */
static inline __attribute__((always_inline)) void attend_rows(const Block *b, int64_t i, const int rows) {
    const int64_t dim = b->heads->dim, window = b->heads->window;
    __m512 scores[MOST_ROWS][PARTS];
    float keep[MOST_ROWS];
    score_rows(b->q + i * dim, b->keys, b->stride, dim, scores, rows);
    for (int r = 0; r < rows; r++) {
        const int64_t position = b->position + (i + r) / b->group, from = position - window + 1 - b->first;
        const int64_t to = position + 1 - b->first;
        keep[r] = weigh(scores[r], window && from > 0 ? from : 0, to < BLOCK ? to : BLOCK, b->heads->softcap,
                        b->weights + r * BLOCK, b->max + i + r, b->sum + i + r);
    }
    add_values(b->weights, b->values, (b->count + 1) / 2, dim, keep, b->sums + i * dim, rows);
}

static void attend_block(const Block *b, int64_t rows) {
    for (int64_t i = 0; i < rows;) {
        const int64_t left = rows - i;
        switch (left < MOST_ROWS ? left : MOST_ROWS) {
            case 1: attend_rows(b, i, 1); break;
            case 2: attend_rows(b, i, 2); break;
            case 3: attend_rows(b, i, 3); break;
            case 4: attend_rows(b, i, 4); break;
            case 5: attend_rows(b, i, 5); break;
            default: attend_rows(b, i, 6);
        }
        i += left < MOST_ROWS ? left : MOST_ROWS;
    }
}

static int64_t most_rows(const Heads *h) { return TILE_TOKENS * (h->heads / h->kv_heads); }

/* What one thread needs for any tile. */
static int64_t scratch_floats(const Heads *h) {
    const int64_t rows = (most_rows(h) + LANES - 1) / LANES * LANES;
    return rows * h->dim + rows * h->dim / 2 + 2 * rows + MOST_ROWS * BLOCK / 2;
}

static int64_t tiles_of(const Step *step, int64_t row) {
    return (step->cu_q[row + 1] - step->cu_q[row] + TILE_TOKENS - 1) / TILE_TOKENS;
}

static int64_t attention_tiles(const Step *step) {
    int64_t tiles = 0;
    for (int64_t row = 0; row < step->rows; row++) tiles += tiles_of(step, row);
    return tiles;
}

/* Tokens t0..t1-1 of row `row` (counted within it) for one key/value head. */
static void attend(const Heads *h, const Step *step, float *scratch, int64_t row, int64_t kv, int64_t t0, int64_t t1) {
    const int64_t group = h->heads / h->kv_heads, dim = h->dim, rows = (t1 - t0) * group, size = step->page_size;
    const int64_t padded = (most_rows(h) + LANES - 1) / LANES * LANES, begin = step->cu_q[row];
    const int64_t start = step->seq_lens[row] - (step->cu_q[row + 1] - begin) + t0, end = start + t1 - t0;
    float *sums = scratch, *max = sums + padded * dim, *sum = max + padded;
    uint16_t *q = (uint16_t *)(sum + padded), *weights = q + padded * dim;
    memset(sums, 0, sizeof(float) * rows * dim);
    for (int64_t i = 0; i < rows; i++) {
        max[i] = -1e30f, sum[i] = 0;
        memcpy(q + i * dim, h->query + ((begin + t0 + i / group) * h->heads + kv * group + i % group) * dim, 2 * dim);
    }
    Block b = {.heads = h, .q = q, .weights = weights, .sums = sums, .max = max, .sum = sum, .stride = 2 * size,
               .group = group, .position = start};
    b.first = h->window && start >= h->window ? (start - h->window + 1) / BLOCK * BLOCK : 0;
    for (; b.first < end; b.first += BLOCK) {
        b.count = end - b.first < BLOCK ? end - b.first : BLOCK;
        fetch_ahead(h, step, row, kv, b.first + BLOCK, end);
        for (int64_t i = 0; i < PARTS; i++) /* parts beyond the end are masked; they only must be readable */
            locate(h, step, row, kv, b.first + (i * LANES < b.count ? i * LANES : 0), b.keys + i, b.values + i);
        attend_block(&b, rows);
    }
    for (int64_t i = 0; i < rows; i++) {
        uint16_t *out = h->out + ((begin + t0 + i / group) * h->heads + kv * group + i % group) * dim;
        for (int64_t d = 0; d < dim; d += LANES) store_bfloat16(out + d, *(vec *)(sums + i * dim + d) / sum[i]);
    }
}

static void attention_tile(const Heads *h, const Step *step, float *scratch, int64_t index) {
    int64_t tile = index / h->kv_heads, row = 0;
    while (tile >= tiles_of(step, row)) tile -= tiles_of(step, row++);
    const int64_t length = step->cu_q[row + 1] - step->cu_q[row];
    tile = tiles_of(step, row) - 1 - tile; /* last tiles first: those of a prompt see the longest context */
    const int64_t t0 = tile * TILE_TOKENS, t1 = t0 + TILE_TOKENS;
    attend(h, step, scratch, row, index % h->kv_heads, t0, t1 < length ? t1 : length);
}
