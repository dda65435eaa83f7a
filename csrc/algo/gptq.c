/* GPTQ (Frantar et al., arXiv 2210.17323), one Cholesky factor and products only.
 *
 * H = mean over tokens of x x^T, damped: H + lambda I. The paper quantizes the columns of w one after the other and moves
 * what each lost to the columns behind it, with the rows of U, H^-1 = U^T U, U upper triangular:
 *
 *     e_i = (w'_i - q_i) / U_ii,    w'_c -= e_i U_ic  for c > i,    hence    w - q = e U.
 *
 * Let R = U^-1: then H = R R^T, and e = (w - q) R. Column i of that, solved for w'_i = q_i + e_i / R_ii, is
 *
 *     w'_i = w_i + sum over j < i of d_j F_ij,    d = w - q,    F_ij = R_ji / R_ii.
 *
 * So no inverse is needed. R is the Cholesky factor of H with rows and columns in reverse, reversed again. Every w'_i is
 * one chain of fma over j in order: the bits depend neither on the blocks, nor on the threads, nor on the level. And
 * sum e^2 = d (H + lambda I) d^T is the loss, so that d H d^T = sum e^2 - lambda sum d^2.
 *
 * GPTAQ (Li et al., 2504.02692): the float model's inputs are x + delta x. With D = mean of (delta x) x^T, column j moves the
 * targets of the later ones, v_c = w_c + sum over j < c of w'_j P_jc,  P = triu(D U^T, 1) U = triu(D R^-T, 1) R^-1,
 * and v takes the place of w above. The paper's code uses q_j for w'_j across blocks; here it is w'_j everywhere.
 *
 * Rows of w are independent. A job takes some panels of 32 rows, transposed: (k, 32) floats. */
#include "gptq.h"

#include "../linalg.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    JOB_PANELS = 8,  /* of 32 rows: what shares a piece of F out of L2 */
    DEPTH = 512,     /* columns of F in that piece */
    MICRO = 12,      /* columns that the column kernel takes */
    SHRINKS = 80,    /* candidates of the search for a scale: the range times 1, 0.99, ... 0.21 */
    CHECK_TILE = 64,
};
static const double MAX_DAMPING = 1e9, LEAST_PIVOT = 1e-11, ASYMMETRY = 1e-4;

static double
at(const zq_square *a, int64_t i)
{
    return a->is_double ? ((const double *)a->data)[i] : (double)((const float *)a->data)[i];
}

/* ---- checks ----------------------------------------------------------------------------------------- */

typedef struct {
    const zq_square *a;
    int64_t k, tiles;
    int symmetric;
    double tolerance;
    _Atomic(int64_t) nonfinite, asymmetric; /* the first row, or k */
} check;

static void
lower_to(_Atomic(int64_t) *least, int64_t row)
{
    int64_t seen = atomic_load(least);
    while (row < seen && !atomic_compare_exchange_weak(least, &seen, row)) {
    }
}

/* x and y, elements (i, j) and (j, i), j <= i, are further apart than they may be, or one of them is not finite. */
static void
note_pair(check *c, int64_t i, int64_t j, double x, double y)
{
    if (isfinite(x) && isfinite(y)) {
        lower_to(&c->asymmetric, c->symmetric ? j : c->k);
        return;
    }
    lower_to(&c->nonfinite, isfinite(x) ? j : i);
    lower_to(&c->nonfinite, isfinite(y) ? i : j);
}

static void
check_job(void *ctx, int64_t tile_row)
{
    check *c = ctx;
    const int64_t i0 = tile_row * CHECK_TILE, i1 = zq_min(i0 + CHECK_TILE, c->k);
    for (int64_t j0 = 0; j0 < i1; j0 += CHECK_TILE) {
        for (int64_t i = i0; i < i1; i++) {
            for (int64_t j = j0; j < zq_min(j0 + CHECK_TILE, i + 1); j++) {
                const double x = at(c->a, i * c->k + j), y = at(c->a, j * c->k + i), apart = x > y ? x - y : y - x;
                if (!(apart <= c->tolerance)) { /* NaN too */
                    note_pair(c, i, j, x, y);
                }
            }
        }
    }
}

