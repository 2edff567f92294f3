"""Facts extracted from real text: what did the passage say that this name is?"""

from __future__ import annotations

import collections
import functools
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hqlt.registry import check_choice, register
from hqlt.task.task import IGNORE, SPLITS, Batch, Split, Task
from hqlt.task.text import files_of

FACT = re.compile(rb"^[ \t]*([A-Za-z_][A-Za-z0-9_.]*) = ([^\n#]{4,24})\n", re.MULTILINE)
"""A line that gives a name a value of 4 to 24 bytes."""
GIVEN = re.compile(rb"^[ \t]*([A-Za-z_][A-Za-z0-9_.]*)[ \t]*(?::[^\n=]*)?[-+*/|&^%@<>]{0,2}=(?!=)", re.MULTILINE)
"""A line that gives a name any value, or changes the one it has."""


class Facts(NamedTuple):
    """Places in the bytes of a split, [n] each."""

    file: NDArray[np.int64]
    """Where the fact's file begins."""
    name: NDArray[np.int64]
    value: NDArray[np.int64]
    end: NDArray[np.int64]
    """Behind the value, where the line ends."""
    until: NDArray[np.int64]
    """Where the file ends, or a line gives the name another value: the question may not come later."""


@register("task", "fact-extraction")
@dataclass(frozen=True, kw_only=True)
class FactExtraction(Task):
    r"""A passage of Python source, byte by byte, and a question about one of its lines, which holds the answer.

        passage     …width = 0.5*scale\nheight = rows - 1\nfor row in…
        question    \nwidth =
        answer      0.5*scale\n

    The line stands `distance` bytes before the question, 1 … `length` − 1: uniform in tests; in training its logarithm
    is, so that a short memory has something to learn from as well. It is drawn again where the file is too short or a
    line between gives the name another value. No other line of the library gives any name the same value, and it is
    not the name's own (`self.month = month`), so that nothing but the passage tells it. An answer counts if every byte
    of it is right, as a greedy continuation would have it: SWDE and FDA are scored like this, by whether the answer is
    contained in it. Files of a split are those of `text`.

    Source: after Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff",
    section 3 and appendix; the paper's table of recall.
    """

    length: int = 512
    """Bytes of the passage at most."""
    labels: Literal["text", "answer"] = "text"
    """What training scores: every byte, as in a language model, or the answer alone. Tests score the answer alone."""

    vocab_size = 256
    metric = "exact"
    chance = 0.0
    coordinate_name = "bytes between fact and question"

    def __post_init__(self) -> None:
        if self.length < 64:
            raise ValueError(f"length: expected at least 64 bytes, got {self.length}")
        check_choice("labels", self.labels, ("text", "answer"))

    def sample(self, generator: torch.Generator, rows: int, split: Split) -> Batch:
        source, facts = files_of(split)[0].numpy(), facts_of(split)
        sequences: list[tuple[NDArray[np.uint8], int, int]] = []
        while len(sequences) < rows:
            i = int(torch.randint(0, len(facts.name), (), generator=generator))
            distance = self.distance(generator, split)
            asked_at = int(facts.end[i]) + distance
            begin = max(int(facts.file[i]), asked_at - self.length)
            if begin <= facts.name[i] and asked_at <= facts.until[i]:
                line = source[facts.name[i] : facts.end[i] + 1]
                question = np.concatenate([source[begin:asked_at], np.frombuffer(b"\n", np.uint8), line])
                sequences.append((question, int(facts.end[i] + 1 - facts.value[i]), distance))
        longest = max(len(sequence) for sequence, _, _ in sequences) - 1
        inputs = torch.zeros(rows, longest, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORE)
        for row, (sequence, answer, _) in enumerate(sequences):
            tokens = torch.from_numpy(sequence.astype(np.int64))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            scored = len(tokens) - 1 if split == "train" and self.labels == "text" else answer
            targets[row, len(tokens) - 1 - scored : len(tokens) - 1] = tokens[len(tokens) - scored :]
        distances = torch.tensor([[distance] for _, _, distance in sequences])
        return Batch(inputs, targets, distances.expand_as(inputs))

    def distance(self, generator: torch.Generator, split: Split) -> int:
        """Bytes between a fact and its question."""
        if split == "train":
            return int((self.length - 1) ** float(torch.rand((), generator=generator, dtype=torch.float64)))
        return int(torch.randint(1, self.length, (), generator=generator))


@functools.cache
def facts_of(split: Split) -> Facts:
    """All facts of a split's files that cannot be known but from the passage."""
    text, begins = files_of(split)
    source = text.numpy().tobytes()
    starts = begins.nonzero()[:, 0].numpy()
    ends = np.append(starts[1:], len(source))
    times = values_of_library()
    facts = [m for m in FACT.finditer(source) if times[m[2]] == 1 and m[2] != m[1].rpartition(b".")[2]]
    name, value, end = (np.array([place(match) for match in facts]) for place in PLACES)
    file = np.searchsorted(starts, name, side="right") - 1
    given = list(GIVEN.finditer(source))
    files = np.searchsorted(starts, [match.start(1) for match in given], side="right") - 1
    given_again: dict[int, int] = {}
    following: dict[tuple[int, bytes], int] = {}
    for match, of in zip(reversed(given), reversed(files.tolist()), strict=True):
        given_again[match.start(1)] = following.get((of, match[1]), int(ends[of]))
        following[of, match[1]] = match.start(1)
    until = np.array([given_again[place] for place in name.tolist()])
    return Facts(starts[file], name, value, end, until)


@functools.cache
def values_of_library() -> collections.Counter[bytes]:
    """How often each value is given, in all splits."""
    sources = (files_of(split)[0].numpy().tobytes() for split in SPLITS)
    return collections.Counter(match[2] for source in sources for match in FACT.finditer(source))


PLACES = (lambda match: match.start(1), lambda match: match.start(2), lambda match: match.end(2))
