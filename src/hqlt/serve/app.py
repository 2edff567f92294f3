"""The HTTP routes: OpenAI's chat completions, completions and models; health, metrics and the chat page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from hqlt._version import version
from hqlt.serve.engine import Engine
from hqlt.serve.errors import RequestError, request_error, validation_error
from hqlt.serve.formatters import ChatFormatter, CompletionFormatter
from hqlt.serve.guard import Guard
from hqlt.serve.metrics import Metrics
from hqlt.serve.request import DeadlineExceeded, EngineClosed, QueueFull
from hqlt.serve.responses import respond
from hqlt.serve.schema import ChatRequest, CompletionRequest, RequestBody
from hqlt.serve.service import Limits, Service

DEFAULT_LIMITS = Limits()
PAGE = resources.files("hqlt.serve") / "page.html"


def create_app(
    engine: Engine,
    tokenizer: Any,
    name: str,
    limits: Limits = DEFAULT_LIMITS,
    keys: Sequence[str] = (),
    shared_prefixes: bool = False,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """Create the ASGI application that serves an engine's model and closes the engine when it stops.

    Args:
        engine: the engine.
        tokenizer: the model's tokenizer.
        name: the model's name in the API.
        limits: limits of one request.
        keys: API keys; none for a server without authentication.
        shared_prefixes: whether states stored for one key are found by requests with another.
        hosts: accepted Host headers, as in `Guard`.

    Returns:
        The application.
    """
    metrics = Metrics(engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(engine, tokenizer, name, limits)
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="hqlt serve", version=version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.metrics = metrics
    app.add_middleware(
        Guard,
        keys=keys,
        hosts=hosts,
        max_body=limits.max_body,
        seconds=min(60.0, limits.timeout),
        shared=shared_prefixes,
    )
    add_routes(app)
    add_errors(app)
    return app


def add_routes(app: FastAPI) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        service = service_of(http, body)
        formatter = ChatFormatter(service.name, service.tokenizer)
        return await respond(http, body, formatter, service.chat(body, salt(http)))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        service = service_of(http, body)
        formatter = CompletionFormatter(service.name, service.tokenizer)
        return await respond(http, body, formatter, service.complete(body, salt(http)))

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict[str, Any]:
        return {"object": "list", "data": [model_info(http.app.state.service)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, http: HttpRequest) -> dict[str, Any]:
        check_model(http.app.state.service, model)
        return model_info(http.app.state.service)

    @app.get("/health")
    async def health(http: HttpRequest) -> dict[str, Any]:
        engine = http.app.state.service.engine
        return {"status": "ok", "running": engine.running, "waiting": engine.waiting}

    @app.get("/metrics")
    async def metrics(http: HttpRequest) -> Response:
        return Response(http.app.state.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> Response:
        if PAGE.is_file():
            headers = {"Content-Security-Policy": "frame-ancestors 'none'"}  # not possible in a meta element
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)
        return PlainTextResponse("hqlt serve: OpenAI-compatible API at /v1\n")


def add_errors(app: FastAPI) -> None:
    def counted(http: HttpRequest, error: RequestError) -> Response:
        http.app.state.metrics.requests.labels(http.url.path, error.status).inc()
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid_body(http: HttpRequest, error: RequestValidationError) -> Response:
        model = ChatRequest if http.url.path.endswith("/chat/completions") else CompletionRequest
        return counted(http, validation_error(error.errors(), list(model.model_fields)))

    @app.exception_handler(HTTPException)
    async def invalid_path(http: HttpRequest, error: HTTPException) -> Response:
        return RequestError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()

    async def failed(http: HttpRequest, error: Exception) -> Response:
        return counted(http, request_error(error))

    for kind in (RequestError, QueueFull, DeadlineExceeded, EngineClosed, Exception):
        app.add_exception_handler(kind, failed)


def service_of(http: HttpRequest, body: RequestBody) -> Service:
    service: Service = http.app.state.service
    check_model(service, body.model)
    return service


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        message = f"model: expected {service.name!r}, the model of this server, got {name!r}"
        raise RequestError(404, message, "model", "model_not_found")


def model_info(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "hqlt"}


def salt(http: HttpRequest) -> str:
    return str(http.scope["salt"])
