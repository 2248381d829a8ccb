/* Causal attention of new tokens over a paged KV pool, for CPUs.
 *
 * Each (token, head) is computed in one fixed order, whatever else is in the call: keys in blocks of 64 positions that
 * begin at multiples of 64, within a block dimension by dimension for the scores and key by key for the values, with a
 * running maximum between blocks (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). So a
 * token's result is the same to the last bit alone or in a batch, in a decode step or in any chunk of a prompt.
 *
 * A tile is a few tokens of one row with the heads that share a key/value head; its K and V blocks are widened to
 * float32 once, K transposed so that the scores of 16 keys make one vector. Plain C with GCC's vector extensions.
 */
#include "vector.h"

#define BLOCK 64
#define TILE_TOKENS 32
#define ROWS 4 /* (token, head) pairs that a micro-kernel takes at once */

typedef struct {
    float *out;         /* [tokens, heads, value_dim] */
    const float *query; /* [tokens, heads, key_dim] */
    const void *keys;   /* [pages, page_size, kv_heads, key_dim], bfloat16 or float32 */
    const void *values; /* [pages, page_size, kv_heads, value_dim] */
    const int32_t *block_table; /* [rows, table_width] */
    const int32_t *cu_q;        /* [rows + 1] */
    const int32_t *seq_lens;    /* [rows], new tokens included */
    int64_t rows, table_width, heads, kv_heads, key_dim, value_dim, page_size;
    int64_t window;   /* 0: the whole context */
    int64_t bfloat16; /* 0: the pool is float32 */
    float scale, softcap; /* softcap 0: none */
} Args;

static vec load16(const void *at, int64_t index, int bfloat16) {
    if (!bfloat16) return *(const vec *)((const float *)at + index);
    typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2)));
    typedef uint32_t wide __attribute__((vector_size(4 * LANES)));
    return (vec)(__builtin_convertvector(*(const half *)((const uint16_t *)at + index), wide) << 16);
}

/* A key or value of `dim` numbers, the last vector filled up with zeros. */
static vec load_part(const void *at, int64_t index, int64_t d, int64_t dim, int bfloat16) {
    if (d + LANES <= dim) return load16(at, index + d, bfloat16);
    const int64_t size = bfloat16 ? 2 : 4;
    float part[LANES] = {0};
    memcpy(part, (const char *)at + (index + d) * size, (dim - d) * size);
    return load16(part, 0, bfloat16);
}

/* Exchange the off-diagonal squares of size s in a 16 x 16 matrix of rows v. */
#define LOW(l, s) (((l) & (s)) ? 16 + (l) - (s) : (l))
#define HIGH(l, s) (((l) & (s)) ? 16 + (l) : (l) + (s))
#define ALL(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s), F(8, s), F(9, s), F(10, s), \
    F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)
#define EXCHANGE(s) \
    for (int i = 0; i < LANES; i++) \
        if (!(i & (s))) { \
            const vec a = v[i], b = v[i + (s)]; \
            v[i] = __builtin_shuffle(a, b, (ivec){ALL(LOW, s)}); \
            v[i + (s)] = __builtin_shuffle(a, b, (ivec){ALL(HIGH, s)}); \
        }

static void transpose16(vec v[LANES]) {
    EXCHANGE(8) EXCHANGE(4) EXCHANGE(2) EXCHANGE(1)
}

/* Keys first..last-1 of one head: kt [key_dim padded][BLOCK] and vb [BLOCK][value_dim padded]; the rest zero. */
static void load_block(const Args *a, const int32_t *table, int64_t kv, int64_t first, int64_t last, float *kt,
                       float *vb, int64_t kpad, int64_t vpad) {
    int64_t slot[BLOCK];
    const int64_t count = last - first;
    for (int64_t j = 0; j < count; j++) {
        const int64_t position = first + j;
        slot[j] = ((int64_t)table[position / a->page_size] * a->page_size + position % a->page_size) * a->kv_heads + kv;
    }
    const int half = (int)a->bfloat16;
    for (int64_t j0 = 0; j0 < BLOCK; j0 += LANES)
        for (int64_t d = 0; d < kpad; d += LANES) {
            vec v[LANES];
            for (int j = 0; j < LANES; j++)
                v[j] = j0 + j < count ? load_part(a->keys, slot[j0 + j] * a->key_dim, d, a->key_dim, half) : (vec){0};
            transpose16(v);
            for (int i = 0; i < LANES; i++) *(vec *)(kt + (d + i) * BLOCK + j0) = v[i];
        }
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < vpad; d += LANES)
            *(vec *)(vb + j * vpad + d) = load_part(a->values, slot[j] * a->value_dim, d, a->value_dim, half);
    if (count < BLOCK) memset(vb + count * vpad, 0, sizeof(float) * (BLOCK - count) * vpad);
}

