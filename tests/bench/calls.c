/* Linear layers called again and again from C, as an engine without an interpreter would. Built on demand by native.py, loaded
 * with ctypes by linears.py. */
#include "zq.h"

typedef zq_status (*forward_fn)(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row);

/* `calls` products of m rows of codes, on the weights in turn, each into y. Returns the first status that is not ZQ_OK. */
int
zqb_forward(void *function, const zq_linear *const *weights, int64_t count, const uint8_t *codes, int64_t ld,
            const float *scale, const int32_t *zero, int64_t m, float *y, int64_t calls)
{
    const forward_fn forward = (forward_fn)function;
    const zq_rows x = {.u8 = codes, .ld_u8 = ld, .scale = scale, .zero = zero};
    const zq_out out = {.y = y, .ld_y = weights[0]->n};
    int64_t bad_row;
    zq_status status = ZQ_OK;
    for (int64_t i = 0; i < calls && status == ZQ_OK; i++) {
        status = forward(weights[i % count], &x, m, &out, &bad_row);
    }
    return (int)status;
}
