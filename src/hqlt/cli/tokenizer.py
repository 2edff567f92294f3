"""`hqlt tokenizer train`: a tokenizer of one's own."""

from __future__ import annotations

import signal
from pathlib import Path

from rich.console import Console

from hqlt.cli.data import slug
from hqlt.data import parts_of, train_tokenizer, training_texts


def _train(
    source: str,
    vocabulary: int = 8192,
    out: Path | None = None,
    text_field: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    pattern: str | None = None,
    validation: Path | None = None,
    test: Path | None = None,
    validation_share: float | None = None,
    test_share: float | None = None,
    limit_bytes: int | None = None,
) -> None:
    """Learn byte-level BPE from the documents that `hqlt data prepare` takes for training with the same options.

    Leaves a tokenizer.json and a tokenizer_config.json, which AutoTokenizer reads. The same documents give the same
    file.

    Args:
        source: python-library, a file, a folder, or the name of a dataset on the Hugging Face hub.
        vocabulary: tokens in all: each byte, <|endoftext|>, and what is learned.
        out: the tokenizer's folder; runs/tokenizers/SOURCE-VOCABULARY by default.
        text_field: the field or column with the text, in JSON lines, Parquet and datasets; text by default.
        subset: of a dataset on the hub.
        split: of a dataset on the hub; train by default.
        separator: a line that stands between two documents of a text file, "" for blank lines.
        pattern: which files of a folder.
        validation: a file or folder for validation.
        test: a file or folder for the test split.
        validation_share: of the documents; 0.005 by default.
        test_share: of the documents; 0.005 by default.
        limit_bytes: stop reading after the document with which so much was read; some 1000000000 are plenty.
    """
    options = dict(locals())
    vocabulary, limit_bytes = options.pop("vocabulary"), options.pop("limit_bytes")
    out = options.pop("out") or Path("runs/tokenizers") / f"{slug(source, subset)}-{vocabulary}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"reading, then counting pairs → {out}")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # `tokenizers` would not listen for a minute or more
    try:
        trained = train_tokenizer(training_texts(parts_of(**options)), vocabulary, out, limit_bytes)
    finally:
        signal.signal(signal.SIGINT, before)
    fewer = "" if trained.vocab_size == vocabulary else f" (the text has not pairs enough for {vocabulary:,})"
    console.print(f"{out}: a vocabulary of {trained.vocab_size:,}{fewer}")
    console.print(f"use it with: hqlt data prepare … --tokenizer={out}")


tokenizer = {"train": _train}
