/* exp, GELU and SiLU on sixteen lanes: ref/math.h operation by operation, which has the equations and error bounds.
 * Include after v16_avx2.h or v16_avx512.h, inside the target region. */
#include "../ref/math.h"

ZQ_INLINE v16
v16_exp(v16 t)
{
    t = v16_max(v16_set1(ZQ_EXP_LO), v16_min(v16_set1(ZQ_EXP_HI), t));
    const v16 k = v16_fma(t, v16_set1(ZQ_EXP_LOG2E), v16_set1(ZQ_EXP_MAGIC));
    const v16 n = v16_sub(k, v16_set1(ZQ_EXP_MAGIC));
    const v16 r = v16_fnma(n, v16_set1(ZQ_EXP_LN2_LO), v16_fnma(n, v16_set1(ZQ_EXP_LN2_HI), t));
    v16 p = v16_set1(zq_exp_poly[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; i--) {
        p = v16_fma(p, r, v16_set1(zq_exp_poly[i]));
    }
    return v16_mul(p, v16_from_bits(v16i_shl(v16_bits(k), 23)));
}

ZQ_INLINE v16
v16_gelu_erf(v16 x)
{
    const v16 a = v16_min(v16_abs(x), v16_set1(ZQ_GELU_END));
    const v16 u = v16_fma(a, v16_set1(ZQ_GELU_SCALE), v16_set1(-1.0f));
    v16 q = v16_set1(zq_gelu_poly[13]);
#pragma GCC unroll 16
    for (int i = 12; i >= 0; i--) {
        q = v16_fma(q, u, v16_set1(zq_gelu_poly[i]));
    }
    return v16_fnma(a, v16_max(q, v16_zero()), v16_max(x, v16_zero()));
}

ZQ_INLINE v16
v16_times_sigmoid(v16 x, v16 z)
{
    const v16 one = v16_set1(1.0f), e = v16_exp(v16_sub(v16_zero(), v16_abs(z)));
    return v16_mul(x, v16_div(v16_select_lt(z, v16_zero(), e, one), v16_add(one, e)));
}

ZQ_INLINE v16
v16_silu(v16 x)
{
    return v16_times_sigmoid(x, x);
}

ZQ_INLINE v16
v16_gelu_tanh(v16 x)
{
    return v16_times_sigmoid(
        x, v16_mul(x, v16_fma(v16_mul(x, x), v16_set1(ZQ_GELU_TANH_C3), v16_set1(ZQ_GELU_TANH_C1))));
}

ZQ_INLINE v16
v16_relu(v16 x)
{
    return v16_max(x, v16_zero());
}

ZQ_INLINE v16
v16_activate(v16 x, zq_activation act)
{
    switch (act) {
    case ZQ_ACT_RELU: return v16_relu(x);
    case ZQ_ACT_GELU: return v16_gelu_erf(x);
    case ZQ_ACT_GELU_TANH: return v16_gelu_tanh(x);
    case ZQ_ACT_SILU: return v16_silu(x);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return x;
}
