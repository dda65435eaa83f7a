/* Dense bit streams, least significant bit first: code i occupies bits i * bits .. i * bits + bits - 1, bit j of
 * the stream is bit j % 8 of byte j / 8. At 4 bits the even code is the low nibble; at any width it is the order of
 * compressed-tensors and GPTQ words read little-endian. */
#include "../zq_kernels.h"

#include <string.h>

void
zq_pack_bits__ref(const uint8_t *codes, int64_t n, int bits, uint8_t *packed)
{
    memset(packed, 0, (size_t)zq_ceil_div(n * bits, 8));
    for (int64_t i = 0; i < n; i++) {
        for (int b = 0; b < bits; b++) {
            const int64_t at = i * bits + b;
            packed[at / 8] = (uint8_t)(packed[at / 8] | ((codes[i] >> b & 1) << at % 8));
        }
    }
}

void
zq_unpack_bits__ref(const uint8_t *packed, int64_t n, int bits, int is_signed, uint8_t *codes)
{
    const int sign = is_signed ? 1 << (bits - 1) : 0;
    for (int64_t i = 0; i < n; i++) {
        int code = 0;
        for (int b = 0; b < bits; b++) {
            const int64_t at = i * bits + b;
            code |= (packed[at / 8] >> at % 8 & 1) << b;
        }
        codes[i] = (uint8_t)((code ^ sign) - sign);
    }
}
