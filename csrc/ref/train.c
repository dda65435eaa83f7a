/* Gradients of row operators, the loss and AdamW, scalar. */
#include "../zq_kernels.h"
#include "math.h"
#include "sums.h"

/* Mean and 1 / sqrt(var + eps) of the row. */
static zq_moments
row_norm(const zq_norm_grad *g)
{
    float first, second;
    if (!g->centred) {
        row_moments(g->x, g->n, 0.0f, &first, &second);
        return (zq_moments){0.0f, zq_rsqrt(zq_mean(second, g->n), g->eps)};
    }
    const float mean = zq_mean(row_sum(g->x, g->n), g->n);
    row_moments(g->x, g->n, mean, &first, &second);
    const zq_moments m = zq_moments_of(mean, first, second, g->n);
    return (zq_moments){m.mean, zq_rsqrt(m.var, g->eps)};
}

void
zq_norm_grad_f32__ref(const zq_norm_grad *g)
{
    const zq_moments s = row_norm(g);
    const float inv = s.var;
    float s1[STRIPES] = {0}, s2[STRIPES] = {0};
    for (int64_t i = 0; i < g->n; i++) {
        const float d = g->dy[i] * g->gamma[i];
        s1[i % STRIPES] += d;
        s2[i % STRIPES] = fmaf(d, (g->x[i] - s.mean) * inv, s2[i % STRIPES]);
    }
    const float sum = reduce(s1, zq_add), mean = g->centred ? zq_mean(sum, g->n) : 0.0f;
    const float slope = zq_mean(reduce(s2, zq_add), g->n);
    for (int64_t i = 0; i < g->n; i++) {
        const float n = (g->x[i] - s.mean) * inv, dy = g->dy[i];
        g->dgamma[i] = fmaf(dy, n, g->dgamma[i]);
        if (g->centred) {
            g->dbeta[i] += dy;
        }
        g->dx[i] = fmaf(fmaf(-n, slope, dy * g->gamma[i] - mean), inv, g->add ? g->add[i] : 0.0f);
    }
}

void
zq_activation_grad_f32__ref(const float *x, const float *up, const float *dy, int64_t n, zq_activation act, float *dx,
                            float *dup)
{
    for (int64_t i = 0; i < n; i++) {
        const zq_slope s = zq_slope_of(x[i], act);
        const float d = dy[i], u = up ? d * up[i] : d;
        if (up) {
            dup[i] = d * s.value;
        }
        dx[i] = u * s.slope;
    }
}

void
zq_softmax_grad_f32__ref(const float *p, int64_t n, float *dp)
{
    float s[STRIPES] = {0};
    for (int64_t i = 0; i < n; i++) {
        s[i % STRIPES] = fmaf(p[i], dp[i], s[i % STRIPES]);
    }
    const float sum = reduce(s, zq_add);
    for (int64_t i = 0; i < n; i++) {
        dp[i] = p[i] * (dp[i] - sum);
    }
}

float
zq_sum_f32__ref(const float *x, int64_t n)
{
    return row_sum(x, n);
}

float
zq_square_loss_f32__ref(const float *y, const float *target, int64_t n, float factor, float *dy)
{
    float s[STRIPES] = {0};
    for (int64_t i = 0; i < n; i++) {
        const float d = y[i] - target[i];
        s[i % STRIPES] = fmaf(d, d, s[i % STRIPES]);
        dy[i] = d * factor;
    }
    return reduce(s, zq_add);
}

void
zq_adamw_f32__ref(const zq_adamw *c, const float *g, int64_t n, float *w, float *m, float *v)
{
    for (int64_t i = 0; i < n; i++) {
        m[i] = fmaf(c->beta1, m[i], c->gain1 * g[i]);
        v[i] = fmaf(c->beta2, v[i], (c->gain2 * g[i]) * g[i]);
        w[i] = fmaf(-c->step, m[i] / fmaf(c->root, sqrtf(v[i]), c->eps), c->keep * w[i]);
    }
}
