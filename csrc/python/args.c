/* See args.h. */
#include "args.h"

#include "../zq_kernels.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

static const struct {
    int code, num;
    const char *name;
} types[] = {
    {ZQ_F32, NPY_FLOAT32, "float32"}, {ZQ_I8, NPY_INT8, "int8"},    {ZQ_U8, NPY_UINT8, "uint8"},
    {ZQ_I32, NPY_INT32, "int32"},     {ZQ_I64, NPY_INT64, "int64"}, {ZQ_BOOL, NPY_BOOL, "bool"},
    {ZQ_F64, NPY_FLOAT64, "float64"},
};
enum { TYPES = sizeof types / sizeof *types };

static int
type_num(int code)
{
    for (int i = 0; i < TYPES; i++) {
        if (types[i].code == code) {
            return types[i].num;
        }
    }
    return -1;
}

/* "float32", "int8 or uint8" */
static const char *
type_names(int codes, char *buf, size_t n)
{
    buf[0] = 0;
    for (int i = 0; i < TYPES; i++) {
        if (codes & types[i].code) {
            if (buf[0]) {
                strncat(buf, " or ", n - strlen(buf) - 1);
            }
            strncat(buf, types[i].name, n - strlen(buf) - 1);
        }
    }
    return buf;
}

/* The type code of an array: byte order is not part of it. 0 when it is none of ours. */
static int
type_code(PyArrayObject *a)
{
    const int num = PyArray_TYPE(a);
    for (int i = 0; i < TYPES; i++) { /* the usual numbers first: asking NumPy takes longer than a small product */
        if (num == types[i].num) {
            return types[i].code;
        }
    }
    for (int i = 0; i < TYPES; i++) {
        if (PyArray_EquivTypenums(num, types[i].num)) {
            return types[i].code;
        }
    }
    return 0;
}

static void
fill_arg(zq_arg *out, PyArrayObject *a)
{
    out->arr = a;
    out->data = PyArray_DATA(a);
    out->ndim = PyArray_NDIM(a);
    out->size = PyArray_SIZE(a);
    for (int i = 0; i < 4; i++) {
        out->dim[i] = i < out->ndim ? (int64_t)PyArray_DIM(a, i) : 1;
    }
}

static int
wrong_type(PyObject *o, const char *name, int codes)
{
    char buf[64];
    if (!PyArray_Check(o)) {
        PyObject *type = PyObject_GetAttrString((PyObject *)Py_TYPE(o), "__name__");
        if (type) {
            PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array of %s, got %U", name,
                         type_names(codes, buf, sizeof buf), type);
            Py_DECREF(type);
        }
        return -1;
    }
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %S", name, type_names(codes, buf, sizeof buf),
                 (PyObject *)PyArray_DESCR((PyArrayObject *)o));
    return -1;
}

int
zq_in(PyObject *o, const char *name, int codes, int min_ndim, int max_ndim, zq_arg *out)
{
    memset(out, 0, sizeof *out);
    if (!PyArray_Check(o)) {
        return wrong_type(o, name, codes);
    }
    PyArrayObject *a = (PyArrayObject *)o;
    const int code = type_code(a);
    if (!(code & codes)) {
        return wrong_type(o, name, codes);
    }
    const int ndim = PyArray_NDIM(a);
    if (ndim < min_ndim || ndim > max_ndim || ndim > 4) {
        if (min_ndim == max_ndim) {
            PyErr_Format(PyExc_ValueError, "%s: expected %d dimension%s, got %d", name, min_ndim, min_ndim == 1 ? "" : "s",
                         ndim);
        }
        else {
            PyErr_Format(PyExc_ValueError, "%s: expected %d to %d dimensions, got %d", name, min_ndim, max_ndim, ndim);
        }
        return -1;
    }
    PyArrayObject *good = a;
    if (PyArray_CheckExact(o) && PyArray_TYPE(a) == type_num(code) && PyArray_ISCARRAY_RO(a)) {
        Py_INCREF(o);
    }
    else {
        good = (PyArrayObject *)PyArray_FROMANY(o, type_num(code), 0, 0,
                                                NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED);
        if (!good) {
            return -1;
        }
    }
    fill_arg(out, good);
    return 0;
}

