/* Linear layers of a block in training. With x and w as their codes say,
 *     y = x w^T + bias        dx = dy w        dw = dy^T x        dbias = sum of rows of dy
 * and all three products are those of gemm.c: integer for y where both are codes, float32 otherwise, the right operand in
 * panels of 32 columns that are filled from codes on the way. Large ones are several of gemm.c's, so that the call's stop can be
 * asked in between; elements are the same in a piece as in the whole. */
#include "lkd_block.h"

#include <float.h>
#include <string.h>

static int
is_integer(const lkd_linear *l)
{
    return l->spec.act != ZQ_QUANT_NONE;
}

/* Inputs per scale, at most all. */
static int64_t
group_of(const lkd_linear *l)
{
    return l->groups == 1 ? l->k : l->spec.group;
}

typedef struct {
    lkd_linear *l;
    const zq_kernels *K;
    zq_trouble trouble;
} fixed_jobs;

/* One scale's weights: within the border, then to codes. */
static void
fixed_group(const fixed_jobs *f, float *w, int64_t n, float scale, uint8_t *codes)
{
    const int32_t top = (1 << (f->l->spec.bits - 1)) - 1;
    const float border = (float)top * scale;
    for (int64_t i = 0; i < n; i++) {
        w[i] = w[i] > border ? border : w[i] < -border ? -border : w[i];
    }
    f->K->quantize_div_f32_b8(w, n, scale, 0, -top, top, codes);
}

static void
fixed_job(void *ctx, int64_t job)
{
    fixed_jobs *f = ctx;
    const lkd_linear *l = f->l;
    const int64_t group = group_of(l);
    for (int64_t r = job * LKD_CHUNK; r < zq_min(l->n, (job + 1) * LKD_CHUNK); r++) {
        if (!(f->K->absmax_f32(l->w + r * l->k, l->k) <= FLT_MAX)) {
            zq_note_bad_row(&f->trouble, r);
            continue;
        }
        for (int64_t g = 0; g < l->groups; g++) {
            const int64_t at = r * l->k + g * group;
            fixed_group(f, l->w + at, zq_min(group, l->k - g * group), l->scales[r * l->groups + g], (uint8_t *)l->codes + at);
        }
    }
}

static zq_status
fixed_codes(lkd_linear *l, int64_t *bad_row)
{
    fixed_jobs f = {.l = l, .K = zq_active()};
    zq_trouble_init(&f.trouble);
    zq_parallel_for(zq_ceil_div(l->n, LKD_CHUNK), fixed_job, &f);
    return zq_trouble_status(&f.trouble, bad_row);
}

static int
has_row_blocks(const lkd_linear *l)
{
    return zq_max(zq_max(l->spec.rows[0], l->spec.rows[1]), l->spec.rows[2]) > 1;
}

static zq_status
row_block_codes(lkd_linear *l, int64_t *bad_row)
{
    zq_status s = ZQ_OK;
    int64_t at = 0;
    for (int p = 0; p < ZQ_LKD_PARTS && l->parts[p] && s == ZQ_OK; p++) {
        s = zq_quantize_row_blocks(l->w + at * l->k, l->parts[p], l->k, l->parts[p] / l->spec.rows[p], l->spec.bits,
                                   l->codes + at * l->k, l->scales + at, bad_row);
        *bad_row += s == ZQ_ENONFINITE ? at : 0;
        at += l->parts[p];
    }
    return s;
}

zq_status
lkd_linear_codes(lkd_linear *l, int64_t *bad_row)
{
    if (l->fixed) {
        return fixed_codes(l, bad_row);
    }
    return has_row_blocks(l) ? row_block_codes(l, bad_row)
                             : zq_quantize_groups(l->w, l->n, l->k, l->spec.group, l->spec.bits, 1, l->codes, l->scales, NULL,
                                                  bad_row);
}

zq_status
lkd_linear_init(lkd_linear *l)
{
    if (l->spec.bits == 0) {
        return zq_linear_pack_f32(&l->packed, l->w, l->n, l->k, NULL);
    }
    l->codes = zq_alloc((size_t)(l->n * l->k));
    l->scales = zq_alloc((size_t)(l->n * l->groups) * sizeof *l->scales);
    if (!l->codes || !l->scales) {
        return ZQ_ENOMEM;
    }
    int64_t bad_row;
    const zq_status s = lkd_linear_codes(l, &bad_row);
    if (s != ZQ_OK || !is_integer(l)) {
        return s == ZQ_OK ? zq_linear_pack_f32(&l->packed, l->w, l->n, l->k, NULL) : s;
    }
    return l->groups == 1 ? zq_linear_pack_s8(&l->packed, l->codes, l->scales, l->n, l->k, NULL)
                          : zq_linear_pack_group(&l->packed, l->codes, l->scales, l->n, l->k, l->spec.group,
                                                 l->spec.bits <= 4 ? 4 : 8, NULL);
}

