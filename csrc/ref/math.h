/* exp, GELU and SiLU on one float32: the scalar truth, and the coefficients that x86/v16_math.h shares. fmaf is the
 * only libm function, every operation is rounded once and in a fixed order, so sixteen lanes of v16 give the same bits.
 *
 * Errors, over all finite x (tests/test_nn.py measures them): zq_exp 5e-7 relative; zq_gelu_erf 2.4e-6 and zq_gelu_tanh
 * 1e-5 absolute, exactly x and 0 beyond 6.0625; zq_silu 1e-6 relative. */
#ifndef ZQ_REF_MATH_H
#define ZQ_REF_MATH_H

#include "../zq.h"
#include "../zq_common.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* exp(t) = 2^n exp(r), n = rint(t / ln 2), r = t - n ln 2 in [-0.347, 0.347]. Adding ZQ_EXP_MAGIC to t / ln 2 rounds it
 * to an integer and leaves n + 126, the exponent field of 2^(n-1), in the low bits of the sum. The polynomial is
 * 2 exp(r), so n = -126 (t < -86.99) has the field 0 and gives 0: no subnormal is ever made. ln 2 is one float32: it is
 * off by 1.9e-9, and n times that, 2.4e-7 at the most, is the relative error this costs. */
#define ZQ_EXP_LO (-87.5f)
#define ZQ_EXP_LOG2E 1.44269504f
#define ZQ_EXP_MAGIC (12582912.0f + 126.0f)
#define ZQ_EXP_LN2 0.693147182f
/* Minimax for 2 exp(r), relative, degree 5, constant term pinned: exp(0) = 1 exactly. Lowest order first. */
static const float zq_exp_poly[6] = {2.0f,
                                     2 * 0.9999997019767761f,
                                     2 * 0.4999914765357971f,
                                     2 * 0.1666763871908188f,
                                     2 * 0.04189816117286682f,
                                     2 * 0.008290272206068039f};

/* silu(x) = x / (1 + exp(-x)), with n up to 129, whose exponent field is that of Inf: x / Inf is the lower tail. */
#define ZQ_SILU_LO (-89.5f)

/* gelu(x) = max(x, 0) - a Q(a), a = min(|x|, end), Q(a) = 1 - Phi(a) = erfc(a / sqrt 2) / 2 (with tanh: 1 / (1 + exp(2 z(a)))).
 * Q^(1/8) is nearly a straight line, so a polynomial r of degree 5 and three squarings do for Q what would take a polynomial
 * of degree 13. r is minimax for a r^8 with a zero at `end`, which is exact in float32: `end` has few bits and so has
 * r's value without the constant term, so nothing is rounded there, and the tails are exactly x and 0. */
typedef struct {
    float end, r[6]; /* lowest order first */
} zq_gelu;
static const zq_gelu zq_gelu_of_erf = {
    6.0625f,
    {0.9170160293579102f, -0.09157174825668335f, -0.03157050162553787f, -0.0012232360895723104f, 0.001977581065148115f,
     -0.00019541736401151866f}};
static const zq_gelu zq_gelu_of_tanh = {
    5.625f,
    {0.9169453382492065f, -0.09097495675086975f, -0.0331278070807457f, 0.0005411621532402933f, 0.0012696190970018506f,
     -0.0001286360202357173f}};

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

/* 2^(n-1) from what ZQ_EXP_MAGIC made of n. */
ZQ_INLINE float
zq_exp_power(float k)
{
    uint32_t bits;
    float power;
    memcpy(&bits, &k, sizeof bits);
    bits <<= 23;
    memcpy(&power, &bits, sizeof power);
    return power;
}

ZQ_INLINE float
zq_exp_2r(float r)
{
    float p = zq_exp_poly[5];
    for (int i = 4; i >= 0; i--) {
        p = fmaf(p, r, zq_exp_poly[i]);
    }
    return p;
}

