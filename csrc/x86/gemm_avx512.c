/* AVX-512 VNNI tiles: mr rows by one panel of 32 columns, two zmm wide. Accumulators stay in registers: 24 for
 * S8 and F32 (12 rows), 16 integer + 8 float for groups (4 rows). Intel's tiles of groups are taller: 24 integer ones, and the
 * float sums in L1. There all 512-bit arithmetic shares the two ports of the dot products, so that what a group costs besides,
 * above all the unpacking of codes, has to serve many rows (AMD's other ports unpack beside the products). Codes unpacked once
 * for all tiles of a panel were no faster still. A last panel of at most 16 columns is half as much
 * work for S8. The epilogue's scale and bias are applied in registers, and of S8 and F32 a residual that nothing else goes
 * with; activation and residual run over the tile just stored otherwise, which is still in L1. */
#if defined(__x86_64__)
#include "../zq_kernels.h"

#include <string.h>

ZQ_TARGET_BEGIN(ZQ_TARGET_AVX512)
#include "v16_avx512.h"

#include "v16_math.h"

#include "gemm_finish.inc.h"
#define LEVEL(name) name##__avx512vnni
#include "group_operand.inc.h"

enum { MR = 12, MR_GROUP = 4, FEW_ROWS = 4, NV = 2 };

/* What uses a row's sums comes after this: gcc 12 starts with all rows at once otherwise, and spills every sum to do so. */
#define IN_PLACE(row) __asm__ volatile("" : "+v"((row)[0]), "+v"((row)[1]))

/* Once per 128 bytes of a panel: prefetch what t->ahead asks for (see zq_tile), one line or two; *ahead moves along. */
ZQ_INLINE void
prefetch_ahead(const int far, const zq_tile *t, const char **ahead)
{
    if (far) {
        fetch(far, *ahead);
        if ((far & ~TO_L2) == 2) {
            fetch(far, *ahead + 64);
        }
        *ahead += (far & ~TO_L2) == 2 ? 128 : t->ahead_step;
    }
}

ZQ_INLINE __m512i
broadcast4(const uint8_t *a)
{
    int32_t v;
    memcpy(&v, a, 4);
    return _mm512_set1_epi32(v);
}

/* Rows of a, three to a pointer: all addresses out of the pointers, lda and its double. Each row's multiple of lda would take a
 * register of its own, and the only ones left for that are vector registers. */
enum { ROWS_BY = 3, POINTERS = MR / ROWS_BY };

typedef struct {
    const uint8_t *at[POINTERS];
} row_cursor;

ZQ_INLINE row_cursor
rows_of(const int mr, const void *a, int64_t pitch)
{
    row_cursor row;
    row.at[0] = a;
    ZQ_UNROLL(4)
    for (int i = 1; i < (mr + ROWS_BY - 1) / ROWS_BY; i++) {
        row.at[i] = row.at[i - 1] + ROWS_BY * pitch;
        __asm__("" : "+r"(row.at[i]));
    }
    return row;
}

ZQ_INLINE void
advance_rows(const int mr, const int bytes, row_cursor *row)
{
    ZQ_UNROLL(4)
    for (int i = 0; i < (mr + ROWS_BY - 1) / ROWS_BY; i++) {
        row->at[i] += bytes;
    }
}

/* Four codes of each row, `offset` behind its cursor, times the 128 bytes of the panel at b. */
ZQ_INLINE void
step_s8(const int mr, const int far, const zq_tile *t, const row_cursor *row, const int offset, const int8_t *b,
        const char **ahead, __m512i acc[MR][NV])
{
    const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64);
    prefetch_ahead(far, t, ahead);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512i x = broadcast4(row->at[i / ROWS_BY] + i % ROWS_BY * t->lda + offset);
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], x, b0);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], x, b1);
    }
}

/* Two steps at a time, into accumulators of their own: the chains of so few rows would be too slow otherwise. Returns where a
 * last single step begins. */
