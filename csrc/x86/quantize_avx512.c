/* Quantizers and bit packing at level avx512vnni: quantize.inc.h on this level's v16. */
#include "../zq_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h> /* before the target region: its own functions carry their own targets */
#include <string.h>
ZQ_TARGET_BEGIN(ZQ_TARGET_AVX512)
#include "v16_avx512.h"
#define LEVEL(name) name##__avx512vnni
#include "quantize.inc.h"
ZQ_TARGET_END

void
zq_fill_quantize__avx512vnni(zq_kernels *t)
{
    fill__avx512vnni(t);
}
#endif
