"""The one-token Triton kernel of a synchronous layer, compared with the operation and the blend."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from hqlt import HybridMemory, MemoryState, ops
from hqlt.blend import Memories, Synchronous, Tokens
from hqlt.layer import fused
from hqlt.memory import Heads, Held, KVMemory
from hqlt.memory.fw import DeltaGates, MatrixState
from hqlt.memory.rotary import Rotary
from hqlt.ops import synchronous
from hqlt.ops.synchronous.step import step
from tests.laws import close, normal
from tests.ops.inputs import HEADS, KEY, VALUE, strided
from tests.ops.test_synchronous import INTERPRETED, device_of, inputs_of, needs_triton

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DEVICE = device_of("triton")


def empty_state(b, window, key, value, dtype):
    def zeros(*shape, dtype=dtype):
        return torch.zeros(b, *shape, dtype=dtype, device=DEVICE)

    wide = torch.promote_types(dtype, torch.float32)
    return MemoryState(
        kv=Held(zeros(window - 1, HEADS, key), zeros(window - 1, HEADS, value), ()),
        fw=MatrixState(zeros(HEADS, key, value, dtype=wide)), convolution=zeros(0, 0), position=zeros(dtype=torch.long),
    )  # fmt: skip


def composed_step(q, k, v, beta, gate, weight, state, window, rotary, resets, decay):
    blend, heads = Synchronous(window), Heads(HEADS * KEY, q.shape[2], HEADS, HEADS, k.shape[3], v.shape[3])
    timeline = blend.timeline(Tokens(q, k, v, DeltaGates(beta)), state, resets)
    y, W = synchronous(
        q, timeline.keys, timeline.values, beta, gate, weight, window=window, rotary=rotary,
        decay=decay, state=state.fw.matrix, resets=timeline.resets, backend="reference",
    )  # fmt: skip
    return y, blend.state_after(Memories(KVMemory(heads, rope_theta=None), None), timeline, MatrixState(W))


def follow(
    window, key=KEY, value=VALUE, dtype=torch.float64, rotated=True, arranged=lambda x: x, group=1, decays=False
):
    """Compare every token of three rows, which are reset at different tokens, until all buffers are full."""
    t = min(window + 3, 9)
    tensors = inputs_of(3, t, key=key, value=value, dtype=dtype, group=group, decays=True)
    *inputs, weight, _, logs = (x.to(DEVICE) for x in tensors)
    rotary = Rotary(100.0).table(window, key, torch.device(DEVICE), dtype) if rotated else None
    state = empty_state(3, window, key, value, dtype)
    for i in range(t):
        token = [x[:, i : i + 1] for x in inputs]
        decay = logs[:, i : i + 1] if decays else None
        resets = torch.tensor([[i == 2], [False], [i == 4]], device=DEVICE) if i % 2 == 0 else None
        held = [*state.kv[:2], state.fw.matrix, state.position]
        before = [x.clone() for x in held]
        got = step(*map(arranged, [*token, weight, *held]), decay=decay, rotary=rotary, resets=resets)
        assert all(map(torch.equal, held, before))
        y, state = composed_step(*token, weight, state, window, rotary, resets, decay)
        expected = y, *state.kv[:2], state.fw.matrix, state.position
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == theirs.dtype
            close(mine, theirs, TOLERANCE[dtype])
        kv = state.kv._replace(keys=got.keys, values=got.values)
        state = state._replace(kv=kv, fw=MatrixState(got.matrix), position=got.position)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    follow(5, dtype=dtype)


@needs_triton
@pytest.mark.parametrize(("window", "key", "value"), [(1, 4, 4), (2, 3, 1), (4, 50, 20), (40, 6, 17), (64, 128, 128)])
def test_sizes(window, key, value):
    """No held entries, fewer than a block of the kernel, and more."""
    follow(window, key, value, rotated=key % 2 == 0)


@needs_triton
def test_query_heads_share_entries_and_matrix():
    follow(4, group=3)


@needs_triton
def test_decay():
    follow(4, decays=True)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"fast_weights": "gated-delta"}])
def test_a_layer_uses_it_for_single_tokens(options):
    """Without gradients. Outputs and states equal those of the layer's parts, with a reset in between."""
    layer = HybridMemory(16, 4, window=3, **options).double().to(DEVICE)
    x = normal(2, 6, 16).to(DEVICE)
    resets = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    resets[0, 4] = True
    answers = []
    for backend, times in [("triton", 5), ("reference", 0)]:
        one_token = mock.Mock(wraps=step)
        with ops.use_backend(backend), mock.patch.object(fused, "step", one_token), torch.no_grad():
            out, state = layer(x[:, :1])
            outputs = [out]
            for i in range(1, 6):
                out, state = layer(x[:, i : i + 1], state, resets[:, i : i + 1] if i == 4 else None)
                outputs.append(out)
        assert one_token.call_count == times
        answers.append([*outputs, *state.leaves()])
    for mine, theirs in zip(*answers, strict=True):
        close(mine, theirs)


@needs_triton
def test_memory_layout_does_not_matter():
    follow(4, arranged=lambda x: strided(x) if x.is_floating_point() else x)


@needs_triton
def test_every_output_is_written(poisoned_memory):
    follow(3)


@needs_triton
def test_torch_compile_sees_one_graph():
    torch._dynamo.reset()
    q, k, v, beta, gate, weight, W = (x.to(DEVICE) for x in inputs_of(2, 1))
    held = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), W, torch.zeros(2, dtype=torch.long, device=DEVICE)
    rotary = Rotary(100.0).table(3, KEY, torch.device(DEVICE), torch.float64)
    one = (q, k, v, beta, gate, weight, *held)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*one, rotary=rotary)
    assert all(map(torch.equal, got, step(*one, rotary=rotary)))


def test_wrong_arguments_are_named():
    q, k, v, beta, gate, weight, W = inputs_of(2, 1)
    keys, values, position = k[:, :0], v[:, :0], torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"values: expected \[b, s, h, v\] with s = 0"):
        step(q, k, v, beta, gate, weight, keys, v, W, position)
    with pytest.raises(ValueError, match="q: expected one token"):
        step(*inputs_of(2, 2)[:6], keys, values, W, position)