ZQ_INLINE const int8_t *
accumulate_few_s8(const int mr, const int far, const zq_tile *t, const int8_t *b, const int8_t *end, row_cursor *row,
                  const char **ahead, __m512i acc[MR][NV])
{
    __m512i second[MR][NV];
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        second[i][0] = second[i][1] = _mm512_setzero_si512();
    }
    for (; end - b > 64 * NV; b += 128 * NV) {
        step_s8(mr, far, t, row, 0, b, ahead, acc);
        step_s8(mr, far, t, row, 4, b + 64 * NV, ahead, second);
        advance_rows(mr, 8, row);
    }
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        acc[i][0] = _mm512_add_epi32(acc[i][0], second[i][0]);
        acc[i][1] = _mm512_add_epi32(acc[i][1], second[i][1]);
    }
    return b;
}

/* acc[i][v] = sum over k of a[i][k] * b[k][16 v + lane] */
ZQ_INLINE void
accumulate_s8(const int mr, const int far, const zq_tile *t, __m512i acc[MR][NV])
{
    row_cursor row = rows_of(mr, t->a, t->lda);
    const int8_t *b = t->b, *const end = b + ZQ_NR * t->k;
    const char *ahead = t->ahead;
    if (mr <= FEW_ROWS) {
        b = accumulate_few_s8(mr, far, t, b, end, &row, &ahead, acc);
    }
    for (; mr > FEW_ROWS && mr <= 8 && end - b > 64 * NV; b += 128 * NV) { /* two steps, or the loop itself takes time */
        step_s8(mr, far, t, &row, 0, b, &ahead, acc);
        step_s8(mr, far, t, &row, 4, b + 64 * NV, &ahead, acc);
        advance_rows(mr, 8, &row);
    }
    for (; b < end; b += 64 * NV) {
        step_s8(mr, far, t, &row, 0, b, &ahead, acc);
        advance_rows(mr, 4, &row);
    }
}

/* -zero[i] * colsum: what the zero point of a row contributes, as the accumulator's start */
ZQ_INLINE void
start_s8(const int mr, const zq_tile *t, __m512i acc[MR][NV])
{
    const __m512i none = _mm512_setzero_si512();
    const __m512i c0 = _mm512_sub_epi32(none, _mm512_loadu_si512(t->colsum));
    const __m512i c1 = _mm512_sub_epi32(none, _mm512_loadu_si512(t->colsum + 16));
    const int32_t *zero = t->zx;
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512i z = _mm512_set1_epi32(zero[i]);
        acc[i][0] = _mm512_mullo_epi32(z, c0);
        acc[i][1] = _mm512_mullo_epi32(z, c1);
    }
}

/* How a tile's rows are stored, and where. What a store writes may be what t points to as far as the compiler knows: so
 * these are locals, and the choice is made once per tile, not once per row. */
enum { PART, WHOLE, STREAM };

typedef struct {
    float *y;
    const float *residual;
    int64_t ldy, ldr;
    __mmask16 m0, m1;
} rows_out;

ZQ_INLINE rows_out
out_of(const zq_tile *t)
{
    return (rows_out){t->y, t->residual, t->ldy, t->ldr, v16_mask(zq_min(t->nr, 16)), v16_mask(zq_max(t->nr - 16, 0))};
}

ZQ_INLINE void
store2(const int how, const rows_out *o, int i, __m512 y0, __m512 y1)
{
    float *y = o->y + i * o->ldy;
    switch (how) {
    case STREAM:
        _mm512_stream_ps(y, y0);
        _mm512_stream_ps(y + 16, y1);
        break;
    case WHOLE:
        _mm512_storeu_ps(y, y0);
        _mm512_storeu_ps(y + 16, y1);
        break;
    default:
        _mm512_mask_storeu_ps(y, o->m0, y0);
        _mm512_mask_storeu_ps(y + 16, o->m1, y1);
    }
}

