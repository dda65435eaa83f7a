/* Solvers: weights and statistics in, codes and what there is to know about them out. */
#include "args.h"

#include "../algo/gptq.h"
#include "bind.h"
#include "interrupt.h"

#include <math.h>
#include <string.h>

enum { W, HESSIAN, DEVIATION, ORDER, VALUES, BORDERS, GIVEN, CODES, SCALES, ZEROS, LOSS, RTN_LOSS, IS_RTN, ARRAYS };

/* a[i] as a (k, k) matrix of floats or doubles; refused where it is not finite or, if it has to be, not symmetric. */
static int
read_square(PyObject *o, const char *name, int64_t k, int symmetric, zq_arg *a, zq_square *out)
{
    const int64_t dims[2] = {k, k};
    if (zq_in_or_none(o, name, ZQ_F32 | ZQ_F64, 2, 2, a) < 0 || (a->arr && zq_shape(a, name, 2, dims) < 0)) {
        return -1;
    }
    *out = (zq_square){a->data, a->arr && PyArray_TYPE(a->arr) == NPY_FLOAT64};
    if (!a->arr) {
        return 0;
    }
    int64_t row = 0;
    zq_interrupt interrupt;
    zq_begin_interruptible(&interrupt);
    const zq_square_fault fault = zq_square_check(out, k, symmetric, &row, interrupt.asked);
    zq_end_interruptible(&interrupt);
    if (fault == ZQ_SQUARE_STOPPED) {
        return zq_check(ZQ_ESTOPPED, name, 0);
    }
    if (fault != ZQ_SQUARE_OK) {
        static const char *const words[] = {"", "NaN or Inf", "not symmetric", "a negative diagonal element"};
        PyErr_Format(PyExc_ValueError, "%s: %s in row %lld", name, words[fault], (long long)row);
        return -1;
    }
    return 0;
}

/* Every column once. */
static int
read_order(PyObject *o, int64_t k, zq_arg *a, const int64_t **order)
{
    if (zq_in(o, "order", ZQ_I64, 1, 1, a) < 0 || zq_shape(a, "order", 1, &k) < 0) {
        return -1;
    }
    uint8_t *seen = zq_alloc((size_t)k);
    if (!seen) {
        PyErr_NoMemory();
        return -1;
    }
    memset(seen, 0, (size_t)k);
    *order = a->data;
    int once = 1;
    for (int64_t i = 0; once && i < k; i++) {
        const int64_t c = (*order)[i];
        once = c >= 0 && c < k && !seen[c];
        if (once) {
            seen[c] = 1;
        }
    }
    zq_free(seen);
    if (!once) {
        PyErr_SetString(PyExc_ValueError, "order: expected every column once");
        return -1;
    }
    return 0;
}

/* Codes of `bits` bits, or the table of `values`. */
static int
read_grid(PyObject *const *args, zq_arg *a, zq_gptq_task *t)
{
    int64_t bits, symmetric;
    if (zq_int(args[0], "bits", 2, 8, &bits) < 0 || zq_int(args[1], "symmetric", 0, 1, &symmetric) < 0 ||
        zq_in_or_none(args[2], "values", ZQ_F32, 1, 1, &a[VALUES]) < 0 || zq_finite(&a[VALUES], "values") < 0) {
        return -1;
    }
    t->symmetric = (int)symmetric;
    t->grid.qmax = symmetric ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
    t->grid.qmin = symmetric ? -t->grid.qmax : 0;
    if (!a[VALUES].arr) {
        return 0;
    }
    const int64_t borders = a[VALUES].size - 1;
    if (borders < 1 || borders > 255) {
        PyErr_SetString(PyExc_ValueError, "values: expected 2 to 256 of them");
        return -1;
    }
    if (zq_in(args[3], "borders", ZQ_F32, 1, 1, &a[BORDERS]) < 0 || zq_shape(&a[BORDERS], "borders", 1, &borders) < 0 ||
        zq_finite(&a[BORDERS], "borders") < 0) {
        return -1;
    }
    t->grid.values = a[VALUES].data;
    t->grid.borders = a[BORDERS].data;
    t->grid.count = (int)a[VALUES].size;
    for (int64_t i = 0; i < borders; i++) {
        if (!(t->grid.values[i] < t->grid.values[i + 1])) {
            PyErr_SetString(PyExc_ValueError, "values: expected ascending ones");
            return -1;
        }
    }
    return 0;
}

static int
read_options(PyObject *const *args, zq_gptq_task *t)
{
    int64_t dynamic, mse, compare;
    if (zq_int(args[0], "group", 1, INT64_MAX, &t->group) < 0 || zq_int(args[1], "dynamic", 0, 1, &dynamic) < 0 ||
        zq_int(args[2], "mse", 0, 1, &mse) < 0 || zq_int(args[3], "compare", 0, 1, &compare) < 0 ||
        zq_int(args[4], "block", 1, INT64_MAX, &t->block) < 0 || zq_float(args[5], "damping", &t->damping) < 0 ||
        zq_float(args[6], "alpha", &t->alpha) < 0) {
        return -1;
    }
    if (!(t->damping >= 0 && t->damping <= 1e6)) {
        PyErr_SetString(PyExc_ValueError, "damping: expected 0 to 1e6");
        return -1;
    }
    if (!isfinite(t->alpha)) {
        PyErr_SetString(PyExc_ValueError, "alpha: expected a finite number");
        return -1;
    }
    t->group = zq_min(t->group, t->k);
    t->block = zq_min(t->block, t->k);
    t->dynamic = (int)dynamic;
    t->mse = (int)mse;
    t->compare = (int)compare;
    return 0;
}

