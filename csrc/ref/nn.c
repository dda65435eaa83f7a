/* Transformer operators on rows, scalar. */
#include "../zq_kernels.h"
#include "math.h"
#include "sums.h"

#include <float.h>

static void
load_row(const float *x, const float *residual, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        y[i] = residual ? x[i] + residual[i] : x[i];
    }
}

static zq_moments
corrected_moments(const float *y, int64_t n, float mean)
{
    float first, second;
    row_moments(y, n, mean, &first, &second);
    return zq_moments_of(mean, first, second, n);
}

/* One pass over h where its mean is small beside its deviation, as it is in nearly all rows; two elsewhere. */
static int
layernorm(const float *x, const float *residual, const float *gamma, const float *beta, int64_t n, float eps, float *y)
{
    load_row(x, residual, n, y);
    zq_moments s;
    float first, second;
    row_moments(y, n, 0.0f, &first, &second);
    if (!zq_moments_in_one(first, second, n, eps, &s)) {
        s = corrected_moments(y, n, s.mean);
        const float factor = zq_row_factor(s.mean, s.var, eps);
        if (factor != 1.0f) {
            zq_scale_f32__ref(y, n, factor, y);
            s = corrected_moments(y, n, zq_mean(row_sum(y, n), n));
            eps = eps * factor * factor;
        }
    }
    const float inv = zq_rsqrt(s.var, eps);
    for (int64_t i = 0; i < n; i++) {
        y[i] = fmaf((y[i] - s.mean) * inv, gamma[i], beta[i]);
    }
    return zq_is_finite(s.var);
}

int
zq_rmsnorm_f32__ref(const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y)
{
    load_row(x, residual, n, y);
    float unused, second;
    row_moments(y, n, 0.0f, &unused, &second);
    const float factor = zq_row_factor(0.0f, zq_mean(second, n), eps);
    if (factor != 1.0f) {
        zq_scale_f32__ref(y, n, factor, y);
        eps = eps * factor * factor;
        row_moments(y, n, 0.0f, &unused, &second);
    }
    const float inv = zq_rsqrt(zq_mean(second, n), eps);
    for (int64_t i = 0; i < n; i++) {
        y[i] = y[i] * inv * gamma[i];
    }
    return zq_is_finite(second);
}

/* The range of a row where one is asked for; bit `row` where the row is bad. */
static unsigned
bad_bit(int finite, const float *y, int64_t n, int64_t row, zq_range *range)
{
    if (range) {
        finite &= zq_minmax_f32__ref(y, n, &range[row].lo, &range[row].hi);
    }
    return (unsigned)!finite << row;
}

unsigned
zq_layernorm_rows_f32__ref(const float *x, const float *residual, const float *gamma, const float *beta, int64_t rows,
                           int64_t n, float eps, float *y, zq_range *range)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int finite = layernorm(x + r * n, residual ? residual + r * n : NULL, gamma, beta, n, eps, y + r * n);
        bad |= bad_bit(finite, y + r * n, n, r, range);
    }
    return bad;
}

unsigned
zq_rmsnorm_rows_f32__ref(const float *x, const float *residual, const float *gamma, int64_t rows, int64_t n, float eps,
                         float *y, zq_range *range)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int finite = zq_rmsnorm_f32__ref(x + r * n, residual ? residual + r * n : NULL, gamma, n, eps, y + r * n);
        bad |= bad_bit(finite, y + r * n, n, r, range);
    }
    return bad;
}

unsigned
zq_activation_rows_f32__ref(const float *x, const float *up, int64_t rows, int64_t n, zq_activation act, float *y,
                            zq_range *range)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++) {
        int finite = 1;
        for (int64_t i = r * n; i < (r + 1) * n; i++) {
            const float u = up ? up[i] : 1.0f;
            finite &= zq_is_finite(x[i]) & zq_is_finite(u);
            y[i] = zq_activate1(x[i], act) * u;
        }
        bad |= bad_bit(finite, y + r * n, n, r, range);
    }
    return bad;
}

float
zq_max_f32__ref(const float *x, int64_t n)
{
    float s[STRIPES];
    for (int l = 0; l < STRIPES; l++) {
        s[l] = -INFINITY;
    }
    for (int64_t i = 0; i < n; i++) {
        s[i % STRIPES] = zq_maxf(s[i % STRIPES], x[i]);
    }
    return reduce(s, zq_maxf);
}

unsigned
zq_softmax_rows_f32__ref(const float *x, int64_t rows, int64_t n, float *y)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        const float max = zq_max_f32__ref(x, n), shift = zq_softmax_shift(max);
        for (int64_t i = 0; i < n; i++) {
            y[i] = zq_exp(x[i] - shift);
        }
        const float sum = row_sum(y, n);
        zq_scale_f32__ref(y, n, zq_softmax_factor(sum), y);
        bad |= (unsigned)!zq_softmax_finite(max, sum) << r;
    }
    return bad;
}

unsigned
zq_softmax_rows_f32_b8__ref(const float *x, int64_t rows, int64_t n, int32_t levels, int32_t bias, uint8_t *q, int64_t ldq,
                            float *factor)
{
    unsigned bad = 0;
    for (int64_t r = 0; r < rows; r++, x += n, q += ldq) {
        const float max = zq_max_f32__ref(x, n), shift = zq_softmax_shift(max);
        float s[STRIPES] = {0};
        for (int64_t i = 0; i < n; i++) {
            const float e = zq_exp(x[i] - shift);
            s[i % STRIPES] += e;
            q[i] = (uint8_t)((int32_t)rintf(e * (float)levels) + bias);
        }
        const float sum = reduce(s, zq_add);
        factor[r] = zq_softmax_factor(sum);
        bad |= (unsigned)!zq_softmax_finite(max, sum) << r;
    }
    return bad;
}

void
zq_shift_scale_f32__ref(const float *x, int64_t n, const float *shift, const float *factor, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        y[i] = (shift ? x[i] - shift[i] : x[i]) * factor[i];
    }
}

void
zq_scale_f32__ref(const float *x, int64_t n, float s, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        y[i] = x[i] * s;
    }
}

void
zq_rotary_f32__ref(const float *x, int64_t heads, int64_t head_dim, int64_t half, int interleaved, const float *cos,
                   const float *sin, float *y)
{
    for (int64_t h = 0; h < heads; h++, x += head_dim, y += head_dim) {
        for (int64_t i = 0; !interleaved && i < half; i++) {
            const float a = x[i], b = x[i + half];
            y[i] = fmaf(-b, sin[i], a * cos[i]);
            y[i + half] = fmaf(a, sin[i], b * cos[i]);
        }
        if (interleaved) {
            zq_rotate_pairs(x, half, cos, sin, y);
        }
        for (int64_t i = 2 * half; i < head_dim; i++) {
            y[i] = x[i];
        }
    }
}
