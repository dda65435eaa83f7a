/* Transformer operators on rows, and attention. Each wrapper: read the arguments, make the outputs, call the core
 * without the GIL, name the array that was bad. */
#include "args.h"

#include "../zq_kernels.h"
#include "bind.h"

#include <math.h>

/* float32 of the same shape as x, or None where that is allowed. */
static int
read_like(PyObject *o, const char *name, int optional, const zq_arg *x, zq_arg *a)
{
    if ((optional ? zq_in_or_none : zq_in)(o, name, ZQ_F32, 2, 2, a) < 0) {
        return -1;
    }
    return a->arr ? zq_shape(a, name, 2, x->dim) : 0;
}

/* What a norm quantizes its rows to, and whether the float32 rows are wanted too: the optional last argument asks for the codes
 * alone. */
static int
read_norm_out(PyObject *const *args, Py_ssize_t nargs, int at, int64_t *quant, int *want_y)
{
    int64_t codes_only = 0;
    if (zq_read_quant(args[at], quant) < 0 || (nargs > at + 1 && zq_int(args[at + 1], "codes_only", 0, 1, &codes_only) < 0)) {
        return -1;
    }
    *want_y = !codes_only || *quant == ZQ_QUANT_NONE;
    return 0;
}

/* (y | None, codes | None) */
static PyObject *
give_both(zq_arg a[4])
{
    PyObject *codes = a[1].arr ? zq_give_tuple(3, &a[1]) : Py_NewRef(Py_None);
    if (!codes) {
        return NULL;
    }
    PyObject *both = PyTuple_Pack(2, a[0].arr ? (PyObject *)a[0].arr : Py_None, codes);
    Py_DECREF(codes);
    return both;
}

