"""The core of a synchronous layer. Triton runs on a GPU, or interpreted if TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hqlt import HybridMemory, ops
from hqlt.blend import Memories, Tokens
from hqlt.memory.fw import DeltaGates, MatrixState
from hqlt.memory.rotary import Rotary
from hqlt.ops import synchronous
from hqlt.ops.backend import IMPLEMENTATIONS
from hqlt.ops.synchronous import triton
from tests.laws import Laws, Memory, close, normal
from tests.layers import HIDDEN, tokens
from tests.ops.inputs import HEADS, KEY, VALUE, strided

# The interpreter computes with NumPy, which warns where a GPU returns NaN or infinity.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered in:RuntimeWarning") for what in ("invalid value", "overflow")
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_TRITON = (
    "triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "neither a GPU nor TRITON_INTERPRET=1"
    if not (INTERPRETED or torch.cuda.is_available())
    else ""
)
needs_triton = pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON or "triton runs")
BACKENDS = [
    pytest.param(name, marks=needs_triton if name == "triton" else ()) for name in IMPLEMENTATIONS["synchronous"]
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Relative tolerance of outputs and gradients, in norm, against the reference in float64 on the same numbers."""


def device_of(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def skip_without_dot(backend, dtype):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's products of bfloat16 are wrong")


def inputs_of(b, t, held=0, key=KEY, value=VALUE, dtype=torch.float64, heads=HEADS, group=1, decays=False):
    """q, k, v, β, gate, norm weight, W_0 and, with decay, log α. β, W_0 and log α are in at least float32."""
    l, wide = held + t, torch.promote_types(dtype, torch.float32)
    return [
        normal(b, t, heads * group, key).to(dtype),
        normal(b, l, heads, key, seed=1).to(dtype),
        normal(b, l, heads, value, seed=2).to(dtype),
        2 * normal(b, t, heads, seed=3).sigmoid().to(wide),
        normal(b, t, heads * group, value, seed=4).to(dtype),
        1 + 0.3 * normal(value, seed=5).to(dtype),
        normal(b, heads, key, value, seed=6).to(wide),
        *([-0.1 * (1.5 * normal(b, t, heads, seed=9)).exp().to(wide)] if decays else []),
    ]


def resets_of(b, l, part=0.05, seed=7):
    return torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) < part


def beyond_of(inputs, window, resets, kept, seed=11):
    """Entries that stay visible beyond the window: per KV head, those with the highest of random scores."""
    b, l, heads = inputs[1].shape[:3]
    leaves = (torch.arange(l) + window).expand(b, l)
    expiry = ops.expiry(normal(b, l, heads, seed=seed), leaves, kept=kept, resets=resets)
    return ops.Beyond(expiry, kept)


def run(inputs, window, resets, backend, rotary=True, beyond=None):
    """Run the operation on its backend's device, and return the result on the CPU."""
    q, k, *inputs, state, decay = (x if x is None else x.to(device_of(backend)) for x in [*inputs, None][:8])
    table = Rotary(100.0).table(k.shape[1], k.shape[3], q.device, q.dtype) if rotary and k.shape[3] % 2 == 0 else None
    resets = None if resets is None else resets.to(q.device)
    beyond = beyond and beyond._replace(expiry=beyond.expiry.to(q.device))
    options = {"window": window, "rotary": table, "state": state, "decay": decay, "resets": resets, "beyond": beyond}
    y, W = synchronous(q, k, *inputs, **options, backend=backend)
    return y.cpu(), W.cpu()


