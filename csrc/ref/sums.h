/* Sums over a row, scalar: 64 partial sums (element i goes to sum i % 64: four vectors of sixteen), which are then added in
 * one fixed tree, so that the vector levels give the same bits. */
#ifndef ZQ_REF_SUMS_H
#define ZQ_REF_SUMS_H

#include "../zq_common.h"

#include <math.h>

enum { STRIPES = 64 };

ZQ_INLINE float
zq_add(float a, float b)
{
    return a + b;
}

/* Four vectors pairwise, then lane l with l + 8, l + 4, l + 2, l + 1. Destroys s. */
ZQ_INLINE float
reduce(float *s, float (*op)(float, float))
{
    for (int l = 0; l < 16; l++) {
        s[l] = op(op(s[l], s[l + 16]), op(s[l + 32], s[l + 48]));
    }
    for (int half = 8; half >= 1; half /= 2) {
        for (int l = 0; l < half; l++) {
            s[l] = op(s[l], s[l + half]);
        }
    }
    return s[0];
}

ZQ_INLINE float
row_sum(const float *x, int64_t n)
{
    float s[STRIPES] = {0};
    for (int64_t i = 0; i < n; i++) {
        s[i % STRIPES] += x[i];
    }
    return reduce(s, zq_add);
}

/* sum (x - mean), sum (x - mean)^2 */
ZQ_INLINE void
row_moments(const float *x, int64_t n, float mean, float *first, float *second)
{
    float s1[STRIPES] = {0}, s2[STRIPES] = {0};
    for (int64_t i = 0; i < n; i++) {
        const float d = x[i] - mean;
        s1[i % STRIPES] += d;
        s2[i % STRIPES] = fmaf(d, d, s2[i % STRIPES]);
    }
    *first = reduce(s1, zq_add);
    *second = reduce(s2, zq_add);
}

#endif
