"""`hqlt tokenizer train`: train a tokenizer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.cli.data import slug
from hqlt.data import parts_of, train_tokenizer, training_texts


def _train(
    source: str,
    vocabulary: int = 8192,
    out: Path | None = None,
    limit_bytes: int | None = None,
    subset: str | None = None,
    **how: Any,
) -> None:
    """Train byte-level BPE on the documents that `hqlt data prepare` uses for training with the same options.

    Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer can load. The same documents produce the same
    file.

    Args:
        source: python-library, a file, a folder, or the name of a dataset on the Hugging Face hub.
        vocabulary: vocabulary size: all bytes, <|endoftext|> and the learned tokens.
        out: the folder of the tokenizer; default: runs/tokenizers/SOURCE-VOCABULARY.
        limit_bytes: stop reading after the document that reaches this many bytes; 1000000000 are plenty.
        subset: name of a subset of a hub dataset, such as sample-100BT.
    """
    out = out or Path("runs/tokenizers") / f"{slug(source, subset)}-{vocabulary}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"reading texts and learning merges → {out}")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise `tokenizers` may ignore Ctrl-C for minutes
    try:
        trained = train_tokenizer(training_texts(parts_of(source, subset=subset, **how)), vocabulary, out, limit_bytes)
    finally:
        signal.signal(signal.SIGINT, before)
    fewer = "" if trained.vocab_size == vocabulary else f" (the text has too few pairs for {vocabulary:,})"
    console.print(f"{out}: vocabulary size {trained.vocab_size:,}{fewer}")
    console.print(f"use it with: hqlt data prepare … --tokenizer={out}")


tokenizer = {"train": _train}
