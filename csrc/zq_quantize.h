/* Quantizers over whole arrays, threaded (quantize.c). Included by zq.h, which has the conventions. */
#ifndef ZQ_QUANTIZE_H
#define ZQ_QUANTIZE_H

#include <stdint.h>

/* Dynamic, one scale per token. x (m, k) with row stride ld_x; q (m, k) bytes with row stride ld_q; slack bytes
 * of a row up to min(ld_q, round_up(k, 8)) are zeroed. TOKEN_SYM writes q + 128 with zero 128. */
zq_status zq_quantize_tokens(const float *x, int64_t m, int64_t k, int64_t ld_x, zq_quant mode, uint8_t *q, int64_t ld_q,
                             float *scale, int32_t *zero, int64_t *bad_row);

/* One row of the same, without touching slack; used inside jobs of other operators. Returns 0, with nothing
 * written, where x is not finite. */
struct zq_kernels;
int zq_quantize_token(const struct zq_kernels *K, const float *x, int64_t k, zq_quant mode, uint8_t *q, float *scale,
                      int32_t *zero);
/* Rows of the same, `zeros` bytes of 0 behind each: one row becomes codes while the range of a later one is found, and rows
 * after it are fetched. Returns the first row that is not finite, `rows` without one; such a row gets any codes and scale. */
typedef struct {
    const float *x;
    int64_t ld_x, rows, k;
    zq_quant mode; /* TOKEN_SYM or TOKEN_ASYM */
    uint8_t *q;
    int64_t ld_q, zeros;
    float *scale;
    int32_t *zero;
} zq_token_rows;
int64_t zq_quantize_token_rows(const struct zq_kernels *K, const zq_token_rows *t);

/* amax / levels, or 0 when that is too small to divide by; one less in its last place where levels of it are Inf. */
float zq_absmax_scale(float amax, float levels);

/* The first half of zq_quantize_token, from the row's range, min(0, min x) and max(0, max x), both finite: returns 1 / scale
 * (0 for a row of zeros), with which quantize_mul_f32_b8 does the rest. */
float zq_token_scale(zq_quant mode, float lo, float hi, float *scale, int32_t *zero);
/* TOKEN_16: one row to int16 codes a = rint(x / scale), scale = max|x| / 32767, written as the two rows of bytes of
 * a + 32768 = 256 high + low: x = scale[0] (high - zero[0]) + scale[1] (low - zero[1]). Returns as above. */
int zq_quantize_token16(const struct zq_kernels *K, const float *x, int64_t k, uint8_t *high, uint8_t *low, float scale[2],
                        int32_t zero[2]);

/* lo[i] = min(0, min of row i), hi[i] = max(0, max of row i): what static and asymmetric scales are made of. */
zq_status zq_minmax_rows(const float *x, int64_t m, int64_t k, float *lo, float *hi, int64_t *bad_row);

/* Static: scale and zero (count 1, or k: one per feature). bytes of int8 (is_signed) or uint8, in [qmin, qmax],
 * every zero in there too. Division, half to even, saturating: QuantizeLinear. x may hold anything finite. */
zq_status zq_quantize_static(const float *x, int64_t m, int64_t k, const float *scale, const int32_t *zero, int64_t count,
                             int32_t qmin, int32_t qmax, uint8_t *q, int64_t *bad_row);
void zq_dequantize_rows(const uint8_t *q, int is_signed, int64_t m, int64_t k, const float *scale, const int32_t *zero,
                        float *x); /* per token: scale (m), zero (m) or NULL */
void zq_dequantize_static(const uint8_t *q, int is_signed, int64_t m, int64_t k, const float *scale, const int32_t *zero,
                          int64_t count, float *x);

/* Weights, group-wise along the input dimension: codes (n, k) int8, scales (n, ceil(k / group)), the tail group
 * short. Symmetric: codes in +-(2^(bits-1)-1), zeros NULL. Asymmetric: codes 0..2^bits-1 (uint8 bytes), zeros the
 * same shape as scales. A group that is all zero (or below FLT_MIN * qmax) gets scale 1 and codes 0 (= zero). */
zq_status zq_quantize_groups(const float *w, int64_t n, int64_t k, int64_t group, int bits, int symmetric, int8_t *codes,
                             float *scales, int32_t *zeros, int64_t *bad_row);
void zq_dequantize_groups(const int8_t *codes, int64_t n, int64_t k, int64_t group, int symmetric, const float *scales,
                          const int32_t *zeros, float *w);
/* ZeroQuant's original grouping: `blocks` blocks of n / blocks whole output rows, one symmetric scale each, written
 * out per row: scales (n). n % blocks == 0. */
zq_status zq_quantize_row_blocks(const float *w, int64_t n, int64_t k, int64_t blocks, int bits, int8_t *codes,
                                 float *scales, int64_t *bad_row);

#endif
