/* Quantizers and bit packing. Each wrapper: read the arguments, make the outputs, call the core without the GIL. */
#include "args.h"

#include "../zq_kernels.h"
#include "bind.h"

#include <string.h>

/* Release what was read and made so far; the exception is set. */
static PyObject *
fail(int n, zq_arg *args)
{
    zq_release(n, args);
    return NULL;
}

static PyObject *
py_quantize_tokens(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* x, q, scale, zero */
    int64_t mode, padded, bad = 0;
    if (zq_count("quantize_tokens", n, 3) < 0 || zq_int(args[1], "mode", ZQ_QUANT_TOKEN_SYM, ZQ_QUANT_TOKEN_ASYM, &mode) < 0 ||
        zq_int(args[2], "padded", 0, 1, &padded) < 0 || zq_in(args[0], "x", ZQ_F32, 2, 2, &a[0]) < 0) {
        return NULL;
    }
    const int64_t m = a[0].dim[0], k = a[0].dim[1], ld = padded ? zq_row_pitch(k) : k;
    const int made = padded ? zq_new_strided(ZQ_U8, m, k, ld, &a[1]) : zq_new(ZQ_U8, 2, a[0].dim, &a[1]);
    if (made < 0 || zq_new(ZQ_F32, 1, &m, &a[2]) < 0 || zq_new(ZQ_I32, 1, &m, &a[3]) < 0) {
        return fail(4, a);
    }
    uint8_t *q = a[1].data;
    zq_status status;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; i < m; i++) {
        memset(q + i * ld + k, 0, (size_t)(ld - k));
    }
    status = zq_quantize_tokens(a[0].data, m, k, k, (zq_quant)mode, q, ld, a[2].data, a[3].data, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check(status, "x", bad) < 0) {
        return fail(4, a);
    }
    zq_release(1, a);
    return zq_give_tuple(3, a + 1);
}

static PyObject *
py_minmax_rows(PyObject *self, PyObject *x)
{
    (void)self;
    zq_arg a[3] = {{0}}; /* x, lo, hi */
    int64_t bad = 0;
    if (zq_in(x, "x", ZQ_F32, 2, 2, &a[0]) < 0 || zq_new(ZQ_F32, 1, a[0].dim, &a[1]) < 0 ||
        zq_new(ZQ_F32, 1, a[0].dim, &a[2]) < 0) {
        return fail(3, a);
    }
    zq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = zq_minmax_rows(a[0].data, a[0].dim[0], a[0].dim[1], a[1].data, a[2].data, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check(status, "x", bad) < 0) {
        return fail(3, a);
    }
    zq_release(1, a);
    return zq_give_tuple(2, a + 1);
}

/* scale (1) or (k) of float32 and zero_point of the same shape. */
static int
read_static(PyObject *scale_obj, PyObject *zero_obj, int64_t k, zq_arg *scale, zq_arg *zero)
{
    if (zq_in(scale_obj, "scale", ZQ_F32, 1, 1, scale) < 0 || zq_in(zero_obj, "zero_point", ZQ_I32, 1, 1, zero) < 0) {
        return -1;
    }
    if (scale->size != 1 && zq_shape(scale, "scale", 1, &k) < 0) {
        return -1;
    }
    return zq_shape(zero, "zero_point", 1, scale->dim);
}

/* The quantizers only keep their codes in range for zeros that are codes themselves. */
static int
zeros_in_range(const zq_arg *zero, int64_t qmin, int64_t qmax)
{
    const int32_t *z = zero->data;
    for (int64_t i = 0; i < zero->size; i++) {
        if (z[i] < qmin || z[i] > qmax) {
            PyErr_Format(PyExc_ValueError, "zero_point: expected %lld to %lld, got %d", (long long)qmin, (long long)qmax,
                         (int)z[i]);
            return -1;
        }
    }
    return 0;
}

