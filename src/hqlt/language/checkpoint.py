"""Reading checkpoints of other code without executing anything in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hqlt.errors import is_out_of_memory

WEIGHTS = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]
WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts store the weights."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    settings: dict[str, Any]
    """Content of its config.json."""
    tensors: dict[str, Tensor]
    folder: Path


def read_checkpoint(where: Path, settings: Path | None = None, renames: Mapping[str, str] | None = None) -> Checkpoint:
    """Read a checkpoint. Pickles are read with `weights_only=True`.

    Args:
        where: a folder (config.json; safetensors or PyTorch files, sharded or not), or a single file of weights.
        settings: the config.json. Default: beside the weights.
        renames: regular expressions and their replacements, applied to the tensors' names in this order.

    Returns:
        Its settings and tensors.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file cannot be read, or an expression is invalid.
    """
    config = settings_of(where, settings)
    for pattern, replacement in (renames or {}).items():
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"map: expected a regular expression and its replacement, got {pattern!r}: {replacement!r}: {error}"
            ) from None
    tensors = {name: tensor for file in weight_files(where) for name, tensor in read_tensors(file).items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("_orig_mod.").removeprefix("module.")
        for pattern, replacement in (renames or {}).items():
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"{name}: expected different names after renaming, got {new!r} twice")
        renamed[new] = tensor
    return Checkpoint(config, renamed, folder_of(where))


def folder_of(where: Path) -> Path:
    """The folder of a checkpoint that is given as a folder or a file."""
    return where if where.is_dir() else where.parent


def settings_of(where: Path, settings: Path | None = None) -> dict[str, Any]:
    """The content of the checkpoint's config.json, or of the given file."""
    if not where.exists():
        raise FileNotFoundError(f"{where}: expected a checkpoint's folder or a file of weights, found neither")
    file = settings or folder_of(where) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the checkpoint's config.json, found none; pass it as --settings")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected the checkpoint's settings as JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def weight_files(where: Path) -> list[Path]:
    """The files of weights in a folder, or the given file."""
    if where.is_file():
        return [where]
    if (where / ".metadata").exists():
        raise ValueError(
            f"{where}: expected safetensors or PyTorch weights, got a distributed checkpoint, whose index is a pickle; "
            f"if you trust it, convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    for file in (where / name for name in WEIGHTS):
        if file.is_file():
            return shards_of(file) if file.suffix == ".json" else [file]
    raise FileNotFoundError(f"{where}: expected one of {', '.join(WEIGHTS)}, found none")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = dict.fromkeys(json.loads(index.read_bytes())["weight_map"].values())
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a weight_map from tensors to files, got {error!r}") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: expected all files that it names, {', '.join(missing)} is missing")
    return shards


def tensor_names(file: Path) -> list[str]:
    """The names of all tensors in a safetensors file. The tensors are not read."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file with other content can raise anything
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise ValueError(f"{file}: expected safetensors, or a PyTorch file of tensors only, got {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: expected a dict of tensors, optionally under {' or '.join(map(repr, WRAPPERS))}")
    return content