/* exp(t) for t <= 88; exp(-Inf) = 0; NaN stays NaN. */
ZQ_INLINE float
zq_exp(float t)
{
    t = zq_maxf(ZQ_EXP_LO, t);
    const float k = fmaf(t, ZQ_EXP_LOG2E, ZQ_EXP_MAGIC);
    const float n = k - ZQ_EXP_MAGIC;
    return zq_exp_2r(fmaf(-n, ZQ_EXP_LN2, t)) * zq_exp_power(k);
}

/* The power of eight is split so that a is not waited for: a r^4 r^4. */
ZQ_INLINE float
zq_gelu1(float x, const zq_gelu *g)
{
    const float a = zq_minf(fabsf(x), g->end);
    float r = g->r[5];
    for (int i = 4; i >= 0; i--) {
        r = fmaf(r, a, g->r[i]);
    }
    const float r2 = r * r, r4 = r2 * r2;
    return fmaf(-(a * r4), r4, zq_maxf(x, 0.0f));
}

ZQ_INLINE float
zq_gelu_erf(float x)
{
    return zq_gelu1(x, &zq_gelu_of_erf);
}

ZQ_INLINE float
zq_gelu_tanh(float x)
{
    return zq_gelu1(x, &zq_gelu_of_tanh);
}

/* 1 + exp(-x) by the steps of zq_exp, but exp(-x) is 0 above 87 and Inf below -89. */
ZQ_INLINE float
zq_one_plus_exp(float x)
{
    const float c = zq_maxf(ZQ_SILU_LO, zq_minf(-ZQ_EXP_LO, x));
    const float k = fmaf(c, -ZQ_EXP_LOG2E, ZQ_EXP_MAGIC);
    const float n = k - ZQ_EXP_MAGIC;
    const float p = zq_exp_2r(fmaf(-n, ZQ_EXP_LN2, -c));
    return fmaf(p, zq_exp_power(k), 1.0f);
}

