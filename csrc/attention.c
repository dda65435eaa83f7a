/* Multi-head attention in float32 over ragged sequences: per head O = softmax(scale Q K^T) V, keys in tiles and the
 * softmax carried along (Milakov and Gimelshein, arXiv:1805.02867; tiles as in FlashAttention, arXiv:2205.14135), so
 * that no (T, T) matrix exists.
 *
 * A query row goes over tiles of ZQ_KEY_TILE visible keys in order. With s the scores q k of a tile, m the running
 * maximum of s, l the running sum and o the running sum of p v:
 *     m' = max(m, max s)   c = 2^((m - m') f)   p = 2^((s - m') f)   l = l c + sum p   o = o c + p V
 * with f = scale / ln 2, and the result is o / l. A short sequence of which nothing is hidden goes through one kernel,
 * attend_few_f32, to the same bits. On codes (int8) attend_tile_b8 does all of this for a tile. Hidden keys are left out
 * when a tile is gathered. Each row's result depends on its own query and the visible keys of its sequence only: which rows
 * share a job, a tile of registers or a thread never shows in the bits. */
#include "attention_tile.h"

/* Query rows per job: bringing in a tile is paid once per so many rows, and their sums (132 KiB at 64 dimensions) stay in L2.
 * So large only where each thread has MANY_JOBS, or one waits for the other's last. */
enum { ITEM_ROWS = 528, LEAST_ITEM_ROWS = 33, MANY_JOBS = 8, ENOUGH_JOBS = 2 };

/* int8: query rows that attend_tile_b8 takes at once, a panel of pack_rows_s8. */
enum { LANES = ZQ_NR };
_Static_assert(ZQ_KEY_TILE % ZQ_KEY_BLOCK == 0, "attend_tile_b8 works on whole blocks of keys");

typedef struct {
    const zq_attention_args *a;
    const zq_kernels *K;
    int64_t item_rows;  /* query rows of a job */
    int64_t *first_job; /* (sequences + 1): jobs of one head before sequence s */
    zq_trouble trouble;
} attention;

/* One job: some query rows of one head of one sequence, and its working memory. */
typedef struct {
    const attention *t;
    int64_t head;
    int64_t row, rows;       /* query rows in the whole arrays */
    int64_t next_key, end;   /* keys not yet gathered, in the whole arrays */
    int64_t keys;            /* in the tile */
    int int8;                /* both products are of codes */
    int64_t dp;              /* head_dim rounded up to whole vectors, or panels of codes: what a copy of V fills */
    int64_t d4;              /* head_dim rounded up to 4 */
    float *kt;               /* panels of K^T */
    float *v;                /* (ZQ_KEY_TILE, dp) */
    const float *v_at;       /* the tile's rows of V, ld_v apart: w->v, or where they lie when all keys are visible */
    int64_t ld_v;
    float *s;                /* (mr, ZQ_KEY_TILE) scores, then p, rows ZQ_SCORE_PITCH apart; int8: (ZQ_KEY_TILE, LANES) */
    float *o;                /* (rows, dp) */
    float *max, *sum;        /* (rows): m and l */
    float *factor;           /* (rows): scale / ln 2 */
    /* int8; rows are filled up to a multiple of 16 with queries of zeros */
    uint8_t *row8, *q8;      /* (rows, d4): codes of the queries; the same in panels */
    int32_t *q_sum;          /* (rows): start of the scores: what 128 per code of k is too much */
    uint8_t *k8, *v8;        /* (ZQ_KEY_TILE, d4): codes + 128; V in panels */
    float *k_scale, *v_scale; /* (ZQ_KEY_TILE), (dp) */
    uint8_t *p8;             /* (ZQ_KEY_TILE, LANES) */
} item;

/* Rows of V that are read once (int8: packed) or so few that they stay in L1 need no copy, if none between them is hidden
 * and no columns have to be filled up. */
static int
reads_v_in_place(const item *w)
{
    const zq_attention_args *a = w->t->a;
    return !a->key_mask && (w->int8 || (w->end - w->next_key + w->keys <= ZQ_PANEL && w->dp == a->head_dim));
}

