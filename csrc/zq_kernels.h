/* The one list of kernels. Each entry X(name, return type, (arguments)) makes a field of struct zq_kernels,
 * a prototype zq_<name>__ref (forgetting it is a link error), the inheritance of a level from the one below
 * and a row of zq.cpu.info(). A level overrides what it does better; everything else it inherits.
 *
 * Contracts shared by all: pointers are valid for exactly the stated lengths (reads past the end never happen,
 * tails are masked); outputs do not overlap inputs unless stated; n >= 0. Every level gives the same bits. */
#ifndef ZQ_KERNELS_H
#define ZQ_KERNELS_H

#include "zq.h"
#include "zq_common.h"

/* Output channels per panel of packed weights; a group has a multiple of ZQ_KSTEP input features, but the last. */
enum { ZQ_NR = 32, ZQ_KSTEP = 8 };

/* Panels of n output channels */
ZQ_INLINE int64_t
zq_panel_count(int64_t n)
{
    return zq_ceil_div(n, ZQ_NR);
}

/* Readable bytes behind the last panel, as kernels of deep steps read whole ones and multiply what is too much by 0. */
enum { ZQ_PANEL_SLACK = 2048 };

/* Tiles of y = act((a - zero) w^T * sx * sw + bias) + residual; mr rows by nr <= ZQ_NR columns, and `more` further ones of
 * the same size, below it or beside it (zq_tile_next). The arrays that run over columns (colsum, scale, zcorr, bias) are
 * padded to ZQ_NR. A kernel may change the description: `more` and what moves on from tile to tile are undefined afterwards,
 * the rest is as it was. */
typedef struct {
    int mr, nr;
    int64_t k;     /* input features, padded: to 4 (S8), to 8 (groups), any (F32) */
    int64_t group; /* groups only: input features per scale, a multiple of 8; the last may be short */
    const void *a; /* u8 (S8), s8 (groups) or f32 rows */
    int64_t lda;   /* in elements */
    const void *b; /* panel */
    const float *sx;
    const int32_t *zx;
    const int32_t *colsum; /* S8: (NR) */
    const float *scale;    /* S8: (NR). groups: they lie in the panel, before the codes of their group */
    const int32_t *start;  /* groups: (mr, ceil(k/group)): where a group's sums start (center_groups), rows ld_start apart */
    int64_t ld_start;
    const float *zcorr;    /* groups: (NR) */
    const float *bias;     /* (NR) */
    int pairs; /* rows 2i and 2i + 1 of a add up to row i of y: y = act((y_2i + y_2i+1) + bias) + residual; mr is even */
    /* Panels from beyond L2: for every 128 bytes of the panel the line at ahead is to be prefetched, and the next one too
     * where ahead_step is 128; ahead moves on by ahead_step. NULL: nothing is. Never read from. To L1, or to L2 alone. */
    const char *ahead;
    int64_t ahead_step;
    int ahead_to_l2;
    /* What is added before the activation: y += low (rows, rank) low_b (rank, NR), one fma for each r in order. rank 0: nothing */
    int64_t rank, ld_low;
    const float *low, *low_b;
    zq_activation act;
    const float *residual;
    int64_t ldr;
    /* F32, blocks of input features: (mr, NR) sums of the blocks before, where these begin, and where they go if more blocks
     * follow. NULL: they begin with 0; they go through all of the above to y. */
    const float *sums_in;
    float *sums_out;
    float *y;
    int64_t ldy;
    int stream; /* y is not read soon: stores may bypass the caches. Only where rows of y are 64-byte aligned */
    /* How far the next tile is: rows of a (of all that has a value per row), columns; bytes of a, b and ahead. */
    int64_t more, next_rows, next_cols, next_a, next_b, next_ahead;
} zq_tile;

