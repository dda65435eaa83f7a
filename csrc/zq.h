/* zq.h: the C core of zquant. Post-training quantization kernels on plain pointers; no Python, no C++.
 *
 * Conventions, everywhere:
 *   x   activations, (m, k) float32, row-major; one row is one token
 *   w   weights, (n, k), row-major; one row is one output channel
 *   q   integer codes;  x_hat = (q - zero) * scale;  scales multiply on dequantization
 *   rounding is half to even (rintf); symmetric codes stay in +-(2^(bits-1) - 1)
 * Functions return a zq_status. ZQ_ENONFINITE also stores the first bad row.
 * Every result is the same for any number of threads and at any dispatch level, bit for bit: integers
 * because they are exact, floats because each function fixes one order of operations. */
#ifndef ZQ_H
#define ZQ_H

#include <stdatomic.h>
#include <stdint.h>

typedef enum {
    ZQ_OK = 0,
    ZQ_ENOMEM,     /* allocation failed */
    ZQ_ENONFINITE, /* NaN or Inf in a float32 input */
    ZQ_ERANGE,     /* a code or size outside what the kernel is exact for */
    ZQ_ESTOPPED,   /* the caller's zq_stop said so; results are not complete */
} zq_status;

/* ---- dispatch (zq_dispatch.c) ------------------------------------------------------------------- */
typedef enum { ZQ_REF, ZQ_AVX2, ZQ_AVXVNNI, ZQ_AVX512VNNI, ZQ_AMX, ZQ_LEVELS } zq_level;
extern const char *const zq_level_names[ZQ_LEVELS];
int zq_level_supported(zq_level level); /* by this CPU and OS. Not a range: Zen 4 has AVX512VNNI, not AVXVNNI */
zq_level zq_level_best(zq_level cap); /* the highest supported level <= cap */
zq_level zq_level_active(void);
void zq_level_use(zq_level level); /* a supported one */

/* ---- threads (parallel.c) ----------------------------------------------------------------------- */
typedef void (*zq_job_fn)(void *ctx, int64_t job);
/* Run fn(ctx, 0..jobs-1), each once, on up to zq_threads() threads. Jobs must not depend on each other.
 * A call from inside a job, or while another thread holds the pool, runs its jobs on the calling thread. */
void zq_parallel_for(int64_t jobs, zq_job_fn fn, void *ctx);

/* How the caller of a long function ends it early. The function asks between pieces of work of milliseconds to tens of them,
 * only on the thread that called it, until the answer is not 0; it then gives everything back and returns ZQ_ESTOPPED. Start
 * from {.asked = ..., .ctx = ...}; NULL in place of a zq_stop: it runs to its end. What is asked may run anything, this library
 * included (a signal handler of Python): who asks holds no scratch (zq_scratch) and no other state of its thread meanwhile. */
typedef struct {
    int (*asked)(void *ctx);
    void *ctx;
    atomic_int stopped; /* the answer, for the other threads and from then on */
} zq_stop;
/* Whether to stop: asks on the caller's thread; the pool's threads look at what it was told. */
int zq_stopped(zq_stop *stop);
/* As zq_parallel_for; jobs that nobody has begun when it is to stop are left out. Returns zq_stopped(). */
int zq_parallel_until(int64_t jobs, zq_job_fn fn, void *ctx, zq_stop *stop);

int64_t zq_now_ns(void); /* of a clock that only goes forward */

int zq_threads(void);
void zq_set_threads(int n);
int zq_threads_default(void); /* CPUs this process may use: affinity mask and cgroup quota */

/* ---- linear layers: y = act(x W^T + bias) + residual (gemm.c, pack.c) ----------------------------- */

/* u8 x s8 products of |255 * 127| in an int32 accumulator are exact up to this many of them. */
#define ZQ_MAX_K 66000

