/* Causal attention over the paged pool, in bfloat16 dot products, for decoder.c.
 *
 * The pool's layout is made for it (a page holds `page_size` tokens, a multiple of 16; one head after the other):
 *   keys   [page][head][dim / 2][token][2]: pairs of numbers of 16 tokens make one vector;
 *   values [page][head][token / 2][dim][2]: pairs of tokens of 16 dimensions make one vector.
 *
 * A row is a (token, head) pair. Rows that share a key/value head are computed together, in one of two ways: a few
 * (decodes) with keys and dimensions in the lanes of vectors, many (prompts) with rows in the lanes, which spares the
 * softmax its sums over lanes. Both give a row the same bits, so it has one fixed order, whatever else is in the call:
 * keys in blocks of 64 positions that begin at multiples of 64, with a running maximum between blocks (Milakov and
 * Gimelshein, "Online normalizer calculation for softmax", 2018). Weights are rounded before they are summed up, so
 * that they add up to one. Scores are logarithms to base 2: the caller scales the queries so.
 *
 * Decodes are bound by the way from memory: with each vector of a block the one at the same place of the next block is
 * fetched into the second-level cache, and requests that share leading pages pass their keys together. (Fetched in one
 * burst before each block, or into the first-level cache, attention took 1.4 times as long.)
 */
#include "decoder_ops.h"

#define BLOCK 64
#define PARTS (BLOCK / LANES)
#define TILE_ROWS 48 /* rows of a tile of work, three vectors of lanes */
#define MOST_ROWS 6  /* of a few rows at once: 24 accumulators */

static inline __m512bh pair_of(const uint16_t *at) {
    int32_t pair;
    memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

static inline __m512bh load_pairs(const uint16_t *at) { return (__m512bh)_mm512_loadu_si512(at); }

static void store_key(const Op *op, int64_t head, const Step *step, int64_t token, const float *key) {
    const int64_t size = step->page_size, page = step->slots[token] / size, offset = step->slots[token] % size;
    const int64_t dim = op->dim;
    uint16_t *at = op->keys + (page * op->kv_heads + head) * size * dim + 2 * offset;
    for (int64_t d = 0; d < dim; d += 2, at += 2 * size) at[0] = to_bfloat16(key[d]), at[1] = to_bfloat16(key[d + 1]);
}

static void store_value(const Op *op, int64_t head, const Step *step, int64_t token, const float *value) {
    const int64_t size = step->page_size, page = step->slots[token] / size, offset = step->slots[token] % size;
    const int64_t dim = op->dim;
    uint16_t *at = op->values + (page * op->kv_heads + head) * size * dim + offset / 2 * 2 * dim + offset % 2;
    for (int64_t d = 0; d < dim; d++) at[2 * d] = to_bfloat16(value[d]);
    /* The other half of the last token's pairs is multiplied with a weight of zero: it must not hold a stale NaN. */
    if (offset % 2 == 0 && (token + 1 == step->n || step->slots[token + 1] != step->slots[token] + 1))
        for (int64_t d = 0; d < dim; d++) at[2 * d + 1] = 0;
}

/* scores[r][0..63] = q[r] . keys; part i's 16 keys begin at `keys[i]`, their pairs `stride` apart. The like of `next`
 * are fetched. */
static inline __attribute__((always_inline)) void score_rows(const uint16_t *q, const uint16_t *const *keys,
                                                             const uint16_t *const *next, int64_t stride, int64_t dim,
                                                             __m512 scores[][PARTS], const int rows) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PARTS; i++) scores[r][i] = _mm512_setzero_ps();
    for (int64_t d = 0, at = 0; d < dim; d += 2, at += stride) {
        __m512bh k[PARTS];
        for (int i = 0; i < PARTS; i++) {
            k[i] = load_pairs(keys[i] + at);
            _mm_prefetch((const char *)(next[i] + at), _MM_HINT_T1);
        }
        for (int r = 0; r < rows; r++) {
            const __m512bh x = pair_of(q + r * dim + d);
            for (int i = 0; i < PARTS; i++) scores[r][i] = _mm512_dpbf16_ps(scores[r][i], x, k[i]);
        }
    }
}

