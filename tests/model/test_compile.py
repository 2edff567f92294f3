"""A GPU's compiler sees one graph of every model, forward and backward: traced on fake CUDA tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hqlt.model import HQLTForCausalLM, preset
from tests import fake_cuda
from tests.fake_cuda import needs_fake_cuda, outside

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # what torch's tracer does itself
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


@outside
def test_on_fake_cuda_tensors():
    fake_cuda.in_its_own_process(__file__)


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


def train(model: HQLTForCausalLM, mode: FakeTensorMode, t: int = 9) -> None:
    """One graph, or torch.compile raises; every weight gets a gradient."""
    tokens, resets = (torch.zeros(2, t, dtype=dtype, device="cuda") for dtype in (torch.long, torch.bool))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, labels=tokens, resets=resets, use_cache=False).loss
    assert (loss.device.type, loss.fake_mode) == ("cuda", mode)
    loss.backward()
    assert {p.grad.device.type for p in model.parameters()} == {"cuda"}


@needs_fake_cuda
@pytest.mark.parametrize("choice", MODELS)
def test_one_graph(choice, mode):
    train(fake(choice), mode)
