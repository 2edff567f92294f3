"""Blocks with compilation, activation checkpointing and sharding combined, on a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from hqlt import ops
from hqlt.model import HQLTForCausalLM, preset
from hqlt.train.language.ranks import Ranks, parallelize
from hqlt.train.language.settings import TrainSettings


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch._dynamo.reset()
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # raised inside torch's tracer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_block_compiles_to_one_graph(mesh, checkpoints):
    small = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "window": 4, "intermediate_size": 32}
    settings = TrainSettings(compile=True, precision="bfloat16", activation_checkpointing=checkpoints)
    strictly = partial(nn.Module.compile, backend="aot_eager", fullgraph=True)
    with mock.patch.object(nn.Module, "compile", lambda block: strictly(block)):
        model = parallelize(HQLTForCausalLM(preset("tiny", **small)), settings, Ranks(0, 2, torch.device("cpu"), mesh))
    tokens = torch.zeros(2, 9, dtype=torch.long)
    torch._dynamo.utils.counters.clear()
    with ops.use_backend("chunked"):  # the backend used on a GPU
        model(tokens, labels=tokens, use_cache=False, skip_logits=True).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(weight.grad is not None for weight in model.parameters())
