"""From documents to a folder of tokens, shard by shard, resumed where an earlier start was stopped."""

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
"""A batch of texts for the tokenizer ends at whichever comes first."""


class PrepareProgress(NamedTuple):
    """What can be told after each batch."""

    documents: int
    tokens: int
    done: float | None
    """The share of the work that is done; None: nobody knows."""
    kept: int
    """Tokens in finished shards, where no interrupt can take them away."""


def prepare(
    source: str | Path | Source,
    folder: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    limit_tokens: int | None = None,
    shard_tokens: int = 1 << 25,
    on_progress: Callable[[PrepareProgress], None] = lambda told: None,
    **how: Any,
) -> Manifest:
    """Write the documents of a source as tokens into a folder that `TokenFiles` reads.

    A finished folder of the same settings is left as it is. An unfinished one (after Ctrl-C, a kill or a full disk) is
    resumed from its last finished shards, and ends up the same as if nothing had happened.

    Args:
        source: what `parts_of` takes.
        folder: where the tokens go.
        tokenizer: bytes, a tokenizer.json, a folder that holds one, or a name on the hub. A copy goes into the folder.
            A document begins with the special tokens that it puts before every text, and ends with its eos token, if it
            has such.
        limit_tokens: stop after the document with which there are as many tokens for training, and no split is empty.
        shard_tokens: tokens in a file; what is lost by an interrupt is less.
        on_progress: called after each batch.
        how: what else `parts_of` takes. Documents that also stand in its validation and test files are skipped in the
            source; `Manifest.skipped` counts them.

    Raises:
        ValueError: for a wrong source, and for a folder with other data, in which nothing is touched.
        OSError: where the folder cannot be written.
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
        manifest, place = begun_in(folder, wanted, tok)
        if place is None:
            return manifest
        try:
            with contextlib.closing(Writing(folder, manifest, tok, parts, on_progress)) as writing:
                writing.write_from(place)
        except BaseException:
            if not any(manifest.splits.values()):  # there is nothing to resume from
                (folder / PROGRESS).unlink()
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            raise
        refuse_empty(folder, manifest, parts)
        manifest.save(folder)
        (folder / PROGRESS).unlink()
    return manifest


class Place(NamedTuple):
    """Where to resume."""

    part: int = 0
    source: dict[str, Any] | None = None
    """How far the part's source was read; None: not at all."""
    holdout: Holdout | None = None


def begun_in(folder: Path, wanted: Manifest, tokenizer: Tokenizer) -> tuple[Manifest, Place | None]:
    """The folder's data so far, and where to resume; None: it is whole. Refuses a folder with other data or files."""
    place: Place | None = None
    if (folder / MANIFEST).exists():
        found, _ = read_manifest(folder)
    elif (folder / PROGRESS).exists():
        found, more = read_manifest(folder, PROGRESS)
        part, source, holdout = (more["place"][name] for name in Place._fields)
        place = Place(part, source, holdout and Holdout(*holdout))
    elif holds_files(folder):
        raise ValueError(f"{folder}: expected an empty folder or a new one, found other files in it")
    else:
        found, place = wanted, Place()
    if place is not None and not any(found.splits.values()):  # nothing is lost by beginning anew
        found, place = wanted, Place()
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        found.save(folder, PROGRESS, place=place._asdict())
        tokenizer.save(folder / "tokenizer")
    if (found.settings, found.tokenizer["digest"]) != (wanted.settings, wanted.tokenizer["digest"]):
        raise ValueError(
            f"{folder}: holds data of other settings ({_difference(found, wanted)}); give another folder, or remove it"
        )
    return found, place


