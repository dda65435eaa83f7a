/* The one file that knows threads: a pool whose workers spin for a short while between parallel regions
 * (a fork and join costs 0.1 us while they spin, 20 us once they sleep in the kernel) and then sleep.
 *
 * A region: the caller gives each member of the team a share of the jobs, consecutive ones, so that the same thread reads
 * the same operands in call after call; member 0 is the caller. A member takes the jobs of its share from the front. When
 * none is left it takes them from the back of the others' shares: a worker that sleeps or lost its CPU is not waited for,
 * only one that holds a job is. Who took a job reports it when it is done; the region ends when all are.
 *
 * Cores exchange a cache line in some 20 to 50 ns, and a product of few rows is a few microseconds: with equal members a
 * region moves one line to each worker, and one back.
 *
 * Life: created by the first parallel call that wants more than one thread; grown, never shrunk; forgotten
 * (not joined) in a child after fork, where the workers do not exist. One region runs at a time: a second
 * Python thread that arrives meanwhile runs its jobs itself, which changes nothing in the results.
 * Frequencies: zq_parallel_for is called about 10^5 times a second; pool creation once. */
#define _GNU_SOURCE
#include "zq.h"
#include "zq_common.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 256,
    LINES = 128,      /* bytes that no two threads write: a cache line and the one that prefetchers take along */
    TIGHT_POLLS = 4096, /* a few microseconds: most regions follow the one before at once */
    SPIN_NS = 200000,
    DROWSY_NS = 20000, /* from the announcement of sleep to sleep: see wake_team */
};

/* Jobs `first` to `end` - 1 as one word: a claim is one compare and exchange */
#define JOBS(first, end) ((uint64_t)(first) << 32 | (uint64_t)(end))
#define FIRST(jobs) ((int64_t)((jobs) >> 32))
#define END(jobs) ((int64_t)((jobs) & UINT32_MAX))

/* What is left of a member's jobs, and what to do with them. Who claimed a job may read fn, ctx and team until it reports it:
 * they change when all jobs of a region are reported, and are in place before the next ones can be claimed. */
typedef struct {
    _Alignas(LINES) _Atomic(uint64_t) left;
    zq_job_fn fn;
    void *ctx;
    int team; /* members, the caller too */
} share;

static share shares[MAX_THREADS];

static struct {
    _Alignas(LINES) atomic_flag busy; /* held by the thread whose region runs */
    int workers;                      /* threads created so far, not counting callers: members 1 to workers */
    int forks;                        /* between this process and the one that loaded the library */
    atomic_int first_asleep;          /* member; MAX_THREADS: nobody sleeps */
    _Alignas(LINES) _Atomic(int64_t) reported; /* jobs that workers have done, of all regions so far */
    /* what changes when a worker goes to sleep or is woken */
    _Alignas(LINES) pthread_mutex_t sleep;
    pthread_cond_t wake[MAX_THREADS];
    int asleep[MAX_THREADS];
} pool = {.busy = ATOMIC_FLAG_INIT, .first_asleep = MAX_THREADS, .sleep = PTHREAD_MUTEX_INITIALIZER};

static atomic_int threads_wanted; /* 0: not yet set */
static _Thread_local int inside_region, is_worker;

static void
pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

int64_t
zq_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- jobs ----------------------------------------------------------------------------------------- */

static int
has_jobs(const share *s)
{
    const uint64_t left = atomic_load_explicit(&s->left, memory_order_relaxed);
    return FIRST(left) < END(left);
}

/* The next job of a share: its owner takes the first, all others the last. -1 when none is left. */
static int64_t
claim(share *s, int own)
{
    uint64_t left = atomic_load_explicit(&s->left, memory_order_relaxed);
    while (FIRST(left) < END(left)) {
        const uint64_t rest = own ? left + JOBS(1, 0) : left - 1;
        if (atomic_compare_exchange_weak_explicit(&s->left, &left, rest, memory_order_acquire, memory_order_relaxed)) {
            return own ? FIRST(left) : END(rest);
        }
    }
    return -1;
}

/* Run what is left of a share; how many jobs that were. */
static int64_t
run_share(share *s, int own)
{
    int64_t done = 0;
    for (int64_t job; (job = claim(s, own)) >= 0; done++) {
        s->fn(s->ctx, job);
    }
    return done;
}

/* What is left of the other members' shares, beginning behind one's own. */
static int64_t
run_others(int me, int team)
{
    int64_t done = 0;
    for (int i = 1; i < team; i++) {
        done += run_share(&shares[(me + i) % team], 0);
    }
    return done;
}

