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

/* The sums of four times 32 codes */
ZQ_INLINE __m128i
flip_and_sum4(const uint8_t *q, uint8_t *s)
{
    const __m256i a = flip_and_sum(q, s), b = flip_and_sum(q + 32, s + 32);
    const __m256i c = flip_and_sum(q + 64, s + 64), d = flip_and_sum(q + 96, s + 96);
    const __m256i eighths = _mm256_packs_epi32(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)); /* of 8 codes: < 2^11 */
    const __m256i halves = _mm256_madd_epi16(eighths, _mm256_set1_epi16(1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

/* 128 codes of the usual small groups: 4 starts of groups of 32, or 2 of groups of 64 */
ZQ_INLINE void
center_128(const uint8_t *q, int64_t group, int32_t offset, uint8_t *s, int32_t *start)
{
    const __m128i sum = flip_and_sum4(q, s), zeros = _mm_set1_epi32(128 * (int32_t)group), factor = _mm_set1_epi32(offset);
    if (group == 32) {
        _mm_storeu_si128((__m128i *)start, _mm_mullo_epi32(_mm_sub_epi32(zeros, sum), factor));
    }
    else {
        _mm_storel_epi64((__m128i *)start, _mm_mullo_epi32(_mm_sub_epi32(zeros, _mm_hadd_epi32(sum, sum)), factor));
    }
}

static void
LEVEL(center_groups_b8)(const uint8_t *q, int64_t n, int64_t group, int32_t offset, uint8_t *s, int32_t *start)
{
    int64_t k = 0;
    for (; (group == 32 || group == 64) && n - k >= 128; k += 128, start += 128 / group) {
        center_128(q + k, group, offset, s + k, start);
    }
    for (; k < n; start++) {
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
