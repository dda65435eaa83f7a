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

ZQ_INLINE v16
sum4(const v16 *s)
{
    return v16_add(v16_add(s[0], s[1]), v16_add(s[2], s[3]));
}

/* Horizontal steps, divisions and roots have long latencies, and only rows side by side hide them: each step is a loop of
 * its own over the (at most ZQ_ROWS) rows of a call. The order of operations within a row is that of a row alone. */

/* In every pass over a row: whole blocks of 64 elements, vector j of a block into partial sum j; then up to four
 * vectors of the last block, the last one cut. */
#define FOUR ZQ_UNROLL(4) for (int j = 0; j < 4; j++)

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

/* Floats in 44 KB: where a call reads, writes and prefetches more, prefetching costs more than it saves. */
enum { L1_ITEMS = 11264 };

/* The block of 64 elements from p on, on its way into L1: a pass that computes asks for the rows that follow the call's own,
 * which the next call begins to read. Behind the last row of all nothing is read: a prefetch never faults. */
ZQ_INLINE void
prefetch_block(const float *p)
{
    FOUR { __builtin_prefetch(p + 16 * j, 0, 3); }
}

/* Least and largest of 0 and what was seen, which holds no NaN; Inf shows at the ends. The accumulator is the second operand,
 * so that it stays when a zero of the other sign is seen. */
typedef struct {
    v16 lo, hi;
} v16_range;

ZQ_INLINE v16_range
v16_range_start(void)
{
    return (v16_range){v16_zero(), v16_zero()};
}

ZQ_INLINE v16_range
v16_range_see(v16_range r, v16 x)
{
    return (v16_range){v16_min(x, r.lo), v16_max(x, r.hi)};
}

ZQ_INLINE v16_range
v16_range_join(v16_range a, v16_range b)
{
    return (v16_range){v16_min(a.lo, b.lo), v16_max(a.hi, b.hi)};
}

/* Returns 1 where both ends are finite. */
ZQ_INLINE int
v16_range_end(v16_range r, float *lo, float *hi)
{
    *lo = v16_hmin(r.lo);
    *hi = v16_hmax(r.hi);
    return zq_is_finite(*lo) & zq_is_finite(*hi);
}

/* The range of what is stored, and the largest bit pattern without sign of what else has to be finite. No result depends
 * on the order, so a level takes as many ways as it has registers for. */
typedef struct {
    v16_range range[RANGE_WAYS];
    v16i top[RANGE_WAYS];
} ranges;

ZQ_INLINE ranges
ranges_start(void)
{
    ranges r;
    for (int w = 0; w < RANGE_WAYS; w++) {
        r.range[w] = v16_range_start();
        r.top[w] = v16i_zero();
    }
    return r;
}

ZQ_INLINE void
see_finite(ranges *r, int w, v16 x)
{
    r->top[w] = v16i_max(r->top[w], v16i_and(v16_bits(x), v16i_set1(0x7fffffff)));
}

/* A row's ranges before the horizontal steps. */
typedef struct {
    v16_range range;
    v16i top;
} range_lanes;

ZQ_INLINE range_lanes
ranges_join(const ranges *r)
{
    return (range_lanes){v16_range_join(r->range[0], r->range[RANGE_WAYS - 1]), v16i_max(r->top[0], r->top[RANGE_WAYS - 1])};
}

/* The ranges of rows. Returns bit r where an end of row r is infinite. */
ZQ_INLINE unsigned
end_ranges(const range_lanes *lanes, int64_t rows, zq_range *range)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        bad |= (unsigned)!v16_range_end(lanes[r].range, &range[r].lo, &range[r].hi) << r;
    }
    return bad;
}

/* Returns bit r where row r showed NaN or Inf to see_finite. */
ZQ_INLINE unsigned
end_finite(const range_lanes *lanes, int64_t rows)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        bad |= (unsigned)(v16i_hmax(lanes[r].top) >= 0x7f800000) << r;
    }
    return bad;
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

/* The sums of h and of h^2 in the lanes, h = x (+ residual). h goes to y; without a residual nothing is stored. Which sums are
 * wanted (the other is NULL), and whether there are a residual and rows to prefetch, are constants of each call. */