/* END(how) for how t's rows are stored, as a constant */
#define STORE_ROWS(t, END)                            \
    if ((t)->nr < ZQ_NR) {                            \
        END(PART);                                    \
    }                                                 \
    else if ((t)->stream) {                           \
        END(STREAM);                                  \
    }                                                 \
    else {                                            \
        END(WHOLE);                                   \
    }

/* store2 of y, with `add` of y + residual: whole rows only */
ZQ_INLINE void
store_row(const int how, const int add, const rows_out *o, int i, __m512 y0, __m512 y1)
{
    if (add) {
        const float *residual = o->residual + i * o->ldr;
        y0 = _mm512_add_ps(y0, _mm512_loadu_ps(residual));
        y1 = _mm512_add_ps(y1, _mm512_loadu_ps(residual + 16));
    }
    store2(how, o, i, y0, y1);
}

/* END(how) for how t's rows are stored, END##_ADD(how) where t has a residual */
#define ADD_AND_STORE_ROWS(t, END)                    \
    if (!(t)->residual) {                             \
        STORE_ROWS(t, END)                            \
    }                                                 \
    else if ((t)->stream) {                           \
        END##_ADD(STREAM);                            \
    }                                                 \
    else {                                            \
        END##_ADD(WHOLE);                             \
    }

/* y = (acc * sx) * scale + bias, and with `add` + residual */
ZQ_INLINE void
finish_s8(const int mr, const int how, const int add, const zq_tile *t, __m512i acc[MR][NV])
{
    const __m512 s0 = _mm512_loadu_ps(t->scale), s1 = _mm512_loadu_ps(t->scale + 16);
    const __m512 bias0 = _mm512_loadu_ps(t->bias), bias1 = _mm512_loadu_ps(t->bias + 16);
    const float *scale = t->sx;
    const rows_out out = out_of(t);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512 sx = _mm512_set1_ps(scale[i]);
        IN_PLACE(acc[i]);
        store_row(how, add, &out, i,
                  _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][0]), sx), s0, bias0),
                  _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][1]), sx), s1, bias1));
    }
}

/* What the next tile reads once, beside the codes, waits for L2 or L3 otherwise. */
ZQ_INLINE void
fetch_columns(const zq_tile *t)
{
    if (t->more && t->next_cols) {
        const void *next[] = {t->bias, t->scale, t->colsum, t->zcorr};
        ZQ_UNROLL(4)
        for (int i = 0; i < 4; i++) {
            if (next[i]) {
                __builtin_prefetch((const char *)next[i] + 4 * t->next_cols);
                __builtin_prefetch((const char *)next[i] + 4 * t->next_cols + 64);
            }
        }
    }
}

ZQ_INLINE void
one_s8(const int mr, const int far, const zq_tile *t)
{
    __m512i acc[MR][NV];
    start_s8(mr, t, acc);
    fetch_columns(t);
    prefetch_residual(t);
    accumulate_s8(mr, far, t, acc);
#define END_S8(how) finish_s8(mr, how, 0, t, acc)
#define END_S8_ADD(how) finish_s8(mr, how, 1, t, acc)
    ADD_AND_STORE_ROWS(t, END_S8)
}

/* The first 16 columns of a panel that has no others: half the products. */
ZQ_INLINE void
one_s8_half(const int mr, const zq_tile *t)
{
    __m512i acc[MR];
    const __m512i c = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(t->colsum));
    const int8_t *b = t->b, *const end = b + ZQ_NR * t->k;
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        acc[i] = _mm512_mullo_epi32(_mm512_set1_epi32(t->zx[i]), c);
    }
    row_cursor row = rows_of(mr, t->a, t->lda);
    for (; b < end; b += 64 * NV) {
        const __m512i w = _mm512_load_si512(b);
        ZQ_UNROLL(16)
        for (int i = 0; i < mr; i++) {
            acc[i] = _mm512_dpbusd_epi32(acc[i], broadcast4(row.at[i / ROWS_BY] + i % ROWS_BY * t->lda), w);
        }
        advance_rows(mr, 4, &row);
    }
    const __m512 s = _mm512_loadu_ps(t->scale), bias = _mm512_loadu_ps(t->bias);
    const float *scale = t->sx;
    const rows_out out = out_of(t);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i]), _mm512_set1_ps(scale[i]));
        _mm512_mask_storeu_ps(out.y + i * out.ldy, out.m0, _mm512_fmadd_ps(v, s, bias));
    }
}

