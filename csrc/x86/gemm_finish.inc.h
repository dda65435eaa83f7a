/* The rest of a tile's epilogue: y = act(v) + residual, where v is what the tile function stored.
 *
 * Tiles with an activation or a residual are stored to a buffer of their own first (it never leaves L1) and written
 * to y once: reading back rows of y that were just stored waits for their cache lines. */
#define FINISH_ROWS 16

typedef void (*tile_fn)(const zq_tile *t);

ZQ_INLINE void
finish_vector(const zq_tile *t, const float *v, int i, int j, int64_t n, const zq_activation act)
{
    v16 y = v16_activate(v16_load(v), act);
    if (t->residual) {
        const float *r = t->residual + i * t->ldr + j;
        y = v16_add(y, n == 16 ? v16_load(r) : v16_loadn(r, n));
    }
    if (n == 16) {
        v16_store(t->y + i * t->ldy + j, y);
    }
    else {
        v16_storen(t->y + i * t->ldy + j, y, n);
    }
}

ZQ_INLINE void
finish_rows(const zq_tile *t, const float *v, const zq_activation act)
{
    for (int i = 0; i < t->mr; i++, v += ZQ_NR) {
        finish_vector(t, v, i, 0, zq_min(t->nr, 16), act);
        if (t->nr > 16) {
            finish_vector(t, v + 16, i, 16, t->nr - 16, act);
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

ZQ_INLINE void
run_tile(const zq_tile *t, const tile_fn tile)
{
    if (t->act == ZQ_ACT_NONE && !t->residual) {
        tile(t);
        return;
    }
    _Alignas(64) float v[FINISH_ROWS * ZQ_NR];
    zq_tile local = *t;
    local.y = v;
    local.ldy = ZQ_NR;
    local.stream = 0;
    local.nr = ZQ_NR; /* columns that do not exist have zero weights, scales and biases: 0 goes into the buffer */
    tile(&local);
    finish_tile(t, v);
}
