/* The one allocator of the core. See zq_common.h.
 *
 * Blocks are kept for a while after they are freed: a forward pass asks for the same sizes again and again. Fresh pages
 * cost more than the kernels that fill them (4 KiB faults: about 0.25 us each), and malloc takes 0.1 us to hand out an
 * aligned block of some 20 KiB and to merge it with its neighbours again. Two lists, so that the many small blocks never
 * push a big one out. Each keeps so many blocks and bytes at most; the oldest goes first. Nobody waits for a list: who
 * finds it busy allocates or frees as if it were not there. */
#define _GNU_SOURCE
#include "zq_common.h"

#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { LINE = 64, HUGE_PAGE = 2 << 20, SMALL = 4 << 10, BIG = 64 << 10, KEPT_BLOCKS = 16 };

typedef struct {
    atomic_flag busy;
    int count;
    size_t total, most; /* bytes that it keeps, and may keep */
    struct {
        void *p;
        size_t bytes;
    } block[KEPT_BLOCKS]; /* oldest first */
} kept_blocks;

static kept_blocks small = {.busy = ATOMIC_FLAG_INIT, .most = KEPT_BLOCKS * BIG};
static kept_blocks big = {.busy = ATOMIC_FLAG_INIT, .most = 64 << 20};

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
take_out(kept_blocks *kept, int i)
{
    void *p = kept->block[i].p;
    kept->total -= kept->block[i].bytes;
    kept->count--;
    for (; i < kept->count; i++) {
        kept->block[i] = kept->block[i + 1];
    }
    return p;
}

/* The list for blocks of a size; NULL: they are not worth keeping. */
static kept_blocks *
list_of(size_t bytes)
{
    return !KEEP || bytes < SMALL ? NULL : bytes < BIG ? &small : &big;
}

static int
try_lock(kept_blocks *kept)
{
    return !atomic_flag_test_and_set_explicit(&kept->busy, memory_order_acquire);
}

static void
unlock(kept_blocks *kept)
{
    atomic_flag_clear_explicit(&kept->busy, memory_order_release);
}

/* A kept block that fits without wasting half of it, or NULL. */
static void *
reuse(size_t bytes)
{
    kept_blocks *kept = list_of(bytes);
    void *p = NULL;
    if (!kept || !try_lock(kept)) {
        return NULL;
    }
    for (int i = kept->count - 1; i >= 0 && !p; i--) {
        if (kept->block[i].bytes >= bytes && kept->block[i].bytes / 2 <= bytes) {
            p = take_out(kept, i);
        }
    }
    unlock(kept);
    return p;
}

/* 0: the block is not kept. */
static int
keep(void *p, size_t bytes)
{
    kept_blocks *kept = list_of(bytes);
    if (!kept || bytes > kept->most / 2 || !try_lock(kept)) {
        return 0;
    }
    while (kept->count == KEPT_BLOCKS || kept->total + bytes > kept->most) {
        free(take_out(kept, 0));
    }
    kept->block[kept->count].p = p;
    kept->block[kept->count++].bytes = bytes;
    kept->total += bytes;
    unlock(kept);
    return 1;
}

void *
zq_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    const size_t whole = bytes + LINE;
    void *p = reuse(whole);
    if (p) {
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
    if (p && !keep(p, malloc_usable_size(p))) {
        free(p);
    }
}