zq_square_fault
zq_square_check(const zq_square *a, int64_t k, int symmetric, int64_t *row, zq_stop *stop)
{
    check c = {.a = a, .k = k, .symmetric = symmetric, .nonfinite = k, .asymmetric = k};
    int64_t negative = k;
    double most = 0.0;
    for (int64_t i = k - 1; i >= 0; i--) {
        const double d = at(a, i * k + i);
        negative = d < 0 ? i : negative;
        most = d > most ? d : most;
    }
    c.tolerance = symmetric && most <= DBL_MAX ? ASYMMETRY * most : DBL_MAX; /* what is Inf is found anyway */
    if (zq_parallel_until(zq_ceil_div(k, CHECK_TILE), check_job, &c, stop)) {
        return ZQ_SQUARE_STOPPED;
    }
    *row = c.nonfinite;
    if (c.nonfinite < k) {
        return ZQ_SQUARE_NONFINITE;
    }
    if (symmetric && negative < k) {
        *row = negative;
        return ZQ_SQUARE_NEGATIVE;
    }
    *row = c.asymmetric;
    return c.asymmetric < k ? ZQ_SQUARE_ASYMMETRIC : ZQ_SQUARE_OK;
}

/* ---- the factor ------------------------------------------------------------------------------------- */

/* F, or P^T: row c holds the factors of the columns before c. It lies where R was: half of a (k, ld) array of doubles. */
typedef struct {
    double *memory;
    int64_t ld; /* in doubles */
} triangle;

static const float *
row_of(const triangle *t, int64_t c)
{
    return (const float *)(t->memory + c * t->ld);
}

typedef struct {
    const zq_gptq_task *task;
    int64_t n, k, groups;
    double mean, damping; /* H is divided by the mean of its diagonal; damping relative to that */
    triangle f, p;
    float *diag;    /* (k): R_ii, 0 for dead columns; in the order of the work */
    double *scaled; /* (k): diagonal of H / mean, 1 where dead */
    uint8_t *dead;  /* (k), columns of w */
    float *weight;  /* (k): what an error counts in the search for a scale; columns of w */
    int64_t rank, dead_count;
    /* for jobs */
    const triangle *target;
    const zq_square *source;
    double factor;
    zq_gptq_result *result;
    const zq_kernels *K;
    int32_t *group; /* (k): of the i-th column */
    int64_t job_panels, stage;
    atomic_int failed, no_memory;
    _Atomic(int64_t) bad_row;
} solver;

static int64_t
reversed(const solver *s, int64_t i)
{
    return s->task->order[s->k - 1 - i];
}

/* Column c of the reversed, permuted, damped matrix, below the diagonal (or all of it, for D). */
static void
gather_job(void *ctx, int64_t c)
{
    const solver *s = ctx;
    const int64_t from = reversed(s, c);
    const int whole = s->source == &s->task->deviation;
    const double factor = whole ? s->factor * s->task->alpha : s->factor;
    double *out = s->target->memory + c * s->target->ld;
    for (int64_t i = whole ? 0 : c; i < s->k; i++) {
        const int64_t j = reversed(s, i);
        const int64_t index = whole ? j * s->k + from : from * s->k + j; /* column of D; row of the symmetric H */
        out[i] = s->dead[from] | s->dead[j] ? 0.0 : at(s->source, index) * factor;
    }
    if (!whole) {
        out[c] = s->scaled[from] + s->damping;
    }
}

/* Row c of F: column k - 1 - c of L backwards. Source and target are the two halves of one square. */
static void
mirror_job(void *ctx, int64_t c)
{
    solver *s = ctx;
    const int64_t last = s->k - 1, ld = s->target->ld;
    const double *in = s->target->memory + (last - c) * ld + last;
    const double by = s->target == &s->f ? 1.0 / s->f.memory[(last - c) * (ld + 1)] : 1.0;
    float *out = (float *)(s->target->memory + c * ld);
    for (int64_t j = 0; j < c; j++) {
        out[j] = (float)(in[-j] * by);
        if (!isfinite(out[j])) {
            atomic_store(&s->failed, 1);
        }
    }
}

/* Both return whether it was stopped. */
static int
gather(solver *s, const triangle *target, const zq_square *source)
{
    s->target = target;
    s->source = source;
    return zq_parallel_until(s->k, gather_job, s, s->task->stop);
}

static int
mirror(solver *s, const triangle *target)
{
    s->target = target;
    return zq_parallel_until(s->k, mirror_job, s, s->task->stop);
}

