/* v16 on AVX2: two halves of eight. See v16_avx512.h for the meaning of each function. */
#include <immintrin.h>
#include <string.h>

typedef struct {
    __m256 lo, hi;
} v16;
typedef struct {
    __m256i lo, hi;
} v16i;

/* Lanes 0..n-1 of eight; n may lie outside 0..8. */
ZQ_INLINE __m256i
v8_mask(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)zq_max(zq_min(n, 8), 0)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

#define V16_1(name, op) \
    ZQ_INLINE v16 name(v16 a) { return (v16){op(a.lo), op(a.hi)}; }
#define V16_2(name, op) \
    ZQ_INLINE v16 name(v16 a, v16 b) { return (v16){op(a.lo, b.lo), op(a.hi, b.hi)}; }
#define V16_3(name, op) \
    ZQ_INLINE v16 name(v16 a, v16 b, v16 c) { return (v16){op(a.lo, b.lo, c.lo), op(a.hi, b.hi, c.hi)}; }
#define V16I_2(name, op) \
    ZQ_INLINE v16i name(v16i a, v16i b) { return (v16i){op(a.lo, b.lo), op(a.hi, b.hi)}; }

ZQ_INLINE v16 v16_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ZQ_INLINE v16 v16_set1(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ZQ_INLINE v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
/* masked-off lanes are never touched, so p + 8 may lie behind the array's end */
ZQ_INLINE v16 v16_loadn(const float *p, int64_t n)
{
    return (v16){_mm256_maskload_ps(p, v8_mask(n)), n > 8 ? _mm256_maskload_ps(p + 8, v8_mask(n - 8)) : _mm256_setzero_ps()};
}
ZQ_INLINE void v16_store(float *p, v16 x)
{
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
ZQ_INLINE void v16_stream(float *p, v16 x) /* p on a cache line */
{
    _mm256_stream_ps(p, x.lo);
    _mm256_stream_ps(p + 8, x.hi);
}
ZQ_INLINE void v16_storen(float *p, v16 x, int64_t n)
{
    _mm256_maskstore_ps(p, v8_mask(n), x.lo);
    if (n > 8) {
        _mm256_maskstore_ps(p + 8, v8_mask(n - 8), x.hi);
    }
}
V16_2(v16_add, _mm256_add_ps)
V16_2(v16_sub, _mm256_sub_ps)
V16_2(v16_mul, _mm256_mul_ps)
V16_2(v16_div, _mm256_div_ps)
V16_3(v16_fma, _mm256_fmadd_ps)
V16_3(v16_fnma, _mm256_fnmadd_ps)
V16_3(v16_fnms, _mm256_fnmsub_ps)
V16_2(v16_min, _mm256_min_ps)
V16_2(v16_max, _mm256_max_ps)
V16_1(v16_sqrt, _mm256_sqrt_ps)
ZQ_INLINE v16 v16_abs(v16 a)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
ZQ_INLINE v16 v16_abs_min(v16 a, v16 top) { return v16_min(v16_abs(a), top); }
ZQ_INLINE v16 v16_rint(v16 a)
{
    return (v16){_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ZQ_INLINE v16 v16_copysign(v16 mag, v16 sign)
{
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_or_ps(mag.lo, _mm256_and_ps(sign.lo, bit)), _mm256_or_ps(mag.hi, _mm256_and_ps(sign.hi, bit))};
}
ZQ_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no)
{
    return (v16){_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                 _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

ZQ_INLINE v16i v16i_zero(void) { return (v16i){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
ZQ_INLINE v16i v16i_set1(int32_t x) { return (v16i){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ZQ_INLINE v16i v16i_load(const int32_t *p)
{
    return (v16i){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}
ZQ_INLINE v16i v16i_loadn(const int32_t *p, int64_t n)
{
    return (v16i){_mm256_maskload_epi32(p, v8_mask(n)),
                  n > 8 ? _mm256_maskload_epi32(p + 8, v8_mask(n - 8)) : _mm256_setzero_si256()};
}
ZQ_INLINE void v16i_store(int32_t *p, v16i x)
{
    _mm256_storeu_si256((__m256i *)p, x.lo);
    _mm256_storeu_si256((__m256i *)(p + 8), x.hi);
}
ZQ_INLINE void v16i_storen(int32_t *p, v16i x, int64_t n)
{
    _mm256_maskstore_epi32(p, v8_mask(n), x.lo);
    if (n > 8) {
        _mm256_maskstore_epi32(p + 8, v8_mask(n - 8), x.hi);
    }
}
V16I_2(v16i_add, _mm256_add_epi32)
V16I_2(v16i_sub, _mm256_sub_epi32)
V16I_2(v16i_mul, _mm256_mullo_epi32)
V16I_2(v16i_and, _mm256_and_si256)
V16I_2(v16i_or, _mm256_or_si256)
V16I_2(v16i_max, _mm256_max_epi32)
V16I_2(v16i_maxu, _mm256_max_epu32)
V16I_2(v16i_min, _mm256_min_epi32)
ZQ_INLINE v16i v16i_shl(v16i a, int bits) { return (v16i){_mm256_slli_epi32(a.lo, bits), _mm256_slli_epi32(a.hi, bits)}; }
ZQ_INLINE v16i v16i_shr(v16i a, int bits) { return (v16i){_mm256_srli_epi32(a.lo, bits), _mm256_srli_epi32(a.hi, bits)}; }
ZQ_INLINE v16i v16i_sra(v16i a, int bits) { return (v16i){_mm256_srai_epi32(a.lo, bits), _mm256_srai_epi32(a.hi, bits)}; }
ZQ_INLINE v16i v16i_push_byte(v16i a, v16i b) { return v16i_or(v16i_shl(a, 8), v16i_and(b, v16i_set1(255))); }
ZQ_INLINE v16i v16_to_i(v16 a) { return (v16i){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
ZQ_INLINE v16 v16_from_i(v16i a) { return (v16){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
ZQ_INLINE v16i v16_bits(v16 a) { return (v16i){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
ZQ_INLINE v16 v16_from_bits(v16i a) { return (v16){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

ZQ_INLINE __m128i
v16i_low_bytes(v16i a)
{
    const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, /* twice */
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i lo = _mm256_shuffle_epi8(a.lo, pick), hi = _mm256_shuffle_epi8(a.hi, pick);
    const __m128i l = _mm_unpacklo_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
    const __m128i h = _mm_unpacklo_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
    return _mm_unpacklo_epi64(l, h);
}
ZQ_INLINE void v16i_store_b8(uint8_t *p, v16i a) { _mm_storeu_si128((__m128i *)p, v16i_low_bytes(a)); }
ZQ_INLINE void v16i_storen_b8(uint8_t *p, v16i a, int64_t n)
{
    uint8_t bytes[16];
    _mm_storeu_si128((__m128i *)bytes, v16i_low_bytes(a));
    memcpy(p, bytes, (size_t)n);
}
ZQ_INLINE void v16i_store_b8x2(uint8_t *p, v16i a, v16i b, __m256i zero)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i i = _mm256_add_epi16(_mm256_packs_epi32(a.lo, a.hi), zero);
    const __m256i j = _mm256_add_epi16(_mm256_packs_epi32(b.lo, b.hi), zero);
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(i, j), order));
}
ZQ_INLINE void v16i_store_b8x4(uint8_t *p, v16i a, v16i b, v16i c, v16i d, int16_t zero)
{
    v16i_store_b8x2(p, a, b, _mm256_set1_epi16(zero));
    v16i_store_b8x2(p + 32, c, d, _mm256_set1_epi16(zero));
}
ZQ_INLINE __m128i v16_bytesn(const uint8_t *p, int64_t n)
{
    uint8_t bytes[16] = {0};
    memcpy(bytes, p, (size_t)n);
    return _mm_loadu_si128((const __m128i *)bytes);
}
ZQ_INLINE v16i v16i_widen_u8(__m128i b)
{
    return (v16i){_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
}
ZQ_INLINE v16i v16i_widen_s8(__m128i b)
{
    return (v16i){_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))};
}
ZQ_INLINE v16i v16i_load_u8(const uint8_t *p) { return v16i_widen_u8(_mm_loadu_si128((const __m128i *)p)); }
ZQ_INLINE v16i v16i_load_s8(const uint8_t *p) { return v16i_widen_s8(_mm_loadu_si128((const __m128i *)p)); }
ZQ_INLINE v16i v16i_loadn_u8(const uint8_t *p, int64_t n) { return v16i_widen_u8(v16_bytesn(p, n)); }
ZQ_INLINE v16i v16i_loadn_s8(const uint8_t *p, int64_t n) { return v16i_widen_s8(v16_bytesn(p, n)); }

ZQ_INLINE __m256 v16_lo(v16 a) { return a.lo; }
ZQ_INLINE __m256 v16_hi(v16 a) { return a.hi; }
ZQ_INLINE v16 v16_join(__m256 lo, __m256 hi) { return (v16){lo, hi}; }
ZQ_INLINE __m256i v16i_lo(v16i a) { return a.lo; }
ZQ_INLINE __m256i v16i_hi(v16i a) { return a.hi; }

#include "v16_reduce.h"
