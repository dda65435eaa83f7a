/* Linear layers: y = act(x W^T + bias) + residual out of tiles. This file owns blocking, edges in m and n, the
 * quantization of rows on the way in and out, and threads; the kernels own one tile.
 *
 * Two schedules. By rows: a job takes a chunk of rows through everything (quantize in, every panel, quantize
 * out) while it stays in its core's L2; no barrier, weights are read once per chunk. By columns, when there are
 * too few rows for that: quantize all rows, then panels are the jobs, then quantize the outputs.
 * Every element is computed by the same tile arithmetic either way, so the schedule never shows in the result.
 *
 * Rows of floats that are long go block by block of input features, which L2 keeps while some panels go by: whole rows would
 * come from L3, or from memory, once per panel. The sums wait in a buffer, exactly, from one block to the next. */
#include "rows_in.h"
#include "zq_kernels.h"

#include <float.h>
#include <string.h>

enum {
    ALIAS_BYTES = 2048,    /* rows a multiple of this apart share too few L1 sets */
    STREAM_BYTES = 6 << 20, /* float32 outputs from this size on bypass the caches: L2 and most of L3 lose them anyway */
    MIN_TILES = 2,         /* per thread: below that, work is split by columns */
    LOW_TILE = 32,         /* rows: tall tiles may become so low before work is split by columns */
    FEW_TILES = 8,         /* per chunk: with less, chunks of one tile more and of one less are too unequal */
    LONG_ROW = 2560,       /* floats: longer rows, of which L2 has room for few, go in blocks */
    F32_BLOCK = 768,       /* of so many input features at the most; */
    BLOCK_PANELS = 8,      /* so many panels meet a block before the next one: their sums stay in L2 as well */
    MIN_CHUNK_ROWS = 96,   /* a chunk has at least so many rows, or the weights are read too often */
    FEW_ROWS = 32,         /* up to so many, weights out of L3 are read once, not once per thread; out of memory: memory_rows */
    FAR_BYTES = 64 << 10,  /* weights that L2 does not keep from one call to the next */
    NEAR_BYTES = 16 << 20, /* weights that L3 keeps until the next product, if no more than that is read in between */
    AHEAD_BYTES = 6144,    /* what memory delivers during its latency, and some */
    SMALL_JOBS = 8,        /* of panels, per thread, after one big one, */
    SMALL_BYTES = 96 << 10, /* each of so many bytes at least: some two microseconds */
};

/* Quantized (or given) activations of rows r0..r1: pointers such that index i * split is row r0 + i. */
typedef struct {
    const void *a;
    int64_t lda;
    const float *sx;
    const int32_t *zx;
    const int32_t *start; /* groups: (rows, groups) */
} operand;

/* Where the prepared form of some rows lies: one buffer, arrays one behind the other. */
typedef struct {
    uint8_t *q;
    float *sx;
    int32_t *zx, *start;
} prepared;

typedef struct {
    const zq_linear *w;
    const zq_rows *x;
    const zq_out *out;
    const zq_kernels *K;
    int64_t m;
    int64_t kpad;     /* k as the kernels see it */
    int64_t lda;      /* bytes between quantized rows */
    int64_t split;    /* rows that the kernels see per row of x: 2 for TOKEN_16, else 1 */
    int64_t tiles;    /* row tiles over all of m: */
    int64_t rows, longer; /* rows of a tile; the first `longer` ones have one more */
    int64_t chunks;   /* row chunks (by rows) */
    int64_t panels;
    int64_t shares, jobs_each; /* of panels: as many as threads where there are enough; jobs in each (by columns) */
    int threads;
    int64_t item;       /* bytes of an element of a */
    int far;            /* the weights are read from beyond L2 */
    int near;           /* and L3 has them */
    int64_t few_tiles;  /* up to so many tiles of rows go through blocks of panels one after the other */
    void (*kernel)(zq_tile *);
    int64_t groups;     /* scales per channel, with groups; else 0 */
    int32_t offset;     /* what makes the groups' codes unsigned: 8 or 128 */
    int prepare_in;     /* the rows that the kernels see are made from x first */
    int stream_out;
    int copy_in; /* float32 rows whose pitch aliases: move them */
    int quantize_out;
    /* by columns: */
    prepared shared; /* rows prepared for all threads together, or */
    uint64_t id;     /* not 0: every thread prepares them for itself, for the product of this number */
    float *y;
    zq_rows_in in;
} gemm_job;