ZQ_INLINE void
add_row(const float *x, const float *residual, int64_t n, float *y, const float *next, v16 *sum, v16 *squares)
{
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()}, q[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        if (next) {
            prefetch_block(next + i);
        }
        FOUR {
            v16 h = v16_load(x + i + 16 * j);
            if (residual) {
                h = v16_add(h, v16_load(residual + i + 16 * j));
                v16_store(y + i + 16 * j, h);
            }
            s[j] = sum ? v16_add(s[j], h) : s[j];
            q[j] = squares ? v16_fma(h, h, q[j]) : q[j];
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
            s[j] = sum ? v16_add(s[j], h) : s[j];
            q[j] = squares ? v16_fma(h, h, q[j]) : q[j];
        }
    }
    if (sum) {
        *sum = sum4(s);
    }
    if (squares) {
        *squares = sum4(q);
    }
}

ZQ_INLINE v16
load_sum(const float *x, int64_t n)
{
    v16 sum;
    add_row(x, NULL, n, NULL, NULL, &sum, NULL);
    return sum;
}

ZQ_INLINE v16
load_squares(const float *x, const float *residual, int64_t n, float *y)
{
    v16 squares;
    add_row(x, residual, n, y, NULL, NULL, &squares);
    return squares;
}

/* sum (x - mean), sum (x - mean)^2, in the lanes */
ZQ_INLINE void
row_moments(const float *x, int64_t n, float mean, v16 *first, v16 *second)
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

static void
shift_scale_f32(const float *x, int64_t n, const float *shift, const float *factor, float *y)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 v = shift ? v16_sub(v16_load(x + i), v16_load(shift + i)) : v16_load(x + i);
        v16_store(y + i, v16_mul(v, v16_load(factor + i)));
    }
    if (i < n) {
        const v16 v = v16_loadn(x + i, n - i);
        const v16 moved = shift ? v16_sub(v, v16_loadn(shift + i, n - i)) : v;
        v16_storen(y + i, v16_mul(moved, v16_loadn(factor + i, n - i)), n - i);
    }
}

/* Lanes of one step, row by row; in memory, so that rows do not compete for registers. */
typedef struct {
    float first[ZQ_ROWS][16], second[ZQ_ROWS][16];
} row_lanes;

/* What LayerNorm does to a row: (h - mean) * inv. */
typedef struct {
    float mean[ZQ_ROWS], inv[ZQ_ROWS];
} row_norms;

/* The second pass over a row, with the mean that the first one found. */
ZQ_INLINE zq_moments
corrected_moments(const float *h, int64_t n, float mean)
{
    v16 first, second;
    row_moments(h, n, mean, &first, &second);
    return zq_moments_of(mean, v16_hsum(first), v16_hsum(second), n);
}

/* Mean and 1 / sqrt(var + eps) of a row for which one pass is not enough. Where its sums overflow or underflow, h times a
 * factor goes to y, its numbers are those of that, and bit r of *scaled is set. Returns bit r where it is not finite. */
static __attribute__((noinline)) unsigned
layernorm_second_pass(const float *h, int64_t n, float eps, int64_t r, float *y, row_norms *s, unsigned *scaled)
{
    zq_moments m = corrected_moments(h, n, s->mean[r]);
    const float factor = zq_row_factor(m.mean, m.var, eps);
    if (factor != 1.0f) {
        scale_f32(h, n, factor, y);
        m = corrected_moments(y, n, zq_mean(v16_hsum(load_sum(y, n)), n));
        eps = eps * factor * factor;
        *scaled |= 1u << r;
    }
    s->mean[r] = m.mean;
    s->inv[r] = zq_rsqrt(m.var, eps);
    return (unsigned)!zq_is_finite(m.var) << r;
}

/* Mean and 1 / sqrt(var + eps) of the rows h, whose sums are given. Bit r of scaled: row r is in y, scaled. Returns bit r where
 * a row is not finite. */
ZQ_INLINE unsigned
layernorm_norms(const float *h, int64_t rows, int64_t n, float eps, float *y, const row_lanes *l, row_norms *s,
                unsigned *scaled)
{
    unsigned bad = 0, again = 0;
    for (int64_t r = 0; r < rows; r++) {
        zq_moments m;
        const float first = v16_hsum(v16_load(l->first[r])), second = v16_hsum(v16_load(l->second[r]));
        again |= (unsigned)!zq_moments_in_one(first, second, n, eps, &m) << r;
        s->mean[r] = m.mean;
        s->inv[r] = zq_rsqrt(m.var, eps);
    }
    for (; again; again &= again - 1) {
        const int64_t r = __builtin_ctz(again);
        bad |= layernorm_second_pass(h + r * n, n, eps, r, y + r * n, s, scaled);
    }
    return bad;
}