typedef enum { ZQ_ACT_NONE, ZQ_ACT_RELU, ZQ_ACT_GELU, ZQ_ACT_GELU_TANH, ZQ_ACT_SILU, ZQ_ACTS } zq_activation;

/* How rows are turned into codes. Codes are always handed to the GEMM as uint8 with a zero point per
 * token; symmetric int8 codes q are stored as q + 128 with zero point 128. */
typedef enum {
    ZQ_QUANT_NONE,
    ZQ_QUANT_TOKEN_SYM,  /* scale = max|x| / 127, codes 1..255, zero 128 */
    ZQ_QUANT_TOKEN_ASYM, /* scale = (hi - lo) / 255 over [min(x,0), max(x,0)], zero = rint(-lo / scale) */
    ZQ_QUANT_TOKEN_16,   /* linear layers only, on the way in: scale = max|x| / 32767, codes int16, zero 0 */
    ZQ_QUANT_STATIC,     /* scale and zero given: one of each, or (outputs) one per feature; saturating to 0..255 */
    ZQ_QUANT_TENSOR_SYM, /* linear layers only, on the way in: scale and zero as TOKEN_SYM, of all rows of the call */
    ZQ_QUANT_TENSOR_ASYM,
} zq_quant;

typedef enum { ZQ_W_F32, ZQ_W_S8, ZQ_W_S8_GROUP, ZQ_W_S4_GROUP } zq_weight_kind;

#define ZQ_NEVER INT64_MIN /* zq_linear.last_use before the first product */

/* A weight matrix packed for the micro-kernels: panels of ZQ_NR output channels, the same layout at every
 * dispatch level (see pack.c). Read-only from its first product on, but for last_use, and then for many threads:
 * zq_linear_correct, _set_outliers and _input come before it, _fill_* when no product of it is running. */
typedef struct zq_linear {
    zq_weight_kind kind;
    int64_t n, k;        /* output channels, input features */
    int64_t group;       /* input features per scale; at least k for one scale per channel */
    int64_t panel_bytes; /* distance from one panel to the next */
    void *panels;
    int32_t *colsum; /* (n) sum of codes per channel; NULL with groups */
    float *scale;    /* (n); NULL with groups: their scales lie in the panels */
    float *zcorr;    /* (n) sum over groups of scale * code sum: what a zero point multiplies; groups only */
    float *bias;     /* (n), zeros without bias */
    struct zq_extras *extras; /* what is added to the product, or NULL (low_rank.c) */
    /* What is known of the input beforehand (zq_linear_input): */
    float in_scale;  /* ZQ_QUANT_STATIC; 0 where it is not known */
    int32_t in_zero;
    float *in_factor, *in_shift; /* (k) or NULL: float32 rows x are read as (x - shift) * factor */
    _Atomic(int64_t) *last_use; /* bytes of weights the process had multiplied with after the last product with these; or NULL */
} zq_linear;

zq_status zq_linear_pack_f32(zq_linear *w, const float *weight, int64_t n, int64_t k, const float *bias);
/* codes (n, k) in +-127; scale (n). ZQ_ERANGE on a code of -128 or k > ZQ_MAX_K. */
zq_status zq_linear_pack_s8(zq_linear *w, const int8_t *codes, const float *scale, int64_t n, int64_t k,
                            const float *bias);
/* codes (n, k); scales (n, ceil(k / group)); group a multiple of 8 or >= k; bits 4 (codes -8..7) or 8. Where k is
 * 0 it becomes kind S8. */
zq_status zq_linear_pack_group(zq_linear *w, const int8_t *codes, const float *scales, int64_t n, int64_t k,
                               int64_t group, int bits, const float *bias);
/* y = act(x W^T + (x_hat v^T) u^T + bias) + residual, x_hat what the codes of x stand for: LoRC. u (n, rank), v (rank, k).
 * Both functions are for a weight that nobody uses yet, and exclude each other. */
