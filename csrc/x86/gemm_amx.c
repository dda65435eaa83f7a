/* AMX tiles: 32 rows by one panel of 32 columns, up to 64 input features a step. A tile register holds 16 rows of 64 bytes:
 * rows of a as they lie in memory, and of a panel 16 of its 128-byte lines, the left or the right half of each, which is the
 * layout of the second operand. Four registers of sums, two of each operand:
 *
 *            b 6   b 7
 *     a 4     0     1      rows 0 to 15
 *     a 5     2     3      rows 16 and on
 *
 * Sums leave by way of memory. There, rows are finished (scale, bias, activation, residual), and of groups become float
 * sums, as the other levels do it, bit for bit; the sums are integers, whose order does not show. Rows of a come with the
 * hint that they will not be needed again soon: L1 then keeps the panel for the next tile (+20 % at 768 input features). A
 * chain of products in one register goes as fast as several side by side.
 *
 * Measured without gain: finishing a tile between the steps of the next one, which the out-of-order core does by itself (tried
 * twice; of a prototype's 10 to 30 % nothing is left beside the prefetching and the strides of the product); fetching rows or
 * outputs ahead; panels longer than L1 in blocks of input features that eight tiles meet in turn. Of groups, quarters of a
 * tile with their float sums in registers are quicker where sixteen tiles share a panel, and slower elsewhere. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AMX)
#include "v16_avx512.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"

#include "amx_tiles.h"

enum { MR = 32, HALF = 16, STEP = 64, LINE = ZQ_PANEL_LINE, FEW_ROWS = 4 };

/* The registers for tiles of mr rows and steps of `depth` input features; all of them are cleared. */
ZQ_INLINE void
configure(int mr, int depth)
{
    const uint8_t top = (uint8_t)zq_min(mr, HALF), bottom = (uint8_t)zq_max(mr - HALF, 1), lines = (uint8_t)(depth / 4);
    const uint16_t bytes = (uint16_t)depth;
    const zq_tile_config config = {.palette = 1,
                                   .row_bytes = {64, 64, 64, 64, bytes, bytes, 64, 64},
                                   .rows = {top, top, bottom, bottom, top, bottom, lines, lines}};
    zq_load_tile_config(&config);
}