int
zq_in_or_none(PyObject *o, const char *name, int codes, int min_ndim, int max_ndim, zq_arg *out)
{
    if (o == Py_None) {
        memset(out, 0, sizeof *out);
        return 0;
    }
    return zq_in(o, name, codes, min_ndim, max_ndim, out);
}

/* "(3, 4)", "(5,)" into buf; -1 prints as "any". */
static void
print_shape(int ndim, const int64_t *dims, char *buf, size_t n)
{
    size_t at = (size_t)snprintf(buf, n, "(");
    for (int i = 0; i < ndim && at < n; i++) {
        const char *sep = i ? ", " : "";
        at += dims[i] < 0 ? (size_t)snprintf(buf + at, n - at, "%sany", sep)
                          : (size_t)snprintf(buf + at, n - at, "%s%lld", sep, (long long)dims[i]);
    }
    if (at < n) {
        snprintf(buf + at, n - at, ndim == 1 ? ",)" : ")");
    }
}

int
zq_shape(const zq_arg *a, const char *name, int ndim, const int64_t *dims)
{
    int same = a->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) {
        same = dims[i] < 0 || dims[i] == a->dim[i];
    }
    if (!same) {
        char want[128], got[128];
        print_shape(ndim, dims, want, sizeof want);
        print_shape(a->ndim, a->dim, got, sizeof got);
        PyErr_Format(PyExc_ValueError, "%s: expected shape %s, got %s", name, want, got);
        return -1;
    }
    return 0;
}

static const char MEMORY[] = "zquant.memory";

static void
free_capsule(PyObject *capsule)
{
    zq_free(PyCapsule_GetPointer(capsule, MEMORY));
}

int
zq_owns_core_memory(PyArrayObject *a)
{
    PyObject *base = PyArray_BASE(a);
    if (!base || !PyCapsule_CheckExact(base)) {
        return 0;
    }
    const void *p = PyCapsule_GetPointer(base, MEMORY);
    if (!p) { /* somebody else's */
        PyErr_Clear();
    }
    return p == PyArray_DATA(a);
}

/* An array over `bytes` bytes of the core's allocator, which keeps big blocks for the next call. */
static int
new_on_core_memory(int type, int ndim, npy_intp *dims, npy_intp *strides, int64_t bytes, zq_arg *out)
{
    void *p = zq_alloc((size_t)zq_max(bytes, 1));
    if (!p) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject *base = PyCapsule_New(p, MEMORY, free_capsule);
    if (!base) {
        zq_free(p);
        return -1;
    }
    PyArrayObject *a = (PyArrayObject *)PyArray_New(&PyArray_Type, ndim, dims, type_num(type), strides, p, 0,
                                                    NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED | NPY_ARRAY_C_CONTIGUOUS, NULL);
    if (!a) {
        Py_DECREF(base);
        return -1;
    }
    if (PyArray_SetBaseObject(a, base) < 0) { /* steals base, also on failure */
        Py_DECREF(a);
        return -1;
    }
    fill_arg(out, a);
    return 0;
}

static int64_t
item_bytes(int type)
{
    return type == ZQ_F32 || type == ZQ_I32 ? 4 : type == ZQ_I64 || type == ZQ_F64 ? 8 : 1;
}

int
zq_new(int type, int ndim, const int64_t *dims, zq_arg *out)
{
    npy_intp d[4];
    int64_t bytes = item_bytes(type);
    for (int i = 0; i < ndim; i++) {
        d[i] = (npy_intp)dims[i];
        bytes *= dims[i];
    }
    memset(out, 0, sizeof *out);
    if (bytes >= ZQ_CORE_MEMORY_BYTES) {
        return new_on_core_memory(type, ndim, d, NULL, bytes, out);
    }
    PyArrayObject *a = (PyArrayObject *)PyArray_SimpleNew(ndim, d, type_num(type));
    if (!a) {
        return -1;
    }
    fill_arg(out, a);
    return 0;
}

int
zq_new_strided(int type, int64_t rows, int64_t cols, int64_t ld, zq_arg *out)
{
    memset(out, 0, sizeof *out);
    const int64_t item = item_bytes(type);
    npy_intp dims[2] = {(npy_intp)rows, (npy_intp)cols}, strides[2] = {(npy_intp)(ld * item), (npy_intp)item};
    return new_on_core_memory(type, 2, dims, strides, zq_max(rows, 1) * ld * item, out);
}