def with_gradients(inputs, window, resets, backend, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(inputs, window, resets, backend, **options)
    directions = [normal(*x.shape, seed=8 + i).to(x.dtype) for i, x in enumerate(out)]
    return [*out, *torch.autograd.grad(out, inputs, directions)]


NAMES = ("y", "W", "dq", "dk", "dv", "dβ", "dgate", "dnorm", "dW", "dlogα")


def assert_as_reference(inputs, window, resets, backend, **options):
    """Compare outputs, final state and all gradients in norm, and check that each gradient has its input's dtype."""
    got = with_gradients(inputs, window, resets, backend, **options)
    expected = with_gradients([x.double() for x in inputs], window, resets, "reference", **options)
    for name, mine, theirs in zip(NAMES[: len(got)], got, expected, strict=True):
        assert mine.shape == theirs.shape, name
        error = (mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-6)
        assert error < TOLERANCE[inputs[0].dtype], f"{name} differs by {error:.1e}"
    assert [x.dtype for x in got] == [x.dtype for x in (inputs[2], inputs[6], *inputs)]


class TestLaws(Laws):
    """With the entries and positions that the layer's blend holds between calls."""

    longest = 35  # more than a chunk in float64
    decays = False

    @pytest.fixture(params=BACKENDS)
    def build(self, request):
        def build(window):
            layer = HybridMemory(HEADS * KEY, HEADS, window)
            weight = 1 + 0.3 * normal(KEY)

            def run_in(backend):
                def run(inputs, state, resets):
                    q, k, v, beta, gate, *decay = (x.to(device_of(backend)) for x in inputs)
                    b, t = q.shape[:2]
                    state = state and layer.state_of(state).to(q.device)
                    if t == 0:
                        state = state or layer.init_state(b, "cpu").to(dtype=v.dtype)
                        return v.cpu(), tuple(state.to("cpu").leaves())
                    resets = None if resets is None else resets.to(q.device)
                    timeline = layer.blend.timeline(Tokens(q, k, v, DeltaGates(beta)), state, resets)
                    table = Rotary(100.0).table(timeline.keys.shape[1], KEY, q.device, q.dtype)
                    y, W = synchronous(
                        q, timeline.keys, timeline.values, beta, gate, weight.to(q.device), window=window,
                        decay=decay[0] if decay else None, rotary=table,
                        state=state and state.fw.matrix, resets=timeline.resets, backend=backend,
                    )  # fmt: skip
                    after = layer.blend.state_after(Memories(layer.kv, layer.fw), timeline, MatrixState(W))
                    return y.cpu(), tuple(after.to("cpu").leaves())

                return run

            def inputs(b, t):
                tensors = inputs_of(b, t, value=KEY, decays=self.decays)
                return tuple(x[:, :t] for x in (*tensors[:5], *tensors[7:]))

            return Memory(run_in(request.param), run_in("reference"), inputs)

        return build


class TestLawsWithDecay(TestLaws):
    decays = True


every_rule = pytest.mark.parametrize("decays", [False, True])


@every_backend
@every_rule
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, dtype, decays):
    """Over two chunks in every dtype, with resets and held entries."""
    skip_without_dot(backend, dtype)
    inputs = inputs_of(2, 131, held=9, key=6, dtype=dtype, decays=decays)
    assert_as_reference(inputs, 10, resets_of(2, 140, 0.02), backend)


@every_backend
@pytest.mark.parametrize("log_alpha", [0.0, -30.0, -1e4, float("-inf")])
def test_extreme_decays(backend, log_alpha):
    """Occasionally among small decays, and throughout."""
    inputs, resets = inputs_of(1, 35, held=2, decays=True), resets_of(1, 37, 0.1)
    inputs[7][:, ::5] = log_alpha
    assert_as_reference(inputs, 4, resets, backend)
    inputs[7][:] = log_alpha
    for x in with_gradients(inputs, 4, resets, backend):
        assert x.isfinite().all()


