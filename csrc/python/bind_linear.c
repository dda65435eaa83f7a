/* Packed weights and products. A packed weight is a capsule "zquant.linear" that owns a zq_linear: read-only from its first
 * product on, and then safe to use from many threads; linear_input, _correct and _outliers come before that. */
#include "args.h"

#include "../zq_kernels.h"
#include "bind.h"

#include <string.h>

static const char LINEAR[] = "zquant.linear";

static void
free_linear(PyObject *capsule)
{
    zq_linear *w = PyCapsule_GetPointer(capsule, LINEAR);
    zq_linear_free(w);
    zq_free(w);
}

/* A packed weight as a capsule, or the exception for `status`. Takes what *w owns. */
static PyObject *
give_linear(zq_linear *w, zq_status status)
{
    if (zq_check(status, "codes", 0) < 0) {
        return NULL;
    }
    zq_linear *heap = zq_alloc(sizeof *heap);
    PyObject *capsule = NULL;
    if (heap) {
        *heap = *w;
        capsule = PyCapsule_New(heap, LINEAR, free_linear);
    }
    else {
        PyErr_NoMemory();
    }
    if (!capsule) {
        zq_linear_free(w);
        zq_free(heap);
    }
    return capsule;
}

/* (n,) bias or None */
static int
parse_bias(PyObject *o, int64_t n, zq_arg *bias)
{
    if (zq_in_or_none(o, "bias", ZQ_F32, 1, 1, bias) < 0) {
        return -1;
    }
    return bias->arr && zq_shape(bias, "bias", 1, &n) < 0 ? -1 : zq_finite(bias, "bias");
}

