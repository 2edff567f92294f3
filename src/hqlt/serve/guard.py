"""Before a request is looked at: who sends it, to whom, and how much of it there is."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hqlt.serve.errors import Refused

OPEN = ("/", "/health")
"""Paths that need no key: they say nothing of anyone."""


class Guard:
    """Refuses strangers (401), other sites' names for this server (421), and bodies too large (413) or slow (408).

    keys: any of them is accepted, compared in constant time; none: everyone is. hosts: the names that a Host header may
    have, so that a page of another site, whose name was made to mean this machine, reaches nothing; None: any.
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
        headers, refused = Headers(scope=scope), None
        try:
            self._check_host(headers.get("host", ""))
            scope["salt"] = "" if scope["path"] in OPEN else self._salt_of(headers.get("authorization", ""))
        except Refused as error:
            refused = error
        body = await self._body(headers, receive, keep=refused is None)
        if body is None:
            return  # the client has left
        refused = refused or (body if isinstance(body, Refused) else None)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return

        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise Refused(421, f"expected a request to {' or '.join(sorted(self.hosts))}, got one to {name!r}")

    def _salt_of(self, authorization: str) -> str:
        """Whose states a request may use."""
        if not self.salts:
            return ""
        scheme, _, given = authorization.partition(" ")
        key = given.strip().encode("latin-1")  # as Starlette decodes headers
        found = [salt for known, salt in self.salts.items() if hmac.compare_digest(known, key)]
        if scheme.lower() != "bearer" or not found:
            raise Refused(401, "expected a valid API key as `Authorization: Bearer KEY`", code="invalid_api_key")
        return found[0]

    async def _body(self, headers: Headers, receive: Receive, keep: bool) -> bytes | Refused | None:
        """The whole body; None where the client left before its end.

        Also what is not kept is read to its end, or for as long as a body may take: a client that still sends would
        lose the answer.
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
            return Refused(
                413, f"expected a body of at most {self.max_body:,} bytes, got a larger one", code="too_large"
            )
        if late:
            return Refused(408, f"expected the whole body within {self.seconds:g} seconds", code="timeout")
        return bytes(chunks)
