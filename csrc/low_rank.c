/* What a linear layer adds to the product of its codes, in float32, before the activation:
 *
 *   y = act(x_hat W_hat^T + t u^T + bias) + residual,   t (m, rank), u (n, rank)
 *
 * LoRC (Yao et al., 2023, ZeroQuant-V2):    t = x_hat v^T, and u v is the low-rank part of W - W_hat
 * LLM.int8() (Dettmers et al., 2022):       t = the columns of x that hold an outlier, u = these columns of W, and x_hat
 *                                           without them (0, exactly)
 *
 * t u^T is summed in the epilogue of the tiles. Both come down to float sums in the order of their index, and integers. */
#include "rows_in.h"
#include "zq_kernels.h"

#include <float.h>
#include <string.h>

struct zq_extras {
    int64_t rank; /* LoRC; else 0 */
    zq_linear v;
    float *u; /* panels of (rank, ZQ_NR) */
    float threshold; /* LLM.int8() */
    int64_t known;   /* columns with float32 weights */
    int64_t *columns;
    float *weights; /* panels of (known, ZQ_NR) */
};

/* (n, rank) as panels of (rank, ZQ_NR), zeros behind column n. */
static float *
pack_columns(const zq_linear *w, const float *u, int64_t rank)
{
    const size_t bytes = (size_t)(zq_panel_count(w->n) * rank * ZQ_NR) * sizeof *u;
    float *out = zq_alloc(bytes);
    if (!out) {
        return NULL;
    }
    memset(out, 0, bytes);
    for (int64_t j = 0; j < w->n; j++) {
        for (int64_t r = 0; r < rank; r++) {
            out[(j / ZQ_NR * rank + r) * ZQ_NR + j % ZQ_NR] = u[j * rank + r];
        }
    }
    return out;
}

static struct zq_extras *
new_extras(void)
{
    struct zq_extras *e = zq_alloc(sizeof *e);
    if (e) {
        memset(e, 0, sizeof *e);
    }
    return e;
}

void
zq_extras_free(struct zq_extras *e)
{
    if (e) {
        zq_linear_free(&e->v);
        zq_free(e->u);
        zq_free(e->columns);
        zq_free(e->weights);
        zq_free(e);
    }
}

int64_t
zq_extras_bytes(const zq_linear *w)
{
    const struct zq_extras *e = w->extras;
    const int64_t columns = zq_panel_count(w->n) * ZQ_NR * (int64_t)sizeof(float);
    return !e ? 0 : (e->rank ? zq_linear_bytes(&e->v) : 0) + (e->rank + e->known) * columns + e->known * 8;
}

zq_status
zq_linear_correct(zq_linear *w, const float *u, const float *v, int64_t rank)
{
    assert(!w->extras && rank > 0);
    struct zq_extras *e = new_extras();
    if (!e || !(e->u = pack_columns(w, u, rank)) || zq_linear_pack_f32(&e->v, v, rank, w->k, NULL) != ZQ_OK) {
        zq_extras_free(e);
        return ZQ_ENOMEM;
    }
    e->rank = rank;
    w->extras = e;
    return ZQ_OK;
}

zq_status
zq_linear_set_outliers(zq_linear *w, float threshold, const int64_t *columns, const float *weights, int64_t count)
{
    assert(!w->extras && w->kind == ZQ_W_S8);
    struct zq_extras *e = new_extras();
    if (!e || !(e->columns = zq_alloc((size_t)count * sizeof *columns)) || !(e->weights = pack_columns(w, weights, count))) {
        zq_extras_free(e);
        return ZQ_ENOMEM;
    }
    memcpy(e->columns, columns, (size_t)count * sizeof *columns);
    e->threshold = threshold;
    e->known = count;
    w->extras = e;
    return ZQ_OK;
}

/* ---- what both need: the rows as codes, in one buffer of the calling thread ------------------------- */

enum { BLOCK_ROWS = 8, BLOCK_COLUMNS = 256 };

typedef struct {
    const zq_linear *w;
    zq_linear plain; /* w without extras, and for rows that have been through its shift and factor */
    zq_rows x;       /* these rows */
    zq_rows_in in;   /* plain and x */
    const zq_kernels *K;
    int64_t m;
    float *t; /* (m, rank) */
    int64_t rank;
    uint8_t *q; /* (m, k), NULL where the product reads x itself */
    int64_t ld;
    float *scale;
    int32_t *zero;
    int64_t *columns; /* (rank) outliers */
    float *top;       /* (k) */
} low_job;

static int64_t
codes_bytes(const low_job *j)
{
    return zq_round_up(j->m * j->ld, 64) + 2 * zq_round_up(j->m * 4, 64);
}

static void
take_codes(low_job *j, char **buffer)
{
    j->q = zq_take(buffer, j->m * j->ld);
    j->scale = zq_take(buffer, j->m * 4);
    j->zero = zq_take(buffer, j->m * 4);
}

