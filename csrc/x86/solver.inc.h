/* Weights to codes on a grid, for solvers, on v16; included by quantize.inc.h once per level. */

/* As nearest() of ref/solver.c. Codes are small integers in float lanes. */
ZQ_INLINE v16
nearest(const zq_grid *g, v16 x, v16 zero, v16 *code)
{
    if (!g->values) {
        const v16 lo = v16_sub(v16_set1((float)g->qmin), zero), hi = v16_sub(v16_set1((float)g->qmax), zero);
        const v16 c = v16_rint(v16_min(v16_max(x, lo), hi));
        *code = v16_add(c, zero);
        return c;
    }
    v16 value = v16_set1(g->values[0]), c = v16_zero();
    for (int i = 0; i + 1 < g->count; i++) {
        const v16 border = v16_set1(g->borders[i]);
        value = v16_select_lt(border, x, v16_set1(g->values[i + 1]), value);
        c = v16_select_lt(border, x, v16_set1((float)(i + 1)), c);
    }
    *code = c;
    return value;
}

/* Both halves of a panel: sum += the products of row[0..i-1] with the columns before column i. */
ZQ_INLINE void
chain(const float *row, const float *columns, int64_t i, v16 sum[2])
{
    v16 lo = sum[0], hi = sum[1];
    for (int64_t j = 0; j < i; j++) {
        const v16 factor = v16_set1(row[j]);
        lo = v16_fma(factor, v16_load(columns + j * ZQ_NR), lo);
        hi = v16_fma(factor, v16_load(columns + j * ZQ_NR + 16), hi);
    }
    sum[0] = lo;
    sum[1] = hi;
}

/* Sixteen rows of column i: v and f are complete. */
ZQ_INLINE void
round_column(const zq_gptq_tile *t, int64_t i, int half, v16 v, v16 f)
{
    const int64_t at = i * ZQ_NR + half, group = (int64_t)t->group[i] * ZQ_NR + half;
    const v16 s = v16_load(t->scale + group), now = v16_add(v, f), diag = v16_set1(t->diag[i]);
    if (t->shift) {
        v16_store(t->seen + at, now);
    }
    v16 code;
    const v16 x = t->rounding == ZQ_ROUND_V ? v : now;
    const v16 near = v16_mul(nearest(t->grid, v16_div(x, s), v16_load(t->zero + group), &code), s);
    const v16 w = t->rounding == ZQ_ROUND_NOT ? now : near;
    v16i_store_b8(t->codes + at, v16_to_i(code));
    const v16 e = v16_mul(v16_sub(now, w), diag), d = v16_sub(v, w);
    const v16 counted = v16_select_lt(v16_zero(), diag, d, v16_zero());
    v16_store(t->delta + at, d);
    v16_store(t->loss + half, v16_fma(e, e, v16_load(t->loss + half)));
    v16_store(t->size + half, v16_fma(counted, counted, v16_load(t->size + half)));
}

static void
LEVEL(gptq_columns_f32)(const zq_gptq_tile *t)
{
    for (int64_t i = 0; i < t->columns; i++) {
        const int64_t at = i * ZQ_NR;
        v16 v[2] = {v16_load(t->delta + at), v16_load(t->delta + at + 16)};
        v16 f[2] = {v16_load(t->f + at), v16_load(t->f + at + 16)};
        if (t->shift) {
            chain(t->shift + i * t->ld, t->seen, i, v);
        }
        chain(t->factor + i * t->ld, t->delta, i, f);
        round_column(t, i, 0, v[0], f[0]);
        round_column(t, i, 16, v[1], f[1]);
    }
}

static float
LEVEL(grid_error_f32)(const zq_grid *grid, const float *w, const float *weight, int64_t n, float scale, float zero)
{
    const v16 s = v16_set1(scale), z = v16_set1(zero);
    v16 sum = v16_zero(), code;
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t m = zq_min(n - i, 16);
        const v16 x = v16_loadn(w + i, m);
        const v16 d = v16_sub(v16_mul(nearest(grid, v16_div(x, s), z, &code), s), x);
        sum = v16_fma(v16_mul(v16_loadn(weight + i, m), d), d, sum); /* lanes behind the end weigh 0 */
    }
    return v16_hsum(sum);
}
