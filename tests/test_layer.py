"""The contract of the layer: names, shapes, options, errors, dtypes, and agreement with the oracle."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import hqlt
from hqlt import HybridMemory
from tests import oracle
from tests.laws import close
from tests.layers import (
    CHOICES,
    EVERY_STATE,
    HEADS,
    HIDDEN,
    HYBRIDS,
    MIXERS,
    ONE_OF_EACH_BLEND,
    RULES,
    build_layer,
    tokens,
)

every_choice = pytest.mark.parametrize("choice", CHOICES)
every_state = pytest.mark.parametrize("choice", EVERY_STATE)

PROJECTIONS = {f"{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
NORM = {"o_norm.weight": (HIDDEN // HEADS,)}
BETA = {"fw.beta_proj.weight": (HEADS, HIDDEN)}


class TestParameters:
    def shapes(self, **options):
        layer = HybridMemory(hidden_size=HIDDEN, num_heads=HEADS, window=4, **options)
        return {name: tuple(weight.shape) for name, weight in layer.state_dict().items()}

    @pytest.mark.parametrize("blend", HYBRIDS)
    @pytest.mark.parametrize(("mixer", "gate"), [("vector", HIDDEN), ("scalar", 2 * HEADS), ("sum", None)])
    def test_names_and_shapes(self, blend, mixer, gate):
        expected = PROJECTIONS | NORM | BETA
        if gate:
            expected = expected | {"mixer.gate_proj.weight": (gate, HIDDEN)}
        assert self.shapes(blend=blend, mixer=mixer) == expected

    def test_order_of_initialisation(self):
        """Published results depend on it."""
        names = [name for name, _ in HybridMemory(8, 2, 4, conv_size=2, output_gate=True).named_parameters()]
        order = ("mixer.gate_proj", "q_proj", "k_proj", "v_proj", "fw.beta_proj", "conv", "o_norm", "g_proj", "o_proj")
        assert names == [f"{name}.weight" for name in order]

    def test_linear_attention_has_no_beta(self):
        assert "fw.beta_proj.weight" not in self.shapes(fast_weights="linear")

    def test_baselines_have_the_parameters_of_their_memory(self):
        assert self.shapes(blend="kv-only") == PROJECTIONS
        assert self.shapes(blend="fw-only") == PROJECTIONS | NORM | BETA

    def test_options_add_parameters(self):
        added = self.shapes(conv_size=3, output_gate=True).items() - self.shapes().items()
        assert dict(added) == {"conv.weight": (3 * HIDDEN, 3), "g_proj.weight": (HIDDEN, HIDDEN)}

    def test_low_rank_output_gate(self):
        """σ(W↑ W↓ x + b) ⊙ the normed heads, as in Kimi delta attention."""
        gated = build_layer("", output_gate="sigmoid", gate_rank=3)
        gate = gated.g_proj
        assert (gate.down.weight.shape, gate.up.weight.shape, gate.up.bias.shape) == (
            (3, HIDDEN),
            (HIDDEN, 3),
            (HIDDEN,),
        )
        full = build_layer("", output_gate="sigmoid")
        full.load_state_dict({**gated.state_dict(), "g_proj.weight": gate.up.weight @ gate.down.weight}, strict=False)
        x, shift = tokens(2, 5), gate.up.bias
        full.g_proj.register_forward_hook(lambda module, given, out: out + shift)
        close(gated(x)[0], full(x)[0])
        with pytest.raises(ValueError, match="gate_rank: expected together with output_gate, got 3 without"):
            build_layer("", gate_rank=3)

    def test_output_gates(self):
        """With a zero projection σ(0) halves the output, and SiLU(0) zeroes it."""
        x = tokens(1, 5)
        plain = build_layer("", output_gate=False)
        for name, share in {"sigmoid": 0.5, "silu": 0.0, True: 0.0}.items():
            gated = build_layer("", output_gate=name)
            gated.load_state_dict({**plain.state_dict(), "g_proj.weight": torch.zeros(HIDDEN, HIDDEN)})
            close(gated(x)[0], share * plain(x)[0])

    @pytest.mark.parametrize(("kind", "groups"), [("head", 4), ("group", 2), ("full", 1)])
    @pytest.mark.parametrize("after", [False, True])
    def test_head_norms(self, kind, groups, after):
        """weight · y / √(mean y² + ε) over the heads of a group, before or after the gate."""
        options = {"num_value_heads": 4, "value_dim": 3, "output_gate": True, "norm_after_gate": after}
        layer = build_layer("fw-only-delta", head_norm=kind, **options)
        x = tokens(2, 5)
        y, _ = layer(x)
        reads = []
        layer.mixer.register_forward_hook(lambda _, __, read: reads.append(read))
        layer(x)
        gate, heads = F.silu(layer.g_proj(x)), reads[0].flatten(2)
        parts = (heads * gate if after else heads).unflatten(2, (groups, -1))
        normed = (parts / (parts.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()).flatten(2)
        weight = (layer.g_norm if after else layer.o_norm).weight
        normed = normed * (weight.repeat(4) if kind == "head" else weight)
        close(y, layer.o_proj(normed if after else normed * gate))

    def test_norm_after_gate_needs_a_gate_and_a_norm(self):
        for options in ({}, {"output_gate": True, "head_norm": False}):
            with pytest.raises(ValueError, match="norm_after_gate: expected together with output_gate and head_norm"):
                HybridMemory(8, 2, 4, norm_after_gate=True, **options)
        with pytest.raises(ValueError, match="head_norm: expected one of 'head', 'group', 'full', got 'heads'"):
            HybridMemory(8, 2, 4, head_norm="heads")

    def test_rows_of_the_scalar_mixer_are_fw_heads_then_kv_heads(self):
        """Closing the gates of rows 0 and 1 (FW) leaves the KV-memory's read, which is v for the first token."""
        layer = build_layer("synchronous-scalar-delta-plain")
        x = tokens(1, 1).abs()
        with torch.no_grad():
            layer.mixer.gate_proj.weight[:HEADS] = -1e3
            layer.mixer.gate_proj.weight[HEADS:] = 1e3
            y, _ = layer(x)
            v = layer.v_activation(layer.v_proj(x)).unflatten(-1, (HEADS, -1))
        close(y, layer.o_proj(layer.o_norm(v).flatten(2)))


