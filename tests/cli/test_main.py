"""The behavior of all commands."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hqlt import cli, errors
from hqlt.cli import COMMANDS, main
from hqlt.cli.parser import Parser, canonical, nearest, parser_of
from hqlt.errors import first_line, how_to_install, reason


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hqlt", *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """The exit status (or message), stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replaces `hqlt demo` by the first item of the list: an error is raised, a function is called."""
    does: list[object] = []

    def demo(batch_size: int = 1) -> None:
        if isinstance(does[0], BaseException):
            raise does[0]
        does[0]()  # type: ignore[operator]

    monkeypatch.setattr(cli, "load", lambda name: demo)
    return does


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "hqlt: expected one of train, .*, got trian (did you mean train?)"),
        (["data", "prepar", "x"], "hqlt data: expected one of prepare, check, got prepar (did you mean prepare?)"),
        (["train", "--stepz=3"], "got --stepz=3 (did you mean --steps?)"),
        (["train", "--config=FILE"], "Option 'warmpu' is not accepted (did you mean --warmup-steps?)"),
        (["train", "--steps=many"], "hqlt train: --steps: expected a whole number, got many; see hqlt train --help"),
        (["train", "--micro-batch-size=x"], "--micro-batch-size: expected a whole number or null, got x"),
        (["train", "--precision=half"], "--precision: expected float32, bfloat16, got half"),
        (["train", "--betas=0.9"], "--betas: Expected a tuple with 2 elements"),
        (["train", "book.txt"], "expected options of this command, got book.txt"),
        (["generate"], "hqlt generate: the following arguments are required: model"),
    ],
)
def test_a_usage_error_is_one_line_with_a_suggestion(arguments, expected, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("warmpu: 10\n")
    status, out, err = ends([a.replace("FILE", str(tmp_path / "a.yaml")) for a in arguments], capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in expected.split(".*"))


NAMES = ["folder", "data", "steps", "learning_rate", "weight_decay", "batch_size", "micro_batch_size", "eps", "model"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", ["learning_rate"]),
        ("epochs", ["steps"]),
        ("stpes", ["steps"]),
        ("learning-rte", ["learning_rate"]),
        ("batch", ["batch_size"]),
        ("decay-weight", ["weight_decay"]),
        ("window", ["model.window"]),
        ("windw", ["model.window"]),
        ("n-embd", ["model.hidden_size"]),
        ("output-dir", ["folder"]),
        ("env", []),
        ("dropout", []),
        ("resume", []),
    ],
)
def test_suggestions_for_misspelled_names(wrong, meant):
    assert nearest(wrong, NAMES) == meant


def test_suggestions_from_several_groups():
    names = ["ppo.learning_rate", "ppo.clip_range", "sac.learning_rate", "steps"]
    assert nearest("lr", names) == ["ppo.learning_rate", "sac.learning_rate"]
    assert nearest("ppo.lr", names) == ["ppo.learning_rate"]
    assert nearest("ppo.clip-ragne", names) == ["ppo.clip_range"]


def toy(source: Path, rates: tuple[float, float] = (0.1, 0.2), greedy: bool = False, top_p: float = 1.0) -> None:
    """A command."""


@pytest.fixture
def parser() -> Parser:
    return parser_of(toy, "hqlt toy")


def test_canonical_arguments(parser, tmp_path):
    (tmp_path / "a.yaml").write_text("top_p: 0.5\n")
    given = ["x", "--greedy", "--rates=0.3,0.4", "--config", f"{tmp_path}/a.yaml", "--top-p", "0.9", "--", "--top-p"]
    assert canonical(given, parser) == [
        f"--config={tmp_path}/a.yaml", "x", "--greedy=true", "--rates=[0.3,0.4]", "--top_p", "0.9", "--", "--top-p",
    ]  # fmt: skip
    assert canonical(["--greedy", "false", "--rates", "1,2", "--config"], parser) == [
        "--greedy=false", "--rates=[1,2]", "--config",
    ]  # fmt: skip


def test_aliases_are_accepted():
    def tuned(learning_rate: float = 1.0, length: int = 1) -> None:
        """A command."""

    wanted = ["--learning_rate=0.1", "--length", "3"]
    assert canonical(["--lr=0.1", "--context-length", "3"], parser_of(tuned, "hqlt tuned")) == wanted
    assert canonical(["--lr=0.1"], parser_of(toy, "hqlt toy")) == ["--lr=0.1"]


def test_help_shows_no_python_syntax(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "usage: hqlt toy SOURCE [options]" in shown
    assert "--top-p" in shown and "--print-config" in shown
    assert "class" not in shown and "top_p" not in shown


def test_print_config(capsys):
    status, out, _ = ends(["train", "--steps=7", "--print-config"], capsys)
    assert status == 0
    assert "steps: 7" in out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"steps: \xff", "--config: expected YAML or JSON in UTF-8 in FILE"),
        (b"steps: [", "--config: expected YAML or JSON in UTF-8 in FILE"),
        (b"", "--config: expected lines such as steps: 100, one per option, in FILE, got None"),
        (b"- 1", "--config: expected lines such as steps: 100"),
        (None, "FILE: No such file or directory"),
        ("folder", "FILE: Is a directory"),
    ],
)
def test_an_unreadable_config_file_is_reported(content, expected, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    message, _, _ = ends(["train", f"--config={file}"], capsys)
    assert expected.replace("FILE", str(file)) in str(message)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The settings that `hqlt train` was called with."""
    settings: list[object] = []
    monkeypatch.setattr("hqlt.train.language.run.run", lambda given, *_: settings.append(given))
    return settings


