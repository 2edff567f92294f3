"""The language and recall tables at the paper's scale: which commands, how many GPU hours, and running them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console

MODELS = ("transformer-{}", "deltanet-{}", "hqlt-{}-delayed-streaming", "hqlt-{}-delayed-chunk", "hqlt-{}")
RECALL: Mapping[str, Mapping[str, Any]] = {
    "sum": {"mixer": "sum"},
    "scalar": {"mixer": "scalar"},
    **{f"window-{window}": {"window": window} for window in (128, 256, 512, 1024)},
}
"""What the recall table changes of hqlt-340m, by name."""
CONFIGS = {"340m": "configs/hqlt-340m.yaml", "1.3b": "configs/hqlt-1.3b.yaml"}
TOKENS, LENGTHS = 28_672 * 524_288, {"340m": 2048, "1.3b": 2240}
GPU, PEAK, USED = "H100", 989e12, 0.4
"""A GPU's peak in bfloat16, and the share of it that such runs use."""


class Run(NamedTuple):
    name: str
    commands: list[list[str]]
    hours: float
    """Of one GPU."""


def runs_of(what: str, gpus: int) -> list[Run]:
    """The runs of the table of language models ("language") or of recall ("recall")."""
    wanted: list[tuple[str, str, dict[str, Any]]]
    if what == "language":
        wanted = [(model.format(size), size, {}) for size in CONFIGS for model in MODELS]
    else:
        wanted = [("transformer-340m", "340m", {}), ("transformer-340m", "340m", {"kv_window": 1024})]
        wanted += [("deltanet-340m", "340m", {}), ("hqlt-340m", "340m", {})]
        wanted += [("hqlt-340m", "340m", dict(changes)) for changes in RECALL.values()]
    return [run_of(preset, size, changes, gpus) for preset, size, changes in wanted]


def run_of(preset: str, size: str, changes: Mapping[str, Any], gpus: int) -> Run:
    from hqlt.model import preset as preset_of
    from hqlt.train.language.cost import flops_per_token

    name = "-".join([preset, *(f"{key}-{value}" for key, value in changes.items())])
    folder = f"runs/{name}"
    train = ["torchrun", f"--nproc-per-node={gpus}", "--module", "hqlt", "train", f"--config={CONFIGS[size]}"]
    train += [f"--preset={preset}", f"--folder={folder}", *(f"--model.{key}={value}" for key, value in changes.items())]
    cost = flops_per_token(preset_of(preset, **changes), LENGTHS[size]) * TOKENS
    return Run(name, [train, ["hqlt", "eval", folder, "--suite=paper"]], cost / (PEAK * USED) / 3600)


def print_and_run(what: str, console: Console) -> None:
    """Print every command with its hours; where there is a GPU, run them one after the other, on all GPUs there are.

    A run that is finished, or half finished, goes on from where it is.
    """
    import torch

    found = torch.cuda.device_count()
    runs = runs_of(what, found or 8)
    console.print(f"{sum(run.hours for run in runs):,.0f} hours of one {GPU} in all, at {USED:.0%} of its peak:")
    for run in runs:
        console.print(f"\n# {run.name}: {run.hours:,.0f} hours of one {GPU}")
        for command in run.commands:
            console.print(shlex.join(command), soft_wrap=True)
    if not found:
        console.print("\nNo GPU here: nothing was run.")
        return
    for run in runs:
        for command in run.commands:
            subprocess.run(command, check=True)