/* Row tiles differ by at most one row: short tiles at the end would waste the kernel. */
static int64_t
tile_start(const gemm_job *g, int64_t tile)
{
    return tile * g->rows + zq_min(tile, g->longer);
}

static void
set_tiles(gemm_job *g, int64_t tiles)
{
    g->tiles = tiles;
    g->rows = g->m / tiles;
    g->longer = g->m % tiles;
}

/* One row of x into its `split` rows of codes. */
static void
quantize_row(gemm_job *g, int64_t r, uint8_t *q, float *sx, int32_t *zx)
{
    const float *x = zq_read_row_scratch(&g->in, r);
    if (!x) {
        return;
    }
    if (g->split == 1) {
        zq_code_row(&g->in, r, x, q, sx, zx);
    }
    else if (!zq_quantize_token16(g->K, x, g->w->k, q, q + g->lda, sx, zx)) {
        zq_note_bad_row(&g->in.trouble, r);
    }
}

static size_t
prepared_bytes(const gemm_job *g, int64_t rows)
{
    return (size_t)(rows * g->split * (g->lda + (2 + g->groups) * 4));
}

static prepared
prepared_at(const gemm_job *g, int64_t rows, void *buffer)
{
    const int64_t n = rows * g->split;
    uint8_t *q = buffer;
    float *sx = (float *)(q + n * g->lda);
    return (prepared){q, sx, (int32_t *)(sx + n), (int32_t *)(sx + 2 * n)};
}

static operand
prepared_operand(const gemm_job *g, const prepared *p)
{
    return (operand){p->q, g->w->kind == ZQ_W_F32 ? g->lda / (int64_t)sizeof(float) : g->lda, p->sx, p->zx, p->start};
}

/* Row r of x into codes and scales (float32 weights: float32 behind shift and factor) at row `at` of p, and what groups
 * need: signed codes and where the sums start. The slack up to kpad is multiplied too, by codes that may not be 0: it must
 * be. */
static void
prepare_row(gemm_job *g, int64_t r, const prepared *p, int64_t at)
{
    const zq_rows *x = g->x;
    const int64_t k = g->w->k;
    uint8_t *q = p->q + at * g->lda;
    if (g->w->kind == ZQ_W_F32) {
        zq_read_row(&g->in, r, (float *)q);
        return;
    }
    const uint8_t *codes = x->f32 ? q : x->u8 + r * x->ld_u8;
    if (!x->f32) {
        p->sx[at] = x->scale[r];
        p->zx[at] = x->zero[r];
    }
    else {
        quantize_row(g, r, q, p->sx + at, p->zx + at);
    }
    for (int64_t i = 0; i < g->split; i++, q += g->lda, codes += g->lda) {
        if (g->groups) {
            g->K->center_groups_b8(codes, k, g->w->group, g->offset, q, p->start + (at + i) * g->groups);
        }
        memset(q + k, 0, (size_t)(g->lda - k));
    }
}

/* Rows from r0 on to codes, each with a scale of its own */
static void
quantize_part(gemm_job *g, int64_t r0, const zq_token_rows *part)
{
    const int64_t bad = zq_quantize_token_rows(g->K, part);
    if (bad < part->rows) {
        zq_note_bad_row(&g->in.trouble, r0 + bad);
    }
}

static void
prepare_rows(gemm_job *g, int64_t r0, int64_t r1, const prepared *p)
{
    const zq_rows *x = g->x;
    const int64_t k = g->w->k;
    if (x->f32 && g->w->kind == ZQ_W_S8 && !g->w->in_factor && g->split == 1 && !g->in.one_scale) {
        const zq_token_rows part = {.x = x->f32 + r0 * x->ld_f32, .ld_x = x->ld_f32, .rows = r1 - r0, .k = k, .mode = x->quant,
                                    .q = p->q, .ld_q = g->lda, .zeros = g->lda - k, .scale = p->sx, .zero = p->zx};
        quantize_part(g, r0, &part);
        return;
    }
    for (int64_t r = r0; r < r1; r++) {
        prepare_row(g, r, p, (r - r0) * g->split);
    }
}

static operand
given_operand(const gemm_job *g, int64_t r0)
{
    const zq_rows *x = g->x;
    if (g->w->kind == ZQ_W_F32) {
        return (operand){x->f32 + r0 * x->ld_f32, x->ld_f32, NULL, NULL, NULL};
    }
    return (operand){x->u8 + r0 * x->ld_u8, x->ld_u8, x->scale + r0, x->zero + r0, NULL};
}