/* One row of floats to codes, zeros in the slack. */
static void
code_row(low_job *j, const float *x, int64_t r)
{
    const int64_t k = j->w->k;
    uint8_t *q = j->q + r * j->ld;
    zq_code_row(&j->in, r, x, q, j->scale + r, j->zero + r);
    memset(q + k, 0, (size_t)(j->ld - k));
}

static zq_status
product(low_job *j, const zq_out *out, const float *u, int64_t *bad_row)
{
    const zq_status s = zq_trouble_status(&j->in.trouble, bad_row);
    if (s != ZQ_OK) {
        return s;
    }
    zq_rows rows = j->x;
    if (j->q) {
        rows = (zq_rows){.u8 = j->q, .ld_u8 = j->ld, .scale = j->scale, .zero = j->zero};
    }
    zq_out sum = *out;
    sum.add.t = j->t;
    sum.add.u = u;
    sum.add.ld_t = sum.add.rank = j->rank;
    return zq_linear_forward(&j->plain, &rows, j->m, &sum, bad_row);
}

/* ---- LoRC ------------------------------------------------------------------------------------------- */

/* Rows r0 .. r0 + rows of what the codes stand for. */
static const float *
values(low_job *j, int64_t r0, int64_t rows)
{
    const zq_rows *x = &j->x;
    const int64_t k = j->w->k;
    if (!j->q && x->f32) {
        return x->f32 + r0 * x->ld_f32;
    }
    float *out = zq_scratch(ZQ_SCRATCH_NN, (size_t)(rows * k) * sizeof *out);
    for (int64_t i = 0, r = r0; out && i < rows; i++, r++) {
        if (j->q) {
            code_row(j, x->f32 + r * x->ld_f32, r);
            j->K->dequantize_b8_f32(j->q + r * j->ld, k, 0, j->scale[r], j->zero[r], out + i * k);
        }
        else {
            j->K->dequantize_b8_f32(x->u8 + r * x->ld_u8, k, 0, x->scale[r], x->zero[r], out + i * k);
        }
    }
    return out;
}

static void
inner_job(void *ctx, int64_t job)
{
    low_job *j = ctx;
    const zq_linear *v = &j->w->extras->v;
    const int64_t r0 = job * BLOCK_ROWS, rows = zq_min(BLOCK_ROWS, j->m - r0);
    const float *a = values(j, r0, rows);
    if (!a) {
        atomic_store(&j->in.trouble.no_memory, 1);
        return;
    }
    for (int64_t r = 0; r < rows; r += j->K->mr_f32) {
        for (int64_t col = 0; col < j->rank; col += ZQ_NR) {
            const int64_t lda = !j->q && j->x.f32 ? j->x.ld_f32 : j->w->k;
            zq_tile t = {.mr = (int)zq_min(j->K->mr_f32, rows - r), .nr = (int)zq_min(ZQ_NR, j->rank - col), .k = j->w->k,
                         .a = a + r * lda, .lda = lda, .b = (const char *)v->panels + col / ZQ_NR * v->panel_bytes,
                         .bias = v->bias + col, .y = j->t + (r0 + r) * j->rank + col, .ldy = j->rank};
            j->K->gemm_f32(&t);
        }
    }
}

static zq_status
forward_corrected(low_job *j, const zq_out *out, int64_t *bad_row)
{
    const int quantize = j->x.f32 && j->w->kind != ZQ_W_F32 && j->x.quant != ZQ_QUANT_TOKEN_16;
    j->rank = j->w->extras->rank;
    char *buffer = zq_scratch(ZQ_SCRATCH_LOW, (size_t)(zq_round_up(j->m * j->rank * 4, 64) + (quantize ? codes_bytes(j) : 0)));
    if (!buffer) {
        return ZQ_ENOMEM;
    }
    j->t = zq_take(&buffer, j->m * j->rank * 4);
    if (quantize) {
        take_codes(j, &buffer);
    }
    zq_parallel_for(zq_ceil_div(j->m, BLOCK_ROWS), inner_job, j);
    return product(j, out, j->w->extras->u, bad_row);
}

/* ---- LLM.int8() ------------------------------------------------------------------------------------- */

static void
top_job(void *ctx, int64_t job)
{
    low_job *j = ctx;
    const int64_t first = job * BLOCK_COLUMNS, columns = zq_min(BLOCK_COLUMNS, j->w->k - first);
    memset(j->top + first, 0, (size_t)columns * sizeof *j->top);
    j->K->absmax_columns_f32(j->x.f32 + first, j->m, columns, j->x.ld_f32, j->top + first);
}

static void
split_job(void *ctx, int64_t r)
{
    low_job *j = ctx;
    const int64_t k = j->w->k;
    const float *x = j->x.f32 + r * j->x.ld_f32;
    float *rest = zq_scratch(ZQ_SCRATCH_NN, (size_t)k * sizeof *rest), *t = j->t + r * j->rank;
    if (!rest) {
        atomic_store(&j->in.trouble.no_memory, 1);
        return;
    }
    memcpy(rest, x, (size_t)k * sizeof *rest);
    for (int64_t i = 0; i < j->rank; i++) {
        t[i] = x[j->columns[i]];
        rest[j->columns[i]] = 0.0f;
        if (!(t[i] >= -FLT_MAX && t[i] <= FLT_MAX)) {
            zq_note_bad_row(&j->in.trouble, r);
        }
    }
    code_row(j, rest, r);
}

