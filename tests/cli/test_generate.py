"""The command as a person runs it: into a pipe goes the new text alone."""

from __future__ import annotations

import io
import sys
import tempfile

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import processors

from hqlt.cli import main
from hqlt.cli.generate import shown
from hqlt.language import generation
from tests.language.conftest import build, prepending


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
    assert said(capsys, folder, "--prompt-file", document, "--max-new-tokens=0", "--save-state", state) == ""
    options = ("--prompt=and?", "--max-new-tokens=20", "--seed=3")
    anew = said(capsys, folder / "model", "--prompt-file", document, *options)
    assert len(anew) > 1
    assert said(capsys, folder, "--load-state", state, *options) == anew
    assert said(capsys, folder, "--load-state", state, "--prompt=and?", "--max-new-tokens=20", "--seed=4") != anew


def test_a_store(folder, tmp_path, capsys):
    """Read by one command, reused by the next, also for another prompt that begins alike; the text is the same."""
    document, store = tmp_path / "document.txt", ("--store", tmp_path / "store")
    document.write_text("a document, longer than the window\n" * 50)
    for prompt, reused in (("", 0), ("and?", 1749), ("and then?", 1753), ("and then?", 1758)):
        options = ("--prompt-file", document, f"--prompt={prompt}", "--greedy", "--max-new-tokens=9")
        main(["generate", str(folder), *map(str, (*options, *store))])
        told = capsys.readouterr()
        assert f"{reused} of the prompt's {1750 + len(prompt)} tokens were reused from" in told.err
        assert told.out == said(capsys, folder, *options)
    assert said(capsys, folder, "--prompt=a text", "--max-new-tokens=0", *store) == ""


def test_drafts(folder, tmp_path, capsys):
    """Proposed by a smaller model or looked up in the text: the text is the same, also after a file or a store."""
    smaller, state, prompt = tmp_path / "smaller", tmp_path / "state", "--prompt=" + "once more, and " * 8
    build(hidden_size=8).save_pretrained(smaller)
    options = ("--max-new-tokens=40", "--greedy")
    plain = said(capsys, folder, prompt, *options)
    for drafts in (("--draft", smaller), ("--prompt-lookup",)):
        assert said(capsys, folder, prompt, *options, *drafts) == plain
        for _ in range(2):
            assert said(capsys, folder, prompt, *options, *drafts, "--store", tmp_path / "store") == plain
        assert said(capsys, folder, "--prompt=once more, and ", "--max-new-tokens=0", "--save-state", state) == ""
        rest = "--prompt=" + "once more, and " * 7
        assert said(capsys, folder, rest, *options, *drafts, "--load-state", state) == plain
    for wrong, match in (
        (("--draft", smaller, "--prompt-lookup"), "prompt-lookup: expected --draft or --prompt-lookup, not both"),
        (
            ("--prompt-lookup", "--num-return-sequences=2"),
            "num-return-sequences: expected 1 with --draft or --prompt-lookup, got 2",
        ),
    ):
        with pytest.raises(SystemExit, match=match):
            main(["generate", str(folder), prompt, *map(str, wrong)])


