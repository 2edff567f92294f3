"""A key hidden in a long text, asked for at its end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.data import Tokenizer
from hqlt.model import HQLTCache, HQLTForCausalLM

PIECE = 1024
SHORTEST = 1000


class Haystack(NamedTuple):
    """What a row reads: introduction, filler with the fact somewhere in it, question."""

    name: str
    introduction: str
    fact: str
    """With {key} where the key stands."""
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
    """A fact in real text, mentioned once."""
    fact = "\nThe best thing to remember about this text is the number {key}.\n"
    return Haystack("needle", "", fact, "\nThe best thing to remember about this text is the number", filler)


class Found(NamedTuple):
    length: int
    depth: float
    """Where the fact stands: 0 at the beginning, 1 just before the question."""
    trials: int
    right: int
    tokens_right: float
    """The share of the keys' tokens that are the likeliest, given the key's tokens before."""


def retrieval(
    model: HQLTForCausalLM,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 4,
    seed: int = 0,
    told: Callable[[int], None] | None = None,
) -> list[Found]:
    """How often a greedy answer is the key, by length and depth.

    Texts are made as they are read, one row a depth, so that what is held depends on neither length nor trials. Each
    key has five digits. told: called with the number of columns read, after each piece.
    """
    filler, question = tokenizer.encode(haystack.filler), tokenizer.encode(haystack.question)
    results, chance = [], random.Random(seed)
    for length in lengths:
        found: list[list[tuple[bool, float]]] = [[] for _ in depths]
        for _ in range(trials):
            keys = [f"{chance.randrange(10**5):05d}" for _ in depths]
            places = zip(keys, depths, strict=True)
            texts = [text_of(tokenizer, haystack, filler, key, length, depth) for key, depth in places]
            # as it goes on from the question: by itself it might begin with another blank
            answers = [tokenizer.encode(f"{haystack.question} {key}")[len(question) :] for key in keys]
            for of_depth, ids, hit in zip(found, answers, answer(model, texts, answers, told), strict=True):
                of_key = [named for token, named in zip(ids, hit, strict=True) if tokenizer.decode([token]).strip()]
                of_depth.append((all(hit), sum(of_key) / len(of_key)))
        for depth, of_depth in zip(depths, found, strict=True):
            right, shares = map(sum, zip(*of_depth, strict=True))
            results.append(Found(length, depth, trials, int(right), shares / trials))
    return results


def text_of(
    tokenizer: Tokenizer, haystack: Haystack, filler: Sequence[int], key: str, length: int, depth: float
) -> Iterator[int]:
    """`length` tokens, one by one; filler: the haystack's, as tokens.

    Raises ValueError where the fact and the question alone are longer.
    """
    introduction = [*tokenizer.prefix_ids, *tokenizer.encode(haystack.introduction)]
    question = tokenizer.encode(haystack.question)
    fact = tokenizer.encode(haystack.fact.format(key=key))
    room = length - len(introduction) - len(fact) - len(question)
    if room < 0:
        raise ValueError(
            f"length: expected at least {length - room} tokens, as the fact and its question have, got {length}"
        )
    endless = itertools.cycle(filler)
    before = round(room * depth)
    return itertools.chain(
        introduction, itertools.islice(endless, before), fact, itertools.islice(endless, room - before), question
    )


@torch.no_grad()
def answer(
    model: HQLTForCausalLM,
    texts: Sequence[Iterator[int]],
    answers: Sequence[Sequence[int]],
    told: Callable[[int], None] | None = None,
) -> list[list[bool]]:
    """For each text and each token of its answer: is it the likeliest, given the text and the answer so far?

    All of them are exactly where greedy decoding writes the answer.
    """
    cache = HQLTCache()
    last: Tensor | None = None
    while columns := [list(itertools.islice(text, PIECE)) for text in texts]:
        if not columns[0]:
            break
        output = model.model(torch.tensor(columns, device=model.device), past_key_values=cache)
        last = output.last_hidden_state[:, -1:]
        if told is not None:
            told(len(columns[0]))
    assert last is not None, "a text has at least a question"
    longest = max(map(len, answers))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in answers], device=model.device)
    following = model.model(padded[:, :-1], past_key_values=cache).last_hidden_state if longest > 1 else last[:, :0]
    likeliest = model.lm_head(torch.cat([last, following], dim=1)).argmax(dim=-1)
    hits = (likeliest == padded).tolist()
    return [row[: len(asked)] for row, asked in zip(hits, answers, strict=True)]


def lengths_up_to(longest: int) -> list[int]:
    """1,000, then four times as long each time, and the longest."""
    lengths = list(itertools.takewhile(lambda n: n < longest, (SHORTEST * 4**i for i in range(32))))
    return [*lengths, longest]
