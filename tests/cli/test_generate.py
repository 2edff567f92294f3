"""`hqlt generate` as it is run in a shell; a pipe receives only the new text."""

from __future__ import annotations

import io
import sys
import tempfile

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import processors

from hqlt.cli import main
from hqlt.cli.generate import live_output
from hqlt.language import generation
from tests.language.conftest import build, prepending


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build().save_pretrained(folder / "model")
    return folder


def generated(capsys, *arguments) -> str:
    main(["generate", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_document_read_once(folder, tmp_path, capsys):
    document, state = tmp_path / "document.txt", tmp_path / "state"
    document.write_text("a document, longer than the window\n" * 50)
    assert generated(capsys, folder, "--prompt-file", document, "--max-new-tokens=0", "--save-state", state) == ""
    options = ("--prompt=and?", "--max-new-tokens=20", "--seed=3")
    expected = generated(capsys, folder / "model", "--prompt-file", document, *options)
    assert len(expected) > 1
    assert generated(capsys, folder, "--load-state", state, *options) == expected
    assert (
        generated(capsys, folder, "--load-state", state, "--prompt=and?", "--max-new-tokens=20", "--seed=4") != expected
    )


def test_a_store(folder, tmp_path, capsys):
    """A state is reused by the next command, also for another prompt with the same beginning; the text is the same."""
    document, store = tmp_path / "document.txt", ("--store", tmp_path / "store")
    document.write_text("a document, longer than the window\n" * 50)
    for prompt, reused in (("", 0), ("and?", 1749), ("and then?", 1753), ("and then?", 1758)):
        options = ("--prompt-file", document, f"--prompt={prompt}", "--greedy", "--max-new-tokens=9")
        main(["generate", str(folder), *map(str, (*options, *store))])
        printed = capsys.readouterr()
        assert f"{reused} of the prompt's {1750 + len(prompt)} tokens were reused from" in printed.err
        assert printed.out == generated(capsys, folder, *options)
    assert generated(capsys, folder, "--prompt=a text", "--max-new-tokens=0", *store) == ""


def test_drafts(folder, tmp_path, capsys):
    """Draft tokens of a smaller model or of the text do not change the text, also with a loaded state or a store."""
    smaller, state, prompt = tmp_path / "smaller", tmp_path / "state", "--prompt=" + "once more, and " * 8
    build(hidden_size=8).save_pretrained(smaller)
    options = ("--max-new-tokens=40", "--greedy")
    plain = generated(capsys, folder, prompt, *options)
    for drafts in (("--draft", smaller), ("--prompt-lookup",)):
        assert generated(capsys, folder, prompt, *options, *drafts) == plain
        for _ in range(2):
            assert generated(capsys, folder, prompt, *options, *drafts, "--store", tmp_path / "store") == plain
        assert generated(capsys, folder, "--prompt=once more, and ", "--max-new-tokens=0", "--save-state", state) == ""
        rest = "--prompt=" + "once more, and " * 7
        assert generated(capsys, folder, rest, *options, *drafts, "--load-state", state) == plain
    for wrong, match in (
        (("--draft", smaller, "--prompt-lookup"), "prompt-lookup: expected --draft or --prompt-lookup, not both"),
        (
            ("--prompt-lookup", "--num-return-sequences=2"),
            "num-return-sequences: expected 1 with --draft or --prompt-lookup, got 2",
        ),
    ):
        with pytest.raises(SystemExit, match=match):
            main(["generate", str(folder), prompt, *map(str, wrong)])


def test_several_continuations(folder, capsys):
    out = generated(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--num-return-sequences=3", "--greedy")
    rows = out.split("--- ")[1:]
    assert len(rows) == 3
    assert {row.partition("\n")[2].strip() for row in rows} == {rows[0].partition("\n")[2].strip()}
    greedy = generated(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--greedy")
    assert generated(capsys, folder, "--prompt=abc", "--max-new-tokens=9", "--temperature=0") == greedy


def test_a_prompt_begins_with_the_special_tokens_of_the_tokenizer(tmp_path, capsys, monkeypatch):
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
        (["--prompt=text"], [0, *text]),  # without the token that ends a text
        (["--prompt=<s>text"], [0, *text]),
        ([], [0]),
        (["--prompt=text</s>"], [0, *text, 1]),
    ):
        generated(capsys, tmp_path, "--max-new-tokens=1", *options)
        assert given.pop() == expected
    state = tmp_path / "state"
    generated(capsys, tmp_path, "--prompt=text", "--max-new-tokens=0", "--save-state", state)
    generated(capsys, tmp_path, "--prompt=text", "--max-new-tokens=1", "--load-state", state)
    assert given == [[0, *text], text]  # no special tokens after a loaded state


def test_long_rows_are_whole_on_a_terminal():
    """Rows are wrapped in their panels, and printed in full at the end, however few lines the terminal has."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=6)
    words = [[f"w{row}x{i}" for i in range(50)] for row in range(3)]
    with live_output(console, "prompt", 3) as write:
        for row, some in enumerate(words):
            for word in some:
                write(row, f"{word} ")
    last = console.file.getvalue().rpartition("\x1b[?25h")[2]
    assert set(last.split()) >= {word for some in words for word in some}
    assert {len(line) for line in last.splitlines() if line.startswith("│")} == {40}


def test_a_state_is_rescued_if_its_file_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    state, saved = tmp_path / "state", generation.save_past
    options = ("--prompt=a text", "--max-new-tokens=9", "--seed=1", "--save-state", state)

    def failing(path, *rest):
        if path == state:
            raise OSError(28, "No space left on device")
        saved(path, *rest)

    monkeypatch.setattr(generation, "save_past", failing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"state could not be written \(No space left .*\); the state was saved to .*state"
    ):
        generated(capsys, folder, *options)
    monkeypatch.setattr(generation, "save_past", saved)
    generated(capsys, folder, *options)
    (elsewhere,) = tmp_path.glob("hqlt-*/state")
    assert same(elsewhere, state)


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_ctrl_c_saves_the_state_after_the_prompt(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "continue_text", interrupted)
    with pytest.raises(SystemExit):
        generated(capsys, folder, "--prompt=a text", "--save-state", tmp_path / "state")
    monkeypatch.undo()
    generated(capsys, folder, "--prompt=a text", "--max-new-tokens=0", "--save-state", tmp_path / "again")
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
        (
            ["FOLDER", "--prompt=a", "--save-state=nowhere/s"],
            "save-state: expected a file in an existing folder, got nowhere",
        ),
        (["FOLDER", "--prompt=a", "--save-state=FOLDER"], "save-state: expected a file in an existing folder"),
        (["FOLDER", "--prompt=a", "--num-return-sequences=0"], "num-return-sequences: expected at least 1"),
        (["FOLDER", "--prompt=a", "--temperature=-1"], "temperature: expected a number ≥ 0"),
        (["FOLDER", "--prompt=a", "--top-p=2"], "top-p: expected above 0 and at most 1"),
        (["FOLDER", "--prompt=a", "--top-k=0"], "top-k: expected at least 1"),
        (["FOLDER", "--prompt=a", "--temperature=.nan"], "temperature: expected a number ≥ 0"),
        (["FOLDER", "--prompt=a", "--temperature=.inf"], "temperature: expected a number ≥ 0"),
        (["FOLDER", "--prompt=a", "--max-new-tokens=0"], "max-new-tokens: expected at least 1, or --save-state"),
        (
            ["FOLDER", "--prompt=a", "--store=FOLDER", "--load-state=FOLDER/model/config.json"],
            "store: expected no --load-state",
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
def test_invalid_options_are_refused(folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["generate", *(argument.replace("FOLDER", str(folder)) for argument in arguments)])


def test_a_model_without_its_tokenizer(tmp_path):
    build(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"expected a tokenizer's files .* beside a model of 300 tokens"):
        main(["generate", str(tmp_path), "--prompt=a"])