ZQ_INLINE void
tile_s8_s32(const int mr, const zq_tile *t, int32_t *c, int64_t ldc)
{
    __m512i acc[MR][NV];
    start_s8(mr, t, acc);
    accumulate_s8(mr, 0, t, acc);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        _mm512_mask_storeu_epi32(c + i * ldc, v16_mask(zq_min(t->nr, 16)), acc[i][0]);
        _mm512_mask_storeu_epi32(c + i * ldc + 16, v16_mask(zq_max(t->nr - 16, 0)), acc[i][1]);
    }
}

/* Where a tile of groups reads on: rows of a, a row's starts, the panel, what to prefetch. */
typedef struct {
    const uint8_t *a, *b;
    const int32_t *start;
    const char *ahead;
} group_cursor;

/* Four deep: one dot product per row and vector, unsigned codes times signed activations. */
ZQ_INLINE void
step_group(const int mr, const uint8_t *a, int64_t lda, const __m512i b[NV], __m512i acc[MR_GROUP][NV])
{
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        const __m512i x = broadcast4(a + i * lda);
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], b[0], x);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], b[1], x);
    }
}

/* The integer sums of one group of `steps` * 8 input features. There are two accumulators per row and vector, of the first
 * and last four of every eight: one chain of dot products would be too slow. */
ZQ_INLINE void
accumulate_group(const int mr, const int four_bits, const int far, const zq_tile *t, int64_t steps, group_cursor *c,
                 __m512i acc[MR_GROUP][NV])
{
    const __m512i low = _mm512_set1_epi8(15);
    const int64_t lda = t->lda;
    const uint8_t *a = c->a, *b = c->b;
    __m512i second[MR_GROUP][NV];
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        acc[i][0] = acc[i][1] = _mm512_set1_epi32(c->start[i * t->ld_start]);
        second[i][0] = second[i][1] = _mm512_setzero_si512();
    }
    for (const uint8_t *end = a + steps * ZQ_KSTEP; a < end; a += ZQ_KSTEP) {
        __m512i w[NV] = {_mm512_load_si512(b), _mm512_load_si512(b + 64)}, next[NV];
        prefetch_ahead(far, t, &c->ahead);
        if (four_bits) {
            next[0] = _mm512_and_si512(_mm512_srli_epi16(w[0], 4), low);
            next[1] = _mm512_and_si512(_mm512_srli_epi16(w[1], 4), low);
            w[0] = _mm512_and_si512(w[0], low);
            w[1] = _mm512_and_si512(w[1], low);
            b += 128;
        }
        step_group(mr, a, lda, w, acc);
        if (!four_bits) {
            __asm__ volatile("" ::: "memory"); /* loaded any earlier, they would cost a spill */
            next[0] = _mm512_load_si512(b + 128);
            next[1] = _mm512_load_si512(b + 192);
            prefetch_ahead(far, t, &c->ahead);
            b += 256;
        }
        step_group(mr, a + 4, lda, next, second);
    }
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        acc[i][0] = _mm512_add_epi32(acc[i][0], second[i][0]);
        acc[i][1] = _mm512_add_epi32(acc[i][1], second[i][1]);
    }
    c->a = a;
    c->b = b;
}

