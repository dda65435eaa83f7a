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

ZQ_INLINE v16
load16(const float *p, int64_t m)
{
    return m >= 16 ? v16_load(p) : v16_loadn(p, m);
}

ZQ_INLINE void
store16(float *p, v16 x, int64_t m)
{
    if (m >= 16) {
        v16_store(p, x);
    }
    else {
        v16_storen(p, x, m);
    }
}

/* The range of what is stored, and the largest bit pattern without sign of what has to be finite. Exact minima and maxima
 * depend on no order, so a level takes as many ways as it has registers for. x and a zero of the other sign stand first,
 * so that the accumulator stays. */
typedef struct {
    v16 lo[RANGE_WAYS], hi[RANGE_WAYS];
    v16i top[RANGE_WAYS];
} ranges;

ZQ_INLINE ranges
ranges_start(void)
{
    ranges r;
    for (int w = 0; w < RANGE_WAYS; w++) {
        r.lo[w] = r.hi[w] = v16_zero();
        r.top[w] = v16i_zero();
    }
    return r;
}

ZQ_INLINE void
see_range(ranges *r, int w, v16 y)
{
    r->lo[w] = v16_min(y, r->lo[w]);
    r->hi[w] = v16_max(y, r->hi[w]);
}

ZQ_INLINE void
see_finite(ranges *r, int w, v16 x)
{
    r->top[w] = v16i_max(r->top[w], v16i_and(v16_bits(x), v16i_set1(0x7fffffff)));
}

ZQ_INLINE int
ranges_finite(const ranges *r)
{
    return v16i_hmax(v16i_max(r->top[0], r->top[RANGE_WAYS - 1])) < 0x7f800000;
}

/* 0 where an end is infinite. */
ZQ_INLINE int
ranges_end(const ranges *r, zq_range *range)
{
    range->lo = v16_hmin(v16_min(r->lo[0], r->lo[RANGE_WAYS - 1]));
    range->hi = v16_hmax(v16_max(r->hi[0], r->hi[RANGE_WAYS - 1]));
    return zq_is_finite(range->lo) && zq_is_finite(range->hi);
}

/* STEP(first element, elements, way) over a row: vectors in turn to each way, then single ones, then the cut one. */
#define OVER_ROW(STEP)                                                        \
    do {                                                                      \
        int64_t i_ = 0;                                                       \
        for (; i_ + 16 * RANGE_WAYS <= n; i_ += 16 * RANGE_WAYS) {            \
            STEP(i_, 16, 0);                                                  \
            if (RANGE_WAYS == 2) {                                            \
                STEP(i_ + 16, 16, RANGE_WAYS - 1);                            \
            }                                                                 \
        }                                                                     \
        if (i_ + 16 <= n) {                                                   \
            STEP(i_, 16, 0);                                                  \
            i_ += 16;                                                         \
        }                                                                     \
        if (i_ < n) {                                                         \
            STEP(i_, n - i_, 0);                                              \
        }                                                                     \
    } while (0)

/* The sum of x (+ residual), which goes to y; without a residual nothing is stored. */
ZQ_INLINE float
load_sum(const float *x, const float *residual, int64_t n, float *y)
{
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR {
            v16 h = v16_load(x + i + 16 * j);
            if (residual) {
                h = v16_add(h, v16_load(residual + i + 16 * j));
                v16_store(y + i + 16 * j, h);
            }
            s[j] = v16_add(s[j], h);
        }
    }
    FOUR {
        const int64_t at = i + 16 * j, m = zq_min(n - at, 16);
        if (m > 0) {
            v16 h = v16_loadn(x + at, m);
            if (residual) {
                h = v16_add(h, v16_loadn(residual + at, m));
                v16_storen(y + at, h, m);
            }
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

/* residual and range are NULL, or not, by a constant of each call: a loop without what is not wanted. */
ZQ_INLINE int
layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t n, float eps, float *y,
          zq_range *range)
{
    const float *row = residual ? y : x;
    float mean = zq_mean(load_sum(x, residual, n, y), n), first, second;
    row_moments(row, n, mean, &first, &second);
    zq_moments s = zq_moments_of(mean, first, second, n);
    if (!zq_is_finite(s.var)) {
        scale_f32(row, n, ZQ_SHRINK, y);
        row = y;
        eps *= ZQ_SHRINK * ZQ_SHRINK;
        mean = zq_mean(load_sum(row, NULL, n, NULL), n);
        row_moments(row, n, mean, &first, &second);
        s = zq_moments_of(mean, first, second, n);
    }
    const v16 mu = v16_set1(s.mean), inv = v16_set1(zq_rsqrt(s.var, eps));
    ranges r = ranges_start();
    /* lanes behind the end become 0: gamma and beta are read as 0 there */
#define STEP(i, m, w)                                                              \
    do {                                                                           \
        const v16 h = v16_mul(v16_sub(load16(row + (i), m), mu), inv);             \
        const v16 v = v16_fma(h, load16(gamma + (i), m), load16(beta + (i), m));   \
        store16(y + (i), v, m);                                                    \
        if (range) {                                                               \
            see_range(&r, w, v);                                                   \
            see_finite(&r, w, v);                                                  \
        }                                                                          \
    } while (0)
    OVER_ROW(STEP);
#undef STEP
    return zq_is_finite(s.var) && (!range || (ranges_end(&r, range) && ranges_finite(&r)));
}

static int
layernorm_f32(const float *x, const float *residual, const float *gamma, const float *beta, int64_t n, float eps, float *y)
{
    return residual ? layernorm(x, residual, gamma, beta, n, eps, y, NULL) : layernorm(x, NULL, gamma, beta, n, eps, y, NULL);
}

static int
layernorm_range_f32(const float *x, const float *residual, const float *gamma, const float *beta, int64_t n, float eps, float *y,
                    zq_range *range)
{
    return residual ? layernorm(x, residual, gamma, beta, n, eps, y, range) : layernorm(x, NULL, gamma, beta, n, eps, y, range);
}

/* h = x (+ residual) in y */
ZQ_INLINE void
add_rows(const float *x, const float *residual, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16_store(y + i, v16_add(v16_load(x + i), v16_load(residual + i)));
    }
    if (i < n) {
        v16_storen(y + i, v16_add(v16_loadn(x + i, n - i), v16_loadn(residual + i, n - i)), n - i);
    }
}

