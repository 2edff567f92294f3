"""Clients that disconnect, send slowly, or send too much; and many clients at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from hqlt.language import generation
from hqlt.serve.service import Limits
from hqlt.state import PrefixStore
from tests.language.conftest import build
from tests.serve.conftest import served

MODEL = build()
MODEL.lm_head.weight.data[[*range(32), *range(127, 256)]] = 0  # greedy text is printable
ENDLESS = {"model": "small", "prompt": "a", "max_tokens": 100_000}
PATIENT = Limits(max_tokens=100_000)


def health(url):
    return httpx.get(f"{url}/health").json()


def wait_until_idle(url, begun=False):
    """Wait until nothing runs; with `begun`, wait first until something does."""
    until = time.monotonic() + 30
    while begun and not health(url)["running"]:
        assert time.monotonic() < until
    while (now := health(url)) != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < until, now
        time.sleep(0.01)


def test_a_disconnecting_client_frees_its_row():
    with served(MODEL, max_batch_size=1, limits=PATIENT) as url:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=ENDLESS, timeout=httpx.Timeout(60, read=0.2))
            with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS | {"stream": True}) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=ENDLESS, timeout=httpx.Timeout(60, read=0.05))
            wait_until_idle(url)
        metrics = httpx.get(f"{url}/metrics").text
    left = re.search(r'hqlt_requests_total{path="/v1/completions",status="499"} (\d+)', metrics)
    assert 3 <= int(left[1]) <= 9  # not counted: clients that disconnect before their request is read


def test_a_client_that_does_not_read_blocks_no_others(monkeypatch):
    """Its response ends at the deadline, and its connection is closed soon after."""
    monkeypatch.setattr("hqlt.serve.responses.SEND_GRACE", 0.1)
    with served(MODEL, max_batch_size=2, limits=Limits(max_tokens=100_000, timeout=0.5)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            stalled.connect((host, int(port)))
            body = json.dumps(ENDLESS | {"stream": True, "logprobs": 5, "n": 2}).encode()
            stalled.sendall(post(f"Content-Length: {len(body)}") + body)
            wait_until_idle(url, begun=True)
            body = {"model": "small", "prompt": "a", "max_tokens": 3}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def chunks_of(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("grace", [60, 0.1])
def test_a_stopping_server_finishes_requests_or_stores_their_states(grace):
    store = PrefixStore(MODEL)
    with contextlib.ExitStack() as clients:
        with served(MODEL, store=store, grace=grace, limits=PATIENT) as url:
            body = {"model": "small", "prompt": "to be read", "stream": True, "temperature": 0}
            body["max_tokens"] = 300 if grace > 1 else 100_000
            answer = clients.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60))
            lines = answer.iter_lines()
            begun = chunks_of([next(lines)])
        chunks = begun + chunks_of(lines)
    if grace > 1:
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    else:
        assert chunks.pop()["error"]["message"] == "the server is stopping"
    text = "to be read" + "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert store.find(list(text.encode())).length == len(text) - 1


def test_states_are_found_after_kill_9_and_a_restart(tmp_path):
    """With the command line; the first server is killed, the second one stopped."""
    MODEL.save_pretrained(tmp_path / "small")
    command = [sys.executable, "-m", "hqlt", "serve", "small", "--port=0", "--store=states"]
    body = {"model": "small", "temperature": 0, "max_tokens": 5, "prompt": "a prompt that was read before"}
    answers = []
    for stop in (signal.SIGKILL, signal.SIGTERM):
        server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            url = re.search(r"small at (http://127.0.0.1:\d+), its API", server.stderr.readline())[1]
            assert server.stderr.readline().startswith(f"curl {url}/v1/chat/completions")
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json())
        finally:
            server.send_signal(stop)
            _, errors = server.communicate(timeout=60)
        assert server.returncode == -stop
        assert errors == ""
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, len(body["prompt"]) - 1]
    assert answers[0]["choices"] == answers[1]["choices"]


def answer_to(url, sent, more=(), pause=0.0):
    """Status and error message in the response to these bytes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        for chunk in more:
            time.sleep(pause)
            connection.sendall(chunk)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def post(*headers, host="127.0.0.1", kind="application/json"):
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_bodies_and_hosts():
    with served(MODEL, limits=Limits(max_body=1000, timeout=0.5), hosts={"127.0.0.1"}) as url:
        large = "expected a body of at most 1,000 bytes"
        status, message = answer_to(url, post("Content-Length: 1001"))
        assert (status, message.startswith(large)) == (413, True)
        status, message = answer_to(url, post("Transfer-Encoding: chunked"), [b"320\r\n" + b"x" * 800 + b"\r\n"] * 2)
        assert (status, message.startswith(large)) == (413, True)
        assert answer_to(url, post("Content-Length: 9"), [b"{"]) == (408, "expected the whole body within 0.5 seconds")
        status, message = answer_to(url, post("Content-Length: 2", host="evil.example"), [b"{}"])
        assert (status, message) == (421, "expected a request to 127.0.0.1, got one to 'evil.example'")
        status, message = answer_to(url, post("Content-Length: 2", kind="text/plain"), [b"{}"])
        assert status == 400 and "application/json" in message
        status, message = answer_to(url, post("Content-Length: 2", host="127.0.0.1:80"), [b"{,"])
        assert status == 400 and "expected a JSON body" in message
        status, message = answer_to(url, post("Content-Length: 2"), [b"{}"])
        assert status == 400 and message == "model: Field required"
        for invalid in (
            b'{"model": "small", "prompt": "\\ud800"}',
            b'{"model": "small", "prompt": NaN}',
            b"[" * 900,
            b"\xff",
        ):
            answer = httpx.post(f"{url}/v1/completions", content=invalid, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]
        assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "GET /nowhere: Not Found"
        assert httpx.get(f"{url}/v1/completions").status_code == 405
        assert httpx.get(f"{url}/").headers["content-security-policy"] == "frame-ancestors 'none'"


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


