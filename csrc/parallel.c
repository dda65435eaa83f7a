/* The one file that knows threads: a pool whose workers spin for a short while between parallel regions
 * (a fork and join costs 0.1 us while they spin, 20 us once they sleep in the kernel) and then sleep.
 *
 * Life: created by the first parallel call that wants more than one thread; grown, never shrunk; forgotten
 * (not joined) in a child after fork, where the workers do not exist. One region runs at a time: a second
 * Python thread that arrives meanwhile runs its jobs itself, which changes nothing in the results.
 * Frequencies: zq_parallel_for is called about 10^4 times a second; pool creation once. */
#define _GNU_SOURCE
#include "zq.h"
#include "zq_common.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPIN_NS = 200000 };
#define GENERATION(state) ((unsigned)((state) >> 32))
#define CLOSED (1ull << 31)
#define INSIDE (CLOSED - 1)

static struct {
    pthread_mutex_t busy;  /* held by the thread whose region runs */
    pthread_mutex_t sleep; /* guards the two condition variables' predicates */
    pthread_cond_t wake;
    int workers;  /* threads created so far, not counting callers */
    int sleepers; /* under `sleep` */
    /* the region */
    zq_job_fn fn;
    void *ctx;
    int64_t jobs;
    int team;          /* workers wanted in this region */
    atomic_llong next; /* next job to claim */
    /* generation (upper half), CLOSED, and how many workers are inside. Workers enter an open region by adding one;
     * the caller closes it when no job is left and waits only for those inside: one that lost its CPU before it
     * entered costs nothing. The fields above may change while nobody is inside. */
    atomic_ullong state;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .state = CLOSED};

static atomic_int threads_wanted; /* 0: not yet set */
static _Thread_local int inside_region;

static void
pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static int64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void
run_jobs(void)
{
    for (;;) {
        const int64_t job = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (job >= pool.jobs) {
            return;
        }
        pool.fn(pool.ctx, job);
    }
}

static unsigned
generation_now(void)
{
    return GENERATION(atomic_load_explicit(&pool.state, memory_order_acquire));
}

/* Wait until the generation differs from `seen`: spin first, then sleep. */
static unsigned
wait_for_region(unsigned seen)
{
    const int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            const unsigned g = generation_now();
            if (g != seen) {
                return g;
            }
            pause_cpu();
        }
    } while (now_ns() < end);
    pthread_mutex_lock(&pool.sleep);
    pool.sleepers++;
    unsigned g;
    while ((g = generation_now()) == seen) {
        pthread_cond_wait(&pool.wake, &pool.sleep);
    }
    pool.sleepers--;
    pthread_mutex_unlock(&pool.sleep);
    return g;
}

/* Enter the region that is open now; 0 where none is. */
static int
enter_region(void)
{
    unsigned long long s = atomic_load_explicit(&pool.state, memory_order_acquire);
    while (!(s & CLOSED)) {
        if (atomic_compare_exchange_weak_explicit(&pool.state, &s, s + 1, memory_order_acquire, memory_order_acquire)) {
            return 1;
        }
    }
    return 0;
}

typedef struct {
    int id;
    unsigned seen;
} worker_arg;

/* Worker `id` works in regions whose team is larger than id. */
static void *
worker(void *arg)
{
    const worker_arg me = *(worker_arg *)arg;
    free(arg);
    inside_region = 1;
    for (unsigned seen = me.seen;;) {
        seen = wait_for_region(seen);
        if (enter_region()) {
            if (me.id < pool.team) {
                run_jobs();
            }
            atomic_fetch_sub_explicit(&pool.state, 1, memory_order_release);
        }
    }
    return NULL;
}

/* Called with `busy` held. Creating fewer than asked for is not an error: the caller does the work. */
static void
grow_pool(int workers)
{
    while (pool.workers < workers) {
        worker_arg *arg = malloc(sizeof *arg);
        if (!arg) {
            return;
        }
        *arg = (worker_arg){pool.workers, generation_now()};
        pthread_t t;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&t, &attr, worker, arg);
        pthread_attr_destroy(&attr);
        if (failed) {
            free(arg);
            return;
        }
        pool.workers++;
    }
}

static void
after_fork_in_child(void)
{
    /* The workers are gone; their locks may be held for ever. Start from nothing. */
    pool.busy = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.sleep = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.workers = pool.sleepers = 0;
    atomic_store(&pool.state, CLOSED);
}

