/* Least and largest of 0 and what was seen, on the bits of float32: as a signed integer a positive number grows with its value
 * and every negative one is less than 0; as an unsigned integer a negative number grows with its magnitude, and every
 * positive one is less than the pattern of -0. NaN and Inf are beyond all finite numbers on their side, so the ends show
 * them. Two integer operations a vector, which leaves the pipes of the multiplications alone. */
typedef struct {
    v16i lo, hi;
} v16_range;

ZQ_INLINE v16_range
v16_range_start(void)
{
    return (v16_range){v16i_set1(INT32_MIN), v16i_zero()};
}

ZQ_INLINE v16_range
v16_range_see(v16_range r, v16 x)
{
    return (v16_range){v16i_maxu(r.lo, v16_bits(x)), v16i_max(r.hi, v16_bits(x))};
}

ZQ_INLINE v16_range
v16_range_join(v16_range a, v16_range b)
{
    return (v16_range){v16i_maxu(a.lo, b.lo), v16i_max(a.hi, b.hi)};
}

/* Returns 1 where all was finite. All lanes of lo have the sign bit, so signed and unsigned order agree on them. */
ZQ_INLINE int
v16_range_end(v16_range r, float *lo, float *hi)
{
    const int32_t l = v16i_hmax(r.lo), h = v16i_hmax(r.hi);
    memcpy(lo, &l, sizeof *lo);
    memcpy(hi, &h, sizeof *hi);
    *lo += 0.0f; /* -0 becomes 0 */
    return (l & 0x7fffffff) < 0x7f800000 && h < 0x7f800000;
}