/* Visible keys [from, to) become columns keys.. of K^T and rows keys.. of V. They do not cross a panel of K^T. */
static void
gather_run(item *w, int64_t from, int64_t to)
{
    const zq_attention_args *a = w->t->a;
    const int64_t d = a->head_dim, dp = w->dp, d4 = w->d4, at = from * a->ld_kv + w->head * d;
    if (w->int8) {
        w->t->K->quantize_heads_f32_b8(a->k + at, to - from, d, a->ld_kv, 128, w->k8 + w->keys * d4, d4, w->k_scale + w->keys);
    }
    else {
        float *panel = w->kt + w->keys / ZQ_PANEL * ZQ_PANEL * d + w->keys % ZQ_PANEL;
        w->t->K->transpose_f32(a->k + at, to - from, d, a->ld_kv, panel, ZQ_PANEL);
    }
    if (reads_v_in_place(w)) {
        w->v_at = a->v + at;
        w->ld_v = a->ld_kv;
    }
    else {
        w->t->K->copy_rows_f32(a->v + at, to - from, d, a->ld_kv, w->v + w->keys * dp, dp);
        w->v_at = w->v;
        w->ld_v = dp;
    }
    w->keys += to - from;
}

/* int8: the tile's codes of V, and a look at its scales. */
static void
pack_values(item *w, zq_trouble *trouble)
{
    const zq_kernels *K = w->t->K;
    K->pack_columns_f32_s8(w->v_at, w->keys, w->t->a->head_dim, w->ld_v, w->v8, w->v_scale);
    if (!(K->absmax_f32(w->k_scale, w->keys) <= 1e25f && K->absmax_f32(w->v_scale, w->dp) <= FLT_MAX)) {
        zq_note_bad_row(trouble, w->row);
    }
}

/* The next tile of up to ZQ_KEY_TILE visible keys; 0 when there are none left. */
static int64_t
gather_tile(item *w, zq_trouble *trouble)
{
    const uint8_t *mask = w->t->a->key_mask;
    for (w->keys = 0; w->keys < ZQ_KEY_TILE && w->next_key < w->end;) {
        const int64_t from = w->next_key, room = w->int8 ? ZQ_KEY_TILE - w->keys : ZQ_PANEL - w->keys % ZQ_PANEL;
        int64_t to = from;
        while (to < w->end && to - from < room && (!mask || mask[to])) {
            to++;
        }
        if (to > from) {
            gather_run(w, from, to);
        }
        w->next_key = to > from ? to : from + 1;
    }
    if (w->int8) {
        pack_values(w, trouble);
        return w->keys;
    }
    /* the columns that fill up the last vector are computed and never read: they only must hold numbers */
    const int64_t d = w->t->a->head_dim, tail = zq_round_up(w->keys, 16) - w->keys;
    for (int64_t i = 0; tail && i < d; i++) {
        memset(w->kt + w->keys / ZQ_PANEL * ZQ_PANEL * d + i * ZQ_PANEL + w->keys % ZQ_PANEL, 0, (size_t)tail * sizeof *w->kt);
    }
    return w->keys;
}

/* The softmax of rows r .. of the scores in w->s. */
static zq_softmax_tile
softmax_of(const item *w, int64_t r, int64_t mr)
{
    const int64_t dp = w->dp;
    return (zq_softmax_tile){.s = w->s, .rows = mr, .keys = w->keys, .lds = ZQ_SCORE_PITCH, .factor = w->factor + r,
                             .max = w->max + r, .sum = w->sum + r, .o = w->o + r * dp, .n = dp, .ldo = dp};
}

/* One key tile for query rows r .. r + mr - 1. */
static void
tile_rows_f32(const item *w, int64_t r, int64_t mr, int first)
{
    const zq_attention_args *a = w->t->a;
    const int64_t dp = w->dp;
    const float *q = a->q + (w->row + r) * a->ld_q + w->head * a->head_dim;
    zq_score_panels(w->t->K, q, a->ld_q, mr, a->head_dim, w->kt, w->keys, w->s);
    const zq_softmax_tile softmax = softmax_of(w, r, mr);
    w->t->K->softmax_tile_f32(&softmax);
    const zq_tile tile = {.mr = (int)mr, .nr = (int)dp, .k = w->keys, .a = w->s, .lda = ZQ_SCORE_PITCH, .b = w->v_at,
                          .y = w->o + r * dp, .ldy = dp};
    w->t->K->matmul_f32(&tile, w->ld_v, ZQ_NR, !first);
}

/* The same on codes; mr up to LANES. */
static void
tile_rows_int8(const item *w, int64_t r, int64_t mr)
{
    const zq_code_tile tile = {.rows = mr, .keys = w->keys, .d4 = w->d4, .n = w->dp, .q = w->q8 + r * w->d4,
                               .start = w->q_sum + r, .k = w->k8, .k_scale = w->k_scale, .v = w->v8, .v_scale = w->v_scale,
                               .factor = w->factor + r, .max = w->max + r, .sum = w->sum + r, .o = w->o + r * w->dp,
                               .s = w->s, .p = w->p8};
    w->t->K->attend_tile_b8(&tile);
}