/* sums[r] = sums[r] * keep[r] + weights[r] . values over `pairs` pairs of tokens; the like of `next` are fetched. */
static inline __attribute__((always_inline)) void add_values(const uint16_t *weights, const uint16_t *const *values,
                                                             const uint16_t *const *next, int64_t pairs, int64_t dim,
                                                             const float *keep, float *sums, const int rows) {
    for (int64_t d = 0; d < dim; d += BLOCK) {
        const int parts = dim - d < BLOCK ? (int)(dim - d) / LANES : PARTS;
        __m512 sum[MOST_ROWS][PARTS];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PARTS; i++)
                sum[r][i] = i < parts ? _mm512_mul_ps(_mm512_loadu_ps(sums + r * dim + d + i * LANES),
                                                      _mm512_set1_ps(keep[r]))
                                      : _mm512_setzero_ps();
        for (int64_t j = 0; j < pairs; j++) {
            const int64_t at = (j % (LANES / 2) * dim + d) * 2;
            const uint16_t *v = values[j / (LANES / 2)] + at, *fetched = next[j / (LANES / 2)] + at;
            __m512bh part[PARTS];
            for (int i = 0; i < PARTS; i++) {
                part[i] = load_pairs(v + (i < parts ? i : 0) * 2 * LANES);
                _mm_prefetch((const char *)(fetched + i * 2 * LANES), _MM_HINT_T1);
            }
            for (int r = 0; r < rows; r++) {
                const __m512bh w = pair_of(weights + r * BLOCK + 2 * j);
                for (int i = 0; i < PARTS; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], w, part[i]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < parts; i++) _mm512_storeu_ps(sums + r * dim + d + i * LANES, sum[r][i]);
    }
}

static vec soft_cap(vec x, float cap) {
    const vec u = x / cap, magnitude = (vec)((ivec)u & 0x7fffffff), e = exp_vec(-2.0f * magnitude);
    const vec t = (1.0f - e) / (1.0f + e);
    return cap * (vec)(((ivec)u & (int32_t)0x80000000) | (ivec)t);
}

/* Sums of weights, in pairs of tokens: 16 sums over pairs i and i + 16, to be added up as a tree of halves. */
static inline __m512 add_pairs(__m512bh first, __m512bh second) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), first, ones), second, ones);
}

/* One row's scores become weights 2^(score - max), zero outside of from..to-1. Updates its maximum and sum; returns
 * what its sums so far are to be multiplied with. */
static float weigh(__m512 *scores, int64_t from, int64_t to, float softcap, uint16_t *weights, float *max, float *sum) {
    __m512 top = _mm512_set1_ps(*max);
    for (int i = 0; i < PARTS; i++) {
        if (softcap > 0) scores[i] = (__m512)soft_cap((vec)scores[i], softcap);
        top = _mm512_mask_max_ps(top, lanes(from - i * LANES, to - i * LANES), top, scores[i]);
    }
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < PARTS; i++)
        scores[i] = _mm512_maskz_mov_ps(lanes(from - i * LANES, to - i * LANES), exp2_of(scores[i] - highest));
    const __m512bh first = _mm512_cvtne2ps_pbh(scores[1], scores[0]), second = _mm512_cvtne2ps_pbh(scores[3], scores[2]);
    _mm512_storeu_si512(weights, (__m512i)first);
    _mm512_storeu_si512(weights + 2 * LANES, (__m512i)second);
    const float keep = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(*max) - highest));
    *max = _mm512_cvtss_f32(highest);
    *sum = __builtin_fmaf(*sum, keep, _mm512_reduce_add_ps(add_pairs(first, second)));
    return keep;
}

/* A block's keys and values of one head, in parts of 16 tokens. */
typedef struct {
    const uint16_t *keys[PARTS], *values[PARTS];
} Place;

typedef struct {
    const Op *op;
    const uint16_t *q;
    Place here, next; /* of this block, and of the one that this thread computes next */
    uint16_t *weights;
    float *scores, *sums, *max, *sum, *keep;
    int64_t stride;       /* from one pair of a key's numbers to the next */
    int64_t first, count; /* the keys: their first position, how many there are */
    int64_t rows, group;  /* `group` rows are of one token */
    int64_t start, pair;  /* row i is of the token at position start + (pair + i) / group */
} Block;