/* On to the next tile: what a kernel that runs several does between them. */
static inline void
zq_tile_next(zq_tile *t)
{
    const int64_t rows = t->next_rows, cols = t->next_cols, rows_out = t->pairs ? rows / 2 : rows;
    t->a = (const char *)t->a + t->next_a;
    t->b = (const char *)t->b + t->next_b;
    t->bias += cols;
    t->y += rows_out * t->ldy + cols;
    t->sx = t->sx ? t->sx + rows : NULL;
    t->zx = t->zx ? t->zx + rows : NULL;
    t->start = t->start ? t->start + rows * t->ld_start : NULL;
    t->scale = t->scale ? t->scale + cols : NULL;
    t->colsum = t->colsum ? t->colsum + cols : NULL;
    t->zcorr = t->zcorr ? t->zcorr + cols : NULL;
    t->low = t->low ? t->low + rows_out * t->ld_low : NULL;
    t->low_b = t->low_b ? t->low_b + cols * t->rank : NULL;
    t->residual = t->residual ? t->residual + rows_out * t->ldr + cols : NULL;
    t->sums_in = t->sums_in ? t->sums_in + rows * ZQ_NR : NULL;
    t->sums_out = t->sums_out ? t->sums_out + rows * ZQ_NR : NULL;
    t->ahead = t->ahead ? t->ahead + t->next_ahead : NULL;
}

/* Attention: the softmax of some query rows, carried over tiles of keys (attention.c has the equations). */
typedef struct {
    float *s; /* (rows, keys), lds apart */
    int64_t rows, keys, lds; /* rows 1 to mr_matmul */
    const float *factor; /* (rows), > 0: p = 2^((s - m) factor) */
    float *max, *sum;    /* (rows): m and l; -Inf and 0 before the first tile */
    float *o;            /* (rows, n), ldo apart; not touched in the first tile */
    int64_t n, ldo;
} zq_softmax_tile;

/* The same on codes, with both products: s = (start + sum k q) k_scale, p = rint(255 * 2^((s - m') factor)), l sums these
 * codes. Query rows lie side by side in lanes, so that nothing goes across them; arrays of `lanes` elements have the rows,
 * rounded up to a multiple of 16, and what fills them up must be finite. Of k, v and s there is memory for as many keys as
 * ZQ_KEY_BLOCK goes up to: what lies there is multiplied too, and never seen. */
enum { ZQ_KEY_BLOCK = 64 };

typedef struct {
    int64_t rows, keys, d4, n;  /* rows 1 to 32; d4, n: head_dim rounded up to a multiple of 4 and of 32 */
    const uint8_t *q;           /* a panel of pack_rows_s8: (d4 / 4, 32, 4), s8; start is its colsum */
    const int32_t *start;       /* (lanes) */
    const uint8_t *k;           /* (keys, d4), s8 codes + 128 */
    const float *k_scale;       /* (keys) */
    const uint8_t *v;           /* of pack_columns_f32_s8 */
    const float *v_scale;       /* (n) */
    const float *factor;        /* (lanes), > 0 */
    float *max, *sum;           /* (lanes): m and l; all -Inf and 0 before the first tile */
    float *o;                   /* (lanes, n); not read in the first tile */
    float *s;                   /* working memory: (keys, 32) floats */
    uint8_t *p;                 /* the same: (keys rounded up to a multiple of ZQ_KEY_BLOCK, 32) */
} zq_code_tile;

/* Some query rows of one head against all keys of a short sequence. */
typedef struct {
    const float *q, *k, *v; /* (rows, head_dim), ld_q apart; (keys, head_dim), ld_kv apart */
    int64_t rows, keys, head_dim, ld_q, ld_kv; /* keys 1 to ZQ_FEW_KEYS; head_dim a multiple of 16 up to ZQ_FEW_DIM */
    float factor; /* > 0: p = 2^((s - m) factor) */
    float *out;   /* (rows, head_dim), ld_out apart */
    int64_t ld_out;
} zq_few_keys;

/* What a weight may become: code times scale. Integers: (code - zero), qmin <= code <= qmax. Else `count` ascending values,
 * code c for values[c]: as many of the count - 1 borders lie below the weight over the scale. */
typedef struct {
    int32_t qmin, qmax;
    int count;
    const float *values, *borders; /* NULL for integers */
} zq_grid;

/* What GPTQ rounds: w' = v + f; v alone (round to nearest); nothing, as if w' were on the grid. */
typedef enum { ZQ_ROUND_NOW, ZQ_ROUND_V, ZQ_ROUND_NOT } zq_rounding;

