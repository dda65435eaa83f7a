/* Causal attention over the key-value cache, for prefill and decoding alike. attention.c has the equations; here the keys
 * are in pages, already transposed, and a query sees those up to its own position.
 *
 * One layer of a pass has two parts, threads over each: append (norm, rotary, transpose or quantize; a job is the tokens of
 * one sequence that share a panel of K^T), and attend (a job is a block of queries of one sequence and kv head).
 *
 * The queries of all heads that share a kv head are rows of one matrix, so each page is read once for all of them; in
 * decoding that is the whole job. Tiles of keys start at multiples of ZQ_KEY_TILE positions and a row's sums at multiples of
 * ZQ_KV_PAGE, whatever else is in the pass. What a row cannot see but another row of the block can has p = 0, and
 * adding 0 * v to a sum changes nothing but the sign of a zero, which the end removes. So how a prompt is cut into passes and
 * blocks never shows in the bits. */
#include "kv_page.h"

#include <string.h>

enum { ITEM_ROWS = 264 /* query rows per job: bringing in a tile is paid once per so many rows */ };

typedef struct {
    zq_kv *c;
    const zq_kv_attention *a;
    int64_t layer;
    const zq_kernels *K;
    int64_t group;         /* heads of q per kv head */
    int64_t dp;            /* head_dim rounded up to whole vectors */
    int64_t block_queries; /* per job */
    int64_t *first_job;    /* (sequences + 1): jobs before sequence s (times kv_heads when attending) */
    zq_trouble trouble;
} kv_pass;

static int64_t
new_tokens(const kv_pass *t, int64_t s)
{
    return t->a->offsets[s + 1] - t->a->offsets[s];
}

/* `heads` adjacent heads of one token: norm, then rotary. NaN and Inf show in y. */
static void
prepare_heads(const kv_pass *t, const float *x, int64_t heads, const float *norm, int64_t position, float *y)
{
    const zq_rope *rope = &t->a->rope;
    const int64_t d = t->c->head_dim;
    for (int64_t h = 0; norm && h < heads; h++) {
        if (!t->K->rmsnorm_f32(x + h * d, NULL, norm, d, t->a->eps, y + h * d)) {
            y[h * d] = NAN;
        }
    }
    x = norm ? y : x;
    if (rope->cos) {
        const int64_t at = position * rope->half;
        t->K->rotary_f32(x, heads, d, rope->half, rope->interleaved, rope->cos + at, rope->sin + at, y);
    }
    else if (x != y) {
        memcpy(y, x, (size_t)(heads * d) * sizeof *y);
    }
}

static int
is_finite(const kv_pass *t, const float *x, int64_t n)
{
    return t->K->absmax_f32(x, n) <= FLT_MAX;
}

/* Note which of the rows, numbered from `first`, hold NaN or Inf; nearly always one look at all of them says none. */
static void
look_at_rows(const kv_pass *t, const float *x, int64_t rows, int64_t n, int64_t first, zq_trouble *trouble)
{
    for (int64_t i = 0; i < rows && !is_finite(t, x + i * n, (rows - i) * n); i++) {
        if (!is_finite(t, x + i * n, n)) {
            zq_note_bad_row(trouble, first + i);
        }
    }
}

/* ---- append ------------------------------------------------------------------------------------------ */

/* Tokens of one sequence that lie in one panel. */
typedef struct {
    const kv_pass *t;
    int64_t sequence, row, position, count;
} run;

static void
store_f32(const run *w, const kv_view *page, const float *k, const float *v, int64_t ld_v)
{
    const int64_t d = w->t->c->head_dim, dp = w->t->dp, at = w->position % ZQ_KV_PAGE;
    w->t->K->transpose_f32(k, w->count, d, d, page->kt + at / ZQ_PANEL * ZQ_PANEL * d + at % ZQ_PANEL, ZQ_PANEL);
    w->t->K->copy_rows_f32(v, w->count, d, ld_v, page->v + at * dp, dp);
}

