/* The one allocator of the core. See zq_common.h. */
#define _GNU_SOURCE
#include "zq_common.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { LINE = 64, HUGE_PAGE = 2 << 20 };

void *
zq_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    const int huge = bytes >= (1 << 20);
    const size_t align = huge ? HUGE_PAGE : LINE;
    void *p = NULL;
    if (posix_memalign(&p, align, bytes + LINE) != 0) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (huge) {
        /* Only whole huge pages: the tail stays on small pages so that memory use is not rounded up. */
        const size_t whole = bytes / HUGE_PAGE * HUGE_PAGE;
        if (whole) {
            (void)madvise(p, whole, MADV_HUGEPAGE);
        }
    }
#endif
    return p;
}

void
zq_free(void *p)
{
    free(p);
}
