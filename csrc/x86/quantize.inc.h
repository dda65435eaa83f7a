/* Rows of float32 to codes and back, and bit streams, on v16; included once per level, which defines LEVEL(name).
 * Loops take 64 or 32 elements a step (to hide the latency of min, max and the conversion), then 16, then the
 * masked rest. Element-wise work and exact minima do not depend on the order, so any step size gives
 * the bits of ref/quantize.c. */

static float
LEVEL(absmax_f32)(const float *x, int64_t n)
{
    const v16i no_sign = v16i_set1(0x7fffffff);
    v16i a = v16i_zero(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        a = v16i_max(a, v16i_and(v16_bits(v16_load(x + i)), no_sign));
        b = v16i_max(b, v16i_and(v16_bits(v16_load(x + i + 16)), no_sign));
        c = v16i_max(c, v16i_and(v16_bits(v16_load(x + i + 32)), no_sign));
        d = v16i_max(d, v16i_and(v16_bits(v16_load(x + i + 48)), no_sign));
    }
    for (; i < n; i += 16) {
        const v16 v = n - i >= 16 ? v16_load(x + i) : v16_loadn(x + i, n - i);
        a = v16i_max(a, v16i_and(v16_bits(v), no_sign));
    }
    const int32_t top = v16i_hmax(v16i_max(v16i_max(a, b), v16i_max(c, d)));
    float amax;
    memcpy(&amax, &top, sizeof amax);
    return amax;
}

static void
LEVEL(absmax_columns_f32)(const float *x, int64_t rows, int64_t n, int64_t ldx, float *top)
{
    const v16i no_sign = v16i_set1(0x7fffffff);
    for (int64_t j = 0; j < n; j += 16) {
        const int64_t m = zq_min(n - j, 16);
        v16i a = v16_bits(v16_loadn(top + j, m));
        for (int64_t i = 0; i < rows; i++) {
            const float *p = x + i * ldx + j;
            a = v16i_max(a, v16i_and(v16_bits(m == 16 ? v16_load(p) : v16_loadn(p, m)), no_sign));
        }
        v16_storen(top + j, v16_from_bits(a), m);
    }
}

/* The running range of many floats, on their bits: as signed integers the positive ones order as the floats do, above all
 * negative ones; as unsigned integers the negative ones order by magnitude, above all positive ones. Inf and NaN lie beyond
 * the finite ones of either sign. */
typedef struct {
    v16i least, most;
} LEVEL(range);

#define RANGE_STEP(v, r)                             \
    do {                                             \
        const v16i bits_ = v16_bits(v);              \
        (r).least = v16i_maxu((r).least, bits_);     \
        (r).most = v16i_max((r).most, bits_);        \
    } while (0)

/* What two of them, that started at 0, have found; 0 and 0 where that is not finite. */
ZQ_INLINE int
range_of(LEVEL(range) a, LEVEL(range) b, float *lo, float *hi)
{
    uint32_t least = v16i_hmaxu(v16i_maxu(a.least, b.least)), most = (uint32_t)v16i_hmax(v16i_max(a.most, b.most));
    const int finite = least < 0xff800000u && most < 0x7f800000u;
    least = finite && least > 0x80000000u ? least : 0; /* not so: no negative value, or only -0 */
    most = finite ? most : 0;
    memcpy(lo, &least, sizeof least);
    memcpy(hi, &most, sizeof most);
    return finite;
}

static int
LEVEL(minmax_f32)(const float *x, int64_t n, float *lo, float *hi)
{
    LEVEL(range) a = {v16i_zero(), v16i_zero()}, b = a;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        RANGE_STEP(v16_load(x + i), a);
        RANGE_STEP(v16_load(x + i + 16), b);
    }
    for (; i < n; i += 16) {
        RANGE_STEP(n - i >= 16 ? v16_load(x + i) : v16_loadn(x + i, n - i), a);
    }
    return range_of(a, b, lo, hi);
}

/* Sixteen codes from values already divided by the scale. */
ZQ_INLINE v16i
to_codes(v16 scaled, v16 lo, v16 hi, v16i zero)
{
    return v16i_add(v16_to_i(v16_min(v16_max(scaled, lo), hi)), zero);
}

