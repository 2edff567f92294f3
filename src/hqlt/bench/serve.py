"""`hqlt serve` as its clients see it, compared with transformers' generate loop and the same weights: `tiny`, random.

The server runs in its own process and is queried over HTTP. A history is read once. Each turn then adds 64 new tokens,
and the time to the first token of the answer is measured. Streams start together, and all of their tokens count, from
the first request to the last token. Idle sessions are states in the prefix store of an engine: two each, after the
prompt and after the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hqlt.bench.race import Row, Work, resident_megabytes
from hqlt.language.generation import LOOKUP_TOKENS
from hqlt.model import HQLTForCausalLM, preset
from hqlt.serve.engine import Engine
from hqlt.serve.request import Request
from hqlt.state import PrefixStore

ONLY = ("first token", "streams", "sessions", "prompt lookup")
CAPTION = "medians over rounds; ratio: between this row and the first row of its case, with the aim next to it"
SETTING = {"clock": "the wall's"}
TURN = 64
"""Tokens per turn, and in the prompt of a stream."""


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    model = HQLTForCausalLM(preset("tiny")).eval()
    results: list[Row] = []
    if only in (None, "first token", "streams"):
        with serving(model) as url:
            if only in (None, "first token"):
                results += first_token(model, url, rounds, *((300, 900) if quick else (300, 30_000)))
            if only in (None, "streams"):
                results += streams(model, url, rounds, *((4, 8) if quick else (32, 128)))
    if only in (None, "sessions"):
        results += sessions(model, 10 if quick else 1000)
    if only in (None, "prompt lookup"):
        results += prompt_lookup(rounds, 20 if quick else 400)
    return results


@contextlib.contextmanager
def serving(model: HQLTForCausalLM) -> Iterator[str]:
    """Context manager that serves the model with as many threads as this process has, and yields the URL."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "tiny")
        command = [sys.executable, "-m", "hqlt", "serve", "tiny", "--port=0"]

        threads = (
            torch.get_num_threads()
        )  # set only if it is not all: setting it also disables the choice of wait policy
        environment = os.environ | ({} if threads == os.cpu_count() else {"OMP_NUM_THREADS": str(threads)})
        server = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        try:
            ready = re.match(r"tiny at (\S+),", line := server.stderr.readline())
            if ready is None:
                raise SystemExit(f"hqlt serve did not start: {line}{server.communicate()[1]}")
            yield ready[1]
        finally:
            server.terminate()
            server.communicate()


