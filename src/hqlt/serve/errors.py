"""Errors, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import Response

from hqlt.serve.request import Closed, Full, Late

TYPES = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error"}


class Refused(Exception):
    """A request that is not served, with the status and sentence that its sender gets."""

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
        # In ASCII: what it quotes may hold halves of surrogate pairs, which JSON can write and UTF-8 cannot.
        return Response(json.dumps(self.body), self.status, headers, media_type="application/json")


def refusal(error: Exception) -> Refused:
    """What a sender is told of an error. Of one that is not the sender's to mend, only that it happened."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, Late):
        return Refused(408, str(error), code="timeout")
    if isinstance(error, Closed):
        return Refused(503, str(error), code="server_stopping")
    return Refused(500, "the request failed in the server, whose log says why", code="internal_error")


def refusal_of_body(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> Refused:
    """errors: pydantic's, about a body. known: the fields that there are."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(where) or None
    if error["type"] == "extra_forbidden":
        among = f"; what is: {', '.join(known)}" if len(where) == 1 else ""
        return Refused(400, f"{param}: not supported by this server{among}", param, "unsupported_parameter")
    if error["type"] == "json_invalid":
        return Refused(
            400, f"expected a body in JSON, got one that is not: {error['ctx']['error']}", code="invalid_json"
        )
    said = str(error["msg"]).removeprefix("Value error, ")
    what = f"{param}: {said}" if param else f"expected a JSON object as application/json: {said}"
    return Refused(400, what, param, "invalid_value")
