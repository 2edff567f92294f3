"""Tokens become text that may be given out: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hqlt.data import Tokenizer


class StoppedText:
    """One continuation's text, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], stops: Sequence[str]) -> None:
        """after: the last tokens of the prompt. stops: none of them empty."""
        self._stream = tokenizer.stream(after)
        self._stops = tuple(stops)
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False

    def add(self, token: int) -> tuple[str, bool]:
        """→ what is certain of the text by now and was not given out, and whether a stop string has come."""
        return self._given_out(self._stream.add(token))

    def end(self) -> str:
        """What is left at the continuation's end: nothing where a stop string has come."""
        if self._stopped:
            return ""
        text, stopped = self._given_out(self._stream.end())
        return text if stopped else text + self._held

    def _given_out(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            return text[: min(found)], True
        begun = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun], False


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters the stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
