/* AMX tiles of S8: 32 rows by one panel of 32 columns, 64 input features a step. A tile register holds 16 rows of 64 bytes:
 * rows of a as they lie in memory, and of a panel 16 of its 128-byte lines, the left or the right half of each, which is the
 * layout of tdpbusd's second operand. Four registers of sums, two of each operand:
 *
 *            b 6   b 7
 *     a 4     0     1      rows 0 to 15
 *     a 5     2     3      rows 16 and on; of at most 16 rows: the same rows, every other step
 *
 * Sums leave by way of memory, and rows are finished (scale, bias, activation, residual) from there, as the other levels do it,
 * bit for bit; the sums are integers, whose order does not show. Rows of a come with the hint that they will not be needed
 * again soon: L1 then keeps the panel for the next tile (+20 % at 768 input features). Measured without gain: finishing a tile
 * between the steps of the next one, which the out-of-order core does by itself, and fetching rows or outputs ahead. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AMX)
#include "v16_avx512.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"

enum { MR = 32, HALF = 16, STEP = 64, LINE = 4 * ZQ_NR, FEW_ROWS = 4 };

/* What ldtilecfg reads */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Tile instructions are opaque to the compiler: memory that they read is written before, what they wrote is read behind. */
#define IN_ORDER() __asm__ volatile("" ::: "memory")

/* The registers for tiles of mr rows; all of them are cleared. */
ZQ_INLINE void
configure(int mr)
{
    const uint8_t top = (uint8_t)zq_min(mr, HALF), bottom = (uint8_t)(mr > HALF ? mr - HALF : mr);
    const tile_config config = {.palette = 1,
                                .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                .rows = {top, top, bottom, bottom, top, bottom, HALF, HALF}};
    IN_ORDER();
    _tile_loadconfig(&config);
}

/* Where the rows of a tile and its panel lie, and how far their rows are apart, in bytes. */
typedef struct {
    const uint8_t *a, *b;
    int64_t lda;
    int narrow; /* at most 16 columns */
} operands;

/* One step of all rows of a tile of more than 16 */
ZQ_INLINE void
step_tall(const operands *o)
{
    _tile_stream_loadd(4, o->a, (size_t)o->lda);
    _tile_loadd(6, o->b, LINE);
    _tile_dpbusd(0, 4, 6);
    _tile_stream_loadd(5, o->a + HALF * o->lda, (size_t)o->lda);
    _tile_dpbusd(2, 5, 6);
    if (!o->narrow) {
        _tile_loadd(7, o->b + LINE / 2, LINE);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
}

/* One step of a tile of at most 16 rows: into registers 0 and 1, or into 2 and 3, as one chain of sums would wait for itself. */
ZQ_INLINE void
step_low(const operands *o, const int odd)
{
    if (odd) {
        _tile_stream_loadd(5, o->a, (size_t)o->lda);
        _tile_loadd(6, o->b, LINE);
        _tile_dpbusd(2, 5, 6);
        if (!o->narrow) {
            _tile_loadd(7, o->b + LINE / 2, LINE);
            _tile_dpbusd(3, 5, 7);
        }
        return;
    }
    _tile_stream_loadd(4, o->a, (size_t)o->lda);
    _tile_loadd(6, o->b, LINE);
    _tile_dpbusd(0, 4, 6);
    if (!o->narrow) {
        _tile_loadd(7, o->b + LINE / 2, LINE);
        _tile_dpbusd(1, 4, 7);
    }
}

ZQ_INLINE void
step(const int tall, const operands *o, int64_t i)
{
    if (tall) {
        step_tall(o);
    }
    else {
        step_low(o, i % 2 != 0);
    }
}

/* The last input features, less than a step, with zeros behind them: nothing behind the rows of a is read, and what lies
 * behind the panel (the next one, or slack) is multiplied by 0. */
ZQ_INLINE void
last_step(const int tall, const zq_tile *t, const operands *o, int64_t i)
{
    _Alignas(64) uint8_t a[MR * STEP];
    const __mmask64 mask = ~0ULL >> (STEP - t->k % STEP);
    for (int r = 0; r < t->mr; r++) {
        _mm512_store_si512(a + r * STEP, _mm512_maskz_loadu_epi8(mask, o->a + r * o->lda));
    }
    IN_ORDER();
    step(tall, &(operands){.a = a, .b = o->b, .lda = STEP, .narrow = o->narrow}, i);
}

/* What t->ahead asks for (see zq_tile) beside the lines of one step of the panel; where that is next */
ZQ_INLINE const char *
prefetch_step(const zq_tile *t, const char *ahead)
{
    const int64_t bytes = STEP / 4 * t->ahead_step;
    for (int64_t i = 0; i < bytes; i += 64) {
        _mm_prefetch(ahead + i, _MM_HINT_T0);
    }
    return ahead + bytes;
}

/* Sums of a tile: (MR, NR), where those of at most 16 rows are the sum of rows i and HALF + i. */
typedef struct {
    _Alignas(64) int32_t at[MR * ZQ_NR];
} sums;

/* The sums of tile t, without what zero points take off */
ZQ_INLINE void
multiply(const int tall, const zq_tile *t, sums *c)
{
    const int64_t steps = t->k / STEP;
    operands o = {.a = t->a, .b = t->b, .lda = t->lda, .narrow = t->nr <= HALF};
    const char *ahead = t->ahead;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++, o.a += STEP, o.b += STEP / 4 * LINE) {
        step(tall, &o, i);
        ahead = ahead ? prefetch_step(t, ahead) : NULL;
    }
    if (t->k % STEP) {
        last_step(tall, t, &o, steps);
    }
    _tile_stored(0, c->at, LINE);
    _tile_stored(1, c->at + HALF, LINE);
    _tile_stored(2, c->at + HALF * ZQ_NR, LINE);
    _tile_stored(3, c->at + HALF * ZQ_NR + HALF, LINE);
    IN_ORDER();
}