/* y = (h - mean) * inv * gamma + beta. Lanes behind the end become 0: gamma and beta are read as 0 there. */
ZQ_INLINE range_lanes
layernorm_apply(const float *h, const float *gamma, const float *beta, int64_t n, float mean, float inv, float *y, int ranged)
{
    const v16 mu = v16_set1(mean), f = v16_set1(inv);
    ranges r = ranges_start();
#define STEP(i, m, w)                                                             \
    do {                                                                          \
        const v16 d = v16_mul(v16_sub(load16(h + (i), m), mu), f);                \
        const v16 v = v16_fma(d, load16(gamma + (i), m), load16(beta + (i), m));  \
        store16(y + (i), v, m);                                                   \
        if (ranged) {                                                             \
            r.range[w] = v16_range_see(r.range[w], v);                            \
        }                                                                         \
    } while (0)
    OVER_ROW(STEP);
#undef STEP
    return ranges_join(&r);
}

/* residual and range are NULL, or not, by a constant of each call: a loop without what is not wanted. */
ZQ_INLINE unsigned
layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t rows, int64_t n, float eps,
          float *y, zq_range *range)
{
    row_lanes l;
    row_norms s;
    range_lanes seen[ZQ_ROWS];
    unsigned scaled = 0;
    const float *h = residual ? y : x;
    assert(rows <= ZQ_ROWS);
    const float *next = (3 * rows + 2) * n <= L1_ITEMS ? x + rows * n : x;
    for (int64_t r = 0; r < rows; r++) {
        v16 first, second;
        add_row(x + r * n, residual ? residual + r * n : NULL, n, y + r * n, next + r * n, &first, &second);
        v16_store(l.first[r], first);
        v16_store(l.second[r], second);
    }
    unsigned bad = layernorm_norms(h, rows, n, eps, y, &l, &s, &scaled);
    for (int64_t r = 0; r < rows; r++) {
        const float *from = (scaled >> r & 1u ? y : h) + r * n;
        seen[r] = layernorm_apply(from, gamma, beta, n, s.mean[r], s.inv[r], y + r * n, range != NULL);
    }
    if (range) {
        bad |= end_ranges(seen, rows, range);
    }
    return bad;
}

static unsigned
layernorm_rows_f32(const float *x, const float *residual, const float *gamma, const float *beta, int64_t rows, int64_t n,
                   float eps, float *y, zq_range *range)
{
    if (range) {
        return residual ? layernorm(x, residual, gamma, beta, rows, n, eps, y, range)
                        : layernorm(x, NULL, gamma, beta, rows, n, eps, y, range);
    }
    return residual ? layernorm(x, residual, gamma, beta, rows, n, eps, y, NULL)
                    : layernorm(x, NULL, gamma, beta, rows, n, eps, y, NULL);
}

/* 1 / sqrt(mean h^2 + eps) of a row whose sum overflows or underflows: h times a factor goes to y, *inv is for that, and bit
 * r of *scaled is set. Returns bit r where it is not finite. */
static __attribute__((noinline)) unsigned
rmsnorm_scaled(const float *h, int64_t n, float eps, float factor, int64_t r, float *y, float *inv, unsigned *scaled)
{
    scale_f32(h, n, factor, y);
    const float var = zq_mean(v16_hsum(load_squares(y, NULL, n, NULL)), n);
    *inv = zq_rsqrt(var, eps * factor * factor);
    *scaled |= 1u << r;
    return (unsigned)!zq_is_finite(var) << r;
}

/* y = h * inv * gamma */
ZQ_INLINE range_lanes
rmsnorm_apply(const float *h, const float *gamma, int64_t n, float inv, float *y, int ranged)
{
    const v16 f = v16_set1(inv);
    ranges r = ranges_start();
#define STEP(i, m, w)                                                                       \
    do {                                                                                    \
        const v16 v = v16_mul(v16_mul(load16(h + (i), m), f), load16(gamma + (i), m));      \
        store16(y + (i), v, m);                                                             \
        if (ranged) {                                                                       \
            r.range[w] = v16_range_see(r.range[w], v);                                      \
        }                                                                                   \
    } while (0)
    OVER_ROW(STEP);
#undef STEP
    return ranges_join(&r);
}

