/* The choice of a token for each row of logits: the largest of logits * scale + Gumbel noise, of those that top-k,
 * top-p and min-p leave (model_runner/sampler.py says in which order). What they leave is all above some border, which a
 * radix selection finds: 11, 11 and 10 bits of the numbers, taken as integers that sort alike.
 *
 * The noise is a pure function of the row's key and the token, the one that model_runner/noise.py describes. Logarithm
 * by the polynomial of the Cephes library (S. Moshier). A row's result does not depend on the others.
 */
#include "vector.h"

#define CHUNK 4096 /* tokens that a thread looks at before it takes the next */
#define STRIDE 0x9E3779B1u

typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
    const float *logits;  /* [rows, vocab] */
    const float *scales;  /* [rows], 1 / temperature; 0 for no noise */
    const float *top_p;   /* [rows], 1 for all */
    const float *log_min_p; /* [rows], -inf for none */
    const int64_t *top_k; /* [rows], 0 for all */
    const uint32_t *keys; /* [rows, 2] */
    int64_t *tokens;      /* [rows], the lowest of equals */
    float *best;          /* [rows], NaN if there is a NaN among the logits */
    int64_t rows, vocab;
} Args;

static vec log_vec(vec x) {
    ivec exponent = (((ivec)x >> 23) & 0xff) - 127;
    vec m = (vec)(((ivec)x & 0x7fffff) | 0x3f800000);
    const ivec large = m > splat(1.41421356f);
    m = (vec)(((ivec)(m * 0.5f) & large) | ((ivec)m & ~large));
    exponent -= large; /* `large` is -1 where true */
    const vec f = m - 1.0f, z = f * f, e = __builtin_convertvector(exponent, vec);
    vec p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z + e * -2.12194440e-4f - 0.5f * z;
    return f + p + e * 0.693359375f;
}

