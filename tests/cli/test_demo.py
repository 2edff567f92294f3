import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hqlt.cli import main
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
    with pytest.raises(SystemExit, match="holds the result of a cell with other settings; give another folder"):
        main(["demo", f"--folder={tmp_path}"])


def test_the_quick_demo_leaves_a_run_that_can_be_read(tmp_path):
    subprocess.run([*COMMAND, "demo", "--quick", f"--folder={tmp_path}"], check=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 15
    assert {result["cell"]["model"] for result in results} == set(read_study(known_studies()["demo"]).models)
    for name in ("config.json", "metrics.jsonl", "README.md", "curves.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 0


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path, request):
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*COMMAND, "demo", "--quick", f"--folder={tmp_path / 'run'}"], stdout=out, stderr=out
        )
        request.addfinalizer(lambda: (process.kill(), process.wait()))
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((tmp_path / "run").glob("cells/*.json")):
            time.sleep(0.2)
            assert process.poll() is None, log.read_text()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    said = log.read_text()
    assert "go on with: hqlt demo --quick" in said
    assert re.search(r"\((\d+) of 15 runs\)", (tmp_path / "run" / "README.md").read_text()), "what is finished is told"
    assert "Traceback" not in said
    assert metrics.exists()
