from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hqlt.ops import delta_rule
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, Memory, close, normal
from tests.ops.inputs import HEADS, KEY, TOLERANCE, VALUE, queries, strengths, strided, values

HERE = [name for name in IMPLEMENTATIONS["delta_rule"] if name != "fla"]  # fla needs a GPU; see test_fla.py
every_backend = pytest.mark.parametrize("backend", HERE)


def memory(backend):
    def run(inputs, state, resets, backend=backend):
        out, W = delta_rule(*inputs, state=state and state[0], resets=resets, backend=backend)
        return out, (W,)

    def inputs(b, t):
        return queries(b, t), queries(b, t, seed=1), values(b, t), strengths(b, t)

    return Memory(run, lambda *x: run(*x, backend="reference"), inputs)


class TestLaws(Laws):
    longest = 70

    @pytest.fixture(params=HERE)
    def build(self, request):
        return lambda window: memory(request.param)


def one_head(k, v, beta, backend, **options):
    """One row and one head, with keys and values given as numbers or vectors; each token reads with its own key."""
    k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, len(x), 1, -1) for x in (k, v))
    beta = torch.tensor(beta, dtype=torch.float64).reshape(1, -1, 1)
    out, W = delta_rule(k, k, v, beta, scale=1.0, backend=backend, **options)
    return out[0, :, 0].squeeze(-1).tolist(), W


