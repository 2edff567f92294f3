"""Fast weights against other implementations: transformers' PyTorch code, and ONNX's reference evaluator.

float32 is replaced by float64 in their source code, so that results agree to 1e-10. The tests with ONNX need its
package: `make test-onnx`.
"""

from __future__ import annotations

import inspect
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import fast_weights
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.float64 import in_float64
from tests.laws import close, normal

BATCH, LENGTH, HEADS, KEY, VALUE, GROUP = 2, 70, 4, 8, 6, 2  # more than one chunk of 64, and not a multiple of it
HERE = [name for name in IMPLEMENTATIONS["fast_weights"] if name != "fla"]  # fla needs a GPU
every_backend = pytest.mark.parametrize("backend", HERE)


@pytest.fixture
def theirs(monkeypatch):
    """A function that imports a transformers model's code, changed to compute in float64."""
    return partial(in_float64, monkeypatch=monkeypatch)


def gates(*more: int) -> tuple[Tensor, Tensor]:
    """log α as in Mamba-2, −exp(A_log) · softplus(· + dt_bias), and softplus(…): [b, t, h, *more]."""
    rate = 1 + 15 * normal(HEADS, *[1] * len(more), seed=30).sigmoid()
    dt = F.softplus(normal(BATCH, LENGTH, HEADS, *more, seed=31) + normal(HEADS, *more, seed=32) - 3)
    return -rate * dt, dt


def state_before() -> Tensor:
    return normal(BATCH, HEADS, KEY, VALUE, seed=40)


def check(mine: Any, others: Any, inputs: Any, tolerance: float = 1e-10) -> None:
    """Compare outputs, final states, and the gradients of a weighted sum of both."""
    for x, y in zip(mine, others, strict=True):
        close(x, y, tolerance)
    gradients = [
        torch.autograd.grad(sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate(made)), inputs)
        for made in (mine, others)
    ]
    for x, y in zip(*gradients, strict=True):
        close(x, y, tolerance)


class Delta(NamedTuple):
    """A delta rule with decay in transformers."""

    model: str
    name: str
    rows: tuple[int, ...] = ()
    """Additional axis of the decay: none, or (KEY,) for a decay per row."""
    groups: int = GROUP
    """Number of matrices that share a key and a query."""


DELTAS = [
    Delta("qwen3_next", "torch_recurrent_gated_delta_rule"),
    Delta("qwen3_next", "torch_chunk_gated_delta_rule"),
    Delta("qwen3_5", "torch_chunk_gated_delta_rule"),
    Delta("olmo_hybrid", "torch_recurrent_gated_delta_rule", (), 1),
    Delta("olmo_hybrid", "torch_chunk_gated_delta_rule", (), 1),
    Delta("kimi_linear", "recurrent_kimi_delta_attention", (KEY,), 1),
    Delta("kimi_linear", "chunk_kimi_delta_attention", (KEY,), 1),
]


