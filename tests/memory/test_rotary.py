"""Rotary embeddings agree with transformers' scaling functions and with its Llama."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hqlt import ops
from hqlt.memory import rotary
from hqlt.memory.rotary import Rotary, apply_rotary
from tests.laws import close, normal

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, all of it": {**YARN, "beta_fast": 20, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, short context": {**YARN, "original_max_position_embeddings": 6},
}


def of(scaling, fraction: float = 1.0) -> Rotary:
    made = Rotary.of(10_000, fraction, scaling)
    assert made is not None and hash(made) == hash(Rotary.of(10_000.0, fraction, dict(scaling) if scaling else None))
    return made


def llama(scaling, fraction: float, k: int) -> LlamaConfig:
    parameters = {**(scaling or {}), "rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    return LlamaConfig(
        hidden_size=4 * k, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name, fraction):
    """transformers computes them in float32."""
    k, scaling = 64, SCALINGS[name]
    f, factor = of(scaling, fraction).frequencies(k)
    assert f.dtype == torch.float64 and f.shape == (int(k * fraction) // 2,)
    kind = (scaling or {}).get("rope_type", "default")
    if kind == "default":
        width = int(k * fraction)
        close(f, 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        assert factor == 1.0
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](llama(scaling, fraction, k))
        torch.testing.assert_close(f, theirs.double(), rtol=2e-6, atol=0)
        assert factor == pytest.approx(their_factor)


@pytest.mark.parametrize("name", SCALINGS)
def test_queries_are_rotated_as_in_llama(name):
    """In float32, at the positions of a text of 300 tokens."""
    made, x = of(SCALINGS[name]), normal(2, 300, 3, 16, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(llama(SCALINGS[name], 1.0, 16))(x, torch.arange(300)[None])
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rotary(x, *made.table(300, 16, CPU, x.dtype)), theirs, rtol=0, atol=2e-4)


def test_a_fraction_of_a_head():
    x, made = normal(1, 5, 2, 12), of(None, 0.34)
    cos, sin = made.table(5, 12, CPU, x.dtype)
    y = apply_rotary(x, cos, sin)
    assert made.width(12) == 4 and cos.shape == sin.shape == (5, 1, 2)
    assert torch.equal(y[..., 4:], x[..., 4:])
    close(y[..., :4], ops.rotated(x[..., :4], cos, sin))


def test_yarn_multiplies_cos_and_sin():
    cos, _ = of(YARN).table(1, 8, CPU, torch.float64)
    close(cos, torch.full_like(cos, 0.1 * torch.tensor(4.0, dtype=torch.float64).log().item() + 1))


def test_tables_are_at_least_float32():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert {table.dtype for table in of(None).table(3, 4, CPU, dtype)} == {expected}


def test_no_positions():
    assert Rotary.of(None) is None
    assert of({"rope_type": "default"}) == of({"type": "default"}) == of(None) == Rotary(10_000.0)
    assert of({"type": "linear", "factor": 2}) == of({"rope_type": "linear", "factor": 2.0})
    assert of({**YARN, "mscale": None, "beta_fast": None}) == of(YARN)  # as saved configs have them


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 0.5), "rope_theta: expected a number, .* partial_rotary_factor=0.5"),
        ((None, 1.0, YARN), "rope_theta: expected a number, .* rope_scaling="),
        ((1.0,), "rope_theta: expected a number above 1, or None for no positions, got 1.0"),
        ((float("inf"),), "rope_theta: expected a number above 1, or None for no positions, got inf"),
        ((1e4, 0.0), r"partial_rotary_factor: expected a number in \(0, 1\], got 0.0"),
        ((1e4, 1.5), r"partial_rotary_factor: expected a number in \(0, 1\], got 1.5"),
        ((1e4, 1.0, {"rope_type": "dynamic", "factor": 2.0}), "got 'dynamic': its frequencies change with the length"),
        ((1e4, 1.0, {"rope_type": "longrope"}), "got 'longrope': its frequencies change with the length"),
        ((1e4, 1.0, {"rope_type": "lama3"}), "rope_type: expected one of .* did you mean 'llama3'"),
        ((1e4, 1.0, {"rope_type": "linear"}), "expected for rope_type 'linear' the fields factor, got"),
        ((1e4, 1.0, {"factor": 2.0}), "rope_scaling: expected for rope_type 'default' the fields none, got"),
        ((1e4, 1.0, {**YARN, "beta": 2.0}), "'yarn' the fields factor, original_.* and optionally attention_factor, "),
        ((1e4, 1.0, {**YARN, "factor": "4"}), "rope_scaling: expected a number above 0 for factor, got '4'"),
        ((1e4, 1.0, {**LLAMA3, "factor": -8}), "rope_scaling: expected a number above 0 for factor, got -8"),
        ((1e4, 1.0, {**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor below high_freq_factor, got 4.0 and 4.0"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        Rotary.of(*given)


@pytest.mark.parametrize(("k", "fraction"), [(7, 1.0), (6, 0.5), (8, 0.1)])
def test_an_odd_width_is_rejected(k, fraction):
    with pytest.raises(ValueError, match=r"head_dim · partial_rotary_factor: expected an even number of at least 2"):
        of(None, fraction).width(k)


def test_rotation_by_hand():
    """Width 4, θ = 100: (x_0, x_2) rotates by 1 per step and (x_1, x_3) by 1/10; checked at step 2 for (1, 1, 0, 0)."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 4)
    angles = torch.tensor([2.0, 0.2], dtype=torch.float64)
    y = apply_rotary(x, *Rotary(100.0).table(3, 4, CPU, torch.float64))
    close(y[0, 2, 0], torch.cat([angles.cos(), angles.sin()]))


def test_a_table_made_in_inference_mode_works_in_training():
    rotary._cached_table.cache_clear()
    with torch.inference_mode():
        Rotary(100.0).table(5, 4, CPU, torch.float64)
    q = normal(1, 5, 2, 4).requires_grad_()
    apply_rotary(q, *Rotary(100.0).table(5, 4, CPU, torch.float64)).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its copies of programs
def test_a_table_does_not_change_the_grad_mode_of_an_exported_program():
    """torch.export would record it only partly, so that the program could not be decomposed for ONNX."""
    any_length = {"x": {1: torch.export.Dim.DYNAMIC}}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(Rotated(), (normal(1, 5, 2, 8),), dynamic_shapes=any_length)
            x = normal(1, 7, 2, 8)
            close(program.run_decompositions({}).module()(x), Rotated()(x))
        assert not [node for node in program.graph.nodes if node.op == "get_attr"]


class Rotated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return apply_rotary(x, *of(YARN, 0.5).table(x.shape[1], x.shape[3], x.device, x.dtype))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, of its forward-mode AD
def test_a_table_made_under_a_mode_is_not_cached():
    """The cache is global: tensors made under a mode would reach later calls."""

    def rotated(q: Tensor) -> Tensor:
        return apply_rotary(q, *Rotary(100.0).table(5, 4, q.device, q.dtype))

    q = normal(1, 5, 2, 4)
    expected = rotated(q)
    rotary._cached_table.cache_clear()
    with FakeTensorMode() as mode:
        rotated(mode.from_tensor(q))
    torch.func.jvp(rotated, (q,), (q,))
    with torch.device("meta"):
        assert torch.equal(rotated(q), expected)
    assert torch.equal(rotated(q), expected)
