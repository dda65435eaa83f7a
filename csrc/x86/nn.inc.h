/* Transformer operators on rows, on v16: what ref/nn.c does, sixteen lanes at a time. Included by nn_avx2.c and
 * nn_avx512.c after v16_*.h and v16_math.h. */

/* Lane numbers, to cut a vector at a row's end. */
static const float lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Lanes n.. of x replaced by those of other. */
ZQ_INLINE v16
keep(v16 x, int64_t n, v16 other)
{
    return v16_select_lt(v16_load(lane_numbers), v16_set1((float)n), x, other);
}

ZQ_INLINE float
sum4(const v16 *s)
{
    return v16_hsum(v16_add(v16_add(s[0], s[1]), v16_add(s[2], s[3])));
}

/* In every row function: whole blocks of 64 elements, vector j of a block into partial sum j; then up to four
 * vectors of the last block, the last one cut. */
#define FOUR _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)

/* y = x (+ residual), and its sum. */
ZQ_INLINE float
load_sum(const float *x, const float *residual, int64_t n, float *y)
{
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR {
            v16 h = v16_load(x + i + 16 * j);
            h = residual ? v16_add(h, v16_load(residual + i + 16 * j)) : h;
            v16_store(y + i + 16 * j, h);
            s[j] = v16_add(s[j], h);
        }
    }
    FOUR {
        const int64_t at = i + 16 * j, m = zq_min(n - at, 16);
        if (m > 0) {
            v16 h = v16_loadn(x + at, m);
            h = residual ? v16_add(h, v16_loadn(residual + at, m)) : h;
            v16_storen(y + at, h, m);
            s[j] = v16_add(s[j], h);
        }
    }
    return sum4(s);
}

/* sum (x - mean), sum (x - mean)^2 */
ZQ_INLINE void
row_moments(const float *x, int64_t n, float mean, float *first, float *second)
{
    v16 s1[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()}, s2[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    const v16 mu = v16_set1(mean);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR {
            const v16 d = v16_sub(v16_load(x + i + 16 * j), mu);
            s1[j] = v16_add(s1[j], d);
            s2[j] = v16_fma(d, d, s2[j]);
        }
    }
    FOUR {
        const int64_t at = i + 16 * j, m = zq_min(n - at, 16);
        if (m > 0) {
            const v16 d = keep(v16_sub(v16_loadn(x + at, m), mu), m, v16_zero());
            s1[j] = v16_add(s1[j], d);
            s2[j] = v16_fma(d, d, s2[j]);
        }
    }
    *first = sum4(s1);
    *second = sum4(s2);
}

/* y = x * s: the definition of a loop over a row without sums. */
static void
scale_f32(const float *x, int64_t n, float s, float *y)
{
    const v16 f = v16_set1(s);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16_store(y + i, v16_mul(v16_load(x + i), f));
    }
    if (i < n) {
        v16_storen(y + i, v16_mul(v16_loadn(x + i, n - i), f), n - i);
    }
}

static int
layernorm_f32(const float *x, const float *residual, const float *gamma, const float *beta, int64_t n, float eps, float *y)
{
    float mean = zq_mean(residual ? load_sum(x, residual, n, y) : load_sum(x, NULL, n, y), n), first, second;
    row_moments(y, n, mean, &first, &second);
    zq_moments s = zq_moments_of(mean, first, second, n);
    if (!zq_is_finite(s.var)) {
        scale_f32(y, n, ZQ_SHRINK, y);
        eps *= ZQ_SHRINK * ZQ_SHRINK;
        mean = zq_mean(load_sum(y, NULL, n, y), n);
        row_moments(y, n, mean, &first, &second);
        s = zq_moments_of(mean, first, second, n);
    }
    const v16 mu = v16_set1(s.mean), inv = v16_set1(zq_rsqrt(s.var, eps));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 h = v16_mul(v16_sub(v16_load(y + i), mu), inv);
        v16_store(y + i, v16_fma(h, v16_load(gamma + i), v16_load(beta + i)));
    }
    if (i < n) {
        const int64_t m = n - i;
        const v16 h = v16_mul(v16_sub(v16_loadn(y + i, m), mu), inv);
        v16_storen(y + i, v16_fma(h, v16_loadn(gamma + i, m), v16_loadn(beta + i, m)), m);
    }
    return zq_is_finite(s.var);
}

static int
rmsnorm_f32(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y)
{
    float unused, second;
    (void)load_sum(x, residual, n, y);
    row_moments(y, n, 0.0f, &unused, &second);
    if (!zq_is_finite(second)) {
        scale_f32(y, n, ZQ_SHRINK, y);
        eps *= ZQ_SHRINK * ZQ_SHRINK;
        row_moments(y, n, 0.0f, &unused, &second);
    }
    const v16 inv = v16_set1(zq_rsqrt(zq_mean(second, n), eps));
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16_store(y + i, v16_mul(v16_mul(v16_load(y + i), inv), v16_load(gamma + i)));
    }
    if (i < n) {
        const int64_t m = n - i;
        v16_storen(y + i, v16_mul(v16_mul(v16_loadn(y + i, m), inv), v16_loadn(gamma + i, m)), m);
    }
    return zq_is_finite(second);
}

