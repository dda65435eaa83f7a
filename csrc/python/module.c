/* The extension module zquant._core: slots, the method tables of the bind_*.c files, dispatch and threads. */
#define ZQ_IMPORT_ARRAY
#include "args.h"

#include "../zq_kernels.h"
#include "bind.h"

#include <stdlib.h>
#include <string.h>

static int
find_level(const char *name)
{
    for (int i = 0; i < ZQ_LEVELS; i++) {
        if (strcmp(name, zq_level_names[i]) == 0) {
            return i;
        }
    }
    return -1;
}

static PyObject *
py_levels(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < ZQ_LEVELS; i++) {
        if (!zq_level_supported((zq_level)i)) {
            continue;
        }
        PyObject *s = PyUnicode_FromString(zq_level_names[i]);
        if (!s || PyList_Append(list, s) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(s);
    }
    return list;
}

static PyObject *
py_level(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    return PyUnicode_FromString(zq_level_names[zq_level_active()]);
}

static PyObject *
py_use_level(PyObject *self, PyObject *arg)
{
    (void)self;
    PyObject *bytes = PyUnicode_Check(arg) ? PyUnicode_AsUTF8String(arg) : NULL;
    if (!bytes) {
        PyErr_SetString(PyExc_TypeError, "level: expected a string");
        return NULL;
    }
    const int level = find_level(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (level < 0 || !zq_level_supported((zq_level)level)) {
        PyObject *list = py_levels(self, NULL);
        if (list) {
            PyErr_Format(PyExc_ValueError, "level: %R is not one of this CPU's levels %R", arg, list);
            Py_DECREF(list);
        }
        return NULL;
    }
    zq_level_use((zq_level)level);
    Py_RETURN_NONE;
}

static PyObject *
py_use_cpu_choices(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    int64_t tall, to_l2;
    if (zq_count("use_cpu_choices", nargs, 2) < 0 || zq_int(args[0], "tall_groups", -1, 1, &tall) < 0 ||
        zq_int(args[1], "fetch_to_l2", -1, 1, &to_l2) < 0) {
        return NULL;
    }
    zq_cpu_choices_use((zq_cpu_choices){(int)tall, (int)to_l2});
    return Py_BuildValue("(ii)", zq_active()->mr_group, zq_active()->fetch_to_l2);
}

static PyObject *
py_kernels(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < zq_kernel_count; i++) {
        PyObject *s = PyUnicode_FromString(zq_level_names[zq_kernel_origin(zq_level_active(), i)]);
        if (!s || PyDict_SetItemString(dict, zq_kernel_names[i], s) < 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(s);
    }
    return dict;
}

static PyObject *
py_threads(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    return PyLong_FromLong(zq_threads());
}

static PyObject *
py_set_threads(PyObject *self, PyObject *arg)
{
    (void)self;
    int64_t n;
    if (zq_int(arg, "n", 1, 256, &n) < 0) {
        return NULL;
    }
    zq_set_threads((int)n);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"levels", py_levels, METH_NOARGS, "levels() -> the dispatch levels of this CPU, slowest first"},
    {"level", py_level, METH_NOARGS, "level() -> the active dispatch level"},
    {"use_level", py_use_level, METH_O, "use_level(name): switch the dispatch level"},
    {"use_cpu_choices", FAST(py_use_cpu_choices), METH_FASTCALL,
     "use_cpu_choices(tall_groups, fetch_to_l2) -> (rows of a tile of groups, fetch_to_l2) of this level now; each 0, 1 or -1: "
     "what suits this CPU"},
    {"kernels", py_kernels, METH_NOARGS, "kernels() -> {kernel: level that serves it}"},
    {"threads", py_threads, METH_NOARGS, "threads() -> threads that a kernel may use"},
    {"set_threads", py_set_threads, METH_O, "set_threads(n)"},
    {NULL, NULL, 0, NULL},
};

/* ZQUANT_ISA caps the level: the best one of this CPU that is not above it runs. A name that does not exist is an
 * ImportError that lists the names. */
static int
choose_level(void)
{
    const char *cap = getenv("ZQUANT_ISA");
    int level = ZQ_LEVELS - 1;
    if (cap && *cap) {
        level = find_level(cap);
        if (level < 0) {
            PyErr_Format(PyExc_ImportError, "ZQUANT_ISA=%s: expected one of ref, avx2, avxvnni, avx512vnni, amx", cap);
            return -1;
        }
    }
    zq_level_use(zq_level_best((zq_level)level));
    return 0;
}

static int
exec_module(PyObject *m)
{
    if (_import_array() < 0) {
        return -1;
    }
    if (choose_level() < 0) {
        return -1;
    }
    PyMethodDef *const tables[] = {methods,       zq_methods_linear, zq_methods_quantize,
                                   zq_methods_nn, zq_methods_kv,     zq_methods_linalg, zq_methods_algo, zq_methods_lkd,
                                   zq_methods_sequence};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (PyModule_AddFunctions(m, tables[i]) < 0) {
            return -1;
        }
    }
    return PyModule_AddIntConstant(m, "MAX_K", ZQ_MAX_K);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)exec_module},
/* Py_mod_multiple_interpreters came with 3.12 and Py_mod_gil with 3.13; the limited API of 3.10 has neither, and
 * NumPy itself refuses sub-interpreters. */
#if !defined(Py_LIMITED_API) && PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if !defined(Py_LIMITED_API) && PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zquant._core",
    .m_doc = "C kernels of zquant; call them through zquant.ops.",
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&def);
}
