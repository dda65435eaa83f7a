/* Quantizers over whole arrays: scales from ranges, rows shared out to threads, kernels for the rest.
 *
 * No scale is ever 0, denormal, Inf or NaN for finite input. A range below FLT_MIN * levels, whose scale would be
 * denormal and whose inverse would overflow, counts as zero: scale 1, codes 0. A range whose width overflows (both
 * ends beyond FLT_MAX / 2) is divided before it is subtracted. */
#include "row_jobs.h"
#include "zq_kernels.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* ---- scales ------------------------------------------------------------------------------------- */

float
zq_absmax_scale(float amax, float levels)
{
    const float s = amax / levels;
    return amax < FLT_MIN * levels ? 0.0f : s * levels <= FLT_MAX ? s : fmaf(s, -0x1p-24f, s);
}

/* (hi - lo) / levels for lo <= 0 <= hi, or 0 when that is too small to divide by. */
static float
range_scale(float lo, float hi, float levels)
{
    const float range = hi - lo;
    return range > FLT_MAX ? hi / levels - lo / levels : zq_absmax_scale(range, levels);
}

/* The zero point: rint to 0..most. lrintf is one instruction everywhere, rintf a call without SSE4.1. */
static int32_t
zero_code(float code, int32_t most)
{
    return (int32_t)zq_max(0, zq_min(lrintf(code), most));
}

/* ---- rows to threads ---------------------------------------------------------------------------- */

/* Elements of one job: enough that claiming it costs nothing, few enough that small matrices are shared too. */
enum { JOB_ITEMS = 16384 };

/* What every job of this file needs. A job that meets NaN or Inf raises `bad` and goes on; which row it was is
 * found afterwards, so that the answer does not depend on the threads. */
typedef struct {
    const zq_kernels *K;
    int64_t m, k;
    int64_t count; /* of jobs over rows */
    atomic_int bad;
} jobs;

static void
run_rows(jobs *j, zq_job_fn fn, void *ctx)
{
    j->count = zq_row_jobs(j->m, j->k, JOB_ITEMS);
    zq_parallel_for(j->count, fn, ctx);
}

static void
run_flat(jobs *j, zq_job_fn fn, void *ctx)
{
    zq_parallel_for(zq_ceil_div(j->m * j->k, JOB_ITEMS), fn, ctx);
}

static zq_status
finish(jobs *j, const float *x, int64_t ld, int64_t *bad_row)
{
    if (!atomic_load(&j->bad)) {
        return ZQ_OK;
    }
    for (int64_t i = 0; i < j->m; i++) {
        if (!(j->K->absmax_f32(x + i * ld, j->k) <= FLT_MAX)) {
            *bad_row = i;
            break;
        }
    }
    return ZQ_ENONFINITE;
}

/* The first row of a job over rows; behind its last one the next job begins. */
static int64_t
first_row(const jobs *j, int64_t job)
{
    return zq_first_row(j->m, job, j->count);
}

/* ---- tokens ------------------------------------------------------------------------------------- */

static float
token_sym(float amax, float *scale, int32_t *zero)
{
    const float s = zq_absmax_scale(amax, 127.0f);
    *scale = s > 0 ? s : 1.0f;
    *zero = 128;
    return s > 0 ? 127.0f / amax : 0.0f;
}

static float
token_asym(float lo, float hi, float *scale, int32_t *zero)
{
    const float s = range_scale(lo, hi, 255.0f), range = hi - lo;
    const float inv = !(s > 0) ? 0.0f : range > FLT_MAX ? 1.0f / s : 255.0f / range;
    *scale = s > 0 ? s : 1.0f;
    *zero = zero_code(-lo * inv, 255);
    return inv;
}