ZQ_INLINE float
zq_silu(float x)
{
    return x / zq_one_plus_exp(x);
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

/* ---- activations with their derivatives: for gradients ------------------------------------------------ */

/* gelu' = Phi + x phi, and the derivative of the polynomial above would be as rough as its error is wavy. So:
 * 1 - Phi(a) = phi(a) t (b_1 + b_2 t + ... + b_5 t^4), t = 1 / (1 + p a), a = |x| (Abramowitz and Stegun, 26.2.17), to 1e-7. */
#define ZQ_PHI_P 0.2316419f
#define ZQ_PHI_TOP 0.39894228f /* 1 / sqrt(2 pi) */
static const float zq_phi_poly[5] = {0.319381530f, -0.356563782f, 1.781477937f, -1.821255978f, 1.330274429f};
/* gelu_tanh(x) = x s, s = 1 / (1 + exp(-z)), z = 2 c x (1 + b x^2), z' = 2 c (1 + 3 b x^2). Beyond |x| = 20, s is 0 or 1. */
#define ZQ_TANH_2C 1.59576912f
#define ZQ_TANH_B 0.044715f
#define ZQ_TANH_3B 0.134145f
#define ZQ_TANH_SQUARE 400.0f

typedef struct {
    float value, slope;
} zq_slope;

ZQ_INLINE zq_slope
zq_slope_gelu_erf(float x)
{
    const float phi = zq_exp((x * -0.5f) * x) * ZQ_PHI_TOP, t = 1.0f / fmaf(ZQ_PHI_P, fabsf(x), 1.0f);
    float b = zq_phi_poly[4];
    for (int i = 3; i >= 0; i--) {
        b = fmaf(b, t, zq_phi_poly[i]);
    }
    const float q = phi * (t * b), whole = x < 0.0f ? q : 1.0f - q;
    return (zq_slope){x * whole, fmaf(x, phi, whole)};
}

ZQ_INLINE zq_slope
zq_slope_gelu_tanh(float x)
{
    const float u = zq_minf(x * x, ZQ_TANH_SQUARE), z = (x * ZQ_TANH_2C) * fmaf(ZQ_TANH_B, u, 1.0f);
    const float s = 1.0f / zq_one_plus_exp(z), value = x * s;
    return (zq_slope){value, fmaf(value * (1.0f - s), ZQ_TANH_2C * fmaf(ZQ_TANH_3B, u, 1.0f), s)};
}

ZQ_INLINE zq_slope
zq_slope_silu(float x)
{
    const float s = 1.0f / zq_one_plus_exp(x), value = x * s;
    return (zq_slope){value, fmaf(value, 1.0f - s, s)};
}

ZQ_INLINE zq_slope
zq_slope_of(float x, zq_activation act)
{
    switch (act) {
    case ZQ_ACT_RELU: return (zq_slope){zq_maxf(x, 0.0f), 0.0f < x ? 1.0f : 0.0f};
    case ZQ_ACT_GELU: return zq_slope_gelu_erf(x);
    case ZQ_ACT_GELU_TANH: return zq_slope_gelu_tanh(x);
    case ZQ_ACT_SILU: return zq_slope_silu(x);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return (zq_slope){x, 1.0f};
}

/* ---- row statistics: the scalar steps between the passes of LayerNorm and RMSNorm ------------------- */

/* A row whose sums overflow float32 is normalised after scaling by ZQ_SHRINK, which is exact and changes nothing else. So is a
 * row whose squares underflow, where no eps hides that, after scaling by ZQ_GROW. */
#define ZQ_SHRINK 0x1p-80f
#define ZQ_GROW 0x1p96f
#define ZQ_TINY 0x1p-100f /* var + eps: from here on what squares lose below 2^-149 is below rounding */
#define ZQ_TINY_MEAN 0x1p-30f /* elements of rows around larger means, unless equal, differ by enough as they are */

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

/* Neither overflow nor underflow in the squares of a row of that variance; NaN is not ordinary. */
ZQ_INLINE int
zq_is_ordinary(float var, float eps)
{
    return (var <= FLT_MAX) & (var + eps >= ZQ_TINY);
}

/* What a row of that mean and variance has to be scaled by before its squares can be summed; 1 nearly always. */
ZQ_INLINE float
zq_row_factor(float mean, float var, float eps)
{
    if (zq_is_ordinary(var, eps)) {
        return 1.0f;
    }
    return !zq_is_finite(var) ? ZQ_SHRINK : fabsf(mean) < ZQ_TINY_MEAN ? ZQ_GROW : 1.0f;
}

/* From sum x and sum x^2: E x^2 - (E x)^2. Returns 1 where the difference loses one bit at the most, that is (E x)^2 <= var,
 * and nothing overflows or underflows; else a second pass is needed. */
ZQ_INLINE int
zq_moments_in_one(float first, float second, int64_t n, float eps, zq_moments *m)
{
    const float mean = zq_mean(first, n), square = mean * mean;
    m->mean = mean;
    m->var = zq_mean(second, n) - square;
    return (square <= m->var) & zq_is_ordinary(m->var, eps);
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

/* ---- softmax: the scalar steps between its passes ------------------------------------------------------- */

/* The maximum is subtracted before exp, so that the largest term is 1. A row without a finite element has no maximum;
 * shifting it by 0 gives zeros for -Inf and shows +Inf and NaN in the sum. */
ZQ_INLINE float
zq_softmax_shift(float max)
{
    return max == -INFINITY ? 0.0f : max;
}

ZQ_INLINE float
zq_softmax_factor(float sum)
{
    return sum > 0.0f ? 1.0f / sum : 0.0f;
}

ZQ_INLINE int
zq_softmax_finite(float max, float sum)
{
    return max < INFINITY && sum <= FLT_MAX;
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
