"""Answers in OpenAI's two forms: chat completions and completions, whole or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from hqlt.data import Tokenizer
from hqlt.serve.answer import Answer, Piece
from hqlt.serve.sampling import Likely

Json = dict[str, Any]


class Form:
    """One answer's outer form, and what its choices look like."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    kind_of_chunk: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], answer: Answer) -> Json:
        """The answer, from all of its pieces."""
        choices = []
        for i in range(len(answer.texts)):
            own = [piece for piece in pieces if piece.choice == i]
            tokens = [token for piece in own for token in piece.tokens]
            text, reason = "".join(piece.text for piece in own), own[-1].reason
            choices.append(self._choice(i, self.text(text), tokens, reason))
        return self.head | {"object": self.kind, "choices": choices, "usage": usage(answer)}

    def chunk(self, piece: Piece, is_first: bool, offset: int) -> Json:
        """A chunk of a stream. is_first: of its choice; offset: characters that came before it."""
        choice = self._choice(piece.choice, self.delta(piece.text, is_first), piece.tokens, piece.reason, offset)
        return self.head | {"object": self.kind_of_chunk, "choices": [choice]}

    def last_chunk(self, answer: Answer) -> Json:
        return self.head | {"object": self.kind_of_chunk, "choices": [], "usage": usage(answer)}

    def _choice(
        self, index: int, text: Json, tokens: Sequence[tuple[int, Likely]], reason: str | None, offset: int = 0
    ) -> Json:
        logprobs = self.logprobs(tokens, offset) if tokens else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def text(self, text: str) -> Json:
        raise NotImplementedError

    def delta(self, text: str, is_first: bool) -> Json:
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[tuple[int, Likely]], offset: int) -> Json:
        raise NotImplementedError


class ChatForm(Form):
    prefix, kind, kind_of_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, is_first: bool) -> Json:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": role | ({"content": text} if text or is_first else {})}

    def logprobs(self, tokens: Sequence[tuple[int, Likely]], offset: int) -> Json:
        def entry(token: int, logprob: float) -> Json:
            spelled = self.tokenizer.spelling(token)
            return {"token": spelled, "logprob": logprob, "bytes": bytes_of(spelled)}

        content = [
            entry(token, its.logprob) | {"top_logprobs": [entry(other, logprob) for other, logprob in its.top]}
            for token, its in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    def text(self, text: str) -> Json:
        return {"text": text}

    def delta(self, text: str, is_first: bool) -> Json:
        return {"text": text}

    def logprobs(self, tokens: Sequence[tuple[int, Likely]], offset: int) -> Json:
        spelled = [self.tokenizer.spelling(token) for token, _ in tokens]
        return {
            "tokens": spelled,
            "token_logprobs": [its.logprob for _, its in tokens],
            "top_logprobs": [{self.tokenizer.spelling(i): logprob for i, logprob in its.top} for _, its in tokens],
            "text_offset": [offset + sum(map(len, spelled[:i])) for i in range(len(spelled))],
        }


def bytes_of(spelled: str) -> list[int] | None:
    """A token's own bytes; None for a part of a character, whose spelling does not tell."""
    return None if "\N{REPLACEMENT CHARACTER}" in spelled else list(spelled.encode())


def usage(answer: Answer) -> Json:
    prompt, made = answer.prompt_tokens, answer.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