/* q = to_codes(scaled(i)) for all i; SCALED(load) is an expression of `load`, the registers of x. */
#define QUANTIZE_ROW(SCALED)                                                                  \
    const v16 lo = v16_set1((float)(qmin - zero)), hi = v16_set1((float)(qmax - zero));       \
    const v16i zeros = v16i_set1(zero);                                                       \
    int64_t i = 0;                                                                            \
    for (; i + 64 <= n; i += 64) {                                                            \
        v16i_store_b8(q + i, to_codes(SCALED(v16_load(x + i)), lo, hi, zeros));           \
        v16i_store_b8(q + i + 16, to_codes(SCALED(v16_load(x + i + 16)), lo, hi, zeros)); \
        v16i_store_b8(q + i + 32, to_codes(SCALED(v16_load(x + i + 32)), lo, hi, zeros)); \
        v16i_store_b8(q + i + 48, to_codes(SCALED(v16_load(x + i + 48)), lo, hi, zeros)); \
    }                                                                                         \
    for (; i + 16 <= n; i += 16) {                                                            \
        v16i_store_b8(q + i, to_codes(SCALED(v16_load(x + i)), lo, hi, zeros));           \
    }                                                                                         \
    if (i < n) {                                                                              \
        v16i_storen_b8(q + i, to_codes(SCALED(v16_loadn(x + i, n - i)), lo, hi, zeros), n - i); \
    }

/* 64 codes of rint(x * factor) + zero. Clamping is what the saturating conversions do anyway. */
ZQ_INLINE void
code64(const float *x, v16 factor, int32_t zero, uint8_t *q)
{
    v16i_store_b8x4(q, v16_to_i(v16_mul(v16_load(x), factor)), v16_to_i(v16_mul(v16_load(x + 16), factor)),
                    v16_to_i(v16_mul(v16_load(x + 32), factor)), v16_to_i(v16_mul(v16_load(x + 48), factor)), (int16_t)zero);
}

/* The same of a row's last n elements */
ZQ_INLINE void
code_rest(const float *x, int64_t n, v16 factor, int32_t zero, uint8_t *q)
{
    const v16i none = v16i_zero(), zeros = v16i_set1(zero), top = v16i_set1(255);
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t m = zq_min(n - i, 16);
        const v16i a = v16i_add(v16_to_i(v16_mul(v16_loadn(x + i, m), factor)), zeros);
        v16i_storen_b8(q + i, v16i_min(v16i_max(a, none), top), m);
    }
}

static void
LEVEL(quantize_mul_f32_b8)(const float *x, int64_t n, float inv, int32_t zero, uint8_t *q)
{
    const v16 factor = v16_set1(inv);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        code64(x + i, factor, zero, q + i);
    }
    code_rest(x + i, n - i, factor, zero, q + i);
}

/* While one row, in L1, becomes codes, a later one comes from farther away. */
static int
LEVEL(quantize_minmax_f32_b8)(const float *x, int64_t n, float inv, int32_t zero, uint8_t *q, const float *next,
                              const float *ahead, zq_range *range)
{
    const v16 factor = v16_set1(inv);
    LEVEL(range) r[2] = {{v16i_zero(), v16i_zero()}, {v16i_zero(), v16i_zero()}};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        ZQ_UNROLL(4)
        for (int j = 0; j < 4; j++) {
            __builtin_prefetch(ahead + i + 16 * j, 0, 3);
            RANGE_STEP(v16_load(next + i + 16 * j), r[j % 2]);
        }
        code64(x + i, factor, zero, q + i);
    }
    code_rest(x + i, n - i, factor, zero, q + i);
    for (; i < n; i += 16) {
        RANGE_STEP(v16_loadn(next + i, zq_min(n - i, 16)), r[0]);
    }
    return range_of(r[0], r[1], &range->lo, &range->hi);
}

static void
LEVEL(quantize_mul_f32_b16)(const float *x, int64_t n, float inv, uint8_t *high, uint8_t *low)
{
    const v16 factor = v16_set1(inv), lo = v16_set1(-32767.0f), hi = v16_set1(32767.0f);
    const v16i zero = v16i_set1(32768);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16i a = to_codes(v16_mul(v16_load(x + i), factor), lo, hi, zero);
        v16i_store_b8(high + i, v16i_shr(a, 8));
        v16i_store_b8(low + i, a);
    }
    if (i < n) {
        const v16i a = to_codes(v16_mul(v16_loadn(x + i, n - i), factor), lo, hi, zero);
        v16i_storen_b8(high + i, v16i_shr(a, 8), n - i);
        v16i_storen_b8(low + i, a, n - i);
    }
}

static void
LEVEL(quantize_div_f32_b8)(const float *x, int64_t n, float scale, int32_t zero, int32_t qmin, int32_t qmax, uint8_t *q)
{
    const v16 divisor = v16_set1(scale);
#define SCALED(v) v16_div(v, divisor)
    QUANTIZE_ROW(SCALED)
#undef SCALED
}