/* The 64 tokens of request `row` from `first` on, as far as there are any before `end`. */
static inline Place locate(const Op *op, const Step *step, int64_t row, int64_t kv, int64_t first, int64_t end) {
    Place place;
    for (int64_t i = 0; i < PARTS; i++) { /* parts beyond the end are masked; they only must be readable */
        const int64_t position = first + i * LANES < end ? first + i * LANES : first, size = step->page_size;
        const int64_t page = step->block_table[row * step->table_width + position / size], offset = position % size;
        place.keys[i] = op->keys + (page * op->kv_heads + kv) * size * op->dim + 2 * offset;
        place.values[i] = op->values + ((page * op->kv_heads + kv) * size + offset) * op->dim;
    }
    return place;
}

/* Rows i..i+rows-1 of a tile over one block of keys. */
static inline __attribute__((always_inline)) void attend_rows(const Block *b, int64_t i, const int rows) {
    const int64_t dim = b->op->dim, window = b->op->window;
    __m512 scores[MOST_ROWS][PARTS];
    float keep[MOST_ROWS];
    score_rows(b->q + i * dim, b->here.keys, b->next.keys, b->stride, dim, scores, rows);
    for (int r = 0; r < rows; r++) {
        const int64_t position = b->start + (b->pair + i + r) / b->group, from = position - window + 1 - b->first;
        const int64_t to = position + 1 - b->first;
        keep[r] = weigh(scores[r], window && from > 0 ? from : 0, to < BLOCK ? to : BLOCK, b->op->softcap,
                        b->weights + r * BLOCK, b->max + i + r, b->sum + i + r);
    }
    add_values(b->weights, b->here.values, b->next.values, (b->count + 1) / 2, dim, keep, b->sums + i * dim, rows);
}

static void attend_narrow(const Block *b) {
    for (int64_t i = 0; i < b->rows; i += MOST_ROWS) switch (b->rows - i) {
        case 1: attend_rows(b, i, 1); break;
        case 2: attend_rows(b, i, 2); break;
        case 3: attend_rows(b, i, 3); break;
        case 4: attend_rows(b, i, 4); break;
        case 5: attend_rows(b, i, 5); break;
        default: attend_rows(b, i, 6);
    }
}

/* ---- rows in the lanes: q [dim / 2][row][2], scores [key][row], weights [pair of keys][row][2], sums [dim][row] -----*/

/* Scores of `at_once` keys at a time, `vectors` vectors of rows. */
static inline __attribute__((always_inline)) void score_wide(const Block *b, const int vectors, const int at_once) {
    for (int64_t key = 0; key < b->count; key += at_once) {
        const uint16_t *k = b->here.keys[key / LANES] + 2 * (key % LANES), *q = b->q;
        __m512 sum[LANES][TILE_ROWS / LANES];
        for (int c = 0; c < at_once; c++)
            for (int v = 0; v < vectors; v++) sum[c][v] = _mm512_setzero_ps();
        for (int64_t d = 0; d < b->op->dim; d += 2, k += b->stride, q += 2 * TILE_ROWS)
            for (int c = 0; c < at_once; c++) {
                const __m512bh x = pair_of(k + 2 * c);
                for (int v = 0; v < vectors; v++)
                    sum[c][v] = _mm512_dpbf16_ps(sum[c][v], load_pairs(q + 2 * v * LANES), x);
            }
        for (int c = 0; c < at_once; c++)
            for (int v = 0; v < vectors; v++)
                _mm512_storeu_ps(b->scores + (key + c) * TILE_ROWS + v * LANES, sum[c][v]);
    }
}

/* Rows from `lane` on that see a key, as a mask of 16. */
static inline __mmask16 seen_by(const Block *b, int64_t key, int64_t lane) {
    const int64_t from = (b->first + key - b->start) * b->group - b->pair - lane;
    return lanes(from, b->op->window ? from + b->op->window * b->group : LANES);
}

