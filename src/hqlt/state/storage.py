"""States on disk: safetensors files that carry a fingerprint of the module that produced the state."""

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
"""Attributes under which torch.compile, data parallelizm and checkpoint_wrapper keep the module they wrap."""


def fingerprint(module: nn.Module) -> str:
    """Return a digest of a module's structure, weights and buffers.

    Weights are rounded to bfloat16 first, so a module has the same fingerprint in float64, float32 and bfloat16, on
    every device, compiled by `torch.compile`, and wrapped for data parallelizm. Training it further or building it
    with other options changes the fingerprint. So does casting it to float16, which rounds differently; casting that
    to another dtype keeps the fingerprint of the float16 module.

    Args:
        module: a layer, a model, or any other module.

    Returns:
        A SHA-256 digest as 64 hexadecimal digits.

    Raises:
        ValueError: when a weight is on the meta device, as those of an offloaded module are between its calls.

    Example:
        >>> from hqlt import HybridMemory, fingerprint
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> fingerprint(layer.bfloat16()) == fingerprint(layer.float())
        True
    """
    module = unwrap(module)
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        if not is_wrapper(part):
            digest.update(f"{unwrapped_name(name)} {type(part).__name__}({part.extra_repr()})\n".encode())
    entries = {unwrapped_name(name): entry for name, entry in module.state_dict().items()}
    for name, entry in sorted(entries.items(), key=operator.itemgetter(0)):
        digest.update(f"{name} ".encode())
        for data in entry_bytes(name, entry):
            digest.update(data)
    return digest.hexdigest()


def is_wrapper(part: nn.Module) -> bool:
    return list(part._modules) in [[name] for name in WRAPPERS]


def unwrap(module: nn.Module) -> nn.Module:
    """Remove the wrappers of torch.compile and data parallelizm."""
    while is_wrapper(module):
        (module,) = module.children()
    return module


def unwrapped_name(name: str) -> str:
    """The name that a submodule or weight would have without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def entry_bytes(name: str, entry: Any) -> Iterator[bytes]:
    """What the fingerprint covers of a state_dict entry: a tensor's shape and values, or the entry's string."""
    if isinstance(entry, (tuple, list)):  # a quantized weight and its bias
        for part in entry:
            yield from entry_bytes(name, part)
        return
    if not isinstance(entry, Tensor):
        yield f"{entry}\n".encode()
        return
    if entry.is_meta:
        raise ValueError(
            f"{name}: expected weights with values, got one on the meta device; load the weights before computing a "
            f"fingerprint, or saving or loading a state"
        )
    yield f"{list(entry.shape)} ".encode()
    x = entry.detach().cpu()
    if x.is_quantized or type(x) is not Tensor:  # or a tensor subclass that holds quantized values
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
    """Save the state of a layer, or the states of a model, to one safetensors file.

    The file is written atomically: under a temporary name first, then moved to `path`.

    Args:
        path: the file to write; its folder must exist.
        state: a layer's state, or a model's states (one per layer).
        module: the layer or model that produced the state; its `fingerprint` is stored.
        unread: tokens that follow but have not been read yet, for `load_unread`.
        notes: any text, for `load_notes`.

    Raises:
        ValueError: when `path` is a folder.
        OSError: when the file cannot be written.

    Example:
        >>> import torch
        >>> from hqlt import HybridMemory, load_state, save_state
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> y, state = layer(torch.randn(1, 20, 8))
        >>> save_state("layer.safetensors", state, layer)
        >>> y, state = layer(torch.randn(1, 5, 8), state=load_state("layer.safetensors", layer))
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file to write, got a folder that exists")
    single = isinstance(state, MemoryState)
    states: Sequence[Any] = [state] if single else list(state)
    tensors = tensors_of(states)
    if unread is not None:
        tensors["unread"] = unread
    module = unwrap(module)
    metadata = {
        "format": FORMAT,
        "kind": "layer" if single else "model",
        "layers": str(len(states)),
        "maker": type(module).__name__,
        "fingerprint": fingerprint(module),
        "notes": notes,
    }
    on_cpu = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}  # no shared memory
    write_atomic(path, save(on_cpu, metadata))


