"""manifest.json, which describes a data folder. It is written last, so a folder that has one is complete."""

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
MAX_NAMES = 100
PROGRESS = "progress.json"
"""Replaces the manifest while the folder is incomplete: the shards so far, and the position to resume from."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a data folder that `prepare` wrote."""

    source: str
    """The source as given by the user, for information only."""
    settings: dict[str, Any]
    """The source and all other settings that the tokens depend on."""
    tokenizer: dict[str, Any]
    """The tokenizer's name, vocab_size, eos_id and digest."""
    dtype: str
    """Data type of a token: the smallest of uint8, uint16 and uint32 that can represent the vocabulary."""
    splits: dict[str, list[Shard]] = dataclasses.field(default_factory=lambda: {split: [] for split in SPLITS})
    """The shards of each split."""
    skipped: dict[str, Any] = dataclasses.field(default_factory=lambda: {"files": 0, "names": [], "documents": 0})
    """files: number of files that were not read because their format is unknown; names: the first MAX_NAMES of them;
    documents: number of source documents that were skipped because the validation or test files contain them."""

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
        """The manifest of a folder that has no shards yet."""
        settings: dict[str, Any] = {"parts": parts, "limit_tokens": limit_tokens, "shard_tokens": shard_tokens}
        if tokenizer.prefix_ids:
            settings["prefix_ids"] = tokenizer.prefix_ids
        return cls(
            source=source,
            settings=json.loads(json.dumps(settings)),  # as they will be read back
            tokenizer={name: getattr(tokenizer, name) for name in ("name", "vocab_size", "eos_id", "digest")},
            dtype=dtype_for(tokenizer.vocab_size),
            skipped={"files": len(skipped_files), "names": skipped_files[:MAX_NAMES], "documents": 0},
        )

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        """Number of documents in a split."""
        return sum(shard.documents for shard in self.splits[split])

    def bytes(self, split: str) -> int:
        """Size of the text of a split in UTF-8, in bytes."""
        return sum(shard.bytes for shard in self.splits[split])

    def save(self, folder: Path, name: str = MANIFEST, **more: Any) -> None:
        """Write the manifest, with additional fields, as JSON."""
        content = {"format": FORMAT, **dataclasses.asdict(self), **more}
        write_atomic(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and the additional fields of the file. Raises ValueError if it is missing or not valid."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: {_why_missing(folder)}")
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {content['format']!r}; prepare the data again")
        names = [field.name for field in dataclasses.fields(Manifest) if field.name in content]
        fields = {name: content.pop(name) for name in names}
        fields["splits"] = {split: [Shard(**shard) for shard in shards] for split, shards in fields["splits"].items()}
        return Manifest(**fields), content
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a manifest written by `hqlt data prepare`, got {type(error).__name__}: {error}; "
            f"prepare the data again, in another folder"
        ) from error


def _why_missing(folder: Path) -> str:
    if (folder / PROGRESS).is_file():
        return "the data is incomplete; run the same `hqlt data prepare` command again to resume"
    what = "an empty folder or one with other files" if folder.is_dir() else "no such folder"
    return f"expected a folder written by `hqlt data prepare`, got {what}"


def dtype_for(vocab_size: int) -> str:
    """The smallest unsigned integer type that can represent all ids of a vocabulary."""
    return "uint8" if vocab_size <= 2**8 else "uint16" if vocab_size <= 2**16 else "uint32"
