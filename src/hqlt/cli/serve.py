"""`hqlt serve`: a model behind HTTP, in OpenAI's form."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hqlt.cli.keeping import Keeping
from hqlt.disk import check_writable
from hqlt.errors import require

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    shared_prefixes: bool = False,
    rows: int = 32,
    queue: int = 256,
    chunk: int = 256,
    store: Path | None = None,
    store_bytes: int = 1 << 30,
    store_disk_bytes: int | None = None,
    max_body: int = 16 << 20,
    max_prompt: int = 1 << 20,
    max_tokens: int = 16_384,
    timeout: float = 600.0,
    grace: int = 30,
    device: str | None = None,
    **keeping: Any,
) -> None:
    """Serve a model in OpenAI's form: /v1/chat/completions, /v1/completions, /v1/models, a chat page at /.

    Requests run together, whoever sends them. A conversation's next turn reads only what is new, because the state
    after each turn is kept. Ctrl-C or SIGTERM stops: what runs may end, and what cannot in time is stored. See
    docs/serving.md.

    Args:
        model: a model's folder, the run that trained it, or what `hqlt convert` made.
        host: the address to listen on; beyond this machine only with 0.0.0.0, :: or an address of its own.
        port: 0 takes a free one.
        name: what the API calls the model; the folder's name by default.
        api_key: clients must send it; several, each with states of its own, are divided by commas. The variable
            HQLT_API_KEY says the same, and no list of processes shows it.
        shared_prefixes: let what was read for one key be found for others.
        rows: continuations that run at once.
        queue: requests that may wait for a row; others are refused with 429.
        chunk: tokens of prompts that are read between two tokens of the rows that run.
        store: keep states in this folder, too, over restarts.
        store_bytes: what states in memory may take; the least recently used go first.
        store_disk_bytes: the same for the folder; no limit by default.
        max_body: bytes of a request; more is refused with 413.
        max_prompt: tokens of a prompt; more is refused with 400.
        max_tokens: tokens of an answer; more is refused with 400.
        timeout: seconds from a request to the end of its answer; then it ends with 408.
        grace: seconds in which what runs may end after Ctrl-C or SIGTERM.
        device: where the model runs, such as cpu; cuda where there is one by default.
    """
    require("transformers", "fastapi", "uvicorn", "prometheus_client")
    check(**locals())
    listening = listen(host, port)  # before the model is loaded, which takes a while
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    notes = Console(stderr=True)
    keys = keys_of(api_key)
    if not keys and host not in LOOPBACK:
        notes.print(f"anyone who reaches {host} may use this server: no --api-key was given", style="yellow")
    from hqlt.device import usable_device
    from hqlt.language.folder import tokenizer_of
    from hqlt.serve.app import create_app
    from hqlt.serve.engine import Engine
    from hqlt.serve.service import Limits
    from hqlt.state import PrefixStore

    retention = Keeping(**keeping)
    tokenizer = tokenizer_of(model, retention.config_of(model).vocab_size)
    language_model = retention.load(model, usable_device(device), notes)
    states = PrefixStore(language_model, store_bytes, **store_options(store, store_disk_bytes))
    called = name or model.resolve().name
    app = create_app(
        Engine(language_model, states, rows=rows, queue=queue, chunk=chunk), tokenizer, called,
        limits=Limits(body=max_body, prompt=max_prompt, tokens=max_tokens, seconds=timeout),
        keys=keys, shared_prefixes=shared_prefixes, hosts={*LOOPBACK, "[::1]"} if host in LOOPBACK else None,
    )  # fmt: skip
    run(app, listening, grace, lambda: print_ready(notes, url, called, bool(keys)))
