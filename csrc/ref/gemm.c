/* Scalar truth of the matrix tiles. The order of the float operations is the contract that every level keeps:
 *   S8     y = fma(float(acc) * sx, scale, bias)
 *   groups f = fma(float(acc_g), scale_g, f) over g from 0;  y = fma(f - (zero - 128) * zcorr, sx, bias)
 *   F32    f = fma(a_k, b_k, f) over k from 0, in as many blocks of k as one likes;  y = f + bias
 * then y = fma(low_r, low_b_r, y) over r, then y = act(y), then y = y + residual. acc is exact. Pairs of rows (int16
 * activations) are computed with bias 0 each and added: y = (y_high + y_low) + bias. */
#include "../zq_kernels.h"

#include <math.h>
#include <string.h>

#include "math.h"

/* One element before activation and residual; row i of a, column j. */
typedef float (*value_fn)(const zq_tile *t, int i, int j, float bias);

static float
sum_f32(const zq_tile *t, int i, int j)
{
    const float *a = (const float *)t->a + i * t->lda, *b = (const float *)t->b + j;
    float f = t->sums_in ? t->sums_in[i * ZQ_NR + j] : 0.0f;
    for (int64_t k = 0; k < t->k; k++) {
        f = fmaf(a[k], b[k * ZQ_NR], f);
    }
    return f;
}

static void
keep_sums(const zq_tile *t)
{
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < ZQ_NR; j++) {
            t->sums_out[i * ZQ_NR + j] = sum_f32(t, i, j);
        }
    }
}

static void
one_tile(const zq_tile *t, value_fn value)
{
    if (t->sums_out) {
        keep_sums(t);
        return;
    }
    for (int i = 0; i < t->mr / (t->pairs ? 2 : 1); i++) {
        for (int j = 0; j < t->nr; j++) {
            float sum = t->pairs ? (value(t, 2 * i, j, 0.0f) + value(t, 2 * i + 1, j, 0.0f)) + t->bias[j]
                                 : value(t, i, j, t->bias[j]);
            for (int64_t r = 0; r < t->rank; r++) {
                sum = fmaf(t->low[i * t->ld_low + r], t->low_b[r * ZQ_NR + j], sum);
            }
            const float y = zq_activate1(sum, t->act);
            t->y[i * t->ldy + j] = t->residual ? y + t->residual[i * t->ldr + j] : y;
        }
    }
}

static void
every_output(zq_tile *t, value_fn value)
{
    one_tile(t, value);
    for (int64_t left = t->more; left > 0; left--) {
        zq_tile_next(t);
        one_tile(t, value);
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

/* code + offset of column j at k, b the codes of a group, which start at k = 0 */
typedef int32_t (*code_fn)(const uint8_t *b, int64_t k, int j);

static int32_t
code_u8(const uint8_t *b, int64_t k, int j)
{
    return b[(k / 4 * ZQ_NR + j) * 4 + k % 4];
}

static int32_t
code_u4(const uint8_t *b, int64_t k, int j)
{
    return b[(k / 8 * ZQ_NR + j) * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15;
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
zq_gemm_u8s8__ref(zq_tile *t)
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
value_group(const zq_tile *t, int i, int j, float bias, int bits, code_fn code)
{
    const int8_t *a = (const int8_t *)t->a + i * t->lda;
    const uint8_t *b = t->b;
    float f = 0;
    for (int64_t g = 0; g * t->group < t->k; g++) {
        const int64_t count = zq_min(t->group, t->k - g * t->group);
        uint32_t acc = (uint32_t)t->start[i * t->ld_start + g];
        float scale;
        memcpy(&scale, b + j * 4, sizeof scale);
        b += ZQ_NR * 4;
        for (int64_t k = 0; k < count; k++) {
            acc += (uint32_t)(a[g * t->group + k] * code(b, k, j));
        }
        f = fmaf((float)(int32_t)acc, scale, f);
        b += t->group * ZQ_NR * bits / 8;
    }
    f = fmaf(-(float)(t->zx[i] - 128), t->zcorr[j], f);
    return fmaf(f, t->sx[i], bias);
}

static float
value_u8_group(const zq_tile *t, int i, int j, float bias)
{
    return value_group(t, i, j, bias, 8, code_u8);
}

static float
value_u4_group(const zq_tile *t, int i, int j, float bias)
{
    return value_group(t, i, j, bias, 4, code_u4);
}

void
zq_gemm_s8u8_group__ref(zq_tile *t)
{
    every_output(t, value_u8_group);
}

void
zq_gemm_s8u4_group__ref(zq_tile *t)
{
    every_output(t, value_u4_group);
}

void
zq_center_groups_b8__ref(const uint8_t *q, int64_t n, int64_t group, int32_t offset, uint8_t *s, int32_t *start)
{
    for (int64_t g = 0; g * group < n; g++) {
        int32_t sum = 0;
        for (int64_t k = g * group; k < zq_min(n, (g + 1) * group); k++) {
            sum += q[k] - 128;
            s[k] = (uint8_t)(q[k] ^ 0x80);
        }
        start[g] = -offset * sum;
    }
}

static float
value_f32(const zq_tile *t, int i, int j, float bias)
{
    return sum_f32(t, i, j) + bias;
}

void
zq_gemm_f32__ref(zq_tile *t)
{
    every_output(t, value_f32);
}