static void
store_int8(const run *w, const kv_view *page, const float *k, const float *v, int64_t ld_v, uint8_t *codes)
{
    const zq_kernels *K = w->t->K;
    const int64_t d = w->t->c->head_dim;
    int32_t zero;
    for (int64_t i = 0; i < w->count; i++) {
        const int64_t at = w->position % ZQ_KV_PAGE + i;
        uint8_t *column = page->k_codes + at / ZQ_PANEL * ZQ_PANEL * d + at % ZQ_PANEL;
        (void)zq_quantize_token(K, k + i * d, d, ZQ_QUANT_TOKEN_SYM, codes, page->k_scale + at, &zero);
        for (int64_t j = 0; j < d; j++) {
            column[j * ZQ_PANEL] = codes[j];
        }
        (void)zq_quantize_token(K, v + i * ld_v, d, ZQ_QUANT_TOKEN_SYM, page->v_codes + at * d, page->v_scale + at, &zero);
    }
}

/* One kv head of the run. scratch: (ZQ_PANEL + 1) * head_dim floats. */
static void
append_head(const run *w, int64_t head, float *scratch, zq_trouble *trouble)
{
    const kv_pass *t = w->t;
    const zq_kv *c = t->c;
    const int64_t d = c->head_dim, ld = t->a->ld_qkv;
    const float *k = t->a->qkv + w->row * ld + (t->a->heads + head) * d, *v = k + c->kv_heads * d;
    for (int64_t i = 0; i < w->count; i++) {
        prepare_heads(t, k + i * ld, 1, t->a->k_norm, w->position + i, scratch + i * d);
        if (!is_finite(t, v + i * ld, d)) {
            zq_note_bad_row(trouble, w->row + i);
        }
    }
    look_at_rows(t, scratch, w->count, d, w->row, trouble);
    const kv_view page = kv_head(c, kv_pages(c, t->layer, w->sequence), w->position / ZQ_KV_PAGE, head);
    if (c->int8) {
        store_int8(w, &page, scratch, v, ld, (uint8_t *)(scratch + ZQ_PANEL * d));
    }
    else {
        store_f32(w, &page, scratch, v, ld);
    }
}

static void
append_job(void *ctx, int64_t job)
{
    kv_pass *t = ctx;
    const int64_t s = zq_find_sequence(t->first_job, t->c->sequences, job);
    const int64_t length = t->c->length[s], panel = length / ZQ_PANEL + job - t->first_job[s];
    const int64_t from = zq_max(length, panel * ZQ_PANEL), to = zq_min(length + new_tokens(t, s), (panel + 1) * ZQ_PANEL);
    const run w = {.t = t, .sequence = s, .row = t->a->offsets[s] + from - length, .position = from, .count = to - from};
    float *scratch = zq_scratch(ZQ_SCRATCH_NN, (size_t)((ZQ_PANEL + 1) * t->c->head_dim) * sizeof *scratch);
    if (!scratch) {
        atomic_store(&t->trouble.no_memory, 1);
        return;
    }
    for (int64_t head = 0; head < t->c->kv_heads; head++) {
        append_head(&w, head, scratch, &t->trouble);
    }
}

/* Panels that the new tokens of each sequence touch. */
static int64_t
count_append_jobs(kv_pass *t)
{
    int64_t jobs = 0;
    for (int64_t s = 0; s < t->c->sequences; s++) {
        const int64_t length = t->c->length[s], n = new_tokens(t, s);
        t->first_job[s] = jobs;
        jobs += n ? (length + n - 1) / ZQ_PANEL - length / ZQ_PANEL + 1 : 0;
    }
    t->first_job[t->c->sequences] = jobs;
    return jobs;
}

/* ---- attend ------------------------------------------------------------------------------------------ */

enum { TILE_PAGES = ZQ_KEY_TILE / ZQ_KV_PAGE };

/* One job: some queries of one sequence, in all heads of q that share a kv head. Row r is query r / group, head r % group
 * of the group. And its working memory. */
typedef struct {
    const kv_pass *t;
    int64_t sequence, head;     /* of k and v */
    int64_t row, queries;       /* in qkv */
    float *out;                 /* of the first query */
    int64_t position;           /* of the first query */
    int64_t tile;               /* position of the current tile of keys */
    kv_view page[TILE_PAGES];
    float *q;        /* (rows, head_dim), normalized and rotated */
    float *s;        /* (mr, ZQ_KEY_TILE) scores, then p, rows ZQ_SCORE_PITCH apart */
    float *o;        /* (rows, dp) */
    float *max, *sum, *factor; /* (rows) */
    float *kt8, *v8; /* int8: pages of the tile, dequantized */
} block;

