"""Outliers on purpose: a model that computes the same as another, and whose activations are as hard to quantize as those of
large language models, in which a few channels of every block are far larger than all others.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .checks import as_count
from .models.foldings import fold, foldings

__all__ = ["plant_outliers"]


def plant_outliers(model: Any, channels: int = 6, factor: float = 60, seed: int = 0) -> Any:
    """Make some channels of what the blocks' norms give out ``factor`` times as large, and the weights that read them as
    many times smaller.

    Parameters
    ----------
    model
        A float CausalLM. It is not changed.
    channels
        How many; the same ones everywhere, as in real models.
    factor
        By how much.
    seed
        Of which channels.

    Returns
    -------
    CausalLM
        Its outputs are those of ``model``, but for rounding (about 1e-6).

    Raises
    ------
    ValueError
        More channels than the model has; a factor that is not positive; a model whose norms feed its residual connections
        too (BERT).

    >>> from pathlib import Path
    >>> import zquant as zq
    >>> lm = zq.load(Path(zq.__file__).parents[1] / "tests" / "data" / "tiny-llama-5m")
    >>> hard = zq.plant_outliers(lm, channels=2)
    >>> [int((zq.calibrate(m, [[1, 2, 3]])["model.layers.0.mlp.up_proj"]["absmax"] > 20).sum()) for m in (lm, hard)]
    [0, 2]
    """
    hidden = model.dims.hidden
    if as_count("channels", channels, 0) > hidden:
        raise ValueError(f"channels: {channels}, but the model has {hidden}")
    if not 0 < factor < np.inf:
        raise ValueError(f"factor: expected a positive number, got {factor!r}")
    found = [f for f in foldings(model) if f.kind == "norm" and f.stage in ("qkv", "mlp")]
    if not found:
        raise ValueError(f"{model!r}: no norm feeds linear layers alone")
    scale = np.ones(hidden)
    scale[np.random.default_rng(seed).choice(hidden, channels, replace=False)] = 1 / factor
    for folding in found:
        model = fold(model, folding, scale)
    return model
