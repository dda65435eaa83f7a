/* v16: sixteen float32 lanes, v16i: sixteen int32 lanes. Kernels that are the same at every level are written
 * once on these (x86/<family>.inc.h); equal lanes and one order of operations make the levels bit-equal.
 * Include between ZQ_TARGET_BEGIN and ZQ_TARGET_END. n in *n functions is 0..16; other lanes read 0 and are
 * not written. */
#include <immintrin.h>

typedef __m512 v16;
typedef __m512i v16i;

ZQ_INLINE __mmask16
v16_mask(int64_t n)
{
    return (__mmask16)((1u << (unsigned)n) - 1u);
}

ZQ_INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
ZQ_INLINE v16 v16_set1(float x) { return _mm512_set1_ps(x); }
ZQ_INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
ZQ_INLINE v16 v16_loadn(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v16_mask(n), p); }
ZQ_INLINE void v16_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
ZQ_INLINE void v16_stream(float *p, v16 x) { _mm512_stream_ps(p, x); } /* p on a cache line */
ZQ_INLINE void v16_storen(float *p, v16 x, int64_t n) { _mm512_mask_storeu_ps(p, v16_mask(n), x); }
ZQ_INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
ZQ_INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
ZQ_INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
ZQ_INLINE v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
ZQ_INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }   /* a * b + c */
ZQ_INLINE v16 v16_fnma(v16 a, v16 b, v16 c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
ZQ_INLINE v16 v16_fnms(v16 a, v16 b, v16 c) { return _mm512_fnmsub_ps(a, b, c); } /* -c - a * b */
ZQ_INLINE v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }               /* a < b ? a : b */
ZQ_INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }               /* a > b ? a : b */
ZQ_INLINE v16 v16_abs(v16 a) { return _mm512_abs_ps(a); }
/* min(|a|, top), top for NaN, top >= 0: the absolute minimum with its sign cleared, in one instruction */
ZQ_INLINE v16 v16_abs_min(v16 a, v16 top) { return _mm512_range_ps(a, top, 0xa); }
ZQ_INLINE v16 v16_sqrt(v16 a) { return _mm512_sqrt_ps(a); }
ZQ_INLINE v16 v16_rint(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ZQ_INLINE v16 v16_copysign(v16 mag, v16 sign) /* mag >= 0 */
{
    return _mm512_or_ps(mag, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
ZQ_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no) /* a < b ? yes : no */
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

ZQ_INLINE v16i v16i_zero(void) { return _mm512_setzero_si512(); }
ZQ_INLINE v16i v16i_set1(int32_t x) { return _mm512_set1_epi32(x); }
ZQ_INLINE v16i v16i_load(const int32_t *p) { return _mm512_loadu_si512(p); }
ZQ_INLINE v16i v16i_loadn(const int32_t *p, int64_t n) { return _mm512_maskz_loadu_epi32(v16_mask(n), p); }
ZQ_INLINE void v16i_store(int32_t *p, v16i x) { _mm512_storeu_si512(p, x); }
ZQ_INLINE void v16i_storen(int32_t *p, v16i x, int64_t n) { _mm512_mask_storeu_epi32(p, v16_mask(n), x); }
ZQ_INLINE v16i v16i_add(v16i a, v16i b) { return _mm512_add_epi32(a, b); }
ZQ_INLINE v16i v16i_sub(v16i a, v16i b) { return _mm512_sub_epi32(a, b); }
ZQ_INLINE v16i v16i_mul(v16i a, v16i b) { return _mm512_mullo_epi32(a, b); }
ZQ_INLINE v16i v16i_and(v16i a, v16i b) { return _mm512_and_si512(a, b); }
ZQ_INLINE v16i v16i_or(v16i a, v16i b) { return _mm512_or_si512(a, b); }
ZQ_INLINE v16i v16i_max(v16i a, v16i b) { return _mm512_max_epi32(a, b); }
ZQ_INLINE v16i v16i_maxu(v16i a, v16i b) { return _mm512_max_epu32(a, b); } /* of unsigned lanes */
ZQ_INLINE v16i v16i_min(v16i a, v16i b) { return _mm512_min_epi32(a, b); }
#define v16i_shl(a, bits) _mm512_slli_epi32((a), (bits))
#define v16i_shr(a, bits) _mm512_srli_epi32((a), (bits))
#define v16i_sra(a, bits) _mm512_srai_epi32((a), (bits))
ZQ_INLINE v16i v16_to_i(v16 a) { return _mm512_cvtps_epi32(a); } /* rint; |a| < 2^31 */
ZQ_INLINE v16 v16_from_i(v16i a) { return _mm512_cvtepi32_ps(a); }
ZQ_INLINE v16i v16_bits(v16 a) { return _mm512_castps_si512(a); }
ZQ_INLINE v16 v16_from_bits(v16i a) { return _mm512_castsi512_ps(a); }
/* a << 8 with the low byte of b behind it */
ZQ_INLINE v16i v16i_push_byte(v16i a, v16i b)
{
    return _mm512_ternarylogic_epi32(_mm512_slli_epi32(a, 8), b, _mm512_set1_epi32(255), 0xf8);
}
/* low byte of each lane */
ZQ_INLINE void v16i_store_b8(uint8_t *p, v16i a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
ZQ_INLINE void v16i_storen_b8(uint8_t *p, v16i a, int64_t n) { _mm_mask_storeu_epi8(p, v16_mask(n), _mm512_cvtepi32_epi8(a)); }
/* 64 bytes a, b, c, d, each + zero and saturated to 0..255; lanes within +-32000. The packs work within 128 bits. */
ZQ_INLINE void v16i_store_b8x4(uint8_t *p, v16i a, v16i b, v16i c, v16i d, int16_t zero)
{
    const __m512i z = _mm512_set1_epi16(zero), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ab = _mm512_add_epi16(_mm512_packs_epi32(a, b), z), cd = _mm512_add_epi16(_mm512_packs_epi32(c, d), z);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd)));
}
ZQ_INLINE v16i v16i_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
ZQ_INLINE v16i v16i_load_s8(const uint8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
ZQ_INLINE v16i v16i_loadn_u8(const uint8_t *p, int64_t n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(v16_mask(n), p)); }
ZQ_INLINE v16i v16i_loadn_s8(const uint8_t *p, int64_t n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(v16_mask(n), p)); }

/* The upper eight lanes folded onto the lower eight; the rest of a reduction is in v16.inc.h. */
ZQ_INLINE __m256 v16_lo(v16 a) { return _mm512_castps512_ps256(a); }
ZQ_INLINE __m256 v16_hi(v16 a) { return _mm512_extractf32x8_ps(a, 1); }
ZQ_INLINE v16 v16_join(__m256 lo, __m256 hi) { return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1); }
ZQ_INLINE __m256i v16i_lo(v16i a) { return _mm512_castsi512_si256(a); }
ZQ_INLINE __m256i v16i_hi(v16i a) { return _mm512_extracti64x4_epi64(a, 1); }

#include "v16_reduce.h"
