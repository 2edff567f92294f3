"""Tokens of long texts, most of which was encoded before: the messages of a conversation at each of its turns."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from hqlt.data import Tokenizer


class Encoder:
    """`Tokenizer.encode_prompt` without what the tokenizer puts around a text, and the latest pieces remembered.

    Where the tokenizer knows no pieces (bytes, and a text without special tokens), nothing is.

    max_bytes: what the pieces and their tokens may take; the least recently used go first. Several threads may call it
    at once; it encodes in one at a time, because a tokenizer has a state while it encodes.
    """

    def __init__(self, tokenizer: Tokenizer, max_bytes: int = 64 << 20) -> None:
        self.tokenizer, self.max_bytes = tokenizer, max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], NDArray[np.uint32]] = OrderedDict()
        """By salt and text, the least recently used first."""
        self._bytes = 0

    def __call__(self, text: str, salt: str = "") -> list[int]:
        """salt: whose text it is. How long it takes says nothing about the texts of others."""
        with self._lock:
            pieces = self.tokenizer.pieces(text)
            if len(pieces) == 1:
                return self.tokenizer.encode_prompt(text, add_special_tokens=False)
            return np.concatenate([self._encoded(piece, salt) for piece in pieces]).tolist()

    def _encoded(self, piece: str, salt: str) -> NDArray[np.uint32]:
        key = salt, piece
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        ids = np.array(self.tokenizer.encode_prompt(piece, add_special_tokens=False), dtype=np.uint32)
        self._known[key] = ids
        self._bytes += size(piece, ids)
        while self._bytes > self.max_bytes:
            (_, oldest), its = self._known.popitem(last=False)
            self._bytes -= size(oldest, its)
        return ids


def size(piece: str, ids: NDArray[np.uint32]) -> int:
    return piece.__sizeof__() + ids.nbytes
