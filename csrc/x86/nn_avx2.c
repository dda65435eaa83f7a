/* Transformer operators on rows at level avx2. */
#include "../zq_kernels.h"

#if defined(__x86_64__)
#include <math.h>

/* 6 x 16 floats: 12 accumulators, 2 vectors of b, 1 of a: 15 of 16 registers. */
enum { MATMUL_MR = 6, MATMUL_NV = 1, RANGE_WAYS = 1 };

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"
#include "v16_math.h"

#include "nn.inc.h"
ZQ_TARGET_END

void
zq_fill_nn__avx2(zq_kernels *t)
{
    fill(t);
}
#endif