async def hammer(url, seconds, clients=64):
    """Clients that often disconnect → counts of complete and abandoned responses, memory halfway and at the end."""
    prompts = [f"prompt {i} " * (1 + i % 7) for i in range(16)]
    expected = {}
    for prompt in prompts:
        new, _ = generation.continue_text(
            MODEL, generation.prefill(MODEL, prompt.encode()), max_new_tokens=30, greedy=True
        )
        expected[prompt] = bytes(new[0].tolist()).decode(errors="replace")
    until, counts = time.monotonic() + seconds, {"complete": 0, "abandoned": 0}

    async def client(i, http):
        draw = random.Random(i)
        while time.monotonic() < until:
            prompt, leaves = draw.choice(prompts), draw.choice([None, None, 0, 1, 10])
            body = {"model": "small", "prompt": prompt, "max_tokens": 30, "temperature": 0, "stream": True}
            text, seen = "", 0
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if leaves is not None and seen > leaves:
                        break
                    if line.startswith("data: {"):
                        text, seen = text + json.loads(line[6:])["choices"][0]["text"], seen + 1
                else:
                    assert text == expected[prompt]
                    counts["complete"] += 1
                    continue
            counts["abandoned"] += 1

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        everyone = asyncio.gather(*(client(i, http) for i in range(clients)))
        await asyncio.sleep(seconds / 2)
        halfway = resident()
        await everyone
    return counts, halfway, resident()


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_64_clients_that_often_disconnect(seconds):
    store = PrefixStore(MODEL, max_bytes=1 << 20)
    with served(MODEL, store=store, max_batch_size=32, max_queue=64) as url:
        counts, halfway, after = asyncio.run(hammer(url, seconds))
        wait_until_idle(url)
        metrics = httpx.get(f"{url}/metrics").text
    assert min(counts.values()) > 20, counts
    assert after - halfway < 20
    found = re.findall(r'^hqlt_requests_total{.*status="(\d+)"} (\d+)', metrics, re.MULTILINE)
    by_status = {int(status): int(count) for status, count in found}
    assert by_status.keys() == {200, 499}
    assert by_status[200] >= counts["complete"]  # some disconnect after the response is complete
    assert sum(by_status.values()) == sum(counts.values())
