/* The key-value cache and what a decoder does with it. A cache is a capsule "zquant.kvcache" that owns a cache; one
 * call at a time may use it, which a flag enforces. */
#include "args.h"

#include "../zq_kernels.h"
#include "bind.h"

#include <stdatomic.h>
#include <string.h>

static const char KVCACHE[] = "zquant.kvcache";

/* More than any model has; products of them stay far from overflow. */
enum { MAX_LAYERS = 1 << 14, MAX_SEQUENCES = 1 << 20, MAX_TABLES = 1 << 24, MAX_HEADS = 1 << 16, MAX_HEAD_DIM = 1 << 12 };
#define MAX_WINDOW (INT64_C(1) << 40)

typedef struct {
    atomic_flag busy; /* first: see zq_enter */
    zq_kv kv;
} cache;

static void
free_cache(PyObject *capsule)
{
    cache *c = PyCapsule_GetPointer(capsule, KVCACHE);
    zq_kv_free(&c->kv);
    zq_free(c);
}

/* A capsule that owns what *kv owns. */
static PyObject *
give_cache(zq_kv *kv)
{
    cache *c = zq_alloc(sizeof *c);
    PyObject *capsule = NULL;
    if (c) {
        c->kv = *kv;
        atomic_flag_clear(&c->busy);
        capsule = PyCapsule_New(c, KVCACHE, free_cache);
    }
    else {
        PyErr_NoMemory();
    }
    if (!capsule) {
        zq_kv_free(kv);
        zq_free(c);
    }
    return capsule;
}

/* The cache behind the capsule, claimed for this call; give it back with zq_leave. */
static cache *
enter(PyObject *o)
{
    return zq_enter(o, KVCACHE, "cache", "kv_new");
}

static int
read_flag(PyObject *o, const char *name, int *out)
{
    int64_t v;
    if (zq_int(o, name, 0, 1, &v) < 0) {
        return -1;
    }
    *out = (int)v;
    return 0;
}

static PyObject *
py_kv_new(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { LAYERS, SEQUENCES, KV_HEADS, HEAD_DIM, INT8, NARGS };
    int64_t layers, sequences, heads, dim;
    int int8;
    zq_kv kv;
    if (zq_count("kv_new", nargs, NARGS) < 0 || zq_int(args[LAYERS], "layers", 1, MAX_LAYERS, &layers) < 0 ||
        zq_int(args[SEQUENCES], "sequences", 0, zq_min(MAX_SEQUENCES, MAX_TABLES / layers), &sequences) < 0 ||
        zq_int(args[KV_HEADS], "kv_heads", 1, MAX_HEADS, &heads) < 0 ||
        zq_int(args[HEAD_DIM], "head_dim", 1, MAX_HEAD_DIM, &dim) < 0 || read_flag(args[INT8], "int8", &int8) < 0) {
        return NULL;
    }
    return zq_check(zq_kv_init(&kv, layers, sequences, heads, dim, int8), "cache", 0) < 0 ? NULL : give_cache(&kv);
}

static PyObject *
py_kv_lengths(PyObject *self, PyObject *arg)
{
    (void)self;
    zq_arg lengths = {0};
    cache *c = enter(arg);
    if (!c || zq_new(ZQ_I64, 1, &c->kv.sequences, &lengths) < 0) {
        zq_leave(c);
        return NULL;
    }
    if (c->kv.sequences) {
        memcpy(lengths.data, c->kv.length, (size_t)c->kv.sequences * sizeof *c->kv.length);
    }
    zq_leave(c);
    return zq_give(&lengths);
}

static PyObject *
py_kv_bytes(PyObject *self, PyObject *arg)
{
    (void)self;
    cache *c = enter(arg);
    PyObject *bytes = c ? PyLong_FromLongLong(zq_kv_bytes(&c->kv)) : NULL;
    zq_leave(c);
    return bytes;
}

static PyObject *
py_kv_truncate(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { CACHE, SEQUENCE, LENGTH, NARGS };
    int64_t s, length;
    cache *c = NULL;
    PyObject *result = NULL;
    if (zq_count("kv_truncate", nargs, NARGS) < 0 || !(c = enter(args[CACHE])) ||
        zq_int(args[SEQUENCE], "sequence", 0, c->kv.sequences - 1, &s) < 0 ||
        zq_int(args[LENGTH], "length", 0, c->kv.length[s], &length) < 0) {
        goto cleanup;
    }
    zq_kv_truncate(&c->kv, s, length);
    result = Py_NewRef(Py_None);
cleanup:
    zq_leave(c);
    return result;
}