static uvec mix(uvec x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

static vec gumbel(uvec tokens, const uint32_t *key) {
    const uvec x = mix(mix(tokens * STRIDE + key[0]) ^ key[1]);
    const vec uniform = (__builtin_convertvector((ivec)(x & 0x7fffffu), vec) + 0.5f) * 1.1920929e-7f;
    return -log_vec(-log_vec(uniform));
}

static uint32_t sortable(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float from_sortable(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The largest key for which the weights of all keys not below it reach `wanted`. Without weights, each counts 1. */
static uint32_t select_key(const uint32_t *keys, const float *weights, int64_t n, double wanted) {
    uint32_t prefix = 0, known = 0;
    double above = 0;
    for (int shift = 21, bits = 11; shift >= 0; bits = shift == 10 ? 10 : 11, shift -= bits) {
        double bins[2048] = {0};
        const uint32_t field = (1u << bits) - 1;
        for (int64_t i = 0; i < n; i++)
            if ((keys[i] & known) == prefix) bins[keys[i] >> shift & field] += weights ? weights[i] : 1;
        uint32_t found = 0;
        for (int64_t bin = field; bin >= 0; bin--) {
            if (bins[bin] == 0) continue;
            found = (uint32_t)bin;
            if (above + bins[bin] >= wanted) break;
            above += bins[bin];
        }
        prefix |= found << shift, known |= field << shift;
    }
    return prefix;
}

/* Scaled logits below it are left out. `keys` and `weights` have room for a row. */
static float border_of(const Args *a, int64_t row, uint32_t *keys, float *weights) {
    const float *logits = a->logits + row * a->vocab;
    float top = -__builtin_inff();
    for (int64_t i = 0; i < a->vocab; i++) {
        const float x = logits[i] * a->scales[row];
        keys[i] = sortable(x);
        weights[i] = x;
        top = x > top ? x : top;
    }
    float border = top + a->log_min_p[row];
    uint32_t lowest = 0;
    if (a->top_k[row] > 0 && a->top_k[row] < a->vocab) {
        lowest = select_key(keys, NULL, a->vocab, (double)a->top_k[row]);
        const float last = from_sortable(lowest);
        border = last > border ? last : border;
    }
    if (a->top_p[row] < 1) {
        double total = 0;
        for (int64_t i = 0; i < a->vocab; i += LANES) {
            vec x = splat(top - 100);
            const int64_t left = a->vocab - i, count = left < LANES ? left : LANES;
            memcpy(&x, weights + i, sizeof(float) * count);
            x = exp_vec(x - top);
            for (int64_t lane = 0; lane < count; lane++) {
                const float weight = keys[i + lane] >= lowest ? x[lane] : 0;
                weights[i + lane] = weight;
                total += weight;
            }
        }
        const float last = from_sortable(select_key(keys, weights, a->vocab, a->top_p[row] * total));
        border = last > border ? last : border;
    }
    return border;
}

/* The best of tokens from..to-1 of a row. */
static void look(const Args *a, int64_t row, float border, int64_t from, int64_t to, float *best, int64_t *token) {
    const float *logits = a->logits + row * a->vocab, scale = a->scales[row];
    const float lowest = -__builtin_inff();
    vec top = splat(lowest);
    ivec at = {0}, nan = {0};
    uvec ids = (uvec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)from;
    for (int64_t i = from; i < to; i += LANES, ids += LANES) {
        vec x = splat(lowest);
        if (i + LANES <= to) x = *(const vec *)(logits + i);
        else memcpy(&x, logits + i, sizeof(float) * (to - i));
        nan |= x != x;
        if (scale > 0) {
            x *= scale;
            const ivec counts = x >= splat(border);
            x = (vec)(((ivec)(x + gumbel(ids, a->keys + 2 * row)) & counts) | ((ivec)splat(lowest) & ~counts));
        }
        const ivec better = x > top;
        top = (vec)(((ivec)x & better) | ((ivec)top & ~better));
        at = ((ivec)ids & better) | (at & ~better);
    }
    *best = lowest, *token = from;
    for (int lane = 0; lane < LANES; lane++) {
        if (top[lane] > *best || (top[lane] == *best && top[lane] > lowest && at[lane] < *token))
            *best = top[lane], *token = at[lane];
    }
    for (int lane = 0; lane < LANES; lane++)
        if (nan[lane]) *best = __builtin_nanf("");
}

static int is_filtered(const Args *a, int64_t row) {
    return a->scales[row] > 0 && (a->top_k[row] > 0 || a->top_p[row] < 1 || a->log_min_p[row] > -__builtin_inff());
}

/* Returns 0, or 1 if there was no memory. */
int choose(const Args *a) {
    const int64_t chunks = (a->vocab + CHUNK - 1) / CHUNK, items = a->rows * chunks;
    float *best = malloc(sizeof(float) * (items + a->rows)), *borders = best + items;
    int64_t *tokens = malloc(sizeof(int64_t) * items);
    const int ready = best && tokens;
    int failed = !ready;
#pragma omp parallel if (ready) reduction(| : failed)
    if (ready) {
        uint32_t *keys = NULL; /* and the weights behind them */
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < a->rows; row++) {
            borders[row] = -__builtin_inff();
            if (!is_filtered(a, row)) continue;
            if (!keys) keys = malloc(2 * sizeof(float) * a->vocab);
            if (keys) borders[row] = border_of(a, row, keys, (float *)(keys + a->vocab));
            else failed = 1;
        }
        free(keys);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; item++) {
            const int64_t row = item / chunks, from = item % chunks * CHUNK;
            const int64_t to = from + CHUNK < a->vocab ? from + CHUNK : a->vocab;
            look(a, row, borders[row], from, to, best + item, tokens + item);
        }
    }
    for (int64_t row = 0; row < a->rows && !failed; row++) {
        int64_t found = row * chunks;
        for (int64_t item = found; item < (row + 1) * chunks; item++)
            if (best[item] > best[found] || best[item] != best[item]) found = item;
        a->best[row] = best[found], a->tokens[row] = tokens[found];
    }
    free(best);
    free(tokens);
    return failed;
}
