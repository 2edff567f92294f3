"""From the engine's thread to the event loop: what becomes of a request, as it happens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from hqlt.data import Tokenizer
from hqlt.serve.sampling import Likely
from hqlt.serve.text import StoppedText


class Piece(NamedTuple):
    """More of a continuation."""

    choice: int
    text: str
    tokens: Sequence[tuple[int, Likely]] = ()
    """Its tokens, where log p was asked for."""
    reason: str | None = None
    """Why it ends here; None: it does not."""


class Outbox:
    """Hands what threads put in to the event loop, which is woken once for all that waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Answer, Piece | Exception]] = deque()
        self._is_awake = False

    def put(self, answer: Answer, event: Piece | Exception) -> None:
        self._waiting.append((answer, event))
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_awake = False  # before looking: what comes from now on wakes the loop again
        while self._waiting:
            answer, event = self._waiting.popleft()
            answer.events.append(event)
            answer.arrived.set()


class Answer:
    """A request's listener in the engine's thread, and its pieces in the event loop.

    >>> async for pieces in answer: ...     # all that have come, at least one, until every choice has ended

    raises what the request failed of.
    """

    def __init__(self, outbox: Outbox, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], n: int):
        self.outbox = outbox
        self.texts = [StoppedText(tokenizer, prompt[-1:], stops) for _ in range(n)]
        self.open = n
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = len(prompt), 0, 0
        self.asked = time.monotonic()
        self.first: float | None = None
        """When the first token came."""
        self.events: deque[Piece | Exception] = deque()
        self.arrived = asyncio.Event()

    def began(self, cached: int) -> None:
        self.cached_tokens = cached

    def token(self, choice: int, token: int, likely: Likely | None) -> bool:
        self.first = self.first or time.monotonic()
        self.completion_tokens += 1
        text, stopped = self.texts[choice].add(token)
        if text or likely:
            self.outbox.put(self, Piece(choice, text, [(token, likely)] if likely else ()))
        return stopped

    def ended(self, choice: int, reason: str) -> None:
        self.outbox.put(self, Piece(choice, self.texts[choice].end(), reason=reason))

    def failed(self, error: Exception) -> None:
        self.outbox.put(self, error)

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        while self.open:
            await self.arrived.wait()
            self.arrived.clear()
            pieces: list[Piece] = []
            error = None
            while self.events and error is None:
                event = self.events.popleft()
                if isinstance(event, Exception):
                    error = event
                else:
                    pieces.append(event)
                    self.open -= event.reason is not None
            if pieces:
                yield pieces
            if error is not None:
                raise error
