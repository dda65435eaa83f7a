/* The method tables of the wrapper files. */
#ifndef ZQ_BIND_H
#define ZQ_BIND_H
#include <Python.h>
extern __attribute__((weak)) PyMethodDef zq_methods_linear[]; /* DEV-WEAK */   /* bind_linear.c: packed weights, products */
extern __attribute__((weak)) PyMethodDef zq_methods_quantize[]; /* DEV-WEAK */ /* bind_quantize.c: quantizers, packing */
extern __attribute__((weak)) PyMethodDef zq_methods_nn[]; /* DEV-WEAK */       /* bind_nn.c: norms, activations, attention */
extern __attribute__((weak)) PyMethodDef zq_methods_linalg[]; /* DEV-WEAK */   /* bind_linalg.c: what BLAS was loaded */
#endif