static PyObject *
py_quantize_static(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* x, scale, zero, q */
    int64_t qmin, qmax, is_signed, bad = 0;
    if (zq_count("quantize_static", n, 6) < 0 || zq_int(args[5], "signed", 0, 1, &is_signed) < 0 ||
        zq_int(args[3], "qmin", is_signed ? -128 : 0, is_signed ? 127 : 255, &qmin) < 0 ||
        zq_int(args[4], "qmax", qmin, is_signed ? 127 : 255, &qmax) < 0 || zq_in(args[0], "x", ZQ_F32, 2, 2, &a[0]) < 0 ||
        read_static(args[1], args[2], a[0].dim[1], &a[1], &a[2]) < 0 || zeros_in_range(&a[2], qmin, qmax) < 0 ||
        zq_new(is_signed ? ZQ_I8 : ZQ_U8, 2, a[0].dim, &a[3]) < 0) {
        return fail(4, a);
    }
    zq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = zq_quantize_static(a[0].data, a[0].dim[0], a[0].dim[1], a[1].data, a[2].data, a[1].size, (int32_t)qmin,
                                (int32_t)qmax, a[3].data, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check(status, "x", bad) < 0) {
        return fail(4, a);
    }
    zq_release(3, a);
    return zq_give(&a[3]);
}

static int
is_int8(const zq_arg *a)
{
    return PyArray_TYPE(a->arr) == NPY_INT8;
}

static PyObject *
py_dequantize_rows(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* q, scale, zero, x */
    if (zq_count("dequantize_rows", n, 3) < 0 || zq_in(args[0], "q", ZQ_I8 | ZQ_U8, 2, 2, &a[0]) < 0 ||
        zq_in(args[1], "scale", ZQ_F32, 1, 1, &a[1]) < 0 || zq_shape(&a[1], "scale", 1, a[0].dim) < 0 ||
        zq_in_or_none(args[2], "zero_point", ZQ_I32, 1, 1, &a[2]) < 0 ||
        (a[2].arr && zq_shape(&a[2], "zero_point", 1, a[0].dim) < 0) || zq_new(ZQ_F32, 2, a[0].dim, &a[3]) < 0) {
        return fail(4, a);
    }
    Py_BEGIN_ALLOW_THREADS
    zq_dequantize_rows(a[0].data, is_int8(&a[0]), a[0].dim[0], a[0].dim[1], a[1].data, a[2].data, a[3].data);
    Py_END_ALLOW_THREADS
    zq_release(3, a);
    return zq_give(&a[3]);
}

static PyObject *
py_dequantize_static(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* q, scale, zero, x */
    if (zq_count("dequantize_static", n, 3) < 0 || zq_in(args[0], "q", ZQ_I8 | ZQ_U8, 2, 2, &a[0]) < 0 ||
        read_static(args[1], args[2], a[0].dim[1], &a[1], &a[2]) < 0 || zq_new(ZQ_F32, 2, a[0].dim, &a[3]) < 0) {
        return fail(4, a);
    }
    Py_BEGIN_ALLOW_THREADS
    zq_dequantize_static(a[0].data, is_int8(&a[0]), a[0].dim[0], a[0].dim[1], a[1].data, a[2].data, a[1].size, a[3].data);
    Py_END_ALLOW_THREADS
    zq_release(3, a);
    return zq_give(&a[3]);
}