/* Row tiles [t0, t1) that meet one panel after the other. `op` and `y` are indexed from row `base`. */
typedef struct {
    int64_t t0, t1, base;
    const operand *op;
    float *y;
    int64_t blocks; /* of input features, and */
    float *sums;    /* where those of the blocks before wait: (panels, rows, ZQ_NR); NULL with one block */
    zq_tile tile; /* what is the same for every panel; filled in once, as a panel is only a few hundred cycles */
} strip;

static int64_t
strip_rows(const gemm_job *g, const strip *s)
{
    return tile_start(g, s->t1) - tile_start(g, s->t0);
}

static strip
strip_of(const gemm_job *g, int64_t t0, int64_t t1, int64_t base, const operand *op, float *y, int64_t ldy)
{
    const zq_linear *w = g->w;
    const zq_tile tile = {.k = g->kpad, .group = w->group, .lda = op->lda, .pairs = g->split == 2, .act = g->out->act,
                          .ldy = ldy, .ldr = g->out->ld_residual, .stream = g->stream_out, .ld_start = g->groups,
                          .rank = g->out->add.rank, .ld_low = g->out->add.ld_t,
                          .ahead_step = zq_ceil_div(128, t1 - t0), .ahead_to_l2 = g->K->fetch_to_l2 && !g->near};
    return (strip){.t0 = t0, .t1 = t1, .base = base, .op = op, .y = y, .blocks = 1, .tile = tile};
}

ZQ_INLINE const char *
panel_at(const zq_linear *w, int64_t p)
{
    return (const char *)w->panels + p * w->panel_bytes;
}

/* What a tile of the next panel reads once, beside the codes, waits for memory otherwise. */
ZQ_INLINE void
fetch_columns(const zq_linear *w, int64_t col)
{
    const void *columns[] = {w->bias, w->scale, w->colsum, w->zcorr};
    for (int i = 0; i < 4; i++) {
        if (columns[i]) {
            __builtin_prefetch((const char *)columns[i] + col * 4);
            __builtin_prefetch((const char *)columns[i] + col * 4 + 64);
        }
    }
}

/* To panel p, of which the strip's tiles take all columns. */
static void
move_to_panel(const gemm_job *g, int64_t p, zq_tile *t)
{
    const zq_linear *w = g->w;
    const int64_t col = p * ZQ_NR;
    t->nr = (int)zq_min(ZQ_NR, w->n - col);
    t->b = panel_at(w, p);
    t->bias = w->bias + col;
    t->low_b = t->rank ? g->out->add.u + col * t->rank : NULL;
    if (w->kind == ZQ_W_S8) {
        t->scale = w->scale + col;
        t->colsum = w->colsum + col;
    }
    else if (g->groups) {
        t->zcorr = w->zcorr + col;
    }
}

/* To row tile `tile` of panel p. */
static void
move_to_rows(const gemm_job *g, const strip *s, int64_t tile, int64_t p, zq_tile *t)
{
    const operand *op = s->op;
    const int64_t row = tile_start(g, tile), at = (row - s->base) * g->split, col = p * ZQ_NR;
    t->mr = (int)((g->rows + (tile < g->longer)) * g->split);
    t->a = (const char *)op->a + at * op->lda * g->item;
    t->sx = op->sx ? op->sx + at : NULL;
    t->zx = op->zx ? op->zx + at : NULL;
    t->start = op->start ? op->start + at * g->groups : NULL;
    t->low = t->rank ? g->out->add.t + row * g->out->add.ld_t : NULL;
    t->residual = g->out->residual ? g->out->residual + row * g->out->ld_residual + col : NULL;
    t->y = s->y + (row - s->base) * t->ldy + col;
}

/* Input features k0..k1 of all (k), and the sums of the strip's rows for one panel before and behind them. */
typedef struct {
    int64_t k0, k1, k;
    float *sums;
} block;

ZQ_INLINE const char *
block_of_panel(const gemm_job *g, int64_t p, int64_t k0)
{
    return panel_at(g->w, p) + k0 * ZQ_NR * (int64_t)sizeof(float);
}