ZQ_INLINE int
rmsnorm(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y, zq_range *range)
{
    const float *row = residual ? y : x;
    float unused, second;
    if (residual) {
        add_rows(x, residual, n, y);
    }
    row_moments(row, n, 0.0f, &unused, &second);
    if (!zq_is_finite(second)) {
        scale_f32(row, n, ZQ_SHRINK, y);
        row = y;
        eps *= ZQ_SHRINK * ZQ_SHRINK;
        row_moments(row, n, 0.0f, &unused, &second);
    }
    const v16 inv = v16_set1(zq_rsqrt(zq_mean(second, n), eps));
    ranges r = ranges_start();
#define STEP(i, m, w)                                                                             \
    do {                                                                                          \
        const v16 v = v16_mul(v16_mul(load16(row + (i), m), inv), load16(gamma + (i), m));        \
        store16(y + (i), v, m);                                                                   \
        if (range) {                                                                              \
            see_range(&r, w, v);                                                                  \
            see_finite(&r, w, v);                                                                 \
        }                                                                                         \
    } while (0)
    OVER_ROW(STEP);
#undef STEP
    return zq_is_finite(second) && (!range || (ranges_end(&r, range) && ranges_finite(&r)));
}

static int
rmsnorm_f32(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y)
{
    return residual ? rmsnorm(x, residual, gamma, n, eps, y, NULL) : rmsnorm(x, NULL, gamma, n, eps, y, NULL);
}

static int
rmsnorm_range_f32(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y, zq_range *range)
{
    return residual ? rmsnorm(x, residual, gamma, n, eps, y, range) : rmsnorm(x, NULL, gamma, n, eps, y, range);
}

/* act(x), or act(x) * up, and the range where it is asked for. `act`, and whether up and range are NULL, are constants in
 * every call, so each gets a loop of its own. act(0) is 0, so lanes behind the end do not show in the range. */
ZQ_INLINE int
activation_loop(const float *x, const float *up, int64_t n, float *y, zq_range *range, const zq_activation act)
{
    ranges r = ranges_start();
#define STEP(i, m, w)                              \
    do {                                           \
        const v16 v = load16(x + (i), m);          \
        v16 a = v16_activate(v, act);              \
        see_finite(&r, w, v);                      \
        if (up) {                                  \
            const v16 u = load16(up + (i), m);     \
            see_finite(&r, w, u);                  \
            a = v16_mul(a, u);                     \
        }                                          \
        store16(y + (i), a, m);                    \
        if (range) {                               \
            see_range(&r, w, a);                   \
        }                                          \
    } while (0)
    OVER_ROW(STEP);
#undef STEP
    return ranges_finite(&r) && (!range || ranges_end(&r, range));
}

ZQ_INLINE int
activation_of(const float *x, const float *up, int64_t n, zq_activation act, float *y, zq_range *range)
{
    switch (act) {
    case ZQ_ACT_RELU: return activation_loop(x, up, n, y, range, ZQ_ACT_RELU);
    case ZQ_ACT_GELU: return activation_loop(x, up, n, y, range, ZQ_ACT_GELU);
    case ZQ_ACT_GELU_TANH: return activation_loop(x, up, n, y, range, ZQ_ACT_GELU_TANH);
    case ZQ_ACT_SILU: return activation_loop(x, up, n, y, range, ZQ_ACT_SILU);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return activation_loop(x, up, n, y, range, ZQ_ACT_NONE);
}

static int
activation_f32(const float *x, int64_t n, zq_activation act, float *y)
{
    return activation_of(x, NULL, n, act, y, NULL);
}

static int
gated_f32(const float *gate, const float *up, int64_t n, zq_activation act, float *y)
{
    return activation_of(gate, up, n, act, y, NULL);
}

static int
activation_range_f32(const float *x, int64_t n, zq_activation act, float *y, zq_range *range)
{
    return activation_of(x, NULL, n, act, y, range);
}

static int
gated_range_f32(const float *gate, const float *up, int64_t n, zq_activation act, float *y, zq_range *range)
{
    return activation_of(gate, up, n, act, y, range);
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
    t->layernorm_range_f32 = layernorm_range_f32;
    t->rmsnorm_range_f32 = rmsnorm_range_f32;
    t->activation_range_f32 = activation_range_f32;
    t->gated_range_f32 = gated_range_f32;
    t->max_f32 = max_f32;
    t->exp_sum_f32 = exp_sum_f32;
    t->scale_f32 = scale_f32;
    t->rotary_f32 = rotary_f32;
}
