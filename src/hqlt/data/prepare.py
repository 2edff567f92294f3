"""Tokenizing documents into a data folder, shard by shard. An interrupted preparation can be resumed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hqlt.data.holdout import Holdout
from hqlt.data.manifest import MANIFEST, PROGRESS, Manifest, read_manifest
from hqlt.data.parts import Part, held_out_documents, parts_of
from hqlt.data.shard import ShardWriter
from hqlt.data.source import Source
from hqlt.data.tokenizer import Tokenizer, load_tokenizer
from hqlt.disk import exclusive_folder, holds_files, sync_folder
from hqlt.task.task import SPLITS

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 22
"""Limits of a batch for the tokenizer; whichever is reached first ends the batch."""


class PrepareProgress(NamedTuple):
    """Progress of `prepare`, reported after each batch."""

    documents: int
    """Documents written so far."""
    tokens: int
    """Tokens written so far."""
    done: float | None
    """The completed share of the work, from 0 to 1; None: unknown."""
    kept: int
    """Tokens in finished shards, which are not lost if the preparation is interrupted."""


def prepare(
    source: str | Path | Source,
    folder: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    limit_tokens: int | None = None,
    shard_tokens: int = 1 << 25,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
    **how: Any,
) -> Manifest:
    """Tokenize the documents of a source into a folder that `TokenFiles` reads.

    A finished folder with the same settings is left unchanged. An unfinished one (after Ctrl-C, a kill or a full disk)
    is resumed from its last finished shards; the result is the same as without the interruption.

    Args:
        source: the documents; see `parts_of`.
        folder: where the tokens are written.
        tokenizer: bytes, a tokenizer.json, a folder that contains one, or a name on the hub. A copy is saved in the
            folder. Each document starts with the tokenizer's prefix tokens and ends with its eos token, if it has any.
        limit_tokens: stop after the document that reaches this many training tokens, once no split is empty; None:
            read all documents.
        shard_tokens: tokens per file. An interruption loses less than this.
        on_progress: called with a `PrepareProgress` after each batch.
        how: further options of `parts_of`. Source documents that the validation and test files contain are skipped and
            counted in `Manifest.skipped`.

    Returns:
        The manifest of the finished folder.

    Raises:
        ValueError: if the source or an option is invalid, or if the folder has other data; it is left unchanged.
        OSError: if the folder cannot be written.

    Example:
        >>> import pathlib
        >>> from hqlt.data import prepare
        >>> _ = pathlib.Path("text.txt").write_text("some text")
        >>> prepare("text.txt", "data", validation_share=0, test_share=0).tokens("train")
        9
    """
    folder = Path(folder)
    if shard_tokens < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise ValueError(f"shard_tokens, limit_tokens: expected at least 1, got {shard_tokens}, {limit_tokens}")
    parts = parts_of(source, **how)
    tok = load_tokenizer(tokenizer)
    skipped = [name for part in parts for name in part.source.skipped]
    identities = [part.identity() for part in parts]
    wanted = Manifest.begin(str(source), identities, limit_tokens, shard_tokens, tok, skipped)
    with exclusive_folder(folder):
        manifest, position = open_folder(folder, wanted, tok)
        if position is None:
            return manifest
        try:
            with contextlib.closing(FolderWriter(folder, manifest, tok, parts, on_progress)) as writer:
                writer.write_from(position)
        except BaseException:
            if not any(manifest.splits.values()):  # there is nothing to resume from
                (folder / PROGRESS).unlink()
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            raise
        refuse_empty(folder, manifest, parts)
        manifest.save(folder)
        (folder / PROGRESS).unlink()
    return manifest


class Position(NamedTuple):
    """The position from which a preparation resumes."""

    part: int = 0
    """Index of the part."""
    source: dict[str, Any] | None = None
    """State of the part's source; None: nothing has been read."""
    holdout: Holdout | None = None
    """How the part's documents are assigned to splits."""


def open_folder(folder: Path, wanted: Manifest, tokenizer: Tokenizer) -> tuple[Manifest, Position | None]:
    """The manifest so far, and the position to resume from; None: the folder is complete.

    Raises ValueError for a folder with other data or other files.
    """
    position: Position | None = None
    if (folder / MANIFEST).exists():
        found, _ = read_manifest(folder)
    elif (folder / PROGRESS).exists():
        found, more = read_manifest(folder, PROGRESS)
        part, source, holdout = (more["place"][name] for name in Position._fields)
        position = Position(part, source, holdout and Holdout(*holdout))
    elif holds_files(folder):
        raise ValueError(f"{folder}: expected a new or empty folder, found other files; give another folder")
    else:
        found, position = wanted, Position()
    if position is not None and not any(found.splits.values()):  # nothing is lost by starting again
        found, position = wanted, Position()
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        found.save(folder, PROGRESS, place=position._asdict())
        tokenizer.save(folder / "tokenizer")
    if (found.settings, found.tokenizer["digest"]) != (wanted.settings, wanted.tokenizer["digest"]):
        raise ValueError(
            f"{folder}: has data prepared with other settings ({_difference(found, wanted)}); give another folder, or "
            f"remove this one"
        )
    return found, position


