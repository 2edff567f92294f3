"""Continuing a text: it is read once, in chunks, and continued as often as wanted, now or from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hqlt.data import Tokenizer
from hqlt.data.tokenizer import TextStream
from hqlt.language.folder import quiet_transformers
from hqlt.memory import MemoryState
from hqlt.model import HQLTCache, HQLTForCausalLM
from hqlt.model.cache import CACHE
from hqlt.state import PrefixStore, load_state, load_unread, save_state

PIECE = 1024
"""Tokens that are read at once: what reading holds beside the memories does not grow with the text."""
LOOKED_UP = 10
"""Tokens that prompt lookup proposes at a time."""


class Past(NamedTuple):
    """What a model has read of one text: its memories after all tokens but the last, and that token."""

    states: tuple[MemoryState, ...]
    """One a layer, of one row; none where the text is a single token."""
    unread: int
    """The last token: reading it gives the logits of what follows, so it is read when that is asked for."""


class Drafts(NamedTuple):
    """Who proposes the next tokens, which the model then checks in one call: the text stays what it would have been.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; transformers' assisted
    generation and prompt lookup.
    """

    text: Sequence[int]
    """The tokens read so far, or the latest of them; the last is the one that is yet to be read."""
    model: HQLTForCausalLM | None = None
    """A smaller model of the same tokens; None: what followed the last tokens where they stood in the text before."""

    def options(self) -> dict[str, Any]:
        """For `generate`."""
        return {"prompt_lookup_num_tokens": LOOKED_UP} if self.model is None else {"assistant_model": self.model}


def read(
    model: HQLTForCausalLM, tokens: Sequence[int], past: Past | None = None, told: Callable[[int], None] | None = None
) -> Past:
    """Read a text, or continue where `past` ends.

    told: called with the number of tokens read, after each piece. Raises ValueError where there is nothing to read.
    """
    tokens = [*([past.unread] if past else []), *tokens]
    if not tokens:
        raise ValueError("expected a text of at least one token, got an empty one and no state to continue from")
    cache = HQLTCache.from_states(past.states) if past else HQLTCache()
    *before, last = tokens
    with torch.no_grad():
        for piece in torch.tensor(before, dtype=torch.long, device=model.device).split(PIECE):
            if len(piece):
                model.model(piece[None], past_key_values=cache)
            if told is not None:
                told(len(piece))
    return Past(cache.states, last)


def read_from(
    store: PrefixStore, model: HQLTForCausalLM, tokens: Sequence[int], told: Callable[[int], None] | None = None
) -> tuple[Past, int]:
    """Read a text but for its longest stored prefix, whose length comes back too, and store the state after it.

    told, and what is raised: as in `read`.
    """
    length, states = store.find(tokens)
    past = Past(states, tokens[length]) if length else None
    if told is not None:
        told(length)
    past = read(model, tokens[length + bool(length) :], past, told)
    store.put(tokens[:-1], past.states)
    return past, length


def continue_text(
    model: HQLTForCausalLM,
    past: Past,
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
    eos: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
    ended: Callable[[Tensor], bool] | None = None,
    drafts: Drafts | None = None,
) -> tuple[Tensor, Past]:
    """Generate n = `num_return_sequences` continuations of at most `max_new_tokens` tokens: [n, t], and the past after.

    greedy, or temperature 0: always the likeliest token. seed: the same continuations for the same seed; None: as
    torch's generator stands. eos: the tokens that end a text (a row that ends early is filled with the first). ended:
    shown the new tokens, [rows, t], after each one; whether all rows end there. drafts: where the next tokens are
    guessed, for one row. The past after it is the first row's.
    """
    cache = HQLTCache()
    columns = [past.unread]
    if past.states:
        # Who reads on need not be shown what was read: one column stands for all of it, but where drafts need it.
        columns = [past.unread, past.unread]
        if drafts is not None and len(drafts.text) > 1:
            columns = [*drafts.text]
        cache = HQLTCache.from_states(
            [state.repeat(num_return_sequences) for state in past.states], seen_tokens=len(columns) - 1
        )
    given = torch.tensor([columns] * num_return_sequences, device=model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if not greedy and temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k or 0}
    if eos:
        choice["eos_token_id"] = [*eos]
    if ended is not None:
        choice["stopping_criteria"] = StoppingCriteriaList([Ended(ended, len(columns))])
    if drafts is not None:
        choice |= drafts.options()
    if seed is not None:
        torch.manual_seed(seed)
    untyped: Any = model
    with quiet_transformers():  # whose drafting warns of arguments that it gives itself
        made = untyped.generate(
            given,
            attention_mask=torch.ones_like(given),
            **{CACHE: cache},
            max_new_tokens=max_new_tokens,
            pad_token_id=next(iter(eos), 0),
            streamer=streamer,
            return_dict_in_generate=True,
            **choice,
        )
    new = made.sequences[:, len(columns) :]
    return new, Past(tuple(state.select([0]) for state in cache.states), int(new[0, -1]))


class Ended(NamedTuple):
    """A stopping criterion of `generate`: whether all rows end, by their new tokens."""

    asked: Callable[[Tensor], bool]
    given: int
    """Columns before the new ones."""

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        return ids.new_full(ids.shape[:1], self.asked(ids[:, self.given :]), dtype=torch.bool)


def save_past(path: str | Path, past: Past, model: HQLTForCausalLM) -> None:
    """To a file of `hqlt.save_state`, the token that is yet to be read in it."""
    save_state(path, past.states, model, unread=torch.tensor([past.unread]))


def load_past(path: str | Path, model: HQLTForCausalLM) -> Past:
    """Read what `save_past` wrote. Raises ValueError for a broken file, and for the state of another model."""
    states = load_state(path, model, device=model.device)
    unread = load_unread(path)
    if isinstance(states, MemoryState) or unread is None or len(unread) != 1:
        raise ValueError(f"{path}: expected the state of one text, with its last token, as `hqlt generate` saves it")
    return Past(states, int(unread))


class TextStreamer(BaseStreamer):
    """What `generate` makes, as text: told(row, text) whenever a row has more of it."""

    def __init__(self, tokenizer: Tokenizer, rows: int, eos: Sequence[int], told: Callable[[int, str], object]) -> None:
        self.tokenizer = tokenizer
        self.streams: list[TextStream] = []
        self.ended = [False] * rows
        self.eos = eos
        self.told = told

    def put(self, value: Tensor) -> None:
        if not self.streams:  # generate begins with what it was given
            self.streams = [self.tokenizer.stream(after=row[-1:]) for row in value.tolist()]
            return
        for tokens in value.reshape(len(self.streams), -1).T.tolist():  # several at once where drafts were right
            for row, token in enumerate(tokens):
                self.ended[row] |= token in self.eos
                if not self.ended[row]:
                    self.told(row, self.streams[row].add(token))

    def end(self) -> None:
        for row, stream in enumerate(self.streams):
            self.told(row, stream.end())