/* `what` are numbered from 0 to count - 1. */
static int
check_indices(const zq_arg *a, const char *name, const char *what, int64_t count)
{
    const int64_t *index = a->data;
    for (int64_t i = 0; i < a->size; i++) {
        if (index[i] < 0 || index[i] >= count) {
            PyErr_Format(PyExc_ValueError, "%s: expected %s 0 to %lld, got %lld", name, what, (long long)count - 1,
                         (long long)index[i]);
            return -1;
        }
    }
    return 0;
}

static PyObject *
py_kv_select(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { CACHE, ROWS, NARGS };
    zq_arg rows = {0};
    zq_kv kv;
    cache *c = NULL;
    PyObject *result = NULL;
    if (zq_count("kv_select", nargs, NARGS) < 0 || zq_in(args[ROWS], "rows", ZQ_I64, 1, 1, &rows) < 0 ||
        !(c = enter(args[CACHE])) || check_indices(&rows, "rows", "sequences", c->kv.sequences) < 0) {
        goto cleanup;
    }
    if (rows.size > zq_min(MAX_SEQUENCES, MAX_TABLES / c->kv.layers)) {
        PyErr_Format(PyExc_ValueError, "rows: %lld sequences are too many", (long long)rows.size);
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_kv_select(&c->kv, rows.data, rows.size, &kv);
    Py_END_ALLOW_THREADS
    if (zq_check(s, "cache", 0) == 0) {
        result = give_cache(&kv);
    }
cleanup:
    zq_leave(c);
    zq_release(1, &rows);
    return result;
}

/* ---- rotary embedding -------------------------------------------------------------------------------- */

/* Both tables or neither. a: cos, sin. Their values are looked at where they are used. */
static int
read_rope(PyObject *const *args, int64_t head_dim, zq_arg a[2], zq_rope *rope)
{
    if (zq_in_or_none(args[0], "cos", ZQ_F32, 2, 2, &a[0]) < 0 || zq_in_or_none(args[1], "sin", ZQ_F32, 2, 2, &a[1]) < 0 ||
        read_flag(args[2], "interleaved", &rope->interleaved) < 0) {
        return -1;
    }
    if (!a[0].arr != !a[1].arr) {
        PyErr_Format(PyExc_ValueError, "%s: expected an array, as %s is one", a[0].arr ? "sin" : "cos",
                     a[0].arr ? "cos" : "sin");
        return -1;
    }
    if (!a[0].arr) {
        return 0;
    }
    if (2 * a[0].dim[1] > head_dim) {
        PyErr_Format(PyExc_ValueError, "cos: %lld columns are more than half of head_dim %lld", (long long)a[0].dim[1],
                     (long long)head_dim);
        return -1;
    }
    rope->cos = a[0].data;
    rope->sin = a[1].data;
    rope->positions = a[0].dim[0];
    rope->half = a[0].dim[1];
    return zq_shape(&a[1], "sin", 2, a[0].dim);
}

static int
check_shared_out(const char *name, int64_t columns, int64_t heads)
{
    if (columns % heads != 0 || columns == 0) {
        PyErr_Format(PyExc_ValueError, "%s: %lld columns cannot be shared out to %lld heads", name, (long long)columns,
                     (long long)heads);
        return -1;
    }
    return 0;
}

static PyObject *
py_rotary(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    enum { X, POSITIONS, COS, SIN, HEADS, INTERLEAVED, NARGS, OUT = 4, N = 5 };
    static const char *const names[] = {"x", "positions", "cos", "sin"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    zq_rope rope = {0};
    int64_t heads, bad = 0;
    if (zq_count("rotary", nargs, NARGS) < 0 || zq_in(args[X], "x", ZQ_F32, 2, 2, &a[X]) < 0 ||
        zq_in(args[POSITIONS], "positions", ZQ_I64, 1, 1, &a[POSITIONS]) < 0 ||
        zq_shape(&a[POSITIONS], "positions", 1, a[X].dim) < 0 || zq_int(args[HEADS], "heads", 1, MAX_HEADS, &heads) < 0 ||
        check_shared_out("x", a[X].dim[1], heads) < 0) {
        goto cleanup;
    }
    PyObject *const tables[] = {args[COS], args[SIN], args[INTERLEAVED]};
    if (read_rope(tables, a[X].dim[1] / heads, &a[COS], &rope) < 0) {
        goto cleanup;
    }
    if (!a[COS].arr) {
        PyErr_SetString(PyExc_TypeError, "cos: expected a NumPy array of float32, got NoneType");
        goto cleanup;
    }
    if (check_indices(&a[POSITIONS], "positions", "rows of cos", rope.positions) < 0 ||
        zq_new(ZQ_F32, 2, a[X].dim, &a[OUT]) < 0) {
        goto cleanup;
    }
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_rotary(a[X].data, a[POSITIONS].data, a[X].dim[0], heads, a[X].dim[1] / heads, &rope, a[OUT].data, &bad);
    Py_END_ALLOW_THREADS
    a[POSITIONS].size = 0; /* integers: nothing to look for */
    if (zq_check_inputs(s, 4, a, names, bad) == 0) {
        result = zq_give(&a[OUT]);
    }
cleanup:
    zq_release(N, a);
    return result;
}

/* ---- attention over the cache ------------------------------------------------------------------------ */

/* Every sequence's new tokens must have rows in the tables. */
static int
check_reach(const zq_kv *kv, const zq_kv_attention *t)
{
    for (int64_t s = 0; t->rope.cos && s < kv->sequences; s++) {
        const int64_t n = t->offsets[s + 1] - t->offsets[s], reach = kv->length[s] + n;
        if (n > 0 && reach > t->rope.positions) {
            PyErr_Format(PyExc_ValueError, "cos: %lld positions, but sequence %lld reaches %lld tokens",
                         (long long)t->rope.positions, (long long)s, (long long)reach);
            return -1;
        }
    }
    return 0;
}

/* A layer may come again only as the first of a new pass. */
static int
check_order(const zq_kv *kv, int64_t layer, const int64_t *offsets)
{
    if (layer != 0 && layer != kv->next_layer) {
        PyErr_Format(PyExc_ValueError, "layer: expected %s%lld, got %lld", kv->next_layer ? "0 or " : "",
                     (long long)kv->next_layer, (long long)layer);
        return -1;
    }
    for (int64_t s = 0; layer != 0 && s < kv->sequences; s++) {
        if (offsets[s + 1] - offsets[s] != kv->step[s]) {
            PyErr_Format(PyExc_ValueError, "offsets: layer 0 had %lld tokens of sequence %lld, layer %lld has %lld",
                         (long long)kv->step[s], (long long)s, (long long)layer, (long long)(offsets[s + 1] - offsets[s]));
            return -1;
        }
    }
    return 0;
}

enum { A_CACHE, A_LAYER, A_QKV, A_OFFSETS, A_WANTED, A_HEADS, A_COS, A_SIN, A_INTERLEAVED, A_QNORM, A_KNORM, A_EPS, A_SCALE,
       A_WINDOW, A_QUANT, A_NARGS };
/* Arrays of one call: inputs that may hold NaN first. */
enum { QKV, COS, SIN, QNORM, KNORM, OFFSETS, WANTED, OUT, N = OUT + 4 };

static int
read_norm(PyObject *o, const char *name, int64_t head_dim, zq_arg *a, const float **out)
{
    if (o == Py_None) {
        return 0;
    }
    if (zq_read_vector(o, name, head_dim, a) < 0) {
        return -1;
    }
    *out = a->data;
    return 0;
}

static int
read_heads(PyObject *o, const zq_kv *kv, int64_t columns, zq_kv_attention *t)
{
    if (zq_int(o, "heads", 1, MAX_HEADS, &t->heads) < 0) {
        return -1;
    }
    if (t->heads % kv->kv_heads != 0) {
        PyErr_Format(PyExc_ValueError, "heads: expected a multiple of the cache's %lld kv heads, got %lld",
                     (long long)kv->kv_heads, (long long)t->heads);
        return -1;
    }
    if (columns != (t->heads + 2 * kv->kv_heads) * kv->head_dim) {
        PyErr_Format(PyExc_ValueError, "qkv: expected (%lld + 2 * %lld) * %lld columns, got %lld", (long long)t->heads,
                     (long long)kv->kv_heads, (long long)kv->head_dim, (long long)columns);
        return -1;
    }
    return 0;
}

/* Everything but the cache. */
static int
read_attend(PyObject *const *args, const zq_kv *kv, int64_t *layer, zq_arg *a, zq_kv_attention *t)
{
    if (zq_int(args[A_LAYER], "layer", 0, kv->layers - 1, layer) < 0 || zq_in(args[A_QKV], "qkv", ZQ_F32, 2, 2, &a[QKV]) < 0 ||
        read_heads(args[A_HEADS], kv, a[QKV].dim[1], t) < 0 ||
        zq_read_offsets(args[A_OFFSETS], a[QKV].dim[0], &a[OFFSETS]) < 0 ||
        zq_in_or_none(args[A_WANTED], "wanted", ZQ_I64, 1, 1, &a[WANTED]) < 0 ||
        check_indices(&a[WANTED], "wanted", "rows", a[QKV].dim[0]) < 0 ||
        read_rope(args + A_COS, kv->head_dim, &a[COS], &t->rope) < 0 ||
        read_norm(args[A_QNORM], "q_norm", kv->head_dim, &a[QNORM], &t->q_norm) < 0 ||
        read_norm(args[A_KNORM], "k_norm", kv->head_dim, &a[KNORM], &t->k_norm) < 0 || zq_read_eps(args[A_EPS], &t->eps) < 0 ||
        zq_read_scale(args[A_SCALE], &t->scale) < 0 || zq_int(args[A_WINDOW], "window", 0, MAX_WINDOW, &t->window) < 0) {
        return -1;
    }
    if (a[OFFSETS].size != kv->sequences + 1) {
        PyErr_Format(PyExc_ValueError, "offsets: %lld sequences, but the cache has %lld", (long long)a[OFFSETS].size - 1,
                     (long long)kv->sequences);
        return -1;
    }
    t->qkv = a[QKV].data;
    t->ld_qkv = a[QKV].dim[1];
    t->offsets = a[OFFSETS].data;
    t->wanted = a[WANTED].data;
    t->wanted_count = a[WANTED].size;
    return check_order(kv, *layer, t->offsets) < 0 ? -1 : check_reach(kv, t);
}

static PyObject *
py_kv_attend(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    static const char *const names[] = {"qkv", "cos", "sin", "q_norm", "k_norm"};
    zq_arg a[N] = {{0}};
    PyObject *result = NULL;
    cache *c = NULL;
    int64_t layer, quant, bad = 0;
    zq_kv_attention t = {0};
    zq_rows_out out;
    if (zq_count("kv_attend", nargs, A_NARGS) < 0 || !(c = enter(args[A_CACHE])) || zq_read_quant(args[A_QUANT], &quant) < 0 ||
        read_attend(args, &c->kv, &layer, a, &t) < 0) {
        goto cleanup;
    }
    const int64_t m = a[WANTED].arr ? t.wanted_count : a[QKV].dim[0], width = t.heads * c->kv.head_dim;
    if (zq_new_rows(m, width, 1, quant, &a[OUT], &out) < 0) {
        goto cleanup;
    }
    t.out = out.y;
    t.ld_out = width;
    zq_status s;
    Py_BEGIN_ALLOW_THREADS
    s = zq_kv_attend(&c->kv, layer, &t, &bad);
    if (s == ZQ_OK && quant != ZQ_QUANT_NONE) {
        s = zq_quantize_tokens(out.y, m, width, width, (zq_quant)quant, out.q, out.ld_q, out.q_scale, out.q_zero, &bad);
    }
    Py_END_ALLOW_THREADS
    if (zq_check_inputs(s, 5, a, names, bad) == 0) {
        result = zq_give_rows(quant, &a[OUT]);
    }
cleanup:
    zq_leave(c);
    zq_release(N, a);
    return result;
}

PyMethodDef zq_methods_kv[] = {
    {"kv_new", FAST(py_kv_new), METH_FASTCALL, "kv_new(layers, sequences, kv_heads, head_dim, int8) -> cache"},
    {"kv_lengths", py_kv_lengths, METH_O, "kv_lengths(cache) -> tokens of each sequence"},
    {"kv_bytes", py_kv_bytes, METH_O, "kv_bytes(cache) -> bytes of memory"},
    {"kv_truncate", FAST(py_kv_truncate), METH_FASTCALL, "kv_truncate(cache, sequence, length): forget what is behind"},
    {"kv_select", FAST(py_kv_select), METH_FASTCALL, "kv_select(cache, rows) -> new cache with copies of these sequences"},
    {"kv_attend", FAST(py_kv_attend), METH_FASTCALL,
     "kv_attend(cache, layer, qkv, offsets, wanted | None, heads, cos | None, sin | None, interleaved, q_norm | None, "
     "k_norm | None, eps, scale, window, quant) -> out or codes, of the wanted rows"},
    {"rotary", FAST(py_rotary), METH_FASTCALL, "rotary(x, positions, cos, sin, heads, interleaved) -> y"},
    {NULL, NULL, 0, NULL},
};
