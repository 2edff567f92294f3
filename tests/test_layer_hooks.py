"""Hooks, replaced forwards, wrappers, tracers, transforms and modes work with every part of a layer."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, prune

from hqlt import HybridMemory, ops
from hqlt.layer import RMSNorm
from hqlt.memory.state import leaves
from tests.laws import close
from tests.layers import HEADS, HIDDEN, ONE_OF_EACH_BLEND, build_layer, tokens

PARTS = ("v_activation", "blend", "kv", "fw", "mixer", "o_norm")
LENGTHS = [1, 5]
CHOICE = "synchronous-vector-delta-plain"


def case(choice, t):
    """Return a layer without gradients, t tokens, and a state that precedes them."""
    layer = build_layer(choice).requires_grad_(False)
    return layer, tokens(2, t), layer(tokens(2, 6, seed=1))[1]


def with_theta(choice, theta):
    """Return options for a rotary table that is not cached yet, if the layer has one."""
    return {} if choice.startswith("fw-only") else {"rope_theta": theta}


def same(got, expected):
    close(got[0], expected[0])
    for mine, theirs in zip(leaves(got[1]), leaves(expected[1]), strict=True):
        close(mine, theirs)


FORWARD_HOOKS = {
    "forward": lambda part, calls: part.register_forward_hook(lambda *call: calls.append(1)),
    "forward, with keywords": lambda part, calls: part.register_forward_hook(
        lambda *call: calls.append(1), with_kwargs=True
    ),
    "pre-forward": lambda part, calls: part.register_forward_pre_hook(lambda *call: calls.append(1)),
    "pre-forward, with keywords": lambda part, calls: part.register_forward_pre_hook(
        lambda *call: calls.append(1), with_kwargs=True
    ),
}


@pytest.mark.parametrize("hook", FORWARD_HOOKS)
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_a_hook_on_any_part_is_called_once_per_call(choice, t, hook):
    layer, x, state = case(choice, t)
    expected = layer(x, state)
    for name in PARTS:
        part, calls = dict(layer.named_modules()).get(name), []
        if part is not None:
            handle = FORWARD_HOOKS[hook](part, calls)
            same(layer(x, state), expected)
            handle.remove()
            same(layer(x, state), expected)
            assert calls == [1], name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of parts whose inputs are not tensors
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_global_hooks_are_called_for_every_part(choice, t):
    layer, x, state = case(choice, t)
    expected, called = layer(x, state), list[str]()
    names = {part: name for name, part in layer.named_modules()}
    for register in (
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda module, *call: called.append(names[module]))
        try:
            same(layer(x, state), expected)
            layer(x.clone().requires_grad_(), state)[0].sum().backward()
        finally:
            handle.remove()
        missed = {name for name in names.values() if "backward" not in register.__name__} - {*called}
        assert not missed, register.__name__
        assert {"v_activation", "mixer", "o_norm"} <= {*called}, register.__name__
        called.clear()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("t", LENGTHS)
def test_backward_hooks_see_the_gradients_of_their_part(t, register):
    layer, x, state = case(CHOICE, t)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x, state)[0].square().sum(), x)
    for name in ("v_activation", "kv", "mixer", "o_norm"):
        calls = []
        handle = getattr(layer.get_submodule(name), register)(
            lambda part, *grads, calls=calls: calls.append(grads[-1][0])
        )
        (got,) = torch.autograd.grad(layer(x, state)[0].square().sum(), x)
        handle.remove()
        close(got, expected)
        assert len(calls) == 1 and calls[0].any(), name


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_a_replaced_forward_runs(choice, t):
    """As accelerate's offloading does, on the instance."""
    layer, x, state = case(choice, t)
    y, after = layer(x, state)
    usual = layer.o_norm.forward
    layer.o_norm.forward = lambda heads: 2 * usual(heads)
    same(layer(x, state), (2 * y, after))
    del layer.o_norm.forward
    for name in ("v_activation", "blend", "mixer"):
        part, called = layer.get_submodule(name), []
        usual = part.forward
        part.forward = lambda *given, usual=usual, called=called: called.append(1) or usual(*given)
        same(layer(x, state), (y, after))
        del part.forward
        assert called == [1], name