/* Some columns of a panel of 32 rows of weights in GPTQ (algo/gptq.c has the equations). Arrays (columns, 32) where not
 * said otherwise. */
typedef struct {
    int64_t columns;
    const zq_grid *grid;
    const float *factor; /* (columns, columns), rows ld apart: below the diagonal */
    const float *shift;  /* the same of P, or NULL */
    int64_t ld;
    const float *diag;    /* (columns): what makes an error e of w' - w_hat; 0 for a column that does not count */
    const int32_t *group; /* (columns): row of scale and zero (groups, 32) */
    const float *scale, *zero;
    zq_rounding rounding;
    float *delta; /* in: v; out: v - w_hat */
    float *f;     /* the feedback of all columns before these */
    float *seen;  /* out: w', where shift is given */
    uint8_t *codes;
    float *loss, *size; /* (32): sum e^2 and sum delta^2 of the columns that count */
} zq_gptq_tile;

/* Bounds of zq_few_keys: where it is faster than tiles, and what its working memory on the stack is made for. */
enum { ZQ_FEW_KEYS = 64, ZQ_FEW_DIM = 128 };

/* The gradient of LayerNorm (centred) or RMSNorm for one row: with n = (x - mean) inv, inv = 1 / sqrt(var + eps) and
 * g = dy gamma: dx = add + inv (g - mean g - n mean(g n)); without centring mean = mean g = 0 and var = mean x^2.
 * dgamma += dy n, dbeta += dy. */
typedef struct {
    const float *x, *dy, *gamma;
    const float *add; /* or NULL */
    int64_t n;
    float eps;
    int centred;
    float *dx; /* may be dy or add */
    float *dgamma, *dbeta; /* (n); dbeta only where centred */
} zq_norm_grad;

/* m = beta1 m + gain1 g, v = beta2 v + gain2 g g, w = keep w - step m / (root sqrt(v) + eps) */
typedef struct {
    float beta1, beta2, gain1, gain2, keep, step, root, eps;
} zq_adamw;

/* lo <= 0 <= hi around all of a row: what its scale and zero point are made of. */
typedef struct {
    float lo, hi;
} zq_range;

/* Most rows of one call of a kernel on rows: what hides the latency of their horizontal steps. */
enum { ZQ_ROWS = 8 };

