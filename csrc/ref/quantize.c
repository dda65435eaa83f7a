/* Rows of float32 to codes and back: the scalar truth. Nothing here depends on the order of operations except
 * where a zero's sign could: minima and maxima start at +0 and move only to strictly smaller or larger values. */
#include "../zq_kernels.h"

#include <math.h>
#include <string.h>

float
zq_absmax_f32__ref(const float *x, int64_t n)
{
    /* Without the sign bit, float32 patterns order like their values, Inf above all finite ones, NaN above Inf. */
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float amax;
    memcpy(&amax, &top, sizeof amax);
    return amax;
}

void
zq_absmax_columns_f32__ref(const float *x, int64_t rows, int64_t n, int64_t ldx, float *top)
{
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < n; j++) {
            const float pair[2] = {top[j], x[i * ldx + j]};
            top[j] = zq_absmax_f32__ref(pair, 2);
        }
    }
}

int
zq_minmax_f32__ref(const float *x, int64_t n, float *lo, float *hi)
{
    float least = 0.0f, most = 0.0f;
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        finite &= isfinite(x[i]) != 0;
    }
    *lo = finite ? least : 0.0f;
    *hi = finite ? most : 0.0f;
    return finite;
}

/* Clamped before rounding: the bounds are integers, so the order does not matter, and the conversion to int32 is
 * defined for any x. A NaN (scale 0 times 0) becomes lo. */
static uint8_t
code(float scaled, int32_t zero, int32_t qmin, int32_t qmax)
{
    const float lo = (float)(qmin - zero), hi = (float)(qmax - zero);
    scaled = scaled > lo ? scaled : lo;
    scaled = scaled < hi ? scaled : hi;
    return (uint8_t)((int32_t)rintf(scaled) + zero);
}

void
zq_quantize_mul_f32_b8__ref(const float *x, int64_t n, float inv, int32_t zero, uint8_t *q)
{
    for (int64_t i = 0; i < n; i++) {
        const int32_t moved = (int32_t)rintf(x[i] * inv) + zero;
        q[i] = (uint8_t)(moved < 0 ? 0 : moved > 255 ? 255 : moved);
    }
}

int
zq_quantize_minmax_f32_b8__ref(const float *x, int64_t n, float inv, int32_t zero, uint8_t *q, const float *next,
                               const float *ahead, zq_range *range)
{
    (void)ahead;
    zq_quantize_mul_f32_b8__ref(x, n, inv, zero, q);
    return zq_minmax_f32__ref(next, n, &range->lo, &range->hi);
}

void
zq_quantize_mul_f32_b16__ref(const float *x, int64_t n, float inv, uint8_t *high, uint8_t *low)
{
    for (int64_t i = 0; i < n; i++) {
        float scaled = x[i] * inv;
        scaled = scaled > -32767.0f ? scaled : -32767.0f;
        scaled = scaled < 32767.0f ? scaled : 32767.0f;
        const int32_t moved = (int32_t)rintf(scaled) + 32768;
        high[i] = (uint8_t)(moved >> 8);
        low[i] = (uint8_t)(moved & 255);
    }
}

void
zq_quantize_div_f32_b8__ref(const float *x, int64_t n, float scale, int32_t zero, int32_t qmin, int32_t qmax, uint8_t *q)
{
    for (int64_t i = 0; i < n; i++) {
        q[i] = code(x[i] / scale, zero, qmin, qmax);
    }
}

void
zq_quantize_vec_f32_b8__ref(const float *x, int64_t n, const float *scale, const int32_t *zero, int32_t qmin, int32_t qmax,
                            uint8_t *q)
{
    for (int64_t i = 0; i < n; i++) {
        q[i] = code(x[i] / scale[i], zero[i], qmin, qmax);
    }
}

static float
value(uint8_t q, int is_signed, float scale, int32_t zero)
{
    const int32_t code = is_signed ? (int8_t)q : q;
    /* Unsigned: any zero is defined, as in the vector registers. */
    return (float)(int32_t)((uint32_t)code - (uint32_t)zero) * scale;
}

void
zq_dequantize_b8_f32__ref(const uint8_t *q, int64_t n, int is_signed, float scale, int32_t zero, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] = value(q[i], is_signed, scale, zero);
    }
}

void
zq_dequantize_vec_b8_f32__ref(const uint8_t *q, int64_t n, int is_signed, const float *scale, const int32_t *zero, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] = value(q[i], is_signed, scale[i], zero[i]);
    }
}
void
zq_dequantize_cols_u8_f32__ref(const uint8_t *q, int64_t rows, int64_t cols, const float *scale, int32_t zero, float *out)
{
    for (int64_t i = 0; i < rows * cols; i++) {
        out[i] = (float)((int32_t)q[i] - zero) * scale[i % cols];
    }
}

