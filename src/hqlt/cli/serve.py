"""`hqlt serve`: an OpenAI-compatible server for a model."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.cli.retention_options import RetentionOptions
from hqlt.disk import check_writable
from hqlt.errors import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    shared_prefixes: bool = False,
    max_batch_size: int = 32,
    max_queue: int = 256,
    prefill_chunk: int = 256,
    store: Path | None = None,
    store_bytes: int = 1 << 30,
    store_disk_bytes: int | None = None,
    store_dtype: str | None = None,
    max_body: int = 16 << 20,
    max_prompt: int = 1 << 20,
    max_tokens: int = 16_384,
    timeout: float = 600.0,
    grace: int = 30,
    threads: int | None = None,
    device: str | None = None,
    **retention_options: Any,
) -> None:
    """Serve a model with OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models) and a chat page at /.

    Requests are batched continuously. The next turn of a conversation reads only its new tokens, because the state
    after each turn is stored. Ctrl-C or SIGTERM stops the server: running requests may finish within --grace seconds,
    and the states of the rest are stored. See docs/serving.md.

    Args:
        model: folder of a model, or of the run that trained it.
        host: address to listen on; other machines can connect only with 0.0.0.0, :: or an address of this machine.
        port: port to listen on; 0 takes a free one.
        name: name of the model in the API; default: the name of its folder.
        api_key: key that clients must send; separate several with commas, and each has its own stored states. The
            environment variable HQLT_API_KEY does the same and is not visible in process lists.
        shared_prefixes: let requests with one key use states stored for another.
        max_batch_size: maximum number of continuations decoded at once.
        max_queue: maximum number of requests that wait for a free row; more are refused with 429.
        prefill_chunk: number of prompt tokens read between two decoding steps.
        store: also keep states in this folder, across restarts.
        store_bytes: maximum size of the states in memory; the least recently used are evicted.
        store_disk_bytes: maximum size of the folder; default: no limit.
        store_dtype: bfloat16 or int8 stores rounded states, so that more of them fit; the text changes a little.
        max_body: maximum size of a request in bytes; larger ones are refused with 413.
        max_prompt: maximum number of tokens per prompt; longer ones are refused with 400.
        max_tokens: maximum number of tokens per continuation; requests for more are refused with 400.
        timeout: seconds from a request to the end of its response, after which it ends with 408.
        grace: seconds in which running requests may finish after Ctrl-C or SIGTERM.
        threads: number of torch threads; default: all cores except one, which is left for the connections.
        device: device of the model, such as cpu; default: cuda if available.
    """
    require("transformers", "fastapi", "uvicorn", "prometheus_client")
    check(**locals())
    notes, keys = Console(stderr=True), keys_of(api_key)
    if not keys and host not in LOOPBACK:
        notes.print(f"anyone who can reach {host} can use this server, because no --api-key was given", style="yellow")
    import torch

    from hqlt.device import usable_device
    from hqlt.language.folder import tokenizer_of
    from hqlt.serve.app import create_app
    from hqlt.serve.engine import Engine
    from hqlt.serve.server import Server, bind_socket
    from hqlt.serve.service import Limits
    from hqlt.state import PrefixStore

    retention, limits = (
        RetentionOptions(**retention_options),
        Limits(max_body=max_body, max_prompt=max_prompt, max_tokens=max_tokens, timeout=timeout),
    )
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))
    with bind_socket(host, port) as sock:  # before the model is loaded, which is slow
        tokenizer = tokenizer_of(model, retention.config_of(model).vocab_size)
        language_model = retention.load(model, usable_device(device), notes)
        states = PrefixStore(language_model, store_bytes, store, store_disk_bytes, store_dtype)
        engine = Engine(
            language_model, states, max_batch_size=max_batch_size, max_queue=max_queue, prefill_chunk=prefill_chunk
        )
        api_name = name or model.resolve().name
        hosts = {*LOOPBACK, "[::1]"} if host in LOOPBACK else None
        app = create_app(engine, tokenizer, api_name, limits, keys, shared_prefixes, hosts)
        Server(app, sock, grace, lambda: print_ready(notes, url_of(sock), api_name, bool(keys))).serve_here()


def check(
    port: int, max_batch_size: int, max_queue: int, prefill_chunk: int, store: Path | None, store_bytes: int,
    store_disk_bytes: int | None, max_body: int, max_prompt: int, max_tokens: int, timeout: float, grace: int,
    threads: int | None, **_: object,
) -> None:  # fmt: skip
    """Raises ValueError or OSError for options that would otherwise fail only after the model is loaded."""
    for least, options in (
        (
            1,
            {
                "max-batch-size": max_batch_size,
                "prefill-chunk": prefill_chunk,
                "max-body": max_body,
                "max-prompt": max_prompt,
                "max-tokens": max_tokens,
                "threads": 1 if threads is None else threads,
            },
        ),
        (
            0,
            {
                "max-queue": max_queue,
                "store-bytes": store_bytes,
                "store-disk-bytes": store_disk_bytes or 0,
                "grace": grace,
            },
        ),
    ):
        for option, value in options.items():
            if value < least:
                raise ValueError(f"{option}: expected at least {least}, got {value}")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port: expected 0 to {(1 << 16) - 1}, got {port}")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout: expected a number of seconds above 0, got {timeout}")
    if store is None and store_disk_bytes is not None:
        raise ValueError("store-disk-bytes: expected --store FOLDER as well, got none")
    if store is not None:
        check_writable(store, folder=True)


def keys_of(api_key: str | None) -> list[str]:
    """The accepted API keys; none for a server without authentication."""
    given = os.environ.get("HQLT_API_KEY") if api_key is None else api_key
    keys = [key.strip() for key in (given or "").split(",")]
    if given is not None and not all(keys):
        raise ValueError("api-key: expected keys separated by commas, got an empty one")
    return keys if given is not None else []


def url_of(sock: socket.socket) -> str:
    host, port, *_ = sock.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def print_ready(notes: Console, url: str, name: str, has_key: bool) -> None:
    key = ' -H "Authorization: Bearer $HQLT_API_KEY"' if has_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    notes.print(f"{name} at {url}, its API at {url}/v1", highlight=False, soft_wrap=True)
    notes.print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        style="dim", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