float
zq_token_scale(zq_quant mode, float lo, float hi, float *scale, int32_t *zero)
{
    assert(mode == ZQ_QUANT_TOKEN_SYM || mode == ZQ_QUANT_TOKEN_ASYM);
    return mode == ZQ_QUANT_TOKEN_SYM ? token_sym(-lo > hi ? -lo : hi, scale, zero) : token_asym(lo, hi, scale, zero);
}

int
zq_quantize_token(const zq_kernels *K, const float *x, int64_t k, zq_quant mode, uint8_t *q, float *scale, int32_t *zero)
{
    assert(mode == ZQ_QUANT_TOKEN_SYM || mode == ZQ_QUANT_TOKEN_ASYM);
    float lo = 0.0f, hi;
    if (mode == ZQ_QUANT_TOKEN_SYM) {
        hi = K->absmax_f32(x, k);
        if (!(hi <= FLT_MAX)) {
            return 0;
        }
    }
    else if (!K->minmax_f32(x, k, &lo, &hi)) {
        return 0;
    }
    const float inv = zq_token_scale(mode, lo, hi, scale, zero);
    K->quantize_mul_f32_b8(x, k, inv, *zero, q);
    return 1;
}

/* Floats between where a range is taken and what is prefetched: what L3 delivers during its latency; more would not stay in
 * L1 beside two rows of 3072. */
enum { AHEAD_ITEMS = 3072 };

/* Rows up to this length have their range taken two rows before their codes: the divisions in between take as long as a
 * short row. Longer ones would not all stay in L1. */
enum { SHORT_ITEMS = 2048 };

typedef struct {
    zq_range range;
    int finite;
} row_range;

int64_t
zq_quantize_token_rows(const zq_kernels *K, const zq_token_rows *t)
{
    const float *const last = t->x + (t->rows - 1) * t->ld_x;
    const int64_t lead = t->k <= SHORT_ITEMS ? 2 : 1;
    int64_t bad = t->rows;
    row_range found[2];
    for (int64_t i = 0; i < zq_min(lead, t->rows); i++) {
        found[i].finite = K->minmax_f32(t->x + i * t->ld_x, t->k, &found[i].range.lo, &found[i].range.hi);
    }
    for (int64_t i = 0; i < t->rows; i++) {
        const float *x = t->x + i * t->ld_x, *next = i + lead < t->rows ? x + lead * t->ld_x : NULL;
        uint8_t *q = t->q + i * t->ld_q;
        row_range *row = found + i % lead;
        if (!row->finite) {
            bad = zq_min(bad, i);
        }
        const float inv = zq_token_scale(t->mode, row->range.lo, row->range.hi, t->scale + i, t->zero + i);
        if (row->finite && next) {
            const float *ahead = last - next > AHEAD_ITEMS ? next + AHEAD_ITEMS : last;
            row->finite = K->quantize_minmax_f32_b8(x, t->k, inv, t->zero[i], q, next, ahead, &row->range);
        }
        else {
            if (row->finite) {
                K->quantize_mul_f32_b8(x, t->k, inv, t->zero[i], q);
            }
            row->finite = next && K->minmax_f32(next, t->k, &row->range.lo, &row->range.hi);
        }
        memset(q + t->k, 0, (size_t)t->zeros);
    }
    return bad;
}

int
zq_quantize_token16(const zq_kernels *K, const float *x, int64_t k, uint8_t *high, uint8_t *low, float scale[2],
                    int32_t zero[2])
{
    const float amax = K->absmax_f32(x, k);
    if (!(amax <= FLT_MAX)) {
        return 0;
    }
    const float s = zq_absmax_scale(amax, 32767.0f);
    scale[1] = s > 0 ? s : 1.0f;
    scale[0] = 256.0f * scale[1];
    zero[0] = 128;
    zero[1] = 0;
    K->quantize_mul_f32_b16(x, k, s > 0 ? 32767.0f / amax : 0.0f, high, low);
    return 1;
}

