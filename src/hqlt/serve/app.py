"""The HTTP routes: OpenAI's chat completions, completions and models; health, metrics and a page."""

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
from hqlt.serve.errors import Refused, refusal, refusal_of_body
from hqlt.serve.forms import ChatForm, CompletionForm
from hqlt.serve.guard import Guard
from hqlt.serve.metrics import Metrics
from hqlt.serve.request import Closed, Full, Late
from hqlt.serve.responses import respond
from hqlt.serve.schema import Asked, ChatAsked, CompletionAsked
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
    """An ASGI application that serves the engine's model, and closes the engine when it stops.

    keys: of the API; none: everyone may use it. shared_prefixes: whether what was read for one key is found for
    others. hosts: as `Guard` takes them.
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
    async def chat(asked: ChatAsked, http: HttpRequest) -> Response:
        service = service_of(http, asked)
        form = ChatForm(service.name, service.tokenizer)
        return await respond(http, asked, form, service.chat(asked, salt(http)))

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, http: HttpRequest) -> Response:
        service = service_of(http, asked)
        form = CompletionForm(service.name, service.tokenizer)
        return await respond(http, asked, form, service.complete(asked, salt(http)))

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict[str, Any]:
        return {"object": "list", "data": [about(http.app.state.service)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, http: HttpRequest) -> dict[str, Any]:
        check_model(http.app.state.service, model)
        return about(http.app.state.service)

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
            frames = {"Content-Security-Policy": "frame-ancestors 'none'"}  # which a meta element cannot say
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=frames)
        return PlainTextResponse("hqlt serve: an API in OpenAI's form at /v1\n")


def add_errors(app: FastAPI) -> None:
    def counted(http: HttpRequest, refused: Refused) -> Response:
        http.app.state.metrics.requests.labels(http.url.path, refused.status).inc()
        return refused.response()

    @app.exception_handler(RequestValidationError)
    async def of_body(http: HttpRequest, error: RequestValidationError) -> Response:
        body = ChatAsked if http.url.path.endswith("/chat/completions") else CompletionAsked
        return counted(http, refusal_of_body(error.errors(), list(body.model_fields)))

    @app.exception_handler(HTTPException)
    async def of_path(http: HttpRequest, error: HTTPException) -> Response:
        return Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()

    async def refused(http: HttpRequest, error: Exception) -> Response:
        return counted(http, refusal(error))

    for kind in (Refused, Full, Late, Closed, Exception):
        app.add_exception_handler(kind, refused)


def service_of(http: HttpRequest, asked: Asked) -> Service:
    service: Service = http.app.state.service
    check_model(service, asked.model)
    return service


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        what = f"model: expected {service.name!r}, which is served here, got {name!r}"
        raise Refused(404, what, "model", "model_not_found")


def about(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "hqlt"}


def salt(http: HttpRequest) -> str:
    return str(http.scope["salt"])
