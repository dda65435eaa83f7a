"""Rotary position embeddings (Su et al., arXiv 2104.09864): frequencies and tables of every scaling that is supported.

Pair i of a head's first ``dim`` features turns by position * f_i, where unscaled f_i = theta^(-2i / dim).

``linear``   (Chen et al., arXiv 2306.15595): f_i / factor.
``dynamic``  NTK-aware: theta grows with the length of the sequence once that exceeds the trained length.
``llama3``   Llama 3.1: long wavelengths are divided by factor, short ones kept, those between blended.
``yarn``     (Peng et al., arXiv 2309.00071): a ramp over i between f_i and f_i / factor; cos and sin times an attention factor.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["KINDS", "Rope", "read_rope"]

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDS = {"linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True)
class Rope:
    """Frequencies and tables of one model.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    dim
        Features of a head that are rotated; even.
    theta
        Base of the wavelengths.
    trained
        Positions before any scaling (``original_max_position_embeddings``).
    settings
        What the scaling reads: ``factor``, ``low_freq_factor``, ``beta_fast``, ``attention_factor``...

    >>> Rope("default", 4, 100.0, 8).frequencies().tolist()
    [1.0, 0.10000000149011612]
    """

    kind: str
    dim: int
    theta: float
    trained: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_cache", {})
        object.__setattr__(self, "_lock", threading.Lock())

    @property
    def max_positions(self) -> int:
        """Positions that the scaling was made for."""
        return self.trained if self.kind == "default" else int(self.trained * max(self._factor, 1.0))

    @property
    def _factor(self) -> float:
        return float(self.settings.get("factor") or 1.0)

    def depends_on_length(self, length: int) -> bool:
        """Whether a sequence of that length has frequencies of its own."""
        return self.kind == "dynamic" and length > self.trained

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1 except for yarn, there 0.1 ln(factor) + 1 unless the settings say."""
        s = self.settings
        if self.kind != "yarn":
            return 1.0
        if s.get("attention_factor") is not None:
            return float(s["attention_factor"])
        both = s.get("mscale") and s.get("mscale_all_dim")
        return self._mscale(s["mscale"]) / self._mscale(s["mscale_all_dim"]) if both else self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self._factor) + 1.0 if self._factor > 1 else 1.0

    def frequencies(self, length: int = 0) -> np.ndarray:
        """f_i as (dim / 2,) float32; ``length`` is that of the whole sequence, which only ``dynamic`` looks at."""
        theta = self.theta
        if self.depends_on_length(length):
            stretch = self._factor * length / self.trained - (self._factor - 1)
            theta *= stretch ** (self.dim / (self.dim - 2))
        plain = theta ** -(np.arange(0, self.dim, 2) / self.dim)
        scaled = {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn}.get(self.kind)
        return (plain if scaled is None else scaled(plain)).astype(np.float32)

    def _linear(self, plain: np.ndarray) -> np.ndarray:
        return plain / self._factor

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        low, high = float(self.settings["low_freq_factor"]), float(self.settings["high_freq_factor"])
        turns = self.trained * plain / (2 * math.pi)  # full turns over the trained length
        blend = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (blend + (1 - blend) / self._factor)

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        def index(turns: float) -> float:
            """Where a pair makes that many turns over the trained length."""
            return self.dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = index(self.settings.get("beta_fast") or 32), index(self.settings.get("beta_slow") or 1)
        if self.settings.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        ramp = np.clip((np.arange(self.dim // 2) - low) / ((high - low) or 0.001), 0, 1)
        return plain / self._factor * ramp + plain * (1 - ramp)

    def tables(self, count: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin for positions 0..count-1 at least, each (rows, dim / 2) float32.

        Angles are float32 products, which is what models were trained with; the tables are kept and grow by doubling.
        """
        key = length if self.depends_on_length(length) else 0
        with self._lock:  # type: ignore[attr-defined]
            cache: dict[int, tuple[np.ndarray, np.ndarray]] = self._cache  # type: ignore[attr-defined]
            found = cache.get(key)
            if found is None or len(found[0]) < count:
                rows = count if key else max(256, 1 << (count - 1).bit_length())
                for other in [k for k in cache if k]:  # lengths change with every token: one table of this kind at a time
                    del cache[other]
                found = cache[key] = self._table(rows, length)
            return found

    def _table(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        angles = np.arange(rows, dtype=np.float32)[:, None] * self.frequencies(length)
        factor = self.attention_factor
        return ((np.cos(angles.astype(np.float64)) * factor).astype(np.float32),
                (np.sin(angles.astype(np.float64)) * factor).astype(np.float32))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "dim", "theta", "trained", "settings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def read_rope(config: Mapping[str, Any], head_dim: int, *, theta_key: str = "rope_theta",
              fraction_key: str = "partial_rotary_factor", fraction: float = 1.0) -> Rope:
    """The rotary embedding that a config.json describes.

    Both spellings are read: ``rope_parameters`` (transformers 5), and ``rope_theta`` with ``rope_scaling``.

    Parameters
    ----------
    config
        The contents of config.json.
    head_dim
        Features per head.
    theta_key, fraction_key, fraction
        What older files of the family call the base and the part of a head that is rotated, and that part's default.

    Raises
    ------
    ValueError
        An unknown ``rope_type`` (the known are listed), or settings that are missing or no numbers.

    >>> read_rope({"rope_theta": 1e4, "max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2}}, 8)
    Rope(kind='linear', dim=8, theta=10000.0, trained=64, settings={'type': 'linear', 'factor': 2})
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {key} is {value!r}; expected an object")
        settings.update(value or {})
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"config.json: rope_type {kind!r} is not known; known: {', '.join(KINDS)}")
    positions = config.get("max_position_embeddings", 2048)
    trained = positions
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        trained = settings.get(key) or config.get(key) or positions
        if kind == "yarn" and settings.get("factor") is None:
            settings["factor"] = positions / trained
    theta = settings.get("rope_theta", config.get(theta_key, 10000.0))
    part = settings.get("partial_rotary_factor", config.get(fraction_key, fraction))
    checked = {"rope_theta": theta, "partial_rotary_factor": part, "original_max_position_embeddings": trained,
               **{key: settings.get(key) for key in _NEEDS.get(kind, ())}}
    for key, value in checked.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"config.json: rope_type {kind!r} needs {key}, a positive number; got {value!r}")
    dim = int(head_dim * part)
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"config.json: {dim} rotary features of {head_dim} per head; expected an even number")
    return Rope(kind, dim, float(theta), int(trained), settings)
