"""One model behind one engine: from the body of a request to tokens, to a stream of text."""

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
from hqlt.serve.engine import Engine
from hqlt.serve.errors import RequestError
from hqlt.serve.request import Request
from hqlt.serve.schema import ChatRequest, CompletionRequest, RequestBody
from hqlt.serve.stream import Outbox, ResponseStream


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request; the HTTP status of a refusal is in parentheses."""

    max_body: int = 16 << 20
    """Size of the body in bytes (413)."""
    max_prompt: int = 1 << 20
    """Length of the prompt in tokens (400)."""
    max_tokens: int = 16_384
    """Length of a continuation in tokens (400); also the default of chat requests."""
    timeout: float = 600.0
    """Seconds from a request to the end of its response (408)."""


class Service:
    """Encodes and submits requests for the HTTP routes. Created and used in the event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, limits: Limits) -> None:
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.created = int(time.time())
        self.outbox = Outbox()
        self._encoder = ThreadPoolExecutor(1, "hqlt-encode")  # one thread: tokenizers have state while they encode
        self._encode = CachedEncoder(tokenizer)
        self._end_tokens = {*end_tokens(engine.model, tokenizer)}
        self._chat_stops = PLAIN_ENDS if is_plain(tokenizer) else ()

    def close(self) -> None:
        """Stop the engine, which stores the states of running requests."""
        self.engine.close()
        self._encoder.shutdown()

    async def complete(self, body: CompletionRequest, salt: str) -> tuple[Request, ResponseStream]:
        """Submit a completion. Raises RequestError if it is invalid, and the errors of `Engine.submit`."""
        text, vocabulary = body.text, self.engine.model.config.vocab_size
        tokens = body.tokens
        if text is not None:
            tokens = await self._encoded("prompt", lambda: self.tokenizer.encode_prompt(text))
        if text is None and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise RequestError(400, f"prompt: expected tokens from 0 to {vocabulary - 1}", "prompt", "invalid_value")
        return self._submit(body, tokens, "prompt", body.stops, body.max_tokens or 16, (), salt)

    async def chat(self, body: ChatRequest, salt: str) -> tuple[Request, ResponseStream]:
        """Submit a chat completion; raises as `complete` does."""
        messages = [message.for_template() for message in body.messages]
        encode = functools.partial(self._encode, salt=salt)
        tokens, system = await self._encoded(
            "messages",
            lambda: (chat_tokens(self.tokenizer, messages, encode=encode), self._system_tokens(messages, encode)),
        )
        max_tokens = body.max_completion_tokens or body.max_tokens or self.limits.max_tokens
        checkpoints = [common_prefix_length(tokens, system)] if system else []
        return self._submit(body, tokens, "messages", [*body.stops, *self._chat_stops], max_tokens, checkpoints, salt)

    def _system_tokens(self, messages: Sequence[dict[str, str]], encode: Callable[[str], list[int]]) -> list[int]:
        """The tokens of the system message, which other conversations may share; empty if there is none."""
        if messages[0]["role"] != "system" or len(messages) == 1:
            return []
        try:
            return chat_tokens(self.tokenizer, messages[:1], add_generation_prompt=False, encode=encode)
        except ValueError:  # some templates require a user message
            return []

    async def _encoded(self, param: str, encode: Callable[[], Any]) -> Any:
        """Run `encode` in its thread. Raises RequestError for refusals of the template and for lone surrogates."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except (ValueError, TypeError) as error:
            message = str(error)
            message = message if message.startswith(param) else f"{param}: {message}"
            raise RequestError(400, message, param, "invalid_value") from error

    def _submit(
        self,
        body: RequestBody,
        tokens: list[int],
        param: str,
        stops: Sequence[str],
        max_tokens: int,
        checkpoints: Sequence[int],
        salt: str,
    ) -> tuple[Request, ResponseStream]:
        limits = self.limits
        self._check(param, len(tokens), 1, limits.max_prompt, "tokens of a prompt")
        self._check("max_tokens", max_tokens, 1, limits.max_tokens, "tokens")
        self._check("n", body.n, 1, self.engine.max_batch_size, "continuations")
        stream = ResponseStream(self.outbox, self.tokenizer, tokens, stops, body.n)
        request = Request(
            tokens=tokens, listener=stream, max_tokens=max_tokens, n=body.n, temperature=body.temperature,
            top_p=body.top_p, seed=body.seed, end_tokens=self._end_tokens, logprobs=body.num_logprobs, salt=salt,
            checkpoints=checkpoints, deadline=time.monotonic() + limits.timeout,
        )  # fmt: skip
        self.engine.submit(request)
        return request, stream

    @staticmethod
    def _check(param: str, value: int, least: int, most: int, what: str) -> None:
        if not least <= value <= most:
            message = f"{param}: expected {least} to {most:,} {what}, got {value:,}"
            raise RequestError(400, message, param, "limit_exceeded")


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
