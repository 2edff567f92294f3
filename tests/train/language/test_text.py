"""`hqlt train` on a text file: split, trained on, and a sample at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hqlt.data import TokenFiles
from hqlt.data.text import printable
from hqlt.train.language import TrainSettings
from hqlt.train.language.run import run
from hqlt.train.language.text import prepare_file, split_text

SMALL = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "window": 4}
TEXT = "".join(f"{n} squared is {n * n}\n" for n in range(300))


def settings(data: Path, **changes) -> TrainSettings:
    return TrainSettings(**{"data": str(data), "model": SMALL, "length": 24, "batch_size": 4, "steps": 2, **changes})


def tokens_of(folder: Path, split) -> bytes:
    files = TokenFiles(folder, split)
    assert files.documents == 1
    return bytes(files.read(0, len(files))[0].tolist())


@pytest.mark.parametrize("name", ["book.txt", "book"])
def test_a_text_is_split_once_at_a_line_end(tmp_path, name):
    file = tmp_path / name
    file.write_text(TEXT)
    (tmp_path / "run").mkdir()
    data = prepare_file(file, tmp_path / "run")
    train, validation = (tokens_of(data, split).decode() for split in ("train", "validation"))
    assert train + validation == TEXT
    assert train.endswith("\n")
    assert 0.9 <= len(train) / len(TEXT) <= 0.92
    assert not TokenFiles(data).manifest.splits["test"]
    assert prepare_file(file, tmp_path / "run") == data


def test_a_text_without_lines_is_split_between_characters(tmp_path):
    parts = split_text("漢" * 100, tmp_path)
    assert (len(parts["train"]), len(parts["validation"])) == (90, 10)
    assert split_text("ab", tmp_path) == {"train": "a", "validation": "b"}


def test_a_changed_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare_file(tmp_path / "a.txt", tmp_path)
    (tmp_path / "a.txt").write_text(TEXT.replace("squared", "SQUARED"))
    with pytest.raises(ValueError, match=r"has changed since .* give another --folder"):
        prepare_file(tmp_path / "a.txt", tmp_path)


def test_other_files_are_split_as_by_data_prepare(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30)))
    data = prepare_file(tmp_path / "a.jsonl", tmp_path / "run")
    assert TokenFiles(data, "test").documents == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "found nothing at"), (b"", "of 0 characters"), (b"\xff\xfe\x00abc", "UTF-8"), ("folder", "data prepare")],
    ids=["missing", "empty", "binary", "folder"],
)
def test_invalid_text_is_refused_and_no_folder_is_created(tmp_path, content, message):
    file = tmp_path / "book.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    with pytest.raises(ValueError, match=message) as refused:
        run(settings(file), tmp_path / "runs" / "new")
    assert "book.txt" in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_one_command_trains_on_a_text_and_shows_a_sample(tmp_path):
    (tmp_path / "my book.txt").write_text(TEXT)
    options = [f"--model={json.dumps(SMALL)}", "--length=24", "--batch-size=4", "--steps=2"]
    hqlt = [sys.executable, "-m", "hqlt"]
    ran = subprocess.run([*hqlt, "train", "--data=my book.txt", *options], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    *_, page, again, end = ran.stdout.split("\n")
    assert page == "page: runs/tiny-my book/report.html"
    assert again.startswith("next: hqlt generate 'runs/tiny-my book' '--prompt=")
    assert end == ""
    report = (tmp_path / "runs" / "tiny-my book" / "report.html").read_text()
    prompt = tokens_of(tmp_path / "runs/tiny-my book/data", "validation")[:48].decode()
    assert "A sample" in report and prompt in report


def test_the_report_shows_which_entries_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    run(settings(tmp_path / "a.txt", model={**SMALL, "retention": "surprise", "kept": 3}), tmp_path / "run")
    assert "Which KV entries are kept" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "kept.png").is_file()


def test_control_characters_in_a_sample_are_replaced():
    assert printable("a\n\tβ\x1b[31m\x07") == "a\n\tβ\ufffd[31m\ufffd"


@pytest.mark.parametrize("number", [512, None])
def test_the_default_vocabulary_size_is_that_of_the_data(tmp_path, number):
    from hqlt.data import parts_of, prepare, train_tokenizer, training_texts

    (tmp_path / "a.txt").write_text(TEXT * 3)
    parts = parts_of(tmp_path / "a.txt", validation_share=0, test_share=0)
    trained = train_tokenizer(training_texts(parts), 300, tmp_path / "tokenizer")
    shares = {"validation_share": 0, "test_share": 0}
    prepare(tmp_path / "a.txt", tmp_path / "tokens", tokenizer=tmp_path / "tokenizer", **shares)
    model = SMALL if number is None else {**SMALL, "vocab_size": number}
    run(settings(tmp_path / "tokens", model=model, length=8), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["vocab_size"] == (number or trained.vocab_size)
    assert trained.vocab_size > 256
    with pytest.raises(ValueError, match=f"give --model.vocab_size={trained.vocab_size}"):
        run(settings(tmp_path / "tokens", model={**SMALL, "vocab_size": 256}, length=8), tmp_path / "other")


def test_divergence_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.setattr("hqlt.train.language.trainer.PATIENCE", 3)
    with pytest.raises(ValueError, match=r"training diverged: 3 of 4 updates .* --learning-rate below 1e\+30"):
        run(settings(tmp_path / "a.txt", learning_rate=1e30, warmup_steps=0, steps=50), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
