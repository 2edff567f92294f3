"""Encoding of long texts most of which was encoded before, such as the messages of a conversation at every turn."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from hqlt.data import Tokenizer


class CachedEncoder:
    """`Tokenizer.encode_prompt` without the special tokens around a text, with a cache of recently encoded pieces.

    The pieces are those of `Tokenizer.pieces`. A text of a single piece (bytes, or a text without special tokens) is
    not cached. Thread-safe; one thread encodes at a time, because a tokenizer has state while it encodes.

    Args:
        tokenizer: the tokenizer.
        max_bytes: maximum size of the cached pieces and their tokens; the least recently used are evicted.
    """

    def __init__(self, tokenizer: Tokenizer, max_bytes: int = 64 << 20) -> None:
        self.tokenizer, self.max_bytes = tokenizer, max_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], NDArray[np.uint32]] = OrderedDict()
        """By salt and text, least recently used first."""
        self._bytes = 0

    def __call__(self, text: str, salt: str = "") -> list[int]:
        """Encode a text. Pieces are shared only within one salt, so that timing reveals nothing about other users."""
        with self._lock:
            pieces = self.tokenizer.split_prompt(text)
            if len(pieces) == 1:
                return self.tokenizer.encode_prompt(text, add_special_tokens=False)
            return np.concatenate([self._encoded(piece, salt) for piece in pieces]).tolist()

    def _encoded(self, piece: str, salt: str) -> NDArray[np.uint32]:
        key = salt, piece
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        ids = np.array(self.tokenizer.encode_prompt(piece, add_special_tokens=False), dtype=np.uint32)
        self._cache[key] = ids
        self._bytes += entry_bytes(piece, ids)
        while self._bytes > self.max_bytes:
            (_, oldest), oldest_ids = self._cache.popitem(last=False)
            self._bytes -= entry_bytes(oldest, oldest_ids)
        return ids


def entry_bytes(piece: str, ids: NDArray[np.uint32]) -> int:
    return piece.__sizeof__() + ids.nbytes