@pytest.mark.parametrize(("blend", "mixer", "rule"), list(product(HYBRIDS, MIXERS, RULES)))
@pytest.mark.parametrize("rope_theta", [None, 10_000.0])
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_layer_equals_the_papers_equations(blend, mixer, rule, rope_theta, beta_max):
    """With a window that does not divide the length, and a reset in one of two rows."""
    own = {"beta_max": beta_max} if rule == "delta" else {}
    layer = build_layer(f"{blend}-{mixer}-{rule}-plain", window=3, rope_theta=rope_theta, **own)
    x = tokens(2, 11)
    resets = torch.zeros(2, 11, dtype=torch.bool)
    resets[1, 5] = True
    weights = {name: weight.numpy() for name, weight in layer.state_dict().items()}
    options = {"num_heads": HEADS, "window": 3, "blend": blend, "mixer": mixer, "fast_weights": rule}
    options |= {"beta_max": beta_max, "rope_theta": rope_theta, "norm_eps": 1e-6}
    y, _ = layer(x, resets=resets)
    for row in range(2):
        close(y[row], torch.from_numpy(oracle.layer(weights, x[row].numpy(), resets[row].numpy(), **options)))


@every_choice
@pytest.mark.parametrize("t", [0, 1, 5, 13])
@pytest.mark.parametrize("b", [0, 1, 3])
def test_shapes(choice, t, b):
    layer = build_layer(choice)
    x = tokens(b, t)
    y, state = layer(x)
    assert y.shape == x.shape
    y, after = layer(x, state=state)
    assert y.shape == x.shape
    if layer.blend.slots is not None:
        shapes = [[z.shape for z in each.leaves()] for each in (after, state, layer.init_state(b))]
        assert shapes[0] == shapes[1] == shapes[2]


@every_state
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (0, 1), (0, 0), (2, 0)])
def test_empty_inputs_have_zero_gradients(choice, b, t, marked):
    layer, x = build_layer(choice), tokens(b, t).requires_grad_()
    resets = torch.ones(b, t, dtype=torch.bool) if marked else None
    _, state = layer(x, resets=resets)
    with torch.no_grad():
        assert layer(x, state, resets)[0].shape == x.shape
    y, after = layer(x, state, resets)
    sum(part.sum() for part in (y, *after.leaves()) if part.is_floating_point()).backward()
    assert y.shape == x.grad.shape == x.shape
    assert not any(weight.grad.any() for weight in layer.parameters())