ZQ_INLINE unsigned
rmsnorm(const float *x, const float *residual, const float *gamma, int64_t rows, int64_t n, float eps, float *y,
        zq_range *range)
{
    float lanes[ZQ_ROWS][16], var[ZQ_ROWS], inv[ZQ_ROWS];
    range_lanes seen[ZQ_ROWS];
    unsigned scaled = 0, bad = 0, again = 0;
    const float *h = residual ? y : x;
    assert(rows <= ZQ_ROWS);
    for (int64_t r = 0; r < rows; r++) {
        v16_store(lanes[r], load_squares(x + r * n, residual ? residual + r * n : NULL, n, y + r * n));
    }
    for (int64_t r = 0; r < rows; r++) {
        var[r] = zq_mean(v16_hsum(v16_load(lanes[r])), n);
        inv[r] = zq_rsqrt(var[r], eps);
        again |= (unsigned)!zq_is_ordinary(var[r], eps) << r;
    }
    for (; again; again &= again - 1) {
        const int64_t r = __builtin_ctz(again);
        const float factor = zq_row_factor(0.0f, var[r], eps);
        bad |= rmsnorm_scaled(h + r * n, n, eps, factor, r, y + r * n, &inv[r], &scaled);
    }
    for (int64_t r = 0; r < rows; r++) {
        seen[r] = rmsnorm_apply((scaled >> r & 1u ? y : h) + r * n, gamma, n, inv[r], y + r * n, range != NULL);
    }
    if (range) {
        bad |= end_ranges(seen, rows, range);
    }
    return bad;
}

static unsigned
rmsnorm_rows_f32(const float *x, const float *residual, const float *gamma, int64_t rows, int64_t n, float eps, float *y,
                 zq_range *range)
{
    if (range) {
        return residual ? rmsnorm(x, residual, gamma, rows, n, eps, y, range) : rmsnorm(x, NULL, gamma, rows, n, eps, y, range);
    }
    return residual ? rmsnorm(x, residual, gamma, rows, n, eps, y, NULL) : rmsnorm(x, NULL, gamma, rows, n, eps, y, NULL);
}

static int
rmsnorm_f32(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y)
{
    return !rmsnorm_rows_f32(x, residual, gamma, 1, n, eps, y, NULL);
}

/* act(x), or act(x) * up, of `ways` vectors, the last of m elements. */
ZQ_INLINE void
activation_step(const float *x, const float *up, int64_t m, float *y, int ranged, const zq_activation act, ranges *r,
                const int ways)
{
    v16 v[EXP_WAYS], a[EXP_WAYS];
#define EACH ZQ_UNROLL(4) for (int u = 0; u < ways; u++)
    EACH { a[u] = v[u] = load16(x + 16 * u, m); }
    v16_activates(a, act, ways);
    EACH {
        see_finite(r, u % RANGE_WAYS, v[u]);
        if (up) {
            const v16 other = load16(up + 16 * u, m);
            see_finite(r, u % RANGE_WAYS, other);
            a[u] = v16_mul(a[u], other);
        }
        store16(y + 16 * u, a[u], m);
        if (ranged) {
            r->range[u % RANGE_WAYS] = v16_range_see(r->range[u % RANGE_WAYS], a[u]);
        }
    }
#undef EACH
}

/* A row of it, and the range where it is asked for. `act`, and whether up and range are NULL, are constants in every call, so
 * each gets a loop of its own. act(0) is 0, so lanes behind the end do not show in the range. */
ZQ_INLINE range_lanes
activation_row(const float *x, const float *up, int64_t n, float *y, int ranged, const zq_activation act)
{
    ranges r = ranges_start();
    int64_t i = 0;
    for (; i + 16 * EXP_WAYS <= n; i += 16 * EXP_WAYS) {
        activation_step(x + i, up ? up + i : NULL, 16, y + i, ranged, act, &r, EXP_WAYS);
    }
    for (; i < n; i += 16) {
        activation_step(x + i, up ? up + i : NULL, zq_min(n - i, 16), y + i, ranged, act, &r, 1);
    }
    return ranges_join(&r);
}

ZQ_INLINE unsigned
activation_loop(const float *x, const float *up, int64_t rows, int64_t n, float *y, zq_range *range, const zq_activation act)
{
    range_lanes seen[ZQ_ROWS];
    assert(rows <= ZQ_ROWS);
    for (int64_t r = 0; r < rows; r++) {
        seen[r] = activation_row(x + r * n, up ? up + r * n : NULL, n, y + r * n, range != NULL, act);
    }
    return end_finite(seen, rows) | (range ? end_ranges(seen, rows, range) : 0);
}

