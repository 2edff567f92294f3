"""From text to tokens and back: bytes, or any tokenizer of `tokenizers` and transformers."""

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
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
"""What ends a document by name, where a lone tokenizer.json does not say."""


class Tokenizer:
    """From a text to tokens, and back."""

    name: str
    """What `load_tokenizer` was asked for."""
    vocab_size: int
    """All ids are below."""
    bos_id: int | None = None
    """The token that begins a text; None: there is none. Whether it stands before every text, `prefix_ids` says."""
    eos_id: int | None = None
    """The token that ends a document; None: there is none."""
    chat_template: str | None = None
    """In Jinja, as transformers has it: how a conversation is written. None: the model came without; see
    `hqlt.language.template`."""

    @property
    def digest(self) -> str:
        """Names what the tokenizer does: two with the same digest give the same tokens."""
        raise NotImplementedError

    @property
    def eos_ids(self) -> list[int]:
        """`eos_id` where there is one."""
        return [] if self.eos_id is None else [self.eos_id]

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """The special tokens that it puts before every text, such as `bos_id`; often none."""
        alone, whole = self.encode_prompt("a", add_special_tokens=False), self.encode_prompt("a")
        places = range(len(whole) - len(alone) + 1)
        return whole[: next((i for i in places if whole[i : i + len(alone)] == alone), 0)]

    def encode(self, text: str) -> list[int]:
        """The tokens of the text alone; special tokens that are spelled out in it are read as text."""
        raise NotImplementedError

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As transformers tokenizes what a model is given: special tokens that are spelled out in it are special.

        add_special_tokens: with those that the tokenizer puts around every text.
        """
        return self.encode(text)

    def pieces(self, text: str) -> list[str]:
        """A prompt cut where no token can span the cut: the tokens of the pieces, without those that the tokenizer puts
        around a text, are those of the whole."""
        return [text]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Many texts at once, in parallel where the tokenizer can."""
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text, without special tokens unless they are wanted."""
        raise NotImplementedError

    def spelling(self, id: int) -> str:
        """A token as text; a special one, too."""
        return self.decode([id], skip_special_tokens=False)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """after: the last token or tokens of the text that is continued, which may say whether a blank comes first."""
        return TextStream(self.decode, after)

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` (and AutoTokenizer) reads again; bytes need nothing."""
        raise NotImplementedError


class TextStream:
    """Tokens come one by one, text goes out as soon as its characters are whole.

    What a token adds to the text depends on the one before it (a space, half a character), so both are decoded.
    """

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
        """What is left: an unfinished character, as U+FFFD."""
        return self.decode(self.told + self.waiting)[len(self.decode(self.told)) :]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """ "bytes", a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

    Special tokens that stand in a text as words are read as text: no document can end itself or another.
    Raises ValueError where there is no such tokenizer.
    """
    path = Path(name).expanduser()
    if str(name) == "bytes":
        return Bytes()
    if path.is_file():
        return FastTokenizer.from_file(path, str(name))
    if (path / "tokenizer.json").is_file():
        return FastTokenizer.from_file(path / "tokenizer.json", str(name))
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{name}: expected a folder with a tokenizer.json, found none in it")
    return _auto_tokenizer(str(name))


def model_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a model, as AutoTokenizer loads it.

    Which special tokens stand around a text, its class and tokenizer_config.json say, not tokenizer.json alone.
    """
    if (folder / "tokenizer_config.json").is_file():
        return _auto_tokenizer(str(folder))
    return load_tokenizer(folder)


def _auto_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    with offline_if_unreachable(name) as silent:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # of many libraries below: network, hub, file formats, packages that it needs
            raise ValueError(
                f"tokenizer: expected bytes, a tokenizer.json, a folder that holds one, or a name on the hub, got "
                f"{name!r}, which could not be loaded: {silent}{first_line(error)}"
            ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ours: Tokenizer
    if backend is None:
        ours = SlowTokenizer(name, tokenizer)
    else:
        ours = FastTokenizer(
            name, backend, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.split_special_tokens
        )
    template = tokenizer.chat_template
    ours.chat_template = template.get("default") if isinstance(template, dict) else template
    return ours


class Bytes(Tokenizer):
    """A text is its bytes in UTF-8. No id is beyond 255, so nothing ends a document but a reset."""

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
    """Bytes that are no UTF-8 wait for nothing."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        return self.decoder.decode(bytes([id]))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


class SubwordTokenizer(Tokenizer):
    """What those of `tokenizers` and of transformers have in common."""

    tokenizer: Any

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


class FastTokenizer(SubwordTokenizer):
    """A tokenizer of `tokenizers`: it encodes batches in parallel."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        eos_id: int | None,
        bos_id: int | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        """split_special_tokens: those that are spelled out in a prompt are text there, too."""
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
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{file}: expected a tokenizer.json of `tokenizers`, got {error}") from error
        begin, end = (_named_token(file.parent, name) for name in ("bos_token", "eos_token"))
        ids = (tokenizer.token_to_id(token) for token in (end, *USUAL_ENDS) if token is not None)
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

    def pieces(self, text: str) -> list[str]:
        """Cut before each special token, but for those whose tokens depend on what stands before them."""
        added = [token for token in self.tokenizer.get_added_tokens_decoder().values() if not token.normalized]
        if self.split_special_tokens or not added:
            return [text]
        alone = {token.content for token in added if not (token.lstrip or token.single_word)}
        longest_first = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        found = re.finditer("|".join(longest_first), text)
        cuts = [match.start() for match in found if match[0] in alone and match.start() > 0]
        return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        told |= {"eos_token": None if self.eos_id is None else self.tokenizer.id_to_token(self.eos_id)}
        if self.bos_id is not None:
            told |= {"bos_token": self.tokenizer.id_to_token(self.bos_id)}
        if self.chat_template is not None:
            told |= {"chat_template": self.chat_template}
        write_atomic(folder / "tokenizer_config.json", (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())


class SlowTokenizer(SubwordTokenizer):
    """A tokenizer of transformers that `tokenizers` does not know."""

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
    """The token that the files beside a tokenizer.json name as its "bos_token" or "eos_token"."""
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