async def ask(url: str, prompt: str, tokens: int) -> float:
    """Stream a continuation to its end, and return the seconds to its first token."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    begun, first, answer = time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    while chunk := await reader.read(1 << 16):
        answer += chunk
        if not first and b"data: " in answer:
            first = time.perf_counter() - begun
    writer.close()
    if b"data: [DONE]" not in answer:
        raise SystemExit(f"hqlt serve: expected a complete stream, got {answer.decode()!r}")
    return first


def text(length: int) -> str:
    """Random letters, so that no two texts share a prefix."""
    return bytes(torch.randint(97, 123, (length,)).tolist()).decode()


def first_token(model: HQLTForCausalLM, url: str, rounds: int, short: int, long: int) -> list[Row]:
    def turn(history: str) -> float:
        return asyncio.run(ask(url, history + text(TURN), 1))

    def generate() -> None:
        tokens = torch.tensor([list(text(long + TURN).encode())])
        untyped: Any = model
        untyped.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=0)

    histories = text(short), text(long)
    for history in histories:
        turn(history)  # stores the prefix that later turns reuse
        asyncio.run(ask(url, history + "\n", 1))
    contestants: dict[str, Callable[[], float]] = {
        f"turn after {long:,} tokens": lambda: turn(histories[1]),
        f"turn after {short:,} tokens": lambda: turn(histories[0]),
        "the long history read again": lambda: turn(text(long)),
        "transformers' generate, read again": timed(generate),
    }
    times = in_turns(contestants, rounds)
    ours = times[f"turn after {long:,} tokens"]
    aims = {f"turn after {short:,} tokens": (1, "≤ 1.2"), "the long history read again": (-1, "≥ 20")}
    rows = []
    for name, its in times.items():
        power, aim = aims.get(name, (-1, ""))
        ratio = {} if its == ours else {"ratio": (ours / its) ** power, "aim": aim}
        rows.append(row("first token", name, {"ms": 1e3 * its, **ratio}))
    return rows


def streams(model: HQLTForCausalLM, url: str, rounds: int, n: int, tokens: int) -> list[Row]:
    async def together(k: int) -> None:
        await asyncio.gather(*(ask(url, text(TURN), tokens) for _ in range(k)))

    def serve(k: int) -> Work:
        return lambda: asyncio.run(together(k))

    def generate(k: int) -> Work:
        untyped: Any = model
        prompts = torch.randint(97, 123, (k, TURN))
        return lambda: untyped.generate(
            prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )

    works = {"hqlt serve": serve, "transformers' generate": generate}
    contestants = {(name, k): timed(work(k)) for name, work in works.items() for k in (1, n)}
    times = in_turns(contestants, rounds)
    rates = {(name, k): k * tokens / its for (name, k), its in times.items()}
    return [
        row("streams", f"{name}, {k}", {"tokens/s": rate}
            | ({} if k == 1 else {"ratio": rate / rates[name, 1], "aim": "≥ 6" if name == "hqlt serve" else ""}))
        for (name, k), rate in rates.items()
    ]  # fmt: skip


def sessions(model: HQLTForCausalLM, n: int) -> list[Row]:
    store = PrefixStore(model, max_bytes=1 << 40)
    engine = Engine(model, store)
    try:
        converse(engine, 1)
        before, states_before = resident_megabytes(), store.statistics
        converse(engine, n)
        grown, states = resident_megabytes() - before, store.statistics
    finally:
        engine.close()
    held = (states.bytes - states_before.bytes) / 1e6
    with torch.device("meta"):
        large = HQLTForCausalLM(preset("hqlt-340m"))
    counted = sum(block.memory.init_state(1).bytes_per_row() for block in large.model.layers)
    kept = (states.entries - states_before.entries) / n
    return [
        row("sessions", f"{n:,} of tiny, the process", {"MB": grown, "ratio": grown / held, "aim": "≤ 1.1"}),
        row("sessions", f"{n:,} of tiny, {kept:g} states each", {"MB": held}),
        row("sessions", f"{n:,} of hqlt-340m, counted", {"MB": n * kept * counted / 1e6}),
    ]


def prompt_lookup(rounds: int, tokens: int) -> list[Row]:
    """Greedy decoding with and without prompt lookup, for a text that is a cycle and for one that only repeats parts.

    A model whose blocks add nothing generates a cycle, because each token depends only on the one before it. It
    computes as much as any other model.
    """
    results: list[Row] = []
    for what in ("a cycle", "random weights"):
        torch.manual_seed(0)
        model: Any = HQLTForCausalLM(preset("tiny")).eval()
        if what == "a cycle":
            for writer in (writer for block in model.model.layers for writer in block.residual_writers()):
                torch.nn.init.zeros_(writer.weight)
        plain = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        prompt = model.generate(torch.tensor([list(text(TURN).encode())]), **plain)
        works = {
            f"greedy, {what}": partial(model.generate, prompt, **plain),
            f"greedy with prompt lookup, {what}": partial(
                model.generate, prompt, **plain, prompt_lookup_num_tokens=LOOKUP_TOKENS
            ),
        }
        texts = [work() for work in works.values()]
        if not torch.equal(*texts):
            raise SystemExit("prompt lookup: expected the text of plain greedy decoding, got a different text")
        times = in_turns({name: timed(work) for name, work in works.items()}, rounds)
        for name, its in times.items():
            faster = times[f"greedy, {what}"] / its
            aim = {"ratio": faster, "aim": "≥ 1.5" if what == "a cycle" else ""} if "lookup" in name else {}
            results.append(row("prompt lookup", name, {"tokens/s": tokens / its} | aim))
    return results


class Waiting:
    """A listener that only waits until the request has ended."""

    def __init__(self) -> None:
        self.done, self.error = threading.Event(), None

    def on_start(self, cached: int) -> None: ...

    def on_token(self, choice: int, token: int, logprobs: Any) -> bool:
        return False

    def on_end(self, choice: int, reason: str) -> None:
        self.done.set()

    def on_error(self, error: Any) -> None:
        self.error = error
        self.done.set()


def converse(engine: Engine, n: int) -> None:
    """Run one turn of each of n conversations."""
    for _ in range(n):
        listener = Waiting()
        prompt = list(text(TURN).encode())
        engine.submit(Request(tokens=prompt, listener=listener, max_tokens=2, temperature=0.0))
        listener.done.wait()
        if listener.error is not None:
            raise listener.error


def timed(work: Work) -> Callable[[], float]:
    """A function that measures wall-clock seconds, because two processes are working."""

    def measure() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return measure


def in_turns(contestants: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """The median measurement of each contestant, over rounds in which they take turns, after a warm-up round."""
    measured = [{name: measure() for name, measure in contestants.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(each[name] for each in measured) for name in contestants}


def row(case: str, what: str, measured: Row) -> Row:
    return {"case": case, "implementation": what, "measured": measured}
