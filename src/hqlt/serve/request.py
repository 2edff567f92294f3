"""What is asked of the engine, and who hears of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hqlt.serve.sampling import Likely


class Full(Exception):
    """As many requests wait as may."""


class Late(Exception):
    """A request's time is over."""


class Closed(Exception):
    """The engine is stopping."""


class Listener(Protocol):
    """Who hears of a request. Called in the engine's thread, so each call is to be short.

    What it raises ends its own request.
    """

    def began(self, cached: int) -> None:
        """The prompt is about to be read, but for its first `cached` tokens, which a stored state has read."""

    def token(self, choice: int, token: int, likely: Likely | None) -> bool:
        """A continuation's next token → whether it ends with it, as at a stop string."""

    def ended(self, choice: int, reason: str) -> None:
        """A continuation is whole. reason: "stop" or "length"."""

    def failed(self, error: Exception) -> None:
        """Nothing more comes of any continuation."""


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt that is to be continued in n ways."""

    tokens: NDArray[np.int64] | Sequence[int]
    """[t], at least one."""
    listener: Listener
    max_tokens: int
    """Of each continuation, at least 1."""
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    """The same continuations for the same seed; None: other ones each time."""
    ends: Collection[int] = ()
    """Tokens that end a continuation, and that the listener does not hear of."""
    logprobs: int | None = None
    """How many of the likeliest tokens are given beside each, with log p; None: no log p at all."""
    salt: str = ""
    """Whose states these are: those of another salt are neither found nor left for them."""
    marks: Collection[int] = ()
    """Lengths of the prompt's beginnings that other prompts may share: the states there are stored, too."""
    deadline: float = math.inf
    """On the clock of time.monotonic."""
    prompt: NDArray[np.int64] = field(init=False)
    """The tokens as an array: no one makes a list of a book again for each turn."""
    over: bool = field(default=False, init=False)
    """Set by `cancel`, and where it has failed: its rows are freed before the next token."""

    def __post_init__(self) -> None:
        self.prompt = np.fromiter(self.tokens, dtype=np.int64, count=len(self.tokens))

    def cancel(self) -> None:
        """Whoever asked does not want it any more. From any thread; the listener hears nothing more."""
        self.over = True

    def fail(self, error: Exception) -> None:
        if not self.over:
            self.over = True
            self.listener.failed(error)
