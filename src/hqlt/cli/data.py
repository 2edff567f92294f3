"""`hqlt data prepare` and `hqlt data check`: data folders of tokens."""

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
    """Tokenize documents for training: memory-mapped shards and a manifest with checksums.

    Run the same command again to resume after an interruption; a finished folder is left unchanged. Documents are held
    out for validation and test by a hash of their text.

    Args:
        source: python-library, a file (.txt, .md, .jsonl or .ndjson, optionally with .gz, .bz2, .xz or .zst after it;
            .parquet), a folder of such files, or the name of a dataset on the Hugging Face hub, such as
            HuggingFaceFW/fineweb-edu, which is streamed.
        folder: where the tokens are written; default: runs/data/SOURCE-TOKENIZER.
        tokenizer: bytes, a tokenizer.json, a folder that contains one, or a name on the hub.
        subset: name of a subset of a hub dataset, such as sample-100BT.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = folder or Path("runs/data") / slug(source, subset, tokenizer)
    with PreparingDisplay(console) as display:
        try:
            manifest = prepare(
                source, folder, tokenizer=tokenizer, subset=subset, on_progress=display.on_progress, **how
            )
        except KeyboardInterrupt:
            command = shlex.join(["hqlt", *sys.argv[1:]])
            console.print(f"stopped with {display.kept:,} tokens in finished shards; resume with: {command}")
            raise
    if not display.has_started:
        console.print("already finished:")
    console.print(summary(folder, manifest))


def _check(folder: Path) -> None:
    """Compare each file of a data folder with its checksum. The exit status is 1 if any differs.

    Args:
        folder: a folder written by `hqlt data prepare`.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    files, damaged = 0, 0
    with console.status("reading") as status:
        for name, fault in check(folder):
            status.update(name)
            files += 1
            if fault is not None:
                damaged += 1
                console.print(fault)
    console.print(f"{folder}: {files - damaged} of {files} files match the manifest")
    if damaged:
        raise SystemExit(1)


data = {"prepare": _prepare, "check": _check}


def summary(folder: Path, manifest: Manifest) -> str:
    """A text with one line per split."""
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
        lines.append(f"skipped {skipped['documents']:,} documents that the validation and test files contain")
    if skipped["files"]:
        names = join_names(skipped["names"], skipped["files"])
        lines.append(f"skipped {skipped['files']:,} files with an unknown format: {names}; choose files with --pattern")
    return "\n".join(lines)


def slug(*names: str | None) -> str:
    """A folder name made from other names."""
    parts = [re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-.") for name in names if name]
    return "-".join(filter(None, parts))
