"""Modular arithmetic with brackets: evaluate a nested expression, which requires a stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqlt.registry import register
from hqlt.task.modular_arithmetic import EQUALS, MINUS, MODULUS, PLUS, ZERO
from hqlt.task.state_tracking import StateTracking

OPEN, CLOSE = ZERO + MODULUS, ZERO + MODULUS + 1


@register("task", "bracketed-arithmetic")
@dataclass(frozen=True, kw_only=True)
class BracketedArithmetic(StateTracking):
    """Predict the value modulo 5 of a random expression of n − 2 characters at its final `=`.

        expression    (  ( - 2 )  *  3  )  =
        inputs       10 10 2 7 11 3  8 11  4    (as in ModularArithmetic; 10 opens, 11 closes)
        targets       ·  · · ·  · ·  ·  ·  9    (−6 mod 5 = 4, + 5)

    An expression of one character is a digit d, of two −d, of three (d), and of four (−d). Longer ones have the form
    (left ∘ right) with an operator ∘ from + − *; the length of the left expression is uniform over all lengths that
    leave at least one character for the right one.

    Source:
        Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy", appendix A.
    """

    vocab_size = 12
    chance = 1 / MODULUS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels != "answer":
            raise ValueError(
                f"labels: expected 'answer', because an expression with open brackets has no value, got {self.labels!r}"
            )

    def _draw(self, generator: torch.Generator, count: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(count), int(count.max()), dtype=torch.long)
        row = torch.arange(len(count))
        values = write_expressions(tokens, row, torch.zeros_like(row), count[:, 0] - 1, generator)
        return tokens.scatter(1, count - 1, EQUALS), (values[:, None] + ZERO).expand_as(tokens)


def write_expressions(tokens: Tensor, row: Tensor, start: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
    """Write random expressions into tokens[row, start : start + length] and return their values.

    All expressions of one depth are written at once.

    Args:
        tokens (int64 [b, t]): written in place.
        row, start, length (int64 [m]): where each expression goes.
        generator: the source of randomness.

    Returns:
        int64 [m]: values modulo 5.
    """
    values = torch.empty_like(row)
    short = length < 5
    values[short] = write_short(tokens, row[short], start[short], length[short], generator)
    row, start, length = row[~short], start[~short], length[~short]
    if len(row):
        left = 1 + (torch.rand(len(row), generator=generator) * (length - 4)).long()
        operator = torch.randint(0, 3, (len(row),), generator=generator)
        tokens[row, start] = OPEN
        tokens[row, start + 1 + left] = PLUS + operator
        tokens[row, start + length - 1] = CLOSE
        a, b = write_expressions(
            tokens,
            row.repeat(2),
            torch.cat([start + 1, start + left + 2]),
            torch.cat([left, length - 3 - left]),
            generator,
        ).chunk(2)
        values[~short] = torch.stack([a + b, a - b, a * b]).gather(0, operator[None])[0] % MODULUS
    return values


def write_short(tokens: Tensor, row: Tensor, start: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
    """Like `write_expressions`, for at most four characters: a digit, possibly negated, possibly in brackets."""
    digit = torch.randint(0, MODULUS, (len(row),), generator=generator)
    place = start + length // 2
    tokens[row, place] = ZERO + digit
    negated, enclosed = length % 2 == 0, length > 2
    tokens[row[negated], place[negated] - 1] = MINUS
    tokens[row[enclosed], start[enclosed]] = OPEN
    tokens[row[enclosed], (start + length - 1)[enclosed]] = CLOSE
    return torch.where(negated, -digit, digit) % MODULUS