def test_decay_by_hand():
    """Token by token: decay, then write, then read."""
    q, k, v, beta, gate, weight, W, log = inputs_of(1, 5, decays=True)
    y, final = synchronous(q, k, v, beta, gate + 50, weight, window=1, decay=log, state=W, backend="reference")
    unit = lambda x: F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    for t in range(5):
        W = W * log[:, t].exp()[..., None, None]
        error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", W, unit(k[:, t])))
        W = W + unit(k[:, t])[..., None] * error[..., None, :]
        fw = KEY**-0.5 * torch.einsum("bhkv,bhk->bhv", W, unit(q[:, t]))
        close(y[:, t], fw / (fw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight, 1e-8)
    close(final, W)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_widest_heads(backend, dtype):
    skip_without_dot(backend, dtype)
    inputs = inputs_of(1, 80, held=63, key=128, value=128, dtype=dtype, heads=1)
    assert_as_reference(inputs, 64, None, backend)


@every_backend
@pytest.mark.parametrize(
    ("b", "t", "held", "key", "value", "window"),
    [
        (1, 1, 0, 4, 3, 1),
        (1, 1, 7, 4, 3, 8),
        (3, 2, 40, 5, 7, 4),
        (2, 31, 0, 1, 1, 7),
        (1, 32, 3, 50, 20, None),
        (1, 33, 70, 3, 17, None),
        (2, 65, 1, 18, 33, 64),
    ],
)
def test_sizes(backend, b, t, held, key, value, window):
    """Widths that are not powers of two, odd ones (without rotary embedding), values wider than keys; lengths around
    the ends of chunks."""
    inputs = inputs_of(b, t, held, key, value)
    assert_as_reference(inputs, window, None, backend)
    assert_as_reference(inputs, window, resets_of(b, held + t, 0.1), backend, rotary=False)


@every_backend
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@every_rule
def test_head_widths(backend, width, decays):
    """Two chunks, the second of one token."""
    inputs = inputs_of(1, 33, held=2, key=width, value=width, heads=1, decays=decays)
    assert_as_reference(inputs, 4, None, backend)


@every_backend
@pytest.mark.parametrize(("group", "decays"), [(2, False), (3, False), (2, True)])
def test_query_heads_share_entries_and_matrix(backend, group, decays):
    inputs = inputs_of(2, 35, held=5, group=group, decays=decays)
    assert_as_reference(inputs, 9, resets_of(2, 40), backend)


@every_backend
@pytest.mark.parametrize(("kept", "held", "window", "group"), [(1, 0, 3, 1), (4, 9, 5, 2), (40, 50, 7, 1)])
def test_entries_that_stay_beyond_the_window(backend, kept, held, window, group):
    """Few of many chunks' entries, more than fit into a tile, and entries kept from earlier calls."""
    inputs, resets = inputs_of(2, 70, held=held, group=group), resets_of(2, held + 70, 0.02)
    for marks in (None, resets):
        assert_as_reference(inputs, window, marks, backend, beyond=beyond_of(inputs, window, marks, kept))


@every_backend
@given(data=st.data())
def test_any_shape_window_and_resets(backend, data):
    b, t, held, window = (data.draw(st.integers(*ends)) for ends in [(1, 3), (1, 70), (0, 40), (1, 80)])
    resets = resets_of(b, held + t, data.draw(st.sampled_from([0.0, 0.03, 0.3, 1.0])), data.draw(st.integers(0, 99)))
    inputs, kept = inputs_of(b, t, held, decays=data.draw(st.booleans())), data.draw(st.integers(0, 20))
    beyond = beyond_of(inputs, window, resets, kept) if kept else None
    assert_as_reference(inputs, window, resets, backend, beyond=beyond)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_equal_keys_stay_accurate(backend, dtype, beta):
    """Equal keys and strong writes, for which an inverse computed from powers of a triangle loses precision."""
    inputs = inputs_of(1, 70, key=16, value=16, dtype=dtype)
    inputs[1] = inputs[1][:, :1].expand(-1, 70, -1, -1)
    inputs[3] = torch.full_like(inputs[3], beta)
    y, W = run(inputs, 8, None, backend)
    expected_y, expected_W = run([x.double() for x in inputs], 8, None, "reference")
    for got, expected in ((y, expected_y), (W, expected_W)):
        assert (got.double() - expected).norm() < 20 * TOLERANCE[dtype] * expected.norm()


@every_backend
def test_memory_layout_does_not_matter(backend):
    inputs, resets = inputs_of(2, 37, held=5, decays=True), resets_of(2, 42)
    expected = with_gradients(inputs, 6, resets, backend)
    got = with_gradients([strided(x) for x in inputs], 6, strided(resets), backend)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)


