"""Engines and servers of small models, and a listener that records its events."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hqlt.data import Tokenizer, load_tokenizer
from hqlt.model import HQLTForCausalLM
from hqlt.serve.app import create_app
from hqlt.serve.engine import Engine
from hqlt.serve.request import Request
from hqlt.serve.server import Server, bind_socket
from hqlt.state import PrefixStore
from tests.language.conftest import KINDS, build


class RecordingListener:
    """Records all events of a request; `done` is set after the last one."""

    def __init__(self, n: int = 1, at: Callable[[int], object] | None = None) -> None:
        """at: called after each token with the number of tokens so far; its result or exception goes to the engine."""
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list = []
        self.reasons: list[str | None] = [None] * n
        self.error: Exception | None = None
        self.cached = -1
        self.done, self.first, self.at = threading.Event(), threading.Event(), at

    def on_start(self, cached):
        self.cached = cached

    def on_token(self, choice, token, logprobs):
        self.tokens[choice].append(token)
        self.logprobs.append(logprobs)
        self.first.set()
        return bool(self.at and self.at(len(self.tokens[choice])))

    def on_end(self, choice, reason):
        self.reasons[choice] = reason
        if None not in self.reasons:
            self.done.set()

    def on_error(self, error):
        self.error = error
        self.done.set()

    def wait(self):
        assert self.done.wait(60), "no event arrived"
        return self


@contextmanager
def running(model: HQLTForCausalLM, store: PrefixStore | None = None, **options) -> Iterator[Engine]:
    engine = Engine(model, store or PrefixStore(model), **options)
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, tokens, at=None, max_tokens=12, temperature=0.0, n=1, **options) -> RecordingListener:
    """Submit a request; `wait()` waits for its end."""
    listener = RecordingListener(n, at)
    request = Request(
        tokens=list(tokens), listener=listener, max_tokens=max_tokens, temperature=temperature, n=n, **options
    )
    listener.request = request
    engine.submit(request)
    return listener


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> HQLTForCausalLM:
    return build(**KINDS[request.param])


@pytest.fixture
def small() -> HQLTForCausalLM:
    return build()


@contextmanager
def served(
    model: HQLTForCausalLM, tokenizer: Tokenizer | None = None, store: PrefixStore | None = None,
    max_batch_size: int = 32, max_queue: int = 256, grace: float = 5, **options,
) -> Iterator[str]:  # fmt: skip
    """Run a server in a thread and yield its URL. options: those of `create_app`."""
    engine = Engine(model, store or PrefixStore(model), max_batch_size=max_batch_size, max_queue=max_queue)
    app = create_app(engine, tokenizer or load_tokenizer("bytes"), "small", **options)
    sock, ready = bind_socket("127.0.0.1", 0), threading.Event()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = Server(app, sock, grace, ready.set)
    thread = threading.Thread(target=server.serve_here)
    thread.start()
    try:
        assert ready.wait(60)
        yield url
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
