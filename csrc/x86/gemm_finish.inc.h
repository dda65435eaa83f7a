/* The rest of a tile's epilogue: y = act(v) + residual, where v is what the tile function stored, or for pairs of rows
 * the sum of two of these and the bias.
 *
 * Tiles with an activation, a residual, pairs of rows or a low-rank part are stored to a buffer of their own first (it never
 * leaves L1) and written to y once: reading back rows of y that were just stored waits for their cache lines. */
/* X(mr, far) for the height and the prefetching that t asks for, out of ROWS: one function per constant mr. */
#define NEAR_OR_FAR(ROWS, X)              \
    if (!t->ahead) {                      \
        switch (t->mr) { ROWS(X, 0) }     \
    }                                     \
    else if (t->ahead_step < 128) {       \
        switch (t->mr) { ROWS(X, 1) }     \
    }                                     \
    else {                                \
        switch (t->mr) { ROWS(X, 2) }     \
    }

/* The same, with functions of their own for what a single tile of up to `most` rows, those of LOW, fetches to L2: where
 * t->ahead_to_l2 says so, `far` is 2 | TO_L2. A choice within the loops of products costs some percent. Float32 weights,
 * taller tiles and several of them fetch to L1 always: they gain little, or gcc 12 spills. */
#define NEAR_OR_FAR_OR_MEMORY(ROWS, LOW, most, X)                                       \
    if (t->ahead && t->ahead_to_l2 && t->ahead_step == 128 && t->mr <= (most)) {        \
        switch (t->mr) { LOW(X, 2 | TO_L2) }                                            \
    }                                                                                   \
    else {                                                                              \
        NEAR_OR_FAR(ROWS, X)                                                            \
    }

enum { TO_L2 = 4 };

ZQ_INLINE void
fetch(const int far, const char *p)
{
    if (far & TO_L2) {
        _mm_prefetch(p, _MM_HINT_T1);
    }
    else {
        _mm_prefetch(p, _MM_HINT_T0);
    }
}

/* From here on what p points to lies in memory, and nothing read before is still in a register. */
ZQ_INLINE void
leave_registers(const void *p)
{
    __asm__ volatile("" ::"r"(p) : "memory");
}

enum { FINISH_ROWS = 16, FINISH_TOGETHER = 2 };

typedef void (*tile_fn)(const zq_tile *t);

/* sum + low low_b, of columns j .. j + 16 of row i */
ZQ_INLINE v16
add_low_rank(const zq_tile *t, v16 sum, int i, int j)
{
    for (int64_t r = 0; r < t->rank; r++) {
        sum = v16_fma(v16_set1(t->low[i * t->ld_low + r]), v16_load(t->low_b + r * ZQ_NR + j), sum);
    }
    return sum;
}

/* y + residual to row i, columns j .. j + n */
ZQ_INLINE void
store_finished(const zq_tile *t, v16 y, int i, int j, int64_t n)
{
    if (t->residual) {
        const float *r = t->residual + i * t->ldr + j;
        y = v16_add(y, n == 16 ? v16_load(r) : v16_loadn(r, n));
    }
    float *out = t->y + i * t->ldy + j;
    if (n < 16) {
        v16_storen(out, y, n);
    }
    else if (t->stream) {
        v16_stream(out, y);
    }
    else {
        v16_store(out, y);
    }
}

/* sum: y before the activation and what is added there, of columns j .. j + n of row i */
ZQ_INLINE void
finish_vector(const zq_tile *t, v16 sum, int i, int j, int64_t n, const zq_activation act)
{
    store_finished(t, v16_activate(add_low_rank(t, sum, i, j), act), i, j, n);
}

/* `rows` <= FINISH_TOGETHER whole rows from i on: their vectors in step, as one chain does not fill the pipes. */
ZQ_INLINE void
finish_together(const zq_tile *t, const float *v, int i, const int rows, const zq_activation act)
{
    enum { BY = ZQ_NR / 16 };
    v16 y[BY * FINISH_TOGETHER];
#define EACH ZQ_UNROLL(8) for (int u = 0; u < BY * rows; u++)
    EACH { y[u] = add_low_rank(t, v16_load(v + i * ZQ_NR + 16 * u), i + u / BY, u % BY * 16); }
    v16_activates(y, act, BY * rows);
    EACH { store_finished(t, y[u], i + u / BY, u % BY * 16, 16); }
#undef EACH
}