@every_choice
def test_every_weight_has_a_gradient_in_every_call(choice):
    """It may be zero but not missing: DistributedDataParallel waits for all gradients."""
    layer = build_layer(choice)
    for seen, t in [(0, 1), (0, 3), (0, 9), (1, 1), (1, 2), (3, 1), (4, 1), (5, 9)]:  # a chunk has four tokens
        for marked in (False, True):
            state = layer(tokens(2, seen))[1].detach() if seen else None
            layer.zero_grad()
            layer(tokens(2, t), state, torch.ones(2, t, dtype=torch.bool) if marked else None)[0].sum().backward()
            missing = [name for name, weight in layer.named_parameters() if weight.grad is None]
            assert not missing, (seen, t, marked)


@every_state
@pytest.mark.parametrize("spoilt_by", [torch.nan, torch.inf])
def test_nonfinite_values_do_not_cross_a_reset(choice, spoilt_by):
    """In outputs, states and gradients; in one call, in two, and token by token."""
    layer, resets = build_layer(choice, CHOICES[choice].get("window", 3)), torch.zeros(2, 11, dtype=torch.bool)
    resets[:, 5] = True
    x = tokens(2, 11)
    later = x[:, 5:].clone().requires_grad_()
    expected, state = layer(later)
    (gradient,) = torch.autograd.grad(expected.square().sum(), later)
    spoilt = x.clone()
    spoilt[0, 1:5:2] = spoilt_by
    for cut in (0, 2, 4, 5):
        rest = spoilt[:, cut:].clone().requires_grad_()
        before = layer(spoilt[:, :cut])[1].detach() if cut else None
        y, after = layer(rest, before, resets[:, cut:])
        close(y[:, 5 - cut :], expected)
        close(torch.autograd.grad(y[:, 5 - cut :].square().sum(), rest)[0][:, 5 - cut :], gradient)
        if layer.blend.slots is not None:
            for mine, theirs in zip(after.leaves(), state.leaves(), strict=True):
                close(mine, theirs)
    stepped = None
    with torch.no_grad():
        for i in range(11):
            y, stepped = layer(spoilt[:, i : i + 1], stepped, resets[:, i : i + 1])
            if i >= 5:
                close(y, expected[:, i - 5 : i - 4])


@every_choice
def test_zero_tokens_do_not_change_the_state(choice):
    layer = build_layer(choice)
    _, state = layer(tokens(2, 5))
    _, after = layer(tokens(2, 0), state=state)
    assert all(map(torch.equal, after.leaves(), state.leaves()))
    _, empty = layer(tokens(2, 0))
    assert all(map(torch.equal, empty.leaves(), layer.init_state(2).leaves()))


@every_choice
def test_initial_state_equals_no_state(choice):
    layer = build_layer(choice)
    x = tokens(2, 9)
    y, state = layer(x)
    y_given, state_given = layer(x, state=layer.init_state(2))
    close(y_given, y)
    if layer.blend.slots is not None:
        for mine, theirs in zip(state_given.leaves(), state.leaves(), strict=True):
            close(mine, theirs)