static void
report(int64_t done)
{
    if (done > 0) {
        atomic_fetch_add_explicit(&pool.reported, done, memory_order_release);
    }
}

/* The jobs of a share that had some; a worker reports its own before it looks for others, as the caller may be waiting. */
static void
run_member(int me)
{
    share *s = &shares[me];
    int64_t job = claim(s, 1);
    if (job < 0) {
        return;
    }
    const int team = s->team;
    s->fn(s->ctx, job);
    report(1 + run_share(s, 1));
    report(run_others(me, team));
}

/* ---- workers -------------------------------------------------------------------------------------- */

/* Wait for jobs until `end`. 0: none came. */
static int
poll_until(const share *s, int64_t end)
{
    do {
        for (int i = 0; i < 64; i++) {
            if (has_jobs(s)) {
                return 1;
            }
            pause_cpu();
        }
    } while (zq_now_ns() < end);
    return 0;
}

/* `sleep` is held. */
static void
set_asleep(int me, int asleep)
{
    int first = 1;
    pool.asleep[me] = asleep;
    while (first < MAX_THREADS && !pool.asleep[first]) {
        first++;
    }
    atomic_store(&pool.first_asleep, first);
}

/* Sleep until there are jobs, or until woken for some that others have done meanwhile. */
static void
sleep_for_jobs(int me)
{
    const share *s = &shares[me];
    pthread_mutex_lock(&pool.sleep);
    set_asleep(me, 1);
    pthread_mutex_unlock(&pool.sleep);
    poll_until(s, zq_now_ns() + DROWSY_NS);
    pthread_mutex_lock(&pool.sleep);
    while (pool.asleep[me] && !has_jobs(s)) {
        pthread_cond_wait(&pool.wake[me], &pool.sleep);
    }
    set_asleep(me, 0);
    pthread_mutex_unlock(&pool.sleep);
}

static void
wait_for_jobs(int me)
{
    const share *s = &shares[me];
    for (int i = 0; i < TIGHT_POLLS; i++) {
        if (has_jobs(s)) {
            return;
        }
    }
    if (!poll_until(s, zq_now_ns() + SPIN_NS)) {
        sleep_for_jobs(me);
    }
}

static void *
worker(void *arg)
{
    const int me = (int)(intptr_t)arg;
    inside_region = is_worker = 1;
    for (;;) {
        wait_for_jobs(me);
        run_member(me);
    }
    return NULL;
}

/* Signals that are sent to the process belong to the threads of the program, which may wait for them; those that a thread's own
 * faults raise stay. */
static void
block_signals(sigset_t *before)
{
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
    sigset_t all;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        sigdelset(&all, own[i]);
    }
    pthread_sigmask(SIG_SETMASK, &all, before);
}

/* Called with `busy` held. Creating fewer than asked for is not an error: the caller does the work. */
static void
grow_pool(int workers)
{
    while (pool.workers < workers) {
        const int me = pool.workers + 1;
        pthread_t t;
        pthread_attr_t attr;
        sigset_t before;
        pthread_cond_init(&pool.wake[me], NULL);
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        block_signals(&before); /* a new thread has its creator's mask */
        const int failed = pthread_create(&t, &attr, worker, (void *)(intptr_t)me);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attr);
        if (failed) {
            return;
        }
        pool.workers++;
    }
}

static void
after_fork_in_child(void)
{
    /* The workers are gone; their locks may be held for ever. Start from nothing. */
    for (int i = 0; i < MAX_THREADS; i++) {
        atomic_store(&shares[i].left, 0);
        pool.asleep[i] = 0;
    }
    pool.sleep = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.workers = 0;
    pool.forks++;
    atomic_store(&pool.first_asleep, MAX_THREADS);
    atomic_flag_clear(&pool.busy);
}

static void
register_fork_handler(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

/* ---- regions -------------------------------------------------------------------------------------- */

static void
run_serially(int64_t jobs, zq_job_fn fn, void *ctx)
{
    for (int64_t j = 0; j < jobs; j++) {
        fn(ctx, j);
    }
}

/* Wake the members that sleep; their jobs are there already. The usual case costs one look at a line that nobody writes: no
 * fence stands between the jobs and that look, for it would wait for every worker's line. A worker that announces its sleep
 * just then looks for jobs for far longer than a store takes to arrive, and sleeps only afterwards. */
static void
wake_team(int team)
{
    atomic_signal_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&pool.first_asleep, memory_order_relaxed) >= team) {
        return;
    }
    pthread_mutex_lock(&pool.sleep);
    for (int i = 1; i < team; i++) {
        if (pool.asleep[i]) {
            set_asleep(i, 0);
            pthread_cond_signal(&pool.wake[i]);
        }
    }
    pthread_mutex_unlock(&pool.sleep);
}