@pytest.mark.parametrize("t", LENGTHS)
def test_a_subclass_of_the_norm_runs(t):
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x, state = case(CHOICE, t)
    y, after = layer(x, state)
    norm = layer.o_norm
    layer.o_norm = Doubled(HIDDEN // HEADS, norm.eps).double().requires_grad_(False)
    layer.o_norm.load_state_dict(norm.state_dict())
    same(layer(x, state), (2 * y, after))


REPARAMETRISED = {
    "parametrised": lambda part: nn.utils.parametrize.register_parametrization(part, "weight", nn.Softplus()),
    "weight norm": parametrizations.weight_norm,
    "pruned": lambda part: prune.random_unstructured(part, "weight", 0.5),
}


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("change", REPARAMETRISED)
@pytest.mark.parametrize("name", ["q_proj", "fw.beta_proj", "mixer.gate_proj", "o_norm", "o_proj"])
def test_reparametrised_weights_are_used(name, change, t):
    layer, x, state = case(CHOICE, t)
    if name == "o_norm" and change == "weight norm":
        pytest.skip("weight norm needs two axes")
    REPARAMETRISED[change](layer.get_submodule(name))
    plain = build_layer(CHOICE)
    with torch.no_grad():
        for each in ("q_proj", "k_proj", "v_proj", "fw.beta_proj", "mixer.gate_proj", "o_norm", "o_proj"):
            plain.get_submodule(each).weight.copy_(layer.get_submodule(each).weight)
        same(layer(x, state), plain(x, state))


class Adapted(nn.Module):
    """A projection wrapped as by adapters and quantizers, without a `weight` of its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora = nn.Sequential(nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)).to(base.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_wrapped_projections(choice):
    layer = build_layer(choice)
    for name, part in list(layer.named_modules()):
        if isinstance(part, nn.Linear):
            layer.set_submodule(name, Adapted(part))
    x = tokens(2, 9)
    whole, _ = layer(x)
    state, steps = layer.init_state(2), []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            y, state = layer(token, state)
            steps.append(y)
        layer(tokens(2, 0))
    close(torch.cat(steps, dim=1), whole)
    whole.sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


@pytest.mark.filterwarnings("ignore:.*(quantization|quantize|quantized).*")  # to be replaced by torchao
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_a_quantised_layer(choice):
    layer = build_layer(choice, dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    x = tokens(2, 9, dtype=torch.float32)
    with torch.no_grad():
        expected, _ = layer(x)
        state, steps = quantised.init_state(2), []
        for token in (x[:, :0], *x.split(1, dim=1)):
            y, state = quantised(token, state)
            steps.append(y)
    got = torch.cat(steps, dim=1)
    assert (got - expected).norm() < 0.2 * expected.norm()
    assert {part.dtype for part in state.leaves()} == {torch.float32, torch.int64}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the transforms' own
class TestTransforms:
    """torch.func and forward-mode AD, with the state as one of the inputs."""

    pytestmark = pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)

    @pytest.mark.parametrize("t", LENGTHS)
    def test_forward_mode(self, choice, t):
        layer, x, state = case(choice, t)
        direction, step = tokens(2, t, seed=3), 1e-6
        expected = (layer(x + step * direction, state)[0] - layer(x - step * direction, state)[0]) / (2 * step)
        close(torch.func.jvp(lambda x: layer(x, state)[0], (x,), (direction,))[1], expected, 1e-7)
        with torch.autograd.forward_ad.dual_level():
            y, _ = layer(torch.autograd.forward_ad.make_dual(x, direction), state)
            close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected, 1e-7)

    @pytest.mark.parametrize("t", LENGTHS)
    def test_rows_by_vmap(self, choice, t):
        layer, x, state = case(choice, t)

        def row(x, state):
            y, after = layer(x[None], state.map(lambda part: part[None]))
            return y[0], after.map(lambda part: part[0])

        same(torch.func.vmap(row)(x, state), layer(x, state))

    def test_an_ensemble_by_vmap(self, choice):
        layer, x, state = case(choice, 5)
        other = copy.deepcopy(layer)
        for weight in other.parameters():
            weight.mul_(0.5)
        parameters, _ = torch.func.stack_module_state([layer, other])

        def member(parameters):
            return torch.func.functional_call(layer, parameters, (x, state))[0]

        expected = torch.stack([layer(x, state)[0], other(x, state)[0]])
        close(torch.func.vmap(member)(parameters), expected)

    def test_gradients_and_curvature(self, choice):
        layer, x, state = case(choice, 3)
        x.requires_grad_()

        def loss(x):
            return layer(x, state)[0].square().sum()

        (expected,) = torch.autograd.grad(loss(x), x)
        close(torch.func.grad(loss)(x.detach()), expected)
        curvature = torch.func.hessian(loss)(x.detach()).view(x.numel(), x.numel())
        close(curvature, curvature.mT)
        moved = x.detach().clone()
        moved[0, 0, 0] += 1e-6
        close(curvature[0], ((torch.func.grad(loss)(moved) - expected.detach()) / 1e-6).flatten(), 1e-3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of the trace
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_a_traced_layer_equals_the_layer(choice, t):
    layer, x, state = case(choice, t)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x, state, torch.zeros(2, t, dtype=torch.bool)), check_trace=False)
        state, resets = layer(tokens(2, 3, seed=4))[1], torch.zeros(2, t, dtype=torch.bool)
        resets[1, -1] = True
        y, after = traced(3 * x, state, resets)
        same((y, after), layer(3 * x, state, resets))


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
class TestModes:
    def test_fake_tensors_are_not_cached(self, choice, t):
        layer = build_layer(choice, **with_theta(choice, 1_234.0 + t)).requires_grad_(False)
        before, x = tokens(2, 6, seed=1), tokens(2, t)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(before))[1]
            y, after = layer(mode.from_tensor(x), fake)
        got = layer(x, layer(before)[1])
        close(got[0], layer(torch.cat([before, x], dim=1))[0][:, 6:])
        assert [part.shape for part in (y, *after.leaves())] == [part.shape for part in (got[0], *got[1].leaves())]

    def test_another_default_device(self, choice, t):
        """All tensors are created on the device of x."""
        layer = build_layer(choice, **with_theta(choice, 12_345.0 + t)).requires_grad_(False)
        before, x = tokens(2, 6, seed=1), tokens(2, t)
        with torch.device("meta"):
            state = layer(before)[1]
            got = layer(x, state)
        same(layer(x, state), got)

    def test_meta_tensors(self, choice, t):
        layer, x, state = case(choice, t)
        expected = layer(x, state)
        y, after = layer.to("meta")(x.to("meta"), layer.init_state(2))
        assert [(part.shape, part.dtype) for part in (y, *after.leaves())] == [
            (part.shape, part.dtype) for part in (expected[0], *expected[1].leaves())
        ]

    def test_a_mode_sees_the_operations(self, choice, t):
        class Recorder(torch.overrides.TorchFunctionMode):
            names = ""

            def __torch_function__(self, function, types, args=(), kwargs=None):
                Recorder.names += f" {function}"
                return function(*args, **(kwargs or {}))

        layer, x, state = case(choice, t)
        expected = layer(x, state)
        with Recorder():
            same(layer(x, state), expected)
        assert "scaled_dot_product_attention" in Recorder.names or "hqlt." in Recorder.names


def test_a_layer_that_ran_is_copied_and_pickled_with_its_buffers():
    layer, x, state = case(CHOICE, 1)
    expected = layer(x, state)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(other(x, state), expected)
        assert other.init_state(1).kv.keys.dtype == torch.float64


@pytest.mark.parametrize("choice", ONE_OF_EACH_BLEND)
def test_threads_share_a_layer(choice):
    """Each thread has its own state and number of rows: what a layer caches for a call is not used for another."""
    layer = build_layer(choice).requires_grad_(False)
    expected = {b: layer(tokens(b, 30, seed=b))[0] for b in (1, 2, 3)}
    wrong = []

    def read(b):
        state = layer.init_state(b)
        for i, token in enumerate(tokens(b, 30, seed=b).split(1, dim=1)):
            y, state = layer(token, state)
            if not torch.allclose(y, expected[b][:, i : i + 1], rtol=1e-10, atol=1e-10):
                wrong.append((b, i))

    threads = [threading.Thread(target=read, args=(b,)) for b in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_accelerate_offloads_a_layer(tmp_path):
    """With weights in memory or on disk, loaded for each call of a part."""
    accelerate = pytest.importorskip("accelerate")
    for offload in (accelerate.cpu_offload, lambda layer, to: accelerate.disk_offload(layer, str(tmp_path), to)):
        for t in LENGTHS:
            layer, x, state = case(CHOICE, t)
            expected = layer(x, state)
            with ExitStack() as stack:
                stack.callback(accelerate.hooks.remove_hook_from_submodules, layer)
                offload(layer, torch.device("cpu"))
                assert layer.o_norm.weight.is_meta
                same(layer(x, state), expected)
                same(layer(x, layer.init_state(2)), build_layer(CHOICE)(x))


def test_a_forced_backend_without_transforms_raises():
    layer, x, state = case(CHOICE, 5)
    with ops.use_backend("chunked"), pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
        torch.func.jvp(lambda x: layer(x, state)[0], (x,), (x,))


def test_the_dtype_of_an_empty_state_follows_the_layer():
    layer = HybridMemory(HIDDEN, HEADS, window=4).to(torch.bfloat16)
    assert layer.init_state(2).kv.keys.dtype == torch.bfloat16
    assert "like" not in layer.state_dict()
