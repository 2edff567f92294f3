"""Engines over small models, and listeners that wait."""

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
from hqlt.serve.server import Server, bound
from hqlt.state import PrefixStore
from tests.language.conftest import KINDS, build


class Heard:
    """A listener: all that it was told, and `done` once nothing more comes."""

    def __init__(self, n: int = 1, at: Callable[[int], object] | None = None) -> None:
        """at: called with the number of tokens heard, after each; what it raises or returns goes to the engine."""
        self.made: list[list[int]] = [[] for _ in range(n)]
        self.likely: list = []
        self.reasons: list[str | None] = [None] * n
        self.error: Exception | None = None
        self.cached = -1
        self.done, self.first, self.at = threading.Event(), threading.Event(), at

    def began(self, cached):
        self.cached = cached

    def token(self, choice, token, likely):
        self.made[choice].append(token)
        self.likely.append(likely)
        self.first.set()
        return bool(self.at and self.at(len(self.made[choice])))

    def ended(self, choice, reason):
        self.reasons[choice] = reason
        if None not in self.reasons:
            self.done.set()

    def failed(self, error):
        self.error = error
        self.done.set()

    def wait(self):
        assert self.done.wait(60), "nothing came"
        return self


@contextmanager
def running(model: HQLTForCausalLM, store: PrefixStore | None = None, **options) -> Iterator[Engine]:
    engine = Engine(model, store or PrefixStore(model), **options)
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, tokens, at=None, max_tokens=12, temperature=0.0, n=1, **options) -> Heard:
    """Submits at once; `wait()` for the end."""
    heard = Heard(n, at)
    request = Request(
        tokens=list(tokens), listener=heard, max_tokens=max_tokens, temperature=temperature, n=n, **options
    )
    heard.request = request
    engine.submit(request)
    return heard


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
    """A server in a thread → its URL. options: as `create_app` takes them."""
    engine = Engine(model, store or PrefixStore(model), max_batch_size=max_batch_size, max_queue=max_queue)
    app = create_app(engine, tokenizer or load_tokenizer("bytes"), "small", **options)
    listening, ready = bound("127.0.0.1", 0), threading.Event()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = Server(app, listening, grace, ready.set)
    thread = threading.Thread(target=server.serve_here)
    thread.start()
    try:
        assert ready.wait(60)
        yield url
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
