"""One model behind one engine: from what is asked, to tokens, to an answer."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hqlt.data import Tokenizer
from hqlt.language.encoder import CachedEncoder
from hqlt.language.template import PLAIN_ENDS, chat_tokens, end_tokens, is_plain
from hqlt.serve.answer import Answer, Outbox
from hqlt.serve.engine import Engine
from hqlt.serve.errors import Refused
from hqlt.serve.request import Request
from hqlt.serve.schema import Asked, ChatAsked, CompletionAsked


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_body: int = 16 << 20
    """Bytes (413)."""
    max_prompt: int = 1 << 20
    """Tokens of a prompt (400)."""
    max_tokens: int = 16_384
    """Tokens of a continuation (400), and how many a chat answer has at most where the request does not say."""
    timeout: float = 600.0
    """From a request to the end of its answer (408)."""


class Service:
    """What the HTTP routes call. Made and used in the event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits) -> None:
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.created = int(time.time())
        self.outbox = Outbox()
        self._encoder = ThreadPoolExecutor(1, "hqlt-encode")  # one at a time: tokenizers have a state while they encode
        self._encode = CachedEncoder(tokenizer)
        self._ends = {*end_tokens(engine.model, tokenizer)}
        self._chat_ends = PLAIN_ENDS if is_plain(tokenizer) else ()

    def close(self) -> None:
        """End what runs, and store what it has read."""
        self.engine.close()
        self._encoder.shutdown()

    async def complete(self, asked: CompletionAsked, salt: str) -> tuple[Request, Answer]:
        """Submits it. Raises Refused for what it must not or cannot be, and what `Engine.submit` raises."""
        text, vocabulary = asked.text, self.engine.model.config.vocab_size
        tokens = asked.tokens
        if text is not None:
            tokens = await self._encoded("prompt", lambda: self.tokenizer.encode_prompt(text))
        if text is None and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise Refused(400, f"prompt: expected tokens from 0 to {vocabulary - 1}", "prompt", "invalid_value")
        return self._submit(asked, tokens, "prompt", asked.stops, asked.max_tokens or 16, (), salt)

    async def chat(self, asked: ChatAsked, salt: str) -> tuple[Request, Answer]:
        """As `complete`, for a conversation."""
        messages = [message.plain() for message in asked.messages]
        encode = functools.partial(self._encode, salt=salt)
        tokens, mark = await self._encoded(
            "messages",
            lambda: (chat_tokens(self.tokenizer, messages, encode=encode), self._system(messages, encode)),
        )
        most = asked.max_completion_tokens or asked.max_tokens or self.limits.max_tokens
        marks = [common(tokens, mark)] if mark else []
        return self._submit(asked, tokens, "messages", [*asked.stops, *self._chat_ends], most, marks, salt)

    def _system(self, messages: Sequence[dict[str, str]], encode: Callable[[str], list[int]]) -> list[int]:
        """The tokens of a system message, which other conversations may share."""
        if messages[0]["role"] != "system" or len(messages) == 1:
            return []
        try:
            return chat_tokens(self.tokenizer, messages[:1], add_generation_prompt=False, encode=encode)
        except ValueError:  # a template may ask for a user's message, too
            return []

    async def _encoded(self, param: str, encode: Callable[[], Any]) -> Any:
        """Raises Refused for what a chat template refuses, and for what is no text (half of a surrogate pair)."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except (ValueError, TypeError) as error:
            said = str(error)
            raise Refused(
                400, said if said.startswith(param) else f"{param}: {said}", param, "invalid_value"
            ) from error

    def _submit(
        self,
        asked: Asked,
        tokens: list[int],
        param: str,
        stops: Sequence[str],
        most: int,
        marks: Sequence[int],
        salt: str,
    ) -> tuple[Request, Answer]:
        limits = self.limits
        self._check(param, len(tokens), 1, limits.max_prompt, "tokens of a prompt")
        self._check("max_tokens", most, 1, limits.max_tokens, "tokens of an answer")
        self._check("n", asked.n, 1, self.engine.max_batch_size, "continuations")
        answer = Answer(self.outbox, self.tokenizer, tokens, stops, asked.n)
        request = Request(
            tokens=tokens, listener=answer, max_tokens=most, n=asked.n, temperature=asked.temperature,
            top_p=asked.top_p, seed=asked.seed, ends=self._ends, logprobs=asked.top, salt=salt, marks=marks,
            deadline=time.monotonic() + limits.timeout,
        )  # fmt: skip
        self.engine.submit(request)
        return request, answer

    @staticmethod
    def _check(param: str, value: int, least: int, most: int, what: str) -> None:
        if not least <= value <= most:
            message = f"{param}: expected {least} to {most:,} {what}, got {value:,}"
            raise Refused(400, message, param, "limit_exceeded")


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
