"""Text to tokens and back: bytes, or any tokenizer that transformers' AutoTokenizer loads."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class TextStream(Protocol):
    """Tokens come one by one; text goes out as soon as its characters are complete."""

    def add(self, token: int) -> str: ...

    def end(self) -> str: ...


class Tokenizer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream(self) -> TextStream: ...


class Bytes:
    """A token is a byte of UTF-8."""

    name = "bytes"
    vocab_size = 256
    eos_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def stream(self) -> TextStream:
        return ByteStream()


class ByteStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self.decoder.decode(bytes([token]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


class Pretrained:
    """A tokenizer of transformers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self.name = name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.vocab_size = len(self.tokenizer)
        self.eos_id: int | None = self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def stream(self) -> TextStream:
        return PretrainedStream(self)


class PretrainedStream:
    def __init__(self, tokenizer: Pretrained) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def end(self) -> str:
        return self._show(self.tokenizer.decode(self.ids))

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The name "bytes", or a folder, file or name for AutoTokenizer."""
    return Bytes() if name == "bytes" else Pretrained(str(name))
