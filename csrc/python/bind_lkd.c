/* Training of a block: a capsule "zquant.lkd" that owns it. One call at a time may use it, which a flag enforces. The arrays of
 * lkd_tensor are views of the block's memory and keep the capsule alive. */
#include "args.h"

#include "../algo/lkd.h"
#include "bind.h"
#include "interrupt.h"

#include <stdatomic.h>
#include <string.h>

static const char LKD[] = "zquant.lkd";

typedef struct {
    atomic_flag busy; /* first: see zq_enter */
    zq_lkd *b;
} holder;

static void
free_holder(holder *h)
{
    zq_lkd_free(h->b);
    zq_free(h);
}

static void
free_block(PyObject *capsule)
{
    free_holder(PyCapsule_GetPointer(capsule, LKD));
}

/* The block behind the capsule, claimed for this call; give it back with zq_leave. */
static holder *
enter(PyObject *o)
{
    return zq_enter(o, LKD, "block", "lkd_new");
}

/* ---- shape ------------------------------------------------------------------------------------------ */

enum { D, HEADS, KV_HEADS, HEAD_DIM, FF, ORDER, RMS, ACT, GATED, CAUSAL, WINDOW, QK_NORM, INTERLEAVED, SIZES };
enum { BITS, GROUP, ROWS, QUANT = ROWS + ZQ_LKD_PARTS, HAS_BIAS, SPEC_ITEMS };

static int
in_range(int64_t v, const char *name, int64_t lo, int64_t hi)
{
    if (v < lo || v > hi) {
        PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, got %lld", name, (long long)lo, (long long)hi, (long long)v);
        return 0;
    }
    return 1;
}

static int
read_sizes(const int64_t *v, zq_lkd_shape *s)
{
    static const struct {
        const char *name;
        int64_t lo, hi;
    } limits[SIZES] = {{"width", 1, ZQ_MAX_K}, {"heads", 1, 4096}, {"kv_heads", 1, 4096}, {"head_dim", 1, 4096},
                       {"inner", 1, ZQ_MAX_K}, {"order", 0, ZQ_LKD_ORDERS - 1}, {"norm", 0, 1},
                       {"activation", ZQ_ACT_RELU, ZQ_ACTS - 1}, {"gated", 0, 1}, {"causal", 0, 1}, {"window", 0, 1 << 30},
                       {"qk_norm", 0, 1}, {"interleaved", 0, 1}};
    for (int i = 0; i < SIZES; i++) {
        if (!in_range(v[i], limits[i].name, limits[i].lo, limits[i].hi)) {
            return -1;
        }
    }
    *s = (zq_lkd_shape){.d = v[D], .heads = v[HEADS], .kv_heads = v[KV_HEADS], .head_dim = v[HEAD_DIM], .ff = v[FF],
                        .order = (zq_lkd_order)v[ORDER], .rms = (int)v[RMS], .act = (zq_activation)v[ACT],
                        .gated = (int)v[GATED], .causal = (int)v[CAUSAL], .window = v[WINDOW],
                        .qk_norm = (int)v[QK_NORM], .interleaved = (int)v[INTERLEAVED]};
    if (v[HEADS] % v[KV_HEADS] || v[HEADS] * v[HEAD_DIM] > ZQ_MAX_K) {
        PyErr_SetString(PyExc_ValueError, v[HEADS] % v[KV_HEADS] ? "kv_heads: expected a divisor of heads"
                                                                 : "heads: too many features");
        return -1;
    }
    return 0;
}

/* Both tables (positions, half), or None twice. */
static int
read_tables(PyObject *const *args, zq_arg a[2], zq_lkd_shape *s)
{
    if (args[0] == Py_None && args[1] == Py_None) {
        return 0;
    }
    if (zq_in(args[0], "cos", ZQ_F32, 2, 2, &a[0]) < 0 || zq_in(args[1], "sin", ZQ_F32, 2, 2, &a[1]) < 0 ||
        zq_shape(&a[1], "sin", 2, a[0].dim) < 0 || zq_finite(&a[0], "cos") < 0 || zq_finite(&a[1], "sin") < 0) {
        return -1;
    }
    if (a[0].dim[1] < 1 || 2 * a[0].dim[1] > s->head_dim) {
        PyErr_SetString(PyExc_ValueError, "cos: expected 1 to head_dim / 2 columns");
        return -1;
    }
    s->positions = a[0].dim[0];
    s->half = a[0].dim[1];
    s->cos = a[0].data;
    s->sin = a[1].data;
    return 0;
}

