"""Network, what all models share; Model, an encoder read from a Hugging Face directory, run on packed tokens."""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..linear import Linear
from .blocks import Block, Embeddings, Packed, Table, Tap, pack
from .family import Dims, Family
from .sequence import Calls

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Model", "Network"]

_HEAD_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
}


class Network:
    """What encoders and decoders share: named parts, replacing them, saving, pickling.

    Attributes
    ----------
    config : dict, config.json as read
    path : Path of the directory that it was loaded from, absolute
    family : what the architecture is called and how its tensors are named
    dims : sizes read from the configuration
    linears : dict of module name (as in the checkpoint) -> Linear, in the order of the forward
    tensors : dict of tensor name -> embedding tables, weights of norms
    halves : dict of tensor name -> "F16" or "BF16", of the tensors that the checkpoint stores so
    scheme : what the linear layers were quantized with, or None
    recipe : the :class:`zquant.Recipe` that did it, or None
    """

    family: Any
    dims: Any
    path: Path
    recipe: Any = None
    transposed: frozenset[str] = frozenset()
    """Linear layers whose float weights the checkpoint stores (in, out)."""
    unlisted: tuple[str, ...] = ()
    """Linear layers that other implementations have under these names and that are not among ``linears``."""

    def __init__(self, family: Any, config: Mapping[str, Any], dims: Any, linears: Mapping[str, Linear],
                 tensors: Mapping[str, Table], *, path: Path, prefix: str = "", scheme: Any = None,
                 halves: Mapping[str, str] | None = None) -> None:
        self.family, self.config, self.dims = family, dict(config), dims
        self.linears, self.tensors = dict(linears), dict(tensors)
        # Absolute: tokenizer and eos_ids are read when first used, and save copies from there, wherever that happens.
        self.path, self.prefix, self.scheme = Path(path).absolute(), prefix, scheme
        self.halves = dict(halves or {})
        self._tokenizer: Any = None
        self._reset()

    def _reset(self) -> None:
        """Forget what is made when first used: packed weights and the like."""
        self._lock = threading.RLock()  # parts are made of parts

    # -- what it is made of

    def named_linears(self) -> Iterator[tuple[str, Linear]]:
        """(module name, Linear) in the order of the forward."""
        yield from self.linears.items()

    @property
    def embeddings(self) -> dict[str, Table]:
        """Embedding tables by tensor name; empty when the checkpoint has none."""
        return {name: self.tensors[name] for name in self.family.tables(self.dims, self.prefix) if name in self.tensors}

    @property
    def word_embeddings(self) -> Table | None:
        """The word embedding table (vocabulary, d): a float array, possibly memory-mapped, or a QTensor."""
        return self.tensors.get(self.prefix + self.family.embeddings["word"])

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they would be stored."""
        return (sum(layer.nbytes for layer in self.linears.values())
                + sum(t.nbytes for t in self.tensors.values()))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        count = sum(layer.shape[0] * layer.shape[1] + (0 if layer.bias is None else layer.shape[0])
                    for layer in self.linears.values())
        return count + sum(int(np.prod(t.shape)) for t in self.tensors.values())

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` of tokenizer.json as it is on disk, read when first used; None without that file."""
        if self._tokenizer is None and (self.path / "tokenizer.json").is_file():
            from ..tokenization import read_tokenizer

            self._tokenizer = read_tokenizer(self.path)
        return self._tokenizer

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the model as a Hugging Face directory; see :func:`zquant.saving.save`."""
        from ..saving import save

        return save(self, directory)

    def replace(self, linears: Mapping[str, Linear] | None = None, embeddings: Mapping[str, Table] | None = None,
                norms: Mapping[str, np.ndarray] | None = None, **attributes: Any) -> Self:
        """A new model with some linear layers, embedding tables or norms exchanged; everything else is shared.

        Parameters
        ----------
        linears : module name -> Linear of the same shape
        embeddings : tensor name -> embedding table of the same shape
        norms : tensor name -> weight or bias of a norm, of the same shape; held in float32
        attributes : ``scheme``, ``recipe``, ``path``, ``config``

        Raises
        ------
        ValueError
            Names that the model does not have, shapes that differ, NaN or Inf in a norm.

        >>> import numpy as np
        >>> import zquant as zq
        >>> from zquant.demo_model import find_minilm
        >>> model, name = zq.load(find_minilm()), "encoder.layer.0.output.LayerNorm.bias"
        >>> zeros = model.replace(norms={name: np.zeros(384)})
        >>> bool(zeros.tensors[name].any()), bool(model.tensors[name].any())
        (False, True)
        """
        linears, embeddings = dict(linears or {}), dict(embeddings or {})
        norms = {name: np.ascontiguousarray(value, np.float32) for name, value in (norms or {}).items()}
        tables = self.embeddings
        _same_shapes("linear layer", self.linears, linears)
        _same_shapes("embedding table", tables, embeddings)
        _same_shapes("norm", {name: value for name, value in self.tensors.items() if name not in tables}, norms)
        for name, value in norms.items():
            if not np.isfinite(value).all():
                raise ValueError(f"replace: {name}: NaN or Inf")
        known = {"scheme", "recipe", "path", "config"}
        if not attributes.keys() <= known:
            raise TypeError(f"replace() got {sorted(attributes.keys() - known)}; known: {sorted(known)}")
        model = object.__new__(type(self))
        model.__dict__.update(self.__dict__)
        if "path" in attributes:
            attributes["path"] = Path(attributes["path"]).absolute()
        model.__dict__.update({**attributes, "linears": {**self.linears, **linears},
                               "tensors": {**self.tensors, **embeddings, **norms}})
        model.config = dict(model.config)
        model._reset()
        return model

    def __repr__(self) -> str:
        d = self.dims
        if self.scheme is not None:
            kind = str(self.scheme) + ("" if self.recipe is None or self.recipe.name == "rtn" else f" by {self.recipe.name}")
        else:
            kind = "quantized" if any(layer.spec is not None for layer in self.linears.values()) else "float32"
        return (f"{self.family.name}({d.layers} layers, hidden {d.hidden}, {self._heads()}, "
                f"{self.parameters / 1e6:.1f} M parameters, {kind}, {self.nbytes / 1e6:.1f} MB)")

    def _heads(self) -> str:
        return f"{self.dims.heads} heads"

    def __getstate__(self) -> dict[str, Any]:
        """Packed weights, locks and the tokenizer stay behind; they are made again when first used."""
        return {name: value for name, value in self.__dict__.items()
                if name not in _TRANSIENT} | {"_tokenizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


_TRANSIENT = ("_lock", "_blocks", "_embeddings", "_parts", "_plain")


class Model(Network):
    """A Transformer encoder, float or quantized. Made by :func:`zquant.load` and :func:`zquant.quantize`.

    Calling it runs it. Models are immutable: :meth:`replace` returns a new one that shares what did not change. They may
    be called from several threads.

    Attributes
    ----------
    has_head : whether calling gives logits of a sequence classification head in place of hidden states

    Those of :class:`Network` besides.

    >>> import zquant as zq
    >>> from zquant.demo_model import find_minilm
    >>> model = zq.load(find_minilm())
    >>> model([[101, 7592, 102], [101, 102]]).shape
    (2, 3, 384)
    """

    def __init__(self, family: Family, config: Mapping[str, Any], dims: Dims, linears: Mapping[str, Linear],
                 tensors: Mapping[str, Table], *, path: Path, prefix: str = "", has_head: bool = False,
                 scheme: Any = None, halves: Mapping[str, str] | None = None) -> None:
        self.has_head = has_head
        super().__init__(family, config, dims, linears, tensors, path=path, prefix=prefix, scheme=scheme, halves=halves)

    def _reset(self) -> None:
        super()._reset()
        self._blocks: list[Block | None] = [None] * self.dims.layers
        self._embeddings: Embeddings | None = None
        self._plain: Callable[..., np.ndarray] | None = None

    @property
    def max_length(self) -> int:
        """Tokens in the longest sequence that the position table allows."""
        if self.prefix + self.family.embeddings["position"] not in self.tensors:
            return self.dims.max_positions
        first = self.family.positions(None, np.zeros(1, np.int64), np.zeros(1, np.int64), self.dims.pad)
        return self.dims.max_positions - int(first[0])

    # -- running it

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, *,
                 embeddings: Any = None, tap: Tap | None = None) -> np.ndarray:
        """Last hidden states, or logits with a sequence classification head.

        Parameters
        ----------
        input_ids
            (B, T) integers, or a list of B sequences of any lengths (no padding needed).
        attention_mask
            Zeros and ones, laid out as ``input_ids``; default ones. Tokens whose mask is 0 are not computed.
        token_type_ids
            Laid out as ``input_ids``; default zeros.
        embeddings
            (B, T, d) float output of the embedding layer, in place of ``input_ids``. (Hugging Face's ``inputs_embeds``
            are word embeddings before the sum and the normalisation: something else.)
        tap
            Called as ``tap(module name, input (tokens, k), output (tokens, n))`` for every linear layer and micro-batch,
            in float32. Results are the same with and without.

        Returns
        -------
        numpy.ndarray
            (B, T, d) float32, zeros where the mask is 0 and past a sequence's end; or (B, labels) float32 logits, from
            the first token of each sequence whose mask is 1.

        Raises
        ------
        ValueError
            Ids, types or positions outside their tables; shapes that differ; NaN or Inf in weights, naming the tensor.
        """
        packed = self.pack(input_ids, attention_mask, token_type_ids, embeddings=embeddings)
        if not self.has_head:
            return packed.scatter(self.hidden(packed, tap))
        lengths = np.diff(packed.offsets)
        if not lengths.all():
            raise ValueError(f"sequence {int(np.argmin(lengths))} has no token to classify")
        return self._classify(self.hidden(packed, tap)[packed.offsets[:-1]], tap)

    def hidden_states(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, *,
                      embeddings: Any = None, tap: Tap | None = None) -> np.ndarray:
        """Last hidden states (B, T, d), also of a model with a head; arguments as for calling the model."""
        packed = self.pack(input_ids, attention_mask, token_type_ids, embeddings=embeddings)
        return packed.scatter(self.hidden(packed, tap))

    def pooled(self, hidden: np.ndarray) -> np.ndarray:
        """BERT's pooler: tanh(dense(first token)) of hidden states (B, T, d), as (B, d).

        Raises
        ------
        ValueError
            The checkpoint has no pooler.
        """
        name = self.prefix + (self.family.pooler or "")
        if self.family.pooler is None or name not in self.linears:
            raise ValueError(f"{self!r} has no pooler")
        return np.tanh(self.linears[name](np.ascontiguousarray(hidden[:, 0], np.float32)))

    def pack(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, *,
             embeddings: Any = None) -> Packed:
        """The batch as the forward wants it, checked against the tables."""
        packed = pack(input_ids, attention_mask, token_type_ids, positions=self.family.positions, pad=self.dims.pad,
                      embeddings=embeddings)
        if packed.embedded is None:
            self._embedder().check(packed)
        elif packed.embedded.shape[1] != self.dims.hidden:
            raise ValueError(f"embeddings: expected {self.dims.hidden} features, got {packed.embedded.shape[1]}")
        return packed

    def hidden(self, packed: Packed, tap: Tap | None = None) -> np.ndarray:
        """Last hidden states (tokens, d) of a packed batch."""
        parts = [hidden for _, _, hidden in self.stream(packed, tap)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.dims.hidden), np.float32)

    def stream(self, packed: Packed, tap: Tap | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
        """Micro-batch by micro-batch: (first sequence, last + 1, hidden states (tokens, d)). Each sequence's numbers do
        not depend on what shares its micro-batch."""
        for start, stop in packed.chunks():
            first, last = packed.offsets[start], packed.offsets[stop]
            if first == last:
                yield start, stop, np.empty((0, self.dims.hidden), np.float32)
                continue
            yield start, stop, self._run(packed, int(first), int(last), packed.offsets[start:stop + 1] - first, tap)

    def _run(self, packed: Packed, first: int, last: int, offsets: np.ndarray, tap: Tap | None) -> np.ndarray:
        blocks = [block or self._block(i) for i, block in enumerate(self._blocks)]
        wanted = [block.quant_in for block in blocks] + [0]
        if packed.embedded is None:
            x, codes = self._embedder()(packed, first, last, wanted[0])
        else:
            x, codes = packed.embedded[first:last], None
        if tap is None:
            return (self._plain or self._make_plain(blocks))(x, x if codes is None else codes, offsets) if blocks else x
        for block, quant in zip(blocks, wanted[1:]):
            try:
                x, codes = block.tapped(x, codes, offsets, quant, tap)
            except ValueError as error:
                raise ValueError(f"{block.names['block']}: {error}") from None
        return x

    def _make_plain(self, blocks: list[Block]) -> Callable[..., np.ndarray]:
        """All blocks as one sequence of kernels, a function of hidden states, what the first layer is given for them, and
        offsets. For short sequences a kernel takes tens of microseconds, and every Python call around it shows."""
        calls = Calls()
        x, given, offsets = calls.input(), calls.input(), calls.input()
        for block, following in zip(blocks, [*blocks[1:], None]):
            x, given = block.add(calls, x, given, offsets, 0 if following is None else following.quant_in)
        self._plain = calls.bind()
        return self._plain

    def _classify(self, first: np.ndarray, tap: Tap | None) -> np.ndarray:
        head = self.family.head
        dense = self.linears[(self.prefix if head.dense_in_base else "") + head.dense]
        out = self.linears[head.out]
        middle = cast(np.ndarray, dense(first))
        active = _HEAD_ACTIVATIONS[head.activation](middle)
        logits = cast(np.ndarray, out(active))
        if tap is not None:
            tap(dense.name, first, middle)
            tap(out.name, active, logits)
        return logits

    # -- parts that are made when first used

    def _embedder(self) -> Embeddings:
        if self._embeddings is None:
            names = {role: self.prefix + name for role, name in self.family.embeddings.items() if role != "norm"}
            if names["word"] not in self.tensors:
                raise ValueError(f"{self!r} was loaded without embeddings: pass embeddings=, not input_ids")
            tables = {role: self.tensors[name] for role, name in names.items() if name in self.tensors}
            norm = self._norm(self.prefix + self.family.embeddings["norm"])
            self._embeddings = Embeddings(names, tables, norm, self.dims.eps)
        return self._embeddings

    def _block(self, index: int) -> Block:
        with self._lock:
            block = self._blocks[index]
            if block is None:
                prefix = self.prefix + self.family.layer.format(index)
                names = {role: prefix + name for role, name in self.family.block.items()}
                linears = {role: self.linears[name] for role, name in names.items() if name in self.linears}
                norms = {role: self._norm(names[role]) for role in ("attention_norm", "output_norm")}
                block = Block({**names, "block": prefix.rstrip(".")}, linears, norms, self.dims.heads,
                              self.dims.activation, self.dims.eps,
                              self.scheme is not None and self.scheme.int8_attention)
                self._blocks[index] = block
            return block

    def _norm(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        return cast(np.ndarray, self.tensors[module + ".weight"]), cast(np.ndarray, self.tensors[module + ".bias"])

    def _heads(self) -> str:
        return super()._heads() + (f", {self.dims.labels} labels" if self.has_head else "")


def _same_shapes(what: str, have: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    unknown = sorted(new.keys() - have.keys())
    if unknown:
        raise ValueError(f"replace: no such {what}: {', '.join(unknown)}")
    for name, value in new.items():
        old = tuple(have[name].shape)
        got = tuple(value.shape)
        if got != old:
            raise ValueError(f"replace: {name}: expected shape {old}, got {got}")