ZQ_INLINE void
clear_sums(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums of a tile, (MR, NR): integers, or float32 of groups */
typedef union {
    _Alignas(64) int32_t at[MR * ZQ_NR];
    float f32[MR * ZQ_NR];
} sums;

ZQ_INLINE void
store_sums(const int tall, sums *c)
{
    _tile_stored(0, c->at, LINE);
    _tile_stored(1, c->at + HALF, LINE);
    if (tall) {
        _tile_stored(2, c->at + HALF * ZQ_NR, LINE);
        _tile_stored(3, c->at + HALF * ZQ_NR + HALF, LINE);
    }
    ZQ_TILES_IN_ORDER();
}

/* One step: rows a, lda bytes apart, times the lines of a panel at b. PRODUCT is tdpbusd (u8 a, s8 b) or tdpbsud. Of at most 16
 * rows (not tall) or columns (narrow) there are no others. */
#define MULTIPLY_STEP(PRODUCT, tall, narrow, a, lda, b)              \
    {                                                                \
        _tile_stream_loadd(4, a, (size_t)(lda));                     \
        _tile_loadd(6, b, LINE);                                     \
        PRODUCT(0, 4, 6);                                            \
        if (tall) {                                                  \
            _tile_stream_loadd(5, (a) + HALF * (lda), (size_t)(lda)); \
            PRODUCT(2, 5, 6);                                        \
        }                                                            \
        if (!(narrow)) {                                             \
            _tile_loadd(7, (b) + LINE / 2, LINE);                    \
            PRODUCT(1, 4, 7);                                        \
            if (tall) {                                              \
                PRODUCT(3, 5, 7);                                    \
            }                                                        \
        }                                                            \
    }

/* What t->ahead asks for (see zq_tile) beside `lines` lines of the panel; where that is next. to_l2: t->ahead_to_l2, a constant
 * in the loops of few rows, where these are most of the work. */
ZQ_INLINE const char *
prefetch_beside(const int to_l2, const zq_tile *t, const char *ahead, int64_t lines)
{
    const int64_t bytes = ahead ? lines * t->ahead_step : 0;
    for (int64_t i = 0; i < bytes; i += 64) {
        if (to_l2) {
            _mm_prefetch(ahead + i, _MM_HINT_T1);
        }
        else {
            _mm_prefetch(ahead + i, _MM_HINT_T0);
        }
    }
    return ahead ? ahead + bytes : NULL;
}

/* ---- S8 -------------------------------------------------------------------------------------------- */
/* The last input features, less than a step, with zeros behind them: nothing behind the rows of a is read, and what lies
 * behind the panel (the next one, or slack) is multiplied by 0. */
ZQ_INLINE void
last_step(const int tall, const zq_tile *t, const uint8_t *from, const uint8_t *b)
{
    _Alignas(64) uint8_t a[MR * STEP];
    const __mmask64 mask = ~0ULL >> (STEP - t->k % STEP);
    for (int r = 0; r < t->mr; r++) {
        _mm512_store_si512(a + r * STEP, _mm512_maskz_loadu_epi8(mask, from + r * t->lda));
    }
    ZQ_TILES_IN_ORDER();
    MULTIPLY_STEP(_tile_dpbusd, tall, t->nr <= HALF, a, STEP, b)
}

/* The sums of tile t, without what zero points take off */
ZQ_INLINE void
multiply(const int tall, const int to_l2, const zq_tile *t, sums *c)
{
    const uint8_t *a = t->a, *b = t->b;
    const char *ahead = t->ahead;
    const int narrow = t->nr <= HALF;
    clear_sums();
    for (int64_t k = STEP; k <= t->k; k += STEP, a += STEP, b += STEP / 4 * LINE) {
        MULTIPLY_STEP(_tile_dpbusd, tall, narrow, a, t->lda, b)
        ahead = prefetch_beside(to_l2, t, ahead, STEP / 4);
    }
    if (t->k % STEP) {
        last_step(tall, t, a, b);
    }
    store_sums(tall, c);
}

ZQ_INLINE void
multiply_rows(const int tall, const zq_tile *t, sums *c)
{
    if (t->ahead_to_l2) {
        multiply(tall, 1, t, c);
    }
    else {
        multiply(tall, 0, t, c);
    }
}

static void
multiply_tile(const zq_tile *t, sums *c)
{
    if (t->mr > HALF) {
        multiply_rows(1, t, c);
    }
    else {
        multiply_rows(0, t, c);
    }
}

/* ---- groups ---------------------------------------------------------------------------------------- */
/* `depth` input features of a panel of 4-bit codes, a byte for each */
ZQ_INLINE void
unpack_step(const uint8_t *b, int depth, uint8_t *to)
{
    const __m512i low = _mm512_set1_epi8(15);
    for (; depth > 0; depth -= 8, b += LINE, to += 2 * LINE) {
        const __m512i w0 = _mm512_load_si512(b), w1 = _mm512_load_si512(b + 64);
        _mm512_store_si512(to, _mm512_and_si512(w0, low));
        _mm512_store_si512(to + 64, _mm512_and_si512(w1, low));
        _mm512_store_si512(to + LINE, _mm512_and_si512(_mm512_srli_epi16(w0, 4), low));
        _mm512_store_si512(to + LINE + 64, _mm512_and_si512(_mm512_srli_epi16(w1, 4), low));
    }
}

/* f += (c + start) * scale, of a group whose starts lie at start, ld_start apart */
ZQ_INLINE void
add_group(const zq_tile *t, const sums *c, const int32_t *start, const float *scale, const int first, sums *f)
{
    const __m512 s0 = _mm512_load_ps(scale), s1 = _mm512_load_ps(scale + HALF), none = _mm512_setzero_ps();
    const int64_t ld = t->ld_start;
    const int mr = t->mr;
    for (int i = 0; i < mr; i++, start += ld) {
        const __m512i v = _mm512_set1_epi32(*start);
        float *to = f->f32 + i * ZQ_NR;
        const __m512 c0 = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(c->at + i * ZQ_NR), v));
        const __m512 c1 = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(c->at + i * ZQ_NR + HALF), v));
        _mm512_store_ps(to, _mm512_fmadd_ps(c0, s0, first ? none : _mm512_load_ps(to)));
        _mm512_store_ps(to + HALF, _mm512_fmadd_ps(c1, s1, first ? none : _mm512_load_ps(to + HALF)));
    }
}

