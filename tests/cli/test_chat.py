"""A conversation as it is held: lines into stdin, answers out of stdout, all else on stderr."""

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
def said(monkeypatch, capsys):
    """What a conversation of these lines prints: (stdout, stderr)."""

    def run(folder, *lines: str, options=OPTIONS):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", str(folder), *options])
        return capsys.readouterr()

    return run


def counts(err: str) -> list[tuple[int, int]]:
    """Of each answer: tokens read, and reused."""
    return [(int(read), int(reused)) for read, reused in re.findall(r"(\d+) read, (\d+) reused", err)]


def test_a_conversation(folder, said):
    out, err = said(folder, "One?", "", "  Two?", " /three")
    _, answers = talk(Chat(ascii_model(), load_tokenizer("bytes")), ["One?", "Two?", "/three"])
    assert out == "".join(f"{answer.text}\n" for answer in answers)
    assert counts(err) == [(answer.read, answer.reused) for answer in answers]
    assert 'no chat template beside this model: it continues a text in which messages stand after "User:"' in err
    assert re.search(
        r"first token after \d\.\d\d s · tokens: 23 read, 0 reused, 12 made at [\d,]+ per second · state \d\.\d kB", err
    )


def test_a_turn_taken_back_a_fork_and_another_try(folder, said):
    out, err = said(folder, "One?", "Two?", "/undo", "Two?", "/fork b", "Three?", "/switch main", "Three?", "/retry")
    _, two, again, three, same, retried, _ = out.split("\n")
    assert two == again and three == same == retried
    _, _, *others = counts(err)
    assert [read for read, _ in others] == [1, len(two) - 11 + len("\n\nUser:\nThree?\n\nAssistant:\n"), 1, 1]
    assert "b: 2 turns in common" in err and f"main: 2 turns; last: …{two.strip()}" in " ".join(err.split())
    _, err = said(folder, "One?", "/fork b", "/switch")
    assert re.search(r"  main: 1 turn\n\* b: 1 turn\n", err)


def test_saved_and_loaded(folder, said, tmp_path):
    file = tmp_path / "talk"
    one, err = said(folder, "One?", f"/save {file}", "Two?")
    assert f"{file}: 0.0 MB" in " ".join(err.split())
    two, later = said(folder, f"/load {file}", "Two?")
    assert one.split("\n")[1:] == two.split("\n") and counts(err)[1:] == counts(later)
    weights = folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    _, err = said(folder, "One?", f"/save {weights}")
    assert "expected format" in err and weights.read_bytes() == before


def test_a_store_of_states(folder, said, tmp_path):
    options = (*OPTIONS, f"--store={tmp_path / 'store'}")
    out, _ = said(folder, "One?", "Two?", options=options)
    again, err = said(folder, "One?", "Two?", options=options)
    assert again == out and [read for read, _ in counts(err)] == [1, 1]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file: expected a folder, found a file"):
        said(folder, options=[f"--store={tmp_path / 'file'}"])


def test_answers_guessed_ahead(folder, said):
    """By another model, or from the conversation: the same answers, and the same states are found again."""
    lines = ("One? One? One? One?", "Two?", "/undo", "One?")
    expected, err = said(folder, *lines)
    for option in ("--prompt-lookup", f"--draft={folder}"):
        guessed, other = said(folder, *lines, options=(*OPTIONS, option))
        assert guessed == expected and counts(other) == counts(err)
    with pytest.raises(SystemExit, match="--draft or --prompt-lookup, not both"):
        said(folder, options=["--prompt-lookup", f"--draft={folder}"])


