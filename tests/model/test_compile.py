"""torch.compile traces every model as one graph, forward and backward, on fake CUDA tensors."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_compiler, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from hqlt import ops
from hqlt.model import HQLTForCausalLM, preset
from hqlt.model.loss import summed_cross_entropy
from tests import fake_cuda
from tests.fake_cuda import needs_fake_cuda, outside

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # raised inside torch's tracer
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "window": 4, "vocab_size": 64, "intermediate_size": 32
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "delayed-streaming-gated-delta": {"blend": "delayed-streaming", "fast_weights": "gated-delta"},
    "delayed-chunk-kda": {"blend": "delayed-chunk", "fast_weights": "kda", "mixer": "scalar"},
    "synchronous-linear": {"fast_weights": "linear", "mixer": "add", "num_kv_heads": 1, "qk_norm": "head"},
    "fw-only-delta-product": {"layer_kinds": ["fw"], "fast_weights": "delta-product"},
    "kv-only": {"layer_kinds": ["kv"]},
}


OTHERS = ("synchronous-linear", "fw-only-delta-product", "kv-only")


@outside
def test_on_fake_cuda_tensors():
    fake_cuda.in_its_own_process(__file__)


@outside
@pytest.mark.slow
def test_the_others_on_fake_cuda_tensors():
    fake_cuda.in_its_own_process(__file__, "-m", "slow")


@pytest.fixture(scope="module", autouse=True)
def guard(tmp_path_factory) -> None:
    if not needs_fake_cuda.args[0]:
        fake_cuda.allow(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    torch._dynamo.reset()
    with FakeTensorMode() as mode:
        yield mode


def fake(choice: str = "synchronous", **changes: Any) -> HQLTForCausalLM:
    config = preset("tiny", **{**SMALL, **MODELS[choice], **changes})
    with torch.device("cuda"):
        model: HQLTForCausalLM = HQLTForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    return model


def train(model: HQLTForCausalLM, mode: FakeTensorMode, t: int = 9, backend: Any = "aot_eager", **options: Any) -> None:
    """torch.compile raises unless it finds one graph; every weight gets a gradient."""
    tokens, resets = (torch.zeros(2, t, dtype=dtype, device="cuda") for dtype in (torch.long, torch.bool))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(tokens, labels=tokens, resets=resets, use_cache=False, **options).loss
    assert (loss.device.type, loss.fake_mode) == ("cuda", mode)
    loss.backward()
    assert {p.grad.device.type for p in model.parameters()} == {"cuda"}


@needs_fake_cuda
@pytest.mark.parametrize("choice", [pytest.param(x, marks=[pytest.mark.slow] * (x in OTHERS)) for x in MODELS])
def test_one_graph(choice, mode):
    train(fake(choice), mode)


@needs_fake_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tracing_for_a_gpu_runs_no_kernel(mode):
    q = torch.zeros(1, 70, 1, 8, device="cuda")
    read, _ = torch.compile(ops.delta_rule, fullgraph=True, backend="eager")(q, q, q, q[..., 0])
    assert (read.shape, read.device.type) == (q.shape, "cuda")


@needs_fake_cuda
def test_one_graph_with_a_loss_in_chunks(mode, monkeypatch):
    monkeypatch.setattr(summed_cross_entropy, "__defaults__", (7 * SMALL["vocab_size"],))
    train(fake("kv-only"), mode, skip_logits=True)


@needs_fake_cuda
@pytest.mark.parametrize("selective", [False, True])
def test_one_graph_with_checkpoints(selective, mode):
    """Selective checkpointing keeps the outputs of the projections and recomputes everything else."""

    def policy(context: object, op: object, *arguments: object, **options: object) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.linear.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model = fake()
    model.activation_checkpointing_enable(options)
    train(model, mode)


@needs_fake_cuda
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("kept", "rule"), [(False, "delta"), (True, "delta"), (False, "gated-delta")])
def test_the_operator_of_a_synchronous_layer_is_one_node(kept, rule, mode):
    """One node in forward and backward, recomputed in the backward pass unless a policy keeps its output."""
    importlib.import_module("hqlt.ops.synchronous.kernels.operators")  # registers it
    operator, graphs = torch.ops.hqlt.synchronous.default, []

    def policy(context: object, op: object, *arguments: object, **options: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is operator and kept else CheckpointPolicy.MUST_RECOMPUTE

    model = fake(fast_weights=rule)
    selective = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": selective})
    record = make_boxed_compiler(lambda graph, _: graphs.append(graph) or graph)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    with ops.use_backend("triton"):
        train(model, mode, backend=backend)
    forward, backward = ([node.target for node in graph.graph.nodes] for graph in graphs)
    assert (forward.count(operator), backward.count(operator)) == (1, 0 if kept else 1)
    assert backward.count(torch.ops.hqlt.synchronous_backward.default) == 1