class FolderWriter:
    """Writes the documents of all parts into the shards of a folder."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        parts: Sequence[Part],
        on_progress: Callable[[PrepareProgress], None],
    ) -> None:
        self.folder, self.manifest, self.tokenizer, self.parts = folder, manifest, tokenizer, parts
        self.on_progress = on_progress
        self.prefix, self.suffix = tokenizer.prefix_ids, [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self.limit: float = manifest.settings["limit_tokens"] or float("inf")
        self.writers: dict[str, ShardWriter] = {}
        self.excluded = held_out_documents(parts)
        self.tokens = {split: manifest.tokens(split) for split in SPLITS}

    def write_from(self, position: Position) -> None:
        """Write everything after the position."""
        shard_tokens = self.manifest.settings["shard_tokens"]
        while position.part < len(self.parts):
            part = self.parts[position.part]
            if position.source is None:
                position = position._replace(holdout=part.holdout(self.excluded))
            else:
                part.source.load_state_dict(position.source)
            self.report_progress()
            for texts in batches(part.source, min(BATCH_CHARACTERS, shard_tokens)):
                self.write_batch(part, position.holdout, texts)
                self.report_progress()
                if sum(writer.tokens for writer in self.writers.values()) >= shard_tokens:
                    self.finish_shards(position._replace(source=part.source.state_dict()))
                if self.enough_for(part):
                    break
            position = Position(position.part + 1)
            self.finish_shards(position)
        self.report_progress()

    def write_batch(self, part: Part, holdout: Holdout | None, documents: Sequence[str]) -> None:
        """Tokenize documents and append each one to the shard of its split."""
        texts = list(part.without(self.excluded, documents))
        self.manifest.skipped["documents"] += len(documents) - len(texts)
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            split = holdout.split_of(text) if holdout else part.split
            assert not isinstance(split, tuple)
            if self.enough_for(part) or (split == "train" and self.limit_reached):
                continue
            if self.prefix or self.suffix:
                ids = np.concatenate([self.prefix, ids, self.suffix])
            if split not in self.writers:
                name = f"{split}-{len(self.manifest.splits[split]):05d}"
                self.writers[split] = ShardWriter(self.folder, name, self.manifest.dtype)
            self.writers[split].add(ids, len(text.encode()))
            self.tokens[split] += len(ids)

    def enough_for(self, part: Part) -> bool:
        """Whether the token limit is reached and no split of the part is empty."""
        return "train" in part.splits and self.limit_reached and all(self.tokens[split] for split in part.splits)

    @property
    def limit_reached(self) -> bool:
        return self.tokens["train"] >= self.limit

    def finish_shards(self, position: Position) -> None:
        """Finish the open shards, then save the manifest so far and the position after them."""
        for split in list(self.writers):
            self.manifest.splits[split].append(self.writers[split].finish())
            del self.writers[split]
        sync_folder(self.folder)
        self.manifest.save(self.folder, PROGRESS, place=position._asdict())

    def close(self) -> None:
        """Remove unfinished shards."""
        for writer in self.writers.values():
            writer.abandon()

    def report_progress(self) -> None:
        documents = sum(self.manifest.documents(split) for split in SPLITS)
        documents += sum(len(writer.starts) for writer in self.writers.values())
        tokens = sum(self.tokens.values())
        kept = tokens - sum(writer.tokens for writer in self.writers.values())
        self.on_progress(PrepareProgress(documents, tokens, self._done(), kept))

    def _done(self) -> float | None:
        sizes = [part.source.size for part in self.parts]
        total = None if None in sizes else sum(filter(None, sizes))
        read = sum(part.source.passed for part in self.parts) / total if total else None
        of_limit = self.tokens["train"] / self.limit
        return max(read or 0.0, min(of_limit, 1.0)) if of_limit else read


def batches(source: Source, max_characters: int) -> Iterator[list[str]]:
    """Batches of nonempty documents. The last document of a batch may exceed the limit on characters."""
    batch: list[str] = []
    characters = 0
    for text in source:
        if text:
            batch.append(text)
            characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= max_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def refuse_empty(folder: Path, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Raises ValueError if a requested split has no documents."""
    missing = [split for part in parts for split in part.splits if not manifest.documents(split)]
    if not missing:
        return
    skipped = manifest.skipped["documents"]
    hint = (
        f": {skipped:,} of the source were skipped, because the files given with --validation and --test contain them; "
        f"give other files"
        if skipped
        else "; raise --validation-share or --test-share, or set them to 0"
    )
    raise ValueError(
        f"{folder}: expected documents in every split, found none for {' and '.join(missing)}{hint}, and remove this "
        f"folder or give another one"
    )


def _difference(found: Manifest, wanted: Manifest) -> str:
    """The first setting that differs."""
    if found.tokenizer["digest"] != wanted.tokenizer["digest"]:
        return f"tokenizer: expected {found.tokenizer['name']}, got {wanted.tokenizer['name']}"
    old, new = _flattened(found.settings), _flattened(wanted.settings)
    key = next(key for key in (*old, *new) if old.get(key) != new.get(key))
    return f"{key[0]}: expected {old.get(key)}, got {new.get(key)}"


def _flattened(settings: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """All settings, including those of the sources, by name and index of the source."""
    facts = {(name, 0): value for name, value in settings.items() if name != "parts"}
    facts["number of sources", 0] = len(settings["parts"])
    return facts | {
        (f"source, {key}", i): part[key] for i, part in enumerate(settings["parts"]) for key in sorted(part)
    }
