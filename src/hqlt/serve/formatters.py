"""Responses in OpenAI's two formats, chat completions and completions, complete or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from hqlt.data import Tokenizer
from hqlt.serve.sampling import TokenLogprobs
from hqlt.serve.stream import Delta, ResponseStream

Json = dict[str, Any]


class Formatter:
    """Formats one response as JSON objects."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, deltas: Sequence[Delta], stream: ResponseStream) -> Json:
        """The complete response, from all deltas of a stream."""
        choices = []
        for i in range(len(stream.texts)):
            own = [delta for delta in deltas if delta.choice == i]
            tokens = [token for delta in own for token in delta.tokens]
            text, reason = "".join(delta.text for delta in own), own[-1].finish_reason
            choices.append(self._choice(i, self.text(text), tokens, reason))
        return self.head | {"object": self.kind, "choices": choices, "usage": usage(stream)}

    def chunk(self, delta: Delta, is_first: bool, offset: int) -> Json:
        """A chunk of a stream. is_first: the first of its choice; offset: number of characters before it."""
        text = self.delta(delta.text, is_first)
        choice = self._choice(delta.choice, text, delta.tokens, delta.finish_reason, offset)
        return self.head | {"object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, stream: ResponseStream) -> Json:
        """The last chunk of a stream, with `usage` and no choices."""
        return self.head | {"object": self.chunk_kind, "choices": [], "usage": usage(stream)}

    def _choice(
        self, index: int, text: Json, tokens: Sequence[tuple[int, TokenLogprobs]], reason: str | None, offset: int = 0
    ) -> Json:
        logprobs = self.logprobs(tokens, offset) if tokens else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def text(self, text: str) -> Json:
        raise NotImplementedError

    def delta(self, text: str, is_first: bool) -> Json:
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], offset: int) -> Json:
        raise NotImplementedError


class ChatFormatter(Formatter):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, is_first: bool) -> Json:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": role | ({"content": text} if text or is_first else {})}

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], offset: int) -> Json:
        def entry(token: int, logprob: float) -> Json:
            spelling = self.tokenizer.spelling(token)
            return {"token": spelling, "logprob": logprob, "bytes": bytes_of(spelling)}

        content = [
            entry(token, its.logprob) | {"top_logprobs": [entry(other, logprob) for other, logprob in its.top]}
            for token, its in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionFormatter(Formatter):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def text(self, text: str) -> Json:
        return {"text": text}

    def delta(self, text: str, is_first: bool) -> Json:
        return {"text": text}

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], offset: int) -> Json:
        spellings = [self.tokenizer.spelling(token) for token, _ in tokens]
        return {
            "tokens": spellings,
            "token_logprobs": [its.logprob for _, its in tokens],
            "top_logprobs": [{self.tokenizer.spelling(i): logprob for i, logprob in its.top} for _, its in tokens],
            "text_offset": [offset + sum(map(len, spellings[:i])) for i in range(len(spellings))],
        }


def bytes_of(spelling: str) -> list[int] | None:
    """The UTF-8 bytes of a token; None for part of a character, whose bytes the spelling does not tell."""
    return None if "\N{REPLACEMENT CHARACTER}" in spelling else list(spelling.encode())


def usage(stream: ResponseStream) -> Json:
    prompt, completion = stream.prompt_tokens, stream.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
    }
