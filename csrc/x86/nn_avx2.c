/* Transformer operators on rows at level avx2. */
#include "../zq_kernels.h"

#if defined(__x86_64__)
#include <math.h>

/* 6 x 16 floats: 12 accumulators, 2 vectors of b, 1 of a: 15 of 16 registers. */
enum { MATMUL_MR = 6, MATMUL_NV = 1, CODE_ROWS = 4, CODE_NV = 1, FEW_ROWS = 4, FEW_BLOCK = 4, RANGE_WAYS = 1, EXP_WAYS = 1 };

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"
#include "v16_math.h"

#include "nn.inc.h"

/* Even and odd bytes widened to int16 apart: vpmaddubsw would saturate. */
ZQ_INLINE __m256i
dot4(__m256i acc, __m256i a, __m256i b)
{
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

ZQ_INLINE v16i
v16i_dot4(v16i acc, v16i a, v16i b)
{
    return (v16i){dot4(acc.lo, a.lo, b.lo), dot4(acc.hi, a.hi, b.hi)};
}

#include "attention.inc.h"
#include "train.inc.h"
ZQ_TARGET_END

void
zq_fill_nn__avx2(zq_kernels *t)
{
    fill(t);
    fill_attention(t);
    fill_train(t);
}
#endif
