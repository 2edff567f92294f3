"""Tokens to text: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hqlt.data import Tokenizer


class StopTextStream:
    """Decodes the tokens of one continuation and ends at the first stop string, which is not part of the text.

    Args:
        tokenizer: decodes the tokens.
        after (t): the last tokens of the prompt.
        stops: stop strings, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream(after)
        self._stops = tuple(stops)
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False

    def add(self, token: int) -> tuple[str, bool]:
        """Add a token → the new text that certainly comes before any stop string, and whether one has been reached."""
        return self._released(self._stream.add(token))

    def end(self) -> str:
        """The text held back until the end; empty after a stop string."""
        if self._stopped:
            return ""
        text, stopped = self._released(self._stream.end())
        return text if stopped else text + self._held

    def _released(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            return text[: min(found)], True
        partial = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - partial :]
        return text[: len(text) - partial], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of the stop string that the text ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