zq_status zq_linear_correct(zq_linear *w, const float *u, const float *v, int64_t rank);
/* Columns of x that reach the threshold in any row are multiplied in float32, the others as codes: LLM.int8(). Kind S8.
 * `count` columns, ascending, have float32 weights (n, count); those of others are their codes times scale. */
zq_status zq_linear_set_outliers(zq_linear *w, float threshold, const int64_t *columns, const float *weights, int64_t count);
int zq_linear_splits(const zq_linear *w); /* it does that: rows must be float32, quantized per token on the way in */
/* What is known of the input, once, before the first product: scale > 0 and zero 0..255 of ZQ_QUANT_STATIC, or scale 0;
 * factor and shift (k), or NULL. Float32 rows go through factor and shift before anything else sees them. */
zq_status zq_linear_input(zq_linear *w, float scale, int32_t zero, const float *factor, const float *shift);
/* New contents for a packed weight of the same kind and shape, in place; the bias stays. Codes as above, not checked. */
void zq_linear_fill_f32(zq_linear *w, const float *weight);
void zq_linear_fill_codes(zq_linear *w, const int8_t *codes, const float *scales);
void zq_linear_free(zq_linear *w);
int64_t zq_linear_bytes(const zq_linear *w);

/* Bytes between rows of an operand of `bytes` bytes: an odd number of cache lines, so that the rows of a tile fall
 * into different L1 sets. A multiple of 64, >= bytes. */
int64_t zq_row_pitch(int64_t bytes);

/* Activations going in: float32 rows, or codes made before. */
typedef struct {
    const float *f32;    /* (m, k) or NULL */
    int64_t ld_f32;
    zq_quant quant;      /* how float32 rows are quantized (integer weights only) */
    const uint8_t *u8;   /* (m, k) codes, used when f32 is NULL; rows readable to round_up(k, 8). Not with in_factor */
    int64_t ld_u8;
    const float *scale;  /* (m) */
    const int32_t *zero; /* (m), 0..255 */
} zq_rows;

/* What comes out: y, or q with its scales, or both. */
typedef struct {
    zq_activation act;
    const float *residual; /* (m, n) added after the activation, or NULL */
    int64_t ld_residual;
    float *y; /* (m, n) or NULL */
    int64_t ld_y;
    zq_quant quant;
    uint8_t *q; /* (m, n), rows of ld_q >= round_up(n, 8) bytes; the slack is zeroed */
    int64_t ld_q;
    float *q_scale;             /* (m): written by TOKEN_*; unused by STATIC */
    int32_t *q_zero;            /* (m) */
    const float *static_scale;  /* (1) or (n) */
    const int32_t *static_zero; /* (1) or (n) */
    int64_t static_count;       /* 1 or n */
    struct {
        const float *t, *u; /* added before the activation: t (m, rank) times u, panels of (rank, 32); rank 0: nothing */
        int64_t ld_t, rank;
    } add;
} zq_out;

/* Float32 results are finite as long as their parts are: sums of codes times the token's scale, each group's sum of codes times
 * its scale, and float32 sums are rounded to float32 on the way. */
zq_status zq_linear_forward(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row);

/* The same for a weight with extras; zq_linear_forward calls it. */
zq_status zq_forward_with_extras(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row);
void zq_extras_free(struct zq_extras *e);
int64_t zq_extras_bytes(const zq_linear *w);

/* Exact integer product: acc = (a - zero_a) (b - zero_b)^T is built on this: c (m, n) int32 = a (m, k) u8 times
 * packed s8 weights, minus zero[i] * column sums. Used by MatMulInteger and the tests. */
void zq_gemm_u8s8_s32(const zq_linear *w, const uint8_t *a, int64_t ld, const int32_t *zero, int64_t m, int32_t *c);

/* ---- quantizers (quantize.c), Transformer operators (norm.c, attention.c), decoders (kv.c, attention_kv.c) ---- */
#include "zq_quantize.h"
#include "zq_nn.h"
#include "zq_kv.h"

#endif