/* Scales that stay, or None. */
static int
read_scales(PyObject *o, zq_arg *a, zq_gptq_task *t)
{
    const int64_t dims[2] = {t->n, zq_ceil_div(t->k, t->group)};
    if (zq_in_or_none(o, "scales", ZQ_F32, 2, 2, a) < 0 || (a->arr && zq_shape(a, "scales", 2, dims) < 0)) {
        return -1;
    }
    t->scales = a->data;
    if (a->arr && (t->dynamic || t->mse || (!t->symmetric && !t->grid.values))) {
        PyErr_SetString(PyExc_ValueError, "scales: stay as they are, unlike dynamic groups, searched scales and zero points");
        return -1;
    }
    return a->arr ? zq_check_scales(a, "scales") : 0;
}

/* A group that is fitted when it is reached has to be reached at once, and where its number says. */
static int
check_dynamic(const zq_gptq_task *t)
{
    for (int64_t i = 0; t->dynamic && i < t->k; i++) {
        if (t->order[i] / t->group != t->order[i / t->group * t->group] / t->group) {
            PyErr_SetString(PyExc_ValueError, "order: tears a dynamic group apart");
            return -1;
        }
    }
    return 0;
}

static int
new_results(const zq_gptq_task *t, zq_arg *a, zq_gptq_result *r)
{
    const int64_t dims[2] = {t->n, t->k}, groups[2] = {t->n, zq_ceil_div(t->k, t->group)};
    if (zq_new(t->symmetric && !t->grid.values ? ZQ_I8 : ZQ_U8, 2, dims, &a[CODES]) < 0 ||
        zq_new(ZQ_F32, 2, groups, &a[SCALES]) < 0 || zq_new(ZQ_I32, 2, groups, &a[ZEROS]) < 0 ||
        zq_new(ZQ_F64, 1, &t->n, &a[LOSS]) < 0 || zq_new(ZQ_F64, 1, &t->n, &a[RTN_LOSS]) < 0 ||
        zq_new(ZQ_BOOL, 1, &t->n, &a[IS_RTN]) < 0) {
        return -1;
    }
    *r = (zq_gptq_result){.codes = a[CODES].data, .scales = a[SCALES].data, .zeros = a[ZEROS].data, .loss = a[LOSS].data,
                          .rtn_loss = a[RTN_LOSS].data, .is_rtn = a[IS_RTN].data};
    for (int64_t i = 0; i < t->n; i++) {
        r->rtn_loss[i] = NAN;
    }
    return 0;
}

static PyObject *
py_gptq(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    zq_arg a[ARRAYS] = {{0}};
    zq_gptq_task t = {0};
    zq_gptq_result r;
    int64_t bad = 0;
    if (zq_count("gptq", n, 16) < 0 || zq_in(args[0], "w", ZQ_F32, 2, 2, &a[W]) < 0) {
        return NULL;
    }
    t.w = a[W].data;
    t.n = a[W].dim[0];
    t.k = a[W].dim[1];
    if (t.k < 1 || t.k > 1 << 24) {
        PyErr_SetString(PyExc_ValueError, "w: expected 1 to 2^24 columns");
    }
    else if (args[1] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "hessian: expected a NumPy array of float32 or float64, got NoneType");
    }
    if (PyErr_Occurred() || read_square(args[1], "hessian", t.k, 1, &a[HESSIAN], &t.hessian) < 0 ||
        read_square(args[2], "deviation", t.k, 0, &a[DEVIATION], &t.deviation) < 0 ||
        read_order(args[3], t.k, &a[ORDER], &t.order) < 0 || read_grid(args + 4, a, &t) < 0 || read_options(args + 8, &t) < 0 ||
        check_dynamic(&t) < 0 || read_scales(args[15], &a[GIVEN], &t) < 0 || new_results(&t, a, &r) < 0) {
        zq_release(ARRAYS, a);
        return NULL;
    }
    zq_interrupt interrupt;
    zq_begin_interruptible(&interrupt);
    t.stop = interrupt.asked;
    const zq_status status = zq_gptq(&t, &r, &bad);
    zq_end_interruptible(&interrupt);
    if (status != ZQ_ERANGE && zq_check(status, "w", bad) < 0) {
        zq_release(ARRAYS, a);
        return NULL;
    }
    zq_release(CODES, a);
    if (status == ZQ_ERANGE) { /* no factor */
        zq_release(ARRAYS, a);
        Py_RETURN_NONE;
    }
    PyObject *arrays = zq_give_tuple(ARRAYS - CODES, a + CODES);
    return arrays ? Py_BuildValue("(NdLL)", arrays, r.damping, (long long)r.rank, (long long)r.dead) : NULL;
}

PyMethodDef zq_methods_algo[] = {
    {"gptq", FAST(py_gptq), METH_FASTCALL,
     "gptq(w, hessian, deviation, order, bits, symmetric, values, borders, group, dynamic, mse, compare, block, damping,"
     " alpha, scales) -> ((codes, scales, zeros, loss, rtn_loss, is_rtn), damping, rank, dead), or None without a factor"},
    {NULL, NULL, 0, NULL},
};
