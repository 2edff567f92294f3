from __future__ import annotations

import json
from pathlib import Path

import pytest

from hqlt.data import train_tokenizer

WORDS = "the memory of a layer is short, and precise; naïve café 日本語 🙂 def f(x): return x"


def texts(documents: int = 60) -> list[str]:
    """Different documents of many lengths."""
    words = WORDS.split()
    return [
        f"{i}: " + " ".join(words[(i * 7 + j * j) % len(words)] for j in range(1 + i * i % 37)) + "\n"
        for i in range(documents)
    ]


def write_lines(file: Path, documents: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(documents)))
    return file


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizers") / "small"
    train_tokenizer(texts(), 300, folder)
    return folder