def test_the_command_line_overrides_a_config_file(tmp_path, given):
    (tmp_path / "a.yaml").write_text("steps: 7\nlearning_rate: 1e-4\nmodel: {window: 8}\n")
    main(["train", "--model.mixer=sum", "--steps=8", f"--config={tmp_path / 'a.yaml'}"])
    assert given[0].model == {"window": 8, "mixer": "sum"}
    assert (given[0].steps, given[0].learning_rate) == (8, 1e-4)


def test_the_config_of_a_run_repeats_it(tmp_path, given):
    settings = {"steps": 7, "betas": [0.8, 0.9], "eps": 1e-10, "model": {"window": 8}, "micro_batch_size": None}
    (tmp_path / "config.json").write_text(json.dumps({"command": "hqlt train", "settings": settings, "hqlt": "0"}))
    main(["train", f"--config={tmp_path / 'config.json'}", "--model.window=9"])
    assert (given[0].steps, given[0].betas, given[0].eps, given[0].model) == (7, (0.8, 0.9), 1e-10, {"window": 9})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("steps: expected more"), "steps: expected more"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory; try a smaller --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
            "out of memory (tried to allocate 4096 bytes); try a smaller --batch-size",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "out of memory (tried to allocate 2.00 GiB); try a smaller --batch-size",
        ),
        (
            ModuleNotFoundError("no", name="jinja2.ext"),
            f"expected the package jinja2.ext; {how_to_install('report')}",
        ),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_sentence(error, expected, command, capsys):
    command.append(error)
    message, _, _ = ends(["demo"], capsys)
    assert message == expected


TOY = """
import hqlt
from tests.toys.task import Majority

@hqlt.register("task", "toy-imported")
class Imported(Majority): pass
"""
STUDY = """
title: A toy
introduction: A task that was imported first.
models: {FW: {layer_kinds: fw}}
experiments:
  toy:
    task: toy-imported
    options: {length: 7}
    common: {hidden_size: 8, num_heads: 2, num_hidden_layers: 1}
    budget: {steps: 2, batch_size: 4, validations: 1, validation_rows: 8, test_rows: 8}
"""


def test_import_registers_in_the_command_and_its_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("toy_imported.py").write_text(TOY)
    Path("study.yaml").write_text(STUDY)
    command = ["reproduce", "study.yaml", "--workers=1", "--folder=run"]
    assert "expected one of" in str(ends(command, capsys)[0])
    main(["--import", "json", "--import=toy_imported", *command])
    assert json.loads(Path("run/results.json").read_text())[0]["cell"]["task"] == "toy-imported"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--import"], "hqlt: --import: expected the name of a module, got none; see hqlt --help\n"),
        (["--import", "--version"], "hqlt: --import: expected the name of a module, got none; see hqlt --help\n"),
        (
            ["--import=json", "--import=no.such", "demo"],
            "hqlt: --import: expected a module that can be imported, got no.such: ModuleNotFoundError: No module named "
            "'no'\n",
        ),
        (
            ["--import", "toy_broken", "demo"],
            "hqlt: --import: expected a module that can be imported, got toy_broken: KeyError: 'x' (FILE, line 2)\n",
        ),
    ],
)
def test_a_failing_import_is_one_sentence(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "toy_broken.py").write_text("import json\n{}['x']\n")
    assert ends(arguments, capsys) == (2, "", expected.replace("FILE", str(tmp_path / "toy_broken.py")))