@every_state
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(choice, dtype):
    """Calls and steps in the module's dtype agree with the same rounded weights in float64."""
    layer = build_layer(choice, dtype=dtype)
    exact = build_layer(choice)
    exact.load_state_dict(layer.state_dict())
    x = tokens(2, 20, dtype=dtype)
    y, _ = layer(x)
    assert y.dtype == dtype
    expected, _ = exact(x.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    state, steps = None, []
    for token in x.split(1, dim=1):
        step, state = layer(token, state=state)
        steps.append(step)
    error = (torch.cat(steps, dim=1).double() - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


@every_state
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dtypes(choice, dtype):
    """KV entries have the module's dtype and fast weights at least float32, in empty states too."""
    layer = build_layer(choice, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = dict.fromkeys(("kv.keys", "kv.values", "convolution"), dtype)
    expected |= dict.fromkeys(("kv.gates.beta", "fw.matrix", "fw.key_sum"), wide) | {"position": torch.int64}
    expected |= {"kv.kept.keys": dtype, "kv.kept.values": dtype}
    expected |= {"kv.kept.positions": torch.int64, "kv.kept.scores": wide}
    _, state = layer(tokens(2, 6, dtype=dtype))
    for each in (layer.init_state(2), state, layer(tokens(2, 1, dtype=dtype), state=state)[1]):
        for name, part in each.named_leaves().items():
            assert part.dtype == expected[name], name


@every_state
def test_autocast_keeps_the_fast_weights_wide(choice):
    layer = build_layer(choice, dtype=torch.float32)
    x = tokens(2, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        layer(x, state=state)
    assert {part.dtype for name, part in state.named_leaves().items() if name.startswith("fw.")} <= {torch.float32}
    assert y.isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "num_heads: expected a positive number that divides hidden_size = 8, got 3"),
            ({"num_heads": 0}, "num_heads: .* got 0"),
            ({"window": 0}, "window: expected at least 1 .* got 0"),
            ({"window": None, "blend": "delayed-chunk"}, "window: expected a number .* delayed-chunk .* got None"),
            ({"blend": "sinchronous"}, "blend: expected one of .*'sinchronous'; did you mean 'synchronous'"),
            ({"blend": "delayed_chunk"}, "did you mean 'delayed-chunk'"),
            ({"mixer": "vectors"}, "mixer: .* got 'vectors'; did you mean 'vector'"),
            ({"fast_weights": "deltas"}, "fast_weights: .* did you mean 'delta'"),
            ({"beta_max": 2.5}, r"beta_max: expected a number in \(0, 2\].* got 2.5"),
            (
                {"num_heads": 8},
                "an even number of at least 2, because rotary positions .* = 1; .*rope_theta=None",
            ),
            ({"conv_size": -1}, "conv_size: .* got -1"),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            HybridMemory(**{"hidden_size": 8, "num_heads": 2, "window": 4, **options})

    @pytest.mark.parametrize(
        ("x", "resets", "message"),
        [
            (torch.zeros(2, 5, 9), None, r"x: expected \[b, t, 8\] for this layer, got shape \[2, 5, 9\]"),
            (torch.zeros(5, 8), None, r"x: expected 3 axes \[b, t, d\], got shape \[5, 8\]"),
            (torch.zeros(2, 5, 8), torch.zeros(5, 2).bool(), r"resets: .* \[2, 5\] .* got bool \[5, 2\]"),
            (torch.zeros(2, 5, 8), torch.zeros(2, 5), r"resets: expected a bool tensor.* got float32 \[2, 5\]"),
        ],
    )
    def test_wrong_inputs_are_named(self, x, resets, message):
        with pytest.raises(ValueError, match=message):
            HybridMemory(8, 2, 4)(x, resets=resets)

    @pytest.mark.parametrize(
        ("changes", "batch", "part"),
        [
            ({}, 3, "kv.keys"),
            ({"window": 5}, 2, "kv.keys"),
            ({"num_heads": 4}, 2, "kv.keys"),
            ({"hidden_size": 16}, 2, "kv.keys"),
            ({"conv_size": 4}, 2, "convolution"),
        ],
    )
    def test_state_of_another_layer_or_batch_is_rejected(self, changes, batch, part):
        other = HybridMemory(**{"hidden_size": 8, "num_heads": 2, "window": 4, **changes})
        message = rf"state.{part}: expected shape .* a batch of 2, got .* another layer or batch\?"
        with pytest.raises(ValueError, match=message):
            HybridMemory(8, 2, 4)(torch.zeros(2, 1, 8), state=other.init_state(batch))

    @pytest.mark.parametrize(
        "changes", [{"fast_weights": "linear"}, {"blend": "delayed-chunk", "window": 3}, {"blend": "kv-only"}]
    )
    def test_state_of_other_parts_is_rejected(self, changes):
        other = HybridMemory(**{"hidden_size": 8, "num_heads": 2, "window": 4, **changes})
        message = r"state: expected kv\.keys, kv\.values, fw\.matrix, .*; is it the state of another layer\?"
        with pytest.raises(ValueError, match=message):
            HybridMemory(8, 2, 4)(torch.zeros(2, 1, 8), state=other.init_state(2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"blend": "fw-only", "mixer": "vector"}, "mixer: expected none for blend 'fw-only', which has one memory"),
            ({"blend": "kv-only", "fast_weights": "delta"}, "fast_weights: expected none for blend 'kv-only'"),
            ({"blend": "fw-only", "rope_theta": None}, "rope_theta: expected an option of the chosen parts"),
            ({"fast_weights": "linear", "beta_max": 1.0}, "beta_max: .*fast_weights='linear' uses feature_map"),
            ({"write_gates": "own"}, "write_gates: .*blend='synchronous' uses none"),
            ({"betamax": 1.0}, "betamax: .*; did you mean 'beta_max'"),
            ({"value_dim": 3}, "value_dim: expected none beside a KV-memory"),
            ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: expected a number that divides num_heads = 4, got 3"),
            ({"blend": "fw-only", "num_value_heads": 3}, "num_value_heads: expected a multiple of num_heads = 2"),
            ({"zero_centered_norms": True}, "zero_centered_norms: expected together with qk_norm"),
            ({"fw_activation": None}, "kv_activation: expected None as fw_activation"),
            (
                {"output_gate": "silly"},
                "output_gate: expected one of 'silu', 'sigmoid', got 'silly'; did you mean 'silu'",
            ),
        ],
    )
    def test_unused_option_is_rejected(self, options, message):
        with pytest.raises(ValueError, match=message):
            HybridMemory(**{"hidden_size": 8, "num_heads": 2, "window": 4, **options})

    def test_nan_is_rejected_only_when_checked(self):
        layer, x = HybridMemory(8, 2, 4), torch.zeros(1, 5, 8)
        x[0, 3, 2] = torch.nan
        layer(x)
        with hqlt.checked(), pytest.raises(ValueError, match=r"x: expected finite numbers, got nan at .*\(0, 3, 2\)"):
            layer(x)
        layer(x)


def test_explain():
    assert HybridMemory(8, 2, 4).explain().name in ("native", "parts")
    for missing, options in {
        "blend": {"write_gates": "own", "blend": "delayed-streaming"},
        "kv": {"partial_rotary_factor": 0.5},
        "fw": {"fast_weights": "kda"},
    }.items():
        why = HybridMemory(8, 2, 4, **options).explain().why
        assert why == f"part by part, each with its fastest operation: no native form of {missing}"


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
class TestGraphs:
    """A single token compiles and exports as one graph; sequences export for any batch size and length."""

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
    def test_a_step_compiles_without_a_break(self, choice):
        torch._dynamo.reset()  # the recompilation limit is shared by all layers
        layer = build_layer(choice).requires_grad_(False)
        step = torch.compile(layer, fullgraph=True, backend="eager")
        # A second number of rows becomes dynamic, in the same way for every blend.
        for b in (2, 3) if choice == "kv-only" else (2,):
            state = layer.init_state(b)
            for token in tokens(b, 10).split(1, dim=1):
                expected, after = layer(token, state)
                y, state = step(token, state)
                close(y, expected)
                for mine, theirs in zip(state.leaves(), after.leaves(), strict=True):
                    close(mine, theirs)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
    def test_lengths_compile_once(self, choice):
        torch._dynamo.reset()
        layer = build_layer(choice).requires_grad_(False)
        graphs = []
        read = torch.compile(
            layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True
        )
        state = layer(tokens(2, 9))[1]
        for t in (17, 9, 30, 11):
            close(read(tokens(2, t), state)[0], layer(tokens(2, t), state)[0])
        assert len(graphs) == 1

    def test_a_step_exports(self, choice):
        layer = build_layer(choice)
        program = torch.export.export(layer, (tokens(2, 1), layer.init_state(2))).module()
        state = layer.init_state(2)
        for token in tokens(2, 10).split(1, dim=1):
            expected, _ = layer(token, state)
            y, state = program(token, state)
            close(y, expected)


def exported(layer, x, state, resets):
    """Export a layer with dynamic numbers of rows, tokens and (if the state grows) KV entries."""
    b, t, s = (torch.export.Dim(name, min=least) for name, least in [("b", 0), ("t", 2), ("s", 1)])
    axes = None
    if state is not None:
        axes = tree_map(
            lambda entry: {0: b} | {i: s for i, size in enumerate(entry.sizes, 1) if size is None}, layer.entries
        )
    shapes = {0: b, 1: t}, axes, None if resets is None else {0: b, 1: t}
    return torch.export.export(layer, (x, state, resets), dynamic_shapes=shapes).module()


def marked(b, t):
    return torch.rand(b, t) < 0.3


@pytest.mark.parametrize(
    ("choice", "whole"),
    [
        *((choice, True) for choice in EVERY_STATE if "retention" not in CHOICES[choice]),
        *((choice, False) for choice in ONE_OF_EACH_BLEND),
    ],
)
def test_exported_layer_at_other_sizes(choice, whole):
    """With state and resets, or with neither."""
    layer = build_layer(choice).requires_grad_(False)

    def inputs(b, t):
        return tokens(b, t, seed=t), *((layer(tokens(b, 9))[1], marked(b, t)) if whole else (None, None))

    program = exported(layer, *inputs(3, 6))
    for b, t in [(1, 5), (2, 9), (5, 2), (4, 30)]:
        x, state, resets = inputs(b, t)
        y, after = program(x, state, resets)
        expected, expected_after = layer(x, state, resets)
        close(y, expected)
        for mine, theirs in zip(after.leaves(), expected_after.leaves(), strict=True):
            close(mine, theirs)
