"""OpenMP's wait policy is set from the load, before PyTorch is loaded, and never overrides the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hqlt import threads
from hqlt.threads import PASSIVE, Load, use_passive_wait_if_busy


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(threads.PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


class Machine(Load):
    def __init__(self, others: float) -> None:
        self.others = others

    def busy_cores(self) -> float:
        return self.others


def test_the_policy_is_passive_only_on_a_busy_machine() -> None:
    before = os.environ.copy()
    use_passive_wait_if_busy(Machine(0.1))
    assert os.environ == before
    use_passive_wait_if_busy(Machine(1.0))
    assert os.environ == before | PASSIVE


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"])
def test_settings_of_the_user_are_kept(name: str) -> None:
    os.environ[name] = "7"
    before = os.environ.copy()
    use_passive_wait_if_busy(Machine(1.0))
    assert os.environ == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's CPU statistics")
def test_only_other_programs_count_as_load() -> None:
    mine = Load()
    while mine.begun + 0.3 > threads.time.monotonic():
        pass  # keeps a core busy itself
    cores = len(os.sched_getaffinity(0))
    quiet = mine.busy_cores()
    assert 0 <= quiet <= cores
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert Load().busy_cores() <= cores + 0.2
    finally:
        other.kill()
        other.wait()


def test_an_unknown_load_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    before = os.environ.copy()
    use_passive_wait_if_busy(Load())
    assert os.environ == before


def test_a_command_decides_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom hqlt import cli\n"
        "def decided(machine):\n"
        "    print('torch' in sys.modules)\n    sys.exit(0)\n"
        "cli.use_passive_wait_if_busy = decided\ncli.main(['bench', 'ops'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_import_hqlt_changes_nothing() -> None:
    code = "import os\nbefore = dict(os.environ)\nimport hqlt, hqlt.cli\nassert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)
