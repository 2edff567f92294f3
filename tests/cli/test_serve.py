"""Options of `hqlt serve`; invalid ones are refused before a model is loaded. The server: tests/serve."""

from __future__ import annotations

import socket

import pytest

from hqlt.cli import main
from tests.language.conftest import build

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected a model's folder .* found no such folder"),
        (["FOLDER", "--port=70000"], "port: expected 0 to 65535, got 70000"),
        (["FOLDER", "--port=TAKEN"], r"127.0.0.1:\d+: cannot listen there: Address already in use"),
        (["FOLDER", "--host=no.such.name.invalid"], "no.such.name.invalid:8000: cannot listen there: "),
        (["FOLDER", "--max-batch-size=0"], "max-batch-size: expected at least 1, got 0"),
        (["FOLDER", "--max-queue=-1"], "max-queue: expected at least 0, got -1"),
        (["FOLDER", "--max-tokens=0"], "max-tokens: expected at least 1, got 0"),
        (["FOLDER", "--timeout=0"], "timeout: expected a number of seconds above 0, got 0"),
        (["FOLDER", "--store-disk-bytes=5"], "store-disk-bytes: expected --store FOLDER as well, got none"),
        (["FOLDER", "--store=/proc/states"], "/proc/states: cannot be written there"),
        (["FOLDER", "--api-key=one,,two"], "api-key: expected keys separated by commas, got an empty one"),
        (["FOLDER", "--api-key="], "api-key: expected keys separated by commas, got an empty one"),
        (["FOLDER", "--device=nothing"], "device: expected one .* got 'nothing'"),
        (["FOLDER", "--window=3"], "retention: expected one with --window"),
    ],
)
def test_invalid_options_are_refused(arguments, message, folder, monkeypatch):
    monkeypatch.delenv("HQLT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [argument.replace("FOLDER", str(folder)).replace("TAKEN", port) for argument in arguments]
        if not any("port" in argument or "host" in argument for argument in arguments):
            given += ["--port=0"]
        with pytest.raises(SystemExit, match=message):
            main(["serve", *given])


def test_keys_come_from_the_option_or_the_environment(monkeypatch):
    from hqlt.cli.serve import keys_of

    monkeypatch.delenv("HQLT_API_KEY", raising=False)
    assert keys_of(None) == []
    monkeypatch.setenv("HQLT_API_KEY", "one, two")
    assert keys_of(None) == ["one", "two"]
    assert keys_of("three") == ["three"]


def test_options_are_passed_on(folder, monkeypatch, tmp_path, capsys):
    """To the engine, the app and the server, without accepting connections."""
    monkeypatch.setenv("HQLT_API_KEY", "secret")
    monkeypatch.setattr("hqlt.serve.server.Server.serve_here", lambda server: server.ready())
    options = ["--name=called", "--max-batch-size=3", f"--store={tmp_path / 's'}", "--retention=surprise", "--kept=2"]
    main(["serve", str(folder), "--port=0", *options])
    printed = capsys.readouterr().err
    assert "called at http://127.0.0.1:" in printed
    assert "retention surprise" in printed
    assert "secret" not in printed and '"Authorization: Bearer $HQLT_API_KEY"' in printed
    assert (tmp_path / "s").is_dir()
    main(["serve", str(folder), "--port=0", "--host=0.0.0.0"])
    assert "anyone who can reach" not in capsys.readouterr().err
    monkeypatch.delenv("HQLT_API_KEY")
    main(["serve", str(folder), "--port=0", "--host=0.0.0.0"])
    assert "anyone who can reach 0.0.0.0 can use this server" in capsys.readouterr().err
