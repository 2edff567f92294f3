"""The operations in C++ for CPUs: one small library, called through ctypes with the addresses of tensors.

`memories.cpp` is compiled for plain vectors, AVX2 and AVX-512, and the library selects what the machine supports
(HQLT_NATIVE_ISA=plain|avx2|avx512 overrides it, for tests). It does not depend on Python or PyTorch, so one build works
with every version of both. Its calls run on PyTorch's own threads, as many as `torch.get_num_threads()` returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

FOLDER = Path(__file__).parent
FLOATS = (torch.float32, torch.float64)
ORDINARY = (Tensor, Parameter)
OTHER_DTYPES = {"bt?": torch.bool, "bl?": torch.bool, "bl#": torch.int64, "blh#": torch.int64, "blh#?": torch.int64}


class Kernel(NamedTuple):
    """The sizes that a kernel takes, in the order in which C++ reads them, and the axes of its tensors, in call order.

    "q" is the number of query heads, a multiple of h; "n" the number of writes, a multiple of t; "½" is half of k; "*"
    stands for all leading axes, flattened; "#" marks a tensor of integers, and "?" one that may be None.
    """

    sizes: str
    tensors: tuple[str, ...]

    @staticmethod
    def of(sizes: str, tensors: str) -> Kernel:
        return Kernel(sizes, tuple(tensors.split()))


KERNELS = {
    "delta_rule_forward": Kernel.of("btqhkv", "btqk bthk bthv bth bhkv bt? bt? btqv bhkv bthv?"),
    "delta_rule_backward": Kernel.of("btqhkv", "btqk bthk bth bhkv bt? bt? bthv btqv bhkv btqk bthk bthv bth bhkv"),
    "fast_weights_forward": Kernel.of("btnqhkv", "btqk bnhk bnhv bnh bth? bthk? bnhk? bhkv bt? bt? btqv bhkv bnhv?"),
    "fast_weights_backward": Kernel.of(
        "btnqhkv",
        "btqk bnhk bnhv bnh bth? bthk? bnhk? bhkv bt? bt? bnhv? btqv? bhkv? btqv bhkv "
        "btqk bnhk bnhv bnh bth? bthk? bnhk? bhkv",
    ),
    "linear_attention_forward": Kernel.of("btqhkv", "btqk bthk bthv bhkv bhk bt? bt? btqv bhkv bhk"),
    "linear_attention_backward": Kernel.of(
        "btqhkv", "btqk bthk bthv bhkv bhk bt? bt? btqv btqv bhkv bhk btqk bthk bthv bhkv bhk"
    ),
    "window_attention_forward": Kernel.of("btlqhkv", "btqk blhk blhv bl? blh#? btqk? blhk? btqv"),
    "window_attention_backward": Kernel.of(
        "btlqhkv", "btqk blhk blhv bl? blh#? btqk? blhk? btqv btqk blhk blhv btqk? blhk?"
    ),
    "expiry_forward": Kernel.of("blh", "blh bl# bl? bl? blh#"),
    "unit_silu_forward": Kernel.of("*k", "*k *k"),
    "unit_silu_backward": Kernel.of("*k", "*k *k *k"),
    "rotate_forward": Kernel.of("blhk", "blhk l1½ l1½ blhk"),
    "rms_norm_forward": Kernel.of("*d", "*d d *d"),
    "rms_norm_backward": Kernel.of("*d", "*d d *d *d d"),
    "mix_forward": Kernel.of("*v", "*v *v *v v *v"),
    "mix_backward": Kernel.of("*v", "*v *v *v v *v *v *v *v v"),
}


def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, ""), or (None, the reason why it is unavailable)."""
    built = sorted([*FOLDER.glob("_memories*.so"), *FOLDER.glob("_memories*.dylib")])
    if not built:
        return None, f"the native library was not built: no _memories*.so in {FOLDER}"
    try:
        library = ctypes.CDLL(str(built[0]))
        library.hqlt_instruction_set.restype = library.hqlt_sources.restype = ctypes.c_char_p
        for name in KERNELS:
            kernel = library[f"hqlt_{name}"]
            kernel.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p)
            kernel.restype = ctypes.c_char_p
            setattr(library, name, kernel)
        library.hqlt_one_token.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
        library.hqlt_one_token.restype = ctypes.c_char_p
        library.hqlt_use_openmp(_openmp())
    except (OSError, AttributeError) as error:
        return None, f"the native library does not load: {error}"
    built_from, current = library.hqlt_sources(), _digest_of_sources()
    if built_from and current and built_from != current:
        return None, f"the native library was built from other sources than those in {FOLDER}: install hqlt again"
    if not library.hqlt_instruction_set():
        return None, f"HQLT_NATIVE_ISA={os.environ.get('HQLT_NATIVE_ISA')}: this machine has no such instructions"
    return library, ""


