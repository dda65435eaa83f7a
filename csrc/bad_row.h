/* The first bad row that any job met: the same answer for any number of threads, because every job goes on. */
#ifndef ZQ_BAD_ROW_H
#define ZQ_BAD_ROW_H

#include "zq.h"
#include "zq_common.h"

#include <stdatomic.h>

typedef struct {
    _Atomic(int64_t) first; /* INT64_MAX: none */
    atomic_int no_memory;
} zq_trouble;

ZQ_INLINE void
zq_trouble_init(zq_trouble *t)
{
    atomic_init(&t->first, INT64_MAX);
    atomic_init(&t->no_memory, 0);
}

ZQ_INLINE void
zq_note_bad_row(zq_trouble *t, int64_t row)
{
    int64_t seen = atomic_load(&t->first);
    while (row < seen && !atomic_compare_exchange_weak(&t->first, &seen, row)) {
    }
}

ZQ_INLINE zq_status
zq_trouble_status(zq_trouble *t, int64_t *bad_row)
{
    if (atomic_load(&t->no_memory)) {
        return ZQ_ENOMEM;
    }
    const int64_t first = atomic_load(&t->first);
    if (first == INT64_MAX) {
        return ZQ_OK;
    }
    *bad_row = first;
    return ZQ_ENONFINITE;
}

#endif