/* Pivots too small to divide by count as a failure: a singular matrix without damping may pass by rounding. */
static int
read_pivots(solver *s)
{
    s->rank = 0;
    for (int64_t i = 0; i < s->k; i++) {
        const int64_t column = s->task->order[i];
        const double r = s->f.memory[(s->k - 1 - i) * (s->f.ld + 1)];
        if (!(r * r > LEAST_PIVOT * s->scaled[column]) || !isfinite(r)) {
            return 0;
        }
        s->diag[i] = s->dead[column] ? 0.0f : (float)r;
        s->rank += !s->dead[column] && r * r > 2 * s->damping + LEAST_PIVOT;
    }
    return 1;
}

/* H = R R^T into L of the reversed matrix. Damping grows tenfold as long as that fails. */
static zq_status
factorise(solver *s)
{
    for (s->damping = s->task->damping; s->damping <= MAX_DAMPING;
         s->damping = s->damping < 1e-6 ? 1e-6 : 10 * s->damping) {
        const int64_t bad_pivot = gather(s, &s->f, &s->task->hessian)
                                      ? -1
                                      : zq_cholesky_f64(s->f.memory, s->k, s->f.ld, s->task->stop);
        if (bad_pivot < 0) {
            return ZQ_ESTOPPED;
        }
        if (bad_pivot == 0 && read_pivots(s)) {
            return ZQ_OK;
        }
    }
    return ZQ_ERANGE;
}

/* P^T into s->p: two triangular solves, and what is not above the diagonal (below it, reversed) dropped in between. */
static zq_status
make_shift(solver *s)
{
    double *p = s->p.memory;
    zq_stop *stop = s->task->stop;
    if (gather(s, &s->p, &s->task->deviation) ||
        zq_solve_right_f64(p, s->k, s->k, s->p.ld, s->f.memory, s->f.ld, 1, stop) != ZQ_OK) {
        return ZQ_ESTOPPED;
    }
    for (int64_t c = 0; c < s->k; c++) {
        memset(p + c * s->p.ld, 0, (size_t)(c + 1) * sizeof *p);
    }
    const zq_status status = zq_solve_right_f64(p, s->k, s->k, s->p.ld, s->f.memory, s->f.ld, 0, stop);
    return status == ZQ_OK && mirror(s, &s->p) ? ZQ_ESTOPPED : status;
}

/* ---- scales ----------------------------------------------------------------------------------------- */

/* As the quantizers of quantize.c: no scale is 0 or denormal, a range too small for that gets scale 1. */
static void
grid_of_range(const zq_gptq_task *t, float lo, float hi, float *scale, float *zero)
{
    const zq_grid *g = &t->grid;
    float levels = (float)g->qmax, range = -lo > hi ? -lo : hi;
    if (g->values) {
        levels = -g->values[0] > g->values[g->count - 1] ? -g->values[0] : g->values[g->count - 1];
    }
    else if (!t->symmetric) {
        range = hi - lo;
    }
    const float s = range > FLT_MAX ? hi / levels - lo / levels : zq_absmax_scale(range, levels);
    *scale = s > 0 ? s : 1.0f;
    *zero = s > 0 && !g->values && !t->symmetric ? (float)zq_max(0, zq_min(lrintf(-lo / s), g->qmax)) : 0.0f;
}

/* One scale for the n weights x; the search counts their squared errors with `weight`, the diagonal of H. */
static void
fit(const solver *s, const float *x, const float *weight, int64_t n, int search, float *scale, float *zero)
{
    float lo, hi, best = INFINITY;
    s->K->minmax_f32(x, n, &lo, &hi);
    grid_of_range(s->task, lo, hi, scale, zero);
    for (int i = 0; search && i < SHRINKS; i++) {
        const float p = (float)(100 - i) / 100.0f;
        float some_scale, some_zero;
        grid_of_range(s->task, lo * p, hi * p, &some_scale, &some_zero);
        const float error = s->K->grid_error_f32(&s->task->grid, x, weight, n, some_scale, some_zero);
        if (error < best) {
            best = error;
            *scale = some_scale;
            *zero = some_zero;
        }
    }
}

/* ---- panels of rows --------------------------------------------------------------------------------- */

