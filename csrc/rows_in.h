/* Rows on their way into a linear layer: float32 behind the layer's shift and factor, and as codes. gemm.c does this where a
 * product follows at once, low_rank.c where it needs the codes itself. */
#ifndef ZQ_ROWS_IN_H
#define ZQ_ROWS_IN_H

#include "bad_row.h"
#include "zq_kernels.h"

typedef struct {
    const zq_linear *w; /* of which only k and what zq_linear_input set are read */
    const zq_rows *x;
    const zq_kernels *K;
    int64_t m;
    /* one scale for all rows: ZQ_QUANT_STATIC and TENSOR_* */
    int one_scale;
    float scale;
    int32_t zero;
    _Atomic(uint32_t) lowest, highest; /* TENSOR_*: bit patterns of -min(0, min x) and max(0, max x) */
    zq_trouble trouble;
} zq_rows_in;

void zq_rows_in_init(zq_rows_in *in, const zq_linear *w, const zq_rows *x, int64_t m);

/* Before the first row becomes codes: the scale and zero of all rows, where they share one. */
void zq_find_scale(zq_rows_in *in);

/* Row r of x as the weights see it: itself, or in `branched` (k) behind shift and factor. */
const float *zq_read_row(const zq_rows_in *in, int64_t r, float *branched);

/* The same, in scratch of this thread (ZQ_SCRATCH_ROW); NULL without memory, which is noted. */
const float *zq_read_row_scratch(zq_rows_in *in, int64_t r);

/* The k values of row r, read as above, to codes, one scale and one zero. A row that is not finite is noted; it gets any codes
 * and scale. */
void zq_code_row(zq_rows_in *in, int64_t r, const float *x, uint8_t *q, float *scale, int32_t *zero);

/* fn(ctx, row) for every row; rows of `row_items` elements are shared out when that is worth a barrier: quantizing so many
 * takes longer. */
enum { ZQ_SHARED_ITEMS = 32768 };
void zq_for_rows(int64_t m, int64_t row_items, zq_job_fn fn, void *ctx);

#endif
