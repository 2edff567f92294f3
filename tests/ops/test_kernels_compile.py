"""Compilation of the kernels for a GPU, and their register use, checked on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SPILLED = {
    (3, 5): {"prepare": 40, "queries_backward": 640, "entries_backward": 480},
    (3, 9): {"prepare": 30, "queries_backward": 300, "entries_backward": 500},
}
"""Bytes per thread that each kernel may spill, from this version of triton on, with its own assembler and with 13.4.
Other kernels must not spill. With resets, without which some spill less."""
SPILLED_WITH_DECAY = {
    (3, 5): {"prepare": 90, "queries_backward": 700, "entries_backward": 840},
    (3, 9): {"prepare": 110, "queries_backward": 410, "entries_backward": 840},
}
SPILLED_WITH_SINKS = {
    (3, 5): {"prepare": 40, "read": 8, "queries_backward": 600, "entries_backward": 490},
    (3, 9): {"prepare": 30, "read": 8, "queries_backward": 480, "entries_backward": 730},
}


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("which", "spilled"),
    [("resources", SPILLED), ("with decay", SPILLED_WITH_DECAY), ("with sinks", SPILLED_WITH_SINKS)],
)
def test_kernels_fit_into_a_hopper_multiprocessor(compiled, which, spilled):
    from triton import __version__

    here = tuple(map(int, __version__.split(".")[:2]))
    allowed = spilled[max(version for version in spilled if version <= here)]
    kernels = compiled[which]
    plain = {"step", *(["list_far"] if which == "with sinks" else [])}  # kernels without matrix products
    assert len(kernels) == 6 + len(plain)
    too_much = {name: spilled for name, (_, spilled, *_) in kernels.items() if spilled > allowed.get(name, 0)}
    assert too_much == {}
    assert max(shared for _, _, shared, _ in kernels.values()) <= 228 * 1024 // 2  # two programs per multiprocessor
    assert {name for name, (*_, tensor_cores) in kernels.items() if not tensor_cores} == plain


def test_float64_stays_float64(compiled):
    """Python floats, such as scale and norm_eps, would be float32 if they were kernel arguments."""
    assert {name: lines for name, lines in compiled["narrow"].items() if lines} == {}


def test_no_kernel_is_compiled_again_for_another_length(compiled):
    assert len(compiled["variants"]) == 7
    assert set(compiled["variants"].values()) == {1}
