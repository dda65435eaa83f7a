/* Every argument check of the extension lives here; wrappers only name their arguments. All functions set a
 * Python exception that names the argument and return NULL / -1 on failure. */
#ifndef ZQ_ARGS_H
#define ZQ_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL zq_ARRAY_API
#ifndef ZQ_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../zq.h"
#include "../zq_common.h"

/* A METH_FASTCALL wrapper as an entry of a method table */
#define FAST(f) ((PyCFunction)(void (*)(void))(f))

/* A NumPy array argument. `arr` is a new reference, C-contiguous, aligned, native byte order; its data may be a
 * copy of what the caller passed. */
typedef struct {
    PyArrayObject *arr;
    void *data;
    int ndim;
    int64_t dim[4]; /* 1 behind ndim */
    int64_t size;
} zq_arg;

/* The type codes used below; more than one may be or-ed together. */
enum { ZQ_F32 = 1, ZQ_I8 = 2, ZQ_U8 = 4, ZQ_I32 = 8, ZQ_I64 = 16, ZQ_BOOL = 32, ZQ_F64 = 64 };

/* Input array of exactly one of the types, with min_ndim..max_ndim dimensions. */
int zq_in(PyObject *o, const char *name, int types, int min_ndim, int max_ndim, zq_arg *out);
/* As zq_in, but None gives arr = NULL, data = NULL and success. */
int zq_in_or_none(PyObject *o, const char *name, int types, int min_ndim, int max_ndim, zq_arg *out);
/* A new array (uninitialised); from this size on, on the core's allocator. */
enum { ZQ_CORE_MEMORY_BYTES = 8 << 10 };
int zq_new(int type, int ndim, const int64_t *dims, zq_arg *out);
/* A new (rows, cols) array of `type` whose rows are ld >= cols items apart (64-byte aligned buffer, slack zeroed
 * by whoever fills it): what the GEMM reads without copying. data points to row 0. */
int zq_new_strided(int type, int64_t rows, int64_t cols, int64_t ld, zq_arg *out);
/* Whether the array begins where a block of the core's allocator does and owns it. */
int zq_owns_core_memory(PyArrayObject *a);
/* New token codes of m rows of n: q (m, n) uint8 with padded rows, scale (m), zero (m). */
int zq_new_codes(int64_t m, int64_t n, zq_arg a[3]);
/* Refuse a shape: ValueError "name: expected shape (a, b), got (c, d)". -1 in dims matches anything. */
int zq_shape(const zq_arg *a, const char *name, int ndim, const int64_t *dims);
/* Refuse NaN and Inf in a float32 array: ValueError with the row (the last dimension is a row). NULL arr passes. */
int zq_finite(const zq_arg *a, const char *name);
/* Refuse what weights cannot be divided by, anything but positive normal numbers, in a float32 matrix. */
int zq_check_scales(const zq_arg *a, const char *name);
/* Release n arguments (NULL arr allowed). */
void zq_release(int n, zq_arg *args);
/* The array as a Python object; gives the reference away. */
PyObject *zq_give(zq_arg *a);
/* A tuple of n arrays, None where arr is NULL; takes the references, on failure too. */
PyObject *zq_give_tuple(int n, zq_arg *args);

int zq_int(PyObject *o, const char *name, int64_t lo, int64_t hi, int64_t *out);
int zq_float(PyObject *o, const char *name, double *out);
int zq_count(const char *function, Py_ssize_t got, Py_ssize_t want);
/* What the capsule `kind` of the argument `name`, which `maker` returns, points to: a struct whose first member is an
 * atomic_flag that says whether a call uses it. Claimed for this call; give it back with zq_leave, which takes NULL too. */
void *zq_enter(PyObject *o, const char *kind, const char *name, const char *maker);
void zq_leave(void *claimed);

/* Status to exception: -1 with the exception set, or 0 when ZQ_OK. `what` names the array. */
int zq_check(zq_status status, const char *what, int64_t bad_row);

/* Where a row operator's results go: y when wanted, codes when quant says so. a: y, q, scale, zero. */
int zq_new_rows(int64_t m, int64_t n, int want_y, int64_t quant, zq_arg a[4], zq_rows_out *out);
/* y, or codes. */
PyObject *zq_give_rows(int64_t quant, zq_arg a[4]);
/* As zq_check. The core knows that a row was bad, this finds which of the inputs had it; where none had, the result
 * overflowed float32. */
int zq_check_inputs(zq_status status, int inputs, const zq_arg *a, const char *const *names, int64_t bad_row);
int zq_read_quant(PyObject *o, int64_t *quant);
int zq_read_eps(PyObject *o, float *eps);     /* >= 0 */
int zq_read_scale(PyObject *o, float *scale); /* > 0 */
/* A float32 row vector of n finite values. */
int zq_read_vector(PyObject *o, const char *name, int64_t n, zq_arg *a);
/* offsets (sequences + 1): from 0 to rows, never falling. */
int zq_read_offsets(PyObject *o, int64_t rows, zq_arg *a);

#endif
