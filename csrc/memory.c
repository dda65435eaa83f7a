/* The one allocator of the core. See zq_common.h.
 *
 * Big blocks are kept for a while after they are freed: a forward pass asks for the same few megabytes again and
 * again, and fresh pages cost more than the kernels that fill them (4 KiB faults: about 0.25 us each). At most
 * KEPT_BLOCKS blocks and KEPT_BYTES bytes are kept; the oldest goes first. Nobody waits for the list: who finds it
 * busy allocates or frees as if it were not there. */
#define _GNU_SOURCE
#include "zq_common.h"

#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { LINE = 64, HUGE_PAGE = 2 << 20, BIG = 64 << 10, KEPT_BLOCKS = 16, KEPT_BYTES = 64 << 20 };

static struct {
    atomic_flag busy;
    int count;
    size_t total;
    struct {
        void *p;
        size_t bytes;
    } block[KEPT_BLOCKS]; /* oldest first */
} kept = {.busy = ATOMIC_FLAG_INIT};

/* Memory checkers must see every free. */
#if defined(__SANITIZE_ADDRESS__)
enum { KEEP = 0 };
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
enum { KEEP = 0 };
#else
enum { KEEP = 1 };
#endif
#else
enum { KEEP = 1 };
#endif

static void *
take_out(int i)
{
    void *p = kept.block[i].p;
    kept.total -= kept.block[i].bytes;
    kept.count--;
    memmove(&kept.block[i], &kept.block[i + 1], (size_t)(kept.count - i) * sizeof kept.block[0]);
    return p;
}

/* A kept block that fits without wasting half of it, or NULL. */
static void *
reuse(size_t bytes)
{
    void *p = NULL;
    if (atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire)) {
        return NULL;
    }
    for (int i = kept.count - 1; i >= 0 && !p; i--) {
        if (kept.block[i].bytes >= bytes && kept.block[i].bytes / 2 <= bytes) {
            p = take_out(i);
        }
    }
    atomic_flag_clear_explicit(&kept.busy, memory_order_release);
    return p;
}

void *
zq_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    const size_t whole = bytes + LINE;
    void *p = NULL;
    if (KEEP && bytes >= BIG && (p = reuse(whole))) {
        return p;
    }
    const int huge = bytes >= (1 << 20);
    if (posix_memalign(&p, huge ? HUGE_PAGE : LINE, whole) != 0) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (huge && bytes >= HUGE_PAGE) {
        /* Only whole huge pages: the tail stays on small pages so that memory use is not rounded up. */
        (void)madvise(p, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
#endif
    return p;
}

void
zq_free(void *p)
{
    if (!p) {
        return;
    }
    const size_t bytes = malloc_usable_size(p);
    if (!KEEP || bytes < BIG || bytes > KEPT_BYTES / 2 ||
        atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire)) {
        free(p);
        return;
    }
    while (kept.count == KEPT_BLOCKS || (kept.count && kept.total + bytes > KEPT_BYTES)) {
        free(take_out(0));
    }
    kept.block[kept.count].p = p;
    kept.block[kept.count++].bytes = bytes;
    kept.total += bytes;
    atomic_flag_clear_explicit(&kept.busy, memory_order_release);
}