def test_out_of_memory_suggests_options_of_the_command(monkeypatch, capsys):
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hqlt.train.language.run.run", full)
    message, _, _ = ends(["train"], capsys)
    assert message == (
        "out of memory; try a smaller --micro-batch-size, --batch-size, --length, --preset, --model, or "
        "--activation-checkpointing"
    )


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("x"), ModuleNotFoundError("no", name="other")])
def test_a_bug_shows_its_traceback(error, command):
    command.append(error)
    with pytest.raises(type(error)):
        main(["demo"])


def test_ctrl_c_exits_with_130(command, capsys):
    command.append(KeyboardInterrupt())
    assert ends(["demo"], capsys) == (130, "", "")


def test_ctrl_c_during_imports_exits_silently_with_130(tmp_path):
    """Ctrl-C while torch is being imported, which takes seconds."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    ended = run("train", "--steps=1", PYTHONPATH=path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_closed_reader_ends_the_command_silently():
    script = f"{sys.executable} -m hqlt train --help | head -c 10; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (ended.stdout.partition("\n")[0][:10], ended.stderr) == ("usage: hql", "")


def test_a_broken_pipe_while_a_command_runs(tmp_path):
    code = (
        "from hqlt import cli\n"
        "def demo() -> None:\n for _ in range(100_000): print('x' * 1000)\n"
        "cli.load = lambda name: demo\ncli.main(['demo'])"
    )
    script = f'{sys.executable} -c "$CODE" | head -c 10; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"CODE": code})
    assert (ended.stdout, ended.stderr) == ("x" * 10 + "1\n", "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_terminal_encoding_works(encoding, tmp_path):
    code = (
        "from hqlt import cli\nfrom rich.console import Console\n"
        "def demo() -> None:\n print('β → 漢')\n Console().print('β → 漢')\n"
        "cli.load = lambda name: demo\ncli.main(['demo'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == b"? ? ?\n" * 2


def test_the_list_of_commands_imports_none_of_them():
    ended = run("--help")
    assert ended.returncode == 0
    assert all(f"\n  {name} " in ended.stdout for name in COMMANDS)
    assert ended.stdout.count("\n  hqlt ") == 3
    code = "import sys; from hqlt.cli import overview; print({'torch', 'jsonargparse', 'rich'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout == "set()\n"


def test_every_listed_command_exists():
    assert all(importlib.util.find_spec(f"hqlt.cli.{name}") for name in COMMANDS)


def test_the_list_of_commands_shows_missing_extras(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, out, _ = ends(["--help"], capsys)
    (line,) = [line for line in out.splitlines() if line.startswith("  rl ")]
    assert line.endswith(f"(requires: {how_to_install('report', 'rl')})")


def test_a_missing_package_is_reported_with_its_extra():
    assert reason(ModuleNotFoundError(name="matplotlib")).endswith(how_to_install("report"))
    assert first_line(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    ("installed_from", "typed"),
    [
        (None, "pip install 'hqlt[lm]'"),
        ({"url": "file:///here/hqlt", "dir_info": {}}, "pip install '/here/hqlt[lm]'"),
        ({"url": "file:///here/hqlt", "dir_info": {"editable": True}}, "pip install -e '/here/hqlt[lm]'"),
        ({"url": Path.cwd().as_uri(), "dir_info": {}}, "pip install '.[lm]'"),
        ({"url": "https://x/h.git", "vcs_info": {"vcs": "git"}}, "pip install 'hqlt[lm] @ git+https://x/h.git'"),
    ],
)
def test_the_install_hint_depends_on_the_installation(installed_from, typed, monkeypatch):
    class Distribution:
        def read_text(self, name: str) -> str | None:
            return installed_from and json.dumps(installed_from)

    monkeypatch.setattr(errors, "distribution", lambda name: Distribution())
    assert how_to_install("lm") == typed
