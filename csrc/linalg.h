/* The only file pair that knows BLAS and LAPACK. Forward passes do not use it (gemm.c serves them).
 *
 * Matrices are column-major, ld apart. The work is cut into pieces whose sizes do not depend on the number of threads,
 * each done by one thread: the bits depend on BLAS's kernels, not on the threads. */
#ifndef ZQ_LINALG_H
#define ZQ_LINALG_H

#include "zq.h"

/* The kernel set that OpenBLAS chose for this CPU ("Haswell", "SkylakeX", ...) and its build description. */
const char *zq_blas_core(void);
const char *zq_blas_config(void);

/* The lower triangle of a symmetric a (n, n) becomes L, a = L L^T; what is above the diagonal is neither read nor
 * written. Returns 0, 1 + the index of the first pivot that is not positive, or -1 where `stop` said so. */
int64_t zq_cholesky_f64(double *a, int64_t n, int64_t ld, zq_stop *stop);

/* b (m, n) becomes b L^-1 or, with transpose, b L^-T; L (n, n) lower triangular. ZQ_OK, or ZQ_ESTOPPED. */
zq_status zq_solve_right_f64(double *b, int64_t m, int64_t n, int64_t ldb, const double *l, int64_t ldl, int transpose,
                             zq_stop *stop);

#endif