/* From all input features of a tile to those of b. */
static void
move_to_block(const gemm_job *g, const strip *s, int64_t tile, const block *b, zq_tile *t)
{
    float *sums = b->sums + (tile_start(g, tile) - tile_start(g, s->t0)) * ZQ_NR;
    t->a = (const float *)t->a + b->k0;
    t->sums_in = b->k0 > 0 ? sums : NULL;
    t->sums_out = b->k1 < b->k ? sums : NULL;
    if (t->sums_out) {
        t->residual = NULL;
    }
}

/* Panel p, or the block b of it, times the strip's rows; the `bytes` at `next` are needed after it. All tiles but the first
 * read the panel from L2, so that each of them fetches its part of those. */
ZQ_INLINE void
run_panel(const gemm_job *g, int64_t p, const block *b, const char *next, int64_t bytes, strip *s)
{
    const int64_t part = bytes / (s->t1 - s->t0);
    zq_tile *t = &s->tile;
    move_to_panel(g, p, t);
    if (b) {
        t->b = block_of_panel(g, p, b->k0);
        t->k = b->k1 - b->k0;
    }
    for (int64_t tile = s->t0, stop; tile < s->t1; tile = stop) {
        stop = tile < g->longer ? zq_min(s->t1, g->longer) : s->t1;
        move_to_rows(g, s, tile, p, t);
        if (b) {
            move_to_block(g, s, tile, b, t);
        }
        t->ahead = g->far ? next + part * (tile - s->t0) : NULL;
        t->more = stop - tile - 1;
        t->next_rows = t->mr;
        t->next_a = t->mr * t->lda * g->item;
        t->next_ahead = part;
        g->kernel(t);
    }
}

/* Panels [p, end) times the strip's one tile of rows: the kernel goes on from panel to panel by itself, and prefetches a
 * little ahead of where it reads, which runs on into the next panel. */
static void
run_one_tile(const gemm_job *g, int64_t p, int64_t end, strip *s)
{
    const zq_linear *w = g->w;
    const int64_t whole = w->n / ZQ_NR;
    zq_tile *t = &s->tile;
    t->next_cols = ZQ_NR;
    t->next_b = t->next_ahead = w->panel_bytes;
    for (int64_t next; p < end; p = next) {
        next = p < whole ? zq_min(whole, end) : end;
        move_to_panel(g, p, t);
        move_to_rows(g, s, s->t0, p, t);
        t->ahead = g->far ? (const char *)t->b + AHEAD_BYTES : NULL;
        t->more = next - p - 1;
        g->kernel(t);
    }
}

/* Panels [p, end) times the strip's few tiles of rows: in blocks that stay in L2, each tile through the block by itself. Panel
 * by panel, what every panel's start takes would be shared by these few tiles only. Not for weights from memory: the first tile
 * would wait for it, and the others leave it idle. */
static void
run_few_tiles(const gemm_job *g, int64_t p, int64_t end, const strip *s)
{
    const int64_t panels = end - p, blocks = zq_ceil_div(panels * g->w->panel_bytes, zq_l2_room());
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t tile = s->t0; tile < s->t1; tile++) {
            strip one = *s;
            one.t0 = tile;
            one.t1 = tile + 1;
            one.tile.ahead_step = 128;
            run_one_tile(g, p + panels * block / blocks, p + panels * (block + 1) / blocks, &one);
        }
    }
}

/* Panels [p, end) times the strip's rows, panel after panel */
static void
run_whole_panels(const gemm_job *g, int64_t p, int64_t end, strip *s)
{
    for (; p < end; p++) {
        const int64_t ahead = p + 1 < end ? g->w->panel_bytes : 0;
        if (ahead) {
            fetch_columns(g->w, (p + 1) * ZQ_NR);
        }
        run_panel(g, p, NULL, panel_at(g->w, p) + ahead, ahead, s);
    }
}

/* Panels [p, end), BLOCK_PANELS at the most, times the strip's rows, in blocks of input features. Behind the last block of the
 * last panel comes panel `end`, or nothing if that is `last`. */
static void
run_blocks(const gemm_job *g, int64_t p, int64_t end, int64_t last, strip *s)
{
    const int64_t rows = strip_rows(g, s), k = g->kpad;
    for (int64_t i = 0; i < s->blocks; i++) {
        block b = {.k0 = k * i / s->blocks, .k1 = k * (i + 1) / s->blocks, .k = k};
        for (int64_t at = p; at < end; at++) {
            const char *next = at + 1 < end ? block_of_panel(g, at + 1, b.k0) : block_of_panel(g, p, b.k1);
            int64_t bytes = (b.k1 - b.k0) * ZQ_NR * (int64_t)sizeof(float);
            if (at + 1 == end && b.k1 == k) {
                next = block_of_panel(g, end < last ? end : p, 0);
                bytes = end < last ? bytes : 0;
            }
            b.sums = s->sums + (at - p) * rows * ZQ_NR;
            run_panel(g, at, &b, next, bytes, s);
        }
    }
}

