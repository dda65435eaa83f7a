"""CausalLM: a decoder read from a Hugging Face directory, run on packed tokens over a key-value cache."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from .. import _core
from ..cache import KVCache
from ..checks import as_count
from ..spec import QuantSpec
from .base import Network
from .blocks import Packed, Table, Tap, pack, rows
from .decoder_blocks import DecoderBlock, Head, Norm, Projection, add_rows
from .decoder_family import Architecture, DecoderFamily
from .family import column_positions
from .sequence import Calls, Register

__all__ = ["CHUNK", "CausalLM"]

CHUNK = 512  # tokens that go through the model together, which bounds the memory of a long prompt


def _one_each(input_ids: Any) -> list[int] | None:
    """The ids of a batch of sequences of one token each, or None if it is something else.

    >>> _one_each([[3], [5]]), _one_each(np.array([[7]])), _one_each([[3, 4]]), _one_each([[0.5]])
    ([3, 5], [7], None, None)
    """
    if isinstance(input_ids, np.ndarray):
        plain = input_ids.ndim == 2 and input_ids.shape[1] == 1 and input_ids.dtype.kind in "iu"
        return input_ids[:, 0].tolist() if plain else None
    lists = (list, tuple)
    if not isinstance(input_ids, lists) or not all(isinstance(row, lists) and len(row) == 1 for row in input_ids):
        return None
    ids = [row[0] for row in input_ids]
    return ids if all(type(token) is int for token in ids) else None


class CausalLM(Network):
    """A Transformer decoder with a language-model head, float or quantized. Made by :func:`zquant.load` and
    :func:`zquant.quantize`.

    Calling it gives logits. Models are immutable: :meth:`replace` returns a new one that shares what did not change. They
    may be called from several threads, each with its own cache.

    Attributes are those of :class:`Network`; ``dims`` is an :class:`Architecture`. A head that is tied to the embedding
    table is not among ``linears``: it is float or int8 as the table is, and where that is int8 it reads 8-bit tokens if
    the other layers do.

    >>> from pathlib import Path
    >>> import zquant as zq
    >>> lm = zq.load(Path(zq.__file__).parents[1] / "tests" / "data" / "tiny-llama-5m")
    >>> cache = lm.new_cache(batch=2, dtype="int8")
    >>> lm([[5, 6, 7], [8]], cache=cache, logits="last").shape, cache.lengths
    ((2, 4096), array([3, 1]))
    >>> lm([[9], [9]], cache=cache, logits="last").shape, cache.lengths
    ((2, 4096), array([4, 2]))
    """

    family: DecoderFamily
    dims: Architecture

    def _reset(self) -> None:
        super()._reset()
        self._parts: dict[Any, Any] = {}

    # -- what it is

    @property
    def transposed(self) -> frozenset[str]:  # type: ignore[override]
        """Linear layers whose float weights the checkpoint stores (in, out): GPT-2's."""
        return self.family.transposed(self.dims, self.prefix)

    @property
    def unlisted(self) -> tuple[str, ...]:  # type: ignore[override]
        """The head, where it is the embedding table; and, where it is float, "lm_head": what some call it in every family."""
        head = self.linears.get(self.family.head)
        names = dict.fromkeys([self.family.head, "lm_head"] if head is None or head.spec is None else [])
        return tuple(name for name in names if name not in self.linears)

    @property
    def max_positions(self) -> int:
        """Tokens in the longest sequence."""
        return self.dims.max_positions

    @property
    def max_length(self) -> int:
        """The same, under the name that encoders have for it."""
        return self.dims.max_positions

    @property
    def vocabulary(self) -> int:
        """Token ids are 0..vocabulary - 1."""
        return self.dims.vocabulary

    @property
    def bos_id(self) -> int | None:
        """The id that texts begin with, where config.json has one."""
        return self.config.get("bos_token_id")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's where it has any, else config.json's; may be empty."""
        from . import read_config

        found = None
        if (self.path / "generation_config.json").is_file():
            found = read_config(self.path, "generation_config.json").get("eos_token_id")
        found = self.config.get("eos_token_id") if found is None else found
        return () if found is None else tuple(found) if isinstance(found, list) else (found,)

    def new_cache(self, batch: int = 1, dtype: str = "float32") -> KVCache:
        """An empty cache for a batch of sequences: a :class:`zquant.KVCache` of this model's sizes.

        Parameters
        ----------
        batch
            Number of sequences.
        dtype
            "float32", or "int8": a quarter of the memory, one scale per token and head.

        Raises
        ------
        ValueError
            ``batch`` is not an integer of 0 or more, or the dtype is unknown.
        """
        a = self.dims
        return KVCache(a.layers, a.kv_heads, a.head_dim, as_count("batch", batch, 0), dtype)

    # -- running it

    def __call__(self, input_ids: Any, attention_mask: Any = None, cache: KVCache | None = None, *, logits: str = "all",
                 tap: Tap | None = None, chunk: int = CHUNK) -> np.ndarray:
        """Logits of the next token.

        Parameters
        ----------
        input_ids
            (B, T) integers, or a list of B sequences of any lengths (no padding needed).
        attention_mask
            Zeros and ones, laid out as ``input_ids``: padding on the left or on the right of each sequence. Padding is
            not computed, and does not count as positions.
        cache
            What came before; the new tokens are appended. None starts anew and keeps nothing.
        logits
            "all", or "last" for those after each sequence's last token only.
        tap
            Called as ``tap(module name, input (tokens, k), output (tokens, n))`` for every linear layer and chunk, in
            float32. Results are the same with and without.
        chunk
            Tokens that are computed together; it bounds the memory. Results do not depend on it.

        Returns
        -------
        numpy.ndarray
            (B, T, V) float32, zeros where the mask is 0 and past a sequence's end; or (B, V) for "last".

        Raises
        ------
        ValueError
            Ids outside the vocabulary; sequences that are empty or longer than the model's positions; a mask with holes;
            a cache of other sizes or of another batch; NaN or Inf in weights or logits, naming the layer. The cache is then
            as it was.
        TypeError
            A cache that is not a :class:`zquant.KVCache`.
        """
        if logits not in ("all", "last"):
            raise ValueError(f"logits: expected 'all' or 'last', got {logits!r}")
        if logits == "last" and cache is not None and attention_mask is None and tap is None and chunk == CHUNK:
            found = self._step(input_ids, cache)
            if found is not None:
                return found
        packed = self.pack(input_ids, attention_mask)
        if logits == "last":
            return self._last(packed, cache, tap, chunk)
        slots, size = packed.slots, packed.shape[0] * packed.shape[1]
        flat = np.zeros((size, self.dims.vocabulary), np.float32)  # pages of zeros cost nothing until they are written
        for start, stop, part in self.stream(packed, cache, tap, chunk):
            if slots is None and stop - start == size:
                flat = part
            else:
                flat[slice(start, stop) if slots is None else slots[start:stop]] = part
        return flat.reshape(*packed.shape, self.dims.vocabulary)

    def _step(self, input_ids: Any, cache: KVCache) -> np.ndarray | None:
        """What _last gives for one more token of each sequence, with a fraction of its Python. None where anything is out
        of the ordinary, errors included: the long way then decides."""
        ids = _one_each(input_ids)
        rope = self.dims.rope
        if not ids or not 0 <= min(ids) <= max(ids) < self.dims.vocabulary or len(ids) > CHUNK:
            return None
        self._fitting(cache, len(ids))
        before = cache.lengths
        longest = max(before.tolist()) + 1
        if longest > self.max_positions or (rope is not None and rope.depends_on_length(longest)):
            return None
        try:
            return self._run(np.array(ids), before, cache.one_each, cache, longest, None)
        except (Exception, KeyboardInterrupt):
            cache.restore(before)
            raise

    def _last(self, packed: Packed, cache: KVCache | None, tap: Tap | None, chunk: int) -> np.ndarray:
        """(B, V) logits after the last token of each sequence; the last block and the head compute no others."""
        parts = [part for _, _, part in self._forward(packed, cache, tap, chunk, packed.offsets[1:] - 1)]
        return np.concatenate(parts) if parts else np.empty((0, self.dims.vocabulary), np.float32)

    def stream(self, packed: Packed, cache: KVCache | None = None, tap: Tap | None = None,
               chunk: int = CHUNK) -> Iterator[tuple[int, int, np.ndarray]]:
        """Chunk by chunk: (first token, last + 1, logits (tokens, V)), counted over the packed batch; never all at once."""
        return self._forward(packed, cache, tap, chunk)

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt; see :func:`zquant.generate.generate`."""
        from ..generate import generate

        return generate(self, prompt, **options)

    def pack(self, input_ids: Any, attention_mask: Any = None) -> Packed:
        """The batch end to end, without padding, checked against the vocabulary."""
        packed = pack(input_ids, attention_mask, positions=column_positions, pad=0)
        ids, count = cast(np.ndarray, packed.ids), self.dims.vocabulary
        if len(ids) and not (0 <= ids.min() and ids.max() < count):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"input_ids: {bad} is outside 0..{count - 1}")
        lengths = np.diff(packed.offsets)
        if not lengths.all():
            raise ValueError(f"input_ids: sequence {int(np.argmin(lengths))} is empty; a prompt needs at least one token")
        if attention_mask is None:
            return packed
        first = np.repeat(packed.positions[packed.offsets[:-1]], lengths)
        index = np.arange(len(ids)) - np.repeat(packed.offsets[:-1], lengths)
        holes = np.flatnonzero(packed.positions != first + index)
        if len(holes):
            sequence = int(np.searchsorted(packed.offsets, holes[0], side="right")) - 1
            raise ValueError(f"attention_mask: sequence {sequence} has a hole before column {packed.positions[holes[0]]}; "
                             "padding goes to the left or to the right of a sequence")
        return packed

    def _forward(self, packed: Packed, cache: KVCache | None, tap: Tap | None, chunk: int,
                 wanted: np.ndarray | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
        """Chunk by chunk (start, stop, logits of all its tokens, or of those that are ``wanted``: indices of the packed batch
        that rise). If anything fails, the cache is as it was."""
        chunk = as_count("chunk", chunk, 1)
        cache = self.new_cache(packed.shape[0]) if cache is None else self._fitting(cache, packed.shape[0])
        before = cache.lengths
        totals = before + np.diff(packed.offsets)
        if len(totals) and totals.max() > self.max_positions:
            worst = int(np.argmax(totals))
            raise ValueError(f"input_ids: sequence {worst} has {totals[worst]} tokens; the model has {self.max_positions} "
                             "positions")
        ids = cast(np.ndarray, packed.ids)
        positions = np.arange(len(ids)) + np.repeat(before - packed.offsets[:-1], np.diff(packed.offsets))
        try:
            for start, stop, length in self._pieces(packed.offsets, totals, chunk):
                offsets = packed.offsets
                if stop - start < len(ids):
                    offsets = np.clip(offsets, start, stop) - start
                here = None if wanted is None else wanted[(wanted >= start) & (wanted < stop)] - start
                yield start, stop, self._run(ids[start:stop], positions[start:stop], offsets, cache, length, tap, here)
        except (Exception, KeyboardInterrupt):
            cache.restore(before)
            raise

    def _fitting(self, cache: KVCache, batch: int) -> KVCache:
        a, b = cache, self.dims
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a zquant.KVCache, as new_cache() makes it, got {type(cache).__name__}")
        if (a.layers, a.kv_heads, a.head_dim) != (b.layers, b.kv_heads, b.head_dim):
            raise ValueError(f"cache: of a model with {a.layers} layers, {a.kv_heads} key-value heads of {a.head_dim}; "
                             f"this one has {b.layers}, {b.kv_heads} of {b.head_dim}")
        if cache.sequences != batch:
            raise ValueError(f"cache: has {cache.sequences} sequences, the batch {batch}")
        return cache

    def _pieces(self, offsets: np.ndarray, totals: np.ndarray, chunk: int) -> Iterator[tuple[int, int, int]]:
        """Ranges of at most ``chunk`` tokens, and the length that decides about the rotation: that of the sequence where
        it matters, so that no sequence depends on its neighbours."""
        own = self.dims.rope is not None and any(self.dims.rope.depends_on_length(int(total)) for total in totals)
        spans = zip(offsets[:-1], offsets[1:], totals) if own else [(0, offsets[-1], totals.max(initial=0))]
        for first, last, length in spans:
            for start in range(int(first), int(last), chunk):
                yield start, min(start + chunk, int(last)), int(length)

    def _run(self, ids: np.ndarray, positions: np.ndarray, offsets: np.ndarray, cache: KVCache, length: int,
             tap: Tap | None, wanted: np.ndarray | None = None) -> np.ndarray:
        """Logits of all tokens, or of the wanted rows. With a tap every layer sees all of them."""
        rope = self.dims.rope
        rotation = (None, None) if rope is None else rope.tables(length, length)
        if tap is None:
            plain = self._part(("plain", wanted is not None), self._make_plain, wanted is not None)
            try:
                return plain(ids, positions, cache.handle, offsets, *rotation, *(() if wanted is None else (wanted,)))
            except ValueError:
                self._embed(ids, positions, None)  # names the row, if one of the table is to blame
                raise
        x = self._embed(ids, positions, tap)
        for block in self._part("blocks", self._make_blocks):
            try:
                x = block(x, cache.handle, offsets, rotation, tap)
            except ValueError as error:
                raise ValueError(f"{block.name}: {error}") from None
        x = x if wanted is None else x[wanted]
        return self._logits(x, tap) if len(x) else np.empty((0, self.dims.vocabulary), np.float32)

    def _embed(self, ids: np.ndarray, positions: np.ndarray, tap: Tap | None) -> np.ndarray:
        a, names = self.dims, self.family.embeddings
        x = rows(self.tensors[self.prefix + names["word"]], ids)
        try:
            _core.check_finite(x, "x")
        except ValueError:
            row = ids[~np.isfinite(x).all(1)][0]
            raise ValueError(f"{self.prefix}{names['word']}, row {row}: NaN or Inf") from None
        if a.embedding != a.hidden:
            x = self._part("project_in", self._make_projection, "project_in")(x, tap)
        if a.position_rows:
            index = positions + a.position_offset if a.position_offset else positions
            x = x + rows(self.tensors[self.prefix + names["position"]], index)
        return x

    def _logits(self, x: np.ndarray, tap: Tap) -> np.ndarray:
        a = self.dims
        head: Head = self._part("head", self._make_head)
        if a.final_norm:
            name = self.prefix + self.family.outer["final_norm"]
            try:
                x = self._norm(name)(x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if a.embedding != a.hidden:
            x = self._part("project_out", self._make_projection, "project_out")(x, tap)
        return head(x, tap if not a.tied else None)

    # -- parts that are made when first used

    def _part(self, key: Any, make: Any, *arguments: Any) -> Any:
        part = self._parts.get(key)
        if part is None:
            with self._lock:
                part = self._parts.get(key)
                if part is None:
                    part = self._parts[key] = make(*arguments)
        return part

    def _make_blocks(self) -> list[DecoderBlock]:
        return [self._make_block(i) for i in range(self.dims.layers)]

    def _make_block(self, index: int) -> DecoderBlock:
        prefix, a, names = self.prefix + self.family.layer.format(index), self.dims, self.family.block
        linears = {role: self.linears[prefix + names[role]] for role in a.block_linears()}
        roles = ("attention_norm", "mlp_norm") + (("q_norm", "k_norm") if a.qk_norm else ())
        norms = {role: self._norm(prefix + names[role]) for role in roles}
        return DecoderBlock(prefix.rstrip("."), a, index, linears, norms)

    def _make_plain(self, only_wanted: bool) -> Callable[..., np.ndarray]:
        """What _run does without a tap, as one sequence of kernels. When one token is decoded a kernel takes tens of
        microseconds, and every Python call around it shows."""
        calls = Calls()
        ids, positions, cache, offsets, cos, sin = (calls.input() for _ in range(6))
        wanted = calls.input() if only_wanted else None
        x = self._add_embedding(calls, ids, positions)
        blocks = self._part("blocks", self._make_blocks)
        for block in blocks:
            x = block.add(calls, x, cache, offsets, (cos, sin), wanted if block is blocks[-1] else None)
        head, widened = self._part("head", self._make_head), self.dims.embedding != self.dims.hidden
        if self.dims.final_norm:
            calls.part = self.prefix + self.family.outer["final_norm"]
            x = self._norm(calls.part).add(calls, x, 0 if widened else head.mode)
        if widened:
            x = self._part("project_out", self._make_projection, "project_out").add(calls, x)
        head.add(calls, x)
        return calls.bind()

    def _add_embedding(self, calls: Calls, ids: Register, positions: Register) -> Register:
        """Calls that do what _embed does without a tap."""
        a, names = self.dims, self.family.embeddings
        calls.part = self.prefix + names["word"]
        x = calls.add(_core.check_finite, add_rows(calls, self.tensors[calls.part], ids), "x")
        if a.embedding != a.hidden:
            x = self._part("project_in", self._make_projection, "project_in").add(calls, x)
        if a.position_rows:
            index = calls.add(np.add, positions, a.position_offset) if a.position_offset else positions
            x = calls.add(np.add, x, add_rows(calls, self.tensors[self.prefix + names["position"]], index))
        return x

    def _make_projection(self, role: str) -> Projection:
        return Projection([self.linears[self.prefix + self.family.outer[role]]])

    def _norm(self, module: str) -> Norm:
        weight, bias = self.tensors[module + ".weight"], self.tensors.get(module + ".bias")
        return Norm(cast(np.ndarray, weight), cast("np.ndarray | None", bias), self.dims.eps)

    def _make_head(self) -> Head:
        name = self.family.head
        if not self.dims.tied:
            return Head(name, self.linears[name], None)
        return Head(name, cast(Table, self.word_embeddings), self._head_activations())

    def _head_activations(self) -> QuantSpec | None:
        """How a head that is an int8 table reads its input: as the other integer layers do, but per token always, since
        nothing has calibrated it."""
        found = next((layer.activations for layer in self.linears.values() if layer.activations is not None), None)
        return found and found.replace(granularity="token", dynamic=True)

    def _heads(self) -> str:
        a = self.dims
        grouped = f" ({a.kv_heads} key-value)" if a.kv_heads != a.heads else ""
        return f"{a.heads} heads{grouped}, {'tied' if a.tied else 'own'} head"
