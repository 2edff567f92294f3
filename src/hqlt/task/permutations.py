"""The word problem of a permutation group: compose a sequence of permutations."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hqlt.registry import check_choice, register
from hqlt.task.state_tracking import StateTracking


@register("task", "permutations")
@dataclass(frozen=True, kw_only=True)
class Permutations(StateTracking):
    """Predict the composition of n − 1 random group elements, of which the first is applied first.

        elements   021 102 120    (0 → 0, 1 → 2, 2 → 1; then …)
        so far     021 120 201
        inputs       2   3   4    (1 + the index in lexicographic order: 012 021 102 120 201 210)
        targets      ·   ·   5    (labels "prefix": 2 4 5)

    S3 and S4 are solvable groups. A5 is not, and neither is S5: no circuit of constant depth composes their elements,
    and neither does a transformer or a linear memory whose transitions commute.

    Source:
        Merrill, Petty, Sabharwal 2024, "The Illusion of State in State-Space Models", section 5.
    """

    group: Literal["S3", "S4", "A5", "S5"] = "S3"
    """S3, S4, S5: all permutations of three, four or five items; A5: the even permutations of five."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("group", self.group, ("S3", "S4", "A5", "S5"))

    @property
    def vocab_size(self) -> int:
        return 1 + len(elements_of(self.group))

    @property
    def chance(self) -> float:
        return 1 / len(elements_of(self.group))

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        product = product_table(self.group)
        elements = torch.randint(0, len(product), (len(count), int(count.max())), generator=generator)
        so_far = [elements[:, 0]]
        for element in elements.unbind(dim=1)[1:]:
            so_far.append(product[so_far[-1], element])
        return elements + 1, torch.stack(so_far, dim=1) + 1


def elements_of(group: str) -> list[tuple[int, ...]]:
    """List the permutations of a group in lexicographic order; p[i] is the image of i."""
    return [p for p in itertools.permutations(range(int(group[1]))) if group[0] == "S" or is_even(p)]


def is_even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


@functools.cache
def product_table(group: str) -> Tensor:
    """Build the table of products: entry [a, b] is the index of "a, then b"."""
    elements = elements_of(group)
    place = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[place[tuple(b[i] for i in a)] for b in elements] for a in elements])
