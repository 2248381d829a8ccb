/* Matrix products with packed weights of 16, 8 or 4 bits, for decoder.c.
 *
 * Weights are packed (`decoder.py`): tiles of 32 outputs, in which pairs of inputs (fours of rounded ones) lie side by
 * side, as the processor's dot product wants them. A product runs through the inner dimension from first to last, whatever
 * the number of rows, and what becomes of it (bias, gate, addition) follows while it is in registers.
 */
#include "decoder_ops.h"

#define COLUMNS 32    /* outputs in a tile of weights */
#define PANEL_ROWS 6  /* rows that the micro-kernel takes at once: 12 accumulators, and as many of rounded products */
#define CHUNK_ROWS 96 /* rows of a tile of work: their inputs stay in the second-level cache */

/* x * sigmoid(u), to 2e-4. */
static vec gate_by(vec x, vec u) {
    const __m512 e = exp2_of((__m512)(u * -1.44269504f));
    return x * (vec)_mm512_rcp14_ps(1.0f + e);
}

/* x * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 is x * sigmoid of twice the argument. */
static vec gelu_tanh(vec x) { return gate_by(x, 1.5957691216f * (x + 0.044715f * x * x * x)); }

/* What becomes of a row's numbers in a tile of outputs. */
static inline __attribute__((always_inline)) void finish(const Op *op, vec low, vec high, int64_t row,
                                                         int64_t column_tile) {
    const vec *bias = (const vec *)op->bias + column_tile * (COLUMNS / LANES);
    if (op->bias) low += bias[0], high += bias[1];
    if (op->effect >= GATED_SILU) {
        const vec gate = op->effect == GATED_SILU ? gate_by(low, low) : gelu_tanh(low);
        store_bfloat16((uint16_t *)op->out + row * op->width + column_tile * LANES, gate * high);
        return;
    }
    const int64_t left = op->width - column_tile * COLUMNS;
    const __mmask16 there[2] = {lanes(0, left), lanes(0, left - LANES)};
    float *out = (float *)op->out + row * op->width + column_tile * COLUMNS;
    if (op->effect == ADD) {
        low += (vec)_mm512_maskz_loadu_ps(there[0], out);
        high += (vec)_mm512_maskz_loadu_ps(there[1], out + LANES);
    }
    _mm512_mask_storeu_ps(out, there[0], (__m512)low);
    _mm512_mask_storeu_ps(out + LANES, there[1], (__m512)high);
}

/* Weights that a thread will read next, from memory. Each panel of rows fetches its share of them while it computes:
 * left to the first panel that reads them, memory would be the bottleneck there and idle during the others. */
typedef struct {
    const char *at;
    int64_t step; /* bytes for each step of a panel through its inputs */
} Ahead;

static inline void fetch(Ahead *ahead) {
    _mm_prefetch(ahead->at, _MM_HINT_T1);
    _mm_prefetch(ahead->at + 64, _MM_HINT_T1);
    ahead->at += ahead->step;
}

/* Rows row..row+rows-1 of the input times one tile of weights; `rows` is known where this is inlined. */
static inline __attribute__((always_inline)) void panel(const Op *op, int64_t row, int64_t column_tile, Ahead *ahead,
                                                        const int rows) {
    const int64_t inner = op->inner;
    const uint16_t *a = (const uint16_t *)op->in + row * inner;
    const uint16_t *w = (const uint16_t *)op->weight + column_tile * COLUMNS * inner;
    __m512 low[PANEL_ROWS], high[PANEL_ROWS];
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k += 2, w += 2 * COLUMNS) {
        const __m512bh w_low = (__m512bh)_mm512_loadu_si512(w), w_high = (__m512bh)_mm512_loadu_si512(w + COLUMNS);
        _mm_prefetch((const char *)(w + 64 * COLUMNS), _MM_HINT_T0);
        _mm_prefetch((const char *)(w + 65 * COLUMNS), _MM_HINT_T0);
        fetch(ahead);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + r * inner + k, sizeof pair);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], x, w_low);
            high[r] = _mm512_dpbf16_ps(high[r], x, w_high);
        }
    }
    for (int r = 0; r < rows; r++) finish(op, (vec)low[r], (vec)high[r], row + r, column_tile);
}

