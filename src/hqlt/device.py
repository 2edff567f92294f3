"""Selection of the device that a command runs on."""

from __future__ import annotations

import torch

from hqlt.errors import first_line


def usable_device(name: str | None = None) -> torch.device:
    """The device of this name; by default, cuda if available, else cpu.

    Raises:
        ValueError: If PyTorch cannot use it here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = first_line(error).partition(". ")[0]
        raise ValueError(f"device: expected one that torch can use here, such as cpu, got {name!r}: {why}") from None
