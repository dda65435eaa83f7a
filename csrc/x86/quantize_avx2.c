/* Quantizers and bit packing at level avx2: quantize.inc.h on this level's v16. */
#include "../zq_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h> /* before the target region: its own functions carry their own targets */
#include <string.h>
ZQ_TARGET_BEGIN(ZQ_TARGET_AVX2)
#include "v16_avx2.h"
#define LEVEL(name) name##__avx2
#include "quantize.inc.h"
ZQ_TARGET_END

void
zq_fill_quantize__avx2(zq_kernels *t)
{
    fill__avx2(t);
}
#endif