static int
has_long_rows(const zq_linear *w)
{
    return w->kind == ZQ_W_F32 && w->k > LONG_ROW;
}

/* Long rows in blocks, unless L2 has room for the strip's as they are. Without memory for the sums they stay whole. */
static void
set_blocks(const gemm_job *g, strip *s)
{
    const int64_t rows = strip_rows(g, s);
    if (has_long_rows(g->w) && rows * g->kpad * (int64_t)sizeof(float) > zq_l2_room()) {
        s->sums = zq_scratch(ZQ_SCRATCH_SUMS, (size_t)(BLOCK_PANELS * rows * ZQ_NR) * sizeof *s->sums);
        s->blocks = s->sums ? zq_ceil_div(g->kpad, F32_BLOCK) : 1;
    }
}

/* Panels [p, end) times the strip's rows */
static void
run_panels(const gemm_job *g, int64_t p, int64_t end, strip *s)
{
    const int64_t tiles = s->t1 - s->t0;
    if (tiles == 1) {
        run_one_tile(g, p, end, s);
        return;
    }
    if (tiles <= g->few_tiles) {
        run_few_tiles(g, p, end, s);
        return;
    }
    set_blocks(g, s);
    if (s->blocks == 1) {
        run_whole_panels(g, p, end, s);
        return;
    }
    for (int64_t stop; p < end; p = stop) {
        stop = zq_min(p + BLOCK_PANELS, end);
        run_blocks(g, p, stop, end, s);
    }
}

/* Floats between the rows of outputs that only become codes */
static int64_t
out_pitch(const gemm_job *g)
{
    return zq_row_pitch(g->w->n * (int64_t)sizeof(float)) / (int64_t)sizeof(float);
}

/* Finished float rows [r0, r1) to codes; y is indexed from r0. */
static void
quantize_outputs(gemm_job *g, int64_t r0, int64_t r1, const float *y, int64_t ldy)
{
    const zq_out *o = g->out;
    const int64_t n = g->w->n, slack = zq_min(o->ld_q, zq_round_up(n, 64)) - n;
    if (o->quant != ZQ_QUANT_STATIC) {
        const zq_token_rows part = {.x = y, .ld_x = ldy, .rows = r1 - r0, .k = n, .mode = o->quant, .q = o->q + r0 * o->ld_q,
                                    .ld_q = o->ld_q, .zeros = slack, .scale = o->q_scale + r0, .zero = o->q_zero + r0};
        quantize_part(g, r0, &part);
        return;
    }
    for (int64_t r = r0; r < r1; r++, y += ldy) {
        uint8_t *q = o->q + r * o->ld_q;
        if (!(g->K->absmax_f32(y, n) <= FLT_MAX)) {
            zq_note_bad_row(&g->in.trouble, r);
        }
        if (o->static_count == 1) {
            g->K->quantize_div_f32_b8(y, n, o->static_scale[0], o->static_zero[0], 0, 255, q);
        }
        else {
            g->K->quantize_vec_f32_b8(y, n, o->static_scale, o->static_zero, 0, 255, q);
        }
        memset(q + n, 0, (size_t)slack);
    }
}

/* Rows of no outputs, as codes */
static void
quantize_nothing(int64_t m, const zq_out *out)
{
    for (int64_t r = 0; r < m && (out->quant == ZQ_QUANT_TOKEN_SYM || out->quant == ZQ_QUANT_TOKEN_ASYM); r++) {
        zq_token_scale(out->quant, 0.0f, 0.0f, out->q_scale + r, out->q_zero + r);
    }
}

/* The last of a job: streaming stores are not ordered by what tells the caller that it is done. */
static void
order_stores(const gemm_job *g)
{
    if (g->stream_out) {
        atomic_thread_fence(memory_order_seq_cst);
    }
}