/* What a job works on: `panels` panels from row `row0` of w on; every array has one part per panel. */
typedef struct {
    int64_t row0, panels;
    float *delta;        /* (k, 32): v, and w - q from column to column */
    float *seen;         /* (k, 32): w'; GPTAQ only */
    float *f;            /* (stage, 32): feedback of a stage's columns */
    float *saved;        /* (2, stage, 32), one for all panels; dynamic groups only */
    float *scale, *zero; /* (groups, 32) */
    float *line, *line_weight; /* (k) */
    uint8_t *codes;      /* (k, 32) */
    double loss[JOB_PANELS * ZQ_NR], size[JOB_PANELS * ZQ_NR];
} slab;

static int64_t
rows_in_panel(const solver *s, const slab *b, int64_t p)
{
    return zq_max(0, zq_min(ZQ_NR, s->n - b->row0 - p * ZQ_NR));
}

static void
pack_panel(const solver *s, const slab *b, int64_t p)
{
    const int64_t rows = rows_in_panel(s, b, p);
    const float *w = s->task->w + (b->row0 + p * ZQ_NR) * s->k;
    float *out = b->delta + p * s->k * ZQ_NR;
    memset(out, 0, (size_t)(s->k * ZQ_NR) * sizeof *out);
    for (int64_t c = 0; c < s->k; c++) {
        const int64_t from = s->task->order[c];
        for (int64_t r = 0; r < rows && !s->dead[from]; r++) {
            out[c * ZQ_NR + r] = w[r * s->k + from];
        }
    }
}

static void
give_scales(const solver *s, const slab *b, int64_t p)
{
    const int64_t rows = rows_in_panel(s, b, p);
    const float *given = s->task->scales + (b->row0 + p * ZQ_NR) * s->groups;
    for (int64_t g = 0; g < s->groups; g++) {
        const int64_t to = (p * s->groups + g) * ZQ_NR;
        for (int64_t r = 0; r < ZQ_NR; r++) {
            b->scale[to + r] = r < rows ? given[r * s->groups + g] : 1.0f;
            b->zero[to + r] = 0.0f;
        }
    }
}

/* Scales of all groups: those that are given, or such as fit the weights as they are. */
static void
fit_panel(const solver *s, const slab *b, int64_t p, int search)
{
    if (s->task->scales) {
        give_scales(s, b, p);
        return;
    }
    const int64_t rows = rows_in_panel(s, b, p), group = s->task->group;
    const float *w = s->task->w + (b->row0 + p * ZQ_NR) * s->k;
    float *scale = b->scale + p * s->groups * ZQ_NR, *zero = b->zero + p * s->groups * ZQ_NR;
    for (int64_t r = 0; r < ZQ_NR; r++) {
        for (int64_t c = 0; c < s->k; c++) {
            b->line[c] = r < rows && !s->dead[c] ? w[r * s->k + c] : 0.0f;
        }
        for (int64_t g = 0; g < s->groups; g++) {
            const int64_t c = g * group;
            fit(s, b->line + c, s->weight + c, zq_min(group, s->k - c), search, scale + g * ZQ_NR + r, zero + g * ZQ_NR + r);
        }
    }
}

/* y (c1 - c0, 32) += rows c0..c1-1 of the triangle, columns j0..j1-1, times those columns of the panel. */
static void
product(const solver *s, const triangle *t, const float *panel, int64_t c0, int64_t c1, int64_t j0, int64_t j1, float *y)
{
    const int64_t tiles = zq_ceil_div(c1 - c0, s->K->mr_matmul);
    for (int64_t i = 0; i < tiles && j1 > j0; i++) {
        const int64_t at = (c1 - c0) * i / tiles, next = (c1 - c0) * (i + 1) / tiles;
        const zq_tile tile = {.mr = (int)(next - at), .nr = ZQ_NR, .k = j1 - j0, .a = row_of(t, c0 + at) + j0, .lda = 2 * t->ld,
                              .b = panel + j0 * ZQ_NR, .y = y + at * ZQ_NR, .ldy = ZQ_NR};
        s->K->matmul_f32(&tile, ZQ_NR, 0, 1);
    }
}

/* What columns j0..j1-1 lost, to columns c0..c1-1 of panel p; f holds the feedback of c0 and those after it. */
static void
feed(const solver *s, const slab *b, int64_t p, int64_t c0, int64_t c1, int64_t j0, int64_t j1, float *f)
{
    float *delta = b->delta + p * s->k * ZQ_NR;
    product(s, &s->f, delta, c0, c1, j0, j1, f);
    if (s->p.memory) {
        product(s, &s->p, b->seen + p * s->k * ZQ_NR, c0, c1, j0, j1, delta + c0 * ZQ_NR);
    }
}

