"""From text to tokens and back: bytes, or any tokenizer of `tokenizers` and transformers."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hqlt.disk import write_whole
from hqlt.errors import first_line

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
"""What ends a document by name, where a lone tokenizer.json does not say."""


class TextStream(Protocol):
    """Tokens come one by one, text goes out as soon as its characters are whole."""

    def add(self, id: int) -> str: ...

    def end(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""


class Tokenizer(Protocol):
    name: str
    """What `load_tokenizer` was asked for."""
    vocab_size: int
    """All ids are below."""
    eos_id: int | None
    """The token that ends a document; None: there is none."""

    @property
    def digest(self) -> str:
        """Names what the tokenizer does: two with the same digest give the same tokens."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Many texts at once, in parallel where the tokenizer can."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """after: the last token or tokens of the text that goes on, which may say whether a blank comes first."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` (and AutoTokenizer) reads again; bytes need nothing."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """ "bytes", a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

    Special tokens that stand in a text as words are read as text: no document can end itself or another.
    Raises ValueError where there is no such tokenizer.
    """
    path = Path(name).expanduser()
    if str(name) == "bytes":
        return Bytes()
    if path.is_file():
        return Fast.from_file(path, str(name))
    if (path / "tokenizer.json").is_file():
        return Fast.from_file(path / "tokenizer.json", str(name))
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{name}: expected a folder with a tokenizer.json, found none in it")
    return _auto_tokenizer(str(name))


def _auto_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: expected bytes, a tokenizer.json, a folder that holds one, or a name on the hub, got "
            f"{name!r}, which could not be loaded: {first_line(error)}"
        ) from error
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return Slow(name, tokenizer) if fast is None else Fast(name, fast, tokenizer.eos_token_id)


class Bytes:
    """A text is its bytes in UTF-8. No id is beyond 255, so nothing ends a document but a reset."""

    name = "bytes"
    vocab_size = 256
    eos_id: int | None = None
    digest = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return ByteStream()

    def save(self, folder: Path) -> None:
        pass


class Fast:
    """A tokenizer of `tokenizers`: it encodes batches in parallel."""

    def __init__(self, name: str, tokenizer: Any, eos_id: int | None) -> None:
        self.name, self.eos_id = name, eos_id
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(cls, file: Path, name: str) -> Fast:
        from tokenizers import Tokenizer as Backend

        try:
            tokenizer = Backend.from_file(str(file))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{file}: expected a tokenizer.json of `tokenizers`, got {error}") from error
        ends = [end for end in (_told_end(file.parent), *USUAL_ENDS) if end is not None]
        ids = (tokenizer.token_to_id(end) for end in ends)
        return cls(name, tokenizer, next((id for id in ids if id is not None), None))

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.eos_id} {self.tokenizer.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return TokenStream(self.decode, after)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        end = None if self.eos_id is None else self.tokenizer.id_to_token(self.eos_id)
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
        write_whole(folder / "tokenizer_config.json", (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())


class Slow:
    """A tokenizer of transformers that `tokenizers` does not know."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(file.read_bytes())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return TokenStream(self.decode, after)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class ByteStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        return self.decoder.decode(bytes([id]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


class TokenStream:
    """What a token adds to the text depends on the one before it (a space, half a character), so both are decoded."""

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self.decode = decode
        self.told = list(after)
        self.waiting: list[int] = []

    def add(self, id: int) -> str:
        self.waiting.append(id)
        text = self.end()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.told, self.waiting = self.waiting, []
        return text

    def end(self) -> str:
        return self.decode(self.told + self.waiting)[len(self.decode(self.told)) :]


def _told_end(folder: Path) -> str | None:
    """The token that ends a document by what stands beside a tokenizer.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            end = json.loads((folder / name).read_text()).get("eos_token")
            if end is not None:
                return str(end["content"] if isinstance(end, dict) else end)
    return None