def test_rows_and_their_ends(folder, capsys):
    out = said(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--num-return-sequences=3", "--greedy")
    rows = out.split("--- ")[1:]
    assert len(rows) == 3
    assert {row.partition("\n")[2].strip() for row in rows} == {rows[0].partition("\n")[2].strip()}
    greedy = said(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--greedy")
    assert said(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--temperature=0") == greedy


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tmp_path, capsys, monkeypatch):
    tokenizer = prepending()
    tokenizer.bos_id = 0
    tokenizer.tokenizer.add_special_tokens(["<s>", "</s>"])
    processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.tokenizer.post_processor = processor
    build(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    given = []
    prefill = generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *a: given.append(a[1]) or prefill(*a))
    text = tokenizer.encode("text")
    for options, expected in (
        (["--prompt=text"], [0, *text]),  # and no token that ends it
        (["--prompt=<s>text"], [0, *text]),
        ([], [0]),
        (["--prompt=text</s>"], [0, *text, 1]),
    ):
        said(capsys, tmp_path, "--max-new-tokens=1", *options)
        assert given.pop() == expected
    state = tmp_path / "state"
    said(capsys, tmp_path, "--prompt=text", "--max-new-tokens=0", "--save-state", state)
    said(capsys, tmp_path, "--prompt=text", "--max-new-tokens=1", "--load-state", state)
    assert given == [[0, *text], text]  # in the middle of a text nothing begins


def test_long_rows_are_whole_on_a_terminal():
    """Wrapped in their panels, and all of them at the end, however many lines the terminal has."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=6)
    words = [[f"w{row}x{i}" for i in range(50)] for row in range(3)]
    with shown(console, "prompt", 3) as told:
        for row, some in enumerate(words):
            for word in some:
                told(row, f"{word} ")
    last = console.file.getvalue().rpartition("\x1b[?25h")[2]
    assert set(last.split()) >= {word for some in words for word in some}
    assert {len(line) for line in last.splitlines() if line.startswith("│")} == {40}


def test_what_was_read_is_not_lost(folder, tmp_path, capsys, monkeypatch):
    state, saved = tmp_path / "state", generation.save_past
    options = ("--prompt=a text", "--max-new-tokens=9", "--seed=1", "--save-state", state)

    def failing(path, *rest):
        if path == state:
            raise OSError(28, "No space left on device")
        saved(path, *rest)

    monkeypatch.setattr(generation, "save_past", failing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"state could not be written \(No space left .*\); what was read is in .*state"
    ):
        said(capsys, folder, *options)
    monkeypatch.setattr(generation, "save_past", saved)
    said(capsys, folder, *options)
    (elsewhere,) = tmp_path.glob("hqlt-*/state")
    assert same(elsewhere, state)


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_ctrl_c_keeps_the_prompt(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "continue_text", interrupted)
    with pytest.raises(SystemExit):
        said(capsys, folder, "--prompt=a text", "--save-state", tmp_path / "state")
    monkeypatch.undo()
    said(capsys, folder, "--prompt=a text", "--max-new-tokens=0", "--save-state", tmp_path / "again")
    assert same(tmp_path / "state", tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt=a"], "nowhere: expected a model's folder .* found no such folder"),
        (["FOLDER"], "expected a text of at least one token"),
        (["FOLDER", "--prompt=a", "--load-state=nowhere"], "load-state: expected a file .* found none at nowhere"),
        (
            ["FOLDER", "--prompt=a", "--num-return-sequences=2", "--save-state=s"],
            "save-state: expected one continuation",
        ),
        (["FOLDER", "--prompt=a", "--save-state=nowhere/s"], "save-state: expected a file in a folder .* got nowhere"),
        (["FOLDER", "--prompt=a", "--save-state=FOLDER"], "save-state: expected a file in a folder"),
        (["FOLDER", "--prompt=a", "--num-return-sequences=0"], "num-return-sequences: expected at least 1"),
        (["FOLDER", "--prompt=a", "--temperature=-1"], "temperature ≥ 0"),
        (["FOLDER", "--prompt=a", "--top-p=2"], "0 < top-p ≤ 1"),
        (["FOLDER", "--prompt=a", "--top-k=0"], "top-k ≥ 1"),
        (["FOLDER", "--prompt=a", "--temperature=.nan"], "temperature ≥ 0"),
        (["FOLDER", "--prompt=a", "--temperature=.inf"], "temperature ≥ 0"),
        (["FOLDER", "--prompt=a", "--max-new-tokens=0"], "max-new-tokens: expected at least 1, or --save-state"),
        (
            ["FOLDER", "--prompt=a", "--store=FOLDER", "--load-state=FOLDER/model/config.json"],
            "store: expected without",
        ),
        (["FOLDER", "--prompt=a", "--store=FOLDER/model/config.json"], "expected a folder, found a file"),
        (["FOLDER", "--prompt=a", "--max-new-tokens=-1"], "max-new-tokens: expected at least 0"),
        (["FOLDER", "--prompt=a", "--seed=-1"], "seed: expected from 0 to"),
        (["FOLDER", "--prompt=a", "--save-state=/proc/sys/s"], "/proc/sys: No such file"),
        (["FOLDER", "--prompt-file=nowhere"], "nowhere: No such file"),
        (["FOLDER", f"--prompt-file={sys.executable}"], "expected text in UTF-8"),
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
