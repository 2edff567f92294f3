"""The long-document example: questions take less time than reading the text, and can be rolled back."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

from hqlt.language import generation
from tests.language.conftest import build

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "long_document.py"


def test_a_long_document(folder, tmp_path, capsys, monkeypatch):
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times. " * 100)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(folder), str(book)])
    runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    past = generation.prefill(build(), [0, 0])
    assert [line.split(" s   ")[1] for line in lines if re.match(r" *\d+\.\d{3} s   ", line)] == [
        "to read 5,300 tokens",
        "to ask 'Who is it about?' and to answer",
        "to ask 'How does it begin?' and to answer",
        "to ask 'And how does it end?' and to answer",
        "to fork and read in both",
        "to remove 28 tokens",
    ]
    assert lines[1] == f"{sum(state.bytes_per_row() for state in past.states):,} bytes of state"
    assert lines[-1] == "the answer equals that after reading the book again: True"
