/* The activations of layers with groups; included once per level, which defines LEVEL(name). */

/* 32 codes q: s = q ^ 0x80; returns the sum of q as partial sums. s may be q. */
ZQ_INLINE __m256i
flip_and_sum(const uint8_t *q, uint8_t *s)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)q);
    _mm256_storeu_si256((__m256i *)s, _mm256_xor_si256(a, _mm256_set1_epi8((char)0x80)));
    return _mm256_sad_epu8(a, _mm256_setzero_si256());
}

/* The same for n < 32 codes */
ZQ_INLINE __m256i
flip_and_sum_edge(const uint8_t *q, int64_t n, uint8_t *s)
{
    uint8_t edge[32] = {0};
    memcpy(edge, q, (size_t)n);
    const __m256i sum = flip_and_sum(edge, edge);
    memcpy(s, edge, (size_t)n);
    return sum;
}

static void
LEVEL(center_groups_b8)(const uint8_t *q, int64_t n, int64_t group, int32_t offset, uint8_t *s, int32_t *start)
{
    for (int64_t k = 0; k < n; start++) {
        const int64_t begin = k, end = zq_min(n, k + group);
        __m256i sum = _mm256_setzero_si256();
        for (; end - k >= 32; k += 32) {
            sum = _mm256_add_epi64(sum, flip_and_sum(q + k, s + k));
        }
        if (k < end) {
            sum = _mm256_add_epi64(sum, flip_and_sum_edge(q + k, end - k, s + k));
            k = end;
        }
        const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        const int32_t all = _mm_cvtsi128_si32(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
        *start = -offset * (all - 128 * (int32_t)(end - begin));
    }
}
