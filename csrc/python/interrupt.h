/* Long calls without the GIL that Ctrl-C, or any signal whose handler raises, ends before their time. */
#ifndef ZQ_INTERRUPT_H
#define ZQ_INTERRUPT_H

#include <Python.h>

#include "../zq.h"

typedef struct {
    zq_stop *asked; /* for the core; NULL on threads on which Python runs no handlers: they need not wait for the GIL */
    zq_stop stop;
    PyThreadState *thread;
    int64_t next; /* when to look for signals again, in ns */
} zq_interrupt;

/* In place of Py_BEGIN_ALLOW_THREADS and Py_END_ALLOW_THREADS. After ZQ_ESTOPPED the exception is
 * set, or zq_check() sets one. */
void zq_begin_interruptible(zq_interrupt *i);
void zq_end_interruptible(zq_interrupt *i);

#endif
