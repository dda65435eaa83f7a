/* Weights to codes on a grid, for solvers: the scalar truth. */
#include "../zq_kernels.h"

#include <math.h>

/* The grid point nearest to x, in units of the scale; its code goes to *code. */
static float
nearest(const zq_grid *g, float x, float zero, float *code)
{
    if (!g->values) {
        const float lo = (float)g->qmin - zero, hi = (float)g->qmax - zero;
        x = x > lo ? x : lo;
        x = rintf(x < hi ? x : hi);
        *code = x + zero;
        return x;
    }
    int c = 0;
    for (int i = 0; i + 1 < g->count; i++) {
        c = g->borders[i] < x ? i + 1 : c;
    }
    *code = (float)c;
    return g->values[c];
}

/* sum + the products of row i with the columns before it */
static float
chain(const float *row, const float *columns, int64_t i, float sum)
{
    for (int64_t j = 0; j < i; j++) {
        sum = fmaf(row[j], columns[j * ZQ_NR], sum);
    }
    return sum;
}

static void
column(const zq_gptq_tile *t, int64_t i, int r)
{
    float *delta = t->delta + r, code;
    const float s = t->scale[t->group[i] * ZQ_NR + r], z = t->zero[t->group[i] * ZQ_NR + r];
    float v = delta[i * ZQ_NR];
    if (t->shift) {
        v = chain(t->shift + i * t->ld, t->seen + r, i, v);
    }
    const float now = v + chain(t->factor + i * t->ld, delta, i, t->f[i * ZQ_NR + r]);
    if (t->shift) {
        t->seen[i * ZQ_NR + r] = now;
    }
    float w = nearest(t->grid, (t->rounding == ZQ_ROUND_V ? v : now) / s, z, &code) * s;
    w = t->rounding == ZQ_ROUND_NOT ? now : w;
    t->codes[i * ZQ_NR + r] = (uint8_t)(int32_t)code;
    const float e = (now - w) * t->diag[i], d = v - w, counted = 0.0f < t->diag[i] ? d : 0.0f;
    delta[i * ZQ_NR] = d;
    t->loss[r] = fmaf(e, e, t->loss[r]);
    t->size[r] = fmaf(counted, counted, t->size[r]);
}

void
zq_gptq_columns_f32__ref(const zq_gptq_tile *t)
{
    for (int r = 0; r < ZQ_NR; r++) {
        for (int64_t i = 0; i < t->columns; i++) {
            column(t, i, r);
        }
    }
}

float
zq_grid_error_f32__ref(const zq_grid *grid, const float *w, const float *weight, int64_t n, float scale, float zero)
{
    float lane[16] = {0}, code;
    for (int64_t i = 0; i < n; i++) {
        const float d = nearest(grid, w[i] / scale, zero, &code) * scale - w[i];
        lane[i % 16] = fmaf(weight[i] * d, d, lane[i % 16]);
    }
    for (int half = 8; half >= 1; half /= 2) {
        for (int l = 0; l < half; l++) {
            lane[l] += lane[l + half];
        }
    }
    return lane[0];
}