/* First key that the query at `position` sees. */
static int64_t
first_key(const kv_pass *t, int64_t position)
{
    return t->a->window > 0 ? zq_max(0, position - t->a->window + 1) : 0;
}

/* K of a page, float32, its first `keys` keys: as it lies there, or dequantized to `scratch`. */
static const float *
page_kt(const block *w, const kv_view *page, int64_t keys, float *scratch)
{
    const int64_t d = w->t->c->head_dim;
    for (int64_t key = 0; page->k_codes && key < keys; key += ZQ_PANEL) {
        w->t->K->dequantize_cols_u8_f32(page->k_codes + key * d, d, ZQ_PANEL, page->k_scale + key, 128, scratch + key * d);
    }
    return page->k_codes ? scratch : page->kt;
}

static const float *
page_v(const block *w, const kv_view *page, int64_t keys, float *scratch)
{
    const int64_t d = w->t->c->head_dim, dp = w->t->dp;
    for (int64_t key = 0; page->v_codes && key < keys; key++) {
        w->t->K->dequantize_b8_f32(page->v_codes + key * d, d, 0, page->v_scale[key], 128, scratch + key * dp);
        if (dp > d) {
            memset(scratch + key * dp + d, 0, (size_t)(dp - d) * sizeof *scratch);
        }
    }
    return page->v_codes ? scratch : page->v;
}

/* Bring in the pages of the tile that hold keys [from, to), positions. Where one tile of rows will read them, codes stay
 * codes until then: that reader dequantizes a page at a time, into L1. */
static void
load_tile(block *w, int64_t from, int64_t to)
{
    const zq_kv *c = w->t->c;
    const zq_kv_pages *pages = kv_pages(c, w->t->layer, w->sequence);
    for (int64_t page = from / ZQ_KV_PAGE; page * ZQ_KV_PAGE < to; page++) {
        const int64_t i = page % TILE_PAGES, keys = zq_min(ZQ_KV_PAGE, to - page * ZQ_KV_PAGE);
        kv_view *view = &w->page[i];
        *view = kv_head(c, pages, page, w->head);
        if (c->int8 && w->queries * w->t->group > w->t->K->mr_matmul) {
            float *kt = w->kt8 + i * ZQ_KV_PAGE * c->head_dim, *v = w->v8 + i * ZQ_KV_PAGE * w->t->dp;
            (void)page_kt(w, view, keys, kt);
            (void)page_v(w, view, keys, v);
            *view = (kv_view){.kt = kt, .v = v};
        }
    }
}

/* Scores to p over keys [from, to) of the tile for rows r .., which see keys [lo, hi) of them. */
static void
softmax_rows(const block *w, int64_t r, int64_t rows, float *s, int64_t lo, int64_t hi)
{
    const int64_t dp = w->t->dp;
    const zq_softmax_tile tile = {.s = s + lo, .rows = rows, .keys = hi - lo, .lds = ZQ_SCORE_PITCH, .factor = w->factor + r,
                                  .max = w->max + r, .sum = w->sum + r, .o = w->o + r * dp, .n = dp, .ldo = dp};
    w->t->K->softmax_tile_f32(&tile);
}

/* Scores to p over keys [from, to) of the tile for rows r .. r + mr - 1: each sees a part that begins in the first page. */
static void
softmax_tile(const block *w, int64_t r, int64_t mr, int64_t from, int64_t to)
{
    const kv_pass *t = w->t;
    const int64_t first = w->position + r / t->group, last = w->position + (r + mr - 1) / t->group;
    if (first_key(t, last) <= w->tile + from && w->tile + to <= first + 1) {
        softmax_rows(w, r, mr, w->s, from, to);
        return;
    }
    for (int64_t i = 0; i < mr; i++) {
        const int64_t position = w->position + (r + i) / t->group;
        const int64_t lo = zq_max(from, first_key(t, position) - w->tile), hi = zq_min(to, position + 1 - w->tile);
        float *s = w->s + i * ZQ_SCORE_PITCH;
        softmax_rows(w, r + i, 1, s, lo, hi);
        memset(s + from, 0, (size_t)(lo - from) * sizeof *s);
        memset(s + hi, 0, (size_t)(to - hi) * sizeof *s);
    }
}

/* Fetch ahead n floats. */
ZQ_INLINE void
prefetch(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) {
        __builtin_prefetch(x + i, 0, 3);
    }
}

