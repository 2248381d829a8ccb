/* Tiles of work of attention, for decoder.c: which rows a thread computes together, over which keys. */
#include "decoder_attention.h"

#define NARROW_ROWS 12 /* so many rows at most are computed with keys in the lanes */

/* What one thread needs for any tile: sums, queries, scores, weights; maximum, sum and factor of each row. */
static int64_t scratch_floats(const Op *op) {
    return TILE_ROWS * (op->dim + op->dim / 2 + BLOCK + BLOCK / 2 + 3);
}

/* `at`: where each row's numbers begin in the queries, and in the outputs. */
static void gather_queries(const Block *b, const int64_t *at, uint16_t *q, int wide) {
    const int64_t dim = b->op->dim;
    const uint16_t *in = b->op->in;
    if (wide) memset(q, 0, sizeof *q * dim * TILE_ROWS);
    for (int64_t i = 0; i < b->rows; i++) {
        if (wide)
            for (int64_t d = 0; d < dim; d += 2) memcpy(q + d * TILE_ROWS + 2 * i, in + at[i] + d, 2 * sizeof *q);
        else memcpy(q + i * dim, in + at[i], sizeof *q * dim);
    }
}

/* The sums, divided by each row's sum of weights, to where the rows' outputs stand. */
static void scatter_sums(const Block *b, const int64_t *at, int wide) {
    const int64_t dim = b->op->dim;
    uint16_t *out = b->op->out;
    for (int64_t i = 0; i < TILE_ROWS; i++) b->sum[i] = 1.0f / b->sum[i];
    for (int64_t d = 0; d < dim; d += LANES) {
        uint16_t turned[LANES][TILE_ROWS];
        for (int64_t c = 0; wide && c < LANES; c++)
            for (int64_t i = 0; i < b->rows; i += LANES)
                store_bfloat16(turned[c] + i, *(vec *)(b->sums + (d + c) * TILE_ROWS + i) * *(vec *)(b->sum + i));
        for (int64_t i = 0; i < b->rows; i++) {
            if (wide)
                for (int64_t c = 0; c < LANES; c++) out[at[i] + d + c] = turned[c][i];
            else store_bfloat16(out + at[i] + d, *(vec *)(b->sums + i * dim + d) * b->sum[i]);
        }
    }
}

/* Rows pair..pair+rows-1 of those that request `row` has for one key/value head, over the keys from `first` on. Or those
 * of several requests that decode, `members`, which begin with the same `shared` keys: these are read once for all. */
typedef struct {
    int64_t row, members, pair, rows, start, first, shared;
} Tile;

/* How many requests from `row` on, at most `most`, have one token each and the same pages in their first whole blocks. */
static int64_t members_from(const Step *step, int64_t row, int64_t most, int64_t *shared) {
    const int32_t *pages = step->block_table + row * step->table_width;
    int64_t members = 1, common = (step->seq_lens[row] - 1) / BLOCK * BLOCK;
    for (int64_t other = row + 1; members < most && other < step->rows; other++, members++) {
        const int32_t *theirs = pages + members * step->table_width;
        const int64_t own = (step->seq_lens[other] - 1) / BLOCK * BLOCK, most_common = own < common ? own : common;
        int64_t same = 0;
        while (same < most_common && pages[same / step->page_size] == theirs[same / step->page_size])
            same += step->page_size;
        same = (same < most_common ? same : most_common) / BLOCK * BLOCK;
        if (step->cu_q[other + 1] - step->cu_q[other] != 1 || same == 0) break;
        common = same;
    }
    *shared = members > 1 ? common : 0;
    return members;
}

static int64_t most_tiles(const Op *op, const Step *step) {
    return step->rows + step->n * (op->heads / op->kv_heads) / TILE_ROWS;
}

/* Into `tiles`, which has room for `most_tiles`; returns how many there are for each key/value head. Requests share tiles
 * as far as there remain enough for all threads; the numbers are the same either way. */
