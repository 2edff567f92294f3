"""Fact extraction from real text: which value did the passage assign to a name?"""

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
"""A line that assigns a value of 4 to 24 bytes to a name."""
ASSIGNMENT = re.compile(rb"^[ \t]*([A-Za-z_][A-Za-z0-9_.]*)[ \t]*(?::[^\n=]*)?[-+*/|&^%@<>]{0,2}=(?!=)", re.MULTILINE)
"""A line that assigns any value to a name, or modifies its value in place."""


class Facts(NamedTuple):
    """The n facts of a split, as offsets into its bytes; each field is [n]."""

    file: NDArray[np.int64]
    """Start of the file that contains the fact."""
    name: NDArray[np.int64]
    """Start of the name."""
    value: NDArray[np.int64]
    """Start of the value."""
    end: NDArray[np.int64]
    """End of the value, where the line ends."""
    until: NDArray[np.int64]
    """End of the file, or the next assignment to the name: the question must not come later."""


@register("task", "fact-extraction")
@dataclass(frozen=True, kw_only=True)
class FactExtraction(Task):
    r"""Read a passage of Python source, byte by byte, and answer a question about one of its assignments.

        passage     …width = 0.5*scale\nheight = rows - 1\nfor row in…
        question    \nwidth =
        answer      0.5*scale\n

    The assignment ends `distance` bytes before the question, with a distance of 1 to `length` − 1. In tests the
    distance is uniform; in training its logarithm is, so that a short memory can learn from some of the questions. A
    fact is drawn again if its file is too short, or if a line in between assigns the name another value.

    The value occurs in no other assignment of the library, and is not the name itself (as in `self.month = month`), so
    that the answer can only be known from the passage. An answer counts if all of its bytes are right, as they would be
    in a greedy continuation; SWDE and FDA are scored similarly, by whether the continuation contains the answer. The
    splits consist of the same files as those of the task `text`.

    Source:
        After Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff",
        section 3 and appendix; the paper's recall table.
    """

    length: int = 512
    """Maximum number of bytes in the passage."""
    labels: Literal["text", "answer"] = "text"
    """Targets in training: every byte, as in a language model, or the answer only. Validation and test score the
    answer only."""

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
            question_at = int(facts.end[i]) + distance
            begin = max(int(facts.file[i]), question_at - self.length)
            if begin <= facts.name[i] and question_at <= facts.until[i]:
                line = source[facts.name[i] : facts.end[i] + 1]
                question = np.concatenate([source[begin:question_at], np.frombuffer(b"\n", np.uint8), line])
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
        """Draw the number of bytes between a fact and its question."""
        if split == "train":
            return int((self.length - 1) ** float(torch.rand((), generator=generator, dtype=torch.float64)))
        return int(torch.randint(1, self.length, (), generator=generator))


@functools.cache
def facts_of(split: Split) -> Facts:
    """Find all facts in a split's files that can only be known from the passage."""
    text, begins = files_of(split)
    source = text.numpy().tobytes()
    starts = begins.nonzero()[:, 0].numpy()
    ends = np.append(starts[1:], len(source))
    times = values_of_library()
    facts = [m for m in FACT.finditer(source) if times[m[2]] == 1 and m[2] != m[1].rpartition(b".")[2]]
    name, value, end = (np.array([place(match) for match in facts]) for place in PLACES)
    file = np.searchsorted(starts, name, side="right") - 1
    assignments = list(ASSIGNMENT.finditer(source))
    files = np.searchsorted(starts, [match.start(1) for match in assignments], side="right") - 1
    reassigned: dict[int, int] = {}
    following: dict[tuple[int, bytes], int] = {}
    for match, of in zip(reversed(assignments), reversed(files.tolist()), strict=True):
        reassigned[match.start(1)] = following.get((of, match[1]), int(ends[of]))
        following[of, match[1]] = match.start(1)
    until = np.array([reassigned[place] for place in name.tolist()])
    return Facts(starts[file], name, value, end, until)


@functools.cache
def values_of_library() -> collections.Counter[bytes]:
    """Count how often each value is assigned, over all splits."""
    sources = (files_of(split)[0].numpy().tobytes() for split in SPLITS)
    return collections.Counter(match[2] for source in sources for match in FACT.finditer(source))


PLACES = (lambda match: match.start(1), lambda match: match.start(2), lambda match: match.end(2))
