"""The tokenizer of llama2.c's models: reader of its file, greedy byte-pair encoder, decoder. For tests only."""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from pathlib import Path

BOS, EOS, BYTES = 1, 2, 3  # ids 3 to 258 are the single bytes


class Tokenizer:
    """File: int32 longest piece; per id float32 score, int32 length, bytes (little-endian)."""

    def __init__(self, path: Path) -> None:
        data, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        self.ids: dict[bytes, int] = {}
        for i, piece in enumerate(self.pieces):
            self.ids.setdefault(piece, i)
        # Words can be encoded one by one where no piece has a space behind its first byte.
        assert not any(b" " in piece[1:] for piece in self.pieces[BYTES + 256 :])
        self._word = lru_cache(maxsize=None)(self._merge)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """A space goes before the text; then the pair of neighbours whose union scores best is joined, until there is none."""
        words = re.findall(r" [^ ]*", " " + text) if text else []
        return [BOS] * bos + [i for word in words for i in self._word(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        ids = []
        for character in word:
            data = character.encode()
            ids += [self.ids[data]] if data in self.ids else [BYTES + byte for byte in data]
        while True:
            best = None
            for i in range(len(ids) - 1):
                union = self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if union is not None and (best is None or self.scores[union] > self.scores[best[1]]):
                    best = i, union
            if best is None:
                return tuple(ids)
            ids[best[0] : best[0] + 2] = [best[1]]

    def decode(self, ids: list[int]) -> str:
        """Without the space that the encoder puts first."""
        out = b""
        for i in ids:
            piece = self.pieces[i]
            found = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
            out += bytes([int(found[1], 16)]) if found else b"" if i in (BOS, EOS) else piece
        return out.decode(errors="replace").removeprefix(" ")