/* act(x), or act(x) * up. `act` is a constant in every call, so each gets a loop of its own. */
ZQ_INLINE void
activation_loop(const float *x, const float *up, int64_t n, zq_activation act, float *y)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 a = v16_activate(v16_load(x + i), act);
        v16_store(y + i, up ? v16_mul(a, v16_load(up + i)) : a);
    }
    if (i < n) {
        const int64_t m = n - i;
        const v16 a = v16_activate(v16_loadn(x + i, m), act);
        v16_storen(y + i, up ? v16_mul(a, v16_loadn(up + i, m)) : a, m);
    }
}

static void
activation_f32(const float *x, int64_t n, zq_activation act, float *y)
{
    switch (act) {
    case ZQ_ACT_RELU: activation_loop(x, NULL, n, ZQ_ACT_RELU, y); break;
    case ZQ_ACT_GELU: activation_loop(x, NULL, n, ZQ_ACT_GELU, y); break;
    case ZQ_ACT_GELU_TANH: activation_loop(x, NULL, n, ZQ_ACT_GELU_TANH, y); break;
    case ZQ_ACT_SILU: activation_loop(x, NULL, n, ZQ_ACT_SILU, y); break;
    case ZQ_ACT_NONE:
    case ZQ_ACTS: activation_loop(x, NULL, n, ZQ_ACT_NONE, y); break;
    }
}

static void
gated_f32(const float *gate, const float *up, int64_t n, zq_activation act, float *y)
{
    switch (act) {
    case ZQ_ACT_RELU: activation_loop(gate, up, n, ZQ_ACT_RELU, y); break;
    case ZQ_ACT_GELU: activation_loop(gate, up, n, ZQ_ACT_GELU, y); break;
    case ZQ_ACT_GELU_TANH: activation_loop(gate, up, n, ZQ_ACT_GELU_TANH, y); break;
    case ZQ_ACT_SILU: activation_loop(gate, up, n, ZQ_ACT_SILU, y); break;
    case ZQ_ACT_NONE:
    case ZQ_ACTS: activation_loop(gate, up, n, ZQ_ACT_NONE, y); break;
    }
}

static float
max_f32(const float *x, int64_t n)
{
    const v16 low = v16_set1(-INFINITY);
    v16 s[4] = {low, low, low, low};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR {
            s[j] = v16_max(s[j], v16_load(x + i + 16 * j));
        }
    }
    FOUR {
        const int64_t at = i + 16 * j, m = zq_min(n - at, 16);
        if (m > 0) {
            /* -Inf in the cut lanes; s on the left, as in the scalar code, decides between equal zeros */
            s[j] = keep(v16_max(s[j], v16_loadn(x + at, m)), m, s[j]);
        }
    }
    return v16_hmax(v16_max(v16_max(s[0], s[1]), v16_max(s[2], s[3])));
}

static float
exp_sum_f32(const float *x, int64_t n, float scale, float shift, float *y)
{
    const v16 f = v16_set1(scale), minus = v16_set1(-shift);
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR {
            const v16 e = v16_exp(v16_fma(v16_load(x + i + 16 * j), f, minus));
            v16_store(y + i + 16 * j, e);
            s[j] = v16_add(s[j], e);
        }
    }
    FOUR {
        const int64_t at = i + 16 * j, m = zq_min(n - at, 16);
        if (m > 0) {
            const v16 e = keep(v16_exp(v16_fma(v16_loadn(x + at, m), f, minus)), m, v16_zero());
            v16_storen(y + at, e, m);
            s[j] = v16_add(s[j], e);
        }
    }
    return sum4(s);
}

/* One head, a and b half a head apart. */
ZQ_INLINE void
rotate_halves(const float *x, int64_t half, const float *cos, const float *sin, float *y)
{
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const v16 a = v16_load(x + i), b = v16_load(x + half + i), c = v16_load(cos + i), s = v16_load(sin + i);
        v16_store(y + i, v16_fnma(b, s, v16_mul(a, c)));
        v16_store(y + half + i, v16_fma(a, s, v16_mul(b, c)));
    }
    if (i < half) {
        const int64_t m = half - i;
        const v16 a = v16_loadn(x + i, m), b = v16_loadn(x + half + i, m), c = v16_loadn(cos + i, m), s = v16_loadn(sin + i, m);
        v16_storen(y + i, v16_fnma(b, s, v16_mul(a, c)), m);
        v16_storen(y + half + i, v16_fma(a, s, v16_mul(b, c)), m);
    }
}

static void
rotary_f32(const float *x, int64_t heads, int64_t head_dim, int64_t half, int interleaved, const float *cos, const float *sin,
           float *y)
{
    for (int64_t h = 0; h < heads; h++, x += head_dim, y += head_dim) {
        if (interleaved) {
            zq_rotate_pairs(x, half, cos, sin, y);
        }
        else {
            rotate_halves(x, half, cos, sin, y);
        }
        for (int64_t i = 2 * half; x != y && i < head_dim; i++) {
            y[i] = x[i];
        }
    }
}

static void
fill(zq_kernels *t)
{
    t->layernorm_f32 = layernorm_f32;
    t->rmsnorm_f32 = rmsnorm_f32;
    t->activation_f32 = activation_f32;
    t->gated_f32 = gated_f32;
    t->max_f32 = max_f32;
    t->exp_sum_f32 = exp_sum_f32;
    t->scale_f32 = scale_f32;
    t->rotary_f32 = rotary_f32;
}