/* ---- by rows --------------------------------------------------------------------------------------- */
static void
chunk_job(void *ctx, int64_t c)
{
    gemm_job *g = ctx;
    const int64_t t0 = g->tiles * c / g->chunks, t1 = g->tiles * (c + 1) / g->chunks;
    const int64_t r0 = tile_start(g, t0), rows = tile_start(g, t1) - r0;
    operand op;
    if (g->prepare_in) {
        char *scratch = zq_scratch(ZQ_SCRATCH_A, prepared_bytes(g, rows));
        if (!scratch) {
            atomic_store(&g->in.trouble.no_memory, 1);
            return;
        }
        const prepared p = prepared_at(g, rows, scratch);
        prepare_rows(g, r0, r0 + rows, &p);
        op = prepared_operand(g, &p);
    }
    else if (g->copy_in) {
        float *rows_in = zq_scratch(ZQ_SCRATCH_A, (size_t)(rows * g->lda));
        if (!rows_in) {
            atomic_store(&g->in.trouble.no_memory, 1);
            return;
        }
        for (int64_t r = 0; r < rows; r++) {
            memcpy((char *)rows_in + r * g->lda, g->x->f32 + (r0 + r) * g->x->ld_f32, (size_t)g->w->k * sizeof *rows_in);
        }
        op = (operand){rows_in, g->lda / 4, NULL, NULL, NULL};
    }
    else {
        op = given_operand(g, r0);
    }
    int64_t ldy = g->out->ld_y;
    float *y = g->out->y ? g->out->y + r0 * ldy : NULL;
    if (!y) {
        ldy = out_pitch(g);
        y = zq_scratch(ZQ_SCRATCH_Y, (size_t)(rows * ldy) * sizeof *y);
        if (!y) {
            atomic_store(&g->in.trouble.no_memory, 1);
            return;
        }
    }
    strip s = strip_of(g, t0, t1, r0, &op, y, ldy);
    run_panels(g, 0, g->panels, &s);
    if (g->quantize_out) {
        quantize_outputs(g, r0, r0 + rows, y, ldy);
    }
    order_stores(g);
}

/* Rows per chunk so that its codes, or a block of its floats (and its outputs, when they are quantized afterwards) stay in
 * L2; a multiple of the thread count of chunks. */
static int64_t
count_chunks(const gemm_job *g, int threads)
{
    const int64_t floats = has_long_rows(g->w) ? F32_BLOCK : g->w->k;
    const int64_t in_bytes = g->w->kind == ZQ_W_F32 ? floats * 4 : g->lda * g->split;
    const int64_t row_bytes = in_bytes + (g->quantize_out ? g->w->n * 4 : 0);
    const int64_t rows = zq_max(MIN_CHUNK_ROWS, zq_l2_room() / zq_max(row_bytes, 1));
    const int64_t chunks = zq_round_up(zq_ceil_div(g->m, rows), threads);
    return zq_max(1, zq_min(chunks, g->tiles));
}

/* ---- by columns ------------------------------------------------------------------------------------ */
static void
prepare_job(void *ctx, int64_t r)
{
    gemm_job *g = ctx;
    prepare_row(g, r, &g->shared, r * g->split);
}

/* Long runs of panels keep the memory busy, as fetching goes on from one panel to the next; short ones end at the same time
 * on all threads. So a thread's share, which the pool hands out as a whole, is one run of three quarters of its panels and the
 * rest in small ones, which others take if they are done before; none of them so small that a run's start shows. */
static void
set_panel_jobs(gemm_job *g)
{
    g->shares = zq_min(g->threads, g->panels);
    const int64_t rest = g->panels / g->shares / 4;
    g->jobs_each = 1 + zq_min(zq_min(rest, SMALL_JOBS), rest * g->w->panel_bytes / SMALL_BYTES);
}

/* First panel of a job; of the job behind the last one: behind the last panel */
static int64_t
job_start(const gemm_job *g, int64_t job)
{
    const int64_t share = job / g->jobs_each, i = job % g->jobs_each, first = g->panels * share / g->shares;
    const int64_t panels = g->panels * (share + 1) / g->shares - first, rest = panels / 4;
    return i == 0 ? first : first + panels - rest + rest * (i - 1) / (g->jobs_each - 1);
}

/* All rows, prepared by this thread in its own scratch: of few rows that takes less time than to fetch, line by line, what
 * another core has just written. Once per product: nothing else uses that scratch between its jobs. 0 without memory. */
