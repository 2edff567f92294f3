"""The letters that name the axes of tensors. Each letter has one meaning in the whole library.

    b  batch rows            k  width of a query or key head
    t  time steps (tokens)   v  width of a value head
    h  heads                 s  KV entries held between two calls, at most the window
    g  query heads per KV head (query head i reads the KV entries and the matrix of head i // g; 1 without sharing)
    n  chunks                c  tokens per chunk
    m  writes per token
    d  hidden size           l  length of the timeline: the held KV entries, then the new ones (s + t)
    a  actions of an agent

Docstrings, error messages and the aliases below write shapes with these letters, such as `[b, t, h, k]`.
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
    """Context manager in which every operation rejects NaN and infinite inputs with a ValueError.

    Off by default: the check reads every number once more and synchronizes with the GPU. The setting belongs to the
    current thread (and asyncio task); a thread started inside the block has the default.

    Args:
        enabled: whether to check; False switches an enclosing `checked()` off.

    Returns:
        The context manager.

    Example:
        >>> import torch, hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4)
        >>> with hqlt.checked():
        ...     layer(torch.full((1, 3, 64), torch.nan))
        Traceback (most recent call last):
        ValueError: x: expected finite numbers, got nan at index (0, 0, 0) ...
    """
    return _finite_checks.set(enabled)


def checks_finite() -> bool:
    """Return whether a `checked()` context is active."""
    return _finite_checks.get()


def match(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Check shapes and return the size of each letter.

    `match(q=(q, "b t h k"), v=(v, "b t h v"))["t"]` is the number of tokens.

    Raises:
        ValueError: when a tensor has the wrong number of axes or another device than the first, when a letter would
            have two sizes, and, within `checked()`, when a floating-point tensor contains NaN or infinity.
    """
    return _match(named, floats=False)


def match_floats(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Like `match`, for tensors that must be floating-point.

    Raises:
        ValueError: as `match`, and when a tensor is integer, bool or complex.
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
    """Raise a ValueError if the tensor contains NaN or infinity."""
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: expected finite numbers, got {tensor[where].item()} at index {where} "
            f"({len(bad)} of {tensor.numel()} entries are NaN or infinite); "
            f"look for an overflow or a division by zero before this call"
        )


def check_resets(resets: Tensor | None, b: int, t: int, device: torch.device | None = None) -> None:
    """Raise a ValueError unless `resets` is None or Bool[b, t]."""
    check_marks("resets", "a token begins a new segment", resets, b, t, device)


def check_live(live: Tensor | None, b: int, t: int, device: torch.device | None = None) -> None:
    """Raise a ValueError unless `live` is None or Bool[b, t]."""
    check_marks("live", "a token is written", live, b, t, device)


def check_marks(name: str, where: str, marks: Tensor | None, b: int, t: int, device: torch.device | None) -> None:
    """Raise a ValueError unless `marks` is None or Bool[b, t] on this device."""
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
    """Return the dtype in which fast weights accumulate: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def is_symbolic(size: object) -> bool:
    """Return whether a size is symbolic, as in a program exported with a dynamic axis."""
    return isinstance(size, torch.SymInt)
