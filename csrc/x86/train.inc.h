/* Gradients of row operators, the loss and AdamW, on v16: what ref/train.c does. Included by nn_avx2.c and nn_avx512.c after
 * nn.inc.h, whose passes over a row these follow. */

/* STEP(vector of a block, first element, elements) over a row in the order of the sixty-four partial sums. */
#define OVER_BLOCKS(STEP)                                             \
    do {                                                              \
        int64_t i_ = 0;                                               \
        for (; i_ + 64 <= n; i_ += 64) {                              \
            FOUR { STEP(j, i_ + 16 * j, 16); }                        \
        }                                                             \
        FOUR {                                                        \
            const int64_t at_ = i_ + 16 * j, m_ = zq_min(n - at_, 16); \
            if (m_ > 0) {                                             \
                STEP(j, at_, m_);                                     \
            }                                                         \
        }                                                             \
    } while (0)

/* Mean, and 1 / sqrt(var + eps) as var. */
ZQ_INLINE zq_moments
row_norm(const zq_norm_grad *g)
{
    if (!g->centred) {
        return (zq_moments){0.0f, zq_rsqrt(zq_mean(v16_hsum(load_squares(g->x, NULL, g->n, NULL)), g->n), g->eps)};
    }
    const zq_moments m = corrected_moments(g->x, g->n, zq_mean(v16_hsum(load_sum(g->x, g->n)), g->n));
    return (zq_moments){m.mean, zq_rsqrt(m.var, g->eps)};
}

ZQ_INLINE void
norm_grad_apply(const zq_norm_grad *g, zq_moments s, float mean, float slope, const int centred, const int add)
{
    const v16 mu = v16_set1(s.mean), inv = v16_set1(s.var), a = v16_set1(mean), b = v16_set1(slope);
    for (int64_t i = 0; i < g->n; i += 16) {
        const int64_t m = zq_min(g->n - i, 16);
        const v16 n = v16_mul(v16_sub(load16(g->x + i, m), mu), inv), dy = load16(g->dy + i, m);
        store16(g->dgamma + i, v16_fma(dy, n, load16(g->dgamma + i, m)), m);
        if (centred) {
            store16(g->dbeta + i, v16_add(load16(g->dbeta + i, m), dy), m);
        }
        const v16 d = v16_fnma(n, b, v16_sub(v16_mul(dy, load16(g->gamma + i, m)), a));
        store16(g->dx + i, v16_fma(d, inv, add ? load16(g->add + i, m) : v16_zero()), m);
    }
}

static void
norm_grad_f32(const zq_norm_grad *g)
{
    const zq_moments s = row_norm(g);
    const v16 mu = v16_set1(s.mean), inv = v16_set1(s.var);
    v16 s1[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()}, s2[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    const int64_t n = g->n;
#define STEP(j, i, m)                                                                       \
    do {                                                                                    \
        const v16 d = v16_mul(load16(g->dy + (i), m), load16(g->gamma + (i), m));           \
        s1[j] = v16_add(s1[j], d);                                                          \
        s2[j] = v16_fma(d, v16_mul(v16_sub(load16(g->x + (i), m), mu), inv), s2[j]);        \
    } while (0)
    OVER_BLOCKS(STEP);
#undef STEP
    const float mean = g->centred ? zq_mean(v16_hsum(sum4(s1)), n) : 0.0f, slope = zq_mean(v16_hsum(sum4(s2)), n);
    if (g->centred) {
        g->add ? norm_grad_apply(g, s, mean, slope, 1, 1) : norm_grad_apply(g, s, mean, slope, 1, 0);
    }
    else {
        g->add ? norm_grad_apply(g, s, mean, slope, 0, 1) : norm_grad_apply(g, s, mean, slope, 0, 0);
    }
}

ZQ_INLINE void
activation_grad_loop(const float *x, const float *up, const float *dy, int64_t n, float *dx, float *dup,
                     const zq_activation act)
{
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t m = zq_min(n - i, 16);
        const v16_slope s = v16_slope_of(load16(x + i, m), act);
        v16 d = load16(dy + i, m);
        if (up) {
            const v16 value = v16_mul(d, s.value);
            d = v16_mul(d, load16(up + i, m));
            store16(dup + i, value, m);
        }
        store16(dx + i, v16_mul(d, s.slope), m);
    }
}

