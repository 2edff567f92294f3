"""Requests to the engine, and the listener that receives their tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hqlt.serve.sampling import TokenLogprobs


class QueueFull(Exception):
    """The queue of waiting requests is full."""


class DeadlineExceeded(Exception):
    """A request has taken longer than allowed."""


class EngineClosed(Exception):
    """The engine is stopping."""


class Listener(Protocol):
    """Receives the events of a request. Called in the engine's thread, so every method must return quickly.

    An exception raised here ends its own request only.
    """

    def on_start(self, cached: int) -> None:
        """The prompt is about to be read, except its first `cached` tokens, whose state was stored."""

    def on_token(self, choice: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """A choice has a new token. Returns whether the choice ends with it, as at a stop string."""

    def on_end(self, choice: int, reason: str) -> None:
        """A choice is complete; reason is "stop" or "length"."""

    def on_error(self, error: Exception) -> None:
        """The request has failed; no more events follow."""


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to be continued n times."""

    tokens: NDArray[np.int64] | Sequence[int]
    """The prompt [t], at least one token."""
    listener: Listener
    max_tokens: int
    """Maximum length of each continuation, at least 1."""
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    """The same seed gives the same continuations; None draws new ones each time."""
    end_tokens: Collection[int] = ()
    """Tokens that end a continuation; they are not passed to the listener."""
    logprobs: int | None = None
    """Number of most likely tokens reported with each token, with log probabilities; None for no log probabilities."""
    salt: str = ""
    """Separates users: states stored with another salt are not found."""
    checkpoints: Collection[int] = ()
    """Lengths of prefixes of the prompt that other prompts may share; the states there are stored as well."""
    deadline: float = math.inf
    """In the time of `time.monotonic`."""
    prompt: NDArray[np.int64] = field(init=False)
    """The tokens as an array, which avoids copying a long list for each turn."""
    finished: bool = field(default=False, init=False)
    """Set when the request is canceled or has failed; its rows are freed before the next token."""

    def __post_init__(self) -> None:
        self.prompt = np.fromiter(self.tokens, dtype=np.int64, count=len(self.tokens))

    def cancel(self) -> None:
        """Stop the request. Callable from any thread; the listener receives no more events."""
        self.finished = True

    def fail(self, error: Exception) -> None:
        if not self.finished:
            self.finished = True
            self.listener.on_error(error)
