/* A decoder's forward pass as a list of operations, run by one team of threads, for x86 CPUs with AVX512-BF16.
 *
 * One call runs the whole list: the threads take tiles of an operation from a shared counter, and meet at a barrier
 * before the next. So there is one parallel region a step instead of hundreds, and a thread that loses its core for a
 * moment delays the others by a tile and not by its whole share.
 *
 * Every number is added up in an order that depends on its own row alone: a matrix product runs through the inner
 * dimension from first to last, whatever the number of rows. So a token's result is the same to the last bit alone or
 * in a batch, in a decode step or in any chunk of a prompt.
 *
 * Weights are packed (`decoder.py`): tiles of 32 outputs, in which pairs of inputs lie side by side, as the processor's
 * dot product wants them. Activations between operations are bfloat16 where a product follows, else float32. The layout
 * of keys and values in the pool is that of decoder_attention.h; nobody else reads them.
 */
#include "decoder_attention.h"

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#define COLUMNS 32       /* outputs in a tile of weights */
#define PANEL_ROWS 6     /* rows that the micro-kernel takes at once: 12 accumulators, and as many of rounded products */
#define GROUP 32         /* 4-bit weights that share a scale and a minimum, and their inputs that share a scale */
#define WIDE_GROUP 64    /* inputs that share a scale with 8-bit weights, if they divide: half of the scaling */
#define CHUNK_ROWS 96    /* rows of a tile of work: their inputs stay in the second-level cache */
#define SPINS 2000       /* turns at a barrier before the core is offered to others */

enum { NORM, MATMUL, ROPE, ATTENTION, QUANTIZE };
enum { STORE, ADD, GATED_SILU, GATED_GELU_TANH }; /* what becomes of a product */

typedef struct {
    int64_t kind;
    const void *in;
    void *out;
    const void *weight; /* NORM: [width]; MATMUL: packed; ROPE: of the norm of heads, [heads + kv_heads, dim] or null */
    const float *bias;  /* MATMUL: [tiles * 32] or null */
    const float *table; /* ROPE: [positions, 2, dim], cos and signed sin */
    void *keys, *values;
    const void *scales;  /* MATMUL of 8 or 4 bits: see panel_rounded */
    float *row_scales;   /* written by QUANTIZE, read by the product; [n, inner / group] */
    int32_t *group_sums; /* likewise, of a group of rounded inputs: for 8 bits -128 * sum, for 4 the float scale * sum */
    int64_t bits;   /* MATMUL, QUANTIZE: of a weight, 16, 8 or 4 */
    int64_t width;  /* NORM: of a row; MATMUL: of a row of the output */
    int64_t inner;  /* MATMUL: of a row of the input, even */
    int64_t effect; /* MATMUL: what becomes of the product; NORM: STORE bfloat16, or ADD to float32 */
    int64_t heads, kv_heads, dim, window;
    float eps, scale, softcap;
} Op;

/* ---- matrix products ---------------------------------------------------------------------------------------------*/

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

static inline int64_t group_of(int64_t inner, int64_t bits) {
    return bits == 8 && inner % WIDE_GROUP == 0 ? WIDE_GROUP : GROUP;
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

/* ---- what lies between ---------------------------------------------------------------------------------------------*/

/* 1 / root mean square of a row; the numbers of each lane first, then the lanes. */
static float inverse_rms(const float *x, int64_t width, float eps) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += *(const vec *)(x + i) * *(const vec *)(x + i);
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += squares[lane];
    for (; i < width; i++) total += x[i] * x[i];
    return 1.0f / __builtin_sqrtf(total / (float)width + eps);
}

static void norm_row(const Op *op, int64_t row) {
    const float *x = (const float *)op->in + row * op->width, *w = op->weight;
    const float scale = inverse_rms(x, op->width, op->eps);
    if (op->effect == ADD) {
        float *out = (float *)op->out + row * op->width;
        for (int64_t i = 0; i < op->width; i++) out[i] += x[i] * scale * w[i];
    } else {
        uint16_t *out = (uint16_t *)op->out + row * op->width;
        int64_t i = 0;
        for (; i + LANES <= op->width; i += LANES)
            store_bfloat16(out + i, *(const vec *)(x + i) * scale * *(const vec *)(w + i));
        for (; i < op->width; i++) out[i] = to_bfloat16(x[i] * scale * w[i]);
    }
}

