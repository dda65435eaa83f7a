"""Sequences of calls: values, errors, references."""
import sys

import numpy as np
import pytest

from zquant import _core
from zquant.models.sequence import Calls


def test_kernels_and_other_callables():
    calls = Calls()
    x, weight = calls.input(), calls.input()
    y = calls.add(_core.rms_norm, x, None, weight, 1e-6, 0, item=0)
    calls.add(np.add, y, x)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 20)).astype(np.float32), rng.normal(size=20).astype(np.float32)
    assert np.array_equal(calls.bind()(x, weight), _core.rms_norm(x, None, weight, 1e-6, 0)[0] + x)


def test_errors_come_through_and_nothing_leaks():
    calls = Calls()
    calls.add(_core.rms_norm, calls.input(), None, np.ones(4, np.float32), 1e-6, 0, item=0)
    run, bad = calls.bind(), np.full((1, 4), np.nan, np.float32)
    run(np.ones((1, 4), np.float32))
    before = sys.getrefcount(bad)
    for _ in range(10):
        with pytest.raises(ValueError, match="NaN or Inf"):
            run(bad)
    assert sys.getrefcount(bad) == before
    with pytest.raises(TypeError, match="expected a sequence and its inputs"):
        run()
    with pytest.raises(IndexError):
        again = Calls()
        again.add(divmod, again.input(), 3, item=2)
        again.bind()(7)


@pytest.mark.parametrize("inputs, calls, error", [
    (0, [(max, (1, 2), (-1, -1), 0, -1)], "expected 1 to 31 inputs"),
    (1, [], "at least one call"),
    (1, [(3, (), (), 1, -1)], "expected a function"),
    (1, [(max, (1, 2), (-1,), 1, -1)], "as many registers"),
    (1, [(max, (1, 2), (-1, -1), 2, -1)], "the next register"),
    (1, [(max, (1, None), (-1, 1), 1, -1)], "register"),
    (1, [(max, tuple(range(30)), (-1,) * 30, 1, -1)], "up to 24 arguments"),
])
def test_what_is_refused(inputs, calls, error):
    with pytest.raises(ValueError, match=error):
        _core.sequence(inputs, calls)


def test_inputs_come_first():
    calls = Calls()
    calls.add(max, calls.input(), 2)
    with pytest.raises(ValueError, match="before the first call"):
        calls.input()
