/* A fixed sequence of calls, run without the interpreter in between. Decoding one token, a kernel takes tens of microseconds
 * and the interpreter, whose code the streamed weights have driven out of the caches, several more for every call. */
#include "args.h"

#include "bind.h"

#define SEQUENCE "zquant.sequence"

enum { MAX_REGISTERS = 32, MAX_ARGS = 24 };

/* register[out] = function(args), or that result's element `item`; argument i is register[from[i]] unless that is negative.
 * `dead` are the registers whose values nobody reads afterwards: they are let go, and their memory serves the next call. */
typedef PyObject *(*fast_function)(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

typedef struct {
    PyObject *function, *args;
    PyObject *part;     /* of what is computed, for errors; or None */
    fast_function fast; /* what function is in C, where it is a kernel's wrapper; else NULL */
    uint32_t dead;
    int count, out, item;
    int8_t from[MAX_ARGS];
    PyObject *constant[MAX_ARGS]; /* items of args */
} call;

typedef struct {
    int inputs, calls;
    call call[];
} sequence;

static void
free_sequence(PyObject *capsule)
{
    sequence *s = PyCapsule_GetPointer(capsule, SEQUENCE);
    for (int i = 0; s && i < s->calls; i++) {
        Py_XDECREF(s->call[i].function);
        Py_XDECREF(s->call[i].args);
        Py_XDECREF(s->call[i].part);
    }
    zq_free(s);
}

/* (function, args, from, out, item, part) into *c, checked: `known` registers hold something by then. */
static int
parse_call(PyObject *entry, int known, call *c)
{
    PyObject *function, *args, *from, *part;
    if (!PyTuple_Check(entry)) {
        PyErr_Format(PyExc_TypeError, "calls: expected tuples (function, args, from, out, item, part), got %R", entry);
        return -1;
    }
    if (!PyArg_ParseTuple(entry, "OO!O!iiO;a call is (function, args, from, out, item, part)", &function, &PyTuple_Type, &args,
                          &PyTuple_Type, &from, &c->out, &c->item, &part)) {
        return -1;
    }
    c->count = (int)PyTuple_Size(args);
    if (!PyCallable_Check(function) || c->count > MAX_ARGS || PyTuple_Size(from) != c->count || c->out < 0 || c->out > known ||
        c->out >= MAX_REGISTERS) {
        PyErr_Format(PyExc_ValueError, "calls: expected a function, up to %d arguments, as many registers, and the next register",
                     MAX_ARGS);
        return -1;
    }
    for (int i = 0; i < c->count; i++) {
        int64_t r;
        if (zq_int(PyTuple_GetItem(from, i), "calls: register", -1, known - 1, &r) < 0) {
            return -1;
        }
        c->from[i] = (int8_t)r;
        c->constant[i] = PyTuple_GetItem(args, i);
    }
    Py_INCREF(function);
    Py_INCREF(args);
    Py_INCREF(part);
    c->function = function;
    c->args = args;
    c->part = part;
    c->fast = NULL;
    if (PyObject_TypeCheck(function, &PyCFunction_Type) && PyCFunction_GetFlags(function) == METH_FASTCALL) {
        c->fast = (fast_function)(void (*)(void))PyCFunction_GetFunction(function);
    }
    return 0;
}

/* Backwards: what a register holds before a call that writes it, only that call can still read. A result that nobody reads is
 * dead at once; the caller reads the last one. */
static void
find_dead(sequence *s)
{
    uint32_t read_later = 1u << s->call[s->calls - 1].out;
    for (int i = s->calls - 1; i >= 0; i--) {
        call *c = &s->call[i];
        uint32_t read = 0;
        for (int a = 0; a < c->count; a++) {
            read |= c->from[a] < 0 ? 0 : 1u << c->from[a];
        }
        c->dead = (read | 1u << c->out) & ~read_later;
        read_later = (read_later & ~(1u << c->out)) | read;
    }
}

static PyObject *
py_sequence(PyObject *self, PyObject *args)
{
    (void)self;
    int inputs;
    PyObject *calls;
    if (!PyArg_ParseTuple(args, "iO!:sequence", &inputs, &PyList_Type, &calls)) {
        return NULL;
    }
    const Py_ssize_t count = PyList_Size(calls);
    if (inputs < 1 || inputs >= MAX_REGISTERS || count < 1) {
        PyErr_Format(PyExc_ValueError, "sequence: expected 1 to %d inputs and at least one call", MAX_REGISTERS - 1);
        return NULL;
    }
    sequence *s = zq_alloc(sizeof *s + (size_t)count * sizeof(call));
    if (!s) {
        return PyErr_NoMemory();
    }
    *s = (sequence){.inputs = inputs};
    PyObject *capsule = PyCapsule_New(s, SEQUENCE, free_sequence);
    if (!capsule) {
        zq_free(s);
        return NULL;
    }
    for (int known = inputs; s->calls < count; s->calls++) {
        call *c = &s->call[s->calls];
        if (parse_call(PyList_GetItem(calls, s->calls), known, c) < 0) {
            Py_DECREF(capsule);
            return NULL;
        }
        known = known > c->out + 1 ? known : c->out + 1;
    }
    find_dead(s);
    return capsule;
}

/* function(*argv) with a tuple, for callables that are not the extension's own. */
static PyObject *
call_slowly(PyObject *function, PyObject *const *argv, int count)
{
    PyObject *args = PyTuple_New(count);
    for (int i = 0; args && i < count; i++) {
        Py_INCREF(argv[i]);
        (void)PyTuple_SetItem(args, i, argv[i]);
    }
    PyObject *result = args ? PyObject_Call(function, args, NULL) : NULL;
    Py_XDECREF(args);
    return result;
}

/* A new reference, or NULL with an exception. */
static PyObject *
run_call(const call *c, PyObject *const *registers)
{
    PyObject *argv[MAX_ARGS];
    for (int i = 0; i < c->count; i++) {
        argv[i] = c->from[i] < 0 ? c->constant[i] : registers[c->from[i]];
    }
    PyObject *result = c->fast ? c->fast(PyCFunction_GetSelf(c->function), argv, c->count)
                               : call_slowly(c->function, argv, c->count);
    if (!result || c->item < 0) {
        return result;
    }
    PyObject *item = PyTuple_Check(result) ? PyTuple_GetItem(result, c->item) : NULL;
    if (item) {
        Py_INCREF(item);
    }
    else if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "calls: expected a tuple of which to take item %d, got %R", c->item, result);
    }
    Py_DECREF(result);
    return item;
}