/* y = (f - (zero - 128) * zcorr) * sx + bias */
ZQ_INLINE void
finish_group(const int mr, const int how, const zq_tile *t, __m512 f[][NV])
{
    const __m512 z0 = _mm512_loadu_ps(t->zcorr), z1 = _mm512_loadu_ps(t->zcorr + 16);
    const __m512 bias0 = _mm512_loadu_ps(t->bias), bias1 = _mm512_loadu_ps(t->bias + 16);
    const int32_t *zero = t->zx;
    const float *scale = t->sx;
    const rows_out out = out_of(t);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512 z = _mm512_set1_ps((float)(zero[i] - 128)), sx = _mm512_set1_ps(scale[i]);
        store2(how, &out, i, _mm512_fmadd_ps(_mm512_fnmadd_ps(z, z0, f[i][0]), sx, bias0),
               _mm512_fmadd_ps(_mm512_fnmadd_ps(z, z1, f[i][1]), sx, bias1));
    }
}

ZQ_INLINE void
one_group(const int mr, const int four_bits, const int far, const zq_tile *t)
{
    if (!four_bits) {
        __asm__ volatile("" : : "r"(t) : "memory"); /* t stays in memory: gcc would keep it in vector registers, and spill */
    }
    __m512 f[MR_GROUP][NV];
    group_cursor c = {t->a, t->b, t->start, t->ahead};
    ZQ_UNROLL(4)
    for (int i = 0; i < mr; i++) {
        f[i][0] = f[i][1] = _mm512_setzero_ps();
    }
    fetch_columns(t);
    for (int64_t k = 0; k < t->k; k += t->group) {
        __m512i acc[MR_GROUP][NV];
        const float *scale = (const float *)c.b;
        c.b += 4 * ZQ_NR;
        prefetch_ahead(far, t, &c.ahead);
        accumulate_group(mr, four_bits, far, t, zq_min(t->group, t->k - k) / ZQ_KSTEP, &c, acc);
        c.start++;
        const __m512 s0 = _mm512_load_ps(scale), s1 = _mm512_load_ps(scale + 16);
        ZQ_UNROLL(4)
        for (int i = 0; i < mr; i++) {
            IN_PLACE(acc[i]);
            f[i][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][0]), s0, f[i][0]);
            f[i][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][1]), s1, f[i][1]);
        }
    }
#define END_GROUP(how) finish_group(mr, how, t, f)
    STORE_ROWS(t, END_GROUP)
}

/* ---- tall tiles of groups -------------------------------------------------------------------------- */
/* Four codes of each row, `offset` behind its cursor, times unsigned codes. */
ZQ_INLINE void
step_tall(const int mr, const zq_tile *t, const row_cursor *row, const int offset, __m512i w0, __m512i w1, __m512i acc[MR][NV])
{
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512i x = broadcast4(row->at[i / ROWS_BY] + i % ROWS_BY * t->lda + offset);
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], w0, x);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], w1, x);
    }
}

/* acc += one group of `steps` * 8 input features, whose codes are at b; returns where they end. */
ZQ_INLINE const uint8_t *
accumulate_tall(const int mr, const int four_bits, const int far, const zq_tile *t, int64_t steps, const uint8_t *b,
                row_cursor *row, const char **ahead, __m512i acc[MR][NV])
{
    const __m512i low = _mm512_set1_epi8(15);
    for (; steps > 0; steps--, b += four_bits ? 128 : 256) {
        const __m512i w0 = _mm512_load_si512(b), w1 = _mm512_load_si512(b + 64);
        prefetch_ahead(far, t, ahead);
        if (four_bits) {
            step_tall(mr, t, row, 0, _mm512_and_si512(w0, low), _mm512_and_si512(w1, low), acc);
            step_tall(mr, t, row, 4, _mm512_and_si512(_mm512_srli_epi16(w0, 4), low),
                      _mm512_and_si512(_mm512_srli_epi16(w1, 4), low), acc);
        }
        else {
            step_tall(mr, t, row, 0, w0, w1, acc);
            prefetch_ahead(far, t, ahead);
            step_tall(mr, t, row, 4, _mm512_load_si512(b + 128), _mm512_load_si512(b + 192), acc);
        }
        advance_rows(mr, 8, row);
    }
    return b;
}