static void
multiply_tile(const zq_tile *t, sums *c)
{
    if (t->mr > HALF) {
        multiply(1, t, c);
    }
    else {
        multiply(0, t, c);
    }
}

/* What all rows of a tile share, of columns j .. j + 16 */
typedef struct {
    __m512i colsum;
    __m512 scale, bias;
} columns;

ZQ_INLINE columns
columns_of(const zq_tile *t, int j)
{
    return (columns){_mm512_loadu_si512(t->colsum + j), _mm512_loadu_ps(t->scale + j), _mm512_loadu_ps(t->bias + j)};
}

/* The sum in row i, columns j .. j + 16, minus zero * colsum; of a low tile out of its two parts */
ZQ_INLINE __m512i
sum_at(const zq_tile *t, const int low, const sums *c, int i, int j, __m512i colsum)
{
    __m512i sum = _mm512_load_si512(c->at + i * ZQ_NR + j);
    if (low) {
        sum = _mm512_add_epi32(sum, _mm512_load_si512(c->at + (HALF + i) * ZQ_NR + j));
    }
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(t->zx[i]), colsum));
}

/* (sum * sx) * scale + bias */
ZQ_INLINE __m512
scaled_at(const zq_tile *t, const int low, const sums *c, int i, int j, const columns *of)
{
    const __m512 v = _mm512_cvtepi32_ps(sum_at(t, low, c, i, j, of->colsum));
    return _mm512_fmadd_ps(_mm512_mul_ps(v, _mm512_set1_ps(t->sx[i])), of->scale, of->bias);
}

/* `rows` <= TOGETHER rows from i on, their vectors in step. Simple: whole rows, and nothing but the activation is left to do. */
enum { TOGETHER = 2 };