/* A row of bfloat16 as signed 8-bit numbers, the largest magnitude of each group at 127. */
static void quantize_row(const Op *op, int64_t row) {
    const int64_t group = group_of(op->width, op->bits);
    for (int64_t at = row * op->width; at < (row + 1) * op->width; at += group) {
        /* Compared as integers, magnitudes keep their order, and a NaN is the largest instead of being lost. */
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = at; i < at + group; i += LANES)
            most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps(widen((const uint16_t *)op->in + i)));
        const int32_t bits = _mm512_reduce_max_epi32(most);
        float top;
        memcpy(&top, &bits, sizeof top);
        const float inverse = top > 0 ? 127.0f / top : 0;
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = at; i < at + group; i += LANES) {
            const __m512i rounded = _mm512_cvtps_epi32(widen((const uint16_t *)op->in + i) * inverse);
            _mm_storeu_si128((__m128i *)((int8_t *)op->out + i), _mm512_cvtepi32_epi8(rounded));
            sums = _mm512_add_epi32(sums, rounded);
        }
        const int32_t sum = _mm512_reduce_add_epi32(sums);
        const float scale = top / 127.0f, scaled_sum = scale * (float)sum;
        op->row_scales[at / group] = scale;
        if (op->bits == 8) op->group_sums[at / group] = (int32_t)(-128u * (uint32_t)sum); /* a NaN's may overflow */
        else memcpy(op->group_sums + at / group, &scaled_sum, sizeof scaled_sum);
    }
}

/* One token's queries (scaled), keys and values: norm of the heads, rotation, keys and values into the pool. */
static void rope_token(const Op *op, const Step *step, int64_t token) {
    const int64_t dim = op->dim, half = dim / 2, turned = op->heads + op->kv_heads;
    const float *x = (const float *)op->in + token * (turned + op->kv_heads) * dim;
    const float *cos = op->table + step->positions[token] * 2 * dim, *sin = cos + dim;
    uint16_t *query = (uint16_t *)op->out + token * op->heads * dim;
    float normed[dim], key[dim];
    for (int64_t head = 0; head < turned; head++, x += dim) {
        const float *from = x;
        if (op->weight) {
            const float scale = inverse_rms(x, dim, op->eps), *w = (const float *)op->weight + head * dim;
            for (int64_t i = 0; i < dim; i++) normed[i] = x[i] * scale * w[i];
            from = normed;
        }
        for (int64_t i = 0; i < dim; i++) {
            const float y = from[i] * cos[i] + from[i < half ? i + half : i - half] * sin[i];
            if (head < op->heads) query[head * dim + i] = to_bfloat16(y * op->scale);
            else key[i] = y;
        }
        if (head >= op->heads) store_key(op->keys, op->kv_heads, head - op->heads, dim, step, token, key);
    }
    for (int64_t head = 0; head < op->kv_heads; head++, x += dim)
        store_value(op->values, op->kv_heads, head, dim, step, token, x);
}

/* ---- the team -----------------------------------------------------------------------------------------------------*/

typedef struct {
    _Atomic int64_t next; /* how many tiles of a thread's part are taken */
    char apart[56];
} Counter;

typedef struct {
    int64_t from, to;
} Range;

/* Tiles from..to-1 of thread `me`'s own part, in shares that shrink; at last of what the others have left. 0 if all are
 * taken. So a row's numbers mostly stay in one core's cache from operation to operation. */
static int take(Counter *counters, int64_t tiles, int64_t threads, int64_t me, Range *range) {
    for (int64_t i = 0; i < threads; i++) {
        const int64_t owner = (me + i) % threads, begin = tiles * owner / threads;
        const int64_t count = tiles * (owner + 1) / threads - begin;
        _Atomic int64_t *next = &counters[owner].next;
        int64_t at = atomic_load_explicit(next, memory_order_relaxed);
        while (at < count) {
            const int64_t to = at + (count - at + 1) / 2;
            *range = (Range){begin + at, begin + to};
            if (atomic_compare_exchange_weak_explicit(next, &at, to, memory_order_relaxed, memory_order_relaxed)) return 1;
        }
    }
    return 0;
}