/* Rows per scale in each part of a layer: see zq_lkd_spec. */
static int
read_row_blocks(const int64_t *rows, const char *name, const int64_t parts[ZQ_LKD_PARTS], int whole_rows, zq_lkd_spec *spec)
{
    const int count = rows[1] || rows[2] ? ZQ_LKD_PARTS : 1;
    const int64_t all = parts[0] + parts[1] + parts[2];
    if (count > 1 && parts[1] == 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected one number of rows in a block, got three", name);
        return -1;
    }
    for (int p = 0; p < count; p++) {
        if (rows[p] < 1 || (count == 1 ? all : parts[p]) % rows[p] || (rows[p] > 1 && !whole_rows)) {
            PyErr_Format(PyExc_ValueError, "%s: blocks of %lld rows need whole rows and a multiple of so many", name,
                         (long long)rows[p]);
            return -1;
        }
        spec->rows[p] = rows[p];
    }
    return 0;
}

/* A layer of k inputs; rows of q, k and v, or all rows, 0 and 0. */
static int
read_spec(const int64_t *v, const char *name, const int64_t parts[ZQ_LKD_PARTS], int64_t k, zq_lkd_spec *spec)
{
    if (v[BITS] != 0 && !in_range(v[BITS], "bits", 2, 8)) {
        return -1;
    }
    if (v[GROUP] < 1 || (v[GROUP] < k && v[GROUP] % 8)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a group that is a multiple of 8, or all %lld inputs", name, (long long)k);
        return -1;
    }
    if (!in_range(v[QUANT], "activations", ZQ_QUANT_NONE, ZQ_QUANT_TOKEN_ASYM)) {
        return -1;
    }
    if (v[QUANT] && !v[BITS]) {
        PyErr_Format(PyExc_ValueError, "%s: quantized activations need a quantized weight", name);
        return -1;
    }
    *spec = (zq_lkd_spec){.bits = (int)v[BITS], .group = zq_min(v[GROUP], k), .act = (zq_quant)v[QUANT]};
    return read_row_blocks(v + ROWS, name, parts, v[GROUP] >= k, spec);
}

static int
read_specs(PyObject *o, zq_arg *a, zq_lkd_shape *s)
{
    static const char *const names[ZQ_LKD_LINEARS] = {"qkv", "o", "gate", "up", "down"};
    const int64_t dims[2] = {ZQ_LKD_LINEARS, SPEC_ITEMS}, q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    const int64_t parts[][ZQ_LKD_PARTS] = {{q, kv, kv}, {s->d}, {s->ff}, {s->ff}, {s->d}};
    const int64_t k[] = {s->d, q, s->d, s->d, s->ff};
    if (zq_in(o, "linears", ZQ_I64, 2, 2, a) < 0 || zq_shape(a, "linears", 2, dims) < 0) {
        return -1;
    }
    for (int i = 0; i < ZQ_LKD_LINEARS; i++) {
        const int64_t *v = (const int64_t *)a->data + i * SPEC_ITEMS;
        if (read_spec(v, names[i], parts[i], k[i], &s->spec[i]) < 0) {
            return -1;
        }
        s->has_bias[i] = v[HAS_BIAS] != 0;
    }
    if (s->gated && s->spec[ZQ_LKD_GATE].act != s->spec[ZQ_LKD_UP].act) {
        PyErr_SetString(PyExc_ValueError, "gate: reads what up reads, expected the same activations");
        return -1;
    }
    return 0;
}

/* A capsule that owns b. */
static PyObject *
give_block(zq_lkd *b)
{
    holder *h = zq_alloc(sizeof *h);
    if (!h) {
        zq_lkd_free(b);
        return PyErr_NoMemory();
    }
    h->b = b;
    atomic_flag_clear(&h->busy);
    PyObject *capsule = PyCapsule_New(h, LKD, free_block);
    if (!capsule) {
        free_holder(h);
    }
    return capsule;
}

