#include "linalg.h"

#include "zq.h"
#include "zq_common.h"

#include <cblas.h>
#include <stdatomic.h>

/* LAPACK has no header in Debian's OpenBLAS; its integers are int there, as CBLAS's are. */
void dpotrf_(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t uplo_length);

enum { BLOCK = 256, STRIP = 1024 }; /* columns of a block; rows of a product */

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

/* Jobs that call BLAS, which is not to start threads of its own meanwhile. */
static void
run_jobs(int64_t jobs, zq_job_fn fn, void *ctx)
{
    hold_blas_threads(1);
    zq_parallel_for(jobs, fn, ctx);
    hold_blas_threads(-1);
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
zq_cholesky_f64(double *a, int64_t n, int64_t ld)
{
    cholesky c = {.a = a, .n = n, .ld = ld};
    for (; c.k < n; c.k = c.next) {
        c.next = zq_min(c.k + BLOCK, n);
        run_jobs(1, diagonal_job, &c);
        if (c.info != 0) {
            return c.k + c.info;
        }
        const int64_t left = n - c.next;
        c.strips = zq_ceil_div(left, STRIP);
        run_jobs(zq_ceil_div(left, BLOCK), column_job, &c);
        run_jobs(zq_ceil_div(left, BLOCK) * c.strips, trailing_job, &c);
    }
    return 0;
}

typedef struct {
    double *b;
    const double *l;
    int64_t m, n, ldb, ldl;
    int transpose;
} right_solve;

static void
right_job(void *ctx, int64_t job)
{
    const right_solve *s = ctx;
    const int64_t row = job * BLOCK, rows = zq_min(BLOCK, s->m - row);
    cblas_dtrsm(CblasColMajor, CblasRight, CblasLower, s->transpose ? CblasTrans : CblasNoTrans, CblasNonUnit, (int)rows,
                (int)s->n, 1.0, s->l, (int)s->ldl, s->b + row, (int)s->ldb);
}

void
zq_solve_right_f64(double *b, int64_t m, int64_t n, int64_t ldb, const double *l, int64_t ldl, int transpose)
{
    right_solve s = {b, l, m, n, ldb, ldl, transpose};
    run_jobs(zq_ceil_div(m, BLOCK), right_job, &s);
}
