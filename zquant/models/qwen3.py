"""Qwen3 (arXiv 2505.09388): Llama with an RMSNorm over each head of q and k before the rotation."""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder
from .llama import NAMES, read_llama
from .qwen2 import windows


def _read(s: Settings) -> Architecture:
    attention = ("query", "key", "value", "attention") if s.flag("attention_bias", False) else ()
    return read_llama(s, default_head_dim=128, qk_norm=True, biased=frozenset(attention), windows=windows(s))


QWEN3 = register_decoder(DecoderFamily(name="Qwen3", model_types=("qwen3",), read=_read, **NAMES))