/* Puts 16-bit numbers i and i + 16 side by side. */
static const uint16_t SIDE_BY_SIDE[32] __attribute__((aligned(64))) = {
    0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* What `weigh` does, for 16 rows from `lane` on. `all`: every row sees every key. */
static inline __attribute__((always_inline)) void weigh_wide(const Block *b, int64_t lane, const int all) {
    float *scores = b->scores + lane;
    const int64_t pairs = (b->count + 1) / 2;
    const __m512 before = _mm512_loadu_ps(b->max + lane);
    __m512 top = before;
    for (int64_t key = 0; key < b->count; key++) {
        __m512 score = _mm512_loadu_ps(scores + key * TILE_ROWS);
        if (b->op->softcap > 0) {
            score = (__m512)soft_cap((vec)score, b->op->softcap);
            _mm512_storeu_ps(scores + key * TILE_ROWS, score);
        }
        top = _mm512_mask_max_ps(top, all ? 0xffff : seen_by(b, key, lane), top, score);
    }
    const __m512i side_by_side = _mm512_load_si512(SIDE_BY_SIDE);
    __m512bh packed[BLOCK / 2];
    for (int64_t j = 0; j < pairs; j++) {
        __m512 weight[2];
        for (int64_t i = 0, key = 2 * j; i < 2; i++, key++) {
            weight[i] = exp2_of(_mm512_loadu_ps(scores + key * TILE_ROWS) - top);
            if (!all) weight[i] = _mm512_maskz_mov_ps(seen_by(b, key, lane), weight[i]);
        }
        packed[j] = (__m512bh)_mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
        _mm512_storeu_si512(b->weights + (j * TILE_ROWS + lane) * 2, (__m512i)packed[j]);
    }
    for (int64_t j = pairs; j < BLOCK / 2; j++) packed[j] = (__m512bh)_mm512_setzero_si512();
    __m512 total[LANES];
    for (int i = 0; i < LANES; i++) total[i] = add_pairs(packed[i], packed[i + LANES]);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) total[i] += total[i + half];
    const __m512 keep = exp2_of(before - top);
    _mm512_storeu_ps(b->max + lane, top);
    _mm512_storeu_ps(b->keep + lane, keep);
    _mm512_storeu_ps(b->sum + lane, _mm512_fmadd_ps(_mm512_loadu_ps(b->sum + lane), keep, total[0]));
}

/* `at_once` dimensions at a time. */
static inline __attribute__((always_inline)) void add_values_wide(const Block *b, const int vectors, const int at_once) {
    const int64_t dim = b->op->dim, pairs = (b->count + 1) / 2;
    for (int64_t d = 0; d < dim; d += at_once) {
        float *sums = b->sums + d * TILE_ROWS;
        __m512 sum[LANES][TILE_ROWS / LANES];
        for (int c = 0; c < at_once; c++)
            for (int v = 0; v < vectors; v++)
                sum[c][v] = _mm512_mul_ps(_mm512_loadu_ps(sums + c * TILE_ROWS + v * LANES),
                                          _mm512_loadu_ps(b->keep + v * LANES));
        for (int64_t j = 0; j < pairs; j++) {
            const uint16_t *values = b->here.values[j / (LANES / 2)] + (j % (LANES / 2) * dim + d) * 2;
            for (int c = 0; c < at_once; c++) {
                const __m512bh x = pair_of(values + 2 * c);
                for (int v = 0; v < vectors; v++)
                    sum[c][v] = _mm512_dpbf16_ps(sum[c][v], load_pairs(b->weights + (j * TILE_ROWS + v * LANES) * 2), x);
            }
        }
        for (int c = 0; c < at_once; c++)
            for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + c * TILE_ROWS + v * LANES, sum[c][v]);
    }
}

static void weigh_block(const Block *b, int vectors) {
    const int64_t window = b->op->window, last = b->start + (b->pair + b->rows - 1) / b->group;
    /* The last pair's second key, which may lie beyond the end, included. */
    const int all = b->first + ((b->count - 1) | 1) <= b->start + b->pair / b->group &&
                    (!window || b->first > last - window);
    for (int64_t lane = 0; lane < vectors * LANES; lane += LANES) {
        if (all && b->op->softcap == 0) weigh_wide(b, lane, 1);
        else weigh_wide(b, lane, 0);
    }
}

#define WIDE_CASE(VECTORS, AT_ONCE) \
    case VECTORS: \
        score_wide(b, VECTORS, AT_ONCE); \
        weigh_block(b, VECTORS); \
        add_values_wide(b, VECTORS, AT_ONCE); \
        break;

static void attend_wide(const Block *b) {
    switch ((b->rows + LANES - 1) / LANES) { WIDE_CASE(1, 8) WIDE_CASE(2, 8) WIDE_CASE(3, 4) }
}