static PyObject *
py_layer_norm(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { X, RESIDUAL, GAMMA, BETA, EPS, QUANT, NARGS, OUT = 4, N = 8 };
    static const char *const names[] = {"x", "residual"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    float eps;
    int want_y;
    int64_t quant, bad = 0;
    zq_rows_out out;
    if (zq_count("layer_norm", nargs > NARGS ? nargs - 1 : nargs, NARGS) < 0 || zq_read_eps(args[EPS], &eps) < 0 ||
        read_norm_out(args, nargs, QUANT, &quant, &want_y) < 0 || zq_in(args[X], "x", ZQ_F32, 2, 2, &a[X]) < 0 ||
        read_like(args[RESIDUAL], "residual", 1, &a[X], &a[RESIDUAL]) < 0 ||
        zq_read_vector(args[GAMMA], "weight", a[X].dim[1], &a[GAMMA]) < 0 ||
        zq_read_vector(args[BETA], "bias", a[X].dim[1], &a[BETA]) < 0 ||
        zq_new_rows(a[X].dim[0], a[X].dim[1], want_y, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_layernorm(a[X].data, a[RESIDUAL].data, a[GAMMA].data, a[BETA].data, a[X].dim[0], a[X].dim[1], eps, &out, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 2, a, names, bad) == 0) {
        result = give_both(&a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_rms_norm(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { X, RESIDUAL, GAMMA, EPS, QUANT, NARGS, OUT = 3, N = 7 };
    static const char *const names[] = {"x", "residual"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    float eps;
    int want_y;
    int64_t quant, bad = 0;
    zq_rows_out out;
    if (zq_count("rms_norm", nargs > NARGS ? nargs - 1 : nargs, NARGS) < 0 || zq_read_eps(args[EPS], &eps) < 0 ||
        read_norm_out(args, nargs, QUANT, &quant, &want_y) < 0 || zq_in(args[X], "x", ZQ_F32, 2, 2, &a[X]) < 0 ||
        read_like(args[RESIDUAL], "residual", 1, &a[X], &a[RESIDUAL]) < 0 ||
        zq_read_vector(args[GAMMA], "weight", a[X].dim[1], &a[GAMMA]) < 0 ||
        zq_new_rows(a[X].dim[0], a[X].dim[1], want_y, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_rmsnorm(a[X].data, a[RESIDUAL].data, a[GAMMA].data, a[X].dim[0], a[X].dim[1], eps, &out, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 2, a, names, bad) == 0) {
        result = give_both(&a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_activation(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { X, ACT, QUANT, NARGS, OUT = 1, N = 5 };
    static const char *const names[] = {"x"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t act, quant, bad = 0;
    zq_rows_out out;
    if (zq_count("activation", nargs, NARGS) < 0 || zq_int(args[ACT], "act", 0, ZQ_ACTS - 1, &act) < 0 ||
        zq_read_quant(args[QUANT], &quant) < 0 || zq_in(args[X], "x", ZQ_F32, 2, 2, &a[X]) < 0 ||
        zq_new_rows(a[X].dim[0], a[X].dim[1], quant == ZQ_QUANT_NONE, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_activate(a[X].data, a[X].dim[0], a[X].dim[1], (zq_activation)act, &out, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 1, a, names, bad) == 0) {
        result = zq_give_rows(quant, &a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_gated(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { GATE, UP, ACT, QUANT, NARGS, OUT = 2, N = 6 };
    static const char *const names[] = {"gate", "up"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t act, quant, bad = 0;
    zq_rows_out out;
    if (zq_count("gated", nargs, NARGS) < 0 || zq_int(args[ACT], "act", 0, ZQ_ACTS - 1, &act) < 0 ||
        zq_read_quant(args[QUANT], &quant) < 0 || zq_in(args[GATE], "gate", ZQ_F32, 2, 2, &a[GATE]) < 0 ||
        read_like(args[UP], "up", 0, &a[GATE], &a[UP]) < 0 ||
        zq_new_rows(a[GATE].dim[0], a[GATE].dim[1], quant == ZQ_QUANT_NONE, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_gated(a[GATE].data, a[UP].data, a[GATE].dim[0], a[GATE].dim[1], (zq_activation)act, &out, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 2, a, names, bad) == 0) {
        result = zq_give_rows(quant, &a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_softmax(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { X, QUANT, NARGS, OUT = 1, N = 5 };
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t quant, bad = 0;
    zq_rows_out out;
    if (zq_count("softmax", nargs, NARGS) < 0 || zq_read_quant(args[QUANT], &quant) < 0 ||
        zq_in(args[X], "x", ZQ_F32, 2, 2, &a[X]) < 0 ||
        zq_new_rows(a[X].dim[0], a[X].dim[1], quant == ZQ_QUANT_NONE, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_softmax(a[X].data, a[X].dim[0], a[X].dim[1], &out, &bad);
    Py_END_ALLOW_THREADS
    if (s == ZQ_ENONFINITE) {
        PyErr_Format(PyExc_ValueError, "x: NaN or +Inf in row %lld", (long long)bad);
    }
    else if (zq_check(s, "x", bad) == 0) {
        result = zq_give_rows(quant, &a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

/* ---- attention --------------------------------------------------------------------------------------- */

/* What both forms of attention share: offsets, heads, scale, mask of args[0..3], for rows of `width` columns per
 * operand. a: offsets, mask. int8_rows: an argument, or NULL where it was left out. */
static int
read_attention(PyObject *const *args, int64_t rows, int64_t width, PyObject *int8_rows, zq_arg a[2], zq_attention_args *t)
{
    if (zq_read_offsets(args[0], rows, &a[0]) < 0 || zq_int(args[1], "heads", 1, 1 << 20, &t->heads) < 0 ||
        zq_read_scale(args[2], &t->scale) < 0 || zq_in_or_none(args[3], "key_mask", ZQ_U8 | ZQ_BOOL, 1, 1, &a[1]) < 0 ||
        (a[1].arr && zq_shape(&a[1], "key_mask", 1, &rows) < 0)) {
        return -1;
    }
    if (width % t->heads != 0 || width == 0) {
        PyErr_Format(PyExc_ValueError, "heads: %lld columns cannot be shared out to %lld heads", (long long)width,
                     (long long)t->heads);
        return -1;
    }
    t->head_dim = width / t->heads;
    t->int8_rows = 0;
    if (int8_rows && zq_int(int8_rows, "int8_rows", 0, INT64_MAX, &t->int8_rows) < 0) {
        return -1;
    }
    if (t->int8_rows && t->head_dim > ZQ_INT8_HEAD_MAX) {
        PyErr_Format(PyExc_ValueError, "int8_rows: expected at most %d columns per head, got %lld", ZQ_INT8_HEAD_MAX,
                     (long long)t->head_dim);
        return -1;
    }
    t->offsets = a[0].data;
    t->sequences = a[0].size - 1;
    t->key_mask = a[1].data;
    return 0;
}

static PyObject *
py_attention(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { Q, K, V, OFFSETS, HEADS, SCALE, MASK, NARGS, REST = 3, OUT = 5, N = 6 };
    static const char *const names[] = {"q", "k", "v"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t bad = 0;
    zq_attention_args t = {0};
    if (zq_count("attention", nargs > NARGS ? nargs - 1 : nargs, NARGS) < 0 || zq_in(args[Q], "q", ZQ_F32, 2, 2, &a[Q]) < 0 ||
        read_like(args[K], "k", 0, &a[Q], &a[K]) < 0 || read_like(args[V], "v", 0, &a[Q], &a[V]) < 0 ||
        read_attention(args + OFFSETS, a[Q].dim[0], a[Q].dim[1], nargs > NARGS ? args[NARGS] : NULL, &a[REST], &t) < 0 ||
        zq_new(ZQ_F32, 2, a[Q].dim, &a[OUT]) < 0) {
        goto cleanup;
    }
    t.q = a[Q].data;
    t.k = a[K].data;
    t.v = a[V].data;
    t.out = a[OUT].data;
    t.ld_q = t.ld_kv = t.ld_out = a[Q].dim[1];
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_attention(&t, &bad);
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 3, a, names, bad) == 0) {
        result = zq_give(&a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

static PyObject *
py_attention_fused(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { QKV, OFFSETS, HEADS, SCALE, MASK, QUANT, NARGS, REST = 1, OUT = 3, N = 7 };
    static const char *const names[] = {"qkv"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    int64_t quant, bad = 0;
    zq_attention_args t = {0};
    zq_rows_out out;
    if (zq_count("attention_fused", nargs > NARGS ? nargs - 1 : nargs, NARGS) < 0 || zq_read_quant(args[QUANT], &quant) < 0 ||
        zq_in(args[QKV], "qkv", ZQ_F32, 2, 2, &a[QKV]) < 0) {
        goto cleanup;
    }
    const int64_t m = a[QKV].dim[0], width = a[QKV].dim[1] / 3;
    if (width * 3 != a[QKV].dim[1]) {
        PyErr_Format(PyExc_ValueError, "qkv: expected 3 * heads * head_dim columns, got %lld", (long long)a[QKV].dim[1]);
        goto cleanup;
    }
    if (read_attention(args + OFFSETS, m, width, nargs > NARGS ? args[NARGS] : NULL, &a[REST], &t) < 0 ||
        zq_new_rows(m, width, 1, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    t.q = a[QKV].data;
    t.k = t.q + width;
    t.v = t.k + width;
    t.out = out.y;
    t.ld_q = t.ld_kv = 3 * width;
    t.ld_out = width;
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_attention(&t, &bad);
    if (s == ZQ_OK && quant != ZQ_QUANT_NONE) {
        s = zq_quantize_tokens(out.y, m, width, width, (zq_quant)quant, out.q, out.ld_q, out.q_scale, out.q_zero, &bad);
    }
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 1, a, names, bad) == 0) {
        result = zq_give_rows(quant, &a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

PyMethodDef zq_methods_nn[] = {
    {"layer_norm", FAST(py_layer_norm), METH_FASTCALL,
     "layer_norm(x, residual | None, weight, bias, eps, quant, codes_only = 0) -> (y, codes | None); y is None where there are "
     "codes and only they are wanted"},
    {"rms_norm", FAST(py_rms_norm), METH_FASTCALL,
     "rms_norm(x, residual | None, weight, eps, quant, codes_only = 0) -> (y, codes | None), as layer_norm"},
    {"activation", FAST(py_activation), METH_FASTCALL, "activation(x, act, quant) -> y or codes"},
    {"gated", FAST(py_gated), METH_FASTCALL, "gated(gate, up, act, quant) -> y or codes: act(gate) * up"},
    {"softmax", FAST(py_softmax), METH_FASTCALL, "softmax(x, quant) -> y or codes, over rows"},
    {"attention", FAST(py_attention), METH_FASTCALL,
     "attention(q, k, v, offsets, heads, scale, key_mask | None[, int8_rows]) -> out"},
    {"attention_fused", FAST(py_attention_fused), METH_FASTCALL,
     "attention_fused(qkv, offsets, heads, scale, key_mask | None, quant[, int8_rows]) -> out or codes"},
    {NULL, NULL, 0, NULL},
};