static int
prepare_own(gemm_job *g, prepared *p)
{
    static _Thread_local uint64_t prepared_for;
    char *scratch = zq_scratch(ZQ_SCRATCH_A, prepared_bytes(g, g->m));
    if (!scratch) {
        atomic_store(&g->in.trouble.no_memory, 1);
        return 0;
    }
    *p = prepared_at(g, g->m, scratch);
    if (prepared_for != g->id) {
        prepare_rows(g, 0, g->m, p);
        prepared_for = g->id;
    }
    return 1;
}

static void
panel_job(void *ctx, int64_t job)
{
    gemm_job *g = ctx;
    prepared rows = g->shared;
    if (g->id && !prepare_own(g, &rows)) {
        return;
    }
    const operand op = g->prepare_in ? prepared_operand(g, &rows) : given_operand(g, 0);
    const int64_t ldy = g->out->y ? g->out->ld_y : out_pitch(g);
    strip s = strip_of(g, 0, g->tiles, 0, &op, g->out->y ? g->out->y : g->y, ldy);
    run_panels(g, job_start(g, job), job_start(g, job + 1), &s);
    order_stores(g);
}

static void
requantize_job(void *ctx, int64_t r)
{
    gemm_job *g = ctx;
    const int64_t ldy = g->out->y ? g->out->ld_y : out_pitch(g);
    quantize_outputs(g, r, r + 1, (g->out->y ? g->out->y : g->y) + r * ldy, ldy);
}

static void
run_by_columns(gemm_job *g)
{
    static _Atomic(uint64_t) products;
    if (g->prepare_in && g->m * g->w->k < ZQ_SHARED_ITEMS) {
        g->id = atomic_fetch_add_explicit(&products, 1, memory_order_relaxed) + 1;
    }
    else if (g->prepare_in) {
        char *scratch = zq_scratch(ZQ_SCRATCH_A, prepared_bytes(g, g->m));
        if (!scratch) {
            atomic_store(&g->in.trouble.no_memory, 1);
            return;
        }
        g->shared = prepared_at(g, g->m, scratch);
        zq_for_rows(g->m, g->w->k, prepare_job, g);
    }
    if (!g->out->y) {
        g->y = zq_scratch(ZQ_SCRATCH_Y, (size_t)(g->m * out_pitch(g)) * sizeof *g->y);
        if (!g->y) {
            atomic_store(&g->in.trouble.no_memory, 1);
            return;
        }
    }
    set_panel_jobs(g);
    zq_parallel_for(g->shares * g->jobs_each, panel_job, g);
    if (g->quantize_out) {
        zq_for_rows(g->m, g->w->n, requantize_job, g);
    }
}

/* ---- entry ----------------------------------------------------------------------------------------- */
/* Whether the third-level cache still has the weights from their last product: so it is as long as the process has not
 * multiplied with too many others since. Speed alone depends on the answer. */
static int
is_near(const zq_linear *w, int64_t bytes)
{
    static _Atomic(int64_t) read;
    const int64_t all = bytes + atomic_fetch_add_explicit(&read, bytes, memory_order_relaxed);
    const int64_t last = w->last_use ? atomic_exchange_explicit(w->last_use, all, memory_order_relaxed) : ZQ_NEVER;
    return last != ZQ_NEVER && all - last <= NEAR_BYTES;
}

static void
choose_kernel(gemm_job *g, int *mr)
{
    const zq_kernels *K = g->K;
    switch (g->w->kind) {
    case ZQ_W_F32:
        g->kernel = K->gemm_f32;
        g->kpad = g->w->k;
        *mr = K->mr_f32;
        break;
    case ZQ_W_S8:
        g->kernel = K->gemm_u8s8;
        g->kpad = zq_round_up(g->w->k, 4);
        *mr = K->mr_u8s8;
        break;
    case ZQ_W_S8_GROUP:
    case ZQ_W_S4_GROUP:
        g->kernel = g->w->kind == ZQ_W_S4_GROUP ? K->gemm_s8u4_group : K->gemm_s8u8_group;
        g->offset = g->w->kind == ZQ_W_S4_GROUP ? 8 : 128;
        g->groups = zq_ceil_div(g->w->k, g->w->group);
        g->kpad = zq_round_up(g->w->k, ZQ_KSTEP);
        *mr = K->mr_group;
        break;
    }
}

int64_t
zq_row_pitch(int64_t bytes)
{
    const int64_t lines = zq_ceil_div(zq_max(bytes, 1), 64);
    return (lines + (lines % 2 == 0)) * 64;
}