class Writing:
    """The shards being written, and those that are finished."""

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
        self.around = tokenizer.prefix_ids, [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self.limit: float = manifest.settings["limit_tokens"] or float("inf")
        self.round: dict[str, ShardWriter] = {}
        self.elsewhere = held_out_documents(parts)
        self.tokens = {split: manifest.tokens(split) for split in SPLITS}

    def write_from(self, place: Place) -> None:
        shard_tokens = self.manifest.settings["shard_tokens"]
        while place.part < len(self.parts):
            part = self.parts[place.part]
            if place.source is None:
                place = place._replace(holdout=part.holdout(self.elsewhere))
            else:
                part.source.load_state_dict(place.source)
            self.tell()
            for texts in batches(part.source, min(BATCH_CHARACTERS, shard_tokens)):
                self.write_batch(part, place.holdout, texts)
                self.tell()
                if sum(writer.tokens for writer in self.round.values()) >= shard_tokens:
                    self.keep(place._replace(source=part.source.state_dict()))
                if self.enough_for(part):
                    break
            place = Place(place.part + 1)
            self.keep(place)
        self.tell()

    def write_batch(self, part: Part, holdout: Holdout | None, documents: Sequence[str]) -> None:
        texts = list(part.without(self.elsewhere, documents))
        self.manifest.skipped["documents"] += len(documents) - len(texts)
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            split = holdout.split_of(text) if holdout else part.split
            assert not isinstance(split, tuple)
            if self.enough_for(part) or (split == "train" and self.limit_reached):
                continue
            if self.around != ([], []):
                ids = np.concatenate([self.around[0], ids, self.around[1]])
            if split not in self.round:
                name = f"{split}-{len(self.manifest.splits[split]):05d}"
                self.round[split] = ShardWriter(self.folder, name, self.manifest.dtype)
            self.round[split].add(ids, len(text.encode()))
            self.tokens[split] += len(ids)

    def enough_for(self, part: Part) -> bool:
        """Whether the limit is reached, and no split of the part is empty."""
        return "train" in part.splits and self.limit_reached and all(self.tokens[split] for split in part.splits)

    @property
    def limit_reached(self) -> bool:
        return self.tokens["train"] >= self.limit

    def keep(self, place: Place) -> None:
        """Finish the round's shards, then note them and the place that follows them."""
        for split in list(self.round):
            self.manifest.splits[split].append(self.round[split].finish())
            del self.round[split]
        sync_folder(self.folder)
        self.manifest.save(self.folder, PROGRESS, place=place._asdict())

    def close(self) -> None:
        """Take away the shards that are not finished."""
        for writer in self.round.values():
            writer.abandon()

    def tell(self) -> None:
        documents = sum(self.manifest.documents(split) for split in SPLITS)
        documents += sum(len(writer.starts) for writer in self.round.values())
        tokens = sum(self.tokens.values())
        kept = tokens - sum(writer.tokens for writer in self.round.values())
        self.on_progress(PrepareProgress(documents, tokens, self._done(), kept))

    def _done(self) -> float | None:
        sizes = [part.source.size for part in self.parts]
        whole = None if None in sizes else sum(filter(None, sizes))
        read = sum(part.source.passed for part in self.parts) / whole if whole else None
        towards = self.tokens["train"] / self.limit
        return max(read or 0.0, min(towards, 1.0)) if towards else read


def batches(source: Source, most_characters: int) -> Iterator[list[str]]:
    """Documents that are not empty, many at a time; the last of a batch may exceed its characters."""
    batch: list[str] = []
    characters = 0
    for text in source:
        if text:
            batch.append(text)
            characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= most_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def refuse_empty(folder: Path, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Every split that was asked for has documents."""
    missing = [split for part in parts for split in part.splits if not manifest.documents(split)]
    if not missing:
        return
    skipped = manifest.skipped["documents"]
    hint = (
        f": {skipped:,} of the source were skipped, as they also stand in the files given by --validation and --test; "
        f"give other files"
        if skipped
        else "; raise --validation-share or --test-share, or set them to 0"
    )
    raise ValueError(
        f"{folder}: expected documents in every split, found none for {' and '.join(missing)}{hint}, and remove this "
        f"folder or give another"
    )


def _difference(found: Manifest, wanted: Manifest) -> str:
    """The first settings that are not equal."""
    if found.tokenizer["digest"] != wanted.tokenizer["digest"]:
        return f"tokenizer: there {found.tokenizer['name']}, asked for {wanted.tokenizer['name']}"
    there, asked = _facts(found.settings), _facts(wanted.settings)
    place = next(place for place in (*there, *asked) if there.get(place) != asked.get(place))
    return f"{place[0]}: there {there.get(place)}, asked for {asked.get(place)}"


def _facts(settings: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Settings, and those of the sources, by name and the source's number."""
    facts = {(name, 0): value for name, value in settings.items() if name != "parts"}
    facts["number of sources", 0] = len(settings["parts"])
    return facts | {
        (f"source, {key}", i): part[key] for i, part in enumerate(settings["parts"]) for key in sorted(part)
    }