static inline __m512 half_floats(const uint16_t *at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

/* The same for weights of 8 or 4 bits, unsigned in memory; `in` holds x / row_scale, signed, by groups of inputs.
 *
 * 8 bits: q - 128, times a float of each output, `scales` [tiles * 32]. 4 bits: of each group, scale * q + minimum, which
 * `scales` has as float16 [tile][group][scale, minimum][32]; a byte holds the weights of inputs k (low half) and k + 4.
 */
static inline __attribute__((always_inline)) void panel_rounded(const Op *op, int64_t row, int64_t column_tile,
                                                                Ahead *ahead, const int rows, const int bits,
                                                                const int group) {
    const int64_t inner = op->inner, groups = inner / group;
    const int8_t *a = (const int8_t *)op->in + row * inner;
    const uint8_t *w = (const uint8_t *)op->weight + column_tile * COLUMNS * inner * bits / 8;
    const uint16_t *grid = (const uint16_t *)op->scales + column_tile * groups * 2 * COLUMNS;
    const float *row_scales = op->row_scales + row * groups;
    const int32_t *sums = op->group_sums + row * groups;
    const __m512i half = _mm512_set1_epi8(15);
    __m512 low[PANEL_ROWS], high[PANEL_ROWS];
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i exact_low[PANEL_ROWS], exact_high[PANEL_ROWS];
        for (int r = 0; r < rows; r++)
            exact_low[r] = exact_high[r] = _mm512_set1_epi32(bits == 8 ? sums[r * groups + g] : 0);
#pragma GCC unroll 8 /* else each of the few turns copies the sums from register to register */
        for (int k = 0; k < group; k += 8, w += COLUMNS * bits) {
            fetch(ahead);
            __m512i part[2][2]; /* of inputs k..k+3 and k+4..k+7: the first 16 outputs, and the others */
            for (int i = 0; i < bits / 2; i++) {
                const __m512i bytes = _mm512_loadu_si512(w + i * 64);
                _mm_prefetch((const char *)(w + 16 * COLUMNS * bits + i * 64), _MM_HINT_T0);
                if (bits == 8) part[i / 2][i % 2] = bytes;
                else {
                    part[0][i] = _mm512_and_si512(bytes, half);
                    part[1][i] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half);
                }
            }
            for (int p = 0; p < 2; p++)
                for (int r = 0; r < rows; r++) {
                    int32_t four;
                    memcpy(&four, a + r * inner + g * group + k + 4 * p, sizeof four);
                    const __m512i x = _mm512_set1_epi32(four);
                    exact_low[r] = _mm512_dpbusd_epi32(exact_low[r], part[p][0], x);
                    exact_high[r] = _mm512_dpbusd_epi32(exact_high[r], part[p][1], x);
                }
        }
        for (int r = 0; r < rows; r++) {
            const __m512 scale = _mm512_set1_ps(row_scales[r * groups + g]);
            __m512 scale_low = scale, scale_high = scale;
            if (bits == 4) {
                scale_low *= half_floats(grid), scale_high *= half_floats(grid + LANES);
                const __m512 sum = (__m512)_mm512_set1_epi32(sums[r * groups + g]);
                low[r] = _mm512_fmadd_ps(sum, half_floats(grid + COLUMNS), low[r]);
                high[r] = _mm512_fmadd_ps(sum, half_floats(grid + COLUMNS + LANES), high[r]);
            }
            low[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact_low[r]), scale_low, low[r]);
            high[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact_high[r]), scale_high, high[r]);
        }
        grid += 2 * COLUMNS;
    }
    const float *scales = (const float *)op->scales + column_tile * COLUMNS;
    for (int r = 0; r < rows; r++) {
        if (bits == 8) low[r] *= _mm512_loadu_ps(scales), high[r] *= _mm512_loadu_ps(scales + LANES);
        finish(op, (vec)low[r], (vec)high[r], row + r, column_tile);
    }
}

#define CASE(R) \
    case R: \
        if (op->bits == 16) panel(op, row, column_tile, ahead, R); \
        else if (op->bits == 4) panel_rounded(op, row, column_tile, ahead, R, 4, GROUP); \
        else if (group_of(op->inner, 8) == GROUP) panel_rounded(op, row, column_tile, ahead, R, 8, GROUP); \
        else panel_rounded(op, row, column_tile, ahead, R, 8, WIDE_GROUP); \
        break;
static void multiply(const Op *op, int64_t row, int64_t rows, int64_t column_tile, Ahead *ahead) {
    /* By the end of the product the outputs are at hand. Gated ones are half as many bytes, and do not wait. */
    for (int64_t r = row; op->effect < GATED_SILU && r < row + rows; r++) {
        const float *out = (const float *)op->out + r * op->width + column_tile * COLUMNS;
        __builtin_prefetch(out, 1), __builtin_prefetch(out + LANES, 1);
    }
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
}

static int64_t column_tiles(const Op *op) {
    const int64_t unit = op->effect >= GATED_SILU ? LANES : COLUMNS;
    return (op->width + unit - 1) / unit;
}

static int64_t chunks_of(int64_t n) { return (n + CHUNK_ROWS - 1) / CHUNK_ROWS; }

/* `then`: the tile that this thread takes next. */
static void matmul_tile(const Op *op, int64_t n, int64_t index, int64_t then) {
    const int64_t tiles = column_tiles(op), column_tile = index % tiles, chunk = index / tiles, chunks = chunks_of(n);
    const int64_t from = n * chunk / chunks, rows = n * (chunk + 1) / chunks - from;
    const int64_t panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
    const int64_t tile_bytes = COLUMNS * op->inner * op->bits / 8, inputs = op->bits < 16 ? 8 : 2;
    Ahead ahead = {(const char *)op->weight + then % tiles * tile_bytes, COLUMNS * op->bits / 8 * inputs / panels};
    for (int64_t i = 0; i < panels; i++) {
        const int64_t row = from + rows * i / panels, taken = from + rows * (i + 1) / panels - row;
        multiply(op, row, taken, column_tile, &ahead);
    }
}