@every_backend
@pytest.mark.parametrize("t", [1, 35])
def test_every_output_is_written(backend, t, poisoned_memory):
    for held, resets in [(0, None), (3, resets_of(2, t + 3, 0.2))]:
        for x in with_gradients(inputs_of(2, t, held, decays=True), 4, resets, backend):
            assert x.isfinite().all()


@every_backend
def test_nan_in_one_row_does_not_affect_others(backend):
    inputs = inputs_of(3, 40, held=4, decays=True)
    alone = with_gradients([x if x.dim() == 1 else x[:2] for x in inputs], 6, None, backend)
    for x in inputs:
        if x.dim() > 1:
            x[2] = torch.nan
    for name, mine, theirs in zip(NAMES, with_gradients(inputs, 6, None, backend), alone, strict=False):
        if name != "dnorm":
            close(mine[:2], theirs, 1e-12 if backend == "reference" else 1e-10)


def test_composed_equals_the_layer():
    """Bit for bit, so that using the operation in the layer changes no loss."""
    layer = HybridMemory(16, 2, window=5)
    x, resets = torch.randn(2, 40, 16), resets_of(2, 40)
    expected, _ = layer(x, resets=resets)
    (q, k, v, beta, gate), _ = layer.project(x, None, resets)
    y, _ = synchronous(
        q, k, F.silu(v), 2 * beta.sigmoid(), gate.unflatten(-1, (2, -1)), layer.o_norm.weight,
        window=5, rotary=Rotary(10_000.0).table(40, 8, x.device, x.dtype), norm_eps=layer.o_norm.eps, resets=resets,
    )  # fmt: skip
    assert torch.equal(layer.o_proj(y.flatten(2)), expected)


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fast_weights": "gated-delta"},
        {"sinks": 2},
        {"sinks": 1, "retention": "value-norm", "kept": 3, "num_kv_heads": 1, "rope_theta": None},
        {"sinks": 2, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)
def test_a_layer_runs_it_if_the_backend_is_forced(options):
    """In two calls, with resets: outputs, final state and gradients of the whole layer."""
    torch.manual_seed(0)
    layer = HybridMemory(HIDDEN, 2, window=5, **options).double().to(device_of("triton"))
    x = tokens(2, 40).to(device_of("triton")).requires_grad_()
    resets = resets_of(2, 40).to(x.device)
    answers = []
    for backend in ("triton", "reference"):
        with (
            ops.use_backend(backend),
            mock.patch.dict(IMPLEMENTATIONS["synchronous"], triton=mock.Mock(wraps=triton.synchronous)),
        ):
            y1, state = layer(x[:, :25], resets=resets[:, :25])
            y2, state = layer(x[:, 25:], state, resets[:, 25:])
            assert IMPLEMENTATIONS["synchronous"]["triton"].call_count == (2 if backend == "triton" else 0)
        gradients = torch.autograd.grad(y1.square().sum() + y2.square().sum(), [x, *layer.parameters()])
        answers.append([y1, y2, *state.leaves(), *gradients])
    for mine, theirs in zip(*answers, strict=True):
        close(mine, theirs, 1e-9)