static void
LEVEL(quantize_vec_f32_b8)(const float *x, int64_t n, const float *scale, const int32_t *zero, int32_t qmin, int32_t qmax,
                           uint8_t *q)
{
    const v16i least = v16i_set1(qmin), most = v16i_set1(qmax);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16i z = v16i_load(zero + i);
        const v16 lo = v16_from_i(v16i_sub(least, z)), hi = v16_from_i(v16i_sub(most, z));
        v16i_store_b8(q + i, to_codes(v16_div(v16_load(x + i), v16_load(scale + i)), lo, hi, z));
    }
    if (i < n) {
        const v16i z = v16i_loadn(zero + i, n - i);
        const v16 lo = v16_from_i(v16i_sub(least, z)), hi = v16_from_i(v16i_sub(most, z));
        const v16 scaled = v16_div(v16_loadn(x + i, n - i), v16_loadn(scale + i, n - i));
        v16i_storen_b8(q + i, to_codes(scaled, lo, hi, z), n - i);
    }
}

ZQ_INLINE v16i
widen(const uint8_t *q, int64_t n, int is_signed)
{
    if (n >= 16) {
        return is_signed ? v16i_load_s8(q) : v16i_load_u8(q);
    }
    return is_signed ? v16i_loadn_s8(q, n) : v16i_loadn_u8(q, n);
}

static void
LEVEL(dequantize_b8_f32)(const uint8_t *q, int64_t n, int is_signed, float scale, int32_t zero, float *out)
{
    const v16 s = v16_set1(scale);
    const v16i z = v16i_set1(zero);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16_store(out + i, v16_mul(v16_from_i(v16i_sub(widen(q + i, 16, is_signed), z)), s));
    }
    if (i < n) {
        v16_storen(out + i, v16_mul(v16_from_i(v16i_sub(widen(q + i, n - i, is_signed), z)), s), n - i);
    }
}

static void
LEVEL(dequantize_vec_b8_f32)(const uint8_t *q, int64_t n, int is_signed, const float *scale, const int32_t *zero, float *out)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16i centred = v16i_sub(widen(q + i, 16, is_signed), v16i_load(zero + i));
        v16_store(out + i, v16_mul(v16_from_i(centred), v16_load(scale + i)));
    }
    if (i < n) {
        const v16i centred = v16i_sub(widen(q + i, n - i, is_signed), v16i_loadn(zero + i, n - i));
        v16_storen(out + i, v16_mul(v16_from_i(centred), v16_loadn(scale + i, n - i)), n - i);
    }
}

static void
LEVEL(dequantize_cols_u8_f32)(const uint8_t *q, int64_t rows, int64_t cols, const float *scale, int32_t zero, float *out)
{
    const v16i z = v16i_set1(zero);
    for (int64_t c = 0; c < cols; c += 16) {
        const v16 s = v16_load(scale + c);
        for (int64_t i = c; i < rows * cols; i += cols) {
            v16_store(out + i, v16_mul(v16_from_i(v16i_sub(v16i_load_u8(q + i), z)), s));
        }
    }
}

/* ---- bit streams: eight codes are a 64-bit word whose bytes are squeezed together in three halving steps, which
 * the compiler does for all words of a block at once. Eight codes of b bits are exactly b bytes. ---- */

enum { PACK_WORDS = 8 };

typedef struct {
    uint64_t codes, stream;      /* the low b of every 8 bits; the low 8b of all 64 */
    uint64_t even1, even2, even4; /* what stays in each step: the low b of 16, 2b of 32, 4b of 64 */
    uint64_t sign;               /* bit b - 1 of every byte */
    int gap1, gap2, gap4;        /* how far the rest moves */
} squeeze;

ZQ_INLINE squeeze
squeeze_of(int bits)
{
    const uint64_t ones = 0x0101010101010101u, low = (UINT64_C(1) << bits) - 1;
    squeeze s;
    s.codes = ones * low;
    s.stream = ~UINT64_C(0) >> (64 - 8 * bits);
    s.even1 = 0x0001000100010001u * low;
    s.even2 = 0x0000000100000001u * ((UINT64_C(1) << 2 * bits) - 1);
    s.even4 = (UINT64_C(1) << 4 * bits) - 1;
    s.sign = ones << (bits - 1);
    s.gap1 = 8 - bits;
    s.gap2 = 2 * s.gap1;
    s.gap4 = 4 * s.gap1;
    return s;
}

