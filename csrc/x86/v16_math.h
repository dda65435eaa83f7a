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
    ZQ_UNROLL(8)
    for (int i = 4; i >= 0; i--) {
        p = v16_fma(p, r, v16_set1(zq_exp_poly[i]));
    }
    return p;
}

#define EACH ZQ_UNROLL(4) for (int u = 0; u < ways; u++)

/* exp of `ways` <= 4 vectors in step: a chain of 45 cycles in 16 operations fills the scheduler before it fills the pipes. */
ZQ_INLINE void
v16_exps(v16 *t, const int ways)
{
    v16 k[4], r[4], p[4];
    EACH { t[u] = v16_max(v16_set1(ZQ_EXP_LO), t[u]); }
    EACH { k[u] = v16_fma(t[u], v16_set1(ZQ_EXP_LOG2E), v16_set1(ZQ_EXP_MAGIC)); }
    EACH { r[u] = v16_sub(k[u], v16_set1(ZQ_EXP_MAGIC)); }
    EACH { r[u] = v16_fnma(r[u], v16_set1(ZQ_EXP_LN2), t[u]); }
    EACH { p[u] = v16_set1(zq_exp_poly[5]); }
    ZQ_UNROLL(8)
    for (int i = 4; i >= 0; i--) {
        EACH { p[u] = v16_fma(p[u], r[u], v16_set1(zq_exp_poly[i])); }
    }
    EACH { t[u] = v16_mul(p[u], v16_exp_power(k[u])); }
}

/* GELU of `ways` vectors in step, as v16_exps. */
ZQ_INLINE void
v16_gelus(v16 *x, const zq_gelu *g, const int ways)
{
    v16 a[4], r[4], r4[4];
    EACH { a[u] = v16_abs_min(x[u], v16_set1(g->end)); }
    EACH { r[u] = v16_set1(g->r[5]); }
    ZQ_UNROLL(8)
    for (int i = 4; i >= 0; i--) {
        EACH { r[u] = v16_fma(r[u], a[u], v16_set1(g->r[i])); }
    }
    EACH { r[u] = v16_mul(r[u], r[u]); }
    EACH { r4[u] = v16_mul(r[u], r[u]); }
    EACH { a[u] = v16_mul(a[u], r4[u]); }
    EACH { x[u] = v16_fnma(a[u], r4[u], v16_max(x[u], v16_zero())); }
}

ZQ_INLINE v16
v16_gelu(v16 x, const zq_gelu *g)
{
    v16_gelus(&x, g, 1);
    return x;
}

ZQ_INLINE v16
v16_one_plus_exp(v16 x)
{
    const v16 c = v16_max(v16_set1(ZQ_SILU_LO), v16_min(v16_set1(-ZQ_EXP_LO), x));
    const v16 k = v16_fma(c, v16_set1(-ZQ_EXP_LOG2E), v16_set1(ZQ_EXP_MAGIC));
    const v16 n = v16_sub(k, v16_set1(ZQ_EXP_MAGIC));
    const v16 p = v16_exp_2r(v16_fnms(n, v16_set1(ZQ_EXP_LN2), c));
    return v16_fma(p, v16_exp_power(k), v16_set1(1.0f));
}

ZQ_INLINE v16
v16_silu(v16 x)
{
    return v16_div(x, v16_one_plus_exp(x));
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

/* x = act(x), `ways` vectors in step where act is a long chain. */
ZQ_INLINE void
v16_activates(v16 *x, zq_activation act, const int ways)
{
    switch (act) {
    case ZQ_ACT_GELU: v16_gelus(x, &zq_gelu_of_erf, ways); break;
    case ZQ_ACT_GELU_TANH: v16_gelus(x, &zq_gelu_of_tanh, ways); break;
    case ZQ_ACT_RELU:
    case ZQ_ACT_SILU:
    case ZQ_ACT_NONE:
    case ZQ_ACTS:
        EACH { x[u] = v16_activate(x[u], act); }
    }
}
#undef EACH

typedef struct {
    v16 value, slope;
} v16_slope;

ZQ_INLINE v16_slope
v16_slope_gelu_erf(v16 x)
{
    const v16 one = v16_set1(1.0f);
    v16 phi = v16_mul(v16_mul(x, v16_set1(-0.5f)), x), b = v16_set1(zq_phi_poly[4]);
    v16_exps(&phi, 1);
    phi = v16_mul(phi, v16_set1(ZQ_PHI_TOP));
    const v16 t = v16_div(one, v16_fma(v16_set1(ZQ_PHI_P), v16_abs(x), one));
    ZQ_UNROLL(8)
    for (int i = 3; i >= 0; i--) {
        b = v16_fma(b, t, v16_set1(zq_phi_poly[i]));
    }
    const v16 q = v16_mul(phi, v16_mul(t, b)), whole = v16_select_lt(x, v16_zero(), q, v16_sub(one, q));
    return (v16_slope){v16_mul(x, whole), v16_fma(x, phi, whole)};
}

ZQ_INLINE v16_slope
v16_slope_gelu_tanh(v16 x)
{
    const v16 one = v16_set1(1.0f), u = v16_min(v16_mul(x, x), v16_set1(ZQ_TANH_SQUARE));
    const v16 z = v16_mul(v16_mul(x, v16_set1(ZQ_TANH_2C)), v16_fma(v16_set1(ZQ_TANH_B), u, one));
    const v16 s = v16_div(one, v16_one_plus_exp(z)), value = v16_mul(x, s);
    const v16 dz = v16_mul(v16_set1(ZQ_TANH_2C), v16_fma(v16_set1(ZQ_TANH_3B), u, one));
    return (v16_slope){value, v16_fma(v16_mul(value, v16_sub(one, s)), dz, s)};
}

ZQ_INLINE v16_slope
v16_slope_silu(v16 x)
{
    const v16 one = v16_set1(1.0f), s = v16_div(one, v16_one_plus_exp(x)), value = v16_mul(x, s);
    return (v16_slope){value, v16_fma(value, v16_sub(one, s), s)};
}

ZQ_INLINE v16_slope
v16_slope_of(v16 x, zq_activation act)
{
    switch (act) {
    case ZQ_ACT_RELU: return (v16_slope){v16_relu(x), v16_select_lt(v16_zero(), x, v16_set1(1.0f), v16_zero())};
    case ZQ_ACT_GELU: return v16_slope_gelu_erf(x);
    case ZQ_ACT_GELU_TANH: return v16_slope_gelu_tanh(x);
    case ZQ_ACT_SILU: return v16_slope_silu(x);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return (v16_slope){x, v16_set1(1.0f)};
}
