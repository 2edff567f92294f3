"""Metrics for Prometheus at /metrics."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hqlt.serve.engine import Engine
from hqlt.serve.stream import ResponseStream

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """Metrics of one server: tokens, durations and load. They contain no texts and nothing about users."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        count, seconds, now = self._counter, self._histogram, self._gauge
        self.requests = Counter("hqlt_requests", "requests by status", ["path", "status"], registry=self.registry)
        self.prompt = count("hqlt_prompt_tokens", "prompt tokens, including cached ones")
        self.cached = count("hqlt_cached_tokens", "prompt tokens covered by a stored state")
        self.completion = count("hqlt_completion_tokens", "generated tokens")
        self.first = seconds("hqlt_first_token_seconds", "time from a request to its first token")
        self.whole = seconds("hqlt_request_seconds", "time from a request to the end of its response")
        now("hqlt_rows_running", "continuations being generated").set_function(lambda: engine.running)
        now("hqlt_requests_waiting", "requests waiting for a free row").set_function(lambda: engine.waiting)
        now("hqlt_states_stored", "states in memory").set_function(lambda: engine.store.statistics.entries)
        now("hqlt_states_bytes", "size of the states in memory").set_function(lambda: engine.store.statistics.bytes)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(name, description, registry=self.registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, buckets=SECONDS, registry=self.registry)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(name, description, registry=self.registry)

    def observe(self, stream: ResponseStream) -> None:
        """Count a request whose response has ended, complete or not."""
        self.prompt.inc(stream.prompt_tokens)
        self.cached.inc(stream.cached_tokens)
        self.completion.inc(stream.completion_tokens)
        if stream.first_token_at is not None:
            self.first.observe(stream.first_token_at - stream.created_at)
        self.whole.observe(time.monotonic() - stream.created_at)

    def page(self) -> bytes:
        return generate_latest(self.registry)