void
lkd_linear_free(lkd_linear *l)
{
    zq_free(l->codes);
    zq_free(l->scales);
    zq_linear_free(&l->packed);
}

zq_status
lkd_linear_prepare(zq_lkd *b, lkd_linear *l, int64_t *bad_row)
{
    if (zq_stopped(b->stop)) {
        return ZQ_ESTOPPED;
    }
    if (l->bias) {
        memcpy(l->packed.bias, l->bias, (size_t)l->n * sizeof *l->bias);
    }
    const zq_status s = l->codes ? lkd_linear_codes(l, bad_row) : ZQ_OK;
    if (s != ZQ_OK) {
        return s;
    }
    if (is_integer(l)) {
        zq_linear_fill_codes(&l->packed, l->codes, l->scales);
        return ZQ_OK;
    }
    if (l->codes) {
        zq_dequantize_groups(l->codes, l->n, l->k, zq_min(l->spec.group, l->k), 1, l->scales, NULL, b->panels);
    }
    zq_linear_fill_f32(&l->packed, l->codes ? b->panels : l->w);
    return ZQ_OK;
}

/* ---- products --------------------------------------------------------------------------------------- */

/* Rows of a piece, per thread, at the least, if there are so many: each one reads its part of the weights again. */
enum { PIECE_ROWS = 256 };

/* Multiplications of a piece, per thread: some 20 to 40 ms in float32, less in integers. Half of it costs 3 % of a step. */
static const int64_t PIECE_WORK = INT64_C(1) << 31;

/* Panels p to p + count - 1 of w */
static zq_linear
panels_of(const zq_linear *w, int64_t p, int64_t count)
{
    const int64_t c = p * ZQ_NR;
    zq_linear part = *w;
    part.n = zq_min(w->n - c, count * ZQ_NR);
    part.panels = (char *)w->panels + p * w->panel_bytes;
    part.bias = w->bias + c;
    part.colsum = w->colsum ? w->colsum + c : NULL;
    part.scale = w->scale ? w->scale + c : NULL;
    part.zcorr = w->zcorr ? w->zcorr + c : NULL;
    part.last_use = NULL; /* is about all of them */
    return part;
}

/* zq_linear_forward of x's rows r0 to r1 - 1, to rows and columns of `out` */
static zq_status
run_piece(const zq_linear *w, const zq_rows *x, int64_t r0, int64_t r1, int64_t column, const zq_out *out)
{
    zq_rows rows = *x;
    rows.f32 = x->f32 ? x->f32 + r0 * x->ld_f32 : NULL;
    rows.u8 = x->u8 ? x->u8 + r0 * x->ld_u8 : NULL;
    rows.scale = x->scale ? x->scale + r0 : NULL;
    rows.zero = x->zero ? x->zero + r0 : NULL;
    zq_out part = *out;
    part.y = out->y + r0 * out->ld_y + column;
    part.residual = out->residual ? out->residual + r0 * out->ld_residual + column : NULL;
    int64_t bad_row;
    return zq_linear_forward(w, &rows, r1 - r0, &part, &bad_row);
}

/* y (m, n) = x w^T + bias + residual, in pieces that are as large as the time between two questions allows: of all columns where
 * enough rows remain, else of some. */
static zq_status
product(const zq_lkd *b, const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out)
{
    const int64_t threads = zq_threads(), panels = zq_panel_count(w->n);
    const int64_t work = threads * PIECE_WORK / w->k / ZQ_NR; /* in rows times panels */
    const int64_t parts = zq_max(1, m / zq_max(PIECE_ROWS * threads, work / panels)), rows = zq_ceil_div(m, parts);
    const int64_t pieces = zq_ceil_div(panels * rows, zq_max(work, 1)), wide = zq_ceil_div(panels, pieces);
    assert(m > 0 && w->n > 0 && w->k > 0);
    for (int64_t i = 0; i < parts; i++) {
        for (int64_t p = 0; p < panels; p += wide) {
            if (zq_stopped(b->stop)) {
                return ZQ_ESTOPPED;
            }
            const zq_linear part = panels_of(w, p, wide);
            const zq_status s = run_piece(wide < panels ? &part : w, x, m * i / parts, m * (i + 1) / parts, p * ZQ_NR, out);
            if (s != ZQ_OK) {
                return s;
            }
        }
    }
    return ZQ_OK;
}

zq_status
lkd_linear_forward(const zq_lkd *b, const lkd_linear *l, const lkd_rows *x, int64_t tokens, const float *residual, float *y)
{
    const zq_rows rows = {.f32 = x->f, .ld_f32 = l->k, .u8 = x->q, .ld_u8 = x->ld_q, .scale = x->scale, .zero = x->zero};
    const zq_out out = {.residual = residual, .ld_residual = l->n, .y = y, .ld_y = l->n};
    return product(b, &l->packed, &rows, tokens, &out);
}

