"""Modular arithmetic without brackets: evaluate a sum of products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.task.state_tracking import StateTracking

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS = 1, 2, 3, 4
ZERO = 5
"""Token of the digit 0; the tokens of the other digits follow it."""


@register("task", "arithmetic")
@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(StateTracking):
    """Predict the value modulo 5 of an expression of digits and operators at its final `=`.

    Multiplication binds more tightly than + and −.

        expression   3 - 2 * 4 + 1 =
        inputs       8 2 7 3 9 1 6 4    (1 +, 2 −, 3 *, 4 =, digit + 5)
        targets      · · · · · · · 6    (value + 5; labels "prefix": 8 8 6 6 5 5 6 6)

    n is odd. The intermediate answer at an operator is the value of the expression up to the digit before it.

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy"; the paper, section 4.2, table 2.
    """

    vocab_size = 10
    chance = 1 / MODULUS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (shortest, longest) in (("train_lengths", self.train_lengths), ("test_lengths", self.test_lengths)):
            if shortest == longest and shortest % 2 == 0:
                raise ValueError(f"{name}: expected a range that contains an odd length, got {shortest} only")

    def _counts(self, generator: torch.Generator, rows: int, shortest: int, longest: int) -> Tensor:
        return 2 * torch.randint(shortest // 2, (longest - 1) // 2 + 1, (rows, 1), generator=generator)

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(count), int(count.max()) // 2
        digits = torch.randint(0, MODULUS, shape, generator=generator)
        operators = torch.randint(PLUS, TIMES + 1, shape, generator=generator)  # each follows its digit
        tokens = torch.stack([digits + ZERO, operators], dim=2).flatten(1)
        values = values_so_far(digits, operators)
        return tokens.scatter(1, count - 1, EQUALS), values.repeat_interleave(2, dim=1) + ZERO


def values_so_far(digits: Tensor, operators: Tensor) -> Tensor:
    """Compute the value modulo 5 of d₀ o₀ d₁ … o_{i−1} d_i for each i.

    The total of the finished terms and the current term, which may still be multiplied:

        o = *    total ← total           term ← term · d
        o = ±    total ← total + term    term ← ± d

    Args:
        digits (int64 [b, t]): d.
        operators (int64 [b, t]): o, as tokens; each follows the digit of its index.

    Returns:
        int64 [b, t].
    """
    total, term = torch.zeros_like(digits[:, 0]), digits[:, 0]
    values = [term]
    for operator, digit in zip(operators.unbind(dim=1), digits.unbind(dim=1)[1:], strict=False):
        multiplies = operator == TIMES
        total = torch.where(multiplies, total, total + term) % MODULUS
        term = torch.where(multiplies, term * digit, torch.where(operator == MINUS, -digit, digit)) % MODULUS
        values.append((total + term) % MODULUS)
    return torch.stack(values, dim=1)
