"""All write rules of the family: decay per matrix or per row, the erased key, several writes per token."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from hqlt.ops import delta_rule, fast_weights
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, Memory, close, normal
from tests.ops.inputs import HEADS, KEY, TOLERANCE, VALUE, queries, strided

HERE = [name for name in IMPLEMENTATIONS["fast_weights"] if name != "fla"]  # fla needs a GPU
every_backend = pytest.mark.parametrize("backend", HERE)


class Kind(NamedTuple):
    """One write rule of the family."""

    decay: str  # "none", "matrix", "rows"
    erase: str  # "none", "k", "other"
    writes: int = 1
    group: int = 1

    def __str__(self) -> str:
        return f"decay-{self.decay}-erase-{self.erase}-{self.writes}-writes-{self.group}-queries"

    @property
    def names(self) -> list[str]:
        """Names of the inputs."""
        has_decay, has_key = self.decay != "none", self.erase == "other"
        return ["q", "k", "v", "beta", *["decay"] * has_decay, *["erase"] * has_key]

    def inputs(self, b, t, k=KEY, v=VALUE, seed=0):
        """Inputs [b, t, …], where k, v, beta and erase are [b, t, m, …]. Decays are from e^−20 to exactly 1."""
        rows = (k,) if self.decay == "rows" else ()
        made = {
            "q": queries(b, t, seed, k, self.group * HEADS),
            "k": F.normalize(normal(b, t, self.writes, HEADS, k, seed=seed + 1), dim=-1),
            "v": normal(b, t, self.writes, HEADS, v, seed=seed + 10),
            "beta": 2 * normal(b, t, self.writes, HEADS, seed=seed + 20).sigmoid(),
            "decay": -(5 * normal(b, t, HEADS, *rows, seed=seed + 30) - 2).clamp(0, 20),
            "erase": F.normalize(normal(b, t, self.writes, HEADS, k, seed=seed + 2), dim=-1),
        }
        return tuple(made[name] for name in self.names)

    def call(self, inputs, **options):
        arguments = dict(zip(self.names, inputs, strict=True))
        for name in {"k", "v", "beta", "erase"} & set(arguments):
            arguments[name] = arguments[name].flatten(1, 2)
        return fast_weights(**{"erase": self.erase == "k", **arguments, **options})


KINDS = [
    *(Kind(*x) for x in product(("none", "matrix", "rows"), ("none", "k", "other"), (1, 2))),
    Kind("matrix", "k", 3),
    Kind("matrix", "k", 1, 3),
    Kind("rows", "other", 2, 2),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def memory(kind, backend, marks=False):
    """The rule as a memory. marks: the sign of an additional input marks the live tokens."""

    def run(inputs, state, resets, backend=backend):
        *inputs, mark = inputs if marks else (*inputs, None)
        live = None if mark is None else mark > 0
        out, S = kind.call(inputs, state=state and state[0], resets=resets, live=live, backend=backend)
        return out, (S,)

    def inputs(b, t):
        return (*kind.inputs(b, t), *[normal(b, t, seed=40)] * marks)

    return Memory(run, lambda *x: run(*x, backend="reference"), inputs)


class TestLaws(Laws):
    longest = 40

    @pytest.fixture(params=[(kind, backend) for kind in KINDS for backend in HERE], ids=lambda x: f"{x[0]}-{x[1]}")
    def build(self, request):
        return lambda window: memory(*request.param)


class TestLawsWithMarks(Laws):
    longest = 40

    @pytest.fixture(params=[(kind, backend) for kind in KINDS[-3:] for backend in HERE], ids=lambda x: f"{x[0]}-{x[1]}")
    def build(self, request):
        return lambda window: memory(*request.param, marks=True)


def numbers(*x):
    """A tensor [1, t, 1, 1]."""
    return torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1)


@every_backend
class TestByHand:
    """One row, one head, widths of 1; keys and queries are 1, so that the matrix is a number."""

    def read(self, v, backend, t=None, **options):
        v, ones = numbers(*v), numbers(*[1.0] * len(v))
        return fast_weights(ones[:, :t], ones, v, scale=1.0, backend=backend, **options)[0].flatten().tolist()

    def half(self, *which):
        """log α of ½ for tokens given as 1, of 1 for those given as 0."""
        return numbers(*which)[..., 0] * torch.tensor(0.5, dtype=torch.float64).log()

    def test_addition(self, backend):
        """S = 3, then 3 + 5."""
        assert self.read([3, 5], backend, erase=False) == [3, 8]

    def test_decay_comes_before_the_write(self, backend):
        """S = ½ · 0 + 3, then ½ · 3 + 5."""
        assert self.read([3, 5], backend, erase=False, decay=self.half(1, 1)) == pytest.approx([3, 6.5], abs=1e-12)

    def test_decay_comes_before_erasing(self, backend):
        """S = 4, then ½ · 4 = 2, and 2 + ½ (8 − 2)."""
        got = self.read([4, 8], backend, decay=self.half(0, 1), beta=numbers(1, 0.5)[..., 0])
        assert got == pytest.approx([4, 5], abs=1e-12)

    def test_a_key_divided_by_alpha_erases_the_value_before_decay(self, backend):
        """S = 4, then ½ · 4 + (8 − (1 / ½) · 2) = 2 + 4."""
        got = self.read([4, 8], backend, decay=self.half(0, 1), erase=numbers(1, 2))
        assert got == pytest.approx([4, 6], abs=1e-12)

    def test_two_writes_per_token(self, backend):
        """One token writes 3, then goes halfway to 5."""
        assert self.read([3, 5], backend, t=1, beta=numbers(1, 0.5)[..., 0]) == [4]

    def test_a_token_that_is_not_live_does_not_decay(self, backend):
        live = torch.tensor([[True, False]])
        assert self.read([3, 5], backend, erase=False, decay=self.half(1, 1), live=live) == [3, 3]


@every_backend
def test_the_delta_rule_is_its_plain_case(backend):
    q, k, v, beta = Kind("none", "k").inputs(2, 70)
    k, v, beta = k[:, :, 0], v[:, :, 0], beta[:, :, 0]
    for mine, theirs in zip(
        fast_weights(q, k, v, beta=beta, backend=backend), delta_rule(q, k, v, beta, backend="reference"), strict=True
    ):
        close(mine, theirs)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, kind, dtype):
    """The same (rounded) numbers give the float64 reference's answer, and the matrix accumulates in float32 or more."""
    inputs = [x.to(dtype) for x in kind.inputs(2, 50)]
    out, S = kind.call(inputs, backend=backend)
    expected_out, expected_S = kind.call([x.double() for x in inputs], backend="reference")
    scale = max(expected_S.abs().max().item(), 1)
    assert out.dtype == dtype
    assert S.dtype == torch.promote_types(dtype, torch.float32)
    close(out.double() / scale, expected_out / scale, TOLERANCE[dtype])
    close(S.double() / scale, expected_S / scale, min(TOLERANCE[dtype], 2e-5))


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients(backend, kind, dtype):
    """Of each input and the initial state, in its dtype."""
    inputs = [x.to(dtype).requires_grad_() for x in kind.inputs(2, 37)]
    state = normal(2, HEADS, KEY, VALUE, seed=50).to(torch.promote_types(dtype, torch.float32)).requires_grad_()

    def gradients(inputs, state, backend):
        out, S = kind.call(inputs, state=state, backend=backend)
        number = (out.double() * normal(*out.shape, seed=60)).sum() + (S.double() * normal(*S.shape, seed=61)).sum()
        return torch.autograd.grad(number, [*inputs, state])

    exact = [x.detach().double().requires_grad_() for x in (*inputs, state)]
    expected = gradients(exact[:-1], exact[-1], "reference")
    for x, mine, theirs in zip((*inputs, state), gradients(inputs, state, backend), expected, strict=True):
        assert mine.dtype == x.dtype
        scale = max(theirs.abs().max().item(), 1)
        close(mine.double() / scale, theirs / scale, 5 * TOLERANCE[dtype])


