"""`hqlt chat`: questions from stdin, answers to stdout, everything else to stderr."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from hqlt.cli import main
from hqlt.data import load_tokenizer
from hqlt.language.chat import Chat
from tests.language.conftest import CHATML, build, save_chat_tokenizer
from tests.language.test_chat import ascii_model, talk

OPTIONS = ("--max-new-tokens=12", "--greedy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ascii_model().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def converse(monkeypatch, capsys):
    """The output of a conversation with these input lines: (stdout, stderr)."""

    def run(folder, *lines: str, options=OPTIONS):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", str(folder), *options])
        return capsys.readouterr()

    return run


def counts(err: str) -> list[tuple[int, int]]:
    """Tokens read and reused for each answer."""
    return [(int(read), int(reused)) for read, reused in re.findall(r"(\d+) read, (\d+) reused", err)]


def test_a_conversation(folder, converse):
    out, err = converse(folder, "One?", "", "  Two?", " /three")
    _, answers = talk(Chat(ascii_model(), load_tokenizer("bytes")), ["One?", "Two?", "/three"])
    assert out == "".join(f"{answer.text}\n" for answer in answers)
    assert counts(err) == [(answer.read, answer.reused) for answer in answers]
    assert 'this model has no chat template: messages follow "User:" and "Assistant:" in plain text' in err
    assert re.search(
        r"first token after \d\.\d\d s · tokens: 23 read, 0 reused, 12 generated at [\d,]+ per second · state",
        err,
    )


def test_undo_fork_and_retry(folder, converse):
    out, err = converse(
        folder, "One?", "Two?", "/undo", "Two?", "/fork b", "Three?", "/switch main", "Three?", "/retry"
    )
    _, two, again, three, same, retried, _ = out.split("\n")
    assert two == again and three == same == retried
    _, _, *others = counts(err)
    assert [read for read, _ in others] == [1, len(two) - 11 + len("\n\nUser:\nThree?\n\nAssistant:\n"), 1, 1]
    assert "b: 2 turns in common" in err and f"main: 2 turns; last: …{two.strip()}" in " ".join(err.split())
    _, err = converse(folder, "One?", "/fork b", "/switch")
    assert re.search(r"  main: 1 turn\n\* b: 1 turn\n", err)


def test_saved_and_loaded(folder, converse, tmp_path):
    file = tmp_path / "talk"
    one, err = converse(folder, "One?", f"/save {file}", "Two?")
    assert f"{file}: 0.0 MB" in " ".join(err.split())
    two, later = converse(folder, f"/load {file}", "Two?")
    assert one.split("\n")[1:] == two.split("\n") and counts(err)[1:] == counts(later)
    weights = folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    _, err = converse(folder, "One?", f"/save {weights}")
    assert "expected format" in err and weights.read_bytes() == before


def test_a_store_of_states(folder, converse, tmp_path):
    options = (*OPTIONS, f"--store={tmp_path / 'store'}")
    out, _ = converse(folder, "One?", "Two?", options=options)
    again, err = converse(folder, "One?", "Two?", options=options)
    assert again == out and [read for read, _ in counts(err)] == [1, 1]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file: expected a folder, found a file"):
        converse(folder, options=[f"--store={tmp_path / 'file'}"])


def test_speculative_decoding(folder, converse):
    """With a draft model or prompt lookup, answers and the number of reused tokens stay the same."""
    lines = ("One? One? One? One?", "Two?", "/undo", "One?")
    expected, err = converse(folder, *lines)
    for option in ("--prompt-lookup", f"--draft={folder}"):
        drafted, other = converse(folder, *lines, options=(*OPTIONS, option))
        assert drafted == expected and counts(other) == counts(err)
    with pytest.raises(SystemExit, match="--draft or --prompt-lookup, not both"):
        converse(folder, options=["--prompt-lookup", f"--draft={folder}"])


def test_a_system_message(folder, converse, tmp_path):
    plain, err = converse(folder, "/system Be brief.", "One?", "/system", "/retry")
    assert "the next answer will read the whole conversation again" in err
    assert (
        plain
        == converse(folder, "One?", "/retry", options=(*OPTIONS, "--system=Be brief."))[0].split("\n")[0]
        + "\n"
        + (converse(folder, "One?")[0])
    )
    size = save_chat_tokenizer(tmp_path, CHATML.replace("message.role +", "message.role | replace('system', '') +"))
    build(vocab_size=size).save_pretrained(tmp_path)
    _, err = converse(tmp_path, "/system Be brief.")
    assert "no chat template" not in err


def test_a_template_without_system_messages(converse, tmp_path):
    size = save_chat_tokenizer(tmp_path, "{{ raise_exception('no') if messages[0].role == 'system' else 'a' }}")
    build(vocab_size=size).save_pretrained(tmp_path)
    message = "system: expected a chat template that supports a system message, got one that does not"
    assert message in converse(tmp_path, "/system Be brief.")[1]
    with pytest.raises(SystemExit, match=message):
        converse(tmp_path, options=["--system=Be brief."])


def test_seeds(folder, converse):
    options = ("--max-new-tokens=12", "--temperature=2", "--top-k=90")
    one, same, other = (
        converse(folder, "One?", "/retry", options=(*options, f"--seed={seed}"))[0] for seed in (1, 1, 2)
    )
    assert one == same != other
    assert len(set(one.split("\n"))) == 3  # a retry gives another answer


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo", "/undo: expected a question to have been asked, got an empty conversation"),
        ("/retry", "/retry: expected a question to have been asked, got an empty conversation"),
        ("/frok b", r"expected one of /save, .*/quit, got /frok; did you mean /fork\?"),
        ("/", "expected one of .* got /; put a space before the slash to ask it as a question"),
        ("/fork", "/fork: expected NAME, got no argument"),
        ("/undo 2", "/undo: expected no argument, got 2"),
        ("/fork main", "/fork: expected a new name, got main, which exists; /switch main switches to it"),
        ("/switch b", "/switch: expected one of main, got b"),
        ("/save nowhere/talk", "save: expected a conversation, got one without messages"),
        ("/load nowhere", "No such file or directory: nowhere"),
        ("/help", r"/switch \[NAME\] +switch to the conversation of that name"),
    ],
)
def test_invalid_commands_are_reported(folder, converse, line, message):
    _, err = converse(folder, line)
    assert re.search(message, " ".join(err.split()))


def test_invalid_options_are_refused(folder, converse):
    for option, message in (
        ("--max-new-tokens=0", "max-new-tokens: expected at least 1"),
        ("--top-p=2", "top-p: expected above 0 and at most 1"),
        ("--kept=3", "retention"),
    ):
        with pytest.raises(SystemExit, match=message):
            converse(folder, options=[option])


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.end, end = os.openpty()
        code = "from hqlt.cli import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
        os.close(end)
        self.output = ""

    def until(self, pattern: str) -> None:
        """Wait until the output matches, after the previous match."""
        while not (found := re.search(pattern, self.output, re.DOTALL)):
            assert select.select([self.end], [], [], 60)[0], f"expected {pattern}, got {self.output}"
            self.output += os.read(self.end, 4096).decode(errors="replace")
        self.output = self.output[found.end() :]

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="expects readline on a pseudo-terminal")
def test_in_a_terminal(folder):
    """The prompt, the arrow key for the previous line, Ctrl-C to stop an endless answer, Ctrl-D to leave."""
    terminal = Terminal("chat", str(folder), "--max-new-tokens=1000000", "--greedy")
    terminal.until("Ctrl-D leaves.*main>")
    terminal.type("One?\n")
    terminal.until("One?")
    for keys in ("", "\x1b[A\n"):
        terminal.type(keys)
        terminal.until("One?.*.{100}" if keys else ".{100}")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("first token after.*stopped by Ctrl-C.*main>")
    terminal.type("a")
    terminal.until("a")
    time.sleep(0.1)  # until it waits for input
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("/quit or Ctrl-D leaves.*main>")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    os.close(terminal.end)