typedef struct {
    jobs j;
    const float *x;
    int64_t ld_x, ld_q;
    zq_quant mode;
    uint8_t *q;
    float *scale;
    int32_t *zero;
} token_jobs;

static void
token_job(void *ctx, int64_t job)
{
    token_jobs *t = ctx;
    const int64_t k = t->j.k, first = first_row(&t->j, job), rows = first_row(&t->j, job + 1) - first;
    const zq_token_rows part = {.x = t->x + first * t->ld_x, .ld_x = t->ld_x, .rows = rows, .k = k, .mode = t->mode,
                                .q = t->q + first * t->ld_q, .ld_q = t->ld_q,
                                .zeros = zq_max(0, zq_min(t->ld_q, zq_round_up(k, 8)) - k), .scale = t->scale + first,
                                .zero = t->zero + first};
    if (zq_quantize_token_rows(t->j.K, &part) < rows) {
        atomic_store(&t->j.bad, 1);
    }
}

zq_status
zq_quantize_tokens(const float *x, int64_t m, int64_t k, int64_t ld_x, zq_quant mode, uint8_t *q, int64_t ld_q, float *scale,
                   int32_t *zero, int64_t *bad_row)
{
    token_jobs t = {{zq_active(), m, k, 0, 0}, x, ld_x, ld_q, mode, q, scale, zero};
    run_rows(&t.j, token_job, &t);
    return finish(&t.j, x, ld_x, bad_row);
}

typedef struct {
    jobs j;
    const float *x;
    float *lo, *hi;
} minmax_jobs;

static void
minmax_job(void *ctx, int64_t job)
{
    minmax_jobs *t = ctx;
    for (int64_t i = first_row(&t->j, job); i < first_row(&t->j, job + 1); i++) {
        if (!t->j.K->minmax_f32(t->x + i * t->j.k, t->j.k, t->lo + i, t->hi + i)) {
            atomic_store(&t->j.bad, 1);
        }
    }
}

zq_status
zq_minmax_rows(const float *x, int64_t m, int64_t k, float *lo, float *hi, int64_t *bad_row)
{
    minmax_jobs t = {{zq_active(), m, k, 0, 0}, x, lo, hi};
    run_rows(&t.j, minmax_job, &t);
    return finish(&t.j, x, k, bad_row);
}

/* ---- given scales: flat jobs, because with one scale the shape does not matter and a single row of a large array
 * is to be shared out too ---- */

typedef struct {
    jobs j;
    const float *scale;
    const int32_t *zero;
    int64_t count; /* scales in all, or per row when there are groups */
    int64_t group;
    /* quantize */
    const float *x;
    int32_t qmin, qmax;
    uint8_t *q;
    /* dequantize */
    const uint8_t *codes;
    int is_signed;
    float *out;
} given_jobs;

/* Elements at..end of a job: the longest run inside one row. */
static int64_t
run_in_row(const given_jobs *t, int64_t at, int64_t end)
{
    return zq_min(end - at, t->j.k - at % t->j.k);
}

static void
static_job(void *ctx, int64_t job)
{
    given_jobs *t = ctx;
    const zq_kernels *K = t->j.K;
    const int64_t at = job * JOB_ITEMS, end = zq_min(at + JOB_ITEMS, t->j.m * t->j.k);
    if (!(K->absmax_f32(t->x + at, end - at) <= FLT_MAX)) {
        atomic_store(&t->j.bad, 1);
    }
    if (t->count == 1) {
        K->quantize_div_f32_b8(t->x + at, end - at, t->scale[0], t->zero[0], t->qmin, t->qmax, t->q + at);
        return;
    }
    for (int64_t i = at, n; i < end; i += n) {
        const int64_t col = i % t->j.k;
        n = run_in_row(t, i, end);
        K->quantize_vec_f32_b8(t->x + i, n, t->scale + col, t->zero + col, t->qmin, t->qmax, t->q + i);
    }
}