/* A decoding step waits for memory. The product fetches ahead what is behind its page; what begins the part that it reads
 * after page i of a tile (of K; of V) is elsewhere: page i + 1, or at the end of K the first of V. */
ZQ_INLINE void
prefetch_next_part(const block *w, int64_t mr, int64_t key, int64_t from, int64_t to, int of_v)
{
    const int64_t next = key + ZQ_KV_PAGE;
    if (mr > 8 || w->t->c->int8 || (of_v && next >= to)) {
        return;
    }
    const kv_view *page = &w->page[(next < to ? next : from) / ZQ_KV_PAGE];
    prefetch(of_v || next >= to ? page->v : page->kt, zq_min(1024, ZQ_KV_PAGE * w->t->c->head_dim));
}

/* One tile of keys for rows r .. r + mr - 1, each of which sees some of it. */
static void
tile_rows(const block *w, int64_t r, int64_t mr)
{
    const kv_pass *t = w->t;
    const int64_t d = t->c->head_dim, dp = t->dp, first = w->position + r / t->group,
                  last = w->position + (r + mr - 1) / t->group;
    const int64_t to = zq_min(ZQ_KEY_TILE, last + 1 - w->tile);
    const int64_t from = zq_max(0, first_key(t, first) - w->tile) / ZQ_KV_PAGE * ZQ_KV_PAGE;
    for (int64_t key = from; key < to; key += ZQ_KV_PAGE) {
        const int64_t keys = zq_min(ZQ_KV_PAGE, to - key);
        prefetch_next_part(w, mr, key, from, to, 0);
        zq_score_panels(t->K, w->q + r * d, d, mr, d, page_kt(w, &w->page[key / ZQ_KV_PAGE], keys, w->kt8), keys, w->s + key);
    }
    softmax_tile(w, r, mr, from, to);
    zq_tile tile = {.mr = (int)mr, .nr = (int)dp, .lda = ZQ_SCORE_PITCH, .y = w->o + r * dp, .ldy = dp};
    for (int64_t key = from; key < to; key += ZQ_KV_PAGE) {
        tile.k = zq_min(ZQ_KV_PAGE, to - key);
        tile.a = w->s + key;
        prefetch_next_part(w, mr, key, from, to, 1);
        tile.b = page_v(w, &w->page[key / ZQ_KV_PAGE], tile.k, w->v8);
        t->K->matmul_f32(&tile, dp, ZQ_NR, 1);
    }
}

/* The rows that see something of the tile at w->tile: a suffix (causality) of a prefix (window) of the queries. */
static void
attend_tile(block *w)
{
    const kv_pass *t = w->t;
    const int64_t end = w->tile + ZQ_KEY_TILE, window = t->a->window;
    const int64_t q0 = zq_max(0, w->tile - w->position);
    const int64_t q1 = window > 0 ? zq_min(w->queries, end - w->position + window - 1) : w->queries;
    const int64_t from = zq_max(w->tile, first_key(t, w->position + q0)), to = zq_min(end, w->position + q1);
    load_tile(w, from, to);
    /* row tiles differ by at most one row: a short one at the end would waste the kernel */
    const int64_t r0 = q0 * t->group, rows = (q1 - q0) * t->group, tiles = zq_ceil_div(rows, t->K->mr_matmul);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t r = i * rows / tiles;
        tile_rows(w, r0 + r, (i + 1) * rows / tiles - r);
    }
}

/* Queries ready for the product, sums at their beginning. */
static void
begin_block(const block *w, zq_trouble *trouble)
{
    const kv_pass *t = w->t;
    const int64_t d = t->c->head_dim, rows = w->queries * t->group;
    const float *q = t->a->qkv + w->row * t->a->ld_qkv + w->head * t->group * d;
    for (int64_t i = 0; i < w->queries; i++) {
        prefetch(q + zq_min(i + 2, w->queries - 1) * t->a->ld_qkv, t->group * d);
        prepare_heads(t, q + i * t->a->ld_qkv, t->group, t->a->q_norm, w->position + i, w->q + i * t->group * d);
    }
    look_at_rows(t, w->q, w->queries, t->group * d, w->row, trouble);
    memset(w->o, 0, (size_t)(rows * t->dp) * sizeof *w->o);
    zq_begin_softmax(rows, t->a->scale * ZQ_LOG2E, w->max, w->sum, w->factor);
}

