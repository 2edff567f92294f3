"""A tiny byte-level teacher with full attention, and a text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqlt import HQLTConfig, HQLTForCausalLM
from hqlt.cli import main

SMALL = (
    "--window=4", "--sinks=1", "--full=1", "--measure-tokens=96", "--precision=float32", "--lora-rank=0",
    "--fit={tokens: 3072, length: 48, batch_size: 4, learning_rate: 0.005}",
    "--distill={tokens: 768, length: 24, batch_size: 4, learning_rate: 0.005}",
    "--validation-rows=4", "--save-every=3", "--micro-batch-size=2",
)  # fmt: skip
"""16 updates in stage 1, 8 in stage 2."""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """The folder of a model of three kv layers with full attention."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 24}
    config = HQLTConfig(vocab_size=256, num_hidden_layers=3, layer_kinds=["kv"] * 3, **sizes)
    model, generator = HQLTForCausalLM(config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.3, generator=generator)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    letters = random.Random(0)
    file.write_text("\n".join("".join(letters.choices("abcdefgh ", k=40)) for _ in range(100)))
    return file


def retrofit(teacher: Path, text: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run the command to its end; returns the content of results.json."""
    main(["retrofit", str(teacher), str(folder), f"--data={text}", *SMALL, *options])
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
