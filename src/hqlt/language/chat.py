"""Answers in a conversation, for which nothing is read twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from hqlt.data import Tokenizer
from hqlt.data.tokenizer import TextStream
from hqlt.language import generation
from hqlt.language.encoder import CachedEncoder
from hqlt.language.template import PLAIN_ENDS, Message, chat_tokens, end_tokens, is_plain
from hqlt.memory import MemoryState
from hqlt.model import HQLTForCausalLM
from hqlt.state import PrefixStore, load_notes, load_state, save_state


class TextUntil:
    """A text that comes bit by bit, up to the first of some `ends`; what may be the beginning of one is held back."""

    def __init__(self, ends: Sequence[str]) -> None:
        self.ends = ends
        self.ended = False
        self.waiting = ""

    def add(self, text: str) -> str:
        """More of it; what is now certain to stand before any end."""
        if self.ended:
            return ""
        self.waiting += text
        places = [place for end in self.ends if (place := self.waiting.find(end)) >= 0]
        self.ended = bool(places)
        begun = (n for end in self.ends for n in range(1, len(end)) if self.waiting.endswith(end[:n]))
        certain = min(places) if places else len(self.waiting) - max(begun, default=0)
        out, self.waiting = self.waiting[:certain], self.waiting[certain:]
        return out

    def rest(self) -> str:
        """What was held back, where no end has come."""
        out, self.waiting = "" if self.ended else self.waiting, ""
        return out


class Speech:
    """One answer as it is made: its text, until it ends, and when it began."""

    def __init__(self, stream: TextStream, eos: Sequence[int], ends: Sequence[str], told: Callable[[str], object]):
        self.stream, self.eos, self.told = stream, eos, told
        self.until = TextUntil(ends)
        self.text = ""
        self.made: list[int] = []
        self.first: float | None = None

    def add(self, tokens: Sequence[int]) -> bool:
        """All tokens so far; whether the answer ends here."""
        self.first = self.first or time.perf_counter()
        for token in tokens[len(self.made) :]:
            self.made.append(token)
            if token in self.eos:
                return True
            self.say(self.until.add(self.stream.add(token)))
            if self.until.ended:
                return True
        return False

    def say(self, text: str) -> None:
        if text:
            self.text += text
            self.told(text)

    def end(self) -> None:
        """Say what was held back."""
        self.say(self.until.add(self.stream.end()))
        self.say(self.until.rest())


class Answer(NamedTuple):
    """What a model says, and what it took."""

    text: str
    read: int
    """Tokens of the conversation that were read for it."""
    reused: int
    """Those before them, whose state was there."""
    made: int
    """Tokens of the answer."""
    first: float
    """Seconds until its first token."""
    seconds: float
    """Seconds in all."""
    state_bytes: int
    """What the state after it takes, whatever was read."""
    interrupted: bool = False
    """Whether Ctrl-C ended it."""

    def __str__(self) -> str:
        rate = (self.made - 1) / max(self.seconds - self.first, 1e-9)
        speed = f" at {rate:,.0f} per second" if self.made > 1 else ""
        size = f"{self.state_bytes / 1e6:,.1f} MB" if self.state_bytes >= 1e6 else f"{self.state_bytes / 1e3:.1f} kB"
        return (
            f"first token after {self.first:.2f} s · tokens: {self.read:,} read, {self.reused:,} reused, "
            f"{self.made:,} made{speed} · state {size}"
        )


class Chat:
    """A model in conversation. A conversation is its messages alone, a value: a shorter one is a turn taken back, two
    that begin alike are forks, and whatever begins a conversation and was read before is not read again.

    >>> chat = Chat(model, tokenizer)
    >>> asked = [{"role": "user", "content": "Where is the Louvre?"}]
    >>> answer = chat.answer(asked, print)
    >>> other = chat.answer(asked, print)            # reads one token

    store: where the states are, those before and after each answer; the greedy answers are the same without them.
    drafts: given the tokens of a conversation, where those of the answer are guessed.
    """

    def __init__(
        self,
        model: HQLTForCausalLM,
        tokenizer: Tokenizer,
        store: PrefixStore | None = None,
        drafts: Callable[[Sequence[int]], generation.Drafts | None] = lambda tokens: None,
    ) -> None:
        self.model, self.tokenizer, self.drafts = model, tokenizer, drafts
        self.store = PrefixStore(model) if store is None else store
        self.encode = CachedEncoder(tokenizer)
        self.eos = end_tokens(model, tokenizer)
        self.ends = PLAIN_ENDS if is_plain(tokenizer) else ()

    def answer(
        self,
        messages: Sequence[Message],
        told: Callable[[str], object],
        *,
        max_new_tokens: int = 512,
        reading: Callable[[int], AbstractContextManager[Any]] = lambda tokens: nullcontext(),
        **choice: Any,
    ) -> Answer:
        """The answer to the last message, at most so many tokens of it; told(text): as it comes.

        reading: given the number of tokens of the conversation, a context for it, which gives what is called with how
        many are reused and then with how many are read, chunk by chunk. choice: sampling options of
        `hqlt.language.generation.continue_text`. Ctrl-C ends an answer that has begun; before that it is a
        KeyboardInterrupt.

        Raises ValueError for messages that the template refuses.
        """
        began = time.perf_counter()
        ids = chat_tokens(self.tokenizer, messages, encode=self.encode)
        with reading(len(ids)) as read_told:
            past, length = generation.prefill_from_store(self.store, self.model, ids, read_told)
        speech = Speech(self.tokenizer.stream(after=ids[-1:]), self.eos, self.ends, told)
        interrupted = False
        try:
            made, past = generation.continue_text(
                self.model,
                past,
                max_new_tokens=max_new_tokens,
                eos=self.eos,
                should_stop=lambda made: speech.add(made[0].tolist()),
                drafts=self.drafts(ids),
                **choice,
            )
            self.store.put([*ids, *made[0, :-1].tolist()], past.states)
        except KeyboardInterrupt:
            interrupted = True
        speech.end()
        now = time.perf_counter()
        size = sum(state.bytes_per_row() for state in past.states)
        first = (speech.first or now) - began
        return Answer(speech.text, len(ids) - length, length, len(speech.made), first, now - began, size, interrupted)

    def takes_system(self) -> bool:
        """Whether the chat template has a place for a system message."""
        asked = {"role": "user", "content": "a"}
        try:
            with_one = chat_tokens(self.tokenizer, [{"role": "system", "content": "b"}, asked])
        except ValueError:
            return False
        return with_one != chat_tokens(self.tokenizer, [asked])

    def save(self, path: Path, messages: Sequence[Message]) -> None:
        """To a file of `hqlt.save_state`: the messages, and the state after them.

        Raises ValueError where nothing has been said, OSError where it cannot be written.
        """
        if not messages:
            raise ValueError("save: expected a conversation, got one without messages")
        ids = chat_tokens(self.tokenizer, [*messages, {"role": "user", "content": "a"}])
        length, states = self.store.find(ids)
        notes = {"messages": [dict(message) for message in messages], "tokens": ids[:length]}
        save_state(path, states, self.model, notes=json.dumps(notes, ensure_ascii=False))

    def load(self, path: Path) -> list[Message]:
        """What `save` wrote, of this model; the next answer reads only what is new.

        Raises ValueError for another file, and for another model's.
        """
        states = load_state(path, self.model, device=self.model.device)
        try:
            notes = json.loads(load_notes(path))
            messages: list[Message] = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in notes["messages"]
            ]
            tokens = [int(token) for token in notes["tokens"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected a conversation, as `hqlt chat` saves it, got a state alone") from error
        self.store.put(tokens, () if isinstance(states, MemoryState) else states)
        return messages