static void
round_columns(const solver *s, slab *b, int64_t p, int64_t c0, int64_t c1, float *f, zq_rounding rounding)
{
    const int shifted = s->p.memory && rounding != ZQ_ROUND_NOT;
    float loss[ZQ_NR] = {0}, size[ZQ_NR] = {0};
    const int64_t at_column = (p * s->k + c0) * ZQ_NR, at_scale = p * s->groups * ZQ_NR;
    const zq_gptq_tile t = {.columns = c1 - c0, .grid = &s->task->grid, .factor = row_of(&s->f, c0) + c0,
                            .shift = shifted ? row_of(&s->p, c0) + c0 : NULL, .ld = 2 * s->f.ld, .diag = s->diag + c0,
                            .group = s->group + c0, .scale = b->scale + at_scale, .zero = b->zero + at_scale,
                            .rounding = rounding, .delta = b->delta + at_column, .f = f,
                            .seen = b->seen ? b->seen + at_column : NULL,
                            .codes = b->codes + at_column, .loss = loss, .size = size};
    s->K->gptq_columns_f32(&t);
    for (int r = 0; r < ZQ_NR && rounding != ZQ_ROUND_NOT; r++) {
        b->loss[p * ZQ_NR + r] += (double)loss[r];
        b->size[p * ZQ_NR + r] += (double)size[r];
    }
}

/* Scales of the group that begins at column c0 of the order, whose v and f hold what the columns before it did. Its weights
 * are to be what the paper's would be now: those that would lose nothing, e = 0, from here on. That is a pass over the
 * group in which nothing is rounded (f alone, halfway, means nothing); then everything is put back. */
static void
fit_reached(const solver *s, slab *b, int64_t p, int64_t c0, int64_t c1, float *f)
{
    const int64_t at_group = (p * s->groups + s->group[c0]) * ZQ_NR, items = (c1 - c0) * ZQ_NR;
    float *panel = b->delta + p * s->k * ZQ_NR, *v = panel + c0 * ZQ_NR, *saved_f = b->saved + items;
    memcpy(b->saved, v, (size_t)items * sizeof *v);
    memcpy(saved_f, f, (size_t)items * sizeof *f);
    for (int64_t c = c0, next; c < c1; c = next) {
        next = zq_min(c + MICRO, c1);
        product(s, &s->f, panel, c, next, c0, c, f + (c - c0) * ZQ_NR);
        round_columns(s, b, p, c, next, f + (c - c0) * ZQ_NR, ZQ_ROUND_NOT);
    }
    for (int64_t c = c0; c < c1; c++) {
        b->line_weight[c - c0] = s->weight[s->task->order[c]];
    }
    for (int64_t r = 0; r < ZQ_NR; r++) {
        for (int64_t c = 0; c < c1 - c0; c++) {
            b->line[c] = b->saved[c * ZQ_NR + r] - v[c * ZQ_NR + r];
        }
        fit(s, b->line, b->line_weight, c1 - c0, s->task->mse, b->scale + at_group + r, b->zero + at_group + r);
    }
    memcpy(v, b->saved, (size_t)items * sizeof *v);
    memcpy(f, saved_f, (size_t)items * sizeof *f);
}

/* Columns c0..c1-1 of all panels. What came before them is one product; within, `range` columns at a time (a group, when
 * its scale is to be found first), and of those MICRO. Once stopped it ends anywhere. */
static void
run_stage(const solver *s, slab *b, int64_t c0, int64_t c1, int open)
{
    const int dynamic = s->task->dynamic && !open;
    const int64_t range = dynamic ? s->task->group : s->stage, part = s->stage * ZQ_NR;
    memset(b->f, 0, (size_t)(b->panels * part) * sizeof *b->f);
    for (int64_t j = 0; j < c0 && !zq_stopped(s->task->stop); j += DEPTH) {
        for (int64_t p = 0; p < b->panels; p++) {
            feed(s, b, p, c0, c1, j, zq_min(j + DEPTH, c0), b->f + p * part);
        }
    }
    for (int64_t p = 0; p < b->panels; p++) {
        for (int64_t r0 = c0; r0 < c1 && !zq_stopped(s->task->stop); r0 += range) {
            const int64_t r1 = zq_min(r0 + range, c1);
            float *f = b->f + p * part + (r0 - c0) * ZQ_NR;
            feed(s, b, p, r0, r1, c0, r0, f);
            if (dynamic) {
                fit_reached(s, b, p, r0, r1, f);
            }
            for (int64_t c = r0, next; c < r1; c = next, f += MICRO * ZQ_NR) {
                next = zq_min(c + MICRO, r1);
                feed(s, b, p, c, next, r0, c, f);
                round_columns(s, b, p, c, next, f, open ? ZQ_ROUND_V : ZQ_ROUND_NOW);
            }
        }
    }
}