@every_backend
class TestByHand:
    def test_beta_one_replaces(self, backend):
        """W = 0 + 1·(3 − 0) = 3, then 3 + 1·(5 − 3) = 5."""
        assert one_head([1, 1], [3, 5], [1, 1], backend)[0] == [3, 5]

    def test_beta_one_half_goes_halfway(self, backend):
        """W = 0 + ½·(4 − 0) = 2, then 2 + ½·(4 − 2) = 3."""
        assert one_head([1, 1], [4, 4], [0.5, 0.5], backend)[0] == [2, 3]

    def test_beta_two_reflects(self, backend):
        """W = 3, then 3 + 2·(0 − 3) = −3: an eigenvalue of −1."""
        assert one_head([1, 1], [3, 0], [1, 2], backend)[0] == [3, -3]

    def test_beta_zero_writes_nothing(self, backend):
        assert one_head([1, 1], [3, 5], [1, 0], backend)[0] == [3, 3]

    def test_orthogonal_keys_do_not_disturb_each_other(self, backend):
        """k = (1, 0), (0, 1), (1, 0) with v = 3, 5, 7: the first two are independent, the third replaces the first."""
        out, W = one_head([[1, 0], [0, 1], [1, 0]], [3, 5, 7], [1, 1, 1], backend)
        assert out == [3, 5, 7]
        assert W.flatten().tolist() == [7, 5]

    def test_repeated_key_with_beta_two_does_parity(self, backend):
        """W starts at 1. A bit 1 is β = 2, v = 0: W ← −W. A bit 0 is β = 0. The sign of W is the parity of the bits."""
        bits = torch.randint(0, 2, (100,))
        start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        out, _ = one_head([1.0] * 100, [0.0] * 100, (2 * bits).tolist(), backend, state=start)
        assert out == (1 - 2 * (bits.cumsum(0) % 2)).tolist()

    def test_empty_memory_reads_zero(self, backend):
        assert one_head([1, 1], [3, 5], [0, 0], backend)[0] == [0, 0]

    def test_default_scale_is_root_of_key_width(self, backend):
        """A value 6 under a unit key of width 4 is read as 6 / √4."""
        k = torch.eye(4)[:1].view(1, 1, 1, 4)
        out, _ = delta_rule(k, k, torch.full((1, 1, 1, 1), 6.0), torch.ones(1, 1, 1), backend=backend)
        assert out.item() == 3


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, dtype):
    """The result is that of the float64 reference on the same (rounded) numbers; the matrix is in at least float32."""
    inputs = [x.to(dtype) for x in memory("reference").inputs(2, 90)]
    out, W = delta_rule(*inputs, backend=backend)
    expected_out, expected_W = delta_rule(*(x.double() for x in inputs), backend="reference")
    assert out.dtype == dtype
    assert W.dtype == torch.promote_types(dtype, torch.float32)
    close(out.double(), expected_out, TOLERANCE[dtype])
    close(W.double(), expected_W, min(TOLERANCE[dtype], 2e-5))  # no intermediate result is rounded to bfloat16


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_their_inputs_dtype(backend, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in memory("reference").inputs(2, 20)]
    out, W = delta_rule(*inputs, backend=backend)
    got = torch.autograd.grad(out.float().sum() + W.sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, W = delta_rule(*exact, backend="reference")
    for x, mine, theirs in zip(inputs, got, torch.autograd.grad(out.sum() + W.sum(), exact), strict=True):
        assert mine.dtype == x.dtype
        close(mine.double(), theirs, 10 * TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("t", [0, 1, 15, 16, 17, 64, 65, 131])
@pytest.mark.parametrize(("b", "k", "v"), [(1, 4, 3), (5, 3, 7), (2, 1, 1), (1, 64, 8), (1, 128, 16)])
def test_sizes(backend, t, b, k, v):
    inputs = queries(b, t, width=k), queries(b, t, 1, width=k), values(b, t, width=v), strengths(b, t)
    state = normal(b, HEADS, k, v)
    got = delta_rule(*inputs, state=state, backend=backend)
    for mine, theirs in zip(got, delta_rule(*inputs, state=state, backend="reference"), strict=True):
        close(mine, theirs)


@every_backend
@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_correlated_keys_stay_finite_and_accurate(backend, beta, noise):
    """Nearly equal keys and strong writes, for which triangular inverses of rounded products can blow up."""
    k = F.normalize(torch.ones(1, 256, HEADS, 16) + noise * normal(1, 256, HEADS, 16), dim=-1)
    v = values(1, 256)
    inputs = k, k, v, torch.full((1, 256, HEADS), beta)
    expected, expected_W = delta_rule(*(x.double() for x in inputs), backend="reference")
    out, W = delta_rule(*(x.float() for x in inputs), backend=backend)
    scale = expected_W.abs().max().item()
    close(out / scale, expected / scale, 1e-3)
    close(W / scale, expected_W / scale, 1e-3)


@every_backend
def test_memory_layout_does_not_matter(backend):
    inputs = memory(backend).inputs(2, 37)
    resets = torch.zeros(2, 37, dtype=torch.bool)
    resets[1, 20] = True
    expected = delta_rule(*inputs, resets=resets, backend=backend)
    got = delta_rule(*map(strided, inputs), resets=strided(resets), backend=backend)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)


@every_backend
@pytest.mark.parametrize("t", [1, 17, 70])
def test_every_output_is_written(backend, t, poisoned_memory):
    inputs = [x.requires_grad_() for x in memory(backend).inputs(2, t)]
    out, W = delta_rule(*inputs, backend=backend)
    for x in (out, W, *torch.autograd.grad(out.sum() + W.sum(), inputs)):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, HEADS)}, r"q: expected 4 axes \[b, t, g·h, k\], got shape \[2, 5, 2\]"),
        ({"k": torch.zeros(2, 6, HEADS, KEY)}, r"k: .* with t = 5 .* got shape \[2, 6, 2, 4\]"),
        ({"beta": torch.zeros(2, 5, 1)}, r"beta: .* with h = 2"),
        ({"state": torch.zeros(2, HEADS, VALUE, KEY)}, r"state: .* with k = 4"),
        ({"resets": torch.zeros(2, 4, dtype=torch.bool)}, r"resets: .* \[2, 5\].*got bool \[2, 4\]"),
        ({"resets": torch.zeros(2, 5)}, "resets: expected a bool tensor.*got float32"),
        (
            {"backend": "chunky"},
            "delta_rule: backend: expected one of 'reference', 'chunked'.*got 'chunky'; did you mean 'chunked'",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = dict(zip(("q", "k", "v", "beta"), memory("reference").inputs(2, 5), strict=True))
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**right, **change})