@needs_triton
@pytest.mark.parametrize(
    "option",
    [
        {"partial_rotary_factor": 0.5},
        {"sinks": 2, "kept_positions": "clamped"},
        {"retention": "surprise", "kept": 2},
        {"fast_weights": "linear"},
        {"feature_map": "learned"},
        {"kv_activation": None},
    ],
)
def test_an_unsupported_layer_runs_part_by_part(option):
    layer = HybridMemory(16, 2, window=3, **option).double().to(device_of("triton"))
    x, answers = normal(1, 6, 16).to(device_of("triton")), []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            answers.append(layer(x)[0])
    close(*answers)


def operator_inputs(device, decays):
    """Inputs of `operators.forward`, with held entries, a reset and rotary tables."""
    *inputs, decay = (x.to(device).requires_grad_() for x in inputs_of(2, 4, held=3, decays=True))
    decay = decay if decays else None
    resets = torch.zeros(2, 7, dtype=torch.bool, device=device)
    resets[1, 5] = True
    expiry = beyond_of(inputs, 4, resets.cpu(), 2).expiry.int().to(device) if decays else None
    table = Rotary(100.0).table(7, KEY, torch.device(device), torch.float64)
    return *inputs, decay, *table, resets, expiry, 4, 0.5, 1e-6, 2 if decays else 0


@needs_triton
@pytest.mark.parametrize("decays", [False, True])
def test_both_directions_are_registered_operators(decays):
    """Schema, fake tensors and gradients, which compilers, checkpointing and export rely on."""
    from hqlt.ops.synchronous.kernels.operators import backward, forward

    inputs = operator_inputs(device_of("triton"), decays)
    torch.library.opcheck(forward, inputs)
    with torch.no_grad():
        y, W, *saved = forward(*inputs)
        torch.library.opcheck(backward, (*inputs[:6], *inputs[7:12], *saved, y, W, *inputs[12:]))


