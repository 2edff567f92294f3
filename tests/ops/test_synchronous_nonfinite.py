"""Which tokens NaN affects and which gradients, compared with loops over tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hqlt.ops.segments import segment_ids
from hqlt.ops.synchronous.kernels.nonfinite import lost_tokens, reached_entries, zeroed
from tests.laws import normal
from tests.ops.inputs import HEADS

BAD = (torch.nan, torch.inf, -torch.inf)


@given(data=st.data())
def test_lost_tokens_follow_a_bad_entry_in_their_segment(data):
    b, t, held = 2, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
    l = held + t
    resets = torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * l, max_size=b * l))).view(b, l)
    k, v, beta, decay = normal(b, l, HEADS, 3), normal(b, l, HEADS, 2), normal(b, t, HEADS), -torch.ones(b, t, HEADS)
    decay[0, 0] = -torch.inf  # is valid
    state, ids = normal(b, HEADS, 3, 2), segment_ids(resets).int()
    bad = torch.zeros(b, 1 + l, HEADS, dtype=torch.bool)  # the state, then the entries
    for _ in range(data.draw(st.integers(0, 3))):
        row, head, value = (data.draw(st.sampled_from(x)) for x in (range(b), range(HEADS), BAD))
        where = data.draw(st.integers(-1, l - 1))
        bad[row, 1 + where, head] = True
        new = [beta[row, where - held]] if where >= held else []
        new += [decay[row, where - held]] if where >= held and value != -torch.inf else []
        places = (
            [state[row, head, 0]] if where < 0 else [k[row, where, head], v[row, where, head], *(x[head:] for x in new)]
        )
        data.draw(st.sampled_from(places))[0] = value
    expected = torch.zeros(b, t, HEADS, dtype=torch.bool)
    seen = torch.cat([torch.full((b, 1), 0), ids], dim=1)  # segment of the state, if nothing is held
    if held:
        seen[:, 0] = ids[:, held - 1]
    for i in range(t):
        mine = ids[:, held + i, None]
        expected[:, i] = ((seen[:, : held + i + 2] == mine)[..., None] & bad[:, : held + i + 2]).any(dim=1)
    assert torch.equal(lost_tokens(k, v, beta, decay, state, resets) != 0, expected)
    assert all(x.isfinite().all() for x in (zeroed(beta, None)[0], zeroed(beta, decay)[1].exp()))


@given(data=st.data())
def test_reached_entries_precede_a_dead_query_in_its_segment(data):
    b, t, held, group = 2, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4)), data.draw(st.integers(1, 2))
    l = held + t
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    resets, dead, final = (torch.rand(*sizes, generator=random) < share for sizes, share in (
        ((b, l), 0.3), ((b, HEADS * group, t), 0.1), ((b, HEADS), 0.2)
    ))  # fmt: skip
    ids = segment_ids(resets).int()
    reached, reached_state = reached_entries(dead.to(torch.int8), final, resets)
    by_group = dead.view(b, HEADS, group, t).any(dim=2).transpose(1, 2)
    by_group[:, -1] |= final
    for j in range(l):
        later = (ids[:, held:] == ids[:, j : j + 1]) & (torch.arange(held, l) >= j)
        assert torch.equal(reached[:, j] != 0, (later[..., None] & by_group).any(dim=1))
    before = ids[:, held - 1 : held] if held else torch.zeros(b, 1)
    assert torch.equal(reached_state, ((ids[:, held:] == before)[..., None] & by_group).any(dim=1))