static void
end_block(const block *w, zq_trouble *trouble)
{
    const kv_pass *t = w->t;
    const int64_t d = t->c->head_dim;
    for (int64_t i = 0; i < w->queries; i++) {
        float *out = w->out + i * t->a->ld_out + w->head * t->group * d;
        t->K->divide_rows_f32(w->o + i * t->group * t->dp, t->group, d, t->dp, w->sum + i * t->group, out, d);
    }
    look_at_rows(t, w->o, w->queries, t->group * t->dp, w->row, trouble);
    look_at_rows(t, w->sum, w->queries, t->group, w->row, trouble);
}

/* Memory of one job, out of this thread's scratch; 0 on failure. */
static int
carve(block *w)
{
    const kv_pass *t = w->t;
    const int64_t d = t->c->head_dim, dp = t->dp, rows = t->block_queries * t->group;
    const int64_t scores = ZQ_SCORE_PITCH * t->K->mr_matmul;
    const int64_t floats = scores + ZQ_KEY_TILE * (t->c->int8 ? d + dp : 0) + rows * (d + dp + 3);
    float *p = zq_scratch(ZQ_SCRATCH_NN, (size_t)floats * sizeof *p);
    if (!p) {
        return 0;
    }
    w->s = p;
    w->kt8 = w->s + scores;
    w->v8 = w->kt8 + (t->c->int8 ? ZQ_KEY_TILE * d : 0);
    w->o = w->v8 + (t->c->int8 ? ZQ_KEY_TILE * dp : 0);
    w->q = w->o + rows * dp;
    w->max = w->q + rows * d;
    w->sum = w->max + rows;
    w->factor = w->sum + rows;
    return 1;
}

/* Block b of one kv head: some queries of one sequence, or one wanted row. */
static block
find_block(const kv_pass *t, int64_t b, int64_t head)
{
    const zq_kv_attention *a = t->a;
    block w = {.t = t, .head = head, .queries = 1};
    if (a->wanted) {
        w.row = a->wanted[b];
        w.sequence = zq_find_sequence(a->offsets, t->c->sequences, w.row);
        w.out = a->out + b * a->ld_out;
    }
    else {
        const int64_t s = w.sequence = zq_find_sequence(t->first_job, t->c->sequences, b);
        /* the last block sees the most keys: it goes first */
        const int64_t first = (t->first_job[s + 1] - 1 - b) * t->block_queries;
        w.row = a->offsets[s] + first;
        w.queries = zq_min(t->block_queries, new_tokens(t, s) - first);
        w.out = a->out + w.row * a->ld_out;
    }
    w.position = t->c->length[w.sequence] + w.row - a->offsets[w.sequence];
    return w;
}

static void
attend_job(void *ctx, int64_t job)
{
    kv_pass *t = ctx;
    block w = find_block(t, job / t->c->kv_heads, job % t->c->kv_heads);
    if (!carve(&w)) {
        atomic_store(&t->trouble.no_memory, 1);
        return;
    }
    begin_block(&w, &t->trouble);
    w.tile = first_key(t, w.position) / ZQ_KEY_TILE * ZQ_KEY_TILE;
    for (; w.tile < w.position + w.queries; w.tile += ZQ_KEY_TILE) {
        attend_tile(&w);
    }
    end_block(&w, &t->trouble);
}

/* Jobs per kv head; fewer queries each while there are too few jobs for the threads. */
static int64_t
count_attend_jobs(kv_pass *t)
{
    const int64_t sequences = t->c->sequences;
    if (t->a->wanted) {
        t->block_queries = 1;
        return t->a->wanted_count;
    }
    t->block_queries = zq_max(1, ITEM_ROWS / t->group);
    for (;; t->block_queries = zq_ceil_div(t->block_queries, 2)) {
        int64_t jobs = 0;
        for (int64_t s = 0; s < sequences; s++) {
            t->first_job[s] = jobs;
            jobs += zq_ceil_div(new_tokens(t, s), t->block_queries);
        }
        t->first_job[sequences] = jobs;
        const int small = t->block_queries == 1 || t->block_queries * t->group <= ITEM_ROWS / 8;
        if (small || jobs * t->c->kv_heads >= 4 * zq_threads()) {
            return jobs;
        }
    }
}

/* ---- a pass ------------------------------------------------------------------------------------------ */