/* f += acc * scale, with f in memory */
ZQ_INLINE void
add_tall(const int mr, const float *scale, __m512i acc[MR][NV], __m512 f[MR][NV])
{
    const __m512 s0 = _mm512_load_ps(scale), s1 = _mm512_load_ps(scale + 16);
    leave_registers(f);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        IN_PLACE(acc[i]);
        f[i][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][0]), s0, f[i][0]);
        f[i][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][1]), s1, f[i][1]);
    }
    leave_registers(f);
}

ZQ_INLINE void
one_tall(const int mr, const int four_bits, const int far, const zq_tile *t)
{
    __m512 f[MR][NV];
    row_cursor row = rows_of(mr, t->a, t->lda);
    const uint8_t *b = t->b;
    const int32_t *start = t->start;
    const char *ahead = t->ahead;
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        f[i][0] = f[i][1] = _mm512_setzero_ps();
    }
    fetch_columns(t);
    for (int64_t k = 0; k < t->k; k += t->group, start++) {
        __m512i acc[MR][NV];
        const float *scale = (const float *)b;
        prefetch_ahead(far, t, &ahead);
        ZQ_UNROLL(16)
        for (int i = 0; i < mr; i++) {
            acc[i][0] = acc[i][1] = _mm512_set1_epi32(start[i * t->ld_start]);
        }
        b = accumulate_tall(mr, four_bits, far, t, zq_min(t->group, t->k - k) / ZQ_KSTEP, b + 4 * ZQ_NR, &row, &ahead, acc);
        add_tall(mr, scale, acc, f);
    }
#define END_TALL(how) finish_group(mr, how, t, f)
    STORE_ROWS(t, END_TALL)
}

/* y = acc + bias, and with `add` + residual */
ZQ_INLINE void
finish_f32(const int mr, const int how, const int add, const zq_tile *t, __m512 acc[MR][NV])
{
    const __m512 bias0 = _mm512_loadu_ps(t->bias), bias1 = _mm512_loadu_ps(t->bias + 16);
    const rows_out out = out_of(t);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        IN_PLACE(acc[i]);
        store_row(how, add, &out, i, _mm512_add_ps(acc[i][0], bias0), _mm512_add_ps(acc[i][1], bias1));
    }
}

ZQ_INLINE void
begin_f32(const int mr, const float *sums, __m512 acc[MR][NV])
{
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    }
    if (sums) {
        ZQ_UNROLL(16)
        for (int i = 0; i < mr; i++) {
            acc[i][0] = _mm512_load_ps(sums + i * ZQ_NR);
            acc[i][1] = _mm512_load_ps(sums + i * ZQ_NR + 16);
        }
    }
}

ZQ_INLINE void
keep_f32(const int mr, float *sums, __m512 acc[MR][NV])
{
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        _mm512_store_ps(sums + i * ZQ_NR, acc[i][0]);
        _mm512_store_ps(sums + i * ZQ_NR + 16, acc[i][1]);
    }
}

/* x * b + acc. Of two steps at a time gcc 12 makes loops that move most sums from register to register; not of these. */
ZQ_INLINE __m512
fma_in_place(__m512 x, __m512 b, __m512 acc)
{
    __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(b));
    return acc;
}

/* One input feature of each row, `offset` bytes behind its cursor, times 32 floats of the panel at b */
ZQ_INLINE void
step_f32(const int mr, const int far, const zq_tile *t, int64_t pitch, const row_cursor *row, const int offset, const float *b,
         const char **ahead, __m512 acc[MR][NV])
{
    const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
    prefetch_ahead(far, t, ahead);
    ZQ_UNROLL(16)
    for (int i = 0; i < mr; i++) {
        const __m512 x = _mm512_set1_ps(*(const float *)(row->at[i / ROWS_BY] + i % ROWS_BY * pitch + offset));
        acc[i][0] = fma_in_place(x, b0, acc[i][0]);
        acc[i][1] = fma_in_place(x, b1, acc[i][1]);
    }
}

