/* What BLAS was loaded. */
#include "args.h"

#include "../linalg.h"
#include "bind.h"

static PyObject *
py_blas(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    return Py_BuildValue("(ss)", zq_blas_core(), zq_blas_config());
}

PyMethodDef zq_methods_linalg[] = {
    {"blas", py_blas, METH_NOARGS, "blas() -> (core that OpenBLAS chose, its build description)"},
    {NULL, NULL, 0, NULL},
};
