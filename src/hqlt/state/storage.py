"""States on disk: safetensors with a fingerprint of the module that made them, so that a foreign one is refused."""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hqlt.disk import write_atomic
from hqlt.memory.state import MemoryState, named

FORMAT = "hqlt-state-3"
OLD_FORMATS = ("hqlt-state-1", "hqlt-state-2")
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")
"""Where torch.compile, data parallelism and checkpoint_wrapper keep the module that they wrap."""


def fingerprint(module: nn.Module) -> str:
    """Names a module by its structure, weights and buffers.

    Weights count as rounded to bfloat16: a module has the same fingerprint in float64, float32 and bfloat16, on every
    device, compiled by `torch.compile`, and wrapped for data parallelism. One trained further or built otherwise has
    another. So has one cast to float16, which rounds the weights in its own way; cast on from there it keeps that one.

    Raises ValueError for weights without numbers (on the meta device, as an offloaded module's are between its calls).
    """
    module = unwrapped(module)
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        if not is_wrapper(part):
            digest.update(f"{bare(name)} {type(part).__name__}({part.extra_repr()})\n".encode())
    entries = {bare(name): entry for name, entry in module.state_dict().items()}
    for name, entry in sorted(entries.items(), key=operator.itemgetter(0)):
        digest.update(f"{name} ".encode())
        for piece in content(name, entry):
            digest.update(piece)
    return digest.hexdigest()


def is_wrapper(part: nn.Module) -> bool:
    return list(part._modules) in [[name] for name in WRAPPERS]


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile or data parallelism put around it."""
    while is_wrapper(module):
        (module,) = module.children()
    return module


def bare(name: str) -> str:
    """The name of a part or weight as if nothing were wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def content(name: str, entry: Any) -> Iterator[bytes]:
    """What counts of an entry of a state_dict: a tensor's shape and numbers; of anything else, what it is made of."""
    if isinstance(entry, (tuple, list)):  # a quantised weight and its bias
        for part in entry:
            yield from content(name, part)
        return
    if not isinstance(entry, Tensor):
        yield f"{entry}\n".encode()
        return
    if entry.is_meta:
        raise ValueError(
            f"{name}: expected weights with numbers in them, got one on the meta device; load the weights before "
            f"asking for a fingerprint, or before a state is saved or loaded"
        )
    yield f"{list(entry.shape)} ".encode()
    x = entry.detach().cpu()
    if x.is_quantized or type(x) is not Tensor:  # a subclass that holds quantised numbers
        x = x.dequantize()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.is_floating_point():
        x = x.to(torch.float32).to(torch.bfloat16)
    yield x.flatten().contiguous().view(torch.uint8).numpy().tobytes()


def save_state(
    path: str | Path,
    state: MemoryState | Sequence[MemoryState],
    module: nn.Module,
    *,
    unread: Tensor | None = None,
    notes: str = "",
) -> None:
    """Write a layer's state, or a model's (one state a layer), to one safetensors file.

    unread: tokens that come next and are yet to be read, kept beside the state for `load_unread`; notes: any text, for
    `load_notes`. The file appears whole or not at all: it is written beside its place and then moved there.

    Raises ValueError where the path is a folder, OSError where it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file to write, got a folder that exists")
    single = isinstance(state, MemoryState)
    states: Sequence[Any] = [state] if single else list(state)
    tensors = tensors_of(states)
    if unread is not None:
        tensors["unread"] = unread
    module = unwrapped(module)
    metadata = {
        "format": FORMAT,
        "kind": "layer" if single else "model",
        "layers": str(len(states)),
        "maker": type(module).__name__,
        "fingerprint": fingerprint(module),
        "notes": notes,
    }
    on_cpu = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}  # none shared
    write_atomic(path, save(on_cpu, metadata))


def load_state(
    path: str | Path, module: nn.Module, device: torch.device | str = "cpu"
) -> MemoryState | tuple[MemoryState, ...]:
    """Read what `save_state` wrote for this module: a MemoryState for a layer, a tuple of them for a model.

    Raises ValueError where the file is not a state, was written by an older version of hqlt, or was made by a module of
    other structure or weights.
    """
    with _opened(path, device) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    module = unwrapped(module)
    mine = fingerprint(module)
    if metadata["fingerprint"] != mine:
        raise ValueError(
            f"{path}: this state was made by a {metadata['maker']} with fingerprint "
            f"{metadata['fingerprint'][:12]}, but this {type(module).__name__} has {mine[:12]}: its structure or "
            f"weights differ, so it would read the memory wrongly. Load the module that wrote the state."
        )
    states = states_from(tensors, layers_of(module, int(metadata["layers"])))
    return states[0] if metadata["kind"] == "layer" else states


def tensors_of(states: Sequence[MemoryState]) -> dict[str, Tensor]:
    """All tensors of several layers' states by name: "0.kv.keys", "1.position"."""
    return {f"{i}.{name}": part for i, state in enumerate(states) for name, part in state.named_leaves().items()}


def states_from(tensors: Mapping[str, Tensor], layers: Sequence[Any]) -> tuple[MemoryState, ...]:
    """The states of these layers whose `tensors_of` they are."""
    return tuple(
        layer.state_of(tensors[f"{i}.{name}"] for name in named(layer.entries)) for i, layer in enumerate(layers)
    )


def layers_of(module: nn.Module, n: int | None = None) -> list[Any]:
    """The layers of a module that have states: its first n; of a single layer, it n times."""
    layers: list[Any] = [part for part in module.modules() if hasattr(part, "state_of")]
    return layers if n is None else layers * n if len(layers) == 1 else layers[:n]


def load_unread(path: str | Path) -> Tensor | None:
    """The tokens that `save_state` was given beside the state; None if there were none."""
    with _opened(path, "cpu") as file:
        return file.get_tensor("unread") if "unread" in file.keys() else None  # noqa: SIM118


def load_notes(path: str | Path) -> str:
    """The text that `save_state` was given beside the state; empty if there was none."""
    with _opened(path, "cpu") as file:
        return str(file.metadata().get("notes", ""))


@contextlib.contextmanager
def _opened(path: str | Path, device: torch.device | str) -> Iterator[Any]:
    """The file that `save_state` wrote; ValueError where it is not one."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file written by save_state, got a folder")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = (file.metadata() or {}).get("format")
            if found in OLD_FORMATS:
                raise ValueError(
                    f"{path}: this state was written by an older version of hqlt ({found}; this one reads {FORMAT}), "
                    f"which named modules in another way; read its tokens again and save the state anew"
                )
            if found != FORMAT:
                raise ValueError(f"{path}: expected format {FORMAT!r}, got {found!r}; is it a state file?")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file written by save_state, got {error}") from error
