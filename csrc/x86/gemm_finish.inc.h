/* The rest of a tile's epilogue, over the rows just stored: y = act(y) + residual. */
ZQ_INLINE void
finish_row(const zq_tile *t, int i, zq_activation act)
{
    float *y = t->y + i * t->ldy;
    for (int j = 0; j < t->nr; j += 16) {
        const int64_t n = zq_min(16, t->nr - j);
        v16 v = v16_activate(v16_loadn(y + j, n), act);
        if (t->residual) {
            v = v16_add(v, v16_loadn(t->residual + i * t->ldr + j, n));
        }
        v16_storen(y + j, v, n);
    }
}

ZQ_INLINE void
finish_rows(const zq_tile *t, const zq_activation act)
{
    for (int i = 0; i < t->mr; i++) {
        finish_row(t, i, act);
    }
}

/* One loop per activation, so that the choice is made once per tile. */
static void
finish_tile(const zq_tile *t)
{
    switch (t->act) {
    case ZQ_ACT_NONE:
        if (t->residual) {
            finish_rows(t, ZQ_ACT_NONE);
        }
        break;
    case ZQ_ACT_RELU: finish_rows(t, ZQ_ACT_RELU); break;
    case ZQ_ACT_GELU: finish_rows(t, ZQ_ACT_GELU); break;
    case ZQ_ACT_GELU_TANH: finish_rows(t, ZQ_ACT_GELU_TANH); break;
    case ZQ_ACT_SILU: finish_rows(t, ZQ_ACT_SILU); break;
    case ZQ_ACTS: break;
    }
}