static void
tile_rows(const item *w, int first)
{
    /* row tiles differ by at most one row: a short one at the end would waste the kernel */
    const int64_t tiles = zq_ceil_div(w->rows, w->int8 ? LANES : w->t->K->mr_matmul);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t r = w->int8 ? i * LANES : i * w->rows / tiles;
        const int64_t rows = w->int8 ? zq_min(LANES, w->rows - r) : (i + 1) * w->rows / tiles - r;
        if (w->int8) {
            tile_rows_int8(w, r, rows);
        }
        else {
            tile_rows_f32(w, r, rows, first);
        }
    }
}

/* Codes of the queries; their scales go into the factors. */
static void
quantize_queries(item *w, zq_trouble *trouble)
{
    const zq_attention_args *a = w->t->a;
    const zq_kernels *K = w->t->K;
    const float *q = a->q + w->row * a->ld_q + w->head * a->head_dim, f = a->scale * ZQ_LOG2E;
    const int64_t lanes = zq_round_up(w->rows, 16);
    K->quantize_heads_f32_b8(q, w->rows, a->head_dim, a->ld_q, 0, w->row8, w->d4, w->factor);
    memset(w->row8 + w->rows * w->d4, 0, (size_t)((lanes - w->rows) * w->d4));
    K->pack_rows_s8(w->row8, lanes, w->d4, w->q8, w->q_sum);
    K->scale_f32(w->factor, w->rows, f, w->factor);
    for (int64_t r = 0; r < w->rows; r++) {
        if (!(w->factor[r] <= FLT_MAX)) {
            zq_note_bad_row(trouble, w->row + r);
        }
    }
}

/* Note the rows whose result is not finite; nearly always one look at all of them says none. */
static void
look_at_rows(const item *w, zq_trouble *trouble)
{
    const zq_kernels *K = w->t->K;
    const int64_t dp = w->dp;
    if (K->absmax_f32(w->o, w->rows * dp) <= FLT_MAX && K->absmax_f32(w->sum, w->rows) <= FLT_MAX &&
        K->absmax_f32(w->max, w->rows) <= FLT_MAX) {
        return;
    }
    for (int64_t r = 0; r < w->rows; r++) {
        if (!(K->absmax_f32(w->o + r * dp, dp) <= FLT_MAX && w->sum[r] <= FLT_MAX && fabsf(w->max[r]) <= FLT_MAX)) {
            zq_note_bad_row(trouble, w->row + r);
        }
    }
}

static void
write_rows(item *w, int any_keys, zq_trouble *trouble)
{
    const zq_attention_args *a = w->t->a;
    const int64_t d = a->head_dim, dp = w->dp;
    if (any_keys) {
        look_at_rows(w, trouble);
    }
    float *out = a->out + w->row * a->ld_out + w->head * d;
    if (any_keys) {
        w->t->K->divide_rows_f32(w->o, w->rows, d, dp, w->sum, out, a->ld_out);
    }
    for (int64_t r = 0; !any_keys && r < w->rows; r++) {
        memset(out + r * a->ld_out, 0, (size_t)d * sizeof *out);
    }
}

/* Memory of one item, out of this thread's scratch; 0 on failure. */
static int
carve(item *w)
{
    const attention *t = w->t;
    const int64_t f32 = (int64_t)sizeof(float), dp = w->dp, d = zq_round_up(t->a->head_dim, 16), d4 = w->int8 ? w->d4 : 0;
    const int64_t rows = zq_round_up(t->item_rows, LANES), tile = ZQ_KEY_TILE, buffers = 16;
    const int64_t scores = w->int8 ? tile * LANES : ZQ_SCORE_PITCH * t->K->mr_matmul;
    const int64_t floats = scores + tile * (d + dp + 1) + rows * (dp + 4) + dp;
    const int64_t codes = (2 * rows + tile) * d4 + tile * (dp + LANES);
    char *p = zq_scratch(ZQ_SCRATCH_NN, (size_t)(floats * f32 + codes + 64 * buffers));
    if (!p) {
        return 0;
    }
    w->kt = zq_take(&p, w->int8 ? 0 : tile * d * f32);
    w->v = zq_take(&p, tile * dp * f32);
    w->s = zq_take(&p, scores * f32);
    w->o = zq_take(&p, rows * dp * f32);
    w->max = zq_take(&p, rows * f32);
    w->sum = zq_take(&p, rows * f32);
    w->factor = zq_take(&p, rows * f32);
    if (w->int8) {
        w->row8 = zq_take(&p, rows * d4);
        w->q8 = zq_take(&p, rows * d4);
        w->q_sum = zq_take(&p, rows * f32);
        w->k8 = zq_take(&p, tile * d4);
        w->v8 = zq_take(&p, tile * dp);
        w->k_scale = zq_take(&p, tile * f32);
        w->v_scale = zq_take(&p, dp * f32);
        w->p8 = zq_take(&p, tile * LANES);
    }
    return 1;
}