static PyObject *
py_new(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    enum { A_SIZES, SCALE, EPS, COS, SIN, LINEARS, N };
    zq_arg a[N] = {{0}};
    zq_lkd_shape s;
    zq_lkd *b = NULL;
    float scale, eps;
    const int64_t sizes = SIZES;
    int ok = zq_count("lkd_new", n, N) == 0 && zq_in(args[A_SIZES], "sizes", ZQ_I64, 1, 1, &a[A_SIZES]) == 0 &&
             zq_shape(&a[A_SIZES], "sizes", 1, &sizes) == 0 && read_sizes(a[A_SIZES].data, &s) == 0 &&
             zq_read_scale(args[SCALE], &scale) == 0 && zq_read_eps(args[EPS], &eps) == 0 &&
             read_tables(args + COS, &a[COS], &s) == 0 && read_specs(args[LINEARS], &a[LINEARS], &s) == 0;
    if (ok) {
        s.scale = scale;
        s.eps = eps;
        ok = zq_check(zq_lkd_new(&s, &b), "block", 0) == 0;
    }
    zq_release(N, a);
    return ok ? give_block(b) : NULL;
}

/* ---- tensors ---------------------------------------------------------------------------------------- */

static PyObject *
py_bytes(PyObject *self, PyObject *arg)
{
    (void)self;
    holder *h = enter(arg);
    PyObject *result = h ? PyLong_FromLongLong(zq_lkd_bytes(h->b)) : NULL;
    zq_leave(h);
    return result;
}

static PyObject *
py_tensor(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    int64_t kind, tensor, dims[2];
    if (zq_count("lkd_tensor", n, 3) < 0 || zq_int(args[1], "kind", 0, ZQ_LKD_KINDS - 1, &kind) < 0 ||
        zq_int(args[2], "tensor", 0, ZQ_LKD_TENSORS - 1, &tensor) < 0) {
        return NULL;
    }
    holder *h = enter(args[0]);
    if (!h) {
        return NULL;
    }
    float *p = zq_lkd_tensor(h->b, (zq_lkd_kind)kind, (int)tensor, dims);
    zq_leave(h);
    if (!p) {
        Py_RETURN_NONE;
    }
    npy_intp shape[2] = {(npy_intp)dims[0], (npy_intp)dims[1]};
    const int vector = dims[0] == 0;
    PyObject *a = PyArray_New(&PyArray_Type, 2 - vector, shape + vector, NPY_FLOAT32, NULL, p, 0, NPY_ARRAY_CARRAY, NULL);
    if (a && PyArray_SetBaseObject((PyArrayObject *)a, Py_NewRef(args[0])) < 0) {
        Py_CLEAR(a);
    }
    return a;
}

static PyObject *
py_codes(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    int64_t linear, dims[2], bad_row = 0;
    const int8_t *codes;
    const float *scales;
    zq_arg a[2] = {{0}};
    if (zq_count("lkd_codes", n, 2) < 0 || zq_int(args[1], "linear", 0, ZQ_LKD_LINEARS - 1, &linear) < 0) {
        return NULL;
    }
    holder *h = enter(args[0]);
    if (!h) {
        return NULL;
    }
    const int64_t groups = zq_lkd_groups(h->b, (int)linear);
    zq_lkd_tensor(h->b, ZQ_LKD_VALUE, (int)linear, dims);
    const int64_t scale_dims[2] = {dims[0], groups};
    const zq_status status = zq_lkd_codes(h->b, (int)linear, &codes, &scales, &bad_row);
    int ok = zq_check(status, "weight", bad_row) == 0;
    if (ok && codes && zq_new(ZQ_I8, 2, dims, &a[0]) == 0 && zq_new(ZQ_F32, 2, scale_dims, &a[1]) == 0) {
        memcpy(a[0].data, codes, (size_t)a[0].size);
        memcpy(a[1].data, scales, (size_t)a[1].size * sizeof *scales);
    }
    zq_leave(h);
    if (!ok || PyErr_Occurred()) {
        zq_release(2, a);
        return NULL;
    }
    return codes ? zq_give_tuple(2, a) : Py_NewRef(Py_None);
}

static PyObject *
py_fix_scales(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    int64_t linear, dims[2], bad_row = 0;
    const int8_t *codes;
    const float *scales;
    zq_arg a = {0};
    if (zq_count("lkd_fix_scales", n, 3) < 0 || zq_int(args[1], "linear", 0, ZQ_LKD_LINEARS - 1, &linear) < 0 ||
        zq_in(args[2], "scales", ZQ_F32, 2, 2, &a) < 0) {
        return NULL;
    }
    holder *h = enter(args[0]);
    const zq_status status = h ? zq_lkd_codes(h->b, (int)linear, &codes, &scales, &bad_row) : ZQ_OK;
    int ok = h && zq_check(status, "weight", bad_row) == 0;
    if (ok && !codes) {
        PyErr_SetString(PyExc_ValueError, "scales: that weight is in float32");
        ok = 0;
    }
    if (ok) {
        zq_lkd_tensor(h->b, ZQ_LKD_VALUE, (int)linear, dims);
        dims[1] = zq_lkd_groups(h->b, (int)linear);
        ok = zq_shape(&a, "scales", 2, dims) == 0 && zq_check_scales(&a, "scales") == 0;
    }
    if (ok) {
        zq_lkd_fix_scales(h->b, (int)linear, a.data);
    }
    zq_leave(h);
    zq_release(1, &a);
    return ok ? Py_NewRef(Py_None) : NULL;
}

