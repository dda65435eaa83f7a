#define _GNU_SOURCE
#include "interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { INTERVAL_NS = 50000000 }; /* nobody notices; and to wait for the GIL, up to 5 ms, costs little at this rate */

static int
signal_raised(void *ctx)
{
    zq_interrupt *i = ctx;
    if (zq_now_ns() < i->next) {
        return 0;
    }
    PyEval_RestoreThread(i->thread);
    const int raised = PyErr_CheckSignals() < 0;
    i->thread = PyEval_SaveThread();
    i->next = zq_now_ns() + INTERVAL_NS;
    return raised;
}

void
zq_begin_interruptible(zq_interrupt *i)
{
    *i = (zq_interrupt){.stop = {.asked = signal_raised, .ctx = i}, .next = zq_now_ns() + INTERVAL_NS};
    i->asked = syscall(SYS_gettid) == getpid() ? &i->stop : NULL;
    i->thread = PyEval_SaveThread();
}

void
zq_end_interruptible(zq_interrupt *i)
{
    PyEval_RestoreThread(i->thread);
}
