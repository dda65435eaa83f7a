/* Transformer operators on rows at level avx512vnni, and attention on codes at level amx. */
#include "../zq_kernels.h"

#if defined(__x86_64__)
#include <math.h>

/* 12 x 32 floats: 24 accumulators, 2 vectors of b, 1 of a; 24 independent chains cover 2 fma x 4 cycles. */
enum { MATMUL_MR = 12, MATMUL_NV = 2, CODE_ROWS = 8, CODE_NV = 2, FEW_ROWS = 8, FEW_BLOCK = 8, RANGE_WAYS = 2, EXP_WAYS = 4 };

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX512)
#include "v16_avx512.h"
#include "v16_math.h"

#include "nn.inc.h"

ZQ_INLINE v16i
v16i_dot4(v16i acc, v16i a, v16i b)
{
    return _mm512_dpbusd_epi32(acc, a, b);
}

#include "attention.inc.h"
#include "train.inc.h"
ZQ_TARGET_END

ZQ_TARGET_BEGIN(ZQ_TARGET_AMX)
#include "attention_amx.inc.h"
ZQ_TARGET_END

void
zq_fill_nn__avx512vnni(zq_kernels *t)
{
    fill(t);
    fill_attention(t);
    fill_train(t);
}

void
zq_fill_nn__amx(zq_kernels *t)
{
    t->attend_tile_b8 = zq_attend_tile_b8__amx;
}
#endif
