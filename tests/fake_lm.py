"""A language model without weights, with the interface that generation and perplexity use. Its tokens are bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fakes import Linear

BOS, EOS, VOCABULARY = 256, 257, 260


class Tokenizer:
    """Token ids are bytes; 256 and 257 are special and decode to nothing, as does what is not a byte."""

    truncation = padding = None

    def encode(self, text, add_special_tokens=True):
        return SimpleNamespace(ids=list(text.encode()))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_to_id(self, text):
        return {"<bos>": BOS, "<eos>": EOS}.get(text)


class Cache:
    def __init__(self, rows, dtype):
        self.rows, self.dtype = rows, dtype

    def select(self, index):
        return Cache([list(self.rows[i]) for i in index], self.dtype)


class LM:
    """Logits are a function of all tokens before: random ones seeded by them, or ``follow(history)`` names the next."""

    vocabulary, max_positions, eos_ids, bos_id = VOCABULARY, 64, (EOS,), BOS

    def __init__(self, follow=None, tokenizer=True, noise=0.0):
        self.follow, self.tokenizer, self.noise = follow, Tokenizer() if tokenizer else None, noise
        self.path, self.calls, self.chunks, self.caches = Path("fake"), [], [], []
        rng = np.random.default_rng(5)
        self.linears = {
            f"model.layers.{i}.mlp.{n}": Linear(f"model.layers.{i}.mlp.{n}", rng.normal(size=(6, 4)).astype(np.float32))
            for i in range(2)
            for n in ("up_proj", "down_proj")
        }
        self.scheme = None

    def quantized(self, noise=0.3):
        other = LM(self.follow, self.tokenizer is not None, noise)
        for name, layer in self.linears.items():
            weight = (np.round(layer.weight * 8) / 8).astype(np.float32)
            other.linears[name] = Linear(name, weight, spec="int8, per channel")
        other.scheme = "w8a8"
        return other

    def named_linears(self):
        yield from self.linears.items()

    @property
    def nbytes(self):
        return sum(layer.nbytes for layer in self.linears.values())

    def new_cache(self, batch=1, dtype="float32"):
        self.caches.append(dtype)
        return Cache([[] for _ in range(batch)], dtype)

    def row(self, history):
        if self.follow is not None:
            out = np.zeros(VOCABULARY, np.float32)
            out[self.follow(history)] = 20.0
            return out
        out = np.random.default_rng(history).normal(0, 2, VOCABULARY)
        if self.noise:
            out += self.noise * np.random.default_rng([7, *history]).normal(size=VOCABULARY)
        return out.astype(np.float32)

    def pack(self, rows):
        lengths = [len(row) for row in rows]
        return SimpleNamespace(ids=np.concatenate(rows), offsets=np.concatenate([[0], np.cumsum(lengths)]))

    def stream(self, packed, cache=None, tap=None, chunk=512):
        self.chunks.append(chunk)
        ids, offsets = packed.ids, packed.offsets
        cache = self.new_cache(len(offsets) - 1) if cache is None else cache
        rows, sequence = [], 0
        for i, token in enumerate(ids):
            while i >= offsets[sequence + 1]:
                sequence += 1
            cache.rows[sequence].append(int(token))
            assert len(cache.rows[sequence]) <= self.max_positions
            rows.append(self.row(cache.rows[sequence]))
        for start in range(0, len(ids), chunk):
            part = np.stack(rows[start : start + chunk])
            for name, layer in self.linears.items() if tap else ():
                x = part[:, :4] if name.endswith("up_proj") else part[:, 4:8]
                tap(name, x, x @ layer.weight.T)
            yield start, start + len(part), part

    def __call__(self, ids, attention_mask=None, cache=None, *, logits="all", tap=None, chunk=512):
        ids = [list(map(int, row)) for row in ids]
        self.calls.append([len(row) for row in ids])
        packed = self.pack(ids)
        flat = np.concatenate([part for *_, part in self.stream(packed, cache, tap, chunk)])
        if logits == "last":
            return flat[packed.offsets[1:] - 1]
        out = np.zeros((len(ids), max(map(len, ids)), VOCABULARY), np.float32)
        for row, a, b in zip(out, packed.offsets, packed.offsets[1:]):
            row[: b - a] = flat[a:b]
        return out