/* The float sums of tile t. A group's sums are added while the next one is multiplied. Codes of 4 bits are unpacked to two
 * buffers in turn, as the compiler may do so before the products of the step before. */
ZQ_INLINE void
multiply_groups(const int tall, const int four_bits, const int depth, const zq_tile *t, sums *f)
{
    _Alignas(64) uint8_t codes[2][STEP * ZQ_NR];
    sums c;
    const int64_t groups = t->k / t->group, steps = t->group / depth, step_bytes = depth * ZQ_NR / (four_bits ? 2 : 1);
    const uint8_t *a = t->a, *b = t->b;
    const float *scale = NULL;
    const char *ahead = t->ahead;
    for (int64_t g = 0; g <= groups; g++) {
        const float *next_scale = (const float *)b;
        if (g < groups) {
            b += LINE;
            clear_sums();
            for (int64_t i = 0; i < steps; i++, a += depth, b += step_bytes) {
                const uint8_t *panel = b;
                if (four_bits) {
                    uint8_t *to = codes[(g * steps + i) % 2];
                    unpack_step(b, depth, to);
                    ZQ_TILES_IN_ORDER();
                    panel = to;
                }
                MULTIPLY_STEP(_tile_dpbsud, tall, 0, a, t->lda, panel)
            }
            ahead = t->ahead_to_l2 ? prefetch_beside(1, t, ahead, 1 + steps * step_bytes / LINE)
                                   : prefetch_beside(0, t, ahead, 1 + steps * step_bytes / LINE);
        }
        if (g == 1) {
            add_group(t, &c, t->start, scale, 1, f);
        }
        else if (g > 1) {
            add_group(t, &c, t->start + g - 1, scale, 0, f);
        }
        if (g < groups) {
            store_sums(tall, &c);
        }
        scale = next_scale;
    }
}

ZQ_INLINE void
multiply_rows_groups(const int tall, const int four_bits, const zq_tile *t, sums *f)
{
    if (t->group % STEP) {
        multiply_groups(tall, four_bits, STEP / 2, t, f);
    }
    else {
        multiply_groups(tall, four_bits, STEP, t, f);
    }
}

ZQ_INLINE void
multiply_tile_groups(const int four_bits, const zq_tile *t, sums *f)
{
    if (t->mr > HALF) {
        multiply_rows_groups(1, four_bits, t, f);
    }
    else {
        multiply_rows_groups(0, four_bits, t, f);
    }
}

/* ---- sums become y --------------------------------------------------------------------------------- */
/* What all rows of a tile share, of columns j .. j + 16 */
typedef struct {
    __m512i colsum;
    __m512 scale, bias; /* of groups, zcorr is in the place of the scale */
} columns;

ZQ_INLINE columns
columns_of(const zq_tile *t, const int grouped, int j)
{
    return (columns){grouped ? _mm512_setzero_si512() : _mm512_loadu_si512(t->colsum + j),
                     _mm512_loadu_ps((grouped ? t->zcorr : t->scale) + j), _mm512_loadu_ps(t->bias + j)};
}

/* The sum in row i, columns j .. j + 16, minus zero * colsum */
ZQ_INLINE __m512i
sum_at(const zq_tile *t, const sums *c, int i, int j, __m512i colsum)
{
    const __m512i sum = _mm512_load_si512(c->at + i * ZQ_NR + j);
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(t->zx[i]), colsum));
}

/* (sum * sx) * scale + bias; of groups (f - (zero - 128) * zcorr) * sx + bias */
ZQ_INLINE __m512
scaled_at(const zq_tile *t, const int grouped, const sums *c, int i, int j, const columns *of)
{
    const __m512 sx = _mm512_set1_ps(t->sx[i]);
    if (grouped) {
        const __m512 zero = _mm512_set1_ps((float)(t->zx[i] - 128));
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, of->scale, _mm512_load_ps(c->f32 + i * ZQ_NR + j)), sx, of->bias);
    }
    const __m512 v = _mm512_cvtepi32_ps(sum_at(t, c, i, j, of->colsum));
    return _mm512_fmadd_ps(_mm512_mul_ps(v, sx), of->scale, of->bias);
}