/* clang-format off */
#define ZQ_KERNELS(X) \
    /* ---- rows of float32 to codes and back (quantize) ---- */ \
    /* max |x|; NaN or Inf when x has one (the maximum is taken over the bit patterns). 0 for n = 0 */ \
    X(absmax_f32, float, (const float *x, int64_t n)) \
    /* lo = min(0, min x), hi = max(0, max x); returns 1 when all of x is finite, else 0, and both are 0 */ \
    X(minmax_f32, int, (const float *x, int64_t n, float *lo, float *hi)) \
    /* top[j] = max(top[j], |x[i][j]|) over rows i; x (rows, n), ldx apart. NaN counts as larger than Inf */ \
    X(absmax_columns_f32, void, (const float *x, int64_t rows, int64_t n, int64_t ldx, float *top)) \
    /* q = rint(x * inv) + zero, saturated to 0..255; |x * inv| <= 32000, zero in 0..255 */ \
    X(quantize_mul_f32_b8, void, (const float *x, int64_t n, float inv, int32_t zero, uint8_t *q)) \
    /* the same, and the range of another row, next (n), as minmax_f32 gives it: returns 1 when all of that is finite. The n \
     * floats from `ahead` on are prefetched; nothing there is read */ \
    X(quantize_minmax_f32_b8, int, (const float *x, int64_t n, float inv, int32_t zero, uint8_t *q, const float *next, const float *ahead, zq_range *range)) \
    /* rint(clamp(x * inv, +-32767)) + 32768 as its two bytes. x finite */ \
    X(quantize_mul_f32_b16, void, (const float *x, int64_t n, float inv, uint8_t *high, uint8_t *low)) \
    /* codes of 8 bits with x / scale: what QuantizeLinear means, and what offline code uses */ \
    X(quantize_div_f32_b8, void, (const float *x, int64_t n, float scale, int32_t zero, int32_t qmin, int32_t qmax, uint8_t *q)) \
    /* the same with one scale and zero per element (per feature) */ \
    X(quantize_vec_f32_b8, void, (const float *x, int64_t n, const float *scale, const int32_t *zero, int32_t qmin, int32_t qmax, uint8_t *q)) \
    /* out = (q - zero) * scale; q is read as signed or unsigned bytes */ \
    X(dequantize_b8_f32, void, (const uint8_t *q, int64_t n, int is_signed, float scale, int32_t zero, float *out)) \
    X(dequantize_vec_b8_f32, void, (const uint8_t *q, int64_t n, int is_signed, const float *scale, const int32_t *zero, float *out)) \
    /* out (rows, cols) = (q - zero) * scale[column], both contiguous; cols a multiple of 16 */ \
    X(dequantize_cols_u8_f32, void, (const uint8_t *q, int64_t rows, int64_t cols, const float *scale, int32_t zero, float *out)) \
    /* n codes of `bits` (2, 3, 4 or 8) bits, one per byte (high bits ignored), to a dense little-endian bit stream \
     * of ceil(n * bits / 8) bytes; unused high bits of the last byte are 0. */ \
    X(pack_bits, void, (const uint8_t *codes, int64_t n, int bits, uint8_t *packed)) \
    /* and back; sign-extended to int8 when is_signed */ \
    X(unpack_bits, void, (const uint8_t *packed, int64_t n, int bits, int is_signed, uint8_t *codes)) \
    /* ---- solvers: weights to codes on a grid ---- */ \
    /* column by column: w' = v + f, code = grid(w' / scale), delta = v - w_hat, f of the later columns += delta * factor */ \
    X(gptq_columns_f32, void, (const zq_gptq_tile *t)) \
    /* sum weight[i] (w_hat[i] - w[i])^2, in the fixed order of sixteen lanes */ \
    X(grid_error_f32, float, (const zq_grid *grid, const float *w, const float *weight, int64_t n, float scale, float zero)) \
    /* ---- Transformer operators on rows (norm, activation, attention) ---- */ \
    /* Kernels named rows: `rows` <= ZQ_ROWS consecutive rows of n >= 1. They return a bit for each row, 0 where all is well; \
     * y of other rows is undefined. range: one for each row, what minmax_f32 gives for y, or NULL. */ \
    /* h = x (+ residual if not NULL); y = (h - mean) / sqrt(var + eps) * gamma + beta. y may be x; gamma and beta finite. \
     * Bad: h holds NaN or Inf, or y does and range is asked for. A row whose sums overflow or underflow is rescaled first */ \
    X(layernorm_rows_f32, unsigned, (const float *x, const float *residual, const float *gamma, const float *beta, int64_t rows, int64_t n, float eps, float *y, zq_range *range)) \
    /* h = x (+ residual); y = h / sqrt(mean h^2 + eps) * gamma. As layernorm */ \
    X(rmsnorm_rows_f32, unsigned, (const float *x, const float *residual, const float *gamma, int64_t rows, int64_t n, float eps, float *y, zq_range *range)) \
    /* one row; returns 1 where all is well */ \
    X(rmsnorm_f32, int, (const float *x, const float *residual, const float *gamma, int64_t n, float eps, float *y)) \
    /* y = act(x) (* up if not NULL); y may be x or up. Bad: x or up holds NaN or Inf, or an end of the range is Inf */ \
    X(activation_rows_f32, unsigned, (const float *x, const float *up, int64_t rows, int64_t n, zq_activation act, float *y, zq_range *range)) \
    /* y = exp(x - max x) / sum, see zq_softmax; y may be x. Bad: x holds NaN or +Inf */ \
    X(softmax_rows_f32, unsigned, (const float *x, int64_t rows, int64_t n, float *y)) \
    /* The same as codes, rows ldq apart: q = rint(levels exp(x - max x)) + bias, which factor / levels is the scale of; \
     * factor = 1 / sum per row, 0 for a row of nothing but -Inf. levels + bias <= 255 */ \
    X(softmax_rows_f32_b8, unsigned, (const float *x, int64_t rows, int64_t n, int32_t levels, int32_t bias, uint8_t *q, int64_t ldq, float *factor)) \
    /* max over x of finite or -Inf values; -Inf for n = 0 */ \
    X(max_f32, float, (const float *x, int64_t n)) \
    /* y = (x - shift) * factor, one of each per element; without shift (NULL) y = x * factor */ \
    X(shift_scale_f32, void, (const float *x, int64_t n, const float *shift, const float *factor, float *y)) \
    /* y = x * s; y may be x */ \
    X(scale_f32, void, (const float *x, int64_t n, float s, float *y)) \
    /* y (rows, n) = x (rows, n), filled up with zeros to a multiple of 16 columns */ \
    X(copy_rows_f32, void, (const float *x, int64_t rows, int64_t n, int64_t ldx, float *y, int64_t ldy)) \
    /* y (rows, n): row i of x times 1 / l[i], and no -0 */ \
    X(divide_rows_f32, void, (const float *x, int64_t rows, int64_t n, int64_t ldx, const float *l, float *y, int64_t ldy)) \
    /* y (cols, rows) = x (rows, cols) transposed */ \
    X(transpose_f32, void, (const float *x, int64_t rows, int64_t cols, int64_t ldx, float *y, int64_t ldy)) \
    /* y = the heads of one token, head_dim elements each, with the first 2 * half of each rotated (zq_rope); cos, sin \
     * (half). y may be x */ \
    X(rotary_f32, void, (const float *x, int64_t heads, int64_t head_dim, int64_t half, int interleaved, const float *cos, const float *sin, float *y)) \
    /* ---- gradients and training (algo/lkd.h) ---- */ \
    X(norm_grad_f32, void, (const zq_norm_grad *g)) \
    /* dx = dy (up if not NULL) act'(x), dup = dy act(x). dx may be x or dy, dup may be up */ \
    X(activation_grad_f32, void, (const float *x, const float *up, const float *dy, int64_t n, zq_activation act, float *dx, float *dup)) \
    /* dp = p (dp - sum p dp): through the softmax whose result is p */ \
    X(softmax_grad_f32, void, (const float *p, int64_t n, float *dp)) \
    /* the sum of x, in the fixed order of sixty-four partial sums */ \
    X(sum_f32, float, (const float *x, int64_t n)) \
    /* dy = factor (y - target); the sum of (y - target)^2, NaN or Inf where y is not finite. dy may be y */ \
    X(square_loss_f32, float, (const float *y, const float *target, int64_t n, float factor, float *dy)) \
    X(adamw_f32, void, (const zq_adamw *c, const float *g, int64_t n, float *w, float *m, float *v)) \
    /* ---- tiles of matrix products (gemm) ---- */ \
    X(gemm_u8s8, void, (zq_tile *t)) \
    X(gemm_u8s8_s32, void, (const zq_tile *t, int32_t *c, int64_t ldc)) \
    X(gemm_s8u8_group, void, (zq_tile *t)) \
    X(gemm_s8u4_group, void, (zq_tile *t)) \
    /* s = q - 128 as signed bytes; start[g] = -offset * (sum of s over group g). s may be q */ \
    X(center_groups_b8, void, (const uint8_t *q, int64_t n, int64_t group, int32_t offset, uint8_t *s, int32_t *start)) \
    X(gemm_f32, void, (zq_tile *t)) \
    /* ---- tiles of attention ---- */ \
    /* t->y (mr, nr) = a (mr, k) b (k, nr) [+ y when accumulate]: element (k, j) of b is \
     * t->b[j / 32 * panel + k * ldb + j % 32]; each element is one chain of fma in the order of k; no epilogue. \
     * mr <= mr_matmul; nr a multiple of 16 */ \
    X(matmul_f32, void, (const zq_tile *t, int64_t ldb, int64_t panel, int accumulate)) \
    /* m' = max(m, max s), where it rose l and o *= 2^((m - m') factor); s = p = 2^((s - m') factor), l += sum p in the fixed \
     * order. NaN and Inf in s show in l */ \
    X(softmax_tile_f32, void, (const zq_softmax_tile *t)) \
    /* softmax(q k^T) v as matmul_f32, softmax_tile_f32 and divide_rows_f32 give it, bit for bit. Returns 1; 0 where a row is \
     * not finite: out is then undefined, and the tiles say which */ \
    X(attend_few_f32, int, (const zq_few_keys *t)) \
    /* some query rows against a tile of keys, in codes: zq_code_tile */ \
    X(attend_tile_b8, void, (const zq_code_tile *t)) \
    /* rows of n floats, ldx apart: q = rint(x / scale) + bias (0 or 128), scale = max|x| / 127 per row; bias up to a \
     * multiple of 4. NaN and Inf show in the scale */ \
    X(quantize_heads_f32_b8, void, (const float *x, int64_t rows, int64_t n, int64_t ldx, int bias, uint8_t *q, int64_t ldq, float *scale)) \
    /* codes (rows, n), n a multiple of 4, in panels of 32 rows, each (n / 4, 32, 4); colsum = -128 * their sum per row, \
     * which takes a bias of 128 out of the products. Rows and sums from `rows` up to a multiple of 16 hold anything */ \
    X(pack_rows_s8, void, (const uint8_t *q, int64_t rows, int64_t n, uint8_t *panels, int32_t *colsum)) \
    /* x (rows, n), ldx apart, in panels of 32 columns, each (rows / 4, 32, 4); rows are filled up with zeros to a multiple \
     * of 4, columns to a multiple of 32; scale = max|x| / 127 per column */ \
    X(pack_columns_f32_s8, void, (const float *x, int64_t rows, int64_t n, int64_t ldx, uint8_t *q, float *scale))
