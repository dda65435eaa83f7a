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

ZQ_INLINE int32_t
v16i_hsum(v16i a)
{
    const __m256i b = _mm256_add_epi32(v16i_lo(a), v16i_hi(a));
    __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
