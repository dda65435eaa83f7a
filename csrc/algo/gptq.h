/* GPTQ (gptq.c). */
#ifndef ZQ_GPTQ_H
#define ZQ_GPTQ_H

#include "../zq_kernels.h"

/* A symmetric (k, k) matrix as the caller has it. */
typedef struct {
    const void *data;
    int is_double;
} zq_square;

typedef struct {
    const float *w; /* (n, k) */
    int64_t n, k;
    zq_square hessian;
    zq_square deviation; /* GPTAQ: (k, k), mean over tokens of (x_float - x) x^T; data NULL for GPTQ */
    double alpha;        /* what the deviation is multiplied with */
    const int64_t *order; /* (k): a permutation; column order[i] is quantized i-th */
    int64_t group;        /* columns of w per scale */
    const float *scales;  /* (n, ceil(k / group)) that stay, normal numbers > 0: no dynamic, mse or zero points; or NULL */
    zq_grid grid;
    int symmetric; /* integers: no zero point */
    int dynamic;   /* groups are fitted when they are reached; they must be consecutive in `order` and begin at multiples */
    int mse;       /* scales are searched for, not taken from the extremes */
    int compare;   /* round to nearest as well, and keep that for rows where it is better */
    int64_t block; /* columns between two products with everything before; does not change the result */
    double damping;
    zq_stop *stop; /* or NULL */
} zq_gptq_task;

typedef struct {
    uint8_t *codes;   /* (n, k) */
    float *scales;    /* (n, ceil(k / group)) */
    int32_t *zeros;   /* the same */
    double *loss;     /* (n): d H d^T of a row's error d */
    double *rtn_loss; /* (n): of round to nearest; with compare only */
    uint8_t *is_rtn;  /* (n): that row is rounded to nearest */
    double damping;   /* what was used, relative to the mean of the diagonal */
    int64_t rank;     /* pivots of H that exceed the damping: what the later columns do not explain of a column */
    int64_t dead;     /* columns without input */
} zq_gptq_result;

/* ZQ_ERANGE: no damping makes H positive definite. ZQ_ENONFINITE: NaN or Inf in w, in row *bad_row. ZQ_ESTOPPED: task->stop
 * said so, and rows are unfinished. The task's other contents have been checked (zq_square_check). */
zq_status zq_gptq(const zq_gptq_task *task, zq_gptq_result *result, int64_t *bad_row);

typedef enum {
    ZQ_SQUARE_OK,
    ZQ_SQUARE_NONFINITE,
    ZQ_SQUARE_ASYMMETRIC,
    ZQ_SQUARE_NEGATIVE,
    ZQ_SQUARE_STOPPED,
} zq_square_fault;
/* Is it finite and, when asked, symmetric to 1e-4 of its largest diagonal element, with no negative one? *row: where not.
 * ZQ_SQUARE_STOPPED: stop, which may be NULL, said so. */
zq_square_fault zq_square_check(const zq_square *a, int64_t k, int symmetric, int64_t *row, zq_stop *stop);

#endif
