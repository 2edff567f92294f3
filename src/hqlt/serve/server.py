"""The HTTP server, uvicorn's, on a socket that is bound before anything slow begins."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

LAST_WORDS = 5
"""Seconds in which clients may take what they are told of the end."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0: a free one. Raises OSError where it is not to be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as at_error:
            listening = at_error.enter_context(socket.socket(family))
            if os.name == "posix":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            at_error.pop_all()
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", f"{host}:{port}") from None
    return listening


class Server(uvicorn.Server):
    """Serves until Ctrl-C, SIGTERM or `should_exit`. What runs then may end within `grace` seconds; the rest is stored.

    app: of `create_app`. ready: called once clients can connect.
    """

    def __init__(self, app: FastAPI, listening: socket.socket, grace: float, ready: Callable[[], None]) -> None:
        longest = int(grace) + LAST_WORDS
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=longest))
        self.app, self.listening, self.grace, self.ready = app, listening, grace, ready

    def serve_here(self) -> None:
        """Returns when the server has stopped, and closes the socket."""
        self.run([self.listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._end_what_runs())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_what_runs(self) -> None:
        await asyncio.sleep(self.grace)
        await asyncio.to_thread(self.app.state.service.close)
