/* Scalars of attention.
 *
 * 2^t for its softmax, t <= 0 (NaN stays NaN): the scalar truth, and the coefficients that x86/attention.inc.h
 * shares. n = rint(t), r = t - n in [-1/2, 1/2] is exact, and a polynomial has 2^r, its constant term pinned so that
 * t = 0 gives exactly 1 (or the code 255). Adding the magic number rounds t to n and leaves n + 126 (or n + 127), the
 * exponent field of 2^(n-1) (2^n), in the low bits of the sum. */
#ifndef ZQ_REF_ATTENTION_H
#define ZQ_REF_ATTENTION_H

#include "math.h"

#define ZQ_LOG2E 1.44269504f

/* Relative error 1.8e-7 (tests/test_attention.py). The polynomial is 2^(r+1): the field 0 of n = -126 gives 0. */
#define ZQ_EXP2_LO (-126.0f)
#define ZQ_EXP2_MAGIC (12582912.0f + 126.0f)
static const float zq_exp2_poly[6] = {2.0f, 2 * 0.6931470036506653f, 2 * 0.24022242426872253f, 2 * 0.05550733581185341f,
                                      2 * 0.009671512991189957f, 2 * 0.001326472731307149f};

/* rint(255 * 2^t) where 2^t has a relative error of 1e-4; 0 from t = -9 on. Adding 3 * 2^22 rounds and leaves the code in
 * the low byte of the sum, so no conversion is needed (and none can overflow). */
#define ZQ_CODE_LO (-20.0f)
#define ZQ_CODE_MAGIC (12582912.0f + 127.0f)
#define ZQ_CODE_ROUND 12582912.0f
static const float zq_code_poly[4] = {255.0f, 255 * 0.6932829022407532f, 255 * 0.24221095442771912f,
                                      255 * 0.05500893294811249f};

ZQ_INLINE uint32_t
zq_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ZQ_INLINE float
zq_power_of_field(float k)
{
    const uint32_t bits = zq_bits(k) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

ZQ_INLINE float
zq_exp2(float t)
{
    t = zq_maxf(ZQ_EXP2_LO, t);
    const float k = t + ZQ_EXP2_MAGIC, r = t - (k - ZQ_EXP2_MAGIC);
    float p = zq_exp2_poly[5];
    for (int i = 4; i >= 0; i--) {
        p = fmaf(p, r, zq_exp2_poly[i]);
    }
    return p * zq_power_of_field(k);
}

/* A float32 whose bits are those of ZQ_CODE_ROUND plus the code. */
ZQ_INLINE float
zq_exp2_code(float t)
{
    t = zq_maxf(ZQ_CODE_LO, t);
    const float k = t + ZQ_CODE_MAGIC, r = t - (k - ZQ_CODE_MAGIC);
    float p = zq_code_poly[3];
    for (int i = 2; i >= 0; i--) {
        p = fmaf(p, r, zq_code_poly[i]);
    }
    return fmaf(p, zq_power_of_field(k), ZQ_CODE_ROUND);
}

/* Symmetric codes: x = scale * code, |code| <= 127. What is smaller than a normal number times 127 has codes 0. Returns
 * the factor of x; NaN or Inf show in the scale. (Unlike zq_absmax_scale: where 127 scale is Inf, so is the result, which is
 * reported.) */
ZQ_INLINE float
zq_code_scale(float absmax, float *scale)
{
    const int none = absmax < 127.0f * FLT_MIN;
    *scale = none ? 1.0f : absmax / 127.0f;
    return none ? 0.0f : 127.0f / absmax;
}

/* rint(x), |x| < 2^21; anything else gives some number. */
ZQ_INLINE int32_t
zq_small_rint(float x)
{
    return (int32_t)(zq_bits(x + ZQ_CODE_ROUND) - zq_bits(ZQ_CODE_ROUND));
}

#endif