/* scores[r][0..63] = q[r] . kt for ROWS rows. */
static void scores_of(const float *q, const float *kt, float *scores, int64_t kpad) {
    vec s[ROWS][BLOCK / LANES];
    memset(s, 0, sizeof s);
    for (int64_t d = 0; d < kpad; d++)
        for (int c = 0; c < BLOCK / LANES; c++) {
            const vec k = *(const vec *)(kt + d * BLOCK + c * LANES);
            for (int r = 0; r < ROWS; r++) s[r][c] += k * q[r * kpad + d];
        }
    memcpy(scores, s, sizeof s);
}

/* acc[r] = acc[r] * keep[r] + p[r] . vb for ROWS rows, keys in order. */
static void add_values(const float *p, const float *vb, const float *keep, float *acc, int64_t count, int64_t vpad) {
    int64_t d = 0;
    for (; d + 2 * LANES <= vpad; d += 2 * LANES) {
        vec x[ROWS][2];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) x[r][c] = *(vec *)(acc + r * vpad + d + c * LANES) * keep[r];
        for (int64_t j = 0; j < count; j++)
            for (int c = 0; c < 2; c++) {
                const vec v = *(const vec *)(vb + j * vpad + d + c * LANES);
                for (int r = 0; r < ROWS; r++) x[r][c] += v * p[r * BLOCK + j];
            }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) *(vec *)(acc + r * vpad + d + c * LANES) = x[r][c];
    }
    for (; d < vpad; d += LANES)
        for (int r = 0; r < ROWS; r++) {
            vec x = *(vec *)(acc + r * vpad + d) * keep[r];
            for (int64_t j = 0; j < count; j++) x += *(const vec *)(vb + j * vpad + d) * p[r * BLOCK + j];
            *(vec *)(acc + r * vpad + d) = x;
        }
}

/* Turn one row's scores into weights exp(score - max); masked keys get 0. Updates its maximum and sum; returns what
 * its sums so far are to be multiplied with. */
static float weigh(float *s, int64_t from, int64_t to, float softcap, float *max, float *sum) {
    float top = *max;
    if (softcap > 0)
        for (int64_t j = from; j < to; j++) s[j] = softcap * __builtin_tanhf(s[j] / softcap);
    for (int64_t j = from; j < to; j++) top = s[j] > top ? s[j] : top;
    const vec keep = exp_vec(splat(*max - top));
    vec total = {0};
    for (int64_t c = 0; c < BLOCK; c += LANES) {
        float part[LANES];
        *(vec *)part = exp_vec(*(vec *)(s + c) - top);
        for (int i = 0; i < LANES; i++)
            if (c + i < from || c + i >= to) part[i] = 0;
        *(vec *)(s + c) = *(vec *)part;
        total += *(vec *)part;
    }
    float add = 0;
    for (int i = 0; i < LANES; i++) add += total[i];
    *max = top;
    *sum = *sum * keep[0] + add;
    return keep[0];
}

/* Tokens from..from+31, as far as there are any, of row `row`, counted within it. */
typedef struct {
    int64_t row, from;
} Tile;

static int64_t padded_to(int64_t unit, int64_t size) { return (size + unit - 1) / unit * unit; }

