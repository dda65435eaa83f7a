"""The memory of results: blocks that are kept for the next call (csrc/memory.c), and the arrays over them."""
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from zquant import _core


def churn(seed):
    """Results of 4 to 240 KiB, up to 20 alive at a time, let go in any order: how many of them lost their values."""
    rng, alive, lost = random.Random(seed), [], 0
    for i in range(600):
        value = np.float32(1000 * seed + i)
        x = np.full((rng.randint(1, 60), 1024), value)
        alive.append((value, _core.activation(x, 0, 0)))
        while len(alive) > rng.randint(0, 20):
            value, y = alive.pop(rng.randrange(len(alive)))
            lost += not (y == value).all()
    return lost


@pytest.mark.parametrize("threads", [1, 4])
def test_nobody_gets_memory_that_is_in_use(threads):
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(churn, range(threads))) == [0] * threads


@pytest.mark.parametrize("shape", [(3, 5000), (1, 5000), (5000, 1), (2, 20000), (0, 8)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_flags_of_results(shape, padded):
    """What NumPy says of any array of these strides."""
    x = np.ones(shape, np.float32)
    for a in (_core.activation(x, 0, 0), *_core.quantize_tokens(x, 2, padded)):
        like = np.lib.stride_tricks.as_strided(a, a.shape, a.strides)
        assert not a.flags.owndata or a.nbytes < 8192
        for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS", "ALIGNED", "WRITEABLE"):
            assert a.flags[flag] == like.flags[flag], flag