/* ---- panels ----------------------------------------------------------------------------------------- */

/* The right operand of a product in the layout of packed float32 weights: element (row, column) of a (rows, columns) matrix
 * at panels[column / 32][row][column % 32]. */
typedef struct {
    float *panels;
    int64_t rows, columns;
    const zq_kernels *K;
    const float *f; /* the matrix, or codes of it: */
    const lkd_linear *l;
    const lkd_rows *x;
} panel_fill;

/* Row r of the codes of w, columns c .. c + n - 1: a piece for each scale. */
static void
weight_piece(const panel_fill *p, int64_t r, int64_t c, int64_t n, float *out)
{
    const lkd_linear *l = p->l;
    const int64_t group = group_of(l);
    for (int64_t i = 0, m; i < n; i += m) {
        m = zq_min(n - i, group - (c + i) % group);
        const float scale = l->scales[r * l->groups + (c + i) / group];
        p->K->dequantize_b8_f32((const uint8_t *)l->codes + r * l->k + c + i, m, 1, scale, 0, out + i);
    }
}

static void
fill_job(void *ctx, int64_t job)
{
    const panel_fill *p = ctx;
    for (int64_t r = job * LKD_CHUNK; r < zq_min(p->rows, (job + 1) * LKD_CHUNK); r++) {
        for (int64_t c = 0; c < p->columns; c += ZQ_NR) {
            const int64_t n = zq_min(ZQ_NR, p->columns - c);
            float *out = p->panels + c * p->rows + r * ZQ_NR;
            if (n < ZQ_NR) {
                memset(out, 0, ZQ_NR * sizeof *out);
            }
            if (p->f) {
                memcpy(out, p->f + r * p->columns + c, (size_t)n * sizeof *out);
            }
            else if (p->l) {
                weight_piece(p, r, c, n, out);
            }
            else {
                p->K->dequantize_b8_f32(p->x->q + r * p->x->ld_q + c, n, 0, p->x->scale[r], p->x->zero[r], out);
            }
        }
    }
}

/* y (m, columns) = a (m, rows) times the matrix, + residual. */
static zq_status
multiply(const zq_lkd *b, panel_fill *p, const float *a, int64_t lda, int64_t m, const float *residual, float *y)
{
    p->panels = b->panels;
    p->K = zq_active();
    if (zq_parallel_until(zq_ceil_div(p->rows, LKD_CHUNK), fill_job, p, b->stop)) {
        return ZQ_ESTOPPED;
    }
    const zq_linear w = {.kind = ZQ_W_F32, .n = p->columns, .k = p->rows, .group = p->rows, .panels = p->panels,
                         .panel_bytes = p->rows * ZQ_NR * (int64_t)sizeof(float), .bias = b->zeros};
    const zq_rows rows = {.f32 = a, .ld_f32 = lda};
    const zq_out out = {.residual = residual, .ld_residual = p->columns, .y = y, .ld_y = p->columns};
    return product(b, &w, &rows, m, &out);
}

zq_status
lkd_linear_dx(zq_lkd *b, const lkd_linear *l, const float *dy, int64_t tokens, const float *residual, float *dx)
{
    panel_fill p = {.rows = l->n, .columns = l->k, .f = l->codes ? NULL : l->w, .l = l};
    return multiply(b, &p, dy, l->n, tokens, residual, dx);
}

/* ---- dw --------------------------------------------------------------------------------------------- */

typedef struct {
    const zq_lkd *b;
    const zq_kernels *K;
    const lkd_linear *l;
    const float *dy;
    int64_t tokens;
} transpose_jobs;

/* Some columns of dy become rows, and their sums the bias's gradient. */
static void
transpose_job(void *ctx, int64_t job)
{
    const transpose_jobs *t = ctx;
    const int64_t c = job * LKD_CHUNK, n = zq_min(LKD_CHUNK, t->l->n - c), ld = t->b->ld_dyt;
    float *rows = t->b->dyt + c * ld;
    t->K->transpose_f32(t->dy + c, t->tokens, n, t->l->n, rows, ld);
    for (int64_t i = 0; t->l->dbias && i < n; i++) {
        t->l->dbias[c + i] = t->K->sum_f32(rows + i * ld, t->tokens);
    }
}

zq_status
lkd_linear_dw(zq_lkd *b, const lkd_linear *l, const float *dy, const lkd_rows *x, int64_t tokens)
{
    transpose_jobs t = {b, zq_active(), l, dy, tokens};
    if (zq_parallel_until(zq_ceil_div(l->n, LKD_CHUNK), transpose_job, &t, b->stop)) {
        return ZQ_ESTOPPED;
    }
    panel_fill p = {.rows = tokens, .columns = l->k, .f = x->f, .x = x};
    return multiply(b, &p, b->dyt, b->ld_dyt, l->n, NULL, l->dw);
}
