"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v, and a sliding window in the upper blocks."""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder
from .llama import NAMES, read_llama, window_per_layer


def windows(s: Settings) -> tuple[int, ...]:
    """The sliding window of each block; none unless ``use_sliding_window``."""
    window = s.integer("sliding_window", 4096) if s.flag("use_sliding_window", False) else None
    return window_per_layer(s, window, s.integer("max_window_layers", 28, least=0))


def _read(s: Settings) -> Architecture:
    return read_llama(s, biased=frozenset(("query", "key", "value")), windows=windows(s))


QWEN2 = register_decoder(DecoderFamily(name="Qwen2", model_types=("qwen2",), read=_read, **NAMES))
