import json
import subprocess
import sys

import pytest

from hqlt.cli import main
from hqlt.report.table import TOO_SMALL
from hqlt.run_folder import run_folder
from hqlt.study import known_studies, read_study

COMMAND = [sys.executable, "-m", "hqlt"]


def test_wrong_options_are_refused(capsys):
    for wrong in (["demo", "--quik"], ["dmeo"], ["demo", "--seed=x"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "expected" in capsys.readouterr().err.lower()


def test_a_folder_with_the_results_of_other_settings_is_refused(tmp_path):
    cell = read_study(known_studies()["demo"]).cells()[0]
    with run_folder(tmp_path, "study"):
        (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{cell.name}.json").write_text('{"cell": {}}')
    with pytest.raises(SystemExit, match="has the result of a cell with other settings; give another folder"):
        main(["demo", f"--folder={tmp_path}"])


def test_the_quick_demo_writes_a_complete_run(tmp_path):
    subprocess.run([*COMMAND, "demo", "--quick", f"--folder={tmp_path}"], check=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 18
    assert {result["cell"]["model"] for result in results} == set(read_study(known_studies()["demo"]).models)
    for name in ("config.json", "metrics.jsonl", "README.md", "curves.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 0
    assert TOO_SMALL in (tmp_path / "README.md").read_text()
    assert "**" not in (tmp_path / "README.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "What each memory contributes" in page
    assert "A sample from Synchronous" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers=0"], "^workers: expected at least 1, got 0$"),
        (["--seed=-1"], r"^seeds: expected whole numbers from 0 to 2\*\*32 − 1, got -1$"),
        (["--folder=language"], "^language: expected a run of hqlt demo or hqlt reproduce, found one of hqlt train;"),
        (["--folder=full"], "^full: expected a new or empty folder, or one created by hqlt demo"),
        (["--folder=other"], "^other: expected a run of 'One layer, two memories', found one of 'Who runs\\?'"),
        (["--folder=full/file"], "^full/file"),
        (["--folder=full/file/run"], "^full/file"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hqlt.study.run.run_grid", lambda *_: pytest.fail("it was trained"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with run_folder(tmp_path / "language", "language"), run_folder(tmp_path / "other", "study"):
        (tmp_path / "other" / "config.json").write_text('{"study": "Who runs?"}')
        (tmp_path / "language" / "config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        main(["demo", "--quick", *options])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "transformers"])
def test_a_missing_package_is_reported_before_anything_is_trained(package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from hqlt.cli import main; main(['demo', '--quick'])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"expected the package {package}; pip install" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
