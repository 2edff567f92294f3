"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hqlt.serve.answer import Answer
from hqlt.serve.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """Of one server: tokens, seconds and what runs. No text, and nothing of who sent it."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        count, seconds, now = self._counter, self._histogram, self._gauge
        self.requests = Counter("hqlt_requests", "requests by status", ["path", "status"], registry=self.registry)
        self.prompt = count("hqlt_prompt_tokens", "tokens of prompts, cached ones included")
        self.cached = count("hqlt_cached_tokens", "tokens of prompts that a stored state had read")
        self.made = count("hqlt_completion_tokens", "tokens that were generated")
        self.first = seconds("hqlt_first_token_seconds", "from a request to its first token")
        self.whole = seconds("hqlt_request_seconds", "from a request to the end of its answer")
        now("hqlt_rows_running", "continuations that run").set_function(lambda: engine.running)
        now("hqlt_requests_waiting", "requests that wait for a row").set_function(lambda: engine.waiting)
        now("hqlt_states_stored", "states in memory").set_function(lambda: engine.store.statistics.entries)
        now("hqlt_states_bytes", "bytes of states in memory").set_function(lambda: engine.store.statistics.bytes)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=SECONDS, registry=self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self.registry)

    def answered(self, answer: Answer) -> None:
        """Of a request that was served, to its end or not."""
        self.prompt.inc(answer.prompt_tokens)
        self.cached.inc(answer.cached_tokens)
        self.made.inc(answer.completion_tokens)
        if answer.first is not None:
            self.first.observe(answer.first - answer.asked)
        self.whole.observe(time.monotonic() - answer.asked)

    def page(self) -> bytes:
        return generate_latest(self.registry)
