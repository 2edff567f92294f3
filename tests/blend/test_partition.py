"""Which memory holds a token, tested by intervention: change its value, and see which read changes.

Reads are linear in the values, so a token is in a memory exactly if that memory's read depends on the token's value.
Batch row j changes the value of token j; one call gives the influence of every token on every read.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given

from hqlt.blend import Memories, Tokens
from hqlt.memory.fw import DeltaGates
from tests.laws import Scenario, normal, scenarios, segments
from tests.layers import HEADS, HIDDEN, HYBRIDS, RULES, build_layer

LONGEST = 14


def intervened(t):
    """Return (q, k, v, β) of t + 1 equal rows, except for v of token j in row j. The last row is unchanged."""
    q, k, v = (normal(1, t, HEADS, HIDDEN // HEADS, seed=i).expand(t + 1, -1, -1, -1) for i in range(3))
    changed = v.clone()
    for token in range(t):
        changed[token, token] += 1
    return q, k, changed, normal(1, t, HEADS).sigmoid().expand(t + 1, -1, -1) + 0.5


def moved(x):
    """Return which rows of x [t + 1, …, h, v] differ from the last, unchanged row: Bool[t, …]."""
    return (x[:-1] - x[-1:]).abs().amax(dim=(-2, -1)) > 1e-9


def in_both(blend, t, window, resets):
    """Return Bool[token, step] of the KV-memory and of the FW-memory, by the definition of the blend."""
    kv, fw = torch.zeros(t, t, dtype=torch.bool), torch.zeros(t, t, dtype=torch.bool)
    for begin, end in segments(resets, 0, t):
        for step in range(begin, end):
            for token in range(begin, step + 1):
                recent = step - token < window
                own_chunk = (step - begin) // window == (token - begin) // window
                kv[token, step] = own_chunk if blend == "delayed-chunk" else recent
                fw[token, step] = blend == "synchronous" or not kv[token, step]
    return kv, fw


def influences(blend_name, rule, scenario: Scenario):
    """Run the blend; return which tokens influence which reads of each memory, and the final state."""
    layer = build_layer(f"{blend_name}-vector-{rule}-plain", scenario.window)
    inputs = intervened(scenario.t)
    resets = None if scenario.resets is None else scenario.resets[:1].expand(scenario.t + 1, -1)
    kv, fw, state = [], [], None
    for begin, end in pairwise([0, *scenario.cuts, scenario.t]):
        if begin < end:
            q, k, v, beta = (x[:, begin:end] for x in inputs)
            new = Tokens(q, k, v, DeltaGates(beta) if rule == "delta" else ())
            marked = None if resets is None else resets[:, begin:end]
            reads, state = layer.blend(Memories(layer.kv, layer.fw), new, state, marked)
            kv.append(moved(reads.kv))
            fw.append(moved(reads.fw))
    return torch.cat(kv, dim=1), torch.cat(fw, dim=1), state


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("blend", HYBRIDS)
class TestPartition:
    @given(scenario=scenarios(LONGEST, shortest=1))
    def test_each_memory_reads_the_tokens_of_its_blend(self, blend, rule, scenario):
        kv, fw, _ = influences(blend, rule, scenario)
        expected_kv, expected_fw = in_both(blend, scenario.t, scenario.window, scenario.resets)
        assert torch.equal(kv, expected_kv)
        assert torch.equal(fw, expected_fw)

    @given(scenario=scenarios(LONGEST, shortest=1))
    def test_past_tokens_are_in_one_memory_or_in_both_if_synchronous(self, blend, rule, scenario):
        kv, fw, _ = influences(blend, rule, scenario)
        past = torch.zeros_like(kv)
        for begin, end in segments(scenario.resets, 0, scenario.t):
            past[begin:end, begin:end] = torch.ones(end - begin, end - begin).triu().bool()
        if blend == "synchronous":
            assert torch.equal(fw, past)
            assert not (kv & ~past).any()
        else:
            assert torch.equal(kv ^ fw, past)
            assert not (kv & fw).any()

    @given(scenario=scenarios(LONGEST, shortest=1))
    def test_held_and_written_tokens_are_the_whole_past(self, blend, rule, scenario):
        """A token of the current segment is in the buffer or (always, if synchronous) in the matrix."""
        _, _, state = influences(blend, rule, scenario)
        held = moved(state.kv.values).any(dim=1)
        written = moved(state.fw.matrix.flatten(1, 2))
        begin, _ = list(segments(scenario.resets, 0, scenario.t))[-1]
        past = torch.arange(scenario.t) >= begin
        assert torch.equal(written if blend == "synchronous" else held ^ written, past)
        assert held.sum() <= state.slots
