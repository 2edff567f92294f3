"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import Response

from hqlt.serve.request import DeadlineExceeded, EngineClosed, QueueFull

TYPES = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error"}


class RequestError(Exception):
    """A request that is not served, with the HTTP status and message for the client."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        # ASCII, because the message may quote lone surrogates, which JSON can represent and UTF-8 cannot.
        return Response(json.dumps(self.body), self.status, headers, media_type="application/json")


def request_error(error: Exception) -> RequestError:
    """The error for the client. Internal errors are reported without details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFull):
        return RequestError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, DeadlineExceeded):
        return RequestError(408, str(error), code="timeout")
    if isinstance(error, EngineClosed):
        return RequestError(503, str(error), code="server_stopping")
    return RequestError(500, "internal error; see the server's log", code="internal_error")


def validation_error(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> RequestError:
    """The error for an invalid body. errors: pydantic's; known: the supported fields."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(where) or None
    if error["type"] == "extra_forbidden":
        supported = f"; supported: {', '.join(known)}" if len(where) == 1 else ""
        return RequestError(400, f"{param}: not supported by this server{supported}", param, "unsupported_parameter")
    if error["type"] == "json_invalid":
        return RequestError(
            400, f"expected a JSON body, got invalid JSON: {error['ctx']['error']}", code="invalid_json"
        )
    reason = str(error["msg"]).removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else f"expected a JSON object as application/json: {reason}"
    return RequestError(400, message, param, "invalid_value")