def load_state(
    path: str | Path, module: nn.Module, device: torch.device | str = "cpu"
) -> MemoryState | tuple[MemoryState, ...]:
    """Load a state that `save_state` wrote.

    Args:
        path: the file.
        module: the layer or model that the state is for, with the structure and weights it had when the state was
            saved; dtype and device may differ.
        device: where the tensors are placed.

    Returns:
        The layer's state, or a tuple with one state per layer of the model.

    Raises:
        ValueError: when the file is not a state, was written by an older version of hqlt, or is the state of a module
            with another structure or other weights.
        FileNotFoundError: when there is no such file.

    Example:
        >>> import torch
        >>> from hqlt import HQLTCache, HQLTForCausalLM, load_state, preset, save_state
        >>> model = HQLTForCausalLM(preset("tiny")).eval()
        >>> cache = model(torch.randint(0, 256, (1, 50)), use_cache=True).past_key_values
        >>> save_state("model.safetensors", cache.states, model)
        >>> cache = HQLTCache.from_states(load_state("model.safetensors", model))
    """
    with _opened(path, device) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    module = unwrap(module)
    own = fingerprint(module)
    if metadata["fingerprint"] != own:
        raise ValueError(
            f"{path}: expected a state of this {type(module).__name__} (fingerprint {own[:12]}), got one of a "
            f"{metadata['maker']} with fingerprint {metadata['fingerprint'][:12]}; its structure or weights differ: "
            f"load the module that the state was saved with"
        )
    states = states_from(tensors, layers_of(module, int(metadata["layers"])))
    return states[0] if metadata["kind"] == "layer" else states


def tensors_of(states: Sequence[MemoryState]) -> dict[str, Tensor]:
    """All tensors of several layers' states by name: "0.kv.keys", "1.position"."""
    return {f"{i}.{name}": part for i, state in enumerate(states) for name, part in state.named_leaves().items()}


def states_from(tensors: Mapping[str, Tensor], layers: Sequence[Any]) -> tuple[MemoryState, ...]:
    """The inverse of `tensors_of`: one state per layer."""
    return tuple(
        layer.state_of(tensors[f"{i}.{name}"] for name in named(layer.entries)) for i, layer in enumerate(layers)
    )


def layers_of(module: nn.Module, n: int | None = None) -> list[Any]:
    """The layers of a module that have a state, or the first n of them; a single layer is repeated n times."""
    layers: list[Any] = [part for part in module.modules() if hasattr(part, "state_of")]
    return layers if n is None else layers * n if len(layers) == 1 else layers[:n]


def load_unread(path: str | Path) -> Tensor | None:
    """Load the unread tokens that were saved with a state.

    Args:
        path: a file that `save_state` wrote.

    Returns:
        The argument `unread` of `save_state`; None if there was none.

    Raises:
        ValueError: when the file is not a state.

    Example:
        >>> import torch
        >>> from hqlt import HybridMemory, save_state
        >>> from hqlt.state import load_unread
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> save_state("layer.safetensors", layer.init_state(1), layer, unread=torch.tensor([3]))
        >>> load_unread("layer.safetensors")
        tensor([3])
    """
    with _opened(path, "cpu") as file:
        return file.get_tensor("unread") if "unread" in file.keys() else None  # noqa: SIM118


def load_notes(path: str | Path) -> str:
    """Load the text that was saved with a state.

    Args:
        path: a file that `save_state` wrote.

    Returns:
        The argument `notes` of `save_state`; empty if there was none.

    Raises:
        ValueError: when the file is not a state.

    Example:
        >>> from hqlt import HybridMemory, save_state
        >>> from hqlt.state import load_notes
        >>> layer = HybridMemory(hidden_size=8, num_heads=2, window=4)
        >>> save_state("layer.safetensors", layer.init_state(1), layer, notes="chapter 3")
        >>> load_notes("layer.safetensors")
        'chapter 3'
    """
    with _opened(path, "cpu") as file:
        return str(file.metadata().get("notes", ""))


@contextlib.contextmanager
def _opened(path: str | Path, device: torch.device | str) -> Iterator[Any]:
    """Open a file that `save_state` wrote. Raises ValueError if it is not one."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file written by save_state, got a folder")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = (file.metadata() or {}).get("format")
            if found in OLD_FORMATS:
                raise ValueError(
                    f"{path}: expected format {FORMAT!r}, got {found!r} of an older version of hqlt, which named "
                    f"modules differently; read the tokens and save the state again"
                )
            if found != FORMAT:
                raise ValueError(f"{path}: expected format {FORMAT!r}, got {found!r}; is it a state file?")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file written by save_state, got {error}") from error