/* Shares of equal size for all members. The caller has its first job already. */
static void
share_out(int64_t jobs, int team, zq_job_fn fn, void *ctx)
{
    for (int i = team - 1; i >= 0; i--) {
        share *s = &shares[i];
        s->fn = fn;
        s->ctx = ctx;
        s->team = team;
        atomic_store_explicit(&s->left, JOBS(i ? jobs * i / team : 1, jobs * (i + 1) / team), memory_order_release);
    }
}

/* All jobs are claimed: wait for the workers that still run one, until `reported` is what it must be. They may look whether to
 * stop, which only the caller can find out. Returns 0 where it has no workers any more: where what the caller is asked has
 * forked, and this is the child. */
static int
wait_for_reports(int64_t reported, int forks, zq_stop *stop)
{
    for (int spins = 0; atomic_load_explicit(&pool.reported, memory_order_acquire) != reported; spins++) {
        if (pool.forks != forks) {
            return 0;
        }
        if (spins > TIGHT_POLLS) {
            pause_cpu();
        }
        if (spins > 8 * TIGHT_POLLS) { /* a worker lost its CPU: give it ours rather than burn it */
            sched_yield();
            zq_stopped(stop);
        }
    }
    return pool.forks == forks;
}

/* `stop` is for the time that the caller waits; jobs look themselves. Returns 0 where jobs were lost to a fork. */
static int
run_region(int64_t jobs, zq_job_fn fn, void *ctx, zq_stop *stop)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int team = (int)zq_min(zq_threads(), jobs);
    if (team < 2 || jobs > INT32_MAX || inside_region || atomic_flag_test_and_set_explicit(&pool.busy, memory_order_acquire)) {
        run_serially(jobs, fn, ctx);
        return 1;
    }
    const int forks = pool.forks;
    if (pool.workers < team - 1) {
        pthread_once(&once, register_fork_handler);
        grow_pool(team - 1);
    }
    team = (int)zq_min(team, pool.workers + 1);
    const int64_t before = atomic_load_explicit(&pool.reported, memory_order_relaxed);
    share_out(jobs, team, fn, ctx);
    wake_team(team);
    inside_region = 1;
    fn(ctx, 0);
    const int64_t own = 1 + run_share(&shares[0], 1), done = own + run_others(0, team);
    inside_region = 0;
    const int whole = wait_for_reports(before + jobs - done, forks, stop);
    atomic_flag_clear_explicit(&pool.busy, memory_order_release);
    return whole;
}

void
zq_parallel_for(int64_t jobs, zq_job_fn fn, void *ctx)
{
    run_region(jobs, fn, ctx, NULL);
}

int
zq_stopped(zq_stop *stop)
{
    if (!stop) {
        return 0;
    }
    if (!is_worker && !atomic_load_explicit(&stop->stopped, memory_order_relaxed) && stop->asked(stop->ctx)) {
        atomic_store_explicit(&stop->stopped, 1, memory_order_relaxed);
    }
    return atomic_load_explicit(&stop->stopped, memory_order_relaxed);
}

typedef struct {
    zq_job_fn fn;
    void *ctx;
    zq_stop *stop;
} stoppable;

static void
stoppable_job(void *ctx, int64_t job)
{
    const stoppable *s = ctx;
    if (!zq_stopped(s->stop)) {
        s->fn(s->ctx, job);
    }
}

int
zq_parallel_until(int64_t jobs, zq_job_fn fn, void *ctx, zq_stop *stop)
{
    stoppable s = {fn, ctx, stop};
    if (!run_region(jobs, stop ? stoppable_job : fn, stop ? &s : ctx, stop)) {
        atomic_store_explicit(&stop->stopped, 1, memory_order_relaxed); /* without a stop nothing forks in between */
    }
    return zq_stopped(stop);
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
    zq_free(s);
    scratch = NULL; /* what ends later with the thread may still ask */
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
        scratch = zq_alloc(sizeof *scratch);
        if (!scratch) {
            return NULL;
        }
        memset(scratch, 0, sizeof *scratch);
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