/* All columns of a slab: GPTQ, or with `open` round to nearest, whose loss needs the same products. */
static void
run_pass(const solver *s, slab *b, int open)
{
    memset(b->loss, 0, sizeof b->loss);
    memset(b->size, 0, sizeof b->size);
    for (int64_t p = 0; p < b->panels && !zq_stopped(s->task->stop); p++) {
        pack_panel(s, b, p);
        if (open ? s->task->mse || s->task->dynamic : !s->task->dynamic) {
            fit_panel(s, b, p, s->task->mse && !open);
        }
    }
    for (int64_t c = 0; c < s->k && !zq_stopped(s->task->stop); c += s->stage) {
        run_stage(s, b, c, zq_min(c + s->stage, s->k), open);
    }
}

/* d H d^T = sum e^2 - lambda sum d^2, up to rounding; Inf where float32 overflowed. */
static double
row_loss(const solver *s, const slab *b, int64_t i)
{
    const double loss = b->loss[i] - s->damping * b->size[i];
    return loss > 0 ? s->mean * loss : loss <= 0 ? 0.0 : INFINITY;
}

/* Lane r of panel p to row `row` of the result. */
static void
write_row(const solver *s, const slab *b, int64_t p, int64_t r, int64_t row)
{
    const zq_gptq_result *out = s->result;
    const uint8_t *codes = b->codes + p * s->k * ZQ_NR + r;
    for (int64_t c = 0; c < s->k; c++) {
        out->codes[row * s->k + s->task->order[c]] = codes[c * ZQ_NR];
    }
    for (int64_t g = 0; g < s->groups; g++) {
        const int64_t from = (p * s->groups + g) * ZQ_NR + r;
        out->scales[row * s->groups + g] = b->scale[from];
        out->zeros[row * s->groups + g] = (int32_t)b->zero[from];
    }
}

static void
write_rows(const solver *s, const slab *b, int open)
{
    zq_gptq_result *out = s->result;
    for (int64_t i = 0; i < b->panels * ZQ_NR && b->row0 + i < s->n; i++) {
        const int64_t row = b->row0 + i;
        const double loss = row_loss(s, b, i);
        if (open) {
            out->rtn_loss[row] = loss;
            out->is_rtn[row] = loss < out->loss[row] || out->loss[row] > DBL_MAX;
        }
        else {
            out->is_rtn[row] = 0;
        }
        if (!open || out->is_rtn[row]) {
            out->loss[row] = loss;
            write_row(s, b, i / ZQ_NR, i % ZQ_NR, row);
        }
    }
}

/* The next `items` floats of a buffer, in whole cache lines. */
static float *
take(char **memory, int64_t items)
{
    return zq_take(memory, items * (int64_t)sizeof(float));
}

static void
slab_job(void *ctx, int64_t job)
{
    solver *s = ctx;
    const int64_t width = s->job_panels * ZQ_NR, row0 = job * width;
    const int64_t per_row = s->k * (s->p.memory ? 2 : 1) + s->stage + 2 * s->groups + s->k / 4 + 1;
    const int64_t floats = width * per_row + 2 * s->k + 2 * s->stage * ZQ_NR;
    char *const memory = zq_alloc((size_t)floats * 4 + 8 * 64), *next = memory;
    if (!memory) {
        atomic_store(&s->no_memory, 1);
        return;
    }
    slab b = {.row0 = row0, .panels = zq_min(s->job_panels, zq_ceil_div(s->n - row0, ZQ_NR))};
    b.delta = take(&next, width * s->k);
    b.seen = s->p.memory ? take(&next, width * s->k) : NULL;
    b.f = take(&next, width * s->stage);
    b.saved = take(&next, 2 * s->stage * ZQ_NR);
    b.scale = take(&next, width * s->groups);
    b.zero = take(&next, width * s->groups);
    b.line = take(&next, s->k);
    b.line_weight = take(&next, s->k);
    b.codes = (uint8_t *)next;
    for (int64_t i = 0; i < width * s->groups; i++) { /* before a dynamic group has its own */
        b.scale[i] = 1.0f;
        b.zero[i] = 0.0f;
    }
    for (int open = 0; open <= s->task->compare && !zq_stopped(s->task->stop); open++) {
        run_pass(s, &b, open);
        write_rows(s, &b, open);
    }
    zq_free(memory);
}

