/* Rows shared out in jobs that differ by one row at most, as many jobs for one thread as for another: the threads of a short
 * call end together. */
#ifndef ZQ_ROW_JOBS_H
#define ZQ_ROW_JOBS_H

#include "zq.h"
#include "zq_common.h"

/* Jobs of `job_items` elements at the most, or of one row, for m rows of n >= 0 elements. */
ZQ_INLINE int64_t
zq_row_jobs(int64_t m, int64_t n, int64_t job_items)
{
    const int64_t jobs = zq_max(1, zq_ceil_div(m * n, job_items)), threads = zq_threads();
    return zq_min(m, jobs > threads ? zq_round_up(jobs, threads) : jobs);
}

/* The first row of a job; behind its last one the next job begins. */
ZQ_INLINE int64_t
zq_first_row(int64_t m, int64_t job, int64_t jobs)
{
    return m * job / jobs;
}

#endif