/* Column `column` of the weights into row r of every panel of u. */
static void
weight_column(const zq_linear *w, int64_t column, int64_t *known, float *u, int64_t rank, int64_t r)
{
    const struct zq_extras *e = w->extras;
    while (*known < e->known && e->columns[*known] < column) {
        ++*known;
    }
    const int is_known = *known < e->known && e->columns[*known] == column;
    for (int64_t p = 0; p < zq_panel_count(w->n); p++) {
        float *out = u + (p * rank + r) * ZQ_NR;
        if (is_known) {
            memcpy(out, e->weights + (p * e->known + *known) * ZQ_NR, ZQ_NR * sizeof *out);
            continue;
        }
        const int8_t *codes = (const int8_t *)w->panels + p * w->panel_bytes + (column / 4 * ZQ_NR) * 4 + column % 4;
        for (int64_t i = 0; i < ZQ_NR; i++) {
            out[i] = (float)codes[i * 4] * w->scale[p * ZQ_NR + i];
        }
    }
}

/* How many columns reach the threshold, and which, unless that is NULL. NaN does not: code_row finds it. */
static int64_t
find_outliers(const low_job *j, int64_t *columns)
{
    int64_t count = 0;
    for (int64_t i = 0; i < j->w->k; i++) {
        if (j->top[i] >= j->w->extras->threshold) {
            if (columns) {
                columns[count] = i;
            }
            count++;
        }
    }
    return count;
}

static zq_status
forward_outliers(low_job *j, const zq_out *out, int64_t *bad_row)
{
    const zq_linear *w = j->w;
    j->top = zq_scratch(ZQ_SCRATCH_NN, (size_t)w->k * sizeof *j->top); /* read before split_job takes it for its rows */
    if (!j->top) {
        return ZQ_ENOMEM;
    }
    zq_parallel_for(zq_ceil_div(w->k, BLOCK_COLUMNS), top_job, j);
    j->rank = find_outliers(j, NULL);
    const int64_t columns = zq_round_up(j->rank * 8, 64), t = zq_round_up(j->m * j->rank * 4, 64);
    const int64_t u = zq_panel_count(w->n) * ZQ_NR * j->rank * 4;
    char *buffer = zq_scratch(ZQ_SCRATCH_LOW, (size_t)(columns + t + u + codes_bytes(j)));
    if (!buffer) {
        return ZQ_ENOMEM;
    }
    j->columns = zq_take(&buffer, j->rank * 8);
    j->t = zq_take(&buffer, j->m * j->rank * 4);
    float *panels = zq_take(&buffer, u);
    take_codes(j, &buffer);
    find_outliers(j, j->columns);
    int64_t known = 0;
    for (int64_t r = 0; r < j->rank; r++) {
        weight_column(w, j->columns[r], &known, panels, j->rank, r);
    }
    zq_parallel_for(j->m, split_job, j);
    return product(j, out, panels, bad_row);
}

int
zq_linear_splits(const zq_linear *w)
{
    return w->extras && !w->extras->rank;
}

/* ---- entry ------------------------------------------------------------------------------------------ */

typedef struct {
    zq_rows_in in;
    float *out; /* (m, k) */
} branch_job;

static void
branch_row(void *ctx, int64_t r)
{
    const branch_job *b = ctx;
    zq_read_row(&b->in, r, b->out + r * b->in.w->k);
}

/* All rows of x behind the shift and factor of w, in scratch of the calling thread that plain's products do not use. */
static zq_status
branch_rows(const zq_linear *w, const zq_rows *x, int64_t m, zq_rows *behind)
{
    branch_job b = {.out = zq_scratch(ZQ_SCRATCH_ROW, (size_t)(m * w->k) * sizeof *b.out)};
    if (!b.out) {
        return ZQ_ENOMEM;
    }
    zq_rows_in_init(&b.in, w, x, m);
    zq_for_rows(m, w->k, branch_row, &b);
    behind->f32 = b.out;
    behind->ld_f32 = w->k;
    return ZQ_OK;
}

zq_status
zq_forward_with_extras(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row)
{
    low_job j = {.w = w, .plain = *w, .x = *x, .K = zq_active(), .m = m, .ld = zq_row_pitch(w->k)};
    j.plain.extras = NULL;
    j.plain.in_factor = NULL;
    zq_status s = w->in_factor && x->f32 ? branch_rows(w, x, m, &j.x) : ZQ_OK;
    if (s == ZQ_OK) {
        zq_rows_in_init(&j.in, &j.plain, &j.x, m);
        zq_find_scale(&j.in);
        s = zq_trouble_status(&j.in.trouble, bad_row);
    }
    if (s != ZQ_OK) {
        return s;
    }
    return w->extras->rank ? forward_corrected(&j, out, bad_row) : forward_outliers(&j, out, bad_row);
}