/* ---- entry ------------------------------------------------------------------------------------------ */

static zq_status
check_weights(const solver *s, int64_t *bad_row)
{
    for (int64_t i = 0; i < s->n; i++) {
        if (!(s->K->absmax_f32(s->task->w + i * s->k, s->k) <= FLT_MAX)) {
            *bad_row = i;
            return ZQ_ENONFINITE;
        }
    }
    return ZQ_OK;
}

/* Columns whose input is always 0 say nothing: they count as independent of all others, with weight 0. */
static void
read_diagonal(solver *s)
{
    double sum = 0.0;
    for (int64_t i = 0; i < s->k; i++) {
        s->scaled[i] = at(&s->task->hessian, i * (s->k + 1));
        s->dead[i] = !(s->scaled[i] > 0);
        s->dead_count += s->dead[i];
        sum += s->scaled[i];
    }
    s->mean = s->dead_count < s->k ? sum / (double)(s->k - s->dead_count) : 1.0;
    for (int64_t i = 0; i < s->k; i++) {
        s->scaled[i] = s->dead[i] ? 1.0 : s->scaled[i] / s->mean;
        s->weight[i] = s->dead[i] ? 0.0f : (float)s->scaled[i];
        s->group[i] = (int32_t)(s->task->order[i] / s->task->group);
    }
    s->factor = 1.0 / s->mean;
}

static zq_status
prepare(solver *s)
{
    read_diagonal(s);
    const zq_status status = factorise(s);
    if (status != ZQ_OK) {
        return status;
    }
    if (s->p.memory && make_shift(s) != ZQ_OK) {
        return ZQ_ESTOPPED;
    }
    if (mirror(s, &s->f)) {
        return ZQ_ESTOPPED;
    }
    return atomic_load(&s->failed) ? ZQ_ERANGE : ZQ_OK;
}

static zq_status
solve(solver *s)
{
    const zq_gptq_task *t = s->task;
    const int64_t panels = zq_ceil_div(s->n, ZQ_NR);
    s->stage = t->dynamic ? zq_max(t->group, t->block / t->group * t->group) : t->block;
    s->stage = zq_min(s->stage, s->k);
    s->job_panels = zq_max(1, zq_min(JOB_PANELS, zq_ceil_div(panels, 2 * zq_threads())));
    const int stopped = zq_parallel_until(zq_ceil_div(panels, s->job_panels), slab_job, s, t->stop);
    s->result->damping = s->damping;
    s->result->rank = s->rank;
    s->result->dead = s->dead_count;
    return stopped ? ZQ_ESTOPPED : atomic_load(&s->no_memory) ? ZQ_ENOMEM : ZQ_OK;
}

zq_status
zq_gptq(const zq_gptq_task *task, zq_gptq_result *result, int64_t *bad_row)
{
    const int64_t k = task->k, ld = zq_row_pitch(k * 8) / 8;
    solver s = {.task = task, .result = result, .n = task->n, .k = k, .groups = zq_ceil_div(k, task->group), .K = zq_active()};
    s.f = (triangle){zq_alloc((size_t)(k * ld) * sizeof(double)), ld};
    s.p = (triangle){task->deviation.data ? zq_alloc((size_t)(k * ld) * sizeof(double)) : NULL, ld};
    char *const vectors = zq_alloc((size_t)k * (8 + 4 + 4 + 4 + 1));
    zq_status status = ZQ_ENOMEM;
    if (s.f.memory && vectors && (s.p.memory || !task->deviation.data)) {
        s.scaled = (double *)vectors;
        s.diag = (float *)(s.scaled + k);
        s.weight = s.diag + k;
        s.group = (int32_t *)(s.weight + k);
        s.dead = (uint8_t *)(s.group + k);
        status = check_weights(&s, bad_row);
        status = status == ZQ_OK ? prepare(&s) : status;
        status = status == ZQ_OK ? solve(&s) : status;
    }
    zq_free(s.f.memory);
    zq_free(s.p.memory);
    zq_free(vectors);
    return status;
}
