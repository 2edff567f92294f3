"""Loaders for data that is not distributed as JSON: WikiText as one text file, PIQA's labels in a separate file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["piqa", "process_results", "wikitext", "wikitext_detokenizer"]


def piqa(folder: str, **_: Any) -> dict[str, Dataset]:
    """Read piqa_valid.jsonl (goal, sol1, sol2) and piqa_valid_labels.lst (0 or 1 per line)."""
    questions = Path(folder, "piqa_valid.jsonl").read_text(encoding="utf-8").splitlines()
    labels = Path(folder, "piqa_valid_labels.lst").read_text(encoding="utf-8").split()
    rows = [{**json.loads(q), "label": int(label)} for q, label in zip(questions, labels, strict=True)]
    return {"test": Dataset.from_list(rows)}


def wikitext(folder: str, **_: Any) -> dict[str, Dataset]:
    """Read wikitext2_test.txt, in which an article begins with a line such as " = Robert Boulter = "."""
    text = Path(folder, "wikitext2_test.txt").read_text(encoding="utf-8")
    pages = re.split(r"(?m)^(?= = [^=].* = $)", text)
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}
