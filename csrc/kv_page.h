/* Layout of a page of the key-value cache: ZQ_KV_PAGE tokens of all kv heads of one layer and sequence.
 *
 * float32, per head: K^T in panels of ZQ_PANEL tokens, each (head_dim, ZQ_PANEL) and contiguous, as matmul_f32 reads
 * them; then V (ZQ_KV_PAGE, dp), rows filled with zeros from head_dim to dp. int8, per head: the scales of K and of V
 * (ZQ_KV_PAGE each), the codes of K in the same panels, the codes of V (ZQ_KV_PAGE, head_dim); codes are q + 128.
 * Places behind the last token hold anything. */
#ifndef ZQ_KV_PAGE_H
#define ZQ_KV_PAGE_H

#include "attention_tile.h"
#include "zq_kernels.h"

/* One head of a page; the half that is not used is NULL. */
typedef struct {
    float *kt, *v;
    float *k_scale, *v_scale;
    uint8_t *k_codes, *v_codes;
} kv_view;

ZQ_INLINE int64_t
kv_head_bytes(const zq_kv *c)
{
    const int64_t d = c->head_dim, dp = zq_round_up(d, 16), f32 = (int64_t)sizeof(float);
    return zq_round_up(ZQ_KV_PAGE * (c->int8 ? 2 * (d + f32) : (d + dp) * f32), 64);
}

ZQ_INLINE int64_t
kv_page_bytes(const zq_kv *c)
{
    return c->kv_heads * kv_head_bytes(c);
}

ZQ_INLINE zq_kv_pages *
kv_pages(const zq_kv *c, int64_t layer, int64_t sequence)
{
    return c->pages + layer * c->sequences + sequence;
}

ZQ_INLINE kv_view
kv_head(const zq_kv *c, const zq_kv_pages *pages, int64_t page, int64_t head)
{
    char *p = (char *)pages->page[page] + head * kv_head_bytes(c);
    kv_view view = {0};
    if (c->int8) {
        view.k_scale = (float *)p;
        view.v_scale = view.k_scale + ZQ_KV_PAGE;
        view.k_codes = (uint8_t *)(view.v_scale + ZQ_KV_PAGE);
        view.v_codes = view.k_codes + ZQ_KV_PAGE * c->head_dim;
    }
    else {
        view.kt = (float *)p;
        view.v = view.kt + ZQ_KV_PAGE * c->head_dim;
    }
    return view;
}

/* Room for `tokens` tokens in one layer of a sequence (kv.c). */
zq_status zq_kv_reserve(zq_kv *c, int64_t layer, int64_t sequence, int64_t tokens);

#endif
