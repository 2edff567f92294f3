"""Key retrieval: hide a key in a long text and ask for it at the end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.data import Tokenizer
from hqlt.model import HQLTCache, HQLTForCausalLM

CHUNK = 1024
"""Tokens per row and forward pass."""
SHORTEST = 1000
"""Tokens of the shortest text."""


class Haystack(NamedTuple):
    """The parts of a text: introduction, filler with the fact somewhere inside, question."""

    name: str
    introduction: str
    fact: str
    """Contains {key} in place of the key."""
    question: str
    filler: str
    """Repeated as often as needed."""


PASSKEY = Haystack(
    "passkey",
    "There is important information hidden in a lot of irrelevant text. Find it and memorize it.\n",
    "The pass key is {key}. Remember it. {key} is the pass key.\n",
    "What is the pass key? The pass key is",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
)
"""Mohtashami & Jaggi 2023, "Landmark Attention", section 4.2."""


def needle(filler: str) -> Haystack:
    """Make a haystack of real text, with the fact mentioned once."""
    fact = "\nThe best thing to remember about this text is the number {key}.\n"
    return Haystack("needle", "", fact, "\nThe best thing to remember about this text is the number", filler)


class RetrievalScore(NamedTuple):
    """How often the key was found at one length and depth."""

    length: int
    """Number of tokens in the text."""
    depth: float
    """Position of the fact: 0 at the beginning, 1 just before the question."""
    trials: int
    """Number of texts."""
    right: int
    """Number of texts for which the greedy answer is the key."""
    tokens_right: float
    """Share of the keys' tokens that are the most likely ones given the key's tokens before them."""


def retrieval(
    model: HQLTForCausalLM,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 4,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[RetrievalScore]:
    """Measure how often the greedy answer is the key, by length and depth.

    Texts are generated while they are read, one row per depth, so that memory use depends on neither their length nor
    the number of trials.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        haystack: the kind of text.
        lengths: numbers of tokens.
        depths: positions of the fact, from 0 (beginning) to 1 (just before the question).
        trials: keys per length and depth; each has five random digits.
        seed: of the keys.
        on_progress: called after each chunk with its number of tokens per row.

    Returns:
        One score for each length and depth.

    Raises:
        ValueError: if a length has no room for the fact and the question.
    """
    filler, question = tokenizer.encode(haystack.filler), tokenizer.encode(haystack.question)
    results, generator = [], random.Random(seed)
    for length in lengths:
        found: list[list[tuple[bool, float]]] = [[] for _ in depths]
        for _ in range(trials):
            keys = [f"{generator.randrange(10**5):05d}" for _ in depths]
            places = zip(keys, depths, strict=True)
            texts = [haystack_tokens(tokenizer, haystack, filler, key, length, depth) for key, depth in places]
            # encoded after the question, because on its own it might begin with another space
            answers = [tokenizer.encode(f"{haystack.question} {key}")[len(question) :] for key in keys]
            for depth_results, ids, hit in zip(
                found, answers, greedy_hits(model, texts, answers, on_progress), strict=True
            ):
                key_hits = [right for token, right in zip(ids, hit, strict=True) if tokenizer.decode([token]).strip()]
                depth_results.append((all(hit), sum(key_hits) / len(key_hits)))
        for depth, depth_results in zip(depths, found, strict=True):
            right, shares = map(sum, zip(*depth_results, strict=True))
            results.append(RetrievalScore(length, depth, trials, int(right), shares / trials))
    return results


def haystack_tokens(
    tokenizer: Tokenizer, haystack: Haystack, filler: Sequence[int], key: str, length: int, depth: float
) -> Iterator[int]:
    """Generate a text of `length` tokens, one token at a time.

    Args:
        tokenizer: the model's tokenizer.
        haystack: the kind of text.
        filler: the haystack's filler, as tokens.
        key: inserted into the fact.
        length: number of tokens.
        depth: position of the fact, from 0 to 1.

    Returns:
        An iterator over tokens.

    Raises:
        ValueError: if introduction, fact and question are longer than `length`.
    """
    introduction = [*tokenizer.prefix_ids, *tokenizer.encode(haystack.introduction)]
    question = tokenizer.encode(haystack.question)
    fact = tokenizer.encode(haystack.fact.format(key=key))
    room = length - len(introduction) - len(fact) - len(question)
    if room < 0:
        raise ValueError(
            f"length: expected at least {length - room} tokens for the fact and its question, got {length}"
        )
    endless = itertools.cycle(filler)
    before = round(room * depth)
    return itertools.chain(
        introduction, itertools.islice(endless, before), fact, itertools.islice(endless, room - before), question
    )


@torch.no_grad()
def greedy_hits(
    model: HQLTForCausalLM,
    texts: Sequence[Iterator[int]],
    answers: Sequence[Sequence[int]],
    on_progress: Callable[[int], None] | None = None,
) -> list[list[bool]]:
    """For each text, tell which tokens of its answer are the most likely given the text and the answer before them.

    All of them are if and only if greedy decoding generates the answer.
    """
    cache = HQLTCache()
    last: Tensor | None = None
    while columns := [list(itertools.islice(text, CHUNK)) for text in texts]:
        if not columns[0]:
            break
        output = model.model(torch.tensor(columns, device=model.device), past_key_values=cache)
        last = output.last_hidden_state[:, -1:]
        if on_progress is not None:
            on_progress(len(columns[0]))
    assert last is not None, "a text has at least a question"
    longest = max(map(len, answers))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in answers], device=model.device)
    following = model.model(padded[:, :-1], past_key_values=cache).last_hidden_state if longest > 1 else last[:, :0]
    likeliest = model.lm_head(torch.cat([last, following], dim=1)).argmax(dim=-1)
    hits = (likeliest == padded).tolist()
    return [row[: len(answer)] for row, answer in zip(hits, answers, strict=True)]


def lengths_up_to(longest: int) -> list[int]:
    """Return 1,000, 4,000, 16,000, … and the longest."""
    lengths = list(itertools.takewhile(lambda n: n < longest, (SHORTEST * 4**i for i in range(32))))
    return [*lengths, longest]
