/* The key-value cache: pages, lengths, copies. Attention over it is in attention_kv.c.
 *
 * Life: made by zq_kv_init without pages; a forward pass reserves what its tokens need, layer by layer; zq_kv_truncate
 * gives pages back; zq_kv_free at the end. */
#include "kv_page.h"

#include <string.h>

zq_status
zq_kv_init(zq_kv *c, int64_t layers, int64_t sequences, int64_t kv_heads, int64_t head_dim, int int8)
{
    *c = (zq_kv){.layers = layers, .sequences = sequences, .kv_heads = kv_heads, .head_dim = head_dim, .int8 = int8};
    const size_t counts = (size_t)sequences * sizeof *c->length, tables = (size_t)(layers * sequences) * sizeof *c->pages;
    c->length = zq_alloc(counts);
    c->step = zq_alloc(counts);
    c->pages = zq_alloc(tables);
    if (!c->length || !c->step || !c->pages) {
        zq_free(c->pages);
        c->pages = NULL;
        zq_kv_free(c);
        return ZQ_ENOMEM;
    }
    memset(c->length, 0, counts);
    memset(c->step, 0, counts);
    memset(c->pages, 0, tables);
    return ZQ_OK;
}

/* Keep the first `keep` pages. */
static void
drop_pages(zq_kv_pages *p, int64_t keep)
{
    while (p->count > keep) {
        zq_free(p->page[--p->count]);
    }
}

void
zq_kv_free(zq_kv *c)
{
    for (int64_t i = 0; c->pages && i < c->layers * c->sequences; i++) {
        drop_pages(&c->pages[i], 0);
        zq_free(c->pages[i].page);
    }
    zq_free(c->pages);
    zq_free(c->step);
    zq_free(c->length);
    *c = (zq_kv){0};
}

int64_t
zq_kv_bytes(const zq_kv *c)
{
    int64_t bytes = c->sequences * 2 * (int64_t)sizeof *c->length;
    for (int64_t i = 0; i < c->layers * c->sequences; i++) {
        const zq_kv_pages *p = &c->pages[i];
        bytes += (int64_t)sizeof *p + p->room * (int64_t)sizeof *p->page + p->count * kv_page_bytes(c);
    }
    return bytes;
}

/* The table of pages doubles; the pages stay where they are. */
static zq_status
grow_table(zq_kv_pages *p, int64_t count)
{
    const int64_t room = zq_max(count, 2 * p->room);
    void **table = zq_alloc((size_t)room * sizeof *table);
    if (!table) {
        return ZQ_ENOMEM;
    }
    if (p->count) {
        memcpy(table, p->page, (size_t)p->count * sizeof *table);
    }
    zq_free(p->page);
    p->page = table;
    p->room = room;
    return ZQ_OK;
}

zq_status
zq_kv_reserve(zq_kv *c, int64_t layer, int64_t sequence, int64_t tokens)
{
    zq_kv_pages *p = kv_pages(c, layer, sequence);
    const int64_t count = zq_ceil_div(tokens, ZQ_KV_PAGE);
    if (count > p->room && grow_table(p, count) != ZQ_OK) {
        return ZQ_ENOMEM;
    }
    for (; p->count < count; p->count++) {
        if (!(p->page[p->count] = zq_alloc((size_t)kv_page_bytes(c)))) {
            return ZQ_ENOMEM;
        }
    }
    return ZQ_OK;
}

void
zq_kv_truncate(zq_kv *c, int64_t sequence, int64_t length)
{
    c->length[sequence] = length;
    c->next_layer = 0;
    for (int64_t layer = 0; layer < c->layers; layer++) {
        drop_pages(kv_pages(c, layer, sequence), zq_ceil_div(length, ZQ_KV_PAGE));
    }
}

zq_status
zq_kv_select(const zq_kv *c, const int64_t *rows, int64_t n, zq_kv *out)
{
    zq_status s = zq_kv_init(out, c->layers, n, c->kv_heads, c->head_dim, c->int8);
    for (int64_t i = 0; s == ZQ_OK && i < n; i++) {
        const int64_t length = c->length[rows[i]];
        out->length[i] = length;
        for (int64_t layer = 0; s == ZQ_OK && layer < c->layers; layer++) {
            s = zq_kv_reserve(out, layer, i, length);
            const zq_kv_pages *from = kv_pages(c, layer, rows[i]), *to = kv_pages(out, layer, i);
            for (int64_t p = 0; s == ZQ_OK && p < to->count; p++) {
                memcpy(to->page[p], from->page[p], (size_t)kv_page_bytes(c));
            }
        }
    }
    if (s != ZQ_OK) {
        zq_kv_free(out);
    }
    return s;
}
