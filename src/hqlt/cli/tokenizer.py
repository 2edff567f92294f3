"""`hqlt tokenizer train`: a tokenizer of one's own."""

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
    """Learn byte-level BPE from the documents that `hqlt data prepare` takes for training with the same options.

    Leaves a tokenizer.json and a tokenizer_config.json, which AutoTokenizer reads. The same documents give the same
    file.

    Args:
        source: python-library, a file, a folder, or the name of a dataset on the Hugging Face hub.
        vocabulary: tokens in all: each byte, <|endoftext|>, and what is learned.
        out: the tokenizer's folder; runs/tokenizers/SOURCE-VOCABULARY by default.
        limit_bytes: stop reading after the document with which so much was read; some 1000000000 are plenty.
        subset: of a dataset on the hub, such as sample-100BT.
    """
    out = out or Path("runs/tokenizers") / f"{slug(source, subset)}-{vocabulary}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"reading, then counting pairs → {out}")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # `tokenizers` would not listen for a minute or more
    try:
        trained = train_tokenizer(training_texts(parts_of(source, subset=subset, **how)), vocabulary, out, limit_bytes)
    finally:
        signal.signal(signal.SIGINT, before)
    fewer = "" if trained.vocab_size == vocabulary else f" (the text has not pairs enough for {vocabulary:,})"
    console.print(f"{out}: a vocabulary of {trained.vocab_size:,}{fewer}")
    console.print(f"use it with: hqlt data prepare … --tokenizer={out}")


tokenizer = {"train": _train}