static PyObject *
py_pack_f32(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { W, BIAS, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    if (zq_count("linear_pack_f32", nargs, N) < 0 || zq_in(args[W], "w", ZQ_F32, 2, 2, &a[W]) < 0 ||
        zq_finite(&a[W], "w") < 0 || parse_bias(args[BIAS], a[W].dim[0], &a[BIAS]) < 0) {
        goto cleanup;
    }
    zq_linear w;
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_linear_pack_f32(&w, a[W].data, a[W].dim[0], a[W].dim[1], a[BIAS].data);
    Py_END_ALLOW_THREADS
    result = give_linear(&w, s);
cleanup:
    zq_release(N, a);
    return result;
}

/* Whether products over k input features are exact. */
static int
check_exact(int64_t k)
{
    if (k > ZQ_MAX_K) {
        PyErr_Format(PyExc_ValueError, "codes: %lld input features, int32 accumulation is exact up to %d", (long long)k,
                     ZQ_MAX_K);
        return -1;
    }
    return 0;
}

static PyObject *
py_pack_s8(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { CODES, SCALE, BIAS, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    if (zq_count("linear_pack_s8", nargs, N) < 0 || zq_in(args[CODES], "codes", ZQ_I8, 2, 2, &a[CODES]) < 0 ||
        zq_in(args[SCALE], "scale", ZQ_F32, 1, 1, &a[SCALE]) < 0 || zq_shape(&a[SCALE], "scale", 1, a[CODES].dim) < 0 ||
        zq_finite(&a[SCALE], "scale") < 0 || parse_bias(args[BIAS], a[CODES].dim[0], &a[BIAS]) < 0) {
        goto cleanup;
    }
    if (check_exact(a[CODES].dim[1]) < 0) {
        goto cleanup;
    }
    zq_linear w;
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_linear_pack_s8(&w, a[CODES].data, a[SCALE].data, a[CODES].dim[0], a[CODES].dim[1], a[BIAS].data);
    Py_END_ALLOW_THREADS
    if (s == ZQ_ERANGE) {
        PyErr_SetString(PyExc_ValueError, "codes: -128 is not allowed, symmetric int8 codes lie in -127..127");
        goto cleanup;
    }
    result = give_linear(&w, s);
cleanup:
    zq_release(N, a);
    return result;
}

/* Group size and bits of linear_pack_group, checked against the shape of codes and scales. */
static int
parse_group(PyObject *group_arg, PyObject *bits_arg, const zq_arg *codes, const zq_arg *scales, int64_t *group, int64_t *bits)
{
    const int64_t k = codes->dim[1];
    if (zq_int(group_arg, "group", 1, INT64_MAX, group) < 0 || zq_int(bits_arg, "bits", 1, 8, bits) < 0) {
        return -1;
    }
    if (*bits != 4 && *bits != 8) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4 or 8, got %lld", (long long)*bits);
        return -1;
    }
    if (*group < k && *group % ZQ_KSTEP != 0) {
        PyErr_Format(PyExc_ValueError, "group: expected a multiple of %d or at least %lld, got %lld", ZQ_KSTEP, (long long)k,
                     (long long)*group);
        return -1;
    }
    if (check_exact(k) < 0) {
        return -1;
    }
    const int64_t want[2] = {codes->dim[0], zq_ceil_div(k, zq_min(*group, zq_max(k, 1)))};
    return zq_shape(scales, "scales", 2, want);
}

static PyObject *
py_pack_group(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { CODES, SCALES, GROUP, BITS, BIAS, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t group, bits;
    if (zq_count("linear_pack_group", nargs, N) < 0 || zq_in(args[CODES], "codes", ZQ_I8, 2, 2, &a[CODES]) < 0 ||
        zq_in(args[SCALES], "scales", ZQ_F32, 2, 2, &a[SCALES]) < 0 ||
        parse_group(args[GROUP], args[BITS], &a[CODES], &a[SCALES], &group, &bits) < 0 ||
        zq_finite(&a[SCALES], "scales") < 0 || parse_bias(args[BIAS], a[CODES].dim[0], &a[BIAS]) < 0) {
        goto cleanup;
    }
    zq_linear w;
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_linear_pack_group(&w, a[CODES].data, a[SCALES].data, a[CODES].dim[0], a[CODES].dim[1], group, (int)bits,
                             a[BIAS].data);
    Py_END_ALLOW_THREADS
    if (s == ZQ_ERANGE) {
        PyErr_Format(PyExc_ValueError, "codes: outside %s", bits == 4 ? "-8..7" : "-127..127");
        goto cleanup;
    }
    result = give_linear(&w, s);
cleanup:
    zq_release(N, a);
    return result;
}

/* (k,) finite float32, or None */
static int
parse_features(PyObject *o, const char *name, int64_t k, zq_arg *a)
{
    return o == Py_None ? 0 : zq_read_vector(o, name, k, a);
}

static PyObject *
py_input(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { HANDLE, SCALE, ZERO, FACTOR, SHIFT, NARGS };
    zq_arg a[2] = {{0}};
    PyObject *result = NULL;
    int64_t zero = 0;
    float scale = 0.0f;
    if (zq_count("linear_input", nargs, NARGS) < 0) {
        return NULL;
    }
    zq_linear *w = PyCapsule_GetPointer(args[HANDLE], LINEAR);
    if (!w || (args[SCALE] != Py_None && zq_read_scale(args[SCALE], &scale) < 0) ||
        zq_int(args[ZERO], "zero", 0, 255, &zero) < 0 || parse_features(args[FACTOR], "factor", w->k, &a[0]) < 0 ||
        parse_features(args[SHIFT], "shift", w->k, &a[1]) < 0) {
        goto cleanup;
    }
    if (a[1].arr && !a[0].arr) {
        PyErr_SetString(PyExc_ValueError, "shift: needs a factor");
        goto cleanup;
    }
    if (zq_check(zq_linear_input(w, scale, (int32_t)zero, a[0].data, a[1].data), "factor", 0) == 0) {
        result = Py_NewRef(Py_None);
    }
cleanup:
    zq_release(2, a);
    return result;
}

/* A handle that nobody uses yet and that has no extras; NULL with an exception else. */
static zq_linear *
fresh_handle(PyObject *handle)
{
    zq_linear *w = PyCapsule_GetPointer(handle, LINEAR);
    if (w && w->extras) {
        PyErr_SetString(PyExc_ValueError, "handle: it has a correction or outliers already");
        return NULL;
    }
    return w;
}

static PyObject *
py_correct(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { HANDLE, U, V, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    zq_linear *w;
    if (zq_count("linear_correct", nargs, N) < 0 || !(w = fresh_handle(args[HANDLE])) ||
        zq_in(args[U], "u", ZQ_F32, 2, 2, &a[U]) < 0 || zq_in(args[V], "v", ZQ_F32, 2, 2, &a[V]) < 0) {
        goto cleanup;
    }
    const int64_t rank = a[V].dim[0], u[2] = {w->n, rank}, v[2] = {zq_max(rank, 1), w->k};
    if (zq_shape(&a[U], "u", 2, u) < 0 || zq_shape(&a[V], "v", 2, v) < 0 || zq_finite(&a[U], "u") < 0 ||
        zq_finite(&a[V], "v") < 0) {
        goto cleanup;
    }
    if (zq_check(zq_linear_correct(w, a[U].data, a[V].data, rank), "u", 0) == 0) { /* with the GIL: one thread alone sets it */
        result = Py_NewRef(Py_None);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_outliers(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { HANDLE, THRESHOLD, COLUMNS, WEIGHTS, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    zq_linear *w;
    double threshold;
    if (zq_count("linear_outliers", nargs, N) < 0 || !(w = fresh_handle(args[HANDLE])) ||
        zq_float(args[THRESHOLD], "threshold", &threshold) < 0 ||
        zq_in(args[COLUMNS], "columns", ZQ_I64, 1, 1, &a[COLUMNS]) < 0 ||
        zq_in(args[WEIGHTS], "weights", ZQ_F32, 2, 2, &a[WEIGHTS]) < 0) {
        goto cleanup;
    }
    const int64_t count = a[COLUMNS].dim[0], shape[2] = {w->n, count}, *columns = a[COLUMNS].data;
    if (!(threshold > 0)) {
        PyErr_Format(PyExc_ValueError, "threshold: expected more than 0, got %S", args[THRESHOLD]);
        goto cleanup;
    }
    if (zq_shape(&a[WEIGHTS], "weights", 2, shape) < 0 || zq_finite(&a[WEIGHTS], "weights") < 0) {
        goto cleanup;
    }
    if (w->kind != ZQ_W_S8) {
        PyErr_SetString(PyExc_ValueError, "handle: outliers need int8 weights with one scale per channel");
        goto cleanup;
    }
    for (int64_t i = 0; i < count; i++) {
        if (columns[i] < (i ? columns[i - 1] + 1 : 0) || columns[i] >= w->k) {
            PyErr_Format(PyExc_ValueError, "columns: expected ascending indices below %lld, got %lld at index %lld",
                         (long long)w->k, (long long)columns[i], (long long)i);
            goto cleanup;
        }
    }
    if (zq_check(zq_linear_set_outliers(w, (float)threshold, columns, a[WEIGHTS].data, count), "weights", 0) == 0) {
        result = Py_NewRef(Py_None);
    }
cleanup:
    zq_release(N, a);
    return result;
}

/* ---- activations in and out, shared by the forward wrappers ------------------------------------------ */

/* Codes whose rows may be read to a multiple of ZQ_KSTEP without a copy: arrays that zq_new_strided made, and those of zq_new
 * whose rows are of whole steps. */
static int
is_padded(PyObject *o)
{
    if (!PyArray_Check(o)) {
        return 0;
    }
    PyArrayObject *q = (PyArrayObject *)o;
    return PyArray_NDIM(q) == 2 && PyArray_TYPE(q) == NPY_UINT8 && PyArray_STRIDE(q, 1) == 1 &&
           PyArray_STRIDE(q, 0) >= zq_round_up(PyArray_DIM(q, 1), ZQ_KSTEP) && zq_owns_core_memory(q);
}

/* A padded copy of any (m, k) uint8 array. */
static int
pad_codes(PyObject *o, zq_arg *out)
{
    zq_arg q;
    if (zq_in(o, "q", ZQ_U8, 2, 2, &q) < 0) {
        return -1;
    }
    const int64_t m = q.dim[0], k = q.dim[1], ld = zq_row_pitch(k);
    const int failed = zq_new_strided(ZQ_U8, m, k, ld, out);
    for (int64_t r = 0; !failed && r < m; r++) {
        uint8_t *row = (uint8_t *)out->data + r * ld;
        memcpy(row, (const uint8_t *)q.data + r * k, (size_t)k);
        memset(row + k, 0, (size_t)(ld - k));
    }
    zq_release(1, &q);
    return failed;
}

/* The tuple (q, scale, zero) as zq_rows; three arguments to release. */
static int
parse_codes(PyObject *tuple, zq_arg a[3], zq_rows *x)
{
    if (PyTuple_Size(tuple) != 3) {
        PyErr_SetString(PyExc_TypeError, "x: expected float32 rows or a tuple (q, scale, zero)");
        return -1;
    }
    PyObject *q = PyTuple_GetItem(tuple, 0);
    if (is_padded(q)) {
        Py_INCREF(q);
        PyArrayObject *arr = (PyArrayObject *)q;
        a[0] = (zq_arg){.arr = arr, .data = PyArray_DATA(arr), .ndim = 2,
                        .dim = {PyArray_DIM(arr, 0), PyArray_DIM(arr, 1), 1, 1}};
    }
    else if (pad_codes(q, &a[0]) < 0) {
        return -1;
    }
    const int64_t m = a[0].dim[0];
    if (zq_in(PyTuple_GetItem(tuple, 1), "scale", ZQ_F32, 1, 1, &a[1]) < 0 || zq_shape(&a[1], "scale", 1, &m) < 0 ||
        zq_in(PyTuple_GetItem(tuple, 2), "zero", ZQ_I32, 1, 1, &a[2]) < 0 || zq_shape(&a[2], "zero", 1, &m) < 0) {
        return -1;
    }
    const int32_t *zero = a[2].data;
    for (int64_t i = 0; i < m; i++) {
        if (zero[i] < 0 || zero[i] > 255) {
            PyErr_Format(PyExc_ValueError, "zero: expected 0 to 255, got %d in row %lld", (int)zero[i], (long long)i);
            return -1;
        }
    }
    x->u8 = a[0].data;
    x->ld_u8 = PyArray_STRIDE(a[0].arr, 0);
    x->scale = a[1].data;
    x->zero = a[2].data;
    return 0;
}

/* x of linear_forward: float32 rows, or codes when the weights are integer. Sets m. */
static int
parse_rows(const zq_linear *w, PyObject *o, int64_t quant, zq_arg a[3], zq_rows *x, int64_t *m)
{
    if (PyTuple_Check(o)) {
        if (w->kind == ZQ_W_F32) {
            PyErr_SetString(PyExc_TypeError, "x: float32 weights take float32 rows, not codes");
            return -1;
        }
        if (zq_linear_splits(w)) {
            PyErr_SetString(PyExc_TypeError, "x: a weight with outliers takes float32 rows, not codes");
            return -1;
        }
        if (w->in_factor) {
            PyErr_SetString(PyExc_TypeError, "x: a layer with a factor on its input takes float32 rows, not codes");
            return -1;
        }
        if (parse_codes(o, a, x) < 0) {
            return -1;
        }
    }
    else {
        if (zq_in(o, "x", ZQ_F32, 2, 2, &a[0]) < 0) {
            return -1;
        }
        x->f32 = a[0].data;
        x->ld_f32 = a[0].dim[1];
        x->quant = w->kind == ZQ_W_F32 ? ZQ_QUANT_NONE : (zq_quant)quant;
        if (zq_linear_splits(w) && quant != ZQ_QUANT_TOKEN_SYM && quant != ZQ_QUANT_TOKEN_ASYM) {
            PyErr_SetString(PyExc_ValueError, "quant_in: a weight with outliers needs 1 (symmetric) or 2 (asymmetric)");
            return -1;
        }
        if (w->kind != ZQ_W_F32 && quant == ZQ_QUANT_NONE) {
            PyErr_SetString(PyExc_ValueError,
                            "quant_in: integer weights need 1 (symmetric), 2 (asymmetric), 3 (int16), 4 (static), 5 or 6 "
                            "(per tensor) for float32 rows");
            return -1;
        }
        if (w->kind != ZQ_W_F32 && quant == ZQ_QUANT_STATIC && !(w->in_scale > 0)) {
            PyErr_SetString(PyExc_ValueError, "quant_in: 4 (static) needs the scale of the input: linear_input");
            return -1;
        }
    }
    *m = a[0].dim[0];
    if (a[0].dim[1] != w->k) {
        PyErr_Format(PyExc_ValueError, "x: expected %lld features, got %lld", (long long)w->k, (long long)a[0].dim[1]);
        return -1;
    }
    return 0;
}

/* New (q, scale, zero) arrays for m rows of n codes. */
static int
new_codes(int64_t m, int64_t n, zq_arg a[3], zq_out *out)
{
    if (zq_new_codes(m, n, a) < 0) {
        return -1;
    }
    out->q = a[0].data;
    out->ld_q = PyArray_STRIDE(a[0].arr, 0);
    out->q_scale = a[1].data;
    out->q_zero = a[2].data;
    return 0;
}

/* quant_out of linear_forward: 0, 1, 2, or a tuple (scale, zero) of one value or n: static. */
static int
parse_quant_out(PyObject *o, int64_t n, zq_arg a[2], zq_out *out)
{
    if (!PyTuple_Check(o)) {
        int64_t quant;
        if (zq_int(o, "quant_out", 0, ZQ_QUANT_TOKEN_ASYM, &quant) < 0) {
            return -1;
        }
        out->quant = (zq_quant)quant;
        return 0;
    }
    if (PyTuple_Size(o) != 2) {
        PyErr_SetString(PyExc_TypeError, "quant_out: expected 0, 1, 2 or a tuple (scale, zero)");
        return -1;
    }
    if (zq_in(PyTuple_GetItem(o, 0), "scale", ZQ_F32, 1, 1, &a[0]) < 0 || zq_finite(&a[0], "scale") < 0 ||
        zq_in(PyTuple_GetItem(o, 1), "zero", ZQ_I32, 1, 1, &a[1]) < 0 || zq_shape(&a[1], "zero", 1, a[0].dim) < 0) {
        return -1;
    }
    const int64_t count = a[0].dim[0];
    if (count != 1 && count != n) {
        PyErr_Format(PyExc_ValueError, "scale: expected 1 or %lld values, got %lld", (long long)n, (long long)count);
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const int32_t zero = ((const int32_t *)a[1].data)[i];
        if (!(((const float *)a[0].data)[i] > 0) || zero < 0 || zero > 255) {
            PyErr_Format(PyExc_ValueError, "scale, zero: expected a positive scale and a zero of 0 to 255 at index %lld",
                         (long long)i);
            return -1;
        }
    }
    out->quant = ZQ_QUANT_STATIC;
    out->static_scale = a[0].data;
    out->static_zero = a[1].data;
    out->static_count = count;
    return 0;
}

/* Other Python threads run meanwhile, except during products so short (some 20 us with vector kernels, where Python
 * switches threads every 5 ms) that giving up the lock and taking it again shows in their time. */
static zq_status
forward_unlocked(const zq_linear *w, const zq_rows *x, int64_t m, const zq_out *out, int64_t *bad_row)
{
    enum { SHORT_PRODUCTS = 8 << 20 };
    if ((double)m * (double)w->n * (double)w->k <= SHORT_PRODUCTS) {
        return zq_linear_forward(w, x, m, out, bad_row);
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_linear_forward(w, x, m, out, bad_row);
    Py_END_ALLOW_THREADS
    return s;
}

static PyObject *
py_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { HANDLE, X, QUANT_IN, ACT, RESIDUAL, QUANT_OUT, NARGS };
    enum { IN = 0, RES = 3, Y = 4, OUT = 5, STATIC = 8, N = 10 };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t quant_in, act, m;
    if (zq_count("linear_forward", nargs, NARGS) < 0) {
        return NULL;
    }
    const zq_linear *w = PyCapsule_GetPointer(args[HANDLE], LINEAR);
    if (!w || zq_int(args[QUANT_IN], "quant_in", 0, ZQ_QUANT_TENSOR_ASYM, &quant_in) < 0 ||
        zq_int(args[ACT], "act", 0, ZQ_ACTS - 1, &act) < 0) {
        return NULL;
    }
    zq_rows x = {0};
    zq_out out = {.act = (zq_activation)act, .ld_residual = w->n, .ld_y = w->n};
    if (parse_quant_out(args[QUANT_OUT], w->n, &a[STATIC], &out) < 0 ||
        parse_rows(w, args[X], quant_in, &a[IN], &x, &m) < 0 ||
        zq_in_or_none(args[RESIDUAL], "residual", ZQ_F32, 2, 2, &a[RES]) < 0) {
        goto cleanup;
    }
    const int64_t shape[2] = {m, w->n};
    if ((a[RES].arr && zq_shape(&a[RES], "residual", 2, shape) < 0) ||
        (out.quant ? new_codes(m, w->n, &a[OUT], &out) : zq_new(ZQ_F32, 2, shape, &a[Y])) < 0) {
        goto cleanup;
    }
    out.residual = a[RES].data;
    out.y = a[Y].data;
    int64_t bad_row = 0;
    const zq_status s = forward_unlocked(w, &x, m, &out, &bad_row);
    const zq_arg inputs[2] = {x.f32 ? a[IN] : (zq_arg){0}, a[RES]};
    if (zq_check_inputs(s, 2, inputs, (const char *const[]){"x", "residual"}, bad_row) == 0) {
        result = out.quant == ZQ_QUANT_NONE     ? zq_give(&a[Y])
                 : out.quant == ZQ_QUANT_STATIC ? zq_give(&a[OUT])
                                                : zq_give_tuple(3, &a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_bytes(PyObject *self, PyObject *handle)
{
    (void)self;
    const zq_linear *w = PyCapsule_GetPointer(handle, LINEAR);
    return w ? PyLong_FromLongLong(zq_linear_bytes(w)) : NULL;
}

/* For C code that holds a handle's zq_linear and includes zq.h: tests/bench/calls.c. */
static PyObject *
py_forward_c(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyCapsule_New((void *)zq_linear_forward, "zquant.linear_forward", NULL);
}

/* a (m, k) int8 or uint8 as padded uint8 rows; int8 codes move up by 128 and so does the zero point, which then is a code. */
static int
shifted_rows(const zq_arg *a, const zq_arg *zero, zq_arg *rows, zq_arg *zeros)
{
    const int64_t m = a->dim[0], k = a->dim[1], ld = zq_row_pitch(k);
    if (zq_new_strided(ZQ_U8, m, k, ld, rows) < 0 || zq_new(ZQ_I32, 1, &m, zeros) < 0) {
        return -1;
    }
    const int shift = PyArray_TYPE(a->arr) == NPY_INT8 ? 128 : 0;
    for (int64_t r = 0; r < m; r++) {
        const uint8_t *in = (const uint8_t *)a->data + r * k;
        uint8_t *out = (uint8_t *)rows->data + r * ld;
        for (int64_t i = 0; i < k; i++) {
            out[i] = (uint8_t)(in[i] + shift);
        }
        memset(out + k, 0, (size_t)(ld - k));
        const int64_t z = shift + (zero->arr ? (int64_t)((const int32_t *)zero->data)[r] : 0);
        if (z < 0 || z > 255) {
            PyErr_Format(PyExc_ValueError, "zero: expected %d to %d, got %lld in row %lld", -shift, 255 - shift,
                         (long long)z - shift, (long long)r);
            return -1;
        }
        ((int32_t *)zeros->data)[r] = (int32_t)z;
    }
    return 0;
}

static PyObject *
py_gemm_s32(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { A, HANDLE, ZERO, ROWS, ZEROS, C, N };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    if (zq_count("gemm_s32", nargs, 3) < 0) {
        return NULL;
    }
    const zq_linear *w = PyCapsule_GetPointer(args[HANDLE], LINEAR);
    if (!w || zq_in(args[A], "a", ZQ_U8 | ZQ_I8, 2, 2, &a[A]) < 0 ||
        zq_in_or_none(args[ZERO], "zero", ZQ_I32, 1, 1, &a[ZERO]) < 0) {
        goto cleanup;
    }
    const int64_t m = a[A].dim[0], shape[2] = {m, w->n};
    if (w->kind != ZQ_W_S8 || a[A].dim[1] != w->k) {
        PyErr_Format(PyExc_ValueError, "a: expected %lld features of an int8 packed weight, got %lld", (long long)w->k,
                     (long long)a[A].dim[1]);
        goto cleanup;
    }
    if ((a[ZERO].arr && zq_shape(&a[ZERO], "zero", 1, &m) < 0) || shifted_rows(&a[A], &a[ZERO], &a[ROWS], &a[ZEROS]) < 0 ||
        zq_new(ZQ_I32, 2, shape, &a[C]) < 0) {
        goto cleanup;
    }
    Py_BEGIN_ALLOW_THREADS
    zq_gemm_u8s8_s32(w, a[ROWS].data, PyArray_STRIDE(a[ROWS].arr, 0), a[ZEROS].data, m, a[C].data);
    Py_END_ALLOW_THREADS
    result = zq_give(&a[C]);
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_check_finite(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    zq_arg x = {0};
    PyObject *name = NULL;
    if (zq_count("check_finite", nargs, 2) < 0 || !(name = PyUnicode_AsUTF8String(args[1])) ||
        zq_in(args[0], PyBytes_AsString(name), ZQ_F32, 0, 4, &x) < 0) {
        Py_XDECREF(name);
        return NULL;
    }
    const int bad = zq_finite(&x, PyBytes_AsString(name));
    zq_release(1, &x);
    Py_DECREF(name);
    return bad ? NULL : Py_NewRef(args[0]);
}

PyMethodDef zq_methods_linear[] = {
    {"linear_pack_f32", FAST(py_pack_f32), METH_FASTCALL, "linear_pack_f32(w, bias) -> handle"},
    {"linear_pack_s8", FAST(py_pack_s8), METH_FASTCALL, "linear_pack_s8(codes, scale, bias) -> handle"},
    {"linear_pack_group", FAST(py_pack_group), METH_FASTCALL, "linear_pack_group(codes, scales, group, bits, bias) -> handle"},
    {"linear_input", FAST(py_input), METH_FASTCALL,
     "linear_input(handle, scale | None, zero, factor | None, shift | None): before the handle is first used"},
    {"linear_correct", FAST(py_correct), METH_FASTCALL,
     "linear_correct(handle, u, v): add (x v^T) u^T before the activation; for a new handle"},
    {"linear_outliers", FAST(py_outliers), METH_FASTCALL,
     "linear_outliers(handle, threshold, columns, weights): columns of x that reach the threshold are not quantized; for a "
     "new handle"},
    {"linear_forward", FAST(py_forward), METH_FASTCALL,
     "linear_forward(handle, x, quant_in, act, residual, quant_out) -> y or (q, scale, zero), "
     "or q when quant_out is (scale, zero)"},
    {"linear_bytes", py_bytes, METH_O, "linear_bytes(handle) -> bytes of packed weights"},
    {"linear_forward_c", py_forward_c, METH_NOARGS, "linear_forward_c() -> capsule of the C function zq_linear_forward"},
    {"gemm_s32", FAST(py_gemm_s32), METH_FASTCALL, "gemm_s32(a, handle, zero) -> int32 (m, n)"},
    {"check_finite", FAST(py_check_finite), METH_FASTCALL,
     "check_finite(x, name) -> x; ValueError that names the first bad row"},
    {NULL, NULL, 0, NULL},
};