zq_status
zq_quantize_static(const float *x, int64_t m, int64_t k, const float *scale, const int32_t *zero, int64_t count, int32_t qmin,
                   int32_t qmax, uint8_t *q, int64_t *bad_row)
{
    assert(count == 1 || count == k);
    given_jobs t = {.j = {.K = zq_active(), .m = m, .k = k}, .scale = scale, .zero = zero, .count = count, .x = x,
                    .qmin = qmin, .qmax = qmax, .q = q};
    run_flat(&t.j, static_job, &t);
    return finish(&t.j, x, k, bad_row);
}

static void
dequantize_rows_job(void *ctx, int64_t job)
{
    given_jobs *t = ctx;
    const int64_t at = job * JOB_ITEMS, end = zq_min(at + JOB_ITEMS, t->j.m * t->j.k);
    for (int64_t i = at, n; i < end; i += n) {
        const int64_t row = i / t->j.k;
        n = run_in_row(t, i, end);
        t->j.K->dequantize_b8_f32(t->codes + i, n, t->is_signed, t->scale[row], t->zero ? t->zero[row] : 0, t->out + i);
    }
}

void
zq_dequantize_rows(const uint8_t *q, int is_signed, int64_t m, int64_t k, const float *scale, const int32_t *zero, float *x)
{
    given_jobs t = {.j = {.K = zq_active(), .m = m, .k = k}, .scale = scale, .zero = zero, .codes = q,
                    .is_signed = is_signed, .out = x};
    run_flat(&t.j, dequantize_rows_job, &t);
}

static void
dequantize_static_job(void *ctx, int64_t job)
{
    given_jobs *t = ctx;
    const zq_kernels *K = t->j.K;
    const int64_t at = job * JOB_ITEMS, end = zq_min(at + JOB_ITEMS, t->j.m * t->j.k);
    if (t->count == 1) {
        K->dequantize_b8_f32(t->codes + at, end - at, t->is_signed, t->scale[0], t->zero[0], t->out + at);
        return;
    }
    for (int64_t i = at, n; i < end; i += n) {
        const int64_t col = i % t->j.k;
        n = run_in_row(t, i, end);
        K->dequantize_vec_b8_f32(t->codes + i, n, t->is_signed, t->scale + col, t->zero + col, t->out + i);
    }
}

void
zq_dequantize_static(const uint8_t *q, int is_signed, int64_t m, int64_t k, const float *scale, const int32_t *zero,
                     int64_t count, float *x)
{
    assert(count == 1 || count == k);
    given_jobs t = {.j = {.K = zq_active(), .m = m, .k = k}, .scale = scale, .zero = zero, .count = count, .codes = q,
                    .is_signed = is_signed, .out = x};
    run_flat(&t.j, dequantize_static_job, &t);
}

/* ---- weights ------------------------------------------------------------------------------------ */

typedef struct {
    jobs j;
    const float *w;
    int64_t group, groups;
    int bits, symmetric;
    uint8_t *codes;
    float *scales;
    int32_t *zeros;
} group_jobs;

static int
group_sym(const zq_kernels *K, const float *w, int64_t n, int bits, uint8_t *codes, float *scale)
{
    const int32_t qmax = (1 << (bits - 1)) - 1;
    const float amax = K->absmax_f32(w, n), s = zq_absmax_scale(amax, (float)qmax);
    *scale = s > 0 ? s : 1.0f;
    if (s > 0) {
        K->quantize_div_f32_b8(w, n, s, 0, -qmax, qmax, codes);
    }
    else {
        memset(codes, 0, (size_t)n);
    }
    return amax <= FLT_MAX;
}

