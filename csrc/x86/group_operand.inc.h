/* The activations of layers with groups, on v16; included once per level, which defines LEVEL(name). */

static void
LEVEL(center_groups_b8)(const uint8_t *q, int64_t n, int64_t group, int32_t offset, uint8_t *s, int32_t *start)
{
    for (int64_t k = 0; k < n; start++) {
        const int64_t begin = k, end = zq_min(n, k + group);
        v16i sum = v16i_zero();
        for (; k < end; k += zq_min(64, end - k)) {
            sum = v16i_add(sum, v16i_flip_and_sum(q + k, zq_min(64, end - k), s + k));
        }
        *start = -offset * (v16i_hsum(sum) - 128 * (int32_t)(end - begin));
    }
}
