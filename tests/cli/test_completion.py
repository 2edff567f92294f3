"""`hqlt completion`, and what a shell does with it."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import subprocess

import pytest

from hqlt.cli import COMMANDS, completion, main
from hqlt.cli.completion import command_tree, known_values

pytest.importorskip("shtab")


def printed(shell: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["completion", shell])
    return out.getvalue()


@pytest.fixture(scope="module")
def bash_script() -> str:
    return printed("bash")


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word, as at TAB."""
    lines = [
        script,
        "set -- $(complete -p hqlt)",  # complete -o bashdefault -F FUNCTION hqlt
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}",
        'while [ "$1" != -F ]; do shift; done; "$2"',
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    ended = subprocess.run(["bash"], input="\n".join(lines), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        ([""], list(COMMANDS)),
        (["rl", ""], ["train", "play"]),
        (["completion", ""], ["bash", "zsh"]),
        (["train", "--pre"], ["--preset", "--precision"]),
        (["train", "--preset", "ti"], ["tiny"]),
        (["train", "--preset", "=", "ti"], ["tiny"]),
        (["train", "--precision", "="], ["float32", "bfloat16"]),
        (["train", "--precision", "=", "float32", "--carry"], ["--carry-state"]),
        (["train", "--compile", "--batch"], ["--batch-size"]),
        (["rl", "train", "--ppo.lear"], ["--ppo.learning-rate"]),
        (["export", "--a"], ["--as"]),
    ],
)
def test_bash_completes(words, offered, bash_script):
    assert completed(bash_script, "hqlt", *words) == offered


def test_bash_completes_files(bash_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").touch()
    assert completed(bash_script, "hqlt", "train", "--config", "=", "set") == ["settings.yaml"]
    assert completed(bash_script, "hqlt", "generate", "set") == ["settings.yaml"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_valid(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    checked = subprocess.run([shell, "-n"], input=printed(shell), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_zsh_takes_a_value_after_an_equals_sign():
    lines = printed("zsh").splitlines()
    (preset,) = [line for line in lines if line.startswith('  "--preset')]
    assert preset.startswith('  "--preset=[')
    assert f":({' '.join(known_values()['preset'])})" in preset
    assert any(line.startswith('  "--carry-state[') for line in lines)


def test_a_command_without_its_packages_is_completed_by_name(monkeypatch):
    def load(name: str) -> object:
        raise ModuleNotFoundError(name="peft")

    monkeypatch.setattr(completion, "load", load)
    monkeypatch.setattr(completion, "COMMANDS", {"retrofit": COMMANDS["retrofit"]})
    assert "retrofit" in command_tree().format_help()


def test_a_package_that_is_missing_for_another_reason_is_an_error(monkeypatch):
    def load(name: str) -> object:
        raise ModuleNotFoundError(name="nowhere")

    monkeypatch.setattr(completion, "load", load)
    with pytest.raises(ModuleNotFoundError):
        command_tree()
