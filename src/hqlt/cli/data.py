"""`hqlt data prepare` and `hqlt data check`: folders of tokens."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.data import Manifest, check, prepare
from hqlt.errors import join_names
from hqlt.report.preparing import PreparingDisplay


def _prepare(
    source: str, folder: Path | None = None, tokenizer: str = "bytes", subset: str | None = None, **how: Any
) -> None:
    """Turn documents into a folder of tokens for training: memory-mapped shards, and a manifest with checksums.

    The same command resumes where an earlier one was stopped, and leaves a finished folder as it is. Documents are held
    out for validation and test by a hash of their text.

    Args:
        source: python-library, a file (.txt, .md, .jsonl, .ndjson, perhaps with .gz, .bz2, .xz or .zst behind it;
            .parquet), a folder of such files, or the name of a dataset on the Hugging Face hub, such as
            HuggingFaceFW/fineweb-edu, which is streamed.
        folder: where the tokens go; runs/data/SOURCE-TOKENIZER by default.
        tokenizer: bytes, a tokenizer.json, a folder that holds one, or a name on the hub.
        subset: of a dataset on the hub, such as sample-100BT.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = folder or Path("runs/data") / slug(source, subset, tokenizer)
    with PreparingDisplay(console) as display:
        try:
            manifest = prepare(
                source, folder, tokenizer=tokenizer, subset=subset, on_progress=display.on_progress, **how
            )
        except KeyboardInterrupt:
            again = shlex.join(["hqlt", *sys.argv[1:]])
            console.print(f"stopped with {display.kept:,} tokens in finished shards; resume with: {again}")
            raise
    if not display.worked:
        console.print("finished by an earlier start:")
    console.print(summary(folder, manifest))


def _check(folder: Path) -> None:
    """Read a folder of tokens and compare each file with its checksum. Ends with status 1 where one is wrong.

    Args:
        folder: what `hqlt data prepare` wrote.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    files, wrong = 0, 0
    with console.status("reading") as status:
        for name, fault in check(folder):
            status.update(name)
            files += 1
            if fault is not None:
                wrong += 1
                console.print(fault)
    console.print(f"{folder}: {files - wrong} of {files} parts are as the manifest says")
    if wrong:
        raise SystemExit(1)


data = {"prepare": _prepare, "check": _check}


def summary(folder: Path, manifest: Manifest) -> str:
    """A line a split."""
    lines = [f"{folder}: tokens of {manifest.tokenizer['name']}, vocabulary {manifest.tokenizer['vocab_size']:,}"]
    for split, shards in manifest.splits.items():
        if shards:
            tokens, size = manifest.tokens(split), manifest.bytes(split)
            lines.append(
                f"{split:>12} {tokens:>15,} tokens {manifest.documents(split):>12,} documents {size:>16,} bytes of text"
                f"  {size / tokens:.2f} bytes per token  {len(shards)} shard{'s' * (len(shards) > 1)}"
            )
    skipped = manifest.skipped
    if skipped["documents"]:
        lines.append(f"skipped {skipped['documents']:,} documents that are also in the files for validation and test")
    if skipped["files"]:
        names = join_names(skipped["names"], skipped["files"])
        lines.append(
            f"skipped {skipped['files']:,} files, as their kind is not known: {names}; --pattern chooses files"
        )
    return "\n".join(lines)


def slug(*names: str | None) -> str:
    """A folder's name from other names."""
    parts = [re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-.") for name in names if name]
    return "-".join(filter(None, parts))