static PyObject *
py_steps(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    int64_t steps = -1;
    if (zq_count("lkd_steps", n, 2) < 0 || (args[1] != Py_None && zq_int(args[1], "steps", 0, INT64_MAX / 2, &steps) < 0)) {
        return NULL;
    }
    holder *h = enter(args[0]);
    if (!h) {
        return NULL;
    }
    int64_t *const count = zq_lkd_steps(h->b);
    *count = steps >= 0 ? steps : *count;
    steps = *count;
    zq_leave(h);
    return PyLong_FromLongLong(steps);
}

/* ---- computation ------------------------------------------------------------------------------------ */

/* x (tokens, d) and its offsets, finite; positions that the rotary tables have. */
static int
read_batch(const zq_lkd *b, PyObject *const *args, zq_arg a[2], zq_lkd_batch *batch)
{
    const int64_t dims[2] = {-1, zq_lkd_width(b)}, positions = zq_lkd_positions(b);
    if (zq_in(args[0], "x", ZQ_F32, 2, 2, &a[0]) < 0 || zq_shape(&a[0], "x", 2, dims) < 0 || zq_finite(&a[0], "x") < 0 ||
        zq_read_offsets(args[1], a[0].dim[0], &a[1]) < 0) {
        return -1;
    }
    const int64_t *offsets = a[1].data;
    *batch = (zq_lkd_batch){.x = a[0].data, .offsets = offsets, .sequences = a[1].size - 1};
    for (int64_t s = 0; positions && s < batch->sequences; s++) {
        if (offsets[s + 1] - offsets[s] > positions) {
            PyErr_Format(PyExc_ValueError, "offsets: sequence %lld is longer than the %lld positions of cos", (long long)s,
                         (long long)positions);
            return -1;
        }
    }
    if (a[0].dim[0] == 0) {
        PyErr_SetString(PyExc_ValueError, "x: expected at least one row");
        return -1;
    }
    return 0;
}

static int
read_like(PyObject *o, const char *name, const zq_arg *x, zq_arg *a)
{
    return zq_in(o, name, ZQ_F32, 2, 2, a) < 0 || zq_shape(a, name, 2, x->dim) < 0 ? -1 : zq_finite(a, name);
}

/* One computation: a step where there are options, gradients where there is dy, else the output. */
typedef struct {
    const zq_lkd_options *options;
    const float *target, *dy;
    float *out; /* y, or the gradient by x */
    double loss;
} task;

static zq_status
perform(zq_lkd *b, const zq_lkd_batch *batch, task *t, zq_lkd_fault *fault, int64_t *bad_row)
{
    if (t->options) {
        return zq_lkd_step(b, batch, t->target, t->options, &t->loss, fault, bad_row);
    }
    return t->dy ? zq_lkd_gradients(b, batch, t->dy, t->out, fault, bad_row) : zq_lkd_forward(b, batch, t->out, fault, bad_row);
}

static int
compute(zq_lkd *b, zq_lkd_batch *batch, task *t)
{
    zq_lkd_fault fault;
    int64_t bad_row = 0;
    zq_interrupt interrupt;
    zq_begin_interruptible(&interrupt);
    batch->stop = interrupt.asked;
    const zq_status status = perform(b, batch, t, &fault, &bad_row);
    zq_end_interruptible(&interrupt);
    if (status == ZQ_ENONFINITE && fault == ZQ_LKD_IN_RESULT) {
        PyErr_SetString(PyExc_ValueError, "x: finite, but something that the block makes of it is not: are all parameters?");
        return -1;
    }
    return zq_check(status, status == ZQ_ESTOPPED ? "block" : "weight", bad_row);
}

