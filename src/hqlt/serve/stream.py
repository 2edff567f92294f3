"""From the engine's thread to the event loop: the text of a request's choices while it is generated."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from hqlt.data import Tokenizer
from hqlt.serve.sampling import TokenLogprobs
from hqlt.serve.text import StopTextStream


class Delta(NamedTuple):
    """New text of one choice."""

    choice: int
    text: str
    tokens: Sequence[tuple[int, TokenLogprobs]] = ()
    """Its tokens, if log probabilities were requested."""
    finish_reason: str | None = None
    """Why the choice ends here; None if it does not."""


class Outbox:
    """Hands events from other threads to the event loop, which is woken once for all events that wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[ResponseStream, Delta | Exception]] = deque()
        self._is_awake = False

    def put(self, stream: ResponseStream, event: Delta | Exception) -> None:
        self._waiting.append((stream, event))
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_awake = False  # first, so that events put from now on wake the loop again
        while self._waiting:
            stream, event = self._waiting.popleft()
            stream.events.append(event)
            stream.arrived.set()


class ResponseStream:
    """The `Listener` of one request in the engine's thread; in the event loop, an iterator over its deltas.

    Iteration yields all deltas that have arrived, at least one, until every choice has ended, and raises the error that
    the request failed with:

    >>> async for deltas in stream: ...

    Args:
        outbox: delivers the events.
        tokenizer: decodes tokens.
        prompt (t): the prompt's tokens.
        stops: stop strings.
        n: number of choices.
    """

    def __init__(self, outbox: Outbox, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], n: int):
        self.outbox = outbox
        self.texts = [StopTextStream(tokenizer, prompt[-1:], stops) for _ in range(n)]
        self.open_choices = n
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = len(prompt), 0, 0
        self.created_at = time.monotonic()
        self.first_token_at: float | None = None
        self.events: deque[Delta | Exception] = deque()
        self.arrived = asyncio.Event()

    def on_start(self, cached: int) -> None:
        self.cached_tokens = cached

    def on_token(self, choice: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.first_token_at = self.first_token_at or time.monotonic()
        self.completion_tokens += 1
        text, stopped = self.texts[choice].add(token)
        if text or logprobs:
            self.outbox.put(self, Delta(choice, text, [(token, logprobs)] if logprobs else ()))
        return stopped

    def on_end(self, choice: int, reason: str) -> None:
        self.outbox.put(self, Delta(choice, self.texts[choice].end(), finish_reason=reason))

    def on_error(self, error: Exception) -> None:
        self.outbox.put(self, error)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        while self.open_choices:
            await self.arrived.wait()
            self.arrived.clear()
            deltas: list[Delta] = []
            error = None
            while self.events and error is None:
                event = self.events.popleft()
                if isinstance(event, Exception):
                    error = event
                else:
                    deltas.append(event)
                    self.open_choices -= event.finish_reason is not None
            if deltas:
                yield deltas
            if error is not None:
                raise error