/* What `attend_tile` needs: each part is a multiple of LANES. */
static int64_t scratch_floats(const Args *a) {
    const int64_t most = TILE_TOKENS * a->heads / a->kv_heads;
    const int64_t pads = padded_to(LANES, a->key_dim) + padded_to(LANES, a->value_dim);
    return (most + BLOCK) * pads + 2 * most + ROWS * BLOCK;
}

/* A tile's rows (token, head) for one key/value head. */
static void attend_tile(const Args *a, float *scratch, Tile tile, int64_t kv) {
    const int64_t row = tile.row, group = a->heads / a->kv_heads, most = TILE_TOKENS * group;
    const int64_t kpad = padded_to(LANES, a->key_dim), vpad = padded_to(LANES, a->value_dim);
    float *q = scratch, *acc = q + most * kpad, *scores = acc + most * vpad, *max = scores + ROWS * BLOCK;
    float *sum = max + most, *kt = sum + most, *vb = kt + kpad * BLOCK;
    const int64_t begin = a->cu_q[row], length = a->cu_q[row + 1] - begin, left = length - tile.from;
    const int64_t start = a->seq_lens[row] - length + tile.from; /* position of the tile's first token */
    const int64_t tokens = left < TILE_TOKENS ? left : TILE_TOKENS, n = tokens * group, padded = padded_to(ROWS, n);
    memset(q, 0, sizeof(float) * padded * kpad);
    memset(acc, 0, sizeof(float) * padded * vpad);
    for (int64_t i = 0; i < padded; i++) max[i] = -1e30f, sum[i] = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *from = a->query + ((begin + tile.from + i / group) * a->heads + kv * group + i % group) * a->key_dim;
        for (int64_t d = 0; d < a->key_dim; d++) q[i * kpad + d] = from[d] * a->scale;
    }
    const int64_t end = start + tokens; /* one past the last key that any token here sees */
    int64_t first = a->window ? start - a->window + 1 : 0;
    first = first > 0 ? first / BLOCK * BLOCK : 0;
    for (; first < end; first += BLOCK) {
        const int64_t last = first + BLOCK < end ? first + BLOCK : end;
        load_block(a, a->block_table + row * a->table_width, kv, first, last, kt, vb, kpad, vpad);
        for (int64_t i = 0; i < padded; i += ROWS) {
            float keep[ROWS] = {1, 1, 1, 1};
            scores_of(q + i * kpad, kt, scores, kpad);
            for (int64_t r = 0; r < ROWS; r++) {
                const int64_t position = start + (i + r) / group;
                int64_t from = a->window ? position - a->window + 1 - first : 0, to = position + 1 - first;
                from = from < 0 ? 0 : from;
                to = to > BLOCK ? BLOCK : to;
                if (from < to && i + r < n)
                    keep[r] = weigh(scores + r * BLOCK, from, to, a->softcap, max + i + r, sum + i + r);
                else
                    memset(scores + r * BLOCK, 0, sizeof(float) * BLOCK);
            }
            add_values(scores, vb, keep, acc + i * vpad, last - first, vpad);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        float *out = a->out + ((begin + tile.from + i / group) * a->heads + kv * group + i % group) * a->value_dim;
        for (int64_t d = 0; d < a->value_dim; d++) out[d] = acc[i * vpad + d] / sum[i];
    }
}

/* Returns 0, or 1 if memory for the scratch space could not be had. */
int paged_attention(const Args *a) {
    Tile *tiles = malloc(sizeof(Tile) * (a->rows + a->cu_q[a->rows] / TILE_TOKENS + 1));
    if (!tiles) return 1;
    int64_t count = 0;
    for (int64_t row = 0; row < a->rows; row++)
        for (int64_t from = 0; from < a->cu_q[row + 1] - a->cu_q[row]; from += TILE_TOKENS)
            tiles[count++] = (Tile){row, from};
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = aligned_alloc(64, sizeof(float) * scratch_floats(a));
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < count * a->kv_heads; item++)
            /* Last tiles first: those of a prompt see the longest context. */
            if (scratch) attend_tile(a, scratch, tiles[count - 1 - item / a->kv_heads], item % a->kv_heads);
        free(scratch);
    }
    free(tiles);
    return failed;
}
