"""Which entries a retention keeps: compared with a loop over tokens, and the laws of a memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hqlt
from hqlt import HQLTConfig, HQLTForCausalLM, HybridMemory, registry
from hqlt.memory import Entries, Kept, Write
from tests.laws import Laws, close, in_chunks, scenarios, segments
from tests.layers import GROUPED, HEADS, HIDDEN, HYBRIDS, as_memory, build_layer, tokens

CHOICES = {
    "kv-only": {"blend": "kv-only", "retention": "random", "kept": 1},
    "delayed-streaming": {"blend": "delayed-streaming", "retention": "value-norm", "kept": 2},
    "own gates": {"blend": "delayed-streaming", "write_gates": "own", "retention": "random", "kept": 2},
    "grouped": {"blend": "synchronous", "retention": "value-norm", "kept": 2, "partial_rotary_factor": 0.5, **GROUPED},
    "surprise": {"blend": "synchronous", "retention": "surprise", "kept": 2},
    "surprise, all else": {
        "blend": "synchronous",
        "retention": "surprise",
        "kept": 2,
        "score": "beta-error",
        "sinks": 1,
        "fast_weights": "gated-delta",
        "kept_positions": "clamped",
        "kept_norm": True,
        "kept_gate": -1.0,
        **GROUPED,
    },
    "surprise of products": {
        "blend": "synchronous",
        "retention": "surprise",
        "kept": 2,
        "fast_weights": "delta-product",
    },
    "alike": {"blend": "synchronous", "retention": "surprise", "kept": 2, "kept_alike": True},
    "sinks": {"blend": "kv-only", "sinks": 2, "kept_positions": "none"},
    "sinks of chunks": {"blend": "delayed-chunk", "sinks": 1, "retention": "value-norm", "kept": 1, "kept_gate": 0.5},
    "no positions": {"blend": "kv-only", "retention": "value-norm", "kept": 4, "rope_theta": None, "conv_size": 3},
}


class TestLaws(Laws):
    longest = 12

    @pytest.fixture(params=CHOICES)
    def build(self, request):
        return lambda window: as_memory(build_layer("", window, **CHOICES[request.param]))


def seen_by_hand(scores, window, kept, chunks=False, sinks=0):
    """Yield, for each token of a segment, the tokens visible beyond the window and within it, given all scores."""
    stay, recent = [], []
    for t in range(len(scores)):
        before, recent = recent, list(range(t // window * window if chunks else max(t - window + 1, 0), t + 1))
        left = [j for j in before if j not in recent and j >= sinks]
        stay = sorted([*stay, *left], key=lambda j: (-scores[j], j))[:kept]
        yield [*(j for j in range(min(sinks, recent[0]))), *stay], recent


def read_by_hand(layer, q, k, v, head, stay, recent):
    """Softmax attention of the last token to the visible entries, with each key rotated by its distance."""
    t, half, kv = k.shape[0] - 1, q.shape[0] // 2, layer.kv
    frequencies = 10_000.0 ** (torch.arange(half, dtype=torch.float64) * (-1 / half))
    as_complex = lambda x: torch.complex(x[..., :half], x[..., half:])  # noqa: E731

    def score(q, k, distance):
        rotated = as_complex(k) * torch.polar(torch.ones(half, dtype=torch.float64), -distance * frequencies)
        return (as_complex(q).conj() * rotated).real.sum() / (2 * half) ** 0.5

    scores = []
    for j in stay:
        norms = (kv.q_norm, kv.k_norm) if kv.q_norm else (lambda x: x,) * 2
        distance = {"true": t - j, "clamped": layer.blend.window, "none": 0}[kv.kept_positions]
        gate = 0.0 if kv.gate is None else kv.gate[head]
        scores.append(score(norms[0](q), norms[1](k[j]), distance) + gate)
    scores += [score(q, k[j], t - j) for j in recent]
    return torch.stack(scores).softmax(0) @ v[[*stay, *recent]]


def coarse(new):
    """Scores with many ties."""
    return new.values.sum(dim=-1).round()


HOWS = [
    {},
    {"sinks": 2},
    {"sinks": 1, "kept_positions": "clamped"},
    {"kept_positions": "none", "kept_gate": -2.0},
    {"kept_norm": True},
    {"kept_norm": True, "kept_gate": 1.0, "kept_positions": "clamped"},
]


@pytest.mark.parametrize("blend", [*HYBRIDS, "kv-only"])
@given(
    scenario=scenarios(16),
    kept=st.integers(1, 4),
    ties=st.booleans(),
    g=st.sampled_from([1, 2]),
    how=st.sampled_from(HOWS),
)
def test_reads_equal_those_of_a_loop_over_tokens(blend, scenario, kept, ties, g, how):
    heads = {"num_heads": HEADS * g, "num_kv_heads": HEADS, "head_dim": 4}
    layer = build_layer("", scenario.window, blend=blend, retention="value-norm", kept=kept, **how, **heads)
    if ties:
        layer.kv.retention.score = coarse
    reads = []
    layer.kv.register_forward_hook(lambda kv, given, out: reads.append(out))
    x = tokens(scenario.b, scenario.t)
    in_chunks(lambda given, state, resets: layer(*given, state, resets), (x,), scenario.resets, scenario.cuts)
    q, k, v = layer.split(layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    v = layer.v_activation(v)
    scores = layer.kv.retention.score(Entries(k, v, None, None))
    got = torch.cat(reads, dim=1) if reads else None
    for row in range(scenario.b):
        for begin, end in segments(scenario.resets, row, scenario.t):
            for head in range(HEADS * g):
                pair = head // g
                marks = scores[row, begin:end, pair].tolist()
                seen = seen_by_hand(marks, scenario.window, kept, blend == "delayed-chunk", how.get("sinks", 0))
                for t, (stay, recent) in enumerate(seen):
                    of_head = k[row, begin : begin + t + 1, pair], v[row, begin : begin + t + 1, pair]
                    expected = read_by_hand(layer, q[row, begin + t, head], *of_head, head, stay, recent)
                    close(got[row, begin + t, head], expected)


def test_an_example_by_hand():
    """Window 2, kept 1: token 0 leaves at 2 and is kept, 1 leaves at 3 and is dropped, 2 leaves at 4 and replaces 0."""
    seen = [stay + recent for stay, recent in seen_by_hand([5.0, 3.0, 7.0, 1.0, 7.0, 0.0, 0.0], window=2, kept=1)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]


def test_the_state_holds_kept_entries_oldest_first():
    layer = build_layer("", 2, blend="kv-only", retention="value-norm", kept=3)
    layer.kv.retention.score = lambda new: -(new.positions[..., None].double() % 3).expand(-1, -1, HEADS)
    _, state = layer(tokens(1, 9))
    assert state.kv.kept.positions[0, :, 0].tolist() == [0, 3, 6]
    assert state.kv.kept.scores[0, :, 0].tolist() == [0, 0, 0, -2]  # the last score is of token 8, in the window
    close(
        state.kv.kept.values[:, :, 0], layer.v_activation(layer.v_proj(tokens(1, 9)))[:, [0, 3, 6], : HIDDEN // HEADS]
    )
    _, state = layer(tokens(1, 3), state, torch.tensor([[False, False, True]]))
    assert not any(x.any() for x in state.kv.kept._replace(scores=state.kv.kept.scores[:, :3]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_only_distances_matter(dtype, tolerance):
    """Even after ten million tokens."""
    layer = build_layer("", 3, dtype, blend="kv-only", retention="value-norm", kept=2)
    _, state = layer(tokens(2, 9, dtype=dtype))
    far = 10_000_000
    kept = state.kv.kept._replace(positions=state.kv.kept.positions + far)
    later = state._replace(kv=state.kv._replace(kept=kept), position=state.position + far)
    x = tokens(2, 4, seed=1, dtype=dtype)
    close(layer(x, later)[0], layer(x, state)[0], tolerance)


def test_random_is_a_hash_of_head_and_position():
    retention = registry.find("retention", "random")(build_layer("kv-only").heads, kept=1)
    positions = torch.tensor([[0, 1, 2, 1_000_003]])
    got = retention.score(Entries(None, torch.zeros(1), positions, None))

    def lowbias32(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    expected = [
        [lowbias32(HEADS * position + head) >> 8 for head in range(HEADS)] for position in positions[0].tolist()
    ]
    assert got[0].tolist() == expected
    many = retention.score(Entries(None, torch.zeros(1), torch.arange(10_000)[None], None)) / 2**24
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(many[0].T)[0, 1]) < 0.03


def test_recent_has_no_cost():
    layer = build_layer("synchronous-vector-delta-plain")
    assert layer.kv.retention is None
    assert layer.init_state(1).kv.kept == ()
    assert layer.kv.native == "window"


def test_narrow_states():
    layer = build_layer("", 2, torch.bfloat16, blend="synchronous", retention="value-norm", kept=2)
    _, state = layer(tokens(2, 7, dtype=torch.bfloat16))
    for held in (state, state.to(dtype=torch.float32).to(dtype=torch.bfloat16), layer.init_state(2)):
        kinds = torch.bfloat16, torch.bfloat16, torch.int64, torch.float32
        assert tuple(x.dtype for x in held.kv.kept) == kinds
        assert layer(tokens(2, 3, dtype=torch.bfloat16), held)[0].isfinite().all()


def test_operations_on_states():
    layer = build_layer("", 2, blend="delayed-streaming", retention="value-norm", kept=2)
    x, y = tokens(2, 7), tokens(2, 5, seed=1)
    (_, a), (_, b) = layer(x), layer(x[:, :4])
    expected = torch.cat([layer(y, a)[0][1:], layer(y, b)[0][:1]])
    joined = a.concatenate([a.select([1]), b.select([0])])
    close(layer(y.flip(0), joined)[0], expected)
    mixed = a.where(torch.tensor([False, True]), b)
    close(layer(y.flip(0), mixed.select([1, 0]))[0], expected)
    assert isinstance(joined.repeat(2).detach().kv.kept, Kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": "value-norm"}, "kept: expected at least 1, .* got 0"),
        ({"retention": "recent", "kept": 3}, "kept: expected an option of the chosen parts"),
        ({"kept": 3}, r"kept: expected an option of the chosen parts \(.*retention='recent' uses none"),
        (
            {"retention": "surprising"},
            "retention: expected one of 'recent', 'surprise', .*, got 'surprising'; did you mean 'surprise'",
        ),
        (
            {"retention": "random", "kept": 2, "window": None},
            "retention: expected 'recent' and no sinks with window=None",
        ),
        ({"sinks": 2, "window": None}, "retention: expected 'recent' and no sinks with window=None.* sinks=2"),
        ({"sinks": -1}, "sinks: expected a number of entries, at least 0, got -1"),
        ({"kept_gate": 0.0}, "kept_alike, kept_positions, kept_norm, kept_gate: expected their defaults"),
        (
            {"sinks": 1, "kept_positions": "near"},
            "kept_positions: expected one of 'true', 'clamped', 'none', got 'near'",
        ),
        (
            {"retention": "surprise", "kept": 2, "blend": "delayed-streaming"},
            "retention: expected one that does not score by .* or a blend that writes a token when it arrives",
        ),
        ({"retention": "surprise", "kept": 2, "blend": "kv-only"}, "retention: expected .* got 'surprise'"),
        (
            {"retention": "surprise", "kept": 2, "fast_weights": "gla"},
            "retention: expected .*'value-norm'.*, because fast_weights='gla' writes without a prediction",
        ),
        ({"retention": "surprise", "kept": 2, "score": "errors"}, "score: expected one of 'error', 'beta-error'"),
        ({"blend": "fw-only", "retention": "recent"}, "retention: expected none for blend 'fw-only'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        HybridMemory(**{"hidden_size": 8, "num_heads": 2, "window": 4, **options})


def test_reading_without_candidates_is_rejected():
    layer = build_layer("kv-only", retention="value-norm", kept=2)
    q = torch.zeros(1, 3, HEADS, HIDDEN // HEADS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"candidates: expected the entries .* `KVMemory\.candidates`"):
        layer.kv(q, q, q, 4, None)


SMALL = {"hidden_size": 16, "num_heads": 2, "window": 3, "num_hidden_layers": 2, "vocab_size": 11}


def test_a_model_generates_with_a_retention():
    model = HQLTForCausalLM(HQLTConfig(**SMALL, retention="value-norm", kept=4)).double()
    assert [block.memory.kv.kept for block in model.model.layers] == [4, 4]
    text = torch.randint(1, 11, (2, 9))
    continued = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(text, **continued), model.generate(text, use_cache=False, **continued))


def test_layers_of_full_attention_have_no_retention():
    config = HQLTConfig(**SMALL, layer_kinds=["kv", "hybrid"], retention="random", kept=4)
    assert [config.layer_options(layer)["retention"] for layer in range(2)] == ["recent", "random"]
    with pytest.raises(ValueError, match="kept: expected an option that a layer uses"):
        HQLTConfig(**SMALL, layer_kinds=["kv", "kv"], retention="random", kept=4)


def test_surprise_is_the_prediction_error_of_the_fast_weights():
    """By hand from the delta rule's equation, in several calls; the best two entries that left the window are kept."""
    layer = build_layer("", 2, blend="synchronous", retention="surprise", kept=2, beta_max=1.0)
    x = tokens(1, 9)
    _, k, v = layer.split(layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    phi, v, beta = hqlt.ops.unit_silu(k), layer.v_activation(v), layer.fw.strengths(layer.fw.beta_proj(x))
    scores = torch.zeros(9, HEADS, dtype=torch.float64)
    W = torch.zeros(HEADS, HIDDEN // HEADS, HIDDEN // HEADS, dtype=torch.float64)
    for t in range(9):
        error = v[0, t] - torch.einsum("hkv,hk->hv", W, phi[0, t])
        scores[t] = error.norm(dim=-1)
        W = W + torch.einsum("hk,hv->hkv", phi[0, t], beta[0, t, :, None] * error)
    _, (state,) = in_chunks(lambda given, state, resets: as_pair(layer(*given, *state or (None,))), (x,), None, [4, 5])
    assert state.kv.kept.positions.shape == (1, 2, HEADS)
    for head in range(HEADS):
        best = sorted(range(8), key=lambda j: -scores[j, head])[:2]
        assert state.kv.kept.positions[0, :, head].tolist() == sorted(best)
        close(state.kv.kept.scores[0, :2, head], scores[sorted(best), head])


def as_pair(given):
    return given[0], (given[1],)


@pytest.mark.parametrize("rule", list(registry.names("rule")))
def test_rules_that_erase_return_errors(rule):
    """They equal those of the reference."""
    layer = build_layer("", 3, blend="synchronous", fast_weights=rule)
    new = layer.parts().tokens(layer.project(tokens(2, 7), None, None)[0])
    if not layer.fw.returns_errors:
        assert rule in ("linear", "retnet", "lightning", "gla", "mamba2", "hgrn2", "mlstm") or "speeds" in rule
        return
    write = Write(new.keys, new.values, new.gates, None)
    out, after, errors = layer.fw(new.q, write, None, None, errors=True)
    plain_out, plain_after = layer.fw(new.q, write, None, None)
    close(out, plain_out)
    close(after.matrix, plain_after.matrix)
    with hqlt.ops.use_backend("reference"):
        for mine, theirs in zip(errors, layer.fw(new.q, write, None, None, errors=True)[2], strict=True):
            close(mine, theirs)
            assert mine.shape == (2, 7, HEADS) and not mine.requires_grad
    with hqlt.ops.use_backend("chunked"):
        close(layer.fw(new.q, write, None, None, errors=True)[2].plain, errors.plain)


def test_steps_and_one_call_in_float32_keep_the_same_entries():
    """Scores differ by rounding, but no two of 4 × 300 tokens are close enough to swap."""
    layer = build_layer("", 8, torch.float32, blend="synchronous", retention="surprise", kept=8)
    x = tokens(4, 300, dtype=torch.float32)
    _, (state,) = in_chunks(
        lambda given, state, resets: as_pair(layer(*given, *state or (None,))), (x,), None, range(1, 300)
    )
    assert torch.equal(state.kv.kept.positions, layer(x)[1].kv.kept.positions)


def test_a_model_initialises_the_gate():
    config = HQLTConfig(**SMALL, retention="surprise", kept=4, sinks=1, kept_gate=-4.0, kept_norm=True)
    model = HQLTForCausalLM(config)
    for block in model.model.layers:
        assert block.memory.kv.gate.tolist() == [-4.0, -4.0]
        assert block.memory.kv.kept == 5
        assert set(block.memory.kv.k_norm.weight.tolist()) == {1.0}


def test_kept_alike_uses_the_mean_score():
    layer = build_layer("", 2, blend="kv-only", retention="value-norm", kept=2, kept_alike=True)
    x = tokens(1, 9)
    _, state = layer(x)
    scores = layer.v_activation(layer.v_proj(x)).unflatten(-1, (HEADS, -1)).norm(dim=-1)[0, :8].mean(dim=-1)
    best = sorted(scores.topk(2).indices.tolist())
    assert state.kv.kept.positions[0].T.tolist() == [best] * HEADS


def test_stored_scores_are_finite():
    """The mean over heads of the lowest scores overflows float32; NaN counts as the lowest score."""
    for options in ({"sinks": 1, "kept_alike": True}, {"retention": "value-norm", "kept": 1}):
        layer = build_layer("", 2, torch.float32, blend="synchronous", **options)
        if "retention" in options:
            layer.kv.retention.score = lambda new: new.values[..., 0].fill_(torch.nan)
        _, state = layer(tokens(1, 5, dtype=torch.float32))
        for _ in range(2):
            assert state.kv.kept.scores.isfinite().all()
            with torch.no_grad():
                _, state = layer(tokens(1, 1, dtype=torch.float32), state)
