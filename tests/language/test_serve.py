"""`transformers serve` on an exported folder, queried by the openai client. Skipped if these are not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqlt.cli import main
from hqlt.data import load_tokenizer
from hqlt.language.template import chat_tokens
from tests.language.conftest import build

for package in ("openai", "fastapi", "uvicorn", "accelerate"):
    pytest.importorskip(package, reason="transformers serve: pip install 'transformers[serving]'")

SERVE = "from transformers.cli.transformers import main; main()"
TEXT = "Once upon a time"
LENGTH = 8


@pytest.fixture
def exported(tmp_path):
    model = build()
    with torch.no_grad():  # so that greedy decoding produces ASCII
        model.lm_head.weight[128:] = model.lm_head.weight[:128]
    model.save_pretrained(tmp_path / "model")
    main(["export", str(tmp_path), str(tmp_path / "exported"), "--dtype=float32"])
    return str(tmp_path / "exported")


@pytest.fixture
def address(exported, tmp_path):
    """The address of a server that has not imported hqlt before it loads the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", exported, "--trust-remote-code", f"--port={port}", "--device=cpu"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def wait_for(page: str, server: subprocess.Popen, log) -> None:
    while True:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(page).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)


def test_chat_and_completion_equal_generate(exported, address):
    from openai import OpenAI

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)

    def continued(tokens: list[int]) -> str:
        made = model.generate(torch.tensor([tokens]), max_new_tokens=LENGTH, do_sample=False)[0, len(tokens) :]
        return tokenizer.decode(made, skip_special_tokens=True)

    messages = [{"role": "user", "content": TEXT}]
    answer = continued(chat_tokens(load_tokenizer("bytes"), messages))  # the export wrote the plain template
    with OpenAI(base_url=address, api_key="-", max_retries=0) as client:
        options = {"model": exported, "max_tokens": LENGTH, "temperature": 0}
        response = client.chat.completions.create(messages=messages, **options)
        assert response.choices[0].message.content == answer
        streamed = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(part.choices[0].delta.content or "" for part in streamed if part.choices) == answer
        completion = client.completions.create(prompt=TEXT, **options)
        assert completion.choices[0].text == continued(list(TEXT.encode()))
