"""An answer on its way to a client that may leave at any time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hqlt.serve.answer import Answer, Piece
from hqlt.serve.errors import refusal
from hqlt.serve.forms import Form
from hqlt.serve.metrics import Metrics
from hqlt.serve.request import Request
from hqlt.serve.schema import Asked

LAST_WORDS = 5
"""Seconds beyond a request's time in which its client may take what it was sent."""
GONE = 499
"""The status, for the metrics, of a client that left; no one reads it."""


class Exchange:
    """One request and its answer: whatever happens, its rows are freed and it is counted once."""

    def __init__(self, http: HttpRequest, request: Request, answer: Answer) -> None:
        self.request, self.answer, self.status = request, answer, GONE
        self._path, self._metrics = http.url.path, http.app.state.metrics

    def end(self) -> None:
        self.request.cancel()
        metrics: Metrics = self._metrics
        metrics.answered(self.answer)
        metrics.requests.labels(self._path, self.status).inc()


async def respond(
    http: HttpRequest, asked: Asked, form: Form, submitted: Awaitable[tuple[Request, Answer]]
) -> Response:
    """The answer in its form, whole or as a stream. Raises what it failed of before anything was sent."""
    exchange = Exchange(http, *await submitted)
    if asked.stream:
        return EventStream(exchange, events(exchange, form, asked.stream_options.include_usage))
    whole, gone = asyncio.ensure_future(collected(exchange.answer)), asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=GONE)
        body = form.whole(whole.result(), exchange.answer)
        exchange.status = 200
        return JSONResponse(body)
    except Exception as error:
        refused = refusal(error)
        exchange.status = refused.status
        return refused.response()
    finally:
        whole.cancel()
        gone.cancel()
        exchange.end()


async def collected(answer: Answer) -> list[Piece]:
    return [piece async for pieces in answer for piece in pieces]


async def disconnected(http: HttpRequest) -> None:
    """Until the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def events(exchange: Exchange, form: Form, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each piece, and [DONE]; an error as one, because the status has been sent."""
    answer = exchange.answer
    sent = [0] * len(answer.texts)
    begun = [False] * len(answer.texts)
    try:
        async for pieces in answer:
            chunks = []
            for piece in pieces:
                i = piece.choice
                chunks.append(event(form.chunk(piece, not begun[i], sent[i])))
                begun[i], sent[i] = True, sent[i] + len(piece.text)
            yield "".join(chunks)
        exchange.status = 200
        yield (event(form.last_chunk(answer)) if include_usage else "") + "data: [DONE]\n\n"
    except Exception as error:
        refused = refusal(error)
        exchange.status = refused.status
        yield event(refused.body)


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class EventStream(StreamingResponse):
    """Ends its exchange when it has been sent, and when it cannot be: to a client that leaves, or does not read."""

    def __init__(self, exchange: Exchange, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.exchange.request.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left + LAST_WORDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # it does not read what it was sent; its connection is closed
        finally:
            self.exchange.end()