/* acc[i][v] += sum over k of a[i][k] * b[k][16 v + lane], one k after the other */
ZQ_INLINE void
accumulate_f32(const int mr, const int far, const zq_tile *t, __m512 acc[MR][NV])
{
    const int64_t pitch = t->lda * (int64_t)sizeof(float);
    row_cursor row = rows_of(mr, t->a, pitch);
    const float *b = t->b, *const end = b + ZQ_NR * (t->k & -2);
    const char *ahead = t->ahead;
    for (; b < end; b += 2 * ZQ_NR) { /* Intel: what the loop itself takes, it takes from the two ports of the products */
        step_f32(mr, far, t, pitch, &row, 0, b, &ahead, acc);
        step_f32(mr, far, t, pitch, &row, 4, b + ZQ_NR, &ahead, acc);
        advance_rows(mr, 8, &row);
    }
    if (t->k & 1) {
        step_f32(mr, far, t, pitch, &row, 0, b, &ahead, acc);
    }
}

ZQ_INLINE void
one_f32(const int mr, const int far, const zq_tile *t)
{
    __m512 acc[MR][NV];
    begin_f32(mr, t->sums_in, acc);
    prefetch_residual(t);
    accumulate_f32(mr, far, t, acc);
    if (t->sums_out) {
        keep_f32(mr, t->sums_out, acc);
        return;
    }
#define END_F32(how) finish_f32(mr, how, 0, t, acc)
#define END_F32_ADD(how) finish_f32(mr, how, 1, t, acc)
    ADD_AND_STORE_ROWS(t, END_F32)
}

/* `one` for every tile that t describes. The copy is private: its fields stay in registers, whatever the stores write. Its
 * pitches are new to the compiler in each tile, or their multiples for all rows would take registers throughout. */
#define EVERY_TILE(one, ...)                                      \
    {                                                             \
        zq_tile each = *t;                                        \
        for (; one(__VA_ARGS__, &each), each.more > 0; each.more--) { \
            zq_tile_next(&each);                                  \
            __asm__("" : "+r"(each.lda), "+r"(each.ldy));         \
        }                                                         \
        break;                                                    \
    }

/* One function per tile height: the compiler keeps the accumulators in registers only when mr is a constant. */
#define ROWS4(X, far) X(1, far) X(2, far) X(3, far) X(4, far)
#define ROWS5_12(X, far) X(5, far) X(6, far) X(7, far) X(8, far) X(9, far) X(10, far) X(11, far) X(12, far)
#define ROWS12(X, far) ROWS4(X, far) ROWS5_12(X, far)

#define S8(n, far) \
    case n: EVERY_TILE(one_s8, n, far)
#define S8_HALF(n, far) \
    case n: EVERY_TILE(one_s8_half, n)
#define S32(n, far) \
    case n: tile_s8_s32(n, t, c, ldc); break;
#define F32(n, far) \
    case n: EVERY_TILE(one_f32, n, far)
#define G8(n, far) \
    case n: EVERY_TILE(one_group, n, 0, far)
#define G4(n, far) \
    case n: EVERY_TILE(one_group, n, 1, far)

#define T8(n, far) \
    case n: EVERY_TILE(one_tall, n, 0, far)
#define T4(n, far) \
    case n: EVERY_TILE(one_tall, n, 1, far)

/* Of S8 and F32: the tile function adds the residual, which nothing else goes with. */
ZQ_INLINE int
residual_alone(const zq_tile *t)
{
    return t->residual && t->nr == ZQ_NR && t->act == ZQ_ACT_NONE && !t->pairs && !t->rank;
}

/* Tile functions go on to the next tile themselves where nothing is left to do after each of them. */
ZQ_INLINE void
run_tiles(zq_tile *t, const tile_fn tile)
{
    if (is_plain(t)) {
        tile(t);
    }
    else {
        run_tile(t, tile);
    }
}

static void
zq_gemm_u8s8_12x16_tile__avx512vnni(const zq_tile *t)
{
    switch (t->mr) { ROWS12(S8_HALF, 0) }
}