int
zq_finite(const zq_arg *a, const char *name)
{
    if (!a->arr || a->size == 0) {
        return 0;
    }
    const int64_t cols = a->ndim ? a->dim[a->ndim - 1] : 1, rows = a->size / cols;
    int64_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    const zq_kernels *K = zq_active();
    for (int64_t r = 0; r < rows && bad < 0; r++) {
        if (!isfinite(K->absmax_f32((const float *)a->data + r * cols, cols))) {
            bad = r;
        }
    }
    Py_END_ALLOW_THREADS
    return bad < 0 ? 0 : zq_check(ZQ_ENONFINITE, name, bad);
}

int
zq_check_scales(const zq_arg *a, const char *name)
{
    const float *v = a->data;
    for (int64_t i = 0; i < a->size; i++) {
        if (!(v[i] >= FLT_MIN && v[i] <= FLT_MAX)) {
            PyErr_Format(PyExc_ValueError, "%s: expected normal numbers above 0, got another in row %lld", name,
                         (long long)(i / a->dim[1]));
            return -1;
        }
    }
    return 0;
}

void
zq_release(int n, zq_arg *args)
{
    for (int i = 0; i < n; i++) {
        Py_CLEAR(args[i].arr);
    }
}

PyObject *
zq_give(zq_arg *a)
{
    PyObject *o = (PyObject *)a->arr;
    a->arr = NULL;
    return o;
}

int
zq_int(PyObject *o, const char *name, int64_t lo, int64_t hi, int64_t *out)
{
    PyObject *index = PyLong_CheckExact(o) ? Py_NewRef(o) : PyNumber_Index(o);
    if (!index) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "%s: expected an integer", name);
        }
        return -1;
    }
    const long long v = PyLong_AsLongLong(index);
    Py_DECREF(index);
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: out of range", name);
        return -1;
    }
    if (v < lo || v > hi) {
        if (hi == INT64_MAX) {
            PyErr_Format(PyExc_ValueError, "%s: expected at least %lld, got %lld", name, (long long)lo, v);
        }
        else {
            PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, got %lld", name, (long long)lo, (long long)hi, v);
        }
        return -1;
    }
    *out = v;
    return 0;
}

int
zq_float(PyObject *o, const char *name, double *out)
{
    *out = PyFloat_AsDouble(o);
    if (*out == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected a number", name);
        return -1;
    }
    return 0;
}

int
zq_count(const char *function, Py_ssize_t got, Py_ssize_t want)
{
    if (got != want) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, want, got);
        return -1;
    }
    return 0;
}

void *
zq_enter(PyObject *o, const char *kind, const char *name, const char *maker)
{
    if (!PyCapsule_IsValid(o, kind)) {
        PyErr_Format(PyExc_TypeError, "%s: expected what %s returned", name, maker);
        return NULL;
    }
    atomic_flag *busy = PyCapsule_GetPointer(o, kind);
    if (atomic_flag_test_and_set(busy)) {
        PyErr_Format(PyExc_RuntimeError, "%s: another call is using it", name);
        return NULL;
    }
    return busy;
}

void
zq_leave(void *claimed)
{
    if (claimed) {
        atomic_flag_clear((atomic_flag *)claimed);
    }
}

int
zq_check(zq_status status, const char *what, int64_t bad_row)
{
    switch (status) {
    case ZQ_OK: return 0;
    case ZQ_ENOMEM: PyErr_NoMemory(); return -1;
    case ZQ_ENONFINITE:
        PyErr_Format(PyExc_ValueError, "%s: NaN or Inf in row %lld", what, (long long)bad_row);
        return -1;
    case ZQ_ERANGE:
        PyErr_Format(PyExc_ValueError, "%s: value out of range", what);
        return -1;
    case ZQ_ESTOPPED: /* who stopped it set the exception, unless threads were lost */
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_RuntimeError, "%s: not finished, as a signal handler forked and this is the child", what);
        }
        return -1;
    }
    PyErr_Format(PyExc_SystemError, "%s: unknown status %d", what, (int)status);
    return -1;
}

