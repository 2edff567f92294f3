"""The HTTP server, uvicorn's, on a socket that is bound before anything slow begins."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0: a free one. Raises OSError where it is not to be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen there: {error.strerror}", f"{host}:{port}") from None
    return listening


class Server(uvicorn.Server):
    """Serves until Ctrl-C, SIGTERM or `should_exit`: then what runs may end within `grace` seconds.

    ready: called once clients can connect.
    """

    def __init__(self, app: FastAPI, listening: socket.socket, grace: int, ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=grace))
        self.listening, self.ready = listening, ready

    def serve_here(self) -> None:
        """Returns when the server has stopped, and what ran has ended or was stored."""
        with self.listening:
            self.run([self.listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()