static void
zq_gemm_u8s8_12x32_tile__avx512vnni(const zq_tile *t)
{
    if (t->nr <= 16) {
        zq_gemm_u8s8_12x16_tile__avx512vnni(t);
        return;
    }
    NEAR_OR_FAR_OR_MEMORY(ROWS12, ROWS4, 4, S8)
}

static void
zq_gemm_u8s8_12x32__avx512vnni(zq_tile *t)
{
    if (residual_alone(t)) {
        zq_gemm_u8s8_12x32_tile__avx512vnni(t);
    }
    else {
        run_tiles(t, zq_gemm_u8s8_12x32_tile__avx512vnni);
    }
}

static void
zq_gemm_u8s8_s32_12x32__avx512vnni(const zq_tile *t, int32_t *c, int64_t ldc)
{
    switch (t->mr) { ROWS12(S32, 0) }
}

static void
zq_gemm_f32_12x32_tile__avx512vnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS12, F32)
}

static void
zq_gemm_f32_12x32__avx512vnni(zq_tile *t)
{
    if (residual_alone(t)) {
        zq_gemm_f32_12x32_tile__avx512vnni(t);
    }
    else {
        run_tiles(t, zq_gemm_f32_12x32_tile__avx512vnni);
    }
}

static void
zq_gemm_s8u8_group_4x32_tile__avx512vnni(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS4, ROWS4, 4, G8)
}

static void
zq_gemm_s8u8_group_4x32__avx512vnni(zq_tile *t)
{
    run_tiles(t, zq_gemm_s8u8_group_4x32_tile__avx512vnni);
}

static void
zq_gemm_s8u4_group_4x32_tile__avx512vnni(const zq_tile *t)
{
    NEAR_OR_FAR_OR_MEMORY(ROWS4, ROWS4, 4, G4)
}

static void
zq_gemm_s8u4_group_4x32__avx512vnni(zq_tile *t)
{
    run_tiles(t, zq_gemm_s8u4_group_4x32_tile__avx512vnni);
}

static void
zq_gemm_s8u8_group_12x32_tile__avx512vnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS5_12, T8)
}

static void
zq_gemm_s8u8_group_12x32__avx512vnni(zq_tile *t)
{
    run_tiles(t, t->mr > MR_GROUP ? zq_gemm_s8u8_group_12x32_tile__avx512vnni : zq_gemm_s8u8_group_4x32_tile__avx512vnni);
}

static void
zq_gemm_s8u4_group_12x32_tile__avx512vnni(const zq_tile *t)
{
    NEAR_OR_FAR(ROWS5_12, T4)
}

static void
zq_gemm_s8u4_group_12x32__avx512vnni(zq_tile *t)
{
    run_tiles(t, t->mr > MR_GROUP ? zq_gemm_s8u4_group_12x32_tile__avx512vnni : zq_gemm_s8u4_group_4x32_tile__avx512vnni);
}

ZQ_TARGET_END

void
zq_fill_gemm__avx512vnni(zq_kernels *t, int tall_groups)
{
    t->gemm_u8s8 = zq_gemm_u8s8_12x32__avx512vnni;
    t->gemm_u8s8_s32 = zq_gemm_u8s8_s32_12x32__avx512vnni;
    t->gemm_f32 = zq_gemm_f32_12x32__avx512vnni;
    t->gemm_s8u8_group = zq_gemm_s8u8_group_4x32__avx512vnni;
    t->gemm_s8u4_group = zq_gemm_s8u4_group_4x32__avx512vnni;
    t->center_groups_b8 = center_groups_b8__avx512vnni;
    t->mr_u8s8 = t->mr_f32 = MR;
    t->mr_group = MR_GROUP;
    if (tall_groups) {
        t->gemm_s8u8_group = zq_gemm_s8u8_group_12x32__avx512vnni;
        t->gemm_s8u4_group = zq_gemm_s8u4_group_12x32__avx512vnni;
        t->mr_group = MR;
    }
    t->few_tiles = 6;
}
#else
typedef int zq_no_x86;
#endif