static int64_t list_tiles(const Op *op, const Step *step, int64_t threads, Tile *tiles) {
    const int64_t group = op->heads / op->kv_heads, spare = step->rows * op->kv_heads / (2 * threads);
    const int64_t most = op->window ? 1 : spare < NARROW_ROWS / group ? spare : NARROW_ROWS / group;
    int64_t count = 0;
    for (int64_t row = 0, members; row < step->rows; row += members) {
        const int64_t length = step->cu_q[row + 1] - step->cu_q[row], start = step->seq_lens[row] - length;
        int64_t shared = 0;
        members = members_from(step, row, length == 1 ? most : 1, &shared);
        const int64_t rows = (length > members ? length : members) * group;
        /* The last of a prompt see the longest context, and come first. */
        for (int64_t pair = (rows - 1) / TILE_ROWS * TILE_ROWS; pair >= 0; pair -= TILE_ROWS) {
            const int64_t oldest = op->window ? start + pair / group - op->window + 1 : 0;
            const int64_t left = rows - pair < TILE_ROWS ? rows - pair : TILE_ROWS;
            tiles[count++] = (Tile){row, members, pair, left, start, oldest > 0 ? oldest / BLOCK * BLOCK : 0, shared};
        }
    }
    return count;
}

/* The end of the keys of one of a tile's members. */
static int64_t end_of(const Op *op, const Step *step, const Tile *t, int64_t member) {
    if (t->members > 1) return step->seq_lens[t->row + member];
    return t->start + (t->pair + t->rows - 1) / (op->heads / op->kv_heads) + 1;
}

/* Tile `t` of head `kv`; `after`, of head `after_kv`, is what this thread takes next. */
static void attention_tile(const Op *op, const Step *step, float *scratch, const Tile *t, int64_t kv, const Tile *after,
                           int64_t after_kv) {
    const int64_t group = op->heads / op->kv_heads, begin = step->cu_q[t->row], dim = op->dim;
    const int wide = t->rows > NARROW_ROWS;
    float *sums = scratch, *max = sums + TILE_ROWS * dim, *sum = max + TILE_ROWS, *keep = sum + TILE_ROWS;
    float *scores = keep + TILE_ROWS;
    uint16_t *weights = (uint16_t *)(scores + TILE_ROWS * BLOCK), *q = weights + TILE_ROWS * BLOCK;
    int64_t at[TILE_ROWS];
    for (int64_t i = 0; i < t->rows; i++)
        at[i] = ((begin + (t->pair + i) / group) * op->heads + kv * group + (t->pair + i) % group) * dim;
    const Block whole = {.op = op, .q = q, .weights = weights, .scores = scores, .sums = sums, .max = max, .sum = sum,
                         .keep = keep, .stride = 2 * step->page_size, .rows = t->rows, .group = group,
                         .start = t->start, .pair = t->pair};
    gather_queries(&whole, at, q, wide);
    memset(sums, 0, sizeof(float) * (wide ? TILE_ROWS : t->rows) * dim);
    for (int64_t i = 0; i < TILE_ROWS; i++) max[i] = -1e30f, sum[i] = 0;
    Place next = locate(op, step, t->row, kv, t->first, end_of(op, step, t, 0));
    /* First the shared keys, then each member's own. */
    for (int64_t i = t->shared ? -1 : 0; i < t->members; i++) {
        Block b = whole;
        if (i >= 0 && t->members > 1) {
            b.q += i * group * dim, b.sums += i * group * dim, b.max += i * group, b.sum += i * group;
            b.rows = group, b.start = step->seq_lens[t->row + i] - 1;
        }
        const int64_t row = t->row + (i > 0 ? i : 0), end = i < 0 ? t->shared : end_of(op, step, t, i);
        for (b.first = i < 0 ? 0 : t->first + t->shared; b.first < end; b.first += BLOCK) {
            b.count = end - b.first < BLOCK ? end - b.first : BLOCK;
            b.here = next;
            if (b.first + BLOCK < end) next = locate(op, step, row, kv, b.first + BLOCK, end);
            else if (i + 1 < t->members)
                next = locate(op, step, t->row + i + 1, kv, t->shared, end_of(op, step, t, i + 1));
            else next = locate(op, step, after->row, after_kv, after->first, end_of(op, step, after, 0));
            b.next = next;
            if (wide) attend_wide(&b);
            else attend_narrow(&b);
        }
    }
    scatter_sums(&whole, at, wide);
}
