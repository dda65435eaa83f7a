/* Decoders: rotary embedding, key-value cache, causal attention over the cache (kv.c, attention_kv.c). Included by
 * zq.h. */
#ifndef ZQ_KV_H
#define ZQ_KV_H

#include <stdint.h>

/* Rotary embedding (Su et al., arXiv 2104.09864). Tables (positions, half): row p holds cos and sin of p times each
 * frequency. The first 2 * half elements of a head are rotated, the others stay. With (a, b) = (x[i], x[i + half]), or
 * (x[2i], x[2i + 1]) when interleaved: a' = a cos - b sin, b' = b cos + a sin. cos == NULL: no rotation. */
typedef struct {
    const float *cos, *sin;
    int64_t positions, half;
    int interleaved;
} zq_rope;

/* y (m, heads * head_dim) = x with row i rotated to position[i], 0 <= position[i] < positions. y may be x. */
zq_status zq_rotary(const float *x, const int64_t *position, int64_t m, int64_t heads, int64_t head_dim, const zq_rope *rope,
                    float *y, int64_t *bad_row);

/* Tokens per page of the cache. */
enum { ZQ_KV_PAGE = 64 };

typedef struct {
    void **page;
    int64_t count, room;
} zq_kv_pages;

/* Keys and values of `sequences` sequences in `layers` layers. Every (layer, sequence) has pages of ZQ_KV_PAGE tokens,
 * allocated as they fill: growing copies nothing. kv_page.h has the layout of a page. Not safe for two writers. */
typedef struct {
    int64_t layers, sequences, kv_heads, head_dim;
    int int8;           /* codes +-127 with one scale per token and head for K and for V; else float32 */
    int64_t *length;    /* (sequences) tokens that every layer holds */
    int64_t *step;      /* (sequences) tokens of the forward pass under way */
    int64_t next_layer; /* of that pass */
    zq_kv_pages *pages; /* (layers, sequences) */
} zq_kv;

zq_status zq_kv_init(zq_kv *c, int64_t layers, int64_t sequences, int64_t kv_heads, int64_t head_dim, int int8);
void zq_kv_free(zq_kv *c);
int64_t zq_kv_bytes(const zq_kv *c);
/* Forget the tokens from `length` on, 0 <= length <= c->length[sequence], and any pass under way. */
void zq_kv_truncate(zq_kv *c, int64_t sequence, int64_t length);
/* out: a new cache whose sequence i is a copy of sequence rows[i]. */
zq_status zq_kv_select(const zq_kv *c, const int64_t *rows, int64_t n, zq_kv *out);

/* One layer of a forward pass over rows of [q | k | v], `heads` heads of q and kv_heads of k and v; q head h uses kv head
 * h / (heads / kv_heads). The rows offsets[s] .. offsets[s + 1] - 1 are the next tokens of sequence s. In this order:
 * RMSNorm of every head of q and k where a weight is given, rotary embedding at the token's position in its sequence,
 * append k and v to the cache, and out = softmax(scale q k^T) v over the keys at positions <= the query's, with
 * window > 0 only the last `window` of them. Of rows that are not wanted, only k and v are looked at.
 *
 * A pass calls layers 0, 1, ... in order with the same offsets; layer 0 begins a new pass at any time. After the last
 * layer c->length advances. A row's result depends on its own query and on what its sequence has cached, bit for bit: not on
 * how many tokens a pass has, on the other sequences, the threads or the level.
 *
 * ZQ_ERANGE: layer out of order or other offsets than layer 0 had. ZQ_ENONFINITE: NaN or Inf came in or arose, *bad_row is
 * the row; the lengths stay as they were. */
typedef struct {
    const float *qkv;
    int64_t ld_qkv;
    const int64_t *offsets; /* (sequences + 1) */
    const int64_t *wanted;  /* (wanted_count) rows whose results are asked for, or NULL: all */
    int64_t wanted_count;
    int64_t heads;
    zq_rope rope;                 /* positions > every position reached */
    const float *q_norm, *k_norm; /* (head_dim) or NULL */
    float eps, scale;             /* scale > 0 */
    int64_t window;               /* 0: none */
    float *out;                   /* (rows or wanted_count, heads * head_dim) */
    int64_t ld_out;
} zq_kv_attention;
zq_status zq_kv_attend(zq_kv *c, int64_t layer, const zq_kv_attention *a, int64_t *bad_row);

#endif
