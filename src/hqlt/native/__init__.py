"""The memories' reads and writes in C++, for CPUs: one small library, called on the addresses of tensors.

`memories.cpp` is compiled for plain vectors, AVX2 and AVX-512 at once, and the library picks what the machine has
(HQLT_NATIVE_ISA=plain|avx2|avx512 names one, for tests). It knows nothing of Python or torch, so that one build serves
every version of both. Its calls run on torch's own threads, as many as `torch.get_num_threads()` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

FOLDER = Path(__file__).parent
KERNELS = (
    "delta_rule_forward",
    "delta_rule_backward",
    "linear_attention_forward",
    "linear_attention_backward",
    "window_attention_forward",
    "window_attention_backward",
    "unit_silu_forward",
    "unit_silu_backward",
    "rotate_forward",
    "rms_norm_forward",
    "rms_norm_backward",
    "mix_forward",
    "mix_backward",
)


def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why not)."""
    built = sorted([*FOLDER.glob("_memories*.so"), *FOLDER.glob("_memories*.dylib")])
    if not built:
        return None, f"the native library was not built: no _memories*.so in {FOLDER}"
    try:
        library = ctypes.CDLL(str(built[0]))
        library.hqlt_instruction_set.restype = ctypes.c_char_p
        for name in KERNELS:
            kernel = library[f"hqlt_{name}"]
            kernel.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p)
            kernel.restype = None
            setattr(library, name, kernel)
        library.hqlt_one_token.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
        library.hqlt_one_token.restype = None
        library.hqlt_use_openmp(_openmp())
    except (OSError, AttributeError) as error:
        return None, f"the native library does not load: {error}"
    if not library.hqlt_instruction_set():
        return None, f"HQLT_NATIVE_ISA={os.environ.get('HQLT_NATIVE_ISA')}: this machine has no such instructions"
    return library, ""


def _openmp() -> ctypes.c_void_p | None:
    """The function that starts torch's own threads; None where torch does not run on OpenMP."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    return None


_library, _why_not = _load()
_silent = False


def available() -> bool:
    """Whether the native implementations can run here. Warns once where they cannot."""
    global _silent
    if _library is None and not _silent:
        _silent = True
        warnings.warn(f"hqlt: {_why_not}; slower torch implementations run instead", RuntimeWarning, stacklevel=2)
    return _library is not None


def why_not() -> str:
    """Why they cannot run, "" where they can."""
    return _why_not


def instruction_set() -> str:
    """ "plain", "avx2" or "avx512"; "" where the library is missing."""
    return "" if _library is None else _library.hqlt_instruction_set().decode()


def run(kernel: str, sizes: Sequence[int], scale: float, tensors: Sequence[Any]) -> None:
    """Call a kernel on contiguous tensors of the first one's type: float32 or float64 (resets: bool, or None)."""
    if _library is None:
        raise RuntimeError(f"backend 'native': {_why_not}; name another backend, or None to let hqlt pick")
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    getattr(_library, kernel)(
        tensors[0].dtype == torch.float64,
        torch.get_num_threads(),
        (ctypes.c_int64 * len(sizes))(*sizes),
        scale,
        (ctypes.c_void_p * len(addresses))(*addresses),
    )


def one_token(is_double: bool, job: bytes) -> None:
    """Call the kernel of one token on what `hqlt.ops.step` packed for it."""
    assert _library is not None, "asked for by native.available()"
    _library.hqlt_one_token(is_double, torch.get_num_threads(), job)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The same tensors, laid out without gaps; None stays None."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors without gradients that nobody traces: then an operator may skip torch's
    dispatcher, which costs more than the work on one token."""
    grad = torch.is_grad_enabled()
    return not is_traced() and all(x is None or (type(x) is Tensor and not (grad and x.requires_grad)) for x in tensors)


def is_traced() -> bool:
    """Whether a compiler, a mode or a transform of torch watches what is done to tensors."""
    return is_compiling() or _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None