int
zq_new_codes(int64_t m, int64_t n, zq_arg a[3])
{
    return zq_new_strided(ZQ_U8, m, n, zq_row_pitch(n), &a[0]) < 0 || zq_new(ZQ_F32, 1, &m, &a[1]) < 0 ||
                   zq_new(ZQ_I32, 1, &m, &a[2]) < 0
               ? -1
               : 0;
}

PyObject *
zq_give_tuple(int n, zq_arg *args)
{
    PyObject *t = PyTuple_New(n);
    for (int i = 0; t && i < n; i++) {
        PyTuple_SetItem(t, i, args[i].arr ? zq_give(&args[i]) : Py_NewRef(Py_None));
    }
    zq_release(n, args);
    return t;
}

/* ---- arguments that several operators have ------------------------------------------------------------ */

int
zq_new_rows(int64_t m, int64_t n, int want_y, int64_t quant, zq_arg a[4], zq_rows_out *out)
{
    const int64_t shape[2] = {m, n};
    *out = (zq_rows_out){.quant = (zq_quant)quant};
    if ((want_y && zq_new(ZQ_F32, 2, shape, &a[0]) < 0) || (quant != ZQ_QUANT_NONE && zq_new_codes(m, n, &a[1]) < 0)) {
        return -1;
    }
    out->y = a[0].data;
    if (quant != ZQ_QUANT_NONE) {
        out->q = a[1].data;
        out->ld_q = PyArray_STRIDE(a[1].arr, 0);
        out->q_scale = a[2].data;
        out->q_zero = a[3].data;
    }
    return 0;
}

PyObject *
zq_give_rows(int64_t quant, zq_arg a[4])
{
    return quant == ZQ_QUANT_NONE ? zq_give(&a[0]) : zq_give_tuple(3, &a[1]);
}

int
zq_check_inputs(zq_status status, int inputs, const zq_arg *a, const char *const *names, int64_t bad_row)
{
    for (int i = 0; status == ZQ_ENONFINITE && i < inputs; i++) {
        if (zq_finite(&a[i], names[i]) < 0) {
            return -1;
        }
    }
    if (status == ZQ_ENONFINITE) {
        PyErr_Format(PyExc_ValueError, "%s: finite, but the result overflows float32 in row %lld", names[0],
                     (long long)bad_row);
        return -1;
    }
    return zq_check(status, names[0], bad_row);
}

int
zq_read_quant(PyObject *o, int64_t *quant)
{
    return zq_int(o, "quant", ZQ_QUANT_NONE, ZQ_QUANT_TOKEN_ASYM, quant);
}

int
zq_read_eps(PyObject *o, float *eps)
{
    double e;
    if (zq_float(o, "eps", &e) < 0) {
        return -1;
    }
    if (!(e >= 0 && e <= 1e30)) {
        PyErr_SetString(PyExc_ValueError, "eps: expected a finite number >= 0");
        return -1;
    }
    *eps = (float)e;
    return 0;
}

int
zq_read_scale(PyObject *o, float *scale)
{
    double s;
    if (zq_float(o, "scale", &s) < 0) {
        return -1;
    }
    *scale = (float)s;
    if (!(*scale > 0) || !isfinite(*scale)) {
        PyErr_SetString(PyExc_ValueError, "scale: expected a finite number > 0");
        return -1;
    }
    return 0;
}

int
zq_read_vector(PyObject *o, const char *name, int64_t n, zq_arg *a)
{
    return zq_in(o, name, ZQ_F32, 1, 1, a) < 0 || zq_shape(a, name, 1, &n) < 0 ? -1 : zq_finite(a, name);
}

int
zq_read_offsets(PyObject *o, int64_t rows, zq_arg *a)
{
    if (zq_in(o, "offsets", ZQ_I64, 1, 1, a) < 0) {
        return -1;
    }
    const int64_t *off = a->data, n = a->size;
    int good = n >= 1 && off[0] == 0 && off[n - 1] == rows;
    for (int64_t i = 1; good && i < n; i++) {
        good = off[i] >= off[i - 1];
    }
    if (!good) {
        PyErr_Format(PyExc_ValueError, "offsets: expected 0 = offsets[0] <= offsets[1] <= ... <= offsets[-1] = %lld",
                     (long long)rows);
        return -1;
    }
    return 0;
}
