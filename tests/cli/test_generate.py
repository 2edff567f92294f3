"""The command as a person runs it: into a pipe goes the new text alone."""

from __future__ import annotations

import pytest

from hqlt.cli import main
from tests.language.conftest import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build().save_pretrained(folder / "model")
    return folder


def said(capsys, *arguments) -> str:
    main(["generate", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_document_read_once(folder, tmp_path, capsys):
    document, state = tmp_path / "document.txt", tmp_path / "state"
    document.write_text("a document, longer than the window\n" * 50)
    assert said(capsys, folder, "--prompt-file", document, "--tokens=0", "--save-state", state) == ""
    options = ("--prompt=and?", "--tokens=20", "--seed=3")
    anew = said(capsys, folder / "model", "--prompt-file", document, *options)
    assert len(anew) > 1
    assert said(capsys, folder, "--load-state", state, *options) == anew
    assert said(capsys, folder, "--load-state", state, "--prompt=and?", "--tokens=20", "--seed=4") != anew


def test_rows_and_their_ends(folder, capsys):
    out = said(capsys, folder, "--prompt=abc", "--tokens=9", "--batch=3", "--greedy")
    rows = out.split("--- ")[1:]
    assert len(rows) == 3
    assert {row.partition("\n")[2].strip() for row in rows} == {rows[0].partition("\n")[2].strip()}
    greedy = said(capsys, folder, "--prompt=abc", "--tokens=9", "--greedy")
    assert said(capsys, folder, "--prompt=abc", "--tokens=9", "--temperature=0") == greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt=a"], "nowhere: expected a model's folder .* found no such folder"),
        (["FOLDER"], "expected a text of at least one token"),
        (["FOLDER", "--prompt=a", "--load-state=nowhere"], "nowhere"),
        (["FOLDER", "--prompt=a", "--batch=2", "--save-state=s"], "save-state: expected one continuation"),
        (["FOLDER", "--prompt=a", "--save-state=nowhere/s"], "save-state: expected a file in a folder .* got nowhere"),
        (["FOLDER", "--prompt=a", "--save-state=FOLDER"], "save-state: expected a file in a folder"),
        (["FOLDER", "--prompt=a", "--batch=0"], "batch ≥ 1"),
        (["FOLDER", "--prompt=a", "--temperature=-1"], "temperature ≥ 0"),
        (["FOLDER", "--prompt=a", "--top-p=2"], "0 < top-p ≤ 1"),
        (["FOLDER", "--prompt=a", "--top-k=0"], "top-k ≥ 1"),
        (["FOLDER", "--prompt=a", "--device=nothing"], "device: expected one .* got 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_said(folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["generate", *(argument.replace("FOLDER", str(folder)) for argument in arguments)])


def test_a_model_without_its_tokenizer(tmp_path):
    build(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"expected a tokenizer's files .* beside a model of 300 tokens"):
        main(["generate", str(tmp_path), "--prompt=a"])
