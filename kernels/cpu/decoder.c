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
 * Activations between operations are bfloat16 where a product follows, else float32. Products are in decoder_matmul.h,
 * attention in decoder_tiles.h and, with the layout of keys and values, decoder_attention.h.
 */
#include "decoder_matmul.h"
#include "decoder_tiles.h"

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#define SPINS 2000 /* turns at a barrier before the core is offered to others */

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
        if (head >= op->heads) store_key(op, head - op->heads, step, token, key);
    }
    for (int64_t head = 0; head < op->kv_heads; head++, x += dim) store_value(op, head, step, token, x);
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

static int64_t tiles_in(const Op *op, const Step *step, int64_t threads, Tile *tiles) {
    switch (op->kind) {
        case MATMUL: return column_tiles(op) * chunks_of(step->n);
        case ATTENTION: return list_tiles(op, step, threads, tiles) * op->kv_heads;
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
        case ATTENTION:
            attention_tile(op, step, scratch, tiles + index / op->kv_heads, index % op->kv_heads,
                           tiles + then / op->kv_heads, then % op->kv_heads);
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
            const int64_t size = scratch_floats(ops + i), tiles = most_tiles(ops + i, step);
            scratch_size = size > scratch_size ? size : scratch_size;
            list_size = tiles > list_size ? tiles : list_size;
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
