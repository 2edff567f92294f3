"""Tokenizers: bytes, or any tokenizer of `tokenizers` and transformers."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqlt.data.network import offline_if_unreachable
from hqlt.disk import write_atomic
from hqlt.errors import first_line

END_OF_TEXT = "<|endoftext|>"
COMMON_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
"""Names of the eos token to look for if there is only a tokenizer.json, which does not name it."""


class Tokenizer:
    """Converts text to token ids and back. `load_tokenizer` returns the implementation for a name."""

    name: str
    """The name that was given to `load_tokenizer`."""
    vocab_size: int
    """Vocabulary size; all ids are smaller."""
    bos_id: int | None = None
    """The token that begins a text; None: there is none. See `prefix_ids` for whether it is added to every text."""
    eos_id: int | None = None
    """The token that ends a document; None: there is none."""
    chat_template: str | None = None
    """Jinja template that formats a conversation, as in transformers; None: the tokenizer has none. See
    `hqlt.language.template`."""

    @property
    def digest(self) -> str:
        """Identifies the tokenization: two tokenizers with the same digest produce the same tokens."""
        raise NotImplementedError

    @property
    def eos_ids(self) -> list[int]:
        """A list with `eos_id`; empty if it is None."""
        return [] if self.eos_id is None else [self.eos_id]

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """The special tokens that are added before every text, such as `bos_id`; often none."""
        plain, full = self.encode_prompt("a", add_special_tokens=False), self.encode_prompt("a")
        positions = range(len(full) - len(plain) + 1)
        return full[: next((i for i in positions if full[i : i + len(plain)] == plain), 0)]

    def encode(self, text: str) -> list[int]:
        """Encode a text without adding special tokens.

        Args:
            text: the text; special tokens that are spelled out in it are encoded as ordinary text.

        Returns:
            The token ids.
        """
        raise NotImplementedError

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode a prompt as transformers does.

        Args:
            text: the prompt; special tokens that are spelled out in it are encoded as special tokens.
            add_special_tokens: whether to add the special tokens that the tokenizer puts around every text.

        Returns:
            The token ids.
        """
        return self.encode(text)

    def split_prompt(self, text: str) -> list[str]:
        """Split a prompt where no token can span the boundary, so that the parts can be encoded separately.

        Args:
            text: the prompt.

        Returns:
            Parts whose tokens, without added special tokens, concatenate to those of the whole prompt.
        """
        return [text]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Encode many texts, in parallel if the tokenizer supports it. See `encode`."""
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids.

        Args:
            ids: the token ids.
            skip_special_tokens: whether to omit special tokens from the text.

        Returns:
            The text.
        """
        raise NotImplementedError

    def spelling(self, id: int) -> str:
        """The text of one token, including special tokens."""
        return self.decode([id], skip_special_tokens=False)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that arrive one at a time.

        Args:
            after: the last token or tokens of the text that is continued; the first new token may depend on them for a
                leading space.

        Returns:
            A `TextStream`.
        """
        return TextStream(self.decode, after)

    def save(self, folder: Path) -> None:
        """Save the tokenizer where `load_tokenizer` and AutoTokenizer can load it. Bytes save nothing."""
        raise NotImplementedError


class TextStream:
    """Decodes tokens one at a time and returns text as soon as its characters are complete.

    The text that a token adds depends on the token before it (a space, part of a character), so both are decoded.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self.decode = decode
        self.previous = list(after)
        self.pending: list[int] = []

    def add(self, id: int) -> str:
        """The text that is complete after one more token; empty if a character is still incomplete."""
        self.pending.append(id)
        text = self.end()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.previous, self.pending = self.pending, []
        return text

    def end(self) -> str:
        """The remaining text, with an incomplete character as U+FFFD."""
        return self.decode(self.previous + self.pending)[len(self.decode(self.previous)) :]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Special tokens that are spelled out in a document are encoded as ordinary text, so that no document can end itself.

    Args:
        name: "bytes", a tokenizer.json, a folder that contains one, or a name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if there is no such tokenizer or it cannot be loaded.

    Example:
        >>> from hqlt.data import load_tokenizer
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.encode("hi"), tokenizer.decode([104, 105])
        ([104, 105], 'hi')
    """
    path = Path(name).expanduser()
    if str(name) == "bytes":
        return Bytes()
    if path.is_file():
        return FastTokenizer.from_file(path, str(name))
    if (path / "tokenizer.json").is_file():
        return FastTokenizer.from_file(path / "tokenizer.json", str(name))
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{name}: expected a folder with a tokenizer.json, found none")
    return _auto_tokenizer(str(name))


def model_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder, as AutoTokenizer loads it.

    The special tokens around a text depend on its class and on tokenizer_config.json, not on tokenizer.json alone.
    """
    if (folder / "tokenizer_config.json").is_file():
        return _auto_tokenizer(str(folder))
    return load_tokenizer(folder)