/* `rows` <= TOGETHER rows from i on, their vectors in step. Simple: whole rows, and only the activation is left to do. */
enum { TOGETHER = 2 };

ZQ_INLINE void
finish_vectors(const zq_tile *t, const int grouped, const int simple, const sums *c, const columns of[2], int i, const int rows,
               const zq_activation act)
{
    __m512 y[2 * TOGETHER];
#define EACH ZQ_UNROLL(4) for (int u = 0; u < 2 * rows; u++)
    EACH { y[u] = scaled_at(t, grouped, c, i + u / 2, u % 2 * HALF, &of[u % 2]); }
    if (!simple) {
        EACH { y[u] = add_low_rank(t, y[u], i + u / 2, u % 2 * HALF); }
    }
    v16_activates(y, act, 2 * rows);
    EACH
    {
        const int64_t n = simple ? HALF : zq_min(t->nr - u % 2 * HALF, HALF);
        if (simple) {
            _mm512_storeu_ps(t->y + (i + u / 2) * t->ldy + u % 2 * HALF, y[u]);
        }
        else if (n > 0) {
            store_finished(t, y[u], i + u / 2, u % 2 * HALF, n);
        }
    }
#undef EACH
}

ZQ_INLINE void
finish_with(const zq_tile *t, const int grouped, const int simple, const sums *c, const zq_activation act)
{
    columns of[2] = {columns_of(t, grouped, 0), columns_of(t, grouped, HALF)};
    const zq_tile here = *t; /* which the stores to y cannot change */
    int i = 0;
    for (; i + TOGETHER <= here.mr; i += TOGETHER) {
        if (act != ZQ_ACT_NONE) { /* read again: an activation takes all registers */
            of[0] = columns_of(&here, grouped, 0);
            of[1] = columns_of(&here, grouped, HALF);
        }
        finish_vectors(&here, grouped, simple, c, of, i, TOGETHER, act);
    }
    if (i < here.mr) {
        finish_vectors(&here, grouped, simple, c, of, i, 1, act);
    }
}

/* Pairs of rows: y = act((y_2i + y_2i+1) + bias) + residual */
ZQ_INLINE void
finish_pairs(const zq_tile *t, const int grouped, const sums *c, const zq_activation act)
{
    for (int i = 0; i < t->mr; i += 2) {
        for (int j = 0; j < t->nr; j += HALF) {
            columns of = columns_of(t, grouped, j);
            const __m512 bias = of.bias;
            of.bias = _mm512_setzero_ps();
            const __m512 both = _mm512_add_ps(scaled_at(t, grouped, c, i, j, &of), scaled_at(t, grouped, c, i + 1, j, &of));
            finish_vector(t, _mm512_add_ps(both, bias), i / 2, j, zq_min(t->nr - j, HALF), act);
        }
    }
}

ZQ_INLINE void
finish_as(const zq_tile *t, const int grouped, const sums *c, const zq_activation act)
{
    if (t->pairs) {
        finish_pairs(t, grouped, c, act);
    }
    else if (t->nr == ZQ_NR && !t->rank && !t->residual && !t->stream) {
        finish_with(t, grouped, 1, c, act);
    }
    else {
        finish_with(t, grouped, 0, c, act);
    }
}

ZQ_INLINE void
finish(const zq_tile *t, const int grouped, const sums *c)
{
    switch (t->act) {
    case ZQ_ACT_NONE: finish_as(t, grouped, c, ZQ_ACT_NONE); break;
    case ZQ_ACT_RELU: finish_as(t, grouped, c, ZQ_ACT_RELU); break;
    case ZQ_ACT_GELU: finish_as(t, grouped, c, ZQ_ACT_GELU); break;
    case ZQ_ACT_GELU_TANH: finish_as(t, grouped, c, ZQ_ACT_GELU_TANH); break;
    case ZQ_ACT_SILU: finish_as(t, grouped, c, ZQ_ACT_SILU); break;
    case ZQ_ACTS: break;
    }
}

static void
finish_s8(const zq_tile *t, const sums *c)
{
    finish(t, 0, c);
}

