"""Checks before a request is parsed: API key, Host header, size and duration of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hqlt.serve.errors import RequestError

OPEN = ("/", "/health")
"""Paths that need no key, because they reveal nothing about users."""


class Guard:
    """ASGI middleware that refuses missing keys (401), foreign hosts (421), and large (413) or slow (408) bodies.

    Args:
        app: the application behind it.
        keys: accepted API keys, compared in constant time; none for a server without authentication.
        hosts: accepted names in the Host header, which prevents DNS rebinding by other web sites; None for any.
        max_body: maximum size of a body in bytes.
        seconds: maximum duration of receiving a body.
        shared: whether all keys share one salt, so that stored states are found across keys.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], hosts: Collection[str] | None, max_body: int, seconds: float,
        shared: bool,
    ) -> None:  # fmt: skip
        self.app, self.hosts, self.max_body, self.seconds = app, hosts, max_body, seconds
        self.salts = {key.encode(): "" if shared else hashlib.sha256(key.encode()).hexdigest() for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, error = Headers(scope=scope), None
        try:
            self._check_host(headers.get("host", ""))
            scope["salt"] = "" if scope["path"] in OPEN else self._salt_of(headers.get("authorization", ""))
        except RequestError as refusal:
            error = refusal
        body = await self._body(headers, receive, keep=error is None)
        if body is None:
            return  # the client has disconnected
        error = error or (body if isinstance(body, RequestError) else None)
        if error is not None:
            await error.response()(scope, receive, send)
            return

        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise RequestError(421, f"expected a request to {' or '.join(sorted(self.hosts))}, got one to {name!r}")

    def _salt_of(self, authorization: str) -> str:
        """The salt of the states that a request may use. Raises RequestError without a valid key."""
        if not self.salts:
            return ""
        scheme, _, given = authorization.partition(" ")
        key = given.strip().encode("latin-1")  # as Starlette decodes headers
        found = [salt for known, salt in self.salts.items() if hmac.compare_digest(known, key)]
        if scheme.lower() != "bearer" or not found:
            raise RequestError(401, "expected a valid API key as `Authorization: Bearer KEY`", code="invalid_api_key")
        return found[0]

    async def _body(self, headers: Headers, receive: Receive, keep: bool) -> bytes | RequestError | None:
        """The whole body; None if the client disconnects before its end.

        A body that is not kept is also read to its end, within the time limit: a client that is still sending would
        miss the response.
        """
        length = headers.get("content-length", "0")
        size, more, chunks = 0, True, bytearray()
        declared = int(length) if length.isdigit() else 0
        late = False
        try:
            async with asyncio.timeout(self.seconds):
                while more and not (declared > self.max_body and "expect" in headers):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if keep and size <= self.max_body:
                        chunks += chunk
        except TimeoutError:
            late = True
        if max(size, declared) > self.max_body:
            return RequestError(
                413, f"expected a body of at most {self.max_body:,} bytes, got a larger one", code="too_large"
            )
        if late:
            return RequestError(408, f"expected the whole body within {self.seconds:g} seconds", code="timeout")
        return bytes(chunks)
