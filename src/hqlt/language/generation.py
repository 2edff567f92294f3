"""Text generation from a state: a text is read once, in chunks, and continued any number of times, also from a file."""

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

PREFILL_CHUNK = 1024
"""Tokens per forward pass over a prompt, which bounds the activation memory."""
LOOKUP_TOKENS = 10
"""Tokens that prompt lookup proposes at a time."""


class Past(NamedTuple):
    """What a model has read of one text: the states after all tokens except the last, and the last token."""

    states: tuple[MemoryState, ...]
    """One per layer, with one row; () if the text is a single token."""
    unread: int
    """The last token. Reading it gives the logits of the next token, so it is read when generation starts."""


class Drafts(NamedTuple):
    """Speculative decoding: tokens are proposed, and the model checks several in one call. The text stays the same.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; transformers' assisted
    generation and prompt lookup.
    """

    text: Sequence[int]
    """The tokens before the continuation, or the latest of them; the last one has not been read yet."""
    model: HQLTForCausalLM | None = None
    """A smaller model with the same tokenizer; None for prompt lookup, which proposes what followed the last tokens at
    an earlier place in the text."""

    def generate_options(self) -> dict[str, Any]:
        """Options of `generate`."""
        if self.model is None:
            return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        return {"assistant_model": self.model}


def prefill(
    model: HQLTForCausalLM,
    tokens: Sequence[int],
    past: Past | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Past:
    """Read a text from its beginning, or after `past`.

    Args:
        model: the language model.
        tokens (t): the text.
        past: what has been read before; None if the text begins here.
        on_progress: called after each chunk with the number of tokens read in it.

    Returns:
        The past after the text.

    Raises:
        ValueError: when there are no tokens and no past.
    """
    tokens = [*([past.unread] if past else []), *tokens]
    if not tokens:
        raise ValueError("expected a text of at least one token, got an empty one and no state to continue from")
    cache = HQLTCache.from_states(past.states) if past else HQLTCache()
    *before, last = tokens
    with torch.no_grad():
        for chunk in torch.tensor(before, dtype=torch.long, device=model.device).split(PREFILL_CHUNK):
            if len(chunk):
                model.model(chunk[None], past_key_values=cache)
            if on_progress is not None:
                on_progress(len(chunk))
    return Past(cache.states, last)


def prefill_from_store(
    store: PrefixStore, model: HQLTForCausalLM, tokens: Sequence[int], on_progress: Callable[[int], None] | None = None
) -> tuple[Past, int]:
    """Read a text after its longest stored prefix, and store the state after it.

    Args:
        store: where states are looked up and stored.
        model: the language model.
        tokens (t): the text.
        on_progress: called first with the length of the stored prefix, then as in `prefill`.

    Returns:
        The past after the text, and the length of the stored prefix.

    Raises:
        ValueError: when there are no tokens.
    """
    length, states = store.find(tokens)
    past = Past(states, tokens[length]) if length else None
    if on_progress is not None:
        on_progress(length)
    past = prefill(model, tokens[length + bool(length) :], past, on_progress)
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
    should_stop: Callable[[Tensor], bool] | None = None,
    drafts: Drafts | None = None,
) -> tuple[Tensor, Past]:
    """Generate continuations of a text.

    Args:
        model: the language model.
        past: what the model has read; it stays valid for other continuations.
        max_new_tokens: maximum length of each continuation.
        num_return_sequences: number of continuations.
        temperature: divides the logits before sampling; 0 decodes greedily.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.
        top_k: sample from this many of the most likely tokens; None for all.
        greedy: always choose the most likely token.
        seed: seeds torch's generator; None leaves it as it is.
        eos: token ids that end a text. A row that ends early is padded with the first of them.
        streamer: receives tokens as they are generated.
        should_stop: called after each step with the new tokens [n, t]; returning True ends all rows.
        drafts: speculative decoding, for a single continuation.

    Returns:
        The new tokens [n, t], and the past after the first continuation.
    """
    cache = HQLTCache()
    columns = [past.unread]
    if past.states:
        # `generate` does not need the tokens that were read: one column stands for all of them, except with drafts.
        columns = [past.unread, past.unread]
        if drafts is not None and len(drafts.text) > 1:
            columns = [*drafts.text]
        cache = HQLTCache.from_states(
            [state.repeat(num_return_sequences) for state in past.states], seen_tokens=len(columns) - 1
        )
    prompt = torch.tensor([columns] * num_return_sequences, device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if not greedy and temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k or 0}
    if eos:
        sampling["eos_token_id"] = [*eos]
    if should_stop is not None:
        sampling["stopping_criteria"] = StoppingCriteriaList([StoppingCriterion(should_stop, len(columns))])
    if drafts is not None:
        sampling |= drafts.generate_options()
    if seed is not None:
        torch.manual_seed(seed)
    untyped: Any = model
    with quiet_transformers():  # its assisted generation warns about arguments that it passes itself
        generated = untyped.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **{CACHE: cache},
            max_new_tokens=max_new_tokens,
            pad_token_id=next(iter(eos), 0),
            streamer=streamer,
            return_dict_in_generate=True,
            **sampling,
        )
    new = generated.sequences[:, len(columns) :]
    return new, Past(tuple(state.select([0]) for state in cache.states), int(new[0, -1]))


class StoppingCriterion(NamedTuple):
    """A stopping criterion for `generate` that looks at the new tokens and stops all rows at once."""

    should_stop: Callable[[Tensor], bool]
    prompt_length: int

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        return ids.new_full(ids.shape[:1], self.should_stop(ids[:, self.prompt_length :]), dtype=torch.bool)


def save_past(path: str | Path, past: Past, model: HQLTForCausalLM) -> None:
    """Save a past with `hqlt.save_state`, including the unread token."""
    save_state(path, past.states, model, unread=torch.tensor([past.unread]))


def load_past(path: str | Path, model: HQLTForCausalLM) -> Past:
    """Load what `save_past` wrote. Raises ValueError if the file is damaged or of another model."""
    states = load_state(path, model, device=model.device)
    unread = load_unread(path)
    if isinstance(states, MemoryState) or unread is None or len(unread) != 1:
        raise ValueError(f"{path}: expected the state of one text, with its last token, as `hqlt generate` saves it")
    return Past(states, int(unread))


class TextStreamer(BaseStreamer):
    """Decodes the tokens of `generate` and calls `on_text(row, text)` whenever a row has more text.

    Args:
        tokenizer: the tokenizer.
        rows: number of continuations.
        eos: token ids that end a row; they and what follows are not decoded.
        on_text: called with the row and its new text.
    """

    def __init__(
        self, tokenizer: Tokenizer, rows: int, eos: Sequence[int], on_text: Callable[[int, str], object]
    ) -> None:
        self.tokenizer = tokenizer
        self.streams: list[TextStream] = []
        self.ended = [False] * rows
        self.eos = eos
        self.on_text = on_text

    def put(self, value: Tensor) -> None:
        if not self.streams:  # the first call passes the prompt
            self.streams = [self.tokenizer.stream(after=row[-1:]) for row in value.tolist()]
            return
        for tokens in value.reshape(len(self.streams), -1).T.tolist():  # several at once if drafts were accepted
            for row, token in enumerate(tokens):
                self.ended[row] |= token in self.eos
                if not self.ended[row]:
                    self.on_text(row, self.streams[row].add(token))

    def end(self) -> None:
        for row, stream in enumerate(self.streams):
            self.on_text(row, stream.end())
