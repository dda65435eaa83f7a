/* The method tables of the wrapper files. */
#ifndef ZQ_BIND_H
#define ZQ_BIND_H
#include <Python.h>
extern PyMethodDef zq_methods_linear[];   /* bind_linear.c: packed weights, products */
extern PyMethodDef zq_methods_quantize[]; /* bind_quantize.c: quantizers, packing */
extern PyMethodDef zq_methods_nn[];       /* bind_nn.c: norms, activations, attention */
extern PyMethodDef zq_methods_kv[];       /* bind_kv.c: key-value cache, rotary embedding */
extern PyMethodDef zq_methods_linalg[];   /* bind_linalg.c: what BLAS was loaded */
extern PyMethodDef zq_methods_sequence[]; /* bind_sequence.c: several calls as one */
extern PyMethodDef zq_methods_algo[];     /* bind_algo.c: solvers */
extern PyMethodDef zq_methods_lkd[];      /* bind_lkd.c: training of a block */
#endif