/* Whether `layer` is the next of the pass, with the tokens that layer 0 had; layer 0 begins a pass. */
static int
enter_layer(const kv_pass *t)
{
    zq_kv *c = t->c;
    int same = t->layer == 0 || t->layer == c->next_layer;
    for (int64_t s = 0; s < c->sequences; s++) {
        same = same && (t->layer == 0 || c->step[s] == new_tokens(t, s));
    }
    for (int64_t s = 0; t->layer == 0 && s < c->sequences; s++) {
        c->step[s] = new_tokens(t, s);
    }
    return same;
}

static void
leave_layer(const kv_pass *t)
{
    zq_kv *c = t->c;
    c->next_layer = t->layer + 1;
    if (c->next_layer == c->layers) {
        c->next_layer = 0;
        for (int64_t s = 0; s < c->sequences; s++) {
            c->length[s] += c->step[s];
        }
    }
}

static zq_status
run_pass(kv_pass *t, int64_t *bad_row)
{
    zq_status status = ZQ_OK;
    for (int64_t s = 0; status == ZQ_OK && s < t->c->sequences; s++) {
        status = zq_kv_reserve(t->c, t->layer, s, t->c->length[s] + new_tokens(t, s));
    }
    if (status == ZQ_OK) {
        zq_parallel_for(count_append_jobs(t), append_job, t);
        status = zq_trouble_status(&t->trouble, bad_row);
    }
    if (status == ZQ_OK) {
        zq_parallel_for(count_attend_jobs(t) * t->c->kv_heads, attend_job, t);
        status = zq_trouble_status(&t->trouble, bad_row);
    }
    return status;
}

zq_status
zq_kv_attend(zq_kv *c, int64_t layer, const zq_kv_attention *a, int64_t *bad_row)
{
    kv_pass t = {.c = c, .a = a, .layer = layer, .K = zq_active(), .group = a->heads / c->kv_heads};
    t.dp = zq_round_up(c->head_dim, 16);
    if (!enter_layer(&t)) {
        return ZQ_ERANGE;
    }
    zq_trouble_init(&t.trouble);
    t.first_job = zq_scratch(ZQ_SCRATCH_JOBS, (size_t)(c->sequences + 1) * sizeof *t.first_job);
    if (!t.first_job) {
        return ZQ_ENOMEM;
    }
    const zq_status status = run_pass(&t, bad_row);
    if (status == ZQ_OK) {
        leave_layer(&t);
    }
    else {
        c->next_layer = 0;
    }
    return status;
}

/* ---- rotary embedding alone -------------------------------------------------------------------------- */

enum { ROTARY_JOB_ITEMS = 16384 }; /* elements: some microseconds of work */

typedef struct {
    const float *x;
    const int64_t *position;
    int64_t m, heads, head_dim, rows_per_job;
    const zq_rope *rope;
    float *y;
    const zq_kernels *K;
    zq_trouble trouble;
} rotary_jobs;

static void
rotary_job(void *ctx, int64_t job)
{
    rotary_jobs *j = ctx;
    const zq_rope *rope = j->rope;
    const int64_t width = j->heads * j->head_dim, end = zq_min(j->m, (job + 1) * j->rows_per_job);
    for (int64_t i = job * j->rows_per_job; i < end; i++) {
        const int64_t at = j->position[i] * rope->half;
        float *y = j->y + i * width;
        j->K->rotary_f32(j->x + i * width, j->heads, j->head_dim, rope->half, rope->interleaved, rope->cos + at,
                         rope->sin + at, y);
        if (!(j->K->absmax_f32(y, width) <= FLT_MAX)) {
            zq_note_bad_row(&j->trouble, i);
        }
    }
}

zq_status
zq_rotary(const float *x, const int64_t *position, int64_t m, int64_t heads, int64_t head_dim, const zq_rope *rope, float *y,
          int64_t *bad_row)
{
    rotary_jobs j = {.x = x, .position = position, .m = m, .heads = heads, .head_dim = head_dim, .rope = rope, .y = y};
    j.K = zq_active();
    j.rows_per_job = zq_max(1, ROTARY_JOB_ITEMS / (heads * head_dim));
    zq_trouble_init(&j.trouble);
    zq_parallel_for(zq_ceil_div(m, j.rows_per_job), rotary_job, &j);
    return zq_trouble_status(&j.trouble, bad_row);
}
