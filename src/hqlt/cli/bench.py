"""`hqlt bench`: how fast, beside what else there is. One table, and JSON."""

from __future__ import annotations

import importlib
import json as json_format
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from hqlt import native
from hqlt.bench.race import table_of
from hqlt.disk import check_writable, write_atomic
from hqlt.registry import check_choice

CAPTION = "float32; ×: times faster than the first; %: of the measured ceiling"


def bench(
    what: Literal["ops", "layer", "step", "train", "gpu", "worlds", "threads", "serve", "decode"],
    threads: int = 2,
    rounds: int = 7,
    only: str | None = None,
    json: Path | None = None,
    quick: bool = False,
) -> None:
    """Measure ours and its peers side by side on this machine, and print one table.

    Results are compared before anything is timed; contestants take turns, and times are medians. Beside each stand its
    peak memory and the part of the machine's measured ceiling that its own count of operations (or bytes) reaches.

    Args:
        what: "ops" the memories' reads and writes, "layer" one layer, "step" one token, "train" one training step, all
            on the CPU; "gpu" a synchronous layer's middle and a training step of hqlt-340m on a GPU; "worlds" steps of
            the partially observable worlds, in as many threads as NumPy uses for them: one; "threads" a training step,
            on a quiet and on a busy machine, by how torch's threads wait; "serve" what clients of `hqlt serve` wait
            for, and what idle sessions take.
        threads: of torch and of the native memories.
        rounds: turns of each contestant.
        only: one part of the benchmark, such as "delta" of ops, "synchronous" of step, or "VisualMatch" of worlds.
        json: where the figures go; runs/bench/WHAT.json by default.
        quick: sizes so small that the times say nothing; to see that everything runs.
    """
    module = importlib.import_module(f"hqlt.bench.{what}")
    file = json or Path("runs/bench") / f"{what}.json"
    check_options(module.ONLY, threads, rounds, only)
    check_writable(file)
    setting = module.setting() if hasattr(module, "setting") else setting_of_cpu(threads)
    setting |= getattr(module, "SETTING", {})
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        results = module.run(rounds, quick, only)
    finally:
        torch.set_num_threads(before)
    title = f"hqlt bench {what}: " + ", ".join(f"{name} {value}" for name, value in setting.items())
    console = Console()
    if not console.is_terminal:  # rich cannot know how wide a log may be
        console.width = 160
    console.print(table_of(title, results, getattr(module, "CAPTION", CAPTION)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json_format.dumps({"setting": setting, "results": results}, indent=1) + "\n").encode())


def check_options(parts: Sequence[str], threads: int, rounds: int, only: str | None) -> None:
    """Raises ValueError for what no benchmark can run with."""
    cores = max(os.cpu_count() or 1, 2)
    if not 1 <= threads <= cores:
        raise ValueError(f"threads: expected 1 to {cores}, got {threads}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if only is not None:
        check_choice("only", only, parts)


def setting_of_cpu(threads: int) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "clock": "the processor's" if threads == 1 else "the wall's",
        "torch": torch.__version__,
        "instruction set": native.instruction_set(),
    }
