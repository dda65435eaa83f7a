"""Mistral (Jiang et al., arXiv 2310.06825): Llama whose queries see the last ``sliding_window`` keys only."""
from __future__ import annotations

from .decoder_family import Architecture, DecoderFamily, Settings, register_decoder
from .llama import NAMES, read_llama, window_per_layer


def _read(s: Settings) -> Architecture:
    # The key-value heads' default is Mistral 7B's, as in transformers.
    kv_heads = s.integer("num_key_value_heads", s.integer("num_attention_heads") if "num_key_value_heads" in s.config else 8)
    return read_llama(s, kv_heads=kv_heads, windows=window_per_layer(s, s.integer("sliding_window", None)))


MISTRAL = register_decoder(DecoderFamily(name="Mistral", model_types=("mistral",), read=_read, **NAMES))
