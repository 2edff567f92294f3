"""The HTTP server (uvicorn), on a socket that is bound before the model is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

SEND_GRACE = 5
"""Seconds in which clients may receive their last events after the engine has stopped."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; port 0 takes a free one. Raises OSError if it is not available."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_error:
            sock = on_error.enter_context(socket.socket(family))
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            on_error.pop_all()
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", f"{host}:{port}") from None
    return sock


class Server(uvicorn.Server):
    """Serves until Ctrl-C, SIGTERM or `should_exit`.

    Args:
        app: the application of `create_app`.
        sock: a bound socket.
        grace: seconds in which running requests may finish after the signal; the states of the rest are stored.
        ready: called once clients can connect.
    """

    def __init__(self, app: FastAPI, sock: socket.socket, grace: float, ready: Callable[[], None]) -> None:
        timeout = int(grace) + SEND_GRACE
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=timeout))
        self.app, self.sock, self.grace, self.ready = app, sock, grace, ready

    def serve_here(self) -> None:
        """Run in this thread until the server has stopped; closes the socket."""
        self.run([self.sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._close_after_grace())
        await super().shutdown(sockets)
        ending.cancel()

    async def _close_after_grace(self) -> None:
        await asyncio.sleep(self.grace)
        await asyncio.to_thread(self.app.state.service.close)
