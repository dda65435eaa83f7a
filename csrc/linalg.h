/* The only file pair that knows BLAS and LAPACK. Forward passes do not use it (gemm.c serves them). */
#ifndef ZQ_LINALG_H
#define ZQ_LINALG_H

/* The kernel set that OpenBLAS chose for this CPU ("Haswell", "SkylakeX", ...) and its build description. */
const char *zq_blas_core(void);
const char *zq_blas_config(void);

#endif
