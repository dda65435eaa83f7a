"""A small model in NumPy with the interface that reports use: linear layers, tap, encode. No kernels, no files."""

from __future__ import annotations

import numpy as np


class Linear:
    def __init__(self, name, weight, spec=None):
        self.name, self.weight, self.spec, self.shape = name, weight, spec, weight.shape
        self.nbytes = weight.nbytes if spec is None else weight.size

    def dense(self):
        return self.weight


class Model:
    """Two blocks of x + w2 tanh(w1 x) on embedded tokens; ``rows`` tokens per micro-batch, as the real models do."""

    names = [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("intermediate.dense", "output.dense")]

    def __init__(self, linears, scheme=None, rows=5):
        self.linears, self.scheme, self.rows = linears, scheme, rows
        self.table = np.random.default_rng(9).normal(size=(300, 8)).astype(np.float32)
        self.calls = 0

    @classmethod
    def make(cls, seed=0, **options):
        rng = np.random.default_rng(seed)
        shapes = [(12, 8), (8, 12)] * 2
        return cls(
            {n: Linear(n, rng.normal(size=s).astype(np.float32) * 0.2) for n, s in zip(cls.names, shapes)}, **options
        )

    def quantized(self, step=1 / 64, names=None):
        """Weights rounded to a grid, in all layers or in those named."""
        linears = dict(self.linears)
        for n in names or self.names:
            linears[n] = Linear(
                n, (np.round(linears[n].weight / step) * step).astype(np.float32), spec="int8, per channel"
            )
        linears["pooler.dense"] = linears.get("pooler.dense", Linear("pooler.dense", np.ones((8, 8), np.float32)))
        self.linears.setdefault("pooler.dense", linears["pooler.dense"])
        return Model(linears, scheme="w8a8", rows=self.rows)

    @property
    def nbytes(self):
        return sum(layer.nbytes for layer in self.linears.values())

    def named_linears(self):
        yield from self.linears.items()

    def _apply(self, name, x, tap):
        y = x @ self.linears[name].weight.T
        if tap is not None:
            tap(name, x, y)
        return y

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, *, tap=None):
        self.calls += 1
        lengths = [len(row) for row in input_ids]
        flat = self.table[np.concatenate([np.asarray(row, int) for row in input_ids])]
        out = np.concatenate([self._chunk(flat[i : i + self.rows], tap) for i in range(0, len(flat), self.rows)])
        hidden = np.zeros((len(lengths), max(lengths), 8), np.float32)
        for row, part in zip(hidden, np.split(out, np.cumsum(lengths)[:-1])):
            row[: len(part)] = part
        return hidden

    def _chunk(self, x, tap):
        for i in range(2):
            wide = np.tanh(self._apply(self.names[2 * i], x, tap))
            x = x + self._apply(self.names[2 * i + 1], wide, tap)
        return x


class Encoder:
    """Mean of the hidden states; a token is a letter."""

    def __init__(self, model):
        self.model = model

    def tokenize(self, sentences):
        return [[ord(c) % 300 for c in s] for s in sentences]

    def encode(self, sentences, batch_size=32, show_progress_bar=False):
        ids = self.tokenize(sentences)
        return np.stack([self.model([row])[0].mean(axis=0) for row in ids])
