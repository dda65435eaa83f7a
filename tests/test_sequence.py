"""Sequences of calls: values, errors, references."""
import signal
import sys
import weakref

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
    (0, [(max, (1, 2), (-1, -1), 0, -1, None)], "expected 1 to 31 inputs"),
    (1, [], "at least one call"),
    (1, [(3, (), (), 1, -1, None)], "expected a function"),
    (1, [(max, (1, 2), (-1,), 1, -1, None)], "as many registers"),
    (1, [(max, (1, 2), (-1, -1), 2, -1, None)], "the next register"),
    (1, [(max, (1, None), (-1, 1), 1, -1, None)], "register"),
    (1, [(max, tuple(range(30)), (-1,) * 30, 1, -1, None)], "up to 24 arguments"),
    (1, [(max, (i, 1), (-1, -1), i, -1, None) for i in range(1, 33)], "the next register"),
])
def test_what_is_refused(inputs, calls, error):
    with pytest.raises(ValueError, match=error):
        _core.sequence(inputs, calls)


def test_what_is_no_tuple_is_named():
    with pytest.raises(TypeError, match=r"calls: expected tuples .*, got \[1, 2\]"):
        _core.sequence(1, [[1, 2]])
    with pytest.raises(TypeError, match="expected a tuple of which to take item 0, got 3"):
        _core.run_sequence(_core.sequence(1, [(max, (None, 3), (0, -1), 1, 0, None)]), 2)
    with pytest.raises(IndexError):
        _core.run_sequence(_core.sequence(1, [(divmod, (None, 3), (0, -1), 1, 5, None)]), 2)


def test_inputs_come_first():
    calls = Calls()
    calls.add(max, calls.input(), 2)
    with pytest.raises(ValueError, match="before the first call"):
        calls.input()


def test_a_long_sequence_needs_few_registers():
    calls = Calls()
    first = x = calls.input()
    for i in range(100):
        y = calls.add(min, x, 10**6)
        calls.add(max, y, 0)  # nobody reads it
        x = calls.add(sum, calls.add(lambda *args: args, y, x, first, i))
    calls.bind()

    def plain(first):
        x = first
        for i in range(100):
            x = min(x, 10**6) + x + first + i
        return x

    assert calls.bind()(3) == plain(3)


def test_too_many_values_at_a_time():
    calls = Calls()
    values = [calls.add(max, calls.input(), 0)]
    values += [calls.add(max, values[0], i) for i in range(32)]
    calls.add(max, *values[:20])
    calls.add(max, *values[20:])
    with pytest.raises(ValueError, match="the next register"):
        calls.bind()


def test_results_that_are_not_needed_are_let_go():
    """Every call finds alive what it or a later one reads, and nothing else."""
    class Result:
        pass

    calls, seen, alive = Calls(), [], []

    def make(*_):
        alive.append(sum(ref() is not None for ref in seen))
        result = Result()
        seen.append(weakref.ref(result))
        return result

    x = calls.add(make, calls.input())
    for _ in range(5):
        x = calls.add(make, calls.add(make, x), calls.add(make, x))
    calls.add(make, x)
    calls.add(make, x)  # nobody reads the one before
    calls.add(make)
    assert isinstance(calls.bind()(None), Result)
    assert alive == [0] + 5 * [1, 2, 2] + [1, 1, 0]


@pytest.mark.parametrize("error, text", [(ValueError("no"), "^there: no$"), (UnicodeError("no"), "^there: no$"),
                                         (KeyError("no"), "^'no'$"), (KeyboardInterrupt("no"), "^no$")])
def test_a_value_error_names_its_part(error, text):
    def fail(_):
        raise error

    calls = Calls()
    calls.part = "here"
    x = calls.add(abs, calls.input())
    calls.part = "there"
    calls.add(fail, x)
    with pytest.raises(type(error) if not isinstance(error, ValueError) else ValueError, match=text) as caught:
        calls.bind()(1)
    assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="^bad operand"):
        calls.bind()("1")


def test_signals_are_looked_at_between_calls():
    calls, after = Calls(), []
    x = calls.add(lambda _: signal.raise_signal(signal.SIGINT), calls.input())
    calls.add(after.append, x)
    with pytest.raises(KeyboardInterrupt):
        calls.bind()(0)
    assert not after
