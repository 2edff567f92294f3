"""Answers in a conversation, of which nothing is read twice."""

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


class StopFilter:
    """Passes on streamed text up to the first of several stop strings, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.stopped = False
        self.held = ""

    def add(self, text: str) -> str:
        """Add text and return what certainly comes before any stop string."""
        if self.stopped:
            return ""
        self.held += text
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self.stopped = bool(found)
        partial = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
        certain = min(found) if found else len(self.held) - max(partial, default=0)
        out, self.held = self.held[:certain], self.held[certain:]
        return out

    def rest(self) -> str:
        """The text held back, if no stop string has come."""
        out, self.held = "" if self.stopped else self.held, ""
        return out


class AnswerStream:
    """The text of one answer while it is generated, and the time of its first token."""

    def __init__(self, stream: TextStream, eos: Sequence[int], stops: Sequence[str], on_text: Callable[[str], object]):
        self.stream, self.eos, self.on_text = stream, eos, on_text
        self.filter = StopFilter(stops)
        self.text = ""
        self.tokens: list[int] = []
        self.first_token_at: float | None = None

    def add(self, tokens: Sequence[int]) -> bool:
        """Take all tokens generated so far; returns whether the answer ends here."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        for token in tokens[len(self.tokens) :]:
            self.tokens.append(token)
            if token in self.eos:
                return True
            self._emit(self.filter.add(self.stream.add(token)))
            if self.filter.stopped:
                return True
        return False

    def _emit(self, text: str) -> None:
        if text:
            self.text += text
            self.on_text(text)

    def end(self) -> None:
        """Emit the text held back."""
        self._emit(self.filter.add(self.stream.end()))
        self._emit(self.filter.rest())


class Answer(NamedTuple):
    """The text of an answer, and what it cost."""

    text: str
    read: int
    """Tokens of the conversation that were read for it."""
    reused: int
    """Tokens of the conversation whose state was in the store."""
    generated: int
    """Tokens of the answer."""
    first_token: float
    """Seconds until its first token."""
    seconds: float
    """Seconds in all."""
    state_bytes: int
    """Size of the state after it."""
    interrupted: bool = False
    """Whether Ctrl-C ended it."""

    def __str__(self) -> str:
        rate = (self.generated - 1) / max(self.seconds - self.first_token, 1e-9)
        speed = f" at {rate:,.0f} per second" if self.generated > 1 else ""
        size = f"{self.state_bytes / 1e6:,.1f} MB" if self.state_bytes >= 1e6 else f"{self.state_bytes / 1e3:.1f} kB"
        return (
            f"first token after {self.first_token:.2f} s · tokens: {self.read:,} read, {self.reused:,} reused, "
            f"{self.generated:,} generated{speed} · state {size}"
        )


class Chat:
    """Answers messages with a language model and reads only what is new.

    A conversation is nothing but its messages: removing the last ones is an undo, and two conversations with the same
    beginning are forks. Whatever beginning of a conversation was read before is not read again.

    >>> chat = Chat(model, tokenizer)
    >>> messages = [{"role": "user", "content": "Where is the Louvre?"}]
    >>> answer = chat.answer(messages, print)
    >>> other = chat.answer(messages, print)  # reads one token

    Args:
        model: the language model.
        tokenizer: its tokenizer; without a chat template, the plain template is used.
        store: holds the states before and after each answer; default: a new store in memory. Greedy answers do not
            depend on it.
        drafts: maps the tokens of a conversation to speculative decoding of the answer, or None.
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
        self.stops = PLAIN_ENDS if is_plain(tokenizer) else ()

    def answer(
        self,
        messages: Sequence[Message],
        on_text: Callable[[str], object],
        *,
        max_new_tokens: int = 512,
        progress: Callable[[int], AbstractContextManager[Any]] = lambda tokens: nullcontext(),
        **sampling: Any,
    ) -> Answer:
        """Answer the last message.

        Ctrl-C ends an answer that has begun; before that it raises KeyboardInterrupt.

        Args:
            messages: the conversation; the last message is the user's.
            on_text: called with new text as it is generated.
            max_new_tokens: maximum length of the answer.
            progress: called with the number of tokens of the conversation. Returns a context manager whose value is
                called with the number of tokens that are reused, then with the number read in each chunk.
            sampling: options of `hqlt.language.generation.continue_text`, such as temperature.

        Returns:
            The answer.

        Raises:
            ValueError: when the chat template refuses the messages.
        """
        began = time.perf_counter()
        ids = chat_tokens(self.tokenizer, messages, encode=self.encode)
        with progress(len(ids)) as on_progress:
            past, length = generation.prefill_from_store(self.store, self.model, ids, on_progress)
        stream = AnswerStream(self.tokenizer.stream(after=ids[-1:]), self.eos, self.stops, on_text)
        interrupted = False
        try:
            tokens, past = generation.continue_text(
                self.model,
                past,
                max_new_tokens=max_new_tokens,
                eos=self.eos,
                should_stop=lambda new: stream.add(new[0].tolist()),
                drafts=self.drafts(ids),
                **sampling,
            )
            self.store.put([*ids, *tokens[0, :-1].tolist()], past.states)
        except KeyboardInterrupt:
            interrupted = True
        stream.end()
        now = time.perf_counter()
        size = sum(state.bytes_per_row() for state in past.states)
        first = (stream.first_token_at or now) - began
        return Answer(stream.text, len(ids) - length, length, len(stream.tokens), first, now - began, size, interrupted)

    def supports_system(self) -> bool:
        """Whether the chat template supports a system message."""
        question = {"role": "user", "content": "a"}
        try:
            with_one = chat_tokens(self.tokenizer, [{"role": "system", "content": "b"}, question])
        except ValueError:
            return False
        return with_one != chat_tokens(self.tokenizer, [question])

    def save(self, path: Path, messages: Sequence[Message]) -> None:
        """Save the messages and the state after them with `hqlt.save_state`.

        Raises:
            ValueError: when there are no messages.
            OSError: when the file cannot be written.
        """
        if not messages:
            raise ValueError("save: expected a conversation, got one without messages")
        ids = chat_tokens(self.tokenizer, [*messages, {"role": "user", "content": "a"}])
        length, states = self.store.find(ids)
        notes = {"messages": [dict(message) for message in messages], "tokens": ids[:length]}
        save_state(path, states, self.model, notes=json.dumps(notes, ensure_ascii=False))

    def load(self, path: Path) -> list[Message]:
        """Load a conversation that `save` wrote with this model, and put its state into the store.

        Raises:
            ValueError: when the file is not a conversation, or was saved with another model.
        """
        states = load_state(path, self.model, device=self.model.device)
        try:
            notes = json.loads(load_notes(path))
            messages: list[Message] = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in notes["messages"]
            ]
            tokens = [int(token) for token in notes["tokens"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: expected a conversation, as `hqlt chat` saves it, got a state without messages"
            ) from error
        self.store.put(tokens, () if isinstance(states, MemoryState) else states)
        return messages
