"""What a folder of tokens says of itself, in manifest.json: written last, so that with it the folder is whole."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqlt.data.shard import Shard
from hqlt.data.tokenizer import Tokenizer
from hqlt.disk import write_atomic
from hqlt.task.task import SPLITS

FORMAT = "hqlt-tokens-1"
MANIFEST = "manifest.json"
NAMES = 100
PROGRESS = "progress.json"
"""In the manifest's place while the folder is not whole: the shards so far, and where the source is to resume."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    source: str
    """What was asked for, for people to read."""
    settings: dict[str, Any]
    """The source and all that the tokens depend on; another setting is other data."""
    tokenizer: dict[str, Any]
    """name, vocab_size, eos_id, digest."""
    dtype: str
    """Of a token: the smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    splits: dict[str, list[Shard]] = dataclasses.field(default_factory=lambda: {split: [] for split in SPLITS})
    skipped: dict[str, Any] = dataclasses.field(default_factory=lambda: {"files": 0, "names": [], "documents": 0})
    """files of the source's folder that were not read, as their kind is not known, with the first NAMES of their names;
    documents of the source that also stand in the files given for validation and test."""

    @classmethod
    def begin(
        cls,
        source: str,
        parts: list[dict[str, Any]],
        limit_tokens: int | None,
        shard_tokens: int,
        tokenizer: Tokenizer,
        skipped_files: list[str],
    ) -> Manifest:
        settings: dict[str, Any] = {"parts": parts, "limit_tokens": limit_tokens, "shard_tokens": shard_tokens}
        if tokenizer.prefix_ids:
            settings["prefix_ids"] = tokenizer.prefix_ids
        return cls(
            source=source,
            settings=json.loads(json.dumps(settings)),  # as they are read again
            tokenizer={name: getattr(tokenizer, name) for name in ("name", "vocab_size", "eos_id", "digest")},
            dtype=dtype_for(tokenizer.vocab_size),
            skipped={"files": len(skipped_files), "names": skipped_files[:NAMES], "documents": 0},
        )

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits[split])

    def bytes(self, split: str) -> int:
        return sum(shard.bytes for shard in self.splits[split])

    def save(self, folder: Path, name: str = MANIFEST, **more: Any) -> None:
        told = {"format": FORMAT, **dataclasses.asdict(self), **more}
        write_atomic(folder / name, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and what else stands in the file."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: {_what_is_there(folder)}")
    try:
        told = json.loads(path.read_bytes())
        if told["format"] != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {told['format']!r}; prepare the data anew")
        fields = {field.name: told.pop(field.name) for field in dataclasses.fields(Manifest) if field.name in told}
        fields["splits"] = {split: [Shard(**shard) for shard in shards] for split, shards in fields["splits"].items()}
        return Manifest(**fields), told
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a manifest written by `hqlt data prepare`, got {type(error).__name__}: {error}; "
            f"prepare the data anew, into another folder"
        ) from error


def _what_is_there(folder: Path) -> str:
    if (folder / PROGRESS).is_file():
        return "the data is not whole yet; run the same `hqlt data prepare` again to resume"
    what = "an empty or other folder" if folder.is_dir() else "no such folder"
    return f"expected a folder written by `hqlt data prepare`, got {what}"


def dtype_for(vocab_size: int) -> str:
    return "uint8" if vocab_size <= 2**8 else "uint16" if vocab_size <= 2**16 else "uint32"