ZQ_INLINE uint64_t
squeeze_word(const squeeze *s, uint64_t w)
{
    w &= s->codes;
    w = (w & s->even1) | (w & ~s->even1) >> s->gap1;
    w = (w & s->even2) | (w & ~s->even2) >> s->gap2;
    return (w & s->even4) | (w & ~s->even4) >> s->gap4;
}

ZQ_INLINE uint64_t
spread_word(const squeeze *s, uint64_t w, int bits, int is_signed)
{
    w &= s->stream;
    w = (w & s->even4) | (w & ~s->even4) << s->gap4;
    w = (w & s->even2) | (w & ~s->even2) << s->gap2;
    w = (w & s->even1) | (w & ~s->even1) << s->gap1;
    /* Sign extension of byte 2^(b-1): ored with 2^8 - 2^b = (sign << (9 - b)) - (sign << 1); what each byte gets is
     * less than 2^8, so nothing is carried over in the end. */
    const uint64_t sign = is_signed ? w & s->sign : 0;
    return w | ((sign << (9 - bits)) - (sign << 1));
}

/* Words are stored eight bytes wide where there is room: the next one overwrites the zeros above. */
ZQ_INLINE void
put_words(const uint64_t *w, int words, int bits, uint8_t *out, int64_t room)
{
    for (int j = 0; j < words; j++, out += bits, room -= bits) {
        memcpy(out, &w[j], room >= 8 ? 8 : (size_t)zq_min(room, bits));
    }
}

ZQ_INLINE void
get_words(const uint8_t *in, int64_t have, int bits, uint64_t *w, int words)
{
    for (int j = 0; j < words; j++, in += bits, have -= bits) {
        w[j] = 0;
        memcpy(&w[j], in, have >= 8 ? 8 : (size_t)zq_max(have, 0));
    }
}

static void
LEVEL(pack_bits)(const uint8_t *codes, int64_t n, int bits, uint8_t *packed)
{
    const squeeze s = squeeze_of(bits);
    int64_t room = zq_ceil_div(n * bits, 8);
    while (n > 0) {
        const int64_t take = zq_min(n, 8 * PACK_WORDS);
        uint64_t w[PACK_WORDS] = {0};
        memcpy(w, codes, (size_t)take);
        for (int j = 0; j < PACK_WORDS; j++) {
            w[j] = squeeze_word(&s, w[j]);
        }
        put_words(w, (int)zq_ceil_div(take, 8), bits, packed, room);
        codes += take, n -= take;
        packed += PACK_WORDS * bits, room -= PACK_WORDS * bits;
    }
}

static void
LEVEL(unpack_bits)(const uint8_t *packed, int64_t n, int bits, int is_signed, uint8_t *codes)
{
    const squeeze s = squeeze_of(bits);
    int64_t have = zq_ceil_div(n * bits, 8);
    while (n > 0) {
        const int64_t take = zq_min(n, 8 * PACK_WORDS);
        uint64_t w[PACK_WORDS] = {0};
        get_words(packed, have, bits, w, (int)zq_ceil_div(take, 8));
        for (int j = 0; j < PACK_WORDS; j++) {
            w[j] = spread_word(&s, w[j], bits, is_signed);
        }
        memcpy(codes, w, (size_t)take);
        codes += take, n -= take;
        packed += PACK_WORDS * bits, have -= PACK_WORDS * bits;
    }
}

#include "solver.inc.h"

static void
LEVEL(fill)(zq_kernels *t)
{
    t->gptq_columns_f32 = LEVEL(gptq_columns_f32);
    t->grid_error_f32 = LEVEL(grid_error_f32);
    t->absmax_f32 = LEVEL(absmax_f32);
    t->absmax_columns_f32 = LEVEL(absmax_columns_f32);
    t->minmax_f32 = LEVEL(minmax_f32);
    t->quantize_mul_f32_b8 = LEVEL(quantize_mul_f32_b8);
    t->quantize_minmax_f32_b8 = LEVEL(quantize_minmax_f32_b8);
    t->quantize_mul_f32_b16 = LEVEL(quantize_mul_f32_b16);
    t->quantize_div_f32_b8 = LEVEL(quantize_div_f32_b8);
    t->quantize_vec_f32_b8 = LEVEL(quantize_vec_f32_b8);
    t->dequantize_b8_f32 = LEVEL(dequantize_b8_f32);
    t->dequantize_vec_b8_f32 = LEVEL(dequantize_vec_b8_f32);
    t->dequantize_cols_u8_f32 = LEVEL(dequantize_cols_u8_f32);
    t->pack_bits = LEVEL(pack_bits);
    t->unpack_bits = LEVEL(unpack_bits);
}
