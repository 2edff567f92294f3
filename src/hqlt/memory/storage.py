"""States on disk: safetensors with a fingerprint of the module that made them, so that a foreign one is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hqlt.memory.state import MemoryState

FORMAT = "hqlt-state-1"


def fingerprint(module: nn.Module) -> str:
    """Names a module by its structure and weights.

    Weights count as rounded to bfloat16: the same module in another dtype or on another device has the same
    fingerprint, one trained further or built otherwise has another.
    """
    digest = hashlib.sha256(repr(module).encode())
    for name, weight in sorted(module.state_dict().items()):
        rounded = weight.detach().to("cpu", torch.float32).to(torch.bfloat16).contiguous()
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_state(
    path: str | Path,
    state: MemoryState | Sequence[MemoryState],
    module: nn.Module,
    *,
    unread: Tensor | None = None,
) -> None:
    """Write a layer's state, or a model's (one state a layer), to one safetensors file.

    unread: tokens that come next and are yet to be read, kept beside the state for `load_unread`. The file appears
    whole or not at all: it is written beside its place and then moved there.
    """
    single = isinstance(state, MemoryState)
    states = [state] if isinstance(state, MemoryState) else list(state)
    tensors = {
        f"{i}.{name}": part.detach().cpu().contiguous()
        for i, layer in enumerate(states)
        for name, part in layer._asdict().items()
    }
    if unread is not None:
        tensors["unread"] = unread.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "kind": "layer" if single else "model",
        "layers": str(len(states)),
        "maker": type(module).__name__,
        "fingerprint": fingerprint(module),
    }
    unfinished = Path(f"{path}.unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def load_state(
    path: str | Path, module: nn.Module, device: torch.device | str = "cpu"
) -> MemoryState | tuple[MemoryState, ...]:
    """Read what `save_state` wrote for this module: a MemoryState for a layer, a tuple of them for a model.

    Raises ValueError where the file is not a state, or was made by a module of other structure or weights.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file written by save_state, got {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}; is it a state file?")
    mine = fingerprint(module)
    if metadata["fingerprint"] != mine:
        raise ValueError(
            f"{path}: this state was made by a {metadata['maker']} with fingerprint "
            f"{metadata['fingerprint'][:12]}, but this {type(module).__name__} has {mine[:12]}: its structure or "
            f"weights differ, so it would read the memory wrongly. Load the module that wrote the state."
        )
    states = tuple(
        MemoryState(**{name: tensors[f"{i}.{name}"] for name in MemoryState._fields})
        for i in range(int(metadata["layers"]))
    )
    return states[0] if metadata["kind"] == "layer" else states


def load_unread(path: str | Path) -> Tensor | None:
    """The tokens that `save_state` was given beside the state; None if there were none."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("unread") if "unread" in file.keys() else None  # noqa: SIM118
