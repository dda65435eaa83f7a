#include "linalg.h"

#include "zq.h"
#include "zq_common.h"

#include <cblas.h>
#include <stdatomic.h>

/* LAPACK has no header in Debian's OpenBLAS; its integers are int there, as CBLAS's are. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t uplo_length);

enum { BLOCK = 256, STRIP = 1024 }; /* columns, or rows, of a block; rows, or columns, of a product */

const char *
zq_blas_core(void)
{
    return openblas_get_corename();
}

const char *
zq_blas_config(void)
{
    return openblas_get_config();
}

/* BLAS keeps to the thread that calls it from the first caller that is in here to the last one that leaves: what one of them
 * found and puts back must not be what another one set. */
static void
hold_blas_threads(int step)
{
    static atomic_flag busy = ATOMIC_FLAG_INIT; /* for as long as BLAS takes to note a number */
    static int inside, before;
    while (atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) {
    }
    if (inside == 0) {
        before = openblas_get_num_threads();
        openblas_set_num_threads(1);
    }
    inside += step;
    if (inside == 0) {
        openblas_set_num_threads(before);
    }
    atomic_flag_clear_explicit(&busy, memory_order_release);
}

/* Jobs that call BLAS, which is not to start threads of its own meanwhile. Returns whether it was stopped. */
static int
run_jobs(int64_t jobs, zq_job_fn fn, void *ctx, zq_stop *stop)
{
    hold_blas_threads(1);
    const int stopped = zq_parallel_until(jobs, fn, ctx, stop);
    hold_blas_threads(-1);
    return stopped;
}

typedef struct {
    double *a;
    int64_t n, ld;
    int64_t k, next; /* the block of columns k..next-1 is done; the trailing matrix starts at next */
    int64_t strips;  /* of the trailing matrix */
    int info;
} cholesky;

static void
diagonal_job(void *ctx, int64_t ignored)
{
    (void)ignored;
    cholesky *c = ctx;
    const int n = (int)(c->next - c->k), ld = (int)c->ld;
    dpotrf_("L", &n, c->a + c->k * c->ld + c->k, &ld, &c->info, 1);
}

/* Rows of the block below its diagonal: times L_kk^-T. */
static void
column_job(void *ctx, int64_t job)
{
    const cholesky *c = ctx;
    const int64_t row = c->next + job * BLOCK, rows = zq_min(BLOCK, c->n - row);
    cblas_dtrsm(CblasColMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, (int)rows, (int)(c->next - c->k), 1.0,
                c->a + c->k * c->ld + c->k, (int)c->ld, c->a + c->k * c->ld + row, (int)c->ld);
}

/* A strip of a block of trailing columns: minus L_ik L_jk^T. The strip on the diagonal begins with a symmetric block. */
static void
trailing_job(void *ctx, int64_t job)
{
    const cholesky *c = ctx;
    const int64_t col = c->next + job / c->strips * BLOCK, cols = zq_min(BLOCK, c->n - col), depth = c->next - c->k;
    int64_t row = col + job % c->strips * STRIP;
    const int64_t end = zq_min(row + STRIP, c->n);
    const double *lj = c->a + c->k * c->ld + col;
    if (row == col) {
        cblas_dsyrk(CblasColMajor, CblasLower, CblasNoTrans, (int)cols, (int)depth, -1.0, lj, (int)c->ld, 1.0,
                    c->a + col * c->ld + col, (int)c->ld);
        row += cols;
    }
    if (row < end) {
        cblas_dgemm(CblasColMajor, CblasNoTrans, CblasTrans, (int)(end - row), (int)cols, (int)depth, -1.0,
                    c->a + c->k * c->ld + row, (int)c->ld, lj, (int)c->ld, 1.0, c->a + col * c->ld + row, (int)c->ld);
    }
}

int64_t
zq_cholesky_f64(double *a, int64_t n, int64_t ld, zq_stop *stop)
{
    cholesky c = {.a = a, .n = n, .ld = ld};
    for (; c.k < n; c.k = c.next) {
        c.next = zq_min(c.k + BLOCK, n);
        if (run_jobs(1, diagonal_job, &c, stop)) {
            return -1;
        }
        if (c.info != 0) {
            return c.k + c.info;
        }
        const int64_t left = n - c.next;
        c.strips = zq_ceil_div(left, STRIP);
        if (run_jobs(zq_ceil_div(left, BLOCK), column_job, &c, stop) ||
            run_jobs(zq_ceil_div(left, BLOCK) * c.strips, trailing_job, &c, stop)) {
            return -1;
        }
    }
    return 0;
}

typedef struct {
    double *b;
    const double *l;
    int64_t m, n, ldb, ldl;
    int transpose;
    zq_stop *stop;
} right_solve;

/* Columns c..end-1 of some rows of b, where those that they depend on are solved: minus the product with these, then times the
 * inverse of the block on the diagonal. */
static void
right_columns(const right_solve *s, double *b, int64_t rows, int64_t c, int64_t end)
{
    const CBLAS_TRANSPOSE transpose = s->transpose ? CblasTrans : CblasNoTrans;
    const int64_t from = s->transpose ? 0 : end, depth = s->transpose ? c : s->n - end;
    const double *l = s->l + (s->transpose ? c : c * s->ldl + end);
    if (depth > 0) {
        cblas_dgemm(CblasColMajor, CblasNoTrans, transpose, (int)rows, (int)(end - c), (int)depth, -1.0, b + from * s->ldb,
                    (int)s->ldb, l, (int)s->ldl, 1.0, b + c * s->ldb, (int)s->ldb);
    }
    cblas_dtrsm(CblasColMajor, CblasRight, CblasLower, transpose, CblasNonUnit, (int)rows, (int)(end - c), 1.0,
                s->l + c * (s->ldl + 1), (int)s->ldl, b + c * s->ldb, (int)s->ldb);
}

static void
right_job(void *ctx, int64_t job)
{
    const right_solve *s = ctx;
    const int64_t row = job * BLOCK, rows = zq_min(BLOCK, s->m - row), blocks = zq_ceil_div(s->n, STRIP);
    for (int64_t i = 0; i < blocks && !zq_stopped(s->stop); i++) {
        const int64_t c = (s->transpose ? i : blocks - 1 - i) * STRIP;
        right_columns(s, s->b + row, rows, c, zq_min(c + STRIP, s->n));
    }
}

zq_status
zq_solve_right_f64(double *b, int64_t m, int64_t n, int64_t ldb, const double *l, int64_t ldl, int transpose, zq_stop *stop)
{
    right_solve s = {b, l, m, n, ldb, ldl, transpose, stop};
    return run_jobs(zq_ceil_div(m, BLOCK), right_job, &s, stop) ? ZQ_ESTOPPED : ZQ_OK;
}