def _digest_of_sources() -> bytes:
    """Digest of the C++ sources next to this file, as setup.py computes it; empty in a wheel, which has no sources."""
    sources = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("memories.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest().encode() if sources else b""


def _openmp() -> ctypes.c_void_p | None:
    """The function that runs work on PyTorch's own threads; None if PyTorch does not use OpenMP."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    return None


_library, _why_not = _load()
_warned = False


def available() -> bool:
    """Whether the native implementations can run here. Warns once if they cannot."""
    global _warned
    if _library is None and not _warned:
        _warned = True
        warnings.warn(f"hqlt: {_why_not}; slower torch implementations run instead", RuntimeWarning, stacklevel=2)
    return _library is not None


def why_not() -> str:
    """Why the native implementations cannot run, or "" if they can."""
    return _why_not


def instruction_set() -> str:
    """The instruction set in use: "plain", "avx2" or "avx512"; "" if the library is missing."""
    return "" if _library is None else _library.hqlt_instruction_set().decode()


def run(kernel: str, scale: float, tensors: Sequence[Any], *more_sizes: int) -> None:
    """Call a kernel on contiguous tensors of one dtype, float32 or float64 (marks are bool, indices int64).

    C++ does not validate its arguments, so everything is checked here: shapes (once per combination), dtypes, devices
    and addresses.

    Args:
        kernel: Name of the kernel, a key of `KERNELS`.
        scale: A factor; its meaning depends on the kernel.
        tensors: Inputs and outputs, in the order of `KERNELS`.
        more_sizes: Integers that the kernel takes after the sizes of the tensors.

    Raises:
        ValueError: If the kernel cannot run on these tensors.
        MemoryError: If there is not enough memory.
    """
    if _library is None:
        raise RuntimeError(f"backend 'native': {_why_not}; name another backend, or None to let hqlt select one")
    sizes = _sizes(kernel, more_sizes, *(None if x is None else x.shape for x in tensors))
    dtype = tensors[0].dtype
    if dtype not in FLOATS:
        raise ValueError(f"{kernel}: expected float32 or float64, got {dtype}")
    aligned: list[Tensor] = []  # copies, kept alive until the call is over
    addresses: list[int | None] = []
    for x, axes in zip(tensors, KERNELS[kernel].tensors, strict=True):
        if x is None:
            addresses.append(None)
            continue
        expected = OTHER_DTYPES.get(axes, dtype)
        address = x.data_ptr() if x.is_cpu and x.dtype is expected and x.is_contiguous() else 0
        if not address:
            raise ValueError(
                f"{kernel}: expected a contiguous tensor of {expected} in CPU memory, got {x.dtype} on {x.device} "
                f"of shape {list(x.shape)} and strides {list(x.stride())}"
            )
        if address % expected.itemsize:  # always an input: PyTorch allocates aligned memory
            aligned.append(x.clone())
            address = aligned[-1].data_ptr()
        addresses.append(address)
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    _raise(getattr(_library, kernel)(dtype is torch.float64, torch.get_num_threads(), sizes, scale, pointers))


@functools.lru_cache(maxsize=4096)
def _sizes(kernel: str, more_sizes: tuple[int, ...], *shapes: torch.Size | None) -> ctypes.Array[ctypes.c_int64]:
    """The sizes that a kernel takes, after checking that the tensors' shapes match the kernel and each other."""
    letters, tensors = KERNELS[kernel]
    bound: dict[str, float] = {"1": 1}
    for number, (axes, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if shape is None and axes.endswith("?"):
            continue
        axes, got = axes.rstrip("#?"), list(shape or ())
        if axes[0] == "*" and got:
            got = [math.prod(got[:-1]), got[-1]]
        for axis, size in zip(axes, got, strict=False):
            bound.setdefault(axis, size)
            if axis == "k":
                bound["½"] = size / 2
        if got != [bound.get(axis) for axis in axes]:
            raise ValueError(
                f"{kernel}: tensor {number}: expected [{', '.join(axes)}] with {bound}, got shape {list(shape or ())}"
            )
    if bound.get("l", math.inf) < bound.get("t", 0):
        raise ValueError(f"{kernel}: expected at least as many entries as queries, got {bound}")
    if bound.get("q", 0) % (bound.get("h") or 1):
        raise ValueError(f"{kernel}: expected query heads in a multiple of the heads of k, got {bound}")
    if bound.get("n", 0) % (bound.get("t") or 1):
        raise ValueError(f"{kernel}: expected writes in a multiple of the tokens, got {bound}")
    sizes = [*(int(bound[letter]) for letter in letters), *more_sizes]
    if min(sizes) < 1:
        raise ValueError(
            f"{kernel}: expected sizes of at least 1, got {sizes} for [{', '.join(letters)}]; call the operation of "
            f"hqlt.ops, which supports empty tensors"
        )
    return (ctypes.c_int64 * len(sizes))(*sizes)


def one_token(dtype: int, job: bytes) -> None:
    """Call the one-token kernel of this dtype on a job packed by `hqlt.ops.step`."""
    assert _library is not None, "the caller checks native.available()"
    _raise(_library.hqlt_one_token(dtype, torch.get_num_threads(), job))


def _raise(error: bytes | None) -> None:
    """Raise the error that C++ returned, if any."""
    if error == b"memory":
        raise MemoryError("backend 'native': not enough memory; use shorter sequences, smaller batches or windows")
    if error:
        raise ValueError(f"backend 'native': expected {error.decode()}")


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in this dtype. Most already are, and this check is cheaper than a call of `Tensor.to`."""
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors in contiguous memory; None stays None."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def may_run(*tensors: Tensor | None) -> bool:
    """Whether native code may read these tensors by address, bypassing PyTorch's dispatcher without visible effect.

    This requires ordinary tensors whose memory holds their numbers, no gradient, and no active compiler, mode or
    transform of PyTorch. Otherwise the dispatcher must see the operation (as a `torch.library` operator), or the
    reference runs.
    """
    grad = torch.is_grad_enabled()
    return not is_traced() and all(
        x is None or (type(x) in ORDINARY and not (grad and x.requires_grad) and not x.is_neg()) for x in tensors
    )


def is_traced() -> bool:
    """Whether a compiler, mode, transform or tracer of PyTorch is active, which must see all operations on tensors."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _get_tracing_state() is not None
        or is_transformed()
    )


def is_transformed() -> bool:
    """Whether a transform is active that supports only PyTorch's own operations: torch.func or forward-mode AD."""
    return not is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0)


def is_jit_traced() -> bool:
    """Whether `torch.jit.trace` is recording."""
    return not is_compiling() and _get_tracing_state() is not None