static void
register_fork_handler(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static void
run_serially(int64_t jobs, zq_job_fn fn, void *ctx)
{
    for (int64_t j = 0; j < jobs; j++) {
        fn(ctx, j);
    }
}

static void
wake_sleepers(void)
{
    pthread_mutex_lock(&pool.sleep);
    if (pool.sleepers > 0) {
        pthread_cond_broadcast(&pool.wake);
    }
    pthread_mutex_unlock(&pool.sleep);
}

/* All jobs are claimed and the region is closed: wait for the workers that still run one. */
static void
wait_until_empty(void)
{
    for (int spins = 0; atomic_load_explicit(&pool.state, memory_order_acquire) & INSIDE; spins++) {
        pause_cpu();
        if (spins > 20000) { /* a worker lost its CPU: give it ours rather than burn it */
            sched_yield();
        }
    }
}

void
zq_parallel_for(int64_t jobs, zq_job_fn fn, void *ctx)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const int team = (int)zq_min(zq_threads(), jobs) - 1; /* workers beside the caller */
    if (team < 1 || inside_region || pthread_mutex_trylock(&pool.busy) != 0) {
        run_serially(jobs, fn, ctx);
        return;
    }
    pthread_once(&once, register_fork_handler);
    grow_pool(team);
    pool.fn = fn;
    pool.ctx = ctx;
    pool.jobs = jobs;
    pool.team = team;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    const unsigned long long open = (unsigned long long)(generation_now() + 1) << 32;
    atomic_store_explicit(&pool.state, open, memory_order_release);
    wake_sleepers();
    inside_region = 1;
    run_jobs();
    inside_region = 0;
    atomic_fetch_or_explicit(&pool.state, CLOSED, memory_order_acq_rel);
    wait_until_empty();
    pthread_mutex_unlock(&pool.busy);
}

/* cgroup quota in CPUs, or 0 where there is none: v2 "max 100000" or "150000 100000"; v1 two files. */
static double
cgroup_cpus(void)
{
    double quota = -1, period = 100000;
    char text[64] = "";
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (f) {
        if (fgets(text, sizeof text, f) && sscanf(text, "%lf %lf", &quota, &period) < 1) {
            quota = -1;
        }
        fclose(f);
    }
    else if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r"))) {
        if (fscanf(f, "%lf", &quota) != 1) {
            quota = -1;
        }
        fclose(f);
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r"))) {
            if (fscanf(f, "%lf", &period) != 1) {
                period = 100000;
            }
            fclose(f);
        }
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

int
zq_threads_default(void)
{
    int n = 0;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        n = CPU_COUNT(&set);
    }
    if (n < 1) {
        n = (int)zq_max(1, sysconf(_SC_NPROCESSORS_ONLN));
    }
    const double quota = cgroup_cpus();
    if (quota > 0 && quota < n) {
        n = (int)zq_max(1, (int64_t)(quota + 0.5));
    }
    return (int)zq_min(n, MAX_THREADS);
}

int
zq_threads(void)
{
    int n = atomic_load_explicit(&threads_wanted, memory_order_relaxed);
    if (n == 0) {
        n = zq_threads_default();
        atomic_store(&threads_wanted, n);
    }
    return n;
}

void
zq_set_threads(int n)
{
    assert(n >= 1);
    atomic_store(&threads_wanted, (int)zq_min(n, MAX_THREADS));
}

/* ---- scratch: one set of growing buffers per thread ----------------------------------------------- */
typedef struct {
    void *p[ZQ_SCRATCH_SLOTS];
    size_t bytes[ZQ_SCRATCH_SLOTS];
} scratch_set;

static pthread_key_t scratch_key;
static _Thread_local scratch_set *scratch;

static void
free_scratch(void *p)
{
    scratch_set *s = p;
    for (int i = 0; i < ZQ_SCRATCH_SLOTS; i++) {
        zq_free(s->p[i]);
    }
    free(s);
}

static void
make_scratch_key(void)
{
    pthread_key_create(&scratch_key, free_scratch);
}

void *
zq_scratch(int slot, size_t bytes)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (!scratch) {
        pthread_once(&once, make_scratch_key);
        scratch = calloc(1, sizeof *scratch);
        if (!scratch) {
            return NULL;
        }
        pthread_setspecific(scratch_key, scratch);
    }
    if (!scratch->p[slot] || scratch->bytes[slot] < bytes) { /* 0 bytes are memory too */
        void *p = zq_alloc(bytes + bytes / 4);
        if (!p) {
            return NULL;
        }
        zq_free(scratch->p[slot]);
        scratch->p[slot] = p;
        scratch->bytes[slot] = bytes + bytes / 4;
    }
    return scratch->p[slot];
}