/* Returns when `target` arrivals have been counted. */
static void meet(_Atomic int64_t *arrived, int64_t target) {
    atomic_fetch_add_explicit(arrived, 1, memory_order_acq_rel);
    for (int64_t turn = 0; atomic_load_explicit(arrived, memory_order_acquire) < target; turn++) {
        if (turn < SPINS) _mm_pause();
        else sched_yield();
    }
}

static Heads heads_of(const Op *op) {
    return (Heads){op->in, op->out, op->keys, op->values, op->heads, op->kv_heads, op->dim, op->window, op->softcap};
}

static int64_t tiles_in(const Op *op, const Step *step, int64_t threads, Tile *tiles) {
    switch (op->kind) {
        case MATMUL: return column_tiles(op) * chunks_of(step->n);
        case ATTENTION: {
            const Heads heads = heads_of(op);
            return list_tiles(&heads, step, threads, tiles) * op->kv_heads;
        }
        default: return step->n;
    }
}

/* `then`: the tile that this thread takes next. `tiles`: those of attention. */
static void run_tile(const Op *op, const Step *step, const Tile *tiles, float *scratch, int64_t index, int64_t then) {
    switch (op->kind) {
        case NORM: norm_row(op, index); break;
        case MATMUL: matmul_tile(op, step->n, index, then); break;
        case ROPE: rope_token(op, step, index); break;
        case QUANTIZE: quantize_row(op, index); break;
        case ATTENTION: {
            const Heads heads = heads_of(op);
            attention_tile(&heads, step, scratch, tiles + index / op->kv_heads, index % op->kv_heads,
                           tiles + then / op->kv_heads, then % op->kv_heads);
        }
    }
}

/* A thread's share of an operation. In a step of few tokens it takes one range ahead, so as to know what to fetch; tiles
 * of many rows are too long for the others to wait for one more. */
static void run_op(const Op *op, const Step *step, Counter *counters, int64_t threads, int64_t me, Tile *list,
                   float *scratch) {
    const int64_t tiles = tiles_in(op, step, threads, list);
    const int early = step->n <= CHUNK_ROWS;
    Range now, then = {0, 0};
    for (int more = take(counters, tiles, threads, me, &now); more; now = then) {
        if (early) more = take(counters, tiles, threads, me, &then);
        for (int64_t index = now.from; index < now.to; index++)
            run_tile(op, step, list, scratch, index, index + 1 < now.to ? index + 1 : early && more ? then.from : index);
        if (!early) more = take(counters, tiles, threads, me, &then);
    }
}

/* Run `count` operations over the tokens of a step. Returns 0, or 1 if there was no memory for the scratch space. */
int run_ops(const Op *ops, int64_t count, const Step *step) {
    Counter *counters = calloc(count * omp_get_max_threads(), sizeof(Counter));
    int64_t scratch_size = 0, list_size = 0; /* of each thread */
    for (int64_t i = 0; i < count; i++)
        if (ops[i].kind == ATTENTION) {
            const Heads heads = heads_of(ops + i);
            const int64_t size = scratch_floats(&heads);
            scratch_size = size > scratch_size ? size : scratch_size;
            list_size = most_tiles(&heads, step) > list_size ? most_tiles(&heads, step) : list_size;
        }
    float *scratches = aligned_alloc(64, sizeof(float) * (omp_get_max_threads() * scratch_size + LANES));
    Tile *lists = malloc(sizeof(Tile) * (omp_get_max_threads() * list_size + 1));
    const int failed = !counters || !scratches || !lists;
    _Atomic int64_t arrived = 0;
#pragma omp parallel if (!failed)
    if (!failed) {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        float *scratch = scratches + me * scratch_size;
        Tile *list = lists + me * list_size;
        for (int64_t i = 0; i < count; i++) {
            run_op(ops + i, step, counters + i * threads, threads, me, list, scratch);
            meet(&arrived, (i + 1) * threads);
        }
    }
    free(counters);
    free(scratches);
    free(lists);
    return failed;
}