ZQ_INLINE unsigned
activation_of(const float *x, const float *up, int64_t rows, int64_t n, zq_activation act, float *y, zq_range *range)
{
    switch (act) {
    case ZQ_ACT_RELU: return activation_loop(x, up, rows, n, y, range, ZQ_ACT_RELU);
    case ZQ_ACT_GELU: return activation_loop(x, up, rows, n, y, range, ZQ_ACT_GELU);
    case ZQ_ACT_GELU_TANH: return activation_loop(x, up, rows, n, y, range, ZQ_ACT_GELU_TANH);
    case ZQ_ACT_SILU: return activation_loop(x, up, rows, n, y, range, ZQ_ACT_SILU);
    case ZQ_ACT_NONE:
    case ZQ_ACTS: break;
    }
    return activation_loop(x, up, rows, n, y, range, ZQ_ACT_NONE);
}

static unsigned
activation_rows_f32(const float *x, const float *up, int64_t rows, int64_t n, zq_activation act, float *y, zq_range *range)
{
    if (range) {
        return up ? activation_of(x, up, rows, n, act, y, range) : activation_of(x, NULL, rows, n, act, y, range);
    }
    return up ? activation_of(x, up, rows, n, act, y, NULL) : activation_of(x, NULL, rows, n, act, y, NULL);
}

/* The last n < 64 elements of a row to its running maximum, and that of its lanes. -Inf in the cut lanes; the running maximum on
 * the left, as in the scalar code, decides between equal zeros. */
ZQ_INLINE void
max_rest(const float *x, int64_t n, v16 *s)
{
    FOUR {
        const int64_t m = zq_min(n - 16 * j, 16);
        if (m > 0) {
            s[j] = keep(v16_max(s[j], v16_loadn(x + 16 * j, m)), m, s[j]);
        }
    }
}

ZQ_INLINE v16
max4(const v16 *s)
{
    return v16_max(v16_max(s[0], s[1]), v16_max(s[2], s[3]));
}

/* The maximum of x in the lanes: each has that of some elements. */
ZQ_INLINE v16
max_lanes(const float *x, int64_t n)
{
    const v16 low = v16_set1(-INFINITY);
    v16 s[4] = {low, low, low, low};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        FOUR { s[j] = v16_max(s[j], v16_load(x + i + 16 * j)); }
    }
    max_rest(x + i, n - i, s);
    return max4(s);
}

static float
max_f32(const float *x, int64_t n)
{
    return v16_hmax(max_lanes(x, n));
}

/* The last n < 64 elements of a row: exp(x - max) to y, into the running sums. */
ZQ_INLINE void
exp_rest(const float *x, int64_t n, v16 shift, float *y, v16 *s)
{
    FOUR {
        const int64_t m = zq_min(n - 16 * j, 16);
        if (m > 0) {
            v16 e = v16_sub(v16_loadn(x + 16 * j, m), shift);
            v16_exps(&e, 1);
            e = keep(e, m, v16_zero());
            v16_storen(y + 16 * j, e, m);
            s[j] = v16_add(s[j], e);
        }
    }
}

/* Where exp(x - max) goes: as float32 to y, or, where q is not NULL, as codes rint(levels exp(x - max)) + bias to q. */
typedef struct {
    float *y;
    uint8_t *q;
    int32_t levels, bias;
} exp_out;

/* The last n < 64 elements of a row as codes. */
ZQ_INLINE void
code_rest(const float *e, int64_t n, const exp_out *out, uint8_t *q)
{
    FOUR {
        const int64_t m = zq_min(n - 16 * j, 16);
        if (m > 0) {
            const v16i code = v16_to_i(v16_mul(v16_loadn(e + 16 * j, m), v16_set1((float)out->levels)));
            v16i_storen_b8(q + 16 * j, v16i_add(code, v16i_set1(out->bias)), m);
        }
    }
}

/* exp(x - max) to where `out` says; returns its sum. Beside the exponentials goes what needs other units: done *= factor, for the
 * row before (whether there is one is a constant of each call, and so is the kind of output), *top_after = the maximum of the row
 * `after` (as max_f32, but for the sign of a zero, which no exponential shows), and the row behind x + 2 n is prefetched. */
