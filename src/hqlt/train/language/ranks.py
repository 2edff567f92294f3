"""One process or many: who is there, and a model spread over them (torchrun, FSDP2)."""

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
    """The processes of a run, and this one among them."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """How weights are spread: ("replicate", "shard") or ("shard",); None: one process that shards nothing."""
    beside: dist.ProcessGroup | None = None
    """The same processes once more, for what talks beside training: two threads must not share a group."""

    @property
    def first(self) -> bool:
        """Whether this process prints and writes what there is once."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number, summed over processes."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: gloo
        dist.all_reduce(total)
        return [float(number) for number in total]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def join(settings: TrainSettings, device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. device: cuda where there is one, else cpu.

    Raises ValueError for a device that is not here, and for settings that do not come out even.
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
    """FSDP2 serves many processes, and one in bfloat16: float32 weights, computed with in bfloat16."""
    return count > 1 or settings.precision != "float32"


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Blocks keep only their input, and compute the rest again for the gradient."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # of transformers 5.23; the old one goes with 6
    enable: Any = new_name or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parallelize(model: nn.Module, settings: TrainSettings, ranks: Ranks) -> nn.Module:
    """The model on its device: activation checkpoints, compiled blocks and sharded weights as the settings say."""
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
        cast_forward_inputs=False,  # tokens are integers, and carried fast weights stay float32
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
    """This process's rows of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