static void
finish_groups(const zq_tile *t, const sums *f)
{
    finish(t, 1, f);
}

/* ---- the kernels ----------------------------------------------------------------------------------- */
/* Those of the level below: tiles of few rows (of short groups, not quite so few) leave most of a tile register empty, and some
 * groups are not of whole steps. */
typedef void (*tiles_fn)(zq_tile *t);
static struct {
    tiles_fn u8s8, s8u8_group, s8u4_group;
    void (*u8s8_s32)(const zq_tile *t, int32_t *c, int64_t ldc);
    int mr_group;
} below;

static void
zq_gemm_u8s8_32x32__amx(zq_tile *t)
{
    if (t->mr <= FEW_ROWS) {
        below.u8s8(t);
        return;
    }
    sums c;
    configure(t->mr, STEP);
    EACH_TILE(t, (multiply_tile(t, &c), finish_s8(t, &c)))
    _tile_release();
}

static void
zq_gemm_u8s8_s32_32x32__amx(const zq_tile *t, int32_t *out, int64_t ldc)
{
    if (t->mr <= FEW_ROWS) {
        below.u8s8_s32(t, out, ldc);
        return;
    }
    sums c;
    configure(t->mr, STEP);
    multiply_tile(t, &c);
    _tile_release();
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < t->nr; j += HALF) {
            const __m512i sum = sum_at(t, &c, i, j, _mm512_loadu_si512(t->colsum + j));
            _mm512_mask_storeu_epi32(out + i * ldc + j, v16_mask(zq_min(t->nr - j, HALF)), sum);
        }
    }
}

/* One tile, by the level below in as many as it needs */
static void
in_lower_tiles(const zq_tile *t, tiles_fn kernel)
{
    for (int i = 0; i < t->mr; i += below.mr_group) {
        const int64_t row = t->pairs ? i / 2 : i;
        zq_tile part = *t;
        part.mr = (int)zq_min(below.mr_group, t->mr - i);
        part.a = (const uint8_t *)t->a + i * t->lda;
        part.sx += i;
        part.zx += i;
        part.start += i * t->ld_start;
        part.y += row * t->ldy;
        part.residual = t->residual ? t->residual + row * t->ldr : NULL;
        part.low = t->low ? t->low + row * t->ld_low : NULL;
        kernel(&part);
    }
}

/* Up to so many rows the level below is faster with groups of this size. */
ZQ_INLINE int
few_rows_of(int64_t group)
{
    return group < STEP ? 12 : group == STEP ? 8 : 6;
}

ZQ_INLINE void
run_groups(zq_tile *t, const int four_bits, tiles_fn lower)
{
    const int whole = (t->group % STEP == 0 || t->group == STEP / 2) && t->k % t->group == 0;
    if (!whole || t->mr <= few_rows_of(t->group)) {
        if (t->mr <= below.mr_group) {
            lower(t);
            return;
        }
        EACH_TILE(t, in_lower_tiles(t, lower))
        return;
    }
    sums f;
    configure(t->mr, (int)zq_min(t->group, STEP));
    EACH_TILE(t, (multiply_tile_groups(four_bits, t, &f), finish_groups(t, &f)))
    _tile_release();
}

static void
zq_gemm_s8u8_group_32x32__amx(zq_tile *t)
{
    run_groups(t, 0, below.s8u8_group);
}

static void
zq_gemm_s8u4_group_32x32__amx(zq_tile *t)
{
    run_groups(t, 1, below.s8u4_group);
}

ZQ_TARGET_END

void
zq_fill_gemm__amx(zq_kernels *t)
{
    below.u8s8 = t->gemm_u8s8;
    below.u8s8_s32 = t->gemm_u8s8_s32;
    below.s8u8_group = t->gemm_s8u8_group;
    below.s8u4_group = t->gemm_s8u4_group;
    below.mr_group = t->mr_group;
    t->gemm_u8s8 = zq_gemm_u8s8_32x32__amx;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_32x32__amx;
    t->gemm_s8u8_group = zq_gemm_s8u8_group_32x32__amx;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_32x32__amx;
    t->mr_u8s8 = t->mr_group = MR;
    t->memory_rows = 256;
}
#else
typedef int zq_no_x86;
#endif
