/* exp, GELU and SiLU on one float32: the scalar truth, and the coefficients that x86/v16_math.h shares. fmaf is the
 * only libm function, every operation is rounded once and in a fixed order, so sixteen lanes of v16 give the same bits.
 *
 * Errors, over all finite x (tests/test_nn.py measures them): zq_exp 1.7e-7 relative; zq_gelu_erf 1e-6 absolute,
 * exactly x for x >= 5.2 and 0 for x <= -5.2; zq_silu and zq_gelu_tanh 3e-7 relative to max(|y|, |x| * 1e-7). */
#ifndef ZQ_REF_MATH_H
#define ZQ_REF_MATH_H

#include "../zq.h"
#include "../zq_common.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* exp(t) = 2^n exp(r), n = rint(t / ln 2), r = t - n ln 2 in [-0.347, 0.347]. Adding ZQ_EXP_MAGIC to t / ln 2 rounds it
 * to an integer and leaves n + 126, the exponent field of 2^(n-1), in the low bits of the sum. The polynomial is
 * 2 exp(r), so n = -126 (t < -86.99) has the field 0 and gives 0: no subnormal is ever made. */
#define ZQ_EXP_LO (-87.5f)
#define ZQ_EXP_HI 88.72283f
#define ZQ_EXP_LOG2E 1.44269504f
#define ZQ_EXP_MAGIC (12582912.0f + 126.0f)
#define ZQ_EXP_LN2_HI 0.693147182f
#define ZQ_EXP_LN2_LO (-1.90465421e-9f)
/* Minimax for 2 exp(r), relative, degree 5, constant term pinned: exp(0) = 1 exactly. Lowest order first. */
static const float zq_exp_poly[6] = {2.0f,
                                     2 * 0.9999997019767761f,
                                     2 * 0.4999914765357971f,
                                     2 * 0.1666763871908188f,
                                     2 * 0.04189816117286682f,
                                     2 * 0.008290272206068039f};

/* gelu(x) = max(x, 0) - a Q(a), a = |x|, Q(a) = 1 - Phi(a) = erfc(a / sqrt 2) / 2. Q is a polynomial in
 * u = a / 2.6 - 1 on [0, 5.2], minimax for the weight a, and slightly negative at the end, where max(Q, 0) makes the tails exact. */
#define ZQ_GELU_END 5.2f
#define ZQ_GELU_SCALE (2.0f / 5.2f)
static const float zq_gelu_poly[14] = {
    0.0046614245511591434f, -0.03531457111239433f, 0.11933816969394684f,   -0.22920849919319153f, 0.2533997595310211f,
    -0.10945576429367065f,  -0.10861603915691376f, 0.19076389074325562f,   -0.07062831521034241f, -0.07027796655893326f,
    0.06974975019693375f,   -0.001870828797109425f, -0.017911195755004883f, 0.005370162893086672f};

/* gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), since (1 + tanh z) / 2 = sigmoid(2z). */
#define ZQ_GELU_TANH_C1 1.59576912f
#define ZQ_GELU_TANH_C3 0.0713548163f

/* The order of operands is that of x86 min and max: the second one when they compare false, so NaN in b stays. */
ZQ_INLINE float
zq_minf(float a, float b)
{
    return a < b ? a : b;
}

ZQ_INLINE float
zq_maxf(float a, float b)
{
    return a > b ? a : b;
}

/* exp(t); exp(-Inf) = 0; finite for every finite t (it saturates at exp(88.72) = 3.4e38); NaN stays NaN. */
ZQ_INLINE float
zq_exp(float t)
{
    t = zq_maxf(ZQ_EXP_LO, zq_minf(ZQ_EXP_HI, t));
    const float k = fmaf(t, ZQ_EXP_LOG2E, ZQ_EXP_MAGIC);
    const float n = k - ZQ_EXP_MAGIC;
    const float r = fmaf(-n, ZQ_EXP_LN2_LO, fmaf(-n, ZQ_EXP_LN2_HI, t));
    float p = zq_exp_poly[5];
    for (int i = 4; i >= 0; i--) {
        p = fmaf(p, r, zq_exp_poly[i]);
    }
    uint32_t bits;
    float power;
    memcpy(&bits, &k, sizeof bits);
    bits <<= 23;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

ZQ_INLINE float
zq_gelu_erf(float x)
{
    const float a = zq_minf(fabsf(x), ZQ_GELU_END);
    const float u = fmaf(a, ZQ_GELU_SCALE, -1.0f);
    float q = zq_gelu_poly[13];
    for (int i = 12; i >= 0; i--) {
        q = fmaf(q, u, zq_gelu_poly[i]);
    }
    return fmaf(-a, zq_maxf(q, 0.0f), zq_maxf(x, 0.0f));
}

/* x / (1 + exp(-z)), through e = exp(-|z|) <= 1 so that nothing overflows and the tails are exactly x and -0. */
ZQ_INLINE float
zq_times_sigmoid(float x, float z)
{
    const float e = zq_exp(-fabsf(z));
    return x * ((z < 0.0f ? e : 1.0f) / (1.0f + e));
}

ZQ_INLINE float
zq_silu(float x)
{
    return zq_times_sigmoid(x, x);
}

ZQ_INLINE float
zq_gelu_tanh(float x)
{
    return zq_times_sigmoid(x, x * fmaf(x * x, ZQ_GELU_TANH_C3, ZQ_GELU_TANH_C1));
}

ZQ_INLINE float
zq_activate1(float x, zq_activation act)
{
    switch (act) {
    case ZQ_ACT_RELU: return zq_maxf(x, 0.0f);
    case ZQ_ACT_GELU: return zq_gelu_erf(x);
    case ZQ_ACT_GELU_TANH: return zq_gelu_tanh(x);
    case ZQ_ACT_SILU: return zq_silu(x);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return x;
}

/* ---- row statistics: the scalar steps between the passes of LayerNorm and RMSNorm ------------------- */

/* A row whose sums overflow float32 is normalised after scaling by this, which is exact and changes nothing else. */
#define ZQ_SHRINK 0x1p-80f

typedef struct {
    float mean, var;
} zq_moments;

ZQ_INLINE int
zq_is_finite(float x)
{
    return fabsf(x) <= FLT_MAX;
}

ZQ_INLINE float
zq_mean(float sum, int64_t n)
{
    return sum / (float)n;
}

/* Corrected two-pass: with d = x - mean for a mean that was rounded, mean + E d and E d^2 - (E d)^2 make up for the
 * rounding, and a constant row has exactly its value as mean. */
ZQ_INLINE zq_moments
zq_moments_of(float mean, float first, float second, int64_t n)
{
    const float shift = zq_mean(first, n);
    return (zq_moments){mean + shift, zq_maxf(0.0f, fmaf(-shift, shift, zq_mean(second, n)))};
}

/* 1 / sqrt(var + eps); the floor keeps constant rows finite where eps is 0. */
ZQ_INLINE float
zq_rsqrt(float var, float eps)
{
    return 1.0f / sqrtf(zq_maxf(FLT_MIN, var + eps));
}

/* One head rotated where (a, b) are neighbours: see zq_rope. The same C at every level: no vector of sixteen lanes has its
 * partners in order. */
ZQ_INLINE void
zq_rotate_pairs(const float *x, int64_t half, const float *cos, const float *sin, float *y)
{
    for (int64_t i = 0; i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = fmaf(-b, sin[i], a * cos[i]);
        y[2 * i + 1] = fmaf(a, sin[i], b * cos[i]);
    }
}

#endif