ZQ_INLINE float
exp_row(const float *x, int64_t n, float max, const exp_out *out, float *done, float factor, const float *after,
        float *top_after)
{
    float *const y = out->y;
    uint8_t *const q = out->q;
    const v16 shift = v16_set1(max), f = v16_set1(q ? (float)out->levels : factor), low = v16_set1(-INFINITY);
    v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()}, top[4] = {low, low, low, low};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        v16i code[4];
        prefetch_block(x + 3 * n + i);
        FOUR {
            const int64_t at = i + 16 * j;
            if (done) {
                v16_store(done + at, v16_mul(v16_load(done + at), f));
            }
            top[j % 2] = v16_max(top[j % 2], v16_load(after + at)); /* two: all registers are taken */
        }
        ZQ_UNROLL(4)
        for (int j = 0; j < 4; j += EXP_WAYS) {
            v16 e[EXP_WAYS];
            for (int u = 0; u < EXP_WAYS; u++) {
                e[u] = v16_sub(v16_load(x + i + 16 * (j + u)), shift);
            }
            v16_exps(e, EXP_WAYS);
            for (int u = 0; u < EXP_WAYS; u++) {
                if (q) {
                    code[j + u] = v16_to_i(v16_mul(e[u], f));
                }
                else {
                    v16_store(y + i + 16 * (j + u), e[u]);
                }
                s[j + u] = v16_add(s[j + u], e[u]);
            }
        }
        if (q) {
            v16i_store_b8x4(q + i, code[0], code[1], code[2], code[3], (int16_t)out->bias);
        }
    }
    if (i < n) {
        float rest[64];
        exp_rest(x + i, n - i, shift, q ? rest : y + i, s);
        max_rest(after + i, n - i, top);
        if (q) {
            code_rest(rest, n - i, out, q + i);
        }
        if (done) {
            scale_f32(done + i, n - i, factor, done + i);
        }
    }
    *top_after = v16_hmax(max4(top));
    return v16_hsum(sum4(s));
}

/* A row's maximum is taken beside the exponentials of the row two before, so that its horizontal steps have ended when it is
 * wanted (the last row's stands in behind the end); a row is scaled beside the exponentials of the next one. Between two rows
 * there are few instructions: they would drain the pipes. */
static unsigned
softmax_rows_f32(const float *x, int64_t rows, int64_t n, float *y)
{
    const float *const last = x + (rows - 1) * n;
    float max = max_f32(x, n), next = rows > 1 ? max_f32(x + n, n) : max, second;
    unsigned bad = 0;
    assert(rows >= 1 && rows <= ZQ_ROWS);
#define EXP_ROW(done, factor) \
    exp_row(x, n, zq_softmax_shift(max), &(exp_out){.y = y}, done, factor, rows > 2 && x < last - n ? x + 2 * n : last, &second)
    float sum = EXP_ROW(NULL, 0.0f);
    bad |= (unsigned)!zq_softmax_finite(max, sum);
    for (int64_t r = 1; r < rows; r++) {
        x += n, y += n, max = next, next = second;
        sum = EXP_ROW(y - n, zq_softmax_factor(sum));
        bad |= (unsigned)!zq_softmax_finite(max, sum) << r;
    }
#undef EXP_ROW
    scale_f32(y, n, zq_softmax_factor(sum), y);
    return bad;
}

/* Codes need no sum, and so no row is scaled afterwards. */
static unsigned
softmax_rows_f32_b8(const float *x, int64_t rows, int64_t n, int32_t levels, int32_t bias, uint8_t *q, int64_t ldq,
                    float *factor)
{
    const float *const last = x + (rows - 1) * n;
    float max = max_f32(x, n), next = rows > 1 ? max_f32(x + n, n) : max, second;
    unsigned bad = 0;
    assert(rows >= 1 && rows <= ZQ_ROWS);
    for (int64_t r = 0; r < rows; r++, x += n, q += ldq, max = next, next = second) {
        const float sum =
            exp_row(x, n, zq_softmax_shift(max), &(exp_out){NULL, q, levels, bias}, NULL, 0.0f,
                    r + 2 < rows ? x + 2 * n : last, &second);
        factor[r] = zq_softmax_factor(sum);
        bad |= (unsigned)!zq_softmax_finite(max, sum) << r;
    }
    return bad;
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
    t->layernorm_rows_f32 = layernorm_rows_f32;
    t->rmsnorm_rows_f32 = rmsnorm_rows_f32;
    t->rmsnorm_f32 = rmsnorm_f32;
    t->activation_rows_f32 = activation_rows_f32;
    t->softmax_rows_f32 = softmax_rows_f32;
    t->softmax_rows_f32_b8 = softmax_rows_f32_b8;
    t->max_f32 = max_f32;
    t->scale_f32 = scale_f32;
    t->shift_scale_f32 = shift_scale_f32;
    t->rotary_f32 = rotary_f32;
}
