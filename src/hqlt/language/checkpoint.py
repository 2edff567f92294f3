"""A checkpoint of someone else's, read without running anything that it holds."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts keep the weights beside other things."""


class Checkpoint(NamedTuple):
    settings: dict[str, Any]
    """What its config.json says."""
    tensors: dict[str, Tensor]
    folder: Path


def read_checkpoint(where: Path, settings: Path | None = None, renames: Mapping[str, str] | None = None) -> Checkpoint:
    """Read a folder (config.json; safetensors or PyTorch files, sharded or not) or a single file of weights.

    settings: the config.json, if it is not beside the weights. renames: regular expressions and what replaces them in
    the tensors' names, in this order. Pickles are read by PyTorch's restricted reader, `weights_only=True`.

    Raises FileNotFoundError where something is missing, and ValueError for what cannot be read and for renames that
    are no expressions.
    """
    folder = where if where.is_dir() else where.parent
    config = settings or folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: expected the checkpoint's config.json; name it by --settings")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(where):
        tensors |= read_tensors(file)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("_orig_mod.").removeprefix("module.")
        for pattern, replacement in (renames or {}).items():
            try:
                new = re.sub(pattern, replacement, new)
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"map: expected an expression and what replaces it, got {pattern!r}: {replacement!r}: {error}"
                ) from None
        if new in renamed:
            raise ValueError(f"{name}: expected names that stay different when renamed, got {new!r} twice")
        renamed[new] = tensor
    return Checkpoint(json.loads(config.read_text(encoding="utf-8")), renamed, folder)


def weight_files(where: Path) -> list[Path]:
    """The file itself, or those that a folder's weights are in."""
    if where.is_file():
        return [where]
    if (where / ".metadata").exists():
        raise ValueError(
            f"{where}: expected safetensors or PyTorch weights, got a distributed checkpoint, whose index is a pickle; "
            f"convert it where it was made (torch.distributed.checkpoint.format_utils.dcp_to_torch_save)"
        )
    for name in WEIGHTS:
        if (where / name).is_file() and name.endswith(".index.json"):
            shards = json.loads((where / name).read_text())["weight_map"].values()
            return [where / shard for shard in dict.fromkeys(shards)]
        if (where / name).is_file():
            return [where / name]
    raise FileNotFoundError(f"{where}: expected one of {', '.join(WEIGHTS)}, found none")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: expected safetensors, or a PyTorch file of tensors alone, got {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: expected tensors by name, perhaps under {' or '.join(map(repr, WRAPPERS))}")
    return content
