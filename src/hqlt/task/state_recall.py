"""Recall by a tracked state: half of each key is never shown, so that both memories are needed at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hqlt.registry import register
from hqlt.task.state_tracking import VariableLengthTask
from hqlt.task.task import IGNORE, Batch, Split


@register("task", "state-recall")
@dataclass(frozen=True, kw_only=True)
class StateRecall(VariableLengthTask):
    """Recall values by a symbol, which is shown, and the setting of some switches, which must be tracked.

    First a long walk flips switches. Then every symbol gets a value for every setting of the switches. Then come
    questions: one more flip and a symbol, at which the model predicts the symbol's value in the current setting.

        one switch, symbols a and b; 1 flips nothing, 2 the switch; 3 a, 4 b; 5 a off, 6 a on, 7 b off, 8 b on
                   the walk       the pairs                   the questions
        inputs     2  2  1  2     6 12   7  9   5 11   8 10   1  3    2  4
        setting    on   off  on                               on      off
        targets    ·  ·  ·  ·     ·  ·   ·  ·   ·  ·   ·  ·   · 12    ·  9

    There are m = 2^switches settings and equally many kinds of flips. Tokens are numbered as follows: 0 is padding on
    the right; then m flips; then the symbols; then the keys, in the order symbol · m + setting; then the values. All
    values of a row differ. Labels "prefix" score 1 + setting after every flip: 2 1 1 2 and 2 1.

    Why both memories are needed: with a window of S tokens and L layers, *a KV-memory alone* sees the last
    L·(S − 1) + 1 tokens. If one flip of the walk lies before them, the setting is uniform over all m given what it
    sees, and because the values differ, no guess is right more often than 1 in m. *An FW-memory alone* can track the
    setting, with one reflection per switch, but must also store symbols · m pairs that were shown once; its matrix
    cannot tell more of them apart than a head's width. Together, the FW-memory tracks the setting and the KV-memory
    recalls the value, provided that pairs and questions fit into its window.
    """

    switches: int = 1
    """Number of switches."""
    symbols: int = 16
    """Number of symbols."""
    values: int = 64
    """Number of different values, at least as many as pairs."""
    questions: int = 16
    """Number of questions, each a flip and a symbol."""

    coordinate_name = "length of the walk"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("switches", "symbols", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.values < self.pairs:
            raise ValueError(
                f"values: expected at least {self.pairs}, one for each of {self.symbols} symbols in each of "
                f"{self.settings} settings, got {self.values}"
            )

    @property
    def settings(self) -> int:
        """Number of settings of the switches, m."""
        return 2**self.switches

    @property
    def pairs(self) -> int:
        """Number of pairs: one for each symbol in each setting."""
        return self.symbols * self.settings

    @property
    def vocab_size(self) -> int:
        return 1 + self.settings + self.symbols + self.pairs + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        shortest, longest = self.lengths(split)
        n, first_symbol = self.pairs, 1 + self.settings
        first_key = first_symbol + self.symbols
        walk = torch.randint(shortest, longest + 1, (rows, 1), generator=generator)
        flips = torch.randint(0, self.settings, (rows, int(walk.max()) + self.questions), generator=generator)
        bits = flips[..., None] >> torch.arange(self.switches) & 1
        setting = (bits.cumsum(dim=1) % 2 << torch.arange(self.switches)).sum(dim=2)
        walking = torch.arange(flips.shape[1]) < walk

        order = torch.rand(rows, n, generator=generator).argsort(dim=1)
        value = first_key + n + torch.rand(rows, self.values, generator=generator).argsort(dim=1)[:, :n]
        pairs = torch.stack([first_key + order, value.gather(1, order)], dim=2).flatten(1)

        symbol = torch.randint(0, self.symbols, (rows, self.questions), generator=generator)
        flip_at = walk + torch.arange(self.questions)
        questions = torch.stack([1 + flips.gather(1, flip_at), first_symbol + symbol], dim=2).flatten(1)
        answers = value.gather(1, symbol * self.settings + setting.gather(1, flip_at))

        inputs = torch.zeros(rows, int(walk.max()) + 2 * n + 2 * self.questions, dtype=torch.long)
        inputs[:, : flips.shape[1]] = torch.where(walking, 1 + flips, 0)
        inputs.scatter_(1, walk + torch.arange(2 * n), pairs)
        inputs.scatter_(1, walk + 2 * n + torch.arange(2 * self.questions), questions)
        targets = torch.full_like(inputs, IGNORE)
        answer_at = walk + 2 * n + 1 + 2 * torch.arange(self.questions)
        if self.scores_prefixes(split):
            targets[:, : flips.shape[1]] = torch.where(walking, 1 + setting, IGNORE)
            targets.scatter_(1, answer_at - 1, 1 + setting.gather(1, flip_at))
        targets.scatter_(1, answer_at, answers)
        return Batch(inputs, targets, walk.expand_as(inputs))