ZQ_INLINE void
finish_vectors(const zq_tile *t, const int low, const int simple, const sums *c, const columns of[2], int i, const int rows,
               const zq_activation act)
{
    __m512 y[2 * TOGETHER];
#define EACH _Pragma("GCC unroll 4") for (int u = 0; u < 2 * rows; u++)
    EACH { y[u] = scaled_at(t, low, c, i + u / 2, u % 2 * HALF, &of[u % 2]); }
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
finish_with(const zq_tile *t, const int low, const int simple, const sums *c, const zq_activation act)
{
    columns of[2] = {columns_of(t, 0), columns_of(t, HALF)};
    const zq_tile here = *t; /* which the stores to y cannot change */
    int i = 0;
    for (; i + TOGETHER <= here.mr; i += TOGETHER) {
        if (act != ZQ_ACT_NONE) { /* read again: an activation takes all registers */
            of[0] = columns_of(&here, 0);
            of[1] = columns_of(&here, HALF);
        }
        finish_vectors(&here, low, simple, c, of, i, TOGETHER, act);
    }
    if (i < here.mr) {
        finish_vectors(&here, low, simple, c, of, i, 1, act);
    }
}

/* Pairs of rows: y = act((y_2i + y_2i+1) + bias) + residual */
ZQ_INLINE void
finish_pairs(const zq_tile *t, const int low, const sums *c, const zq_activation act)
{
    for (int i = 0; i < t->mr; i += 2) {
        for (int j = 0; j < t->nr; j += HALF) {
            columns of = columns_of(t, j);
            const __m512 bias = of.bias;
            of.bias = _mm512_setzero_ps();
            const __m512 both = _mm512_add_ps(scaled_at(t, low, c, i, j, &of), scaled_at(t, low, c, i + 1, j, &of));
            finish_vector(t, _mm512_add_ps(both, bias), i / 2, j, zq_min(t->nr - j, HALF), act);
        }
    }
}

ZQ_INLINE void
finish_as(const zq_tile *t, const int low, const sums *c, const zq_activation act)
{
    if (t->pairs) {
        finish_pairs(t, low, c, act);
    }
    else if (t->nr == ZQ_NR && !t->rank && !t->residual && !t->stream) {
        finish_with(t, low, 1, c, act);
    }
    else {
        finish_with(t, low, 0, c, act);
    }
}

ZQ_INLINE void
finish_sums(const zq_tile *t, const sums *c, const zq_activation act)
{
    if (t->mr > HALF) {
        finish_as(t, 0, c, act);
    }
    else {
        finish_as(t, 1, c, act);
    }
}

static void
finish(const zq_tile *t, const sums *c)
{
    switch (t->act) {
    case ZQ_ACT_NONE: finish_sums(t, c, ZQ_ACT_NONE); break;
    case ZQ_ACT_RELU: finish_sums(t, c, ZQ_ACT_RELU); break;
    case ZQ_ACT_GELU: finish_sums(t, c, ZQ_ACT_GELU); break;
    case ZQ_ACT_GELU_TANH: finish_sums(t, c, ZQ_ACT_GELU_TANH); break;
    case ZQ_ACT_SILU: finish_sums(t, c, ZQ_ACT_SILU); break;
    case ZQ_ACTS: break;
    }
}

/* Tiles of few rows leave most of a tile register empty: the level below has the kernel for them. */
static void (*few_rows)(zq_tile *t);
static void (*few_rows_s32)(const zq_tile *t, int32_t *c, int64_t ldc);

static void
zq_gemm_u8s8_32x32__amx(zq_tile *t)
{
    if (t->mr <= FEW_ROWS) {
        few_rows(t);
        return;
    }
    sums c;
    configure(t->mr);
    EACH_TILE(t, (multiply_tile(t, &c), finish(t, &c)))
    _tile_release();
}

static void
zq_gemm_u8s8_s32_32x32__amx(const zq_tile *t, int32_t *out, int64_t ldc)
{
    if (t->mr <= FEW_ROWS) {
        few_rows_s32(t, out, ldc);
        return;
    }
    sums c;
    configure(t->mr);
    multiply_tile(t, &c);
    _tile_release();
    for (int i = 0; i < t->mr; i++) {
        for (int j = 0; j < t->nr; j += HALF) {
            const __m512i colsum = _mm512_loadu_si512(t->colsum + j);
            const __m512i sum = t->mr > HALF ? sum_at(t, 0, &c, i, j, colsum) : sum_at(t, 1, &c, i, j, colsum);
            _mm512_mask_storeu_epi32(out + i * ldc + j, v16_mask(zq_min(t->nr - j, HALF)), sum);
        }
    }
}

ZQ_TARGET_END

void
zq_fill_gemm__amx(zq_kernels *t)
{
    few_rows = t->gemm_u8s8;
    few_rows_s32 = t->gemm_u8s8_s32;
    t->gemm_u8s8 = zq_gemm_u8s8_32x32__amx;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_32x32__amx;
    t->mr_u8s8 = MR;
}
#else
typedef int zq_no_x86;
#endif