static int
group_asym(const zq_kernels *K, const float *w, int64_t n, int bits, uint8_t *codes, float *scale, int32_t *zero)
{
    const int32_t qmax = (1 << bits) - 1;
    float lo, hi;
    const int finite = K->minmax_f32(w, n, &lo, &hi);
    const float s = finite ? range_scale(lo, hi, (float)qmax) : 0.0f;
    *scale = s > 0 ? s : 1.0f;
    *zero = s > 0 ? zero_code(-lo / s, qmax) : 0;
    if (s > 0) {
        K->quantize_div_f32_b8(w, n, s, *zero, 0, qmax, codes);
    }
    else {
        memset(codes, 0, (size_t)n);
    }
    return finite;
}

static void
group_job(void *ctx, int64_t job)
{
    group_jobs *t = ctx;
    for (int64_t i = first_row(&t->j, job); i < first_row(&t->j, job + 1); i++) {
        for (int64_t g = 0; g < t->groups; g++) {
            const int64_t at = i * t->j.k + g * t->group, n = zq_min(t->group, t->j.k - g * t->group);
            const int64_t s = i * t->groups + g;
            const int finite = t->symmetric
                                   ? group_sym(t->j.K, t->w + at, n, t->bits, t->codes + at, t->scales + s)
                                   : group_asym(t->j.K, t->w + at, n, t->bits, t->codes + at, t->scales + s, t->zeros + s);
            if (!finite) {
                atomic_store(&t->j.bad, 1);
            }
        }
    }
}

zq_status
zq_quantize_groups(const float *w, int64_t n, int64_t k, int64_t group, int bits, int symmetric, int8_t *codes, float *scales,
                   int32_t *zeros, int64_t *bad_row)
{
    assert(group >= 1 && bits >= 2 && bits <= 8);
    group_jobs t = {.j = {zq_active(), n, k, 0, 0}, .w = w, .group = group, .groups = zq_ceil_div(k, group), .bits = bits,
                    .symmetric = symmetric, .codes = (uint8_t *)codes, .scales = scales, .zeros = zeros};
    run_rows(&t.j, group_job, &t);
    return finish(&t.j, w, k, bad_row);
}

static void
dequantize_group_job(void *ctx, int64_t job)
{
    given_jobs *t = ctx;
    for (int64_t i = first_row(&t->j, job); i < first_row(&t->j, job + 1); i++) {
        for (int64_t g = 0; g < t->count; g++) {
            const int64_t at = i * t->j.k + g * t->group, n = zq_min(t->group, t->j.k - g * t->group);
            const int64_t s = i * t->count + g;
            t->j.K->dequantize_b8_f32(t->codes + at, n, t->is_signed, t->scale[s], t->zero ? t->zero[s] : 0, t->out + at);
        }
    }
}

void
zq_dequantize_groups(const int8_t *codes, int64_t n, int64_t k, int64_t group, int symmetric, const float *scales,
                     const int32_t *zeros, float *w)
{
    assert(group >= 1);
    given_jobs t = {.j = {.K = zq_active(), .m = n, .k = k}, .scale = scales, .zero = symmetric ? NULL : zeros,
                    .count = zq_ceil_div(k, group), .group = group, .codes = (const uint8_t *)codes, .is_signed = symmetric,
                    .out = w};
    run_rows(&t.j, dequantize_group_job, &t);
}

zq_status
zq_quantize_row_blocks(const float *w, int64_t n, int64_t k, int64_t blocks, int bits, int8_t *codes, float *scales,
                       int64_t *bad_row)
{
    assert(blocks >= 1 && n % blocks == 0);
    /* A block of whole rows is one contiguous run: one group of a (blocks, rows * k) matrix. */
    const int64_t rows = n / blocks;
    int64_t bad_block = 0;
    const zq_status status =
        zq_quantize_groups(w, blocks, rows * k, zq_max(rows * k, 1), bits, 1, codes, scales, NULL, &bad_block);
    if (status == ZQ_ENONFINITE) {
        jobs j = {zq_active(), n, k, 0, 1};
        return finish(&j, w, k, bad_row);
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        scales[i] = k ? scales[i / rows] : 1.0f;
    }
    return status;
}
