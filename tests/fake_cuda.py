"""Fake CUDA tensors with gradients, on a machine without a GPU: they have a shape, a dtype and a device, but no
numbers.

A build of PyTorch without CUDA supports fake CUDA tensors, but its autograd needs a device guard that is missing. The
one in `fake_cuda.cpp` does nothing. It makes PyTorch believe that there is a GPU, so it needs a separate process: a
file of such tests calls `allow` in a fixture, and has one additional test that runs the file with `in_its_own_process`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_suffix(".cpp")
INSIDE = "HQLT_TESTS_FAKE_CUDA"

needs_fake_cuda = pytest.mark.skipif(INSIDE not in os.environ, reason="runs in a separate process")
outside = pytest.mark.skipif(INSIDE in os.environ, reason="already in the separate process")


def in_its_own_process(file: str, *options: str) -> None:
    """Run the tests of a file in a process in which fake CUDA tensors have gradients. options: Options of pytest."""
    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        pytest.skip("a CUDA build of torch needs a GPU for the gradients of fake tensors")
    if not torch.backends.cuda.is_built() and shutil.which("g++") is None:
        pytest.skip("no g++ to build the device guard with")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", file, *options]
    done = subprocess.run(command, env=os.environ | {INSIDE: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout, done.stdout


def allow(folder: Path) -> None:
    """Enable autograd for fake CUDA tensors in this process. folder: Where the guard is built."""
    if torch.backends.cuda.is_built():
        return
    library, home = folder / "fake_cuda.so", Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", abi, f"-I{home}/include", f"-L{home}/lib"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(library), "-lc10", "-ltorch_cpu"], check=True)
    ctypes.CDLL(str(library))