@every_backend
@pytest.mark.parametrize("rule", DELTAS, ids=lambda rule: f"{rule.model}-{rule.name}")
def test_delta_rules_with_decay(rule, backend, theirs):
    """Qwen3-Next, Qwen3.5 and Olmo-Hybrid (a decay per matrix), and Kimi Linear (a decay per row)."""
    made = (
        normal(BATCH, LENGTH, HEADS // rule.groups, KEY, seed=0),
        normal(BATCH, LENGTH, HEADS // rule.groups, KEY, seed=1),
        normal(BATCH, LENGTH, HEADS, VALUE, seed=2),
        gates(*rule.rows)[0],
        2 * normal(BATCH, LENGTH, HEADS, seed=3).sigmoid(),
        state_before(),
    )
    q, k, v, decay, beta, state = inputs = [x.requires_grad_() for x in made]
    function = getattr(theirs(rule.model), rule.name)
    every_q, every_k = (x.repeat_interleave(rule.groups, dim=2) for x in (q, k))
    shared = "repeat_interleave" in inspect.getsource(function)  # older versions repeat heads before they call it
    others = function(
        *((q, k) if shared else (every_q, every_k)), v, g=decay, beta=beta, initial_state=state,
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (every_q, every_k))
    check(fast_weights(q, k, v, beta=beta, decay=decay, state=state, backend=backend), others, inputs)


@every_backend
@pytest.mark.parametrize("model", ["mamba2", "bamba", "falcon_h1"])
def test_mamba2(model, backend, theirs):
    """Chunked Mamba-2: q = C, k = B, v = dt · x, without erasing; groups of heads share B and C."""
    (decay, dt), groups = gates(), HEADS // GROUP
    A = decay[0, 0] / dt[0, 0]
    made = (
        normal(BATCH, LENGTH, groups, KEY, seed=0),
        normal(BATCH, LENGTH, groups, KEY, seed=1),
        normal(BATCH, LENGTH, HEADS, VALUE, seed=2),
        dt,
        state_before(),
    )
    C, B, x, dt, state = inputs = [part.requires_grad_() for part in made]
    out, final = theirs(model).mamba2_chunk_scan(
        x, dt, A, B, C, 32, initial_states=state.transpose(2, 3), return_final_states=True
    )
    mine = fast_weights(
        C.repeat_interleave(GROUP, dim=2), B.repeat_interleave(GROUP, dim=2), x * dt[..., None],
        decay=A * dt, erase=False, scale=1.0, state=state, backend=backend,
    )  # fmt: skip
    check(mine, (out, final.transpose(2, 3)), inputs)


@every_backend
def test_mamba2_token_by_token(backend, theirs):
    decay, dt = gates()
    C, B = (normal(BATCH, LENGTH, HEADS, KEY, seed=seed) for seed in (0, 1))
    x, state = normal(BATCH, LENGTH, HEADS, VALUE, seed=2), state_before()
    A = (decay[0, 0] / dt[0, 0])[:, None, None].expand(HEADS, VALUE, KEY)
    held, reads = state.transpose(2, 3).contiguous(), []
    step = theirs("mamba2").mamba2_selective_state_update
    for t in range(LENGTH):
        reads.append(step(held, x[:, t], dt[:, t, :, None].expand(-1, -1, VALUE), A, B[:, t], C[:, t]))
    out, final = fast_weights(
        C, B, x * dt[..., None], decay=decay, erase=False, scale=1.0, state=state, backend=backend
    )
    close(out, torch.stack(reads, dim=1))
    close(final, held.transpose(2, 3))


@every_backend
def test_mlstm(backend, theirs):
    """The normalizer is one more column of values. Theirs is divided by exp(m) throughout; ours is not divided here."""
    q, k = (normal(BATCH, LENGTH, HEADS, KEY, seed=seed) for seed in (0, 1))
    v = normal(BATCH, LENGTH, HEADS, VALUE, seed=2)
    i, f = normal(BATCH, LENGTH, HEADS, seed=3), 2 + normal(BATCH, LENGTH, HEADS, seed=4)
    inputs = [x.requires_grad_() for x in (q, k, v, i, f)]
    others, (C, n, m) = theirs("xlstm").mlstm_recurrent_sequence_native(
        *(x.transpose(1, 2) for x in inputs), return_last_states=True, eps=0.0, dtype_state=torch.float64
    )
    columns = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out, S = fast_weights(q, k, columns, beta=i.exp(), decay=F.logsigmoid(f), erase=False, backend=backend)
    mine = out[..., :-1] / out[..., -1:].abs().clamp(min=1)
    final = torch.cat([C, n[..., None]], dim=-1) * m[..., None].exp()
    check((mine, S), (others.transpose(1, 2), final), inputs)


@every_backend
@pytest.mark.parametrize(
    ("rule", "decay"),
    [("linear", None), ("delta", None), *product(["gated", "gated_delta"], ["matrix", "rows"])],
)
def test_onnx_reference(rule, decay, backend):
    """ONNX's operator LinearAttention in its reference evaluator, in float32."""
    onnx = pytest.importorskip("onnx", reason="ONNX's reference evaluator needs the extra `onnx`")
    if not onnx.defs.has("LinearAttention"):
        pytest.skip(f"ONNX's operator LinearAttention needs onnx 1.22 or newer, this is {onnx.__version__}")
    from onnx.reference import ReferenceEvaluator

    queries, erase, rows = GROUP * HEADS, rule.endswith("delta"), (KEY,) if decay == "rows" else ()
    given = {
        "query": normal(BATCH, LENGTH, queries, KEY, seed=0),
        "key": F.normalize(normal(BATCH, LENGTH, HEADS, KEY, seed=1), dim=-1),
        "value": normal(BATCH, LENGTH, HEADS, VALUE, seed=2),
        "past_state": state_before(),
        "decay": gates(*rows)[0] if decay else None,
        "beta": normal(BATCH, LENGTH, HEADS, seed=3).sigmoid() if erase else None,
    }
    tensors = {
        name: (x if name == "past_state" else x.flatten(2)).float().numpy()
        for name, x in given.items() if x is not None
    }  # fmt: skip
    node = onnx.helper.make_node(
        "LinearAttention", [name if name in tensors else "" for name in given], ["out", "present"],
        q_num_heads=queries, kv_num_heads=HEADS, update_rule=rule,
    )  # fmt: skip
    typed = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name, x in tensors.items()]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("out", "present")]
    graph = onnx.helper.make_graph([node], rule, typed, outputs)
    opset = onnx.helper.make_opsetid("", onnx.defs.get_schema("LinearAttention").since_version)
    out, final = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, tensors)
    mine, S = fast_weights(
        given["query"], given["key"], given["value"],
        beta=given["beta"], decay=given["decay"], erase=erase, state=given["past_state"], backend=backend,
    )  # fmt: skip
    close(torch.from_numpy(out).unflatten(2, (queries, VALUE)), mine, 1e-5)
    close(torch.from_numpy(final), S, 1e-5)
