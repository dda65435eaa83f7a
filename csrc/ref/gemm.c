/* Scalar truth of the matrix tiles. The order of the float operations is the contract that every level keeps:
 *   S8     y = fma(float(acc) * sx, scale, bias)
 *   groups f = fma(float(acc_g), scale_g, f) over g from 0;  y = fma(f - (zero - 128) * zcorr, sx, bias)
 *   F32    f = fma(a_k, b_k, f) over k from 0;  y = f + bias
 * then y = act(y), then y = y + residual. acc is exact. Pairs of rows (int16 activations) are computed with bias 0 each
 * and added: y = (y_high + y_low) + bias. */
#include "../zq_kernels.h"

#include <math.h>

#include "math.h"

/* One element before activation and residual; row i of a, column j. */
typedef float (*value_fn)(const zq_tile *t, int i, int j, float bias);

static void
every_output(const zq_tile *t, value_fn value)
{
    for (int i = 0; i < t->mr / (t->pairs ? 2 : 1); i++) {
        for (int j = 0; j < t->nr; j++) {
            const float sum = t->pairs ? (value(t, 2 * i, j, 0.0f) + value(t, 2 * i + 1, j, 0.0f)) + t->bias[j]
                                       : value(t, i, j, t->bias[j]);
            const float y = zq_activate1(sum, t->act);
            t->y[i * t->ldy + j] = t->residual ? y + t->residual[i * t->ldr + j] : y;
        }
    }
}

/* sum over k0 <= k < k1 of a[i][k] * code[k][j]; wraps like the hardware, the final value fits. */
static int32_t
dot_s8(const zq_tile *t, int i, int j, int64_t k0, int64_t k1)
{
    const uint8_t *a = (const uint8_t *)t->a + i * t->lda;
    const int8_t *b = t->b;
    uint32_t acc = 0;
    for (int64_t k = k0; k < k1; k++) {
        acc += (uint32_t)((int32_t)a[k] * (int32_t)b[(k / 4 * ZQ_NR + j) * 4 + k % 4]);
    }
    return (int32_t)acc;
}

/* the same with 16 * code out of nibbles */
static int32_t
dot_s4(const zq_tile *t, int i, int j, int64_t k0, int64_t k1)
{
    const uint8_t *a = (const uint8_t *)t->a + i * t->lda;
    const uint8_t *b = t->b;
    uint32_t acc = 0;
    for (int64_t k = k0; k < k1; k++) {
        const uint8_t byte = b[(k / 8 * ZQ_NR + j) * 4 + k % 4];
        const int8_t code16 = (int8_t)(k % 8 < 4 ? (uint8_t)(byte << 4) : byte & 0xf0);
        acc += (uint32_t)((int32_t)a[k] * (int32_t)code16);
    }
    return (int32_t)acc;
}

static int32_t
minus_zero_point(const zq_tile *t, int i, int j, int32_t acc)
{
    return (int32_t)((uint32_t)acc - (uint32_t)t->zx[i] * (uint32_t)t->colsum[j]);
}

static float
value_s8(const zq_tile *t, int i, int j, float bias)
{
    const int32_t acc = minus_zero_point(t, i, j, dot_s8(t, i, j, 0, t->k));
    return fmaf((float)acc * t->sx[i], t->scale[j], bias);
}

void
zq_gemm_u8s8__ref(const zq_tile *t)
{
    every_output(t, value_s8);
}

void
zq_gemm_u8s8_s32__ref(const zq_tile *t, int32_t *c, int64_t ldc)
{
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < t->nr; j++) {
            c[i * ldc + j] = minus_zero_point(t, i, j, dot_s8(t, i, j, 0, t->k));
        }
    }
}

ZQ_INLINE float
value_group(const zq_tile *t, int i, int j, float bias, int32_t (*dot)(const zq_tile *, int, int, int64_t, int64_t))
{
    float f = 0;
    for (int64_t g = 0; g * t->group < t->k; g++) {
        const int64_t k0 = g * t->group, k1 = zq_min(t->k, k0 + t->group);
        const uint32_t acc = (uint32_t)dot(t, i, j, k0, k1) + (uint32_t)t->colsum[g * ZQ_NR + j];
        f = fmaf((float)(int32_t)acc, t->scale[g * ZQ_NR + j], f);
    }
    f = fmaf(-(float)(t->zx[i] - 128), t->zcorr[j], f);
    return fmaf(f, t->sx[i], bias);
}

static float
value_s8_group(const zq_tile *t, int i, int j, float bias)
{
    return value_group(t, i, j, bias, dot_s8);
}

static float
value_s4_group(const zq_tile *t, int i, int j, float bias)
{
    return value_group(t, i, j, bias, dot_s4);
}

void
zq_gemm_u8s8_group__ref(const zq_tile *t)
{
    every_output(t, value_s8_group);
}

void
zq_gemm_u8s4_group__ref(const zq_tile *t)
{
    every_output(t, value_s4_group);
}

static float
value_f32(const zq_tile *t, int i, int j, float bias)
{
    const float *a = (const float *)t->a + i * t->lda, *b = (const float *)t->b + j;
    float f = 0;
    for (int64_t k = 0; k < t->k; k++) {
        f = fmaf(a[k], b[k * ZQ_NR], f);
    }
    return f + bias;
}

void
zq_gemm_f32__ref(const zq_tile *t)
{
    every_output(t, value_f32);
}