static PyObject *
py_quantize_groups(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* w, codes, scales, zeros */
    int64_t group, bits, symmetric, bad = 0;
    if (zq_count("quantize_groups", n, 4) < 0 || zq_int(args[1], "group", 1, INT64_MAX, &group) < 0 ||
        zq_int(args[2], "bits", 2, 8, &bits) < 0 || zq_int(args[3], "symmetric", 0, 1, &symmetric) < 0 ||
        zq_in(args[0], "w", ZQ_F32, 2, 2, &a[0]) < 0) {
        return NULL;
    }
    group = zq_min(group, zq_max(a[0].dim[1], 1));
    const int64_t dims[2] = {a[0].dim[0], zq_ceil_div(a[0].dim[1], group)};
    if (zq_new(symmetric ? ZQ_I8 : ZQ_U8, 2, a[0].dim, &a[1]) < 0 || zq_new(ZQ_F32, 2, dims, &a[2]) < 0 ||
        (!symmetric && zq_new(ZQ_I32, 2, dims, &a[3]) < 0)) {
        return fail(4, a);
    }
    zq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = zq_quantize_groups(a[0].data, a[0].dim[0], a[0].dim[1], group, (int)bits, (int)symmetric, a[1].data, a[2].data,
                                a[3].data, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check(status, "w", bad) < 0) {
        return fail(4, a);
    }
    zq_release(1, a);
    return zq_give_tuple(3, a + 1);
}

static PyObject *
py_dequantize_groups(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[4] = {{0}}; /* codes, scales, zeros, w */
    int64_t group;
    const int symmetric = n == 4 && args[2] == Py_None;
    if (zq_count("dequantize_groups", n, 4) < 0 || zq_int(args[3], "group", 1, INT64_MAX, &group) < 0 ||
        zq_in(args[0], "codes", symmetric ? ZQ_I8 : ZQ_U8, 2, 2, &a[0]) < 0) {
        return NULL;
    }
    group = zq_min(group, zq_max(a[0].dim[1], 1));
    const int64_t dims[2] = {a[0].dim[0], zq_ceil_div(a[0].dim[1], group)};
    if (zq_in(args[1], "scales", ZQ_F32, 2, 2, &a[1]) < 0 || zq_shape(&a[1], "scales", 2, dims) < 0 ||
        zq_in_or_none(args[2], "zeros", ZQ_I32, 2, 2, &a[2]) < 0 || (a[2].arr && zq_shape(&a[2], "zeros", 2, dims) < 0) ||
        zq_new(ZQ_F32, 2, a[0].dim, &a[3]) < 0) {
        return fail(4, a);
    }
    Py_BEGIN_ALLOW_THREADS
    zq_dequantize_groups(a[0].data, a[0].dim[0], a[0].dim[1], group, symmetric, a[1].data, a[2].data, a[3].data);
    Py_END_ALLOW_THREADS
    zq_release(3, a);
    return zq_give(&a[3]);
}

static PyObject *
py_quantize_row_blocks(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[3] = {{0}}; /* w, codes, scales */
    int64_t blocks, bits, bad = 0;
    if (zq_count("quantize_row_blocks", n, 3) < 0 || zq_int(args[1], "blocks", 1, INT64_MAX, &blocks) < 0 ||
        zq_int(args[2], "bits", 2, 8, &bits) < 0 || zq_in(args[0], "w", ZQ_F32, 2, 2, &a[0]) < 0) {
        return NULL;
    }
    const int64_t rows = a[0].dim[0];
    if (rows % blocks != 0) {
        PyErr_Format(PyExc_ValueError, "blocks: %lld blocks do not divide the %lld rows of w", (long long)blocks,
                     (long long)rows);
        return fail(3, a);
    }
    if (zq_new(ZQ_I8, 2, a[0].dim, &a[1]) < 0 || zq_new(ZQ_F32, 1, &rows, &a[2]) < 0) {
        return fail(3, a);
    }
    zq_status status = ZQ_OK;
    if (rows > 0) {
        Py_BEGIN_ALLOW_THREADS
        status = zq_quantize_row_blocks(a[0].data, rows, a[0].dim[1], blocks, (int)bits, a[1].data, a[2].data, &bad);
        Py_END_ALLOW_THREADS
    }
    if (zq_check(status, "w", bad) < 0) {
        return fail(3, a);
    }
    zq_release(1, a);
    return zq_give_tuple(2, a + 1);
}

/* Rows of (rows, items) or (items,) arrays. */
static int64_t
leading(const zq_arg *a)
{
    return a->ndim == 2 ? a->dim[0] : 1;
}