def test_a_system_message(folder, said, tmp_path):
    plain, err = said(folder, "/system Be brief.", "One?", "/system", "/retry")
    assert "the next answer reads the whole conversation again" in err
    assert (
        plain
        == said(folder, "One?", "/retry", options=(*OPTIONS, "--system=Be brief."))[0].split("\n")[0]
        + "\n"
        + (said(folder, "One?")[0])
    )
    size = save_chat_tokenizer(tmp_path, CHATML.replace("message.role +", "message.role | replace('system', '') +"))
    build(vocab_size=size).save_pretrained(tmp_path)
    _, err = said(tmp_path, "/system Be brief.")
    assert "no chat template" not in err


def test_a_template_without_a_place_for_it(said, tmp_path):
    size = save_chat_tokenizer(tmp_path, "{{ raise_exception('no') if messages[0].role == 'system' else 'a' }}")
    build(vocab_size=size).save_pretrained(tmp_path)
    message = "system: expected a chat template with a place for it, but this model's has none"
    assert message in said(tmp_path, "/system Be brief.")[1]
    with pytest.raises(SystemExit, match=message):
        said(tmp_path, options=["--system=Be brief."])


def test_seeds(folder, said):
    options = ("--max-new-tokens=12", "--temperature=2", "--top-k=90")
    one, same, other = (said(folder, "One?", "/retry", options=(*options, f"--seed={seed}"))[0] for seed in (1, 1, 2))
    assert one == same != other
    assert len(set(one.split("\n"))) == 3  # another try is another answer


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo", "/undo: expected a turn, but nothing has been asked yet"),
        ("/retry", "/retry: expected a turn, but nothing has been asked yet"),
        ("/frok b", r"expected one of /save, .*/quit, got /frok \(did you mean /fork\?\)"),
        ("/", "expected one of .* got /; a blank before the slash makes it a question"),
        ("/fork", "/fork: expected NAME behind it, got nothing"),
        ("/undo 2", "/undo: expected nothing behind it, got 2"),
        ("/fork main", "/fork: expected a new name, got main, which is taken; /switch main goes there"),
        ("/switch b", "/switch: expected one of main, got b"),
        ("/save nowhere/talk", "save: expected a conversation, got one without messages"),
        ("/load nowhere", "No such file or directory: nowhere"),
        ("/help", r"/switch \[NAME\] +to the conversation of that name"),
    ],
)
def test_what_cannot_be_done_is_said(folder, said, line, message):
    _, err = said(folder, line)
    assert re.search(message, " ".join(err.split()))


def test_options_that_cannot_be(folder, said):
    for option, message in (
        ("--max-new-tokens=0", "max-new-tokens: expected at least 1"),
        ("--top-p=2", "top-p ≤ 1"),
        ("--kept=3", "retention"),
    ):
        with pytest.raises(SystemExit, match=message):
            said(folder, options=[option])


class Terminal:
    """The command as it runs in one."""

    def __init__(self, *arguments: str) -> None:
        self.end, end = os.openpty()
        code = "from hqlt.cli import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
        os.close(end)
        self.shown = ""

    def until(self, pattern: str) -> None:
        """Wait until this is shown, after what was waited for before."""
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert select.select([self.end], [], [], 60)[0], f"expected {pattern}, got {self.shown}"
            self.shown += os.read(self.end, 4096).decode(errors="replace")
        self.shown = self.shown[found.end() :]

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="expects readline on a pseudo-terminal")
def test_in_a_terminal(folder):
    """A prompt, the line before by the arrow key, Ctrl-C for an answer that would never end, Ctrl-D to leave."""
    terminal = Terminal("chat", str(folder), "--max-new-tokens=1000000", "--greedy")
    terminal.until("Ctrl-D leaves.*main>")
    terminal.type("One?\n")
    terminal.until("One?")
    for keys in ("", "\x1b[A\n"):
        terminal.type(keys)
        terminal.until("One?.*.{100}" if keys else ".{100}")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("first token after.*ended by Ctrl-C.*main>")
    terminal.type("a")
    terminal.until("a")
    time.sleep(0.1)  # until it waits for the next key
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("/quit or Ctrl-D leaves.*main>")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    os.close(terminal.end)
