/* Reductions of v16 in the one fixed order: lane l with l + 8, then l + 4, l + 2, l + 1. */
ZQ_INLINE float
v16_hsum(v16 a)
{
    const __m256 b = _mm256_add_ps(v16_lo(a), v16_hi(a));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

ZQ_INLINE float
v16_hmax(v16 a)
{
    const __m256 b = _mm256_max_ps(v16_lo(a), v16_hi(a));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

ZQ_INLINE float
v16_hmin(v16 a)
{
    const __m256 b = _mm256_min_ps(v16_lo(a), v16_hi(a));
    __m128 c = _mm_min_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_min_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_min_ss(c, _mm_shuffle_ps(c, c, 1)));
}

ZQ_INLINE int32_t
v16i_hmax(v16i a)
{
    const __m256i b = _mm256_max_epi32(v16i_lo(a), v16i_hi(a));
    __m128i c = _mm_max_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}

/* Of unsigned lanes */
ZQ_INLINE uint32_t
v16i_hmaxu(v16i a)
{
    const __m256i b = _mm256_max_epu32(v16i_lo(a), v16i_hi(a));
    __m128i c = _mm_max_epu32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(c, _mm_shuffle_epi32(c, 0xb1)));
}

ZQ_INLINE int32_t
v16i_hsum(v16i a)
{
    const __m256i b = _mm256_add_epi32(v16i_lo(a), v16i_hi(a));
    __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}

/* Eight rows of eight lanes: the maximum of row i in lane i. Each step halves the lanes of a row and sets two rows side by
 * side. */
ZQ_INLINE __m256i
v8i_hmax8(const __m256i *r)
{
    __m256i p[4], q[2];
    ZQ_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        p[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]));
    }
    ZQ_UNROLL(2)
    for (int i = 0; i < 2; i++) {
        q[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(p[2 * i], p[2 * i + 1]), _mm256_unpackhi_epi64(p[2 * i], p[2 * i + 1]));
    }
    return _mm256_max_epi32(_mm256_permute2x128_si256(q[0], q[1], 0x20), _mm256_permute2x128_si256(q[0], q[1], 0x31));
}

/* The maximum of a[i] in lane i. */
ZQ_INLINE v16i
v16i_hmax16(const v16i *a)
{
    __m256i half[16];
    ZQ_UNROLL(16)
    for (int i = 0; i < 16; i++) {
        half[i] = _mm256_max_epi32(v16i_lo(a[i]), v16i_hi(a[i]));
    }
    return v16_bits(v16_join(_mm256_castsi256_ps(v8i_hmax8(half)), _mm256_castsi256_ps(v8i_hmax8(half + 8))));
}
