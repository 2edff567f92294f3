"""The processes of a run, and the distribution of a model over them (torchrun, FSDP2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hqlt.device import usable_device
from hqlt.train.language.settings import TrainSettings


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and the index of this one."""

    rank: int
    """Index of this process."""
    count: int
    """Number of processes."""
    device: torch.device
    mesh: DeviceMesh | None = None
    """How weights are sharded: ("replicate", "shard") or ("shard",); None: a single process without sharding."""
    background: dist.ProcessGroup | None = None
    """A second group of the same processes, for background threads: two threads must not share a group."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes shared files."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: gloo
        dist.all_reduce(total)
        return [float(number) for number in total]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def join(settings: TrainSettings, device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started; otherwise use this process alone. device: default: cuda if available.

    Raises ValueError if the device is not available, or if batch or sharding settings do not divide evenly.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = usable_device(device).type
    settings.micro_batches(count)
    shard_over = settings.shard_over or count
    if count % shard_over:
        raise ValueError(f"shard_over: expected a divisor of the {count} processes, got {shard_over}")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if not is_sharded(settings, count):
        yield Ranks(rank, count, place)
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        shape, names = ((count,), ("shard",))
        if shard_over < count:
            shape, names = (count // shard_over, shard_over), ("replicate", "shard")  # type: ignore[assignment]
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        yield Ranks(rank, count, place, mesh, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def is_sharded(settings: TrainSettings, count: int) -> bool:
    """Whether FSDP2 is used: with several processes, and in bfloat16 (float32 weights, bfloat16 computation)."""
    return count > 1 or settings.precision != "float32"


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Make blocks save only their input and recompute activations in the backward pass."""
    new_name = getattr(
        model, "activation_checkpointing_enable", None
    )  # transformers 5.23; the old name is removed in 6
    enable: Any = new_name or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parallelize(model: nn.Module, settings: TrainSettings, ranks: Ranks) -> nn.Module:
    """Move the model to its device; enable activation checkpointing, compiled blocks and sharding as configured."""
    blocks: nn.ModuleList = model.model.layers  # type: ignore[assignment, union-attr]
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)
    if settings.compile:
        for block in blocks:
            block.compile()
    model.to(ranks.device)
    if ranks.mesh is None:
        return model
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if settings.precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # tokens are integers; carried fast weights stay in float32
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Sum gradients over processes in the backward passes of this context if enabled; else accumulate them locally."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_requires_gradient_sync(enabled)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
