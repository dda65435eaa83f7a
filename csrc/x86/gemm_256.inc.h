/* What the tiles of the two 256-bit levels (avx2, avxvnni) share: 3 rows by a whole panel of 32 columns. The 12
 * accumulators leave 4 registers. Half panels with 5 or 6 rows load less, but lose up to a tenth where the panel lies in
 * L2, which they read twice, every other line each time.
 *
 * Codes of four bits are worth it, as every load costs a shift and two masks as well: 6 rows by 16 columns, both halves of
 * a panel in turn within a group, whose 2 KiB stay in L1. */
enum { MR = 3, NV = 4, MR_GROUP = 6 };
#define ROWS3(X, far) X(1, far) X(2, far) X(3, far)
#define ROWS6(X, far) ROWS3(X, far) X(4, far) X(5, far) X(6, far)

ZQ_INLINE __m256i
load256(const void *p)
{
    return _mm256_load_si256((const __m256i *)p);
}

ZQ_INLINE __m256i
broadcast4(const uint8_t *a)
{
    int32_t v;
    memcpy(&v, a, 4);
    return _mm256_set1_epi32(v);
}

#define X16(v) {v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}
static const _Alignas(32) int16_t low_nibbles[16] = X16(0x0f0f);

/* A constant that stays in memory, as an operand: in loops that need all registers for something else. */
ZQ_INLINE __m256i
constant16(const int16_t *p)
{
    __asm__("" : "+r"(p));
    return load256(p);
}

/* The low or the high nibbles of 32 bytes */
ZQ_INLINE __m256i
nibbles(const uint8_t *b, const int high)
{
    const __m256i w = load256(b);
    return _mm256_and_si256(high ? _mm256_srli_epi16(w, 4) : w, constant16(low_nibbles));
}

/* For a panel's 128 bytes at b: prefetch what t->ahead asks for (see zq_tile), one line or two. */
ZQ_INLINE void
prefetch_ahead(const int far, const zq_tile *t, const void *b)
{
    if (far) {
        const char *p = t->ahead + ((const char *)b - (const char *)t->b) / 128 * t->ahead_step;
        fetch(far, p);
        if ((far & ~TO_L2) == 2) {
            fetch(far, p + 64);
        }
    }
}

/* With groups and several tiles per panel: once per group of `bytes` bytes of the panel at b, all lines of its share. */
ZQ_INLINE void
prefetch_group(const int far, const zq_tile *t, const void *b, int64_t bytes)
{
    if (far == 1) {
        const int64_t at = ((const char *)b - (const char *)t->b) / 128 * t->ahead_step;
        for (int64_t line = 0; line < bytes / 128 * t->ahead_step; line += 64) {
            _mm_prefetch(t->ahead + at + line, _MM_HINT_T0);
        }
    }
}

/* With groups and one tile: for half a panel's 64 bytes at b, the line that stands for them. */
ZQ_INLINE void
prefetch_half(const int far, const zq_tile *t, const uint8_t *b)
{
    if ((far & ~TO_L2) == 2) {
        fetch(far, t->ahead + (b - (const uint8_t *)t->b));
    }
}

/* Columns j .. j + 16 of row i to y. A masked store is microcode on AMD: only where the matrix ends. */
ZQ_INLINE void
store16(const zq_tile *t, int i, int j, v16 v)
{
    float *y = t->y + i * t->ldy + j;
    if (t->nr - j < 16) {
        if (t->nr > j) {
            v16_storen(y, v, t->nr - j);
        }
    }
    else if (t->stream) {
        _mm256_stream_ps(y, v.lo);
        _mm256_stream_ps(y + 8, v.hi);
    }
    else {
        v16_store(y, v);
    }
}

/* y of columns j .. j + 16 of row i out of the integer sums */
ZQ_INLINE void
store_scaled16(const zq_tile *t, int i, int j, v16i sum)
{
    const v16 y = v16_mul(v16_from_i(sum), v16_set1(t->sx[i]));
    store16(t, i, j, v16_fma(y, v16_load(t->scale + j), v16_load(t->bias + j)));
}

/* Columns j .. j + 16 of a row of integer sums */
ZQ_INLINE void
store_s32(const zq_tile *t, int32_t *c, int j, v16i sum)
{
    if (t->nr - j >= 16) {
        v16i_store(c + j, sum);
    }
    else if (t->nr > j) {
        v16i_storen(c + j, sum, t->nr - j);
    }
}

/* y of columns j .. j + 16 of row i out of f, the groups' sums times their scales */
ZQ_INLINE void
store_group16(const zq_tile *t, int i, int j, v16 f)
{
    const v16 y = v16_fnma(v16_set1((float)(t->zx[i] - 128)), v16_load(t->zcorr + j), f);
    store16(t, i, j, v16_fma(y, v16_set1(t->sx[i]), v16_load(t->bias + j)));
}

