"""Selective copying: remember a few tokens among blanks and repeat them in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hqlt.registry import register
from hqlt.task.task import IGNORE, Batch, Split, Task


@register("task", "selective-copying")
@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Read tokens at random places among blanks, then predict them in order, one at each mark.

        inputs    0 5 0 0 3 7 0    1 1 1    (0 blank, 1 mark)
        targets   · · · · · · ·    5 3 7

    A memory must decide by content, not by position, what to write.

    Source:
        Gu, Dao 2023, "Mamba", section 3.1 and appendix E.1; Jing et al. 2019, "Gated Orthogonal Recurrent Units".
    """

    length: int = 256
    """Number of tokens before the marks, blanks included."""
    tokens: int = 16
    """Number of tokens to copy."""
    vocabulary: int = 16
    """Number of different tokens, including the blank and the mark."""

    coordinate_name = "tokens between token and mark"

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= self.length:
            raise ValueError(f"tokens: expected 1 to {self.length} (the length), got {self.tokens}")
        if self.vocabulary < 4:
            raise ValueError(
                f"vocabulary: expected at least 4 (the blank, the mark and two tokens), got {self.vocabulary}"
            )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        where = torch.rand(rows, self.length, generator=generator).argsort(dim=1)[:, : self.tokens].sort(dim=1).values
        tokens = torch.randint(2, self.vocabulary, (rows, self.tokens), generator=generator)
        marks = self.length + torch.arange(self.tokens)
        inputs = torch.zeros(rows, self.length + self.tokens, dtype=torch.long).scatter(1, where, tokens)
        inputs[:, self.length :] = 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, self.length :] = tokens
        coordinate = torch.zeros_like(inputs)
        coordinate[:, self.length :] = marks - where
        return Batch(inputs, targets, coordinate)
