#include "linalg.h"

#include <cblas.h>

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
