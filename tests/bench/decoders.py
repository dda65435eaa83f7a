"""Decoders with random weights: their shapes, Hugging Face folders and GGUF files of the same values.

Both kinds of file are written tensor by tensor into a cache folder outside the repository. The positions of the GPT-2
shapes go to 4,096 (GPT-2's own end at 1,024), so that every shape takes the same prompts.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

POSITIONS = 4096
CONTEXT = 2304  # what the benchmark asks for: 2,048 tokens and a few more
SPREAD = 0.02  # standard deviation of the weights


def gpt2(hidden: int, layers: int, heads: int, vocabulary: int = 50257, positions: int = POSITIONS) -> dict[str, Any]:
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": hidden, "n_layer": layers,
            "n_head": heads, "n_inner": None, "n_positions": positions, "n_ctx": positions, "vocab_size": vocabulary,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "scale_attn_weights": True, "bos_token_id": 0, "eos_token_id": 0}


def llama(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads, "intermediate_size": wide, "vocab_size": vocabulary, "hidden_act": "silu",
            "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1,
            "eos_token_id": 2}


SHAPES = {
    "gpt2-124m": gpt2(768, 12, 12),
    "gpt2-350m": gpt2(1024, 24, 16),
    "llama-1.1b": llama(2048, 22, 32, 4, 5632),
    "tiny-gpt2": gpt2(64, 2, 2, 500, 256),
    "tiny-llama": llama(64, 2, 4, 2, 192, 500),
}


# ---- Hugging Face folders -----------------------------------------------------------------------------------
def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Hugging Face stores them: GPT-2's blocks hold (in, out), Llama's (out, in)."""
    if config["model_type"] == "gpt2":
        d = config["n_embd"]
        yield "transformer.wte.weight", (config["vocab_size"], d)
        yield "transformer.wpe.weight", (config["n_positions"], d)
        for i in range(config["n_layer"]):
            layer = f"transformer.h.{i}."
            for name, rows, columns in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d),
                                        ("mlp.c_proj", 4 * d, d)):
                yield f"{layer}{name}.weight", (rows, columns)
                yield f"{layer}{name}.bias", (columns,)
            for name in ("ln_1", "ln_2"):
                yield f"{layer}{name}.weight", (d,)
                yield f"{layer}{name}.bias", (d,)
        yield "transformer.ln_f.weight", (d,)
        yield "transformer.ln_f.bias", (d,)
        return
    d, wide = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows, columns in (("self_attn.q_proj", d, d), ("self_attn.k_proj", kv, d),
                                    ("self_attn.v_proj", kv, d), ("self_attn.o_proj", d, d),
                                    ("mlp.gate_proj", wide, d), ("mlp.up_proj", wide, d), ("mlp.down_proj", d, wide)):
            yield f"{layer}{name}.weight", (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (config["vocab_size"], d)


def parameters(config: dict[str, Any]) -> tuple[int, int]:
    """Weights of the blocks' linear layers, which every token meets, and of the head, which only scored tokens meet."""
    matrices = {name: shape[0] * shape[1] for name, shape in tensor_shapes(config) if len(shape) == 2}
    head = matrices.get("lm_head.weight", matrices.get("transformer.wte.weight", 0))
    return sum(size for name, size in matrices.items() if ".h." in name or ".layers." in name), head


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    values *= SPREAD
    if len(shape) == 1 and name.endswith("weight"):
        values += 1.0  # a norm
    return values.astype(np.float16)


def write_random(path: Path, config: dict[str, Any]) -> Path:
    """The model as a Hugging Face folder in float16; written once."""
    path.mkdir(parents=True, exist_ok=True)
    target = path / "model.safetensors"
    if target.exists():
        return path
    (path / "config.json").write_text(json.dumps(config, indent=1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensor_shapes(config):
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(5)
    partial = target.with_suffix(".tmp")
    with open(partial, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensor_shapes(config):
            random_tensor(name, shape, rng).tofile(f)
    os.replace(partial, target)
    return path


# ---- GGUF ---------------------------------------------------------------------------------------------------
GGUF_BYTES = {"q8_0": 34 / 32, "q4_0": 18 / 32, "q4_k": 144 / 256}  # per weight


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from Hugging Face's order (halves of a head rotate together) to ggml's (neighbours do)."""
    out, columns = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, columns).swapaxes(1, 2).reshape(out, columns)


def as_gguf(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """A tensor's float32 values in the layout that llama.cpp expects."""
    values = values.astype(np.float32)
    if config["model_type"] == "gpt2":
        return np.ascontiguousarray(values.T) if values.ndim == 2 and ".h." in name else values
    if name.endswith("q_proj.weight"):
        return rotated(values, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return rotated(values, config["num_key_value_heads"])
    return values


def random_q4_k(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Valid Q4_K blocks (256 weights: d and dmin as float16, 12 bytes of 6-bit scales and mins, 128 of codes).

    The package cannot encode them. w = d * scale * q - dmin * min with scale and min about 32 and q about 7.5.
    """
    rows, blocks = shape[0], shape[1] // 256
    out = rng.integers(0, 256, (rows, blocks, 144), dtype=np.uint8)
    d = np.float16(SPREAD / (32 * 4.6))
    out[:, :, 0:2] = np.frombuffer(d.tobytes(), np.uint8)
    out[:, :, 2:4] = np.frombuffer(np.float16(7.5 * d).tobytes(), np.uint8)
    return out.reshape(rows, blocks * 144)


def write_gguf(folder: Path, kind: str, target: Path) -> Path:
    """The folder's model with every matrix in one type (the position table and vectors in float32); written once."""
    if target.exists():
        return target
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    arch = gguf.MODEL_ARCH.GPT2 if config["model_type"] == "gpt2" else gguf.MODEL_ARCH.LLAMA
    layers = config.get("n_layer") or config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, layers)
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    partial = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config, gguf.LlamaFileType["MOSTLY_Q4_K_S" if kind == "q4_k" else f"MOSTLY_{kind.upper()}"])
    rng = np.random.default_rng(6)
    with safe_open(folder / "model.safetensors", framework="numpy") as f:
        for name in f.keys():  # noqa: SIM118  (it is no dict)
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            values = as_gguf(name, f.get_tensor(name), config)
            if values.ndim == 1 or name.endswith("wpe.weight"):
                writer.add_tensor(new, values)
            elif kind == "q4_k":
                writer.add_tensor(new, random_q4_k(values.shape, rng), raw_dtype=type_)
            else:
                writer.add_tensor(new, gguf.quants.quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)
    return target


def describe(writer: Any, config: dict[str, Any], file_type: Any) -> None:
    """The keys that llama.cpp needs to build the graph; there is no vocabulary, ids go in."""
    gpt2_like = config["model_type"] == "gpt2"
    hidden = config["n_embd"] if gpt2_like else config["hidden_size"]
    writer.add_file_type(file_type)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["n_layer"] if gpt2_like else config["num_hidden_layers"])
    writer.add_feed_forward_length(4 * hidden if gpt2_like else config["intermediate_size"])
    writer.add_head_count(config["n_head"] if gpt2_like else config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if gpt2_like:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])