static void
activation_grad_f32(const float *x, const float *up, const float *dy, int64_t n, zq_activation act, float *dx, float *dup)
{
    switch (act) {
    case ZQ_ACT_RELU: activation_grad_loop(x, up, dy, n, dx, dup, ZQ_ACT_RELU); return;
    case ZQ_ACT_GELU: activation_grad_loop(x, up, dy, n, dx, dup, ZQ_ACT_GELU); return;
    case ZQ_ACT_GELU_TANH: activation_grad_loop(x, up, dy, n, dx, dup, ZQ_ACT_GELU_TANH); return;
    case ZQ_ACT_SILU: activation_grad_loop(x, up, dy, n, dx, dup, ZQ_ACT_SILU); return;
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    activation_grad_loop(x, up, dy, n, dx, dup, ZQ_ACT_NONE);
}

static void
softmax_grad_f32(const float *p, int64_t n, float *dp)
{
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
#define STEP(j, i, m) s[j] = v16_fma(load16(p + (i), m), load16(dp + (i), m), s[j])
    OVER_BLOCKS(STEP);
#undef STEP
    const v16 sum = v16_set1(v16_hsum(sum4(s)));
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t m = zq_min(n - i, 16);
        store16(dp + i, v16_mul(load16(p + i, m), v16_sub(load16(dp + i, m), sum)), m);
    }
}

static float
sum_f32(const float *x, int64_t n)
{
    return v16_hsum(load_sum(x, n));
}

static float
square_loss_f32(const float *y, const float *target, int64_t n, float factor, float *dy)
{
    const v16 f = v16_set1(factor);
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
#define STEP(j, i, m)                                                           \
    do {                                                                        \
        const v16 d = v16_sub(load16(y + (i), m), load16(target + (i), m));     \
        s[j] = v16_fma(d, d, s[j]);                                             \
        store16(dy + (i), v16_mul(d, f), m);                                    \
    } while (0)
    OVER_BLOCKS(STEP);
#undef STEP
    return v16_hsum(sum4(s));
}

static void
adamw_f32(const zq_adamw *c, const float *g, int64_t n, float *w, float *m, float *v)
{
    const v16 beta1 = v16_set1(c->beta1), beta2 = v16_set1(c->beta2), gain1 = v16_set1(c->gain1), gain2 = v16_set1(c->gain2);
    const v16 keep = v16_set1(c->keep), step = v16_set1(c->step), root = v16_set1(c->root), eps = v16_set1(c->eps);
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t left = zq_min(n - i, 16);
        const v16 d = load16(g + i, left);
        const v16 first = v16_fma(beta1, load16(m + i, left), v16_mul(gain1, d));
        const v16 second = v16_fma(beta2, load16(v + i, left), v16_mul(v16_mul(gain2, d), d));
        const v16 ratio = v16_div(first, v16_fma(root, v16_sqrt(second), eps));
        store16(m + i, first, left);
        store16(v + i, second, left);
        store16(w + i, v16_fnma(step, ratio, v16_mul(keep, load16(w + i, left))), left);
    }
}

static void
fill_train(zq_kernels *t)
{
    t->norm_grad_f32 = norm_grad_f32;
    t->activation_grad_f32 = activation_grad_f32;
    t->softmax_grad_f32 = softmax_grad_f32;
    t->sum_f32 = sum_f32;
    t->square_loss_f32 = square_loss_f32;
    t->adamw_f32 = adamw_f32;
}