/* clang-format on */

typedef struct zq_kernels {
#define X(name, ret, args) ret(*name) args;
    ZQ_KERNELS(X)
#undef X
    /* Tile heights: they only make sense beside the kernels. */
    int mr_u8s8, mr_group, mr_f32, mr_matmul;
    /* Up to so many tiles of rows are quicker one after the other, each over many panels, than panel by panel. */
    int few_tiles;
    /* Weights out of memory are read once, not once per thread, by up to so many rows: who computes fast waits for memory. */
    int memory_rows;
    /* Whether weights out of memory are prefetched to L2 rather than to L1. */
    int fetch_to_l2;
} zq_kernels;

#define X(name, ret, args) ret zq_##name##__ref args;
ZQ_KERNELS(X)
#undef X

/* Of a core's L2, what a chunk of rows may occupy, in bytes: half of it. Speed alone depends on it. */
int64_t zq_l2_room(void);
/* The active level's table: load it once per entry into the core, not per row. */
const zq_kernels *zq_active(void);
/* The level whose implementation `level` uses for the kernel at field index i of the list. */
zq_level zq_kernel_origin(zq_level level, int i);
extern const char *const zq_kernel_names[];
extern const int zq_kernel_count;

/* What depends on the CPU, not on its levels, and on which no bit of a result depends: 0 or 1; -1 is what suits this CPU, as at
 * import (one table in zq_dispatch.c). For tests and measurements: no kernel may be running. */
typedef struct {
    int tall_groups; /* avx512vnni: tiles of groups are 12x32 rather than 4x32 */
    int fetch_to_l2; /* as in zq_kernels */
} zq_cpu_choices;
void zq_cpu_choices_use(zq_cpu_choices choices);

/* Each x86 level fills in its own families (one function per file). */
#if defined(__x86_64__)
void zq_fill_quantize__avx2(zq_kernels *t);
void zq_fill_quantize__avx512vnni(zq_kernels *t);
void zq_fill_nn__avx2(zq_kernels *t);
void zq_fill_nn__avx512vnni(zq_kernels *t);
void zq_fill_gemm__avx2(zq_kernels *t);
void zq_fill_gemm__avxvnni(zq_kernels *t);
void zq_fill_gemm__avx512vnni(zq_kernels *t, int tall_groups);
void zq_fill_nn__amx(zq_kernels *t);
void zq_fill_gemm__amx(zq_kernels *t);
#endif

#endif