@every_backend
@every_kind
@pytest.mark.parametrize("t", [0, 1, 16, 17, 65])
@pytest.mark.parametrize(("b", "k", "v"), [(1, 4, 3), (5, 3, 7), (2, 1, 1), (1, 64, 8), (1, 32, 40)])
def test_sizes(backend, kind, t, b, k, v):
    inputs, state = kind.inputs(b, t, k, v), normal(b, HEADS, k, v)
    got = kind.call(inputs, state=state, backend=backend)
    for mine, theirs in zip(got, kind.call(inputs, state=state, backend="reference"), strict=True):
        close(mine, theirs)


@every_backend
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("log_alpha", [0.0, -1e-6, -1.0, -20.0])
@pytest.mark.parametrize("erase", [False, True])
def test_constant_decay_over_many_tokens(backend, rows, log_alpha, erase):
    """A product of α that underflows (e^−6000) is never a divisor, so that float32 stays accurate."""
    kind = Kind("rows" if rows else "matrix", "k" if erase else "none")
    q, k, v, beta, decay = kind.inputs(1, 300)
    beta, decay = beta / 2, torch.full_like(decay, log_alpha)
    inputs = [x.float().requires_grad_() for x in (q, k, v, beta, decay)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (out, S), (expected, expected_S) = (kind.call(x, backend=y) for x, y in ((inputs, backend), (exact, "reference")))
    scale = expected_S.detach().abs().max().item()
    close(out.double() / scale, expected / scale, 1e-4)
    got = torch.autograd.grad(out.square().sum() + S.sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad(expected.square().sum() + expected_S.sum(), exact), strict=True):
        scale = max(theirs.abs().max().item(), 1)
        close(mine.double() / scale, theirs / scale, 1e-3)


@every_backend
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
def test_a_decay_of_zero_clears_the_matrix(backend, with_resets, rows):
    """α = 0, log α = −∞: the matrix is cleared, as by a reset, and nothing else becomes NaN."""
    kind = Kind("rows" if rows else "matrix", "k")
    q, k, v, beta, decay = kind.inputs(2, 37)
    forgotten = normal(2, 37, seed=8) > 1
    resets = normal(2, 37, seed=9) > 1 if with_resets else None
    expected = kind.call((q, k, v, beta, decay), resets=forgotten if resets is None else forgotten | resets)
    decay = decay.masked_fill(forgotten.view(2, 37, *(1,) * (decay.dim() - 2)), -torch.inf).requires_grad_()
    out, S = kind.call((q, k, v, beta, decay), resets=resets, backend=backend)
    close(out, expected[0])
    close(S, expected[1])
    (d_decay,) = torch.autograd.grad(out.square().sum() + S.sum(), decay)
    assert d_decay.isfinite().all()
    close(d_decay[forgotten], torch.zeros_like(d_decay[forgotten]))


@every_backend
@every_kind
def test_memory_layout_does_not_matter(backend, kind):
    inputs = kind.inputs(2, 37)
    resets = torch.zeros(2, 37, dtype=torch.bool)
    resets[1, 20] = True
    expected = kind.call(inputs, resets=resets, backend=backend)
    got = kind.call([strided(x) for x in inputs], resets=strided(resets), backend=backend)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_torch_compile_sees_one_graph():
    """The chunked backend, including its backward pass."""
    torch._dynamo.reset()
    kind = Kind("rows", "k", 2)
    inputs = [x.requires_grad_() for x in kind.inputs(2, 20)]

    def number(q, k, v, beta, decay):
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        return fast_weights(q, k, v, beta=beta, decay=decay, backend="chunked")[0].square().sum()

    got = torch.autograd.grad(torch.compile(number, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for mine, theirs in zip(got, torch.autograd.grad(number(*inputs), inputs), strict=True):
        close(mine, theirs)


@every_backend
@every_kind
@pytest.mark.parametrize("t", [1, 17, 70])
def test_every_output_is_written(backend, kind, t, poisoned_memory):
    inputs = [x.requires_grad_() for x in kind.inputs(2, t)]
    out, S = kind.call(inputs, backend=backend)
    for x in (out, S, *torch.autograd.grad(out.sum() + S.sum(), inputs)):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, HEADS)}, r"q: expected 4 axes \[b, t, g·h, k\], got shape \[2, 5, 2\]"),
        ({"k": torch.zeros(2, 6, HEADS, KEY)}, r"v: .* with m·t = 6"),
        ({"q": torch.zeros(2, 4, HEADS, KEY)}, r"k: expected \[b, m·t, h, k\] with m·t a multiple of t = 4, .*got 5"),
        ({"beta": torch.zeros(2, 5, 1)}, r"beta: .* with h = 2"),
        ({"decay": torch.zeros(2, 5, 1)}, r"decay: expected \[b, t, h\] with h = 2"),
        ({"decay": torch.zeros(2, 5, HEADS, VALUE)}, r"decay: expected \[b, t, h, k\] with k = 4"),
        ({"erase": torch.zeros(2, 5, HEADS)}, r"erase: expected 4 axes"),
        ({"state": torch.zeros(2, HEADS, VALUE, KEY)}, r"state: .* with k = 4"),
        ({"resets": torch.zeros(2, 4, dtype=torch.bool)}, r"resets: .* \[2, 5\].*got bool \[2, 4\]"),
        ({"live": torch.zeros(2, 5)}, "live: expected a bool tensor.*got float32"),
        ({"backend": "chunky"}, "fast_weights: backend: expected one of 'reference'.*got 'chunky'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v, beta = Kind("none", "k").inputs(2, 5)
    right = {"q": q, "k": k.flatten(1, 2), "v": v.flatten(1, 2), "beta": beta.flatten(1, 2)}
    with pytest.raises(ValueError, match=message):
        fast_weights(**{**right, **change})
