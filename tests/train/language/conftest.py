"""A small text, a small model, and the command line in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hqlt.data import prepare

SMALL = [
    "--model={hidden_size: 16, num_heads: 2, num_hidden_layers: 2, intermediate_size: 32, window: 4}",
    "--length=24", "--batch-size=8", "--steps=12", "--warmup-steps=2", "--save-every=4", "--validate-every=6",
    "--validation-rows=4",
]  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A data folder: documents of consecutive numbers, about a thousand bytes each."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "in").mkdir()
    for i in range(30):
        (folder / "in" / f"{i}.txt").write_text(" ".join(str(n * (i + 1)) for n in range(200)))
    prepare(folder / "in", folder / "tokens", validation_share=0.1, test_share=0.1)
    return folder / "tokens"


def command(text: Path, folder: Path, *options: str, processes: int | None = None) -> list[str]:
    hqlt = [sys.executable, "-m", "hqlt"]
    if processes:
        hqlt = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
                "--module", "hqlt"]  # fmt: skip
    return [*hqlt, "train", f"--data={text}", f"--folder={folder}", *SMALL, *options]


def train(text: Path, folder: Path, *options: str, processes: int | None = None, status: int = 0) -> str:
    """Run to the end and return the output."""
    ran = subprocess.run(
        command(text, folder, *options, processes=processes),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert ran.returncode == status, ran.stdout
    return ran.stdout


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
