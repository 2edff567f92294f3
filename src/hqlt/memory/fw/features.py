"""Feature maps that are learned: what a rule makes of queries and keys, head by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hqlt.memory.fw.rule import init_parameter
from hqlt.memory.heads import Heads
from hqlt.registry import check_choice
from hqlt.shapes import Keys, Queries, at_least_float32


class LearnedMap(nn.Module):
    """q → φ(M q), k → φ(N k), with φ the rule's own and M, N [k, k] of each head's own, begun at the identity.

    So a rule begins as it would without it. The queries and keys of a pretrained attention are made for a softmax; with
    these they can become what φ needs.
    """

    widening = 1
    """The width of what comes out, in widths of what goes in."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.eye(heads.k).repeat(h, 1, 1)) for h in (heads.queries, heads.keys))

    def init_parameters(self) -> None:
        for matrices in (self.q, self.k):
            init_parameter(matrices, torch.eye(matrices.shape[-1]).expand_as(matrices))

    def forward(self, q: Queries, keys: Keys) -> tuple[Queries, Keys]:
        return self.mapped(self.q, q), self.mapped(self.k, keys)

    def mapped(self, matrices: Tensor, x: Keys) -> Keys:
        """[b, t, h, k] → the same, each head by its matrix of [h, k, k]."""
        return torch.einsum("hij,bthj->bthi", matrices, x)

    def extra_repr(self) -> str:
        return f"{len(self.q)} heads of q, {len(self.k)} of k"


class Hedgehog(LearnedMap):
    """x → softmax(M x) ⊕ softmax(−M x), of width 2k, in place of the rule's φ: M [k, k] of each head's own, for queries
    and for keys, begun at the identity.

    Source: Zhang et al. 2024, "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", eq. 6.
    """

    widening = 2

    def mapped(self, matrices: Tensor, x: Keys) -> Keys:
        logits = super().mapped(matrices, x)
        logits = logits.to(at_least_float32(x.dtype))
        return torch.cat([logits.softmax(dim=-1), (-logits).softmax(dim=-1)], dim=-1).to(x.dtype)


MAPS: dict[str, type[LearnedMap]] = {"learned": LearnedMap, "hedgehog": Hedgehog}


def feature_map_of(heads: Heads, name: str | None, known: Sequence[str] = ("learned",)) -> LearnedMap | None:
    """What a rule's option asks for; None: the rule's φ alone. Raises ValueError for a name that it does not know."""
    if name is None:
        return None
    check_choice("feature_map", name, known)
    return MAPS[name](heads)