ZQ_INLINE void
finish_rows(const zq_tile *t, const float *v, const zq_activation act)
{
    if (t->nr == ZQ_NR && !t->pairs) {
        int i = 0;
        for (; i + FINISH_TOGETHER <= t->mr; i += FINISH_TOGETHER) {
            finish_together(t, v, i, FINISH_TOGETHER, act);
        }
        for (; i < t->mr; i++) {
            finish_together(t, v, i, 1, act);
        }
        return;
    }
    for (int j = 0; j < t->nr; j += 16, v += 16) {
        const int64_t n = zq_min(t->nr - j, 16);
        if (t->pairs) {
            const v16 bias = v16_load(t->bias + j);
            for (int i = 0; i < t->mr / 2; i++) {
                const float *high = v + 2 * i * ZQ_NR;
                finish_vector(t, v16_add(v16_add(v16_load(high), v16_load(high + ZQ_NR)), bias), i, j, n, act);
            }
        }
        else {
            for (int i = 0; i < t->mr; i++) {
                finish_vector(t, v16_load(v + i * ZQ_NR), i, j, n, act);
            }
        }
    }
}

/* One loop per activation, so that the choice is made once per tile. v is (mr, ZQ_NR). */
static void
finish_tile(const zq_tile *t, const float *v)
{
    switch (t->act) {
    case ZQ_ACT_NONE: finish_rows(t, v, ZQ_ACT_NONE); break;
    case ZQ_ACT_RELU: finish_rows(t, v, ZQ_ACT_RELU); break;
    case ZQ_ACT_GELU: finish_rows(t, v, ZQ_ACT_GELU); break;
    case ZQ_ACT_GELU_TANH: finish_rows(t, v, ZQ_ACT_GELU_TANH); break;
    case ZQ_ACT_SILU: finish_rows(t, v, ZQ_ACT_SILU); break;
    case ZQ_ACTS: break;
    }
}

/* Its rows come from far away, and are needed when the products are done. */
ZQ_INLINE void
prefetch_residual(const zq_tile *t)
{
    for (int i = 0; t->residual && i < t->mr / (t->pairs ? 2 : 1); i++) {
        const char *p = (const char *)(t->residual + i * t->ldr);
        _mm_prefetch(p, _MM_HINT_T0);
        _mm_prefetch(p + 64, _MM_HINT_T0);
    }
}

/* Nothing is left to do after the tile function. */
ZQ_INLINE int
is_plain(const zq_tile *t)
{
    return t->sums_out || (t->act == ZQ_ACT_NONE && !t->residual && !t->pairs && !t->rank);
}

/* `call` for each tile that t describes, with `more` 0. */
#define EACH_TILE(t, call) \
    for (int64_t left = (t)->more; (t)->more = 0, (call), left > 0; left--) { zq_tile_next(t); }

/* t is one tile. */
ZQ_INLINE void
run_one(zq_tile *t, const tile_fn tile)
{
    static const float no_bias[ZQ_NR];
    if (is_plain(t)) {
        tile(t);
        return;
    }
    _Alignas(64) float v[FINISH_ROWS * ZQ_NR];
    /* In place, not in a copy of *t: its fields were stored one by one a moment ago, and reading them back in vectors would
     * wait for that. */
    float *const y = t->y;
    const float *const bias = t->bias, *const residual = t->residual;
    const int64_t ldy = t->ldy;
    const int stream = t->stream, nr = t->nr;
    t->y = v;
    t->ldy = ZQ_NR;
    t->nr = nr <= 16 ? 16 : ZQ_NR; /* columns that do not exist have zero weights, scales and biases: 0s go into the buffer */
    t->stream = 0;
    t->bias = t->pairs ? no_bias : bias;
    prefetch_residual(t);
    t->residual = NULL;
    tile(t);
    t->y = y;
    t->ldy = ldy;
    t->nr = nr;
    t->stream = stream;
    t->bias = bias;
    t->residual = residual;
    finish_tile(t, v);
}

ZQ_INLINE void
run_tile(zq_tile *t, const tile_fn tile)
{
    EACH_TILE(t, run_one(t, tile))
}