/* A ValueError once more, as "part: what it said". */
static void
name_part(PyObject *part)
{
    PyObject *type, *error, *traceback;
    if (part == Py_None || !PyErr_ExceptionMatches(PyExc_ValueError)) {
        return;
    }
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_Format(PyExc_ValueError, "%S: %S", part, error ? error : type);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
}

static PyObject *
py_run_sequence(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    (void)self;
    const sequence *s = nargs ? PyCapsule_GetPointer(args[0], SEQUENCE) : NULL;
    if (!s || nargs != s->inputs + 1) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "run_sequence: expected a sequence and its inputs");
    }
    PyObject *registers[MAX_REGISTERS] = {NULL}, *last = NULL;
    for (int i = 0; i < s->inputs; i++) {
        Py_INCREF(args[i + 1]);
        registers[i] = args[i + 1];
    }
    for (int i = 0; i < s->calls; i++) {
        const call *c = &s->call[i];
        last = PyErr_CheckSignals() < 0 ? NULL : run_call(c, registers);
        Py_XDECREF(registers[c->out]);
        registers[c->out] = last;
        if (!last) {
            name_part(c->part);
            break;
        }
        for (uint32_t dead = c->dead; dead; dead &= dead - 1) {
            Py_CLEAR(registers[__builtin_ctz(dead)]);
        }
    }
    Py_XINCREF(last);
    for (int i = 0; i < MAX_REGISTERS; i++) {
        Py_XDECREF(registers[i]);
    }
    return last;
}

PyMethodDef zq_methods_sequence[] = {
    {"sequence", py_sequence, METH_VARARGS,
     "sequence(inputs, [(function, args, from, out, item, part), ...]) -> a capsule for run_sequence; "
     "zquant.models.sequence builds it"},
    {"run_sequence", FAST(py_run_sequence), METH_FASTCALL, "run_sequence(sequence, *inputs) -> what the last call gives"},
    {NULL, NULL, 0, NULL},
};