@needs_triton
@pytest.mark.parametrize("decays", [False, True])
def test_torch_compile_sees_one_graph(decays):
    """Forward and backward without graph breaks, and the same numbers."""
    torch._dynamo.reset()

    def loss(*inputs):
        y, W = synchronous(*inputs, **options, backend="triton")
        return y.square().sum() + W.sum()

    *inputs, state, decay, cos, sin, resets = operator_inputs(device_of("triton"), decays)[:11]
    options = {"window": 4, "resets": resets, "rotary": (cos, sin), "state": state, "decay": decay}
    wanted = [state] if decay is None else [state, decay]
    expected = loss(*inputs)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, expected)
    for mine, theirs in zip(*(torch.autograd.grad(x, [*inputs, *wanted]) for x in (got, expected)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_torch_compile_can_trace_for_a_gpu_without_one():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [x.cuda() if torch.cuda.is_available() else torch.empty_like(x, device="cuda")
                  for x in inputs_of(2, 4, dtype=torch.bfloat16)]  # fmt: skip
        y, W = synchronous(*inputs[:6], window=2, state=inputs[6], backend="triton")
    assert (y.shape, y.dtype, y.device.type) == (inputs[4].shape, torch.bfloat16, "cuda")
    assert (W.shape, W.dtype) == (inputs[6].shape, torch.float32)


@needs_triton
@pytest.mark.parametrize("name", ["carry", "entries_backward", "carry_backward", "chunk"])
def test_launch_options_do_not_change_results(name):
    from hqlt.ops.synchronous.kernels import launch

    narrower = {name: launch.NARROW.get(name, launch.Launch(4))._replace(block=16)}
    tables = (launch.CHUNK, {8: 16}) if name == "chunk" else (launch.NARROW, narrower)
    with mock.patch.dict(*tables):
        assert_as_reference(inputs_of(1, 35, held=5, key=20, value=40), 9, resets_of(1, 40), "triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rows_and_heads_share_the_longest_axis_of_the_grid():
    """The other two axes are limited to 65,535."""
    from hqlt.ops.synchronous.kernels import launch

    kernel = mock.MagicMock(arg_names=["T"])
    kernel.fn.__name__ = "read"
    shape = torch.empty(70_000, 65, 2, 4, dtype=torch.bfloat16, device="meta")
    launch.call(shape, shape, shape).each_chunk(kernel, shape)
    kernel.__getitem__.assert_called_once_with((70_000 * 2 * 2,))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="too slow: the interpreter runs programs one by one")
def test_more_rows_than_the_second_axis_of_a_grid_allows():
    assert_as_reference(inputs_of(66_000, 1, heads=1), 1, None, "triton")


@needs_triton
def test_the_gradient_of_the_matrix_is_accumulated_in_float32():
    """In float16, where only a chunk's contribution to this gradient overflows."""
    inputs = [torch.zeros_like(x) for x in inputs_of(1, 64, key=8, value=8, dtype=torch.float16, heads=1)]
    inputs[0][..., :4] = 2.0  # queries and keys are orthogonal
    inputs[1][..., 4:] = 2.0
    inputs[4] += 20.0  # the gate selects the FW read
    inputs[5] += 1.0
    inputs[6][..., :4, 1:] = 1.0
    direction = torch.zeros_like(inputs[2])
    direction[..., 0] = 3e4

    def gradient(inputs, backend):
        inputs[6] = inputs[6].detach().requires_grad_()
        y, _ = run(inputs, 4, None, backend)
        return torch.autograd.grad(y, inputs[6], direction.to(y.dtype))[0]

    expected = gradient([x.double() for x in inputs], "reference")
    assert expected.abs().max() > torch.finfo(torch.float16).max
    got = gradient(inputs, "triton")
    assert (got - expected).norm() < TOLERANCE[torch.float16] * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 4, HEADS, KEY), "v": torch.zeros(2, 4, HEADS, VALUE)},
            "as many entries as the 5 queries",
        ),
        ({"gate": torch.zeros(2, 5, HEADS, KEY)}, r"gate: expected \[b, t, g·h, v\] with v = 3"),
        ({"q": torch.zeros(2, 5, 3, KEY), "gate": torch.zeros(2, 5, 3, VALUE)}, "a multiple of the 2 heads of k"),
        ({"norm_weight": torch.zeros(KEY)}, r"norm_weight: expected \[v\] with v = 3"),
        ({"window": 0}, "window: expected at least 1"),
        ({"decay": torch.zeros(2, 5, 1)}, r"decay: expected \[b, t, h\] with h = 2"),
        ({"resets": torch.zeros(2, 4, dtype=torch.bool)}, r"resets: .* \[2, 5\]"),
        ({"rotary": (torch.zeros(4, 1, 2), torch.zeros(5, 1, 2))}, r"cos of shape .*\[≥ 5, 1, 2\], got \[4, 1, 2\]"),
        ({"backend": "cuda"}, "synchronous: backend: expected one of 'reference', 'composed', 'triton', got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("q", "k", "v", "beta", "gate", "norm_weight", "state")
    right = dict(zip(names, inputs_of(2, 5), strict=True)) | {"window": 3}
    with pytest.raises(ValueError, match=message):
        synchronous(**{**right, **change})


def test_triton_says_what_it_needs():
    *inputs, state = inputs_of(1, 2)
    if NO_TRITON:
        with pytest.raises(RuntimeError, match=r"'triton': expected (the package triton, found none|tensors on a GPU)"):
            synchronous(*inputs, state=state, window=2, backend="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("key", "dtype"), [(258, torch.bfloat16), (130, torch.float32), (66, torch.float64)])
def test_heads_too_wide_for_a_multiprocessor_are_rejected(key, dtype):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        *inputs, state = (torch.empty_like(x, device="cuda") for x in inputs_of(1, 2, key=key, dtype=dtype))
        with pytest.raises(ValueError, match=rf"head widths of at most \d+ in {dtype}, got k = {key} and v = 3"):
            synchronous(*inputs, state=state, window=2, backend="triton")