zq_status
zq_linear_forward(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row)
{
    if (m == 0 || w->n == 0) {
        quantize_nothing(m, out);
        return ZQ_OK;
    }
    if (w->extras) {
        return zq_forward_with_extras(w, x, m, out, bad_row);
    }
    gemm_job g = {.w = w, .x = x, .out = out, .K = zq_active(), .m = m};
    zq_rows_in_init(&g.in, w, x, m);
    int mr = 1;
    choose_kernel(&g, &mr);
    g.item = w->kind == ZQ_W_F32 ? (int64_t)sizeof(float) : 1;
    g.lda = zq_row_pitch(w->k * (w->kind == ZQ_W_F32 ? 4 : 1));
    g.copy_in = w->kind == ZQ_W_F32 && !w->in_factor && x->ld_f32 % (ALIAS_BYTES / 4) == 0 && w->n > ZQ_NR;
    g.panels = zq_panel_count(w->n);
    g.prepare_in = w->in_factor || (w->kind != ZQ_W_F32 && (x->f32 || g.groups));
    g.split = x->f32 && x->quant == ZQ_QUANT_TOKEN_16 ? 2 : 1;
    set_tiles(&g, zq_ceil_div(m, mr / g.split));
    g.far = g.panels * w->panel_bytes >= FAR_BYTES;
    g.near = g.far && is_near(w, g.panels * w->panel_bytes);
    g.few_tiles = g.near ? g.K->few_tiles : 0;
    g.quantize_out = out->quant != ZQ_QUANT_NONE;
    g.stream_out = !g.quantize_out && m * out->ld_y * 4 >= STREAM_BYTES && out->ld_y % 16 == 0 && (uintptr_t)out->y % 64 == 0;
    zq_find_scale(&g.in);
    const zq_status range = zq_trouble_status(&g.in.trouble, bad_row);
    if (range != ZQ_OK) {
        return range;
    }
    const int threads = g.threads = zq_threads();
    const int once = g.far && m * g.split <= (g.near ? FEW_ROWS : g.K->memory_rows);
    if (threads > 1 && g.tiles < (int64_t)threads * MIN_TILES && m * g.split >= (int64_t)threads * MIN_TILES * LOW_TILE) {
        set_tiles(&g, (int64_t)threads * MIN_TILES);
    }
    if (threads == 1 || (g.tiles >= (int64_t)threads * MIN_TILES && !once)) {
        g.chunks = count_chunks(&g, threads);
        /* One chunk each: equal chunks, since nobody can take more later. */
        if (g.chunks == threads || (threads > 1 && g.tiles < FEW_TILES * g.chunks)) {
            set_tiles(&g, zq_min(m, zq_round_up(g.tiles, g.chunks)));
        }
        zq_parallel_for(g.chunks, chunk_job, &g);
    }
    else {
        run_by_columns(&g);
    }
    return zq_trouble_status(&g.in.trouble, bad_row);
}

/* ---- exact integer products ------------------------------------------------------------------------ */
typedef struct {
    const zq_linear *w;
    const zq_kernels *K;
    const uint8_t *a;
    const int32_t *zero;
    int64_t ld, m;
    int32_t *c;
} s32_job;

static void
s32_panel(void *ctx, int64_t p)
{
    const s32_job *s = ctx;
    const zq_linear *w = s->w;
    const int64_t col = p * ZQ_NR;
    zq_tile t = {.nr = (int)zq_min(ZQ_NR, w->n - col), .k = zq_round_up(w->k, 4), .lda = s->ld, .colsum = w->colsum + col,
                 .b = panel_at(w, p)};
    for (int64_t r = 0; r < s->m; r += s->K->mr_u8s8) {
        t.mr = (int)zq_min(s->K->mr_u8s8, s->m - r);
        t.a = s->a + r * s->ld;
        t.zx = s->zero + r;
        s->K->gemm_u8s8_s32(&t, s->c + r * w->n + col, w->n);
    }
}

void
zq_gemm_u8s8_s32(const zq_linear *w, const uint8_t *a, int64_t ld, const int32_t *zero, int64_t m, int32_t *c)
{
    assert(w->kind == ZQ_W_S8);
    s32_job s = {.w = w, .K = zq_active(), .a = a, .zero = zero, .ld = ld, .m = m, .c = c};
    if (m > 0) {
        zq_parallel_for(zq_panel_count(w->n), s32_panel, &s);
    }
}
