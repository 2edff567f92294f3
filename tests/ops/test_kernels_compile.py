"""The kernels compile for a GPU, and fit into its registers, on a machine without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_fit_into_a_hopper_multiprocessor():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 10
    assert {name: stack for name, (stack, _) in kernels.items() if stack > 16} == {}
    assert [name for name, (_, uses_matrix_instructions) in kernels.items() if not uses_matrix_instructions] == ["step"]