def _auto_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    with offline_if_unreachable(name) as offline:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises errors of many libraries (network, hub, formats, packages)
            raise ValueError(
                f"tokenizer: expected bytes, a tokenizer.json, a folder that contains one, or a name on the hub, got "
                f"{name!r}, which could not be loaded: {offline}{first_line(error)}"
            ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    loaded: Tokenizer
    if backend is None:
        loaded = SlowTokenizer(name, tokenizer)
    else:
        loaded = FastTokenizer(
            name, backend, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.split_special_tokens
        )
    template = tokenizer.chat_template
    loaded.chat_template = template.get("default") if isinstance(template, dict) else template
    return loaded


class Bytes(Tokenizer):
    """The bytes of the text in UTF-8. There is no eos token; only a reset separates documents."""

    name = digest = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        return ByteStream()

    def save(self, folder: Path) -> None:
        pass


class ByteStream(TextStream):
    """Decodes UTF-8 one byte at a time; invalid bytes become U+FFFD at once."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        return self.decoder.decode(bytes([id]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


class SubwordTokenizer(Tokenizer):
    """The common part of tokenizers from `tokenizers` and transformers."""

    tokenizer: Any

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


class FastTokenizer(SubwordTokenizer):
    """A tokenizer of the `tokenizers` library; it encodes batches in parallel."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        eos_id: int | None,
        bos_id: int | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        """split_special_tokens: encode special tokens that are spelled out in a prompt as ordinary text, too."""
        self.name, self.eos_id, self.bos_id = name, eos_id, bos_id
        self.split_special_tokens = split_special_tokens
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(cls, file: Path, name: str) -> FastTokenizer:
        from tokenizers import Tokenizer as Backend

        try:
            tokenizer = Backend.from_file(str(file))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise ValueError(f"{file}: expected a tokenizer.json of `tokenizers`, got {error}") from error
        begin, end = (_named_token(file.parent, name) for name in ("bos_token", "eos_token"))
        ids = (tokenizer.token_to_id(token) for token in (end, *COMMON_EOS) if token is not None)
        eos_id = next((id for id in ids if id is not None), None)
        return cls(name, tokenizer, eos_id, None if begin is None else tokenizer.token_to_id(begin))

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.eos_id} {self.tokenizer.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.tokenizer.encode_special_tokens = self.split_special_tokens
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        finally:
            self.tokenizer.encode_special_tokens = True
        return ids

    def split_prompt(self, text: str) -> list[str]:
        """Split before each special token, except those whose tokens depend on the preceding text."""
        added = [token for token in self.tokenizer.get_added_tokens_decoder().values() if not token.normalized]
        if self.split_special_tokens or not added:
            return [text]
        splittable = {token.content for token in added if not (token.lstrip or token.single_word)}
        longest_first = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        found = re.finditer("|".join(longest_first), text)
        cuts = [match.start() for match in found if match[0] in splittable and match.start() > 0]
        return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"eos_token": None if self.eos_id is None else self.tokenizer.id_to_token(self.eos_id)}
        if self.bos_id is not None:
            config |= {"bos_token": self.tokenizer.id_to_token(self.bos_id)}
        if self.chat_template is not None:
            config |= {"chat_template": self.chat_template}
        write_atomic(
            folder / "tokenizer_config.json", (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()
        )


class SlowTokenizer(SubwordTokenizer):
    """A tokenizer of transformers without a `tokenizers` backend."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self.tokenizer, self.vocab_size = name, tokenizer, len(tokenizer)
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id

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

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def _named_token(folder: Path, name: str) -> str | None:
    """The "bos_token" or "eos_token" according to the configuration files next to a tokenizer.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file).is_file():
            continue
        try:
            token = json.loads((folder / file).read_bytes())[name]
            return str(token["content"] if isinstance(token, dict) else token)
        except KeyError:
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / file}: expected a tokenizer's settings as JSON, got {error}") from error
    return None
