"""The letters. Every shape in this library is spelled with them, and none ever changes its meaning.

    b  batch rows            k  width of a key or query head
    t  time, tokens          v  width of a value head
    h  heads                 s  pairs held by a KV-memory between two calls, at most its window
    g  query heads a head    (query head i reads the pairs and the matrix of head i // g; 1 where none share)
    n  chunks                c  tokens in a chunk
    m  writes of a token
    d  hidden size           l  length of a key timeline: the held pairs, then the new ones (s + t)
    a  actions of an agent

A tensor's shape is written as its letters, `[b, t, h, k]`, in docstrings, in the aliases below and in errors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from hqlt.context import Setting

Hidden: TypeAlias = Annotated[Tensor, "b t d"]
Queries: TypeAlias = Annotated[Tensor, "b t g·h k"]
Keys: TypeAlias = Annotated[Tensor, "b t h k"]
Values: TypeAlias = Annotated[Tensor, "b t h v"]
Strengths: TypeAlias = Annotated[Tensor, "b t h"]
Resets: TypeAlias = Annotated[Tensor, "b t"]
Live: TypeAlias = Annotated[Tensor, "b t"]
Positions: TypeAlias = Annotated[Tensor, "b t"]
Matrix: TypeAlias = Annotated[Tensor, "b h k v"]
KeySum: TypeAlias = Annotated[Tensor, "b h k"]

_finite_checks = Setting("hqlt.checked", False)


def checked(enabled: bool = True) -> AbstractContextManager[None]:
    """Within this context every operation also refuses NaN and infinite inputs.

    Off by default, because looking at every number costs a pass over the data (and, on a GPU, a wait). It holds for
    the current thread (and asyncio task); a thread that is started within it begins with the default.

    >>> with hqlt.checked():
    ...     y, state = layer(x)
    """
    return _finite_checks.set(enabled)


def checks_finite() -> bool:
    """Whether a `checked()` context is open."""
    return _finite_checks.get()


def match(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Bind letters to sizes: `match(q=(q, "b t h k"), v=(v, "b t h v"))["t"]` is the number of tokens.

    Raises ValueError where a tensor has the wrong number of axes or another device than the first, where a letter
    would stand for two sizes, and, within `checked()`, where a floating-point tensor holds NaN or infinity.
    """
    return _match(named, floats=False)


def match_floats(**named: tuple[Tensor, str]) -> dict[str, int]:
    """`match` of tensors that must hold floating-point numbers: what an operation computes with.

    Raises ValueError as `match` does, and where a tensor holds integers, bools or complex numbers.
    """
    return _match(named, floats=True)


def _match(named: dict[str, tuple[Tensor, str]], floats: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    device, check = None, checks_finite()
    for name, (tensor, letters) in named.items():
        axes, shape = letters.split(), tensor.shape
        if floats and not tensor.is_floating_point():
            got = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected floating-point numbers, got {got}; convert it with {name}.float()")
        if len(shape) != len(axes):
            raise ValueError(f"{name}: expected {len(axes)} axes [{', '.join(axes)}], got shape {list(shape)}")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{name}: expected [{', '.join(axes)}] with {axis} = {sizes[axis]} "
                    f"as in the arguments before it, got shape {list(shape)}"
                )
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, as the arguments before it, got {tensor.device}")
        if check and tensor.is_floating_point():
            refuse_non_finite(name, tensor)
    return sizes


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: expected finite numbers, got {tensor[where].item()} at index {where} "
            f"({len(bad)} of {tensor.numel()} entries are NaN or infinite); "
            f"look for an overflow or a division by zero before this call"
        )


def check_resets(resets: Tensor | None, b: int, t: int, device: torch.device | None = None) -> None:
    check_marks("resets", "a token begins a new segment", resets, b, t, device)


def check_live(live: Tensor | None, b: int, t: int, device: torch.device | None = None) -> None:
    check_marks("live", "a token is written", live, b, t, device)


def check_marks(name: str, where: str, marks: Tensor | None, b: int, t: int, device: torch.device | None) -> None:
    """Refuse marks that are not Bool[b, t] on this device."""
    if marks is None:
        return
    if marks.dtype != torch.bool or tuple(marks.shape) != (b, t):
        raise ValueError(
            f"{name}: expected a bool tensor of shape [b, t] = [{b}, {t}] that is True where {where}, "
            f"got {str(marks.dtype).removeprefix('torch.')} {list(marks.shape)}"
        )
    if device is not None and marks.device != device:
        raise ValueError(f"{name}: expected on {device}, as the other arguments, got {marks.device}")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which fast weights accumulate: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def is_symbolic(size: object) -> bool:
    """Whether a size is any number: of a program that is exported with a dynamic axis."""
    return isinstance(size, torch.SymInt)
