import os
import signal
import subprocess
import sys
import time

import pytest

from hqlt.cli import main
from hqlt.data import TokenFiles
from tests.data.conftest import texts, write_lines

pytest.importorskip("tokenizers")


def test_preparing_data_with_a_trained_tokenizer(tmp_path, capsys):
    lines = str(write_lines(tmp_path / "a.jsonl", texts(50)))
    tokenizer, folder = tmp_path / "bpe", tmp_path / "tokens"
    main(["tokenizer", "train", lines, "--vocabulary=300", f"--out={tokenizer}"])
    assert f"{tokenizer}: vocabulary size 300\n" in capsys.readouterr().out
    command = ["data", "prepare", lines, f"--tokenizer={tokenizer}", f"--folder={folder}", "--validation-share=0.1"]
    main(command)
    printed = capsys.readouterr().out
    assert f"{folder}: tokens of {tokenizer}, vocabulary 300" in printed
    assert "already finished" not in printed
    assert f"{len(TokenFiles(folder)):,} tokens           44 documents" in printed
    main(command)
    assert "already finished" in capsys.readouterr().out
    main(["data", "check", str(folder)])
    assert "7 of 7 files match the manifest" in capsys.readouterr().out

    tokens = folder / "train-00000.tokens"
    tokens.write_bytes(bytes(len(tokens.read_bytes())))
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(folder)])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "train-00000.tokens: expected the checksum" in printed
    assert "6 of 7 files match the manifest" in printed


def test_what_is_skipped_is_reported(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", texts(50))
    held = write_lines(tmp_path / "held.jsonl", texts(60)[40:])
    for i in range(9):
        (tmp_path / "in" / f"{i}.csv").touch()
    command = ["data", "prepare", str(tmp_path / "in"), f"--validation={held}", f"--folder={tmp_path / 'd'}"]
    for _ in range(2):  # also for a finished folder
        main(command)
        printed = capsys.readouterr().out
        assert "skipped 10 documents that the validation and test files contain\n" in printed
        assert "skipped 9 files with an unknown format: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, 5.csv, " in printed
        assert "7.csv and 1 more; choose files with --pattern\n" in printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--limit-tokens=0"], "limit_tokens: expected at least 1"),
        (["--shard-tokens=-1"], "expected at least 1"),
        (["--validation-share=2"], "expected shares that sum to less than 1, got 2.0"),
        (["--test-share=.nan"], "expected shares that sum to less than 1, got 0.005, nan"),
        (["--validation=FOLDER"], "FOLDER: expected files of one format among .* found none"),
        (["--tokenizer=FOLDER"], "expected a folder with a tokenizer.json"),
        (["--text-field=body"], "a.jsonl, line 1: expected a field 'body', got 'text', 'n'"),
        (["--validation-share=0.5", "--test-share=0.49"], "expected at least 4 different documents"),
    ],
)
def test_a_failed_command_leaves_no_folder(wrong, message, tmp_path):
    lines, empty = write_lines(tmp_path / "a.jsonl", texts(3)), tmp_path / "empty"
    empty.mkdir()
    options = [option.replace("FOLDER", str(empty)) for option in wrong]
    with pytest.raises(SystemExit, match=message.replace("FOLDER", str(empty))):
        main(["data", "prepare", str(lines), f"--folder={tmp_path / 'd'}", *options])
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").iterdir())


def test_too_little_text_for_the_vocabulary_is_reported(tmp_path, capsys):
    lines = str(write_lines(tmp_path / "a.jsonl", ["a a a", "b b", "c"]))
    main(["tokenizer", "train", lines, f"--out={tmp_path / 'bpe'}", "--validation-share=0", "--test-share=0"])
    assert "has too few pairs for 8,192" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    lines = str(write_lines(tmp_path / "a.jsonl", texts(50)))
    main(["data", "prepare", lines, f"--folder={tmp_path / 'd'}"])
    for wrong, message in (
        (["data", "prepare", lines, f"--folder={tmp_path / 'd'}", "--limit-tokens=9"], "limit_tokens: expected None"),
        (["data", "prepare", "nothing.txt"], "expected a file or a folder, found none"),
        (["data", "check", str(tmp_path)], "expected a folder written by `hqlt data prepare`"),
        (["tokenizer", "train", lines, "--vocabulary=12"], "vocabulary: expected at least 257"),
        (["tokenizer", "train", lines, "--limit-bytes=0"], "limit_bytes: expected at least 1, got 0"),
        (["tokenizer", "train", lines, f"--out={tmp_path}"], "expected a new or empty folder"),
        (["data", "prepare", lines, f"--folder={lines}"], "expected a folder, found a file"),
        (["data", "prepare", lines, "--separator="], "separator: expected none, because .* remove --separator"),
        (
            ["tokenizer", "train", lines, "--out=/proc/nothing/here"],
            "/proc/nothing/here could not be written: No such file",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(wrong)
    for wrong in (["data"], ["data", "prepar"], ["data", "prepare"], ["data", "prepare", lines, "--folde=x"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "prepare" in capsys.readouterr().err


SLOWLY = """
import time
from hqlt.cli import main
from hqlt.data.shard import ShardWriter

finish = ShardWriter.finish
ShardWriter.finish = lambda self: (time.sleep(0.1), finish(self))[1]  # slow, so that it is interrupted while running
main()
"""


def test_ctrl_c_prints_how_to_resume(tmp_path, request, capsys):
    documents = [text * 60 for text in texts(300)]
    lines = write_lines(tmp_path / "a.jsonl", documents)
    log = tmp_path / "log"
    command = ["data", "prepare", str(lines), f"--folder={tmp_path / 'd'}", "--shard-tokens=20000"]
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command], stdout=out, stderr=out)
        request.addfinalizer(lambda: (process.kill(), process.wait()))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((tmp_path / "d").glob("train-00003*")):
            time.sleep(0.005)
            assert process.poll() is None, log.read_text()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    printed = log.read_text()
    assert "tokens in finished shards; resume with: hqlt data prepare" in printed
    assert "Traceback" not in printed
    main(command)
    assert "tokens of an earlier run" in capsys.readouterr().out
    assert TokenFiles(tmp_path / "d").documents > 250
