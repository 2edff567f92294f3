"""Learned feature maps of queries and keys, one per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hqlt.memory.fw.rule import init_parameter
from hqlt.memory.heads import Heads
from hqlt.registry import check_choice
from hqlt.shapes import Keys, Queries, at_least_float32


class LearnedMap(nn.Module):
    """q → φ(M q), k → φ(N k), with the rule's φ and matrices M, N [k, k] per head, initialized to the identity.

    A rule thus starts as without the map. It lets the queries and keys of a pretrained attention, which are trained for
    a softmax, adapt to φ.

    Args:
        heads: number and width of the layer's heads.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(64, 4, fast_weights="delta", feature_map="learned")
        >>> layer.fw.feature_map
        LearnedMap(4 heads of q, 4 of k)
    """

    widening = 1
    """Width of the output divided by the width of the input."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.eye(heads.k).repeat(h, 1, 1)) for h in (heads.queries, heads.keys))

    def init_parameters(self) -> None:
        """Set the matrices to the identity."""
        for matrices in (self.q, self.k):
            init_parameter(matrices, torch.eye(matrices.shape[-1]).expand_as(matrices))

    def forward(self, q: Queries, keys: Keys) -> tuple[Queries, Keys]:
        return self.mapped(self.q, q), self.mapped(self.k, keys)

    def mapped(self, matrices: Tensor, x: Keys) -> Keys:
        """Map each head of x [b, t, h, k] by its matrix of [h, k, k]."""
        return torch.einsum("hij,bthj->bthi", matrices, x)

    def extra_repr(self) -> str:
        return f"{len(self.q)} heads of q, {len(self.k)} of k"


class Hedgehog(LearnedMap):
    """x → softmax(M x) ⊕ softmax(−M x), of width 2k, in place of the rule's φ.

    M [k, k] is learned per head, for queries and for keys, and initialized to the identity.

    Source:
        Zhang et al. 2024, "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", eq. 6.
    """

    widening = 2

    def mapped(self, matrices: Tensor, x: Keys) -> Keys:
        logits = super().mapped(matrices, x)
        logits = logits.to(at_least_float32(x.dtype))
        return torch.cat([logits.softmax(dim=-1), (-logits).softmax(dim=-1)], dim=-1).to(x.dtype)


MAPS: dict[str, type[LearnedMap]] = {"learned": LearnedMap, "hedgehog": Hedgehog}


def is_plain_map(feature_map: LearnedMap | None) -> bool:
    """Return whether a feature map is absent or exactly the `LearnedMap`, whose matrices can be applied elsewhere."""
    return feature_map is None or type(feature_map) is LearnedMap


def feature_map_of(heads: Heads, name: str | None, known: Sequence[str] = ("learned",)) -> LearnedMap | None:
    """Return the learned map of this name, or None; raise a ValueError for a name that the rule does not support."""
    if name is None:
        return None
    check_choice("feature_map", name, known)
    return MAPS[name](heads)