static PyObject *
py_pack_bits(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[2] = {{0}}; /* codes, packed */
    int64_t bits;
    if (zq_count("pack_bits", n, 2) < 0 || zq_int(args[1], "bits", 2, 8, &bits) < 0 ||
        zq_in(args[0], "codes", ZQ_I8 | ZQ_U8, 1, 2, &a[0]) < 0) {
        return NULL;
    }
    const int64_t items = a[0].dim[a[0].ndim - 1], bytes = zq_ceil_div(items * bits, 8);
    const int64_t dims[2] = {a[0].ndim == 2 ? a[0].dim[0] : bytes, bytes};
    if (zq_new(ZQ_U8, a[0].ndim, dims, &a[1]) < 0) {
        return fail(2, a);
    }
    const zq_kernels *K = zq_active();
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; i < leading(&a[0]); i++) {
        K->pack_bits((const uint8_t *)a[0].data + i * items, items, (int)bits, (uint8_t *)a[1].data + i * bytes);
    }
    Py_END_ALLOW_THREADS
    zq_release(1, a);
    return zq_give(&a[1]);
}

static PyObject *
py_unpack_bits(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[2] = {{0}}; /* packed, codes */
    int64_t items, bits, is_signed;
    if (zq_count("unpack_bits", n, 4) < 0 || zq_int(args[1], "n", 0, INT64_MAX / 16, &items) < 0 ||
        zq_int(args[2], "bits", 2, 8, &bits) < 0 || zq_int(args[3], "signed", 0, 1, &is_signed) < 0 ||
        zq_in(args[0], "packed", ZQ_U8, 1, 2, &a[0]) < 0) {
        return NULL;
    }
    const int64_t bytes = zq_ceil_div(items * bits, 8), rows = leading(&a[0]);
    const int64_t want[2] = {a[0].ndim == 2 ? -1 : bytes, bytes}, dims[2] = {a[0].ndim == 2 ? rows : items, items};
    if (zq_shape(&a[0], "packed", a[0].ndim, want) < 0 || zq_new(is_signed ? ZQ_I8 : ZQ_U8, a[0].ndim, dims, &a[1]) < 0) {
        return fail(2, a);
    }
    const zq_kernels *K = zq_active();
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; i < rows; i++) {
        K->unpack_bits((const uint8_t *)a[0].data + i * bytes, items, (int)bits, (int)is_signed,
                       (uint8_t *)a[1].data + i * items);
    }
    Py_END_ALLOW_THREADS
    zq_release(1, a);
    return zq_give(&a[1]);
}

#define METHOD(name, doc) {#name, FAST(py_##name), METH_FASTCALL, doc}

PyMethodDef zq_methods_quantize[] = {
    METHOD(quantize_tokens, "quantize_tokens(x, mode, padded) -> (q uint8, scale, zero_point); mode 1 symmetric, 2 asymmetric"),
    {"minmax_rows", py_minmax_rows, METH_O, "minmax_rows(x) -> (min(0, min), max(0, max)) of each row"},
    METHOD(quantize_static, "quantize_static(x, scale, zero_point, qmin, qmax, signed) -> q"),
    METHOD(dequantize_rows, "dequantize_rows(q, scale, zero_point | None) -> x"),
    METHOD(dequantize_static, "dequantize_static(q, scale, zero_point) -> x"),
    METHOD(quantize_groups, "quantize_groups(w, group, bits, symmetric) -> (codes, scales, zeros | None)"),
    METHOD(dequantize_groups, "dequantize_groups(codes, scales, zeros | None, group) -> w"),
    METHOD(quantize_row_blocks, "quantize_row_blocks(w, blocks, bits) -> (codes, scales)"),
    METHOD(pack_bits, "pack_bits(codes, bits) -> packed: a dense stream per row, least significant bit first"),
    METHOD(unpack_bits, "unpack_bits(packed, n, bits, signed) -> codes"),
    {NULL, NULL, 0, NULL},
};