/* A short sequence at once, with the scores in registers and L1: where nothing is hidden and all is finite. Else returns 0. */
static int
attend_few(const item *w)
{
    const zq_attention_args *a = w->t->a;
    const int64_t d = a->head_dim, keys = w->end - w->next_key, at = w->next_key * a->ld_kv + w->head * d;
    if (w->int8 || a->key_mask || keys > ZQ_FEW_KEYS || d > ZQ_FEW_DIM || d % 16 != 0) {
        return 0;
    }
    const zq_few_keys few = {.q = a->q + w->row * a->ld_q + w->head * d, .k = a->k + at, .v = a->v + at, .rows = w->rows,
                             .keys = keys, .head_dim = d, .ld_q = a->ld_q, .ld_kv = a->ld_kv,
                             .factor = a->scale * ZQ_LOG2E, .out = a->out + w->row * a->ld_out + w->head * d,
                             .ld_out = a->ld_out};
    return w->t->K->attend_few_f32(&few);
}

static void
attention_job(void *ctx, int64_t job)
{
    attention *t = ctx;
    const zq_attention_args *a = t->a;
    const int64_t per_head = job / a->heads, s = zq_find_sequence(t->first_job, a->sequences, per_head);
    const int64_t begin = a->offsets[s], end = a->offsets[s + 1], first = begin + (per_head - t->first_job[s]) * t->item_rows;
    item w = {.t = t, .head = job % a->heads, .row = first, .rows = zq_min(t->item_rows, end - first), .next_key = begin,
              .end = end, .int8 = a->int8_rows && end - begin >= a->int8_rows};
    w.dp = zq_round_up(a->head_dim, w.int8 ? ZQ_NR : 16);
    w.d4 = zq_round_up(a->head_dim, 4);
    if (attend_few(&w)) {
        return;
    }
    if (!carve(&w)) {
        atomic_store(&t->trouble.no_memory, 1);
        return;
    }
    zq_begin_softmax(zq_round_up(w.rows, 16), a->scale * ZQ_LOG2E, w.max, w.sum, w.factor);
    if (w.int8) {
        quantize_queries(&w, &t->trouble);
    }
    int any_keys = 0;
    while (gather_tile(&w, &t->trouble) > 0) {
        tile_rows(&w, !any_keys);
        any_keys = 1;
    }
    write_rows(&w, any_keys, &t->trouble);
}

/* Jobs per head with item_rows query rows each; fills first_job. */
static int64_t
count_jobs(attention *t)
{
    int64_t jobs = 0;
    for (int64_t s = 0; s < t->a->sequences; s++) {
        t->first_job[s] = jobs;
        jobs += zq_ceil_div(t->a->offsets[s + 1] - t->a->offsets[s], t->item_rows);
    }
    t->first_job[t->a->sequences] = jobs;
    return jobs;
}

zq_status
zq_attention(const zq_attention_args *a, int64_t *bad_row)
{
    attention t = {.a = a, .K = zq_active(), .item_rows = ITEM_ROWS};
    zq_trouble_init(&t.trouble);
    t.first_job = zq_scratch(ZQ_SCRATCH_JOBS, (size_t)(a->sequences + 1) * sizeof *t.first_job);
    if (!t.first_job) {
        return ZQ_ENOMEM;
    }
    int64_t jobs = count_jobs(&t);
    while (jobs * a->heads < zq_threads() * (t.item_rows == ITEM_ROWS ? MANY_JOBS : ENOUGH_JOBS) &&
           t.item_rows > LEAST_ITEM_ROWS) {
        t.item_rows /= 2;
        jobs = count_jobs(&t);
    }
    zq_parallel_for(jobs * a->heads, attention_job, &t);
    return zq_trouble_status(&t.trouble, bad_row);
}