/* forward(block, x, offsets), or gradients(block, x, offsets, dy) */
static PyObject *
rows_like_x(const char *name, PyObject *const *args, Py_ssize_t n, int gradients)
{
    enum { X, OFFSETS, DY, OUT, N };
    zq_arg a[N] = {{0}};
    zq_lkd_batch batch;
    holder *h = zq_count(name, n, 3 + gradients) < 0 ? NULL : enter(args[0]);
    int ok = h && read_batch(h->b, args + 1, a, &batch) == 0 &&
             (!gradients || read_like(args[3], "dy", &a[X], &a[DY]) == 0) && zq_new(ZQ_F32, 2, a[X].dim, &a[OUT]) == 0;
    ok = ok && compute(h->b, &batch, &(task){.dy = a[DY].data, .out = a[OUT].data}) == 0;
    zq_leave(h);
    zq_release(ok ? OUT : N, a);
    return ok ? zq_give(&a[OUT]) : NULL;
}

static PyObject *
py_forward(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    return rows_like_x("lkd_forward", args, n, 0);
}

static PyObject *
py_gradients(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    return rows_like_x("lkd_gradients", args, n, 1);
}

static int
read_options(PyObject *const *args, zq_lkd_options *o)
{
    const struct {
        const char *name;
        double *value, hi;
    } list[] = {{"lr", &o->lr, 1e6}, {"beta1", &o->beta1, 0.9999999}, {"beta2", &o->beta2, 0.9999999}, {"eps", &o->eps, 1e6},
                {"decay", &o->decay, 1e6}, {"kl", &o->kl, 1e30}};
    for (int i = 0; i < (int)(sizeof list / sizeof *list); i++) {
        if (zq_float(args[i], list[i].name, list[i].value) < 0) {
            return -1;
        }
        if (!(*list[i].value >= 0 && *list[i].value <= list[i].hi)) {
            PyErr_Format(PyExc_ValueError, "%s: expected a number from 0 to %s", list[i].name,
                         list[i].hi < 1 ? "0.9999999" : list[i].hi > 1e6 ? "1e30" : "1e6");
            return -1;
        }
    }
    if (!((float)o->eps > 0)) { /* a parameter without a gradient divides by it */
        PyErr_SetString(PyExc_ValueError, "eps: expected a number above 0");
        return -1;
    }
    return 0;
}

static PyObject *
py_step(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)self;
    enum { X, OFFSETS, TARGET, N };
    zq_arg a[N] = {{0}};
    zq_lkd_batch batch;
    zq_lkd_options o;
    task t = {.options = &o};
    holder *h = zq_count("lkd_step", n, 10) < 0 ? NULL : enter(args[0]);
    int ok = h && read_batch(h->b, args + 1, a, &batch) == 0 && read_like(args[3], "target", &a[X], &a[TARGET]) == 0 &&
             read_options(args + 4, &o) == 0;
    t.target = a[TARGET].data;
    ok = ok && compute(h->b, &batch, &t) == 0;
    zq_leave(h);
    zq_release(N, a);
    return ok ? PyFloat_FromDouble(t.loss) : NULL;
}

PyMethodDef zq_methods_lkd[] = {
    {"lkd_new", FAST(py_new), METH_FASTCALL, "lkd_new(sizes, scale, eps, cos, sin, linears) -> block, whose tensors are 0"},
    {"lkd_bytes", py_bytes, METH_O, "lkd_bytes(block) -> memory that it holds"},
    {"lkd_tensor", FAST(py_tensor), METH_FASTCALL,
     "lkd_tensor(block, kind, tensor) -> a view of values (0), gradients (1) or AdamW's moments (2, 3); or None"},
    {"lkd_codes", FAST(py_codes), METH_FASTCALL, "lkd_codes(block, linear) -> (codes, scales) of the weight, or None"},
    {"lkd_fix_scales", FAST(py_fix_scales), METH_FASTCALL, "lkd_fix_scales(block, linear, scales): of a weight, from now on"},
    {"lkd_steps", FAST(py_steps), METH_FASTCALL, "lkd_steps(block, steps or None) -> AdamW's step count, after it was set"},
    {"lkd_forward", FAST(py_forward), METH_FASTCALL, "lkd_forward(block, x, offsets) -> y"},
    {"lkd_gradients", FAST(py_gradients), METH_FASTCALL,
     "lkd_gradients(block, x, offsets, dy) -> dx; those of the parameters are in lkd_tensor"},
    {"lkd_step", FAST(py_step), METH_FASTCALL,
     "lkd_step(block, x, offsets, target, lr, beta1, beta2, eps, decay, kl) -> the loss before the step"},
    {NULL, NULL, 0, NULL},
};
