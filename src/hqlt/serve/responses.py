"""Sending a response to a client that may disconnect at any time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hqlt.serve.errors import request_error
from hqlt.serve.formatters import Formatter
from hqlt.serve.metrics import Metrics
from hqlt.serve.request import Request
from hqlt.serve.schema import RequestBody
from hqlt.serve.stream import Delta, ResponseStream

SEND_GRACE = 5
"""Seconds after a request's deadline in which its client may receive the rest of the response."""
CLIENT_CLOSED = 499
"""Status in the metrics for a client that disconnected; it is never sent."""


class Exchange:
    """One request and its response. `end` frees its rows and counts it; called exactly once, however it ends."""

    def __init__(self, http: HttpRequest, request: Request, stream: ResponseStream) -> None:
        self.request, self.stream, self.status = request, stream, CLIENT_CLOSED
        self._path, self._metrics = http.url.path, http.app.state.metrics

    def end(self) -> None:
        self.request.cancel()
        metrics: Metrics = self._metrics
        metrics.observe(self.stream)
        metrics.requests.labels(self._path, self.status).inc()


async def respond(
    http: HttpRequest, body: RequestBody, formatter: Formatter, submitted: Awaitable[tuple[Request, ResponseStream]]
) -> Response:
    """The response, complete or as a stream. Raises the errors of submitting the request."""
    exchange = Exchange(http, *await submitted)
    if body.stream:
        return EventStream(exchange, events(exchange, formatter, body.stream_options.include_usage))
    deltas, disconnect = asyncio.ensure_future(collect(exchange.stream)), asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait((deltas, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not deltas.done():
            return Response(status_code=CLIENT_CLOSED)
        response = formatter.complete(deltas.result(), exchange.stream)
        exchange.status = 200
        return JSONResponse(response)
    except Exception as error:
        refusal = request_error(error)
        exchange.status = refusal.status
        return refusal.response()
    finally:
        deltas.cancel()
        disconnect.cancel()
        exchange.end()


async def collect(stream: ResponseStream) -> list[Delta]:
    return [delta async for deltas in stream for delta in deltas]


async def disconnected(http: HttpRequest) -> None:
    """Return when the client has disconnected."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def events(exchange: Exchange, formatter: Formatter, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one per delta, then [DONE]. An error is an event, because the status has been sent."""
    stream = exchange.stream
    characters = [0] * len(stream.texts)
    begun = [False] * len(stream.texts)
    try:
        async for deltas in stream:
            chunks = []
            for delta in deltas:
                i = delta.choice
                chunks.append(event(formatter.chunk(delta, not begun[i], characters[i])))
                begun[i], characters[i] = True, characters[i] + len(delta.text)
            yield "".join(chunks)
        exchange.status = 200
        yield (event(formatter.usage_chunk(stream)) if include_usage else "") + "data: [DONE]\n\n"
    except Exception as error:
        refusal = request_error(error)
        exchange.status = refusal.status
        yield event(refusal.body)


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class EventStream(StreamingResponse):
    """A stream of events that ends its exchange when it is sent, or when the client disconnects or stops reading."""

    def __init__(self, exchange: Exchange, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        remaining = self.exchange.request.deadline - time.monotonic()
        try:
            async with asyncio.timeout(remaining + SEND_GRACE):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the client does not read; its connection is closed
        finally:
            self.exchange.end()
