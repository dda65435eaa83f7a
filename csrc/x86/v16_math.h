/* exp, GELU and SiLU on sixteen lanes: ref/math.h operation by operation, which has the equations and error bounds.
 * Include after v16_avx2.h or v16_avx512.h, inside the target region. */
#include "../ref/math.h"

ZQ_INLINE v16
v16_exp_power(v16 k)
{
    return v16_from_bits(v16i_shl(v16_bits(k), 23));
}

ZQ_INLINE v16
v16_exp_2r(v16 r)
{
    v16 p = v16_set1(zq_exp_poly[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; i--) {
        p = v16_fma(p, r, v16_set1(zq_exp_poly[i]));
    }
    return p;
}

/* exp of `ways` vectors in step: a chain of 45 cycles in 16 operations fills the scheduler before it fills the pipes. */
ZQ_INLINE void
v16_exps(v16 *t, const int ways)
{
#define EACH _Pragma("GCC unroll 4") for (int u = 0; u < ways; u++)
    v16 k[4], r[4], p[4];
    EACH { t[u] = v16_max(v16_set1(ZQ_EXP_LO), t[u]); }
    EACH { k[u] = v16_fma(t[u], v16_set1(ZQ_EXP_LOG2E), v16_set1(ZQ_EXP_MAGIC)); }
    EACH { r[u] = v16_sub(k[u], v16_set1(ZQ_EXP_MAGIC)); }
    EACH { r[u] = v16_fnma(r[u], v16_set1(ZQ_EXP_LN2), t[u]); }
    EACH { p[u] = v16_set1(zq_exp_poly[5]); }
#pragma GCC unroll 8
    for (int i = 4; i >= 0; i--) {
        EACH { p[u] = v16_fma(p[u], r[u], v16_set1(zq_exp_poly[i])); }
    }
    EACH { t[u] = v16_mul(p[u], v16_exp_power(k[u])); }
#undef EACH
}

ZQ_INLINE v16
v16_gelu(v16 x, const zq_gelu *g)
{
    const v16 a = v16_abs_min(x, v16_set1(g->end));
    v16 r = v16_set1(g->r[5]);
#pragma GCC unroll 8
    for (int i = 4; i >= 0; i--) {
        r = v16_fma(r, a, v16_set1(g->r[i]));
    }
    const v16 r2 = v16_mul(r, r), r4 = v16_mul(r2, r2);
    return v16_fnma(v16_mul(a, r4), r4, v16_max(x, v16_zero()));
}

ZQ_INLINE v16
v16_silu(v16 x)
{
    const v16 c = v16_max(v16_set1(ZQ_SILU_LO), v16_min(v16_set1(-ZQ_EXP_LO), x));
    const v16 k = v16_fma(c, v16_set1(-ZQ_EXP_LOG2E), v16_set1(ZQ_EXP_MAGIC));
    const v16 n = v16_sub(k, v16_set1(ZQ_EXP_MAGIC));
    const v16 p = v16_exp_2r(v16_fnms(n, v16_set1(ZQ_EXP_LN2), c));
    return v16_div(x, v16_fma(p, v16_exp_power(k), v16_set1(1.0f)));
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
    case ZQ_ACT_GELU: return v16_gelu(x, &zq_gelu_of_erf);
    case ZQ_ACT_GELU_TANH: return v16_gelu(x, &zq_gelu_of_tanh);
    case ZQ_ACT_SILU: return v16_silu(x);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return x;
}
