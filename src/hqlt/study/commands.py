"""The paper's language tables at full scale: print the commands with an estimate of GPU hours, and run them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from hqlt.evaluate.paper import tables
from hqlt.registry import check_choice

if TYPE_CHECKING:
    from hqlt.train.language.settings import TrainSettings

TABLES = ("language", "language-ablations", "recall")
"""The tables. A run that belongs to two of them is trained once."""
DATA = (
    "hqlt", "data", "prepare", "HuggingFaceFW/fineweb-edu", "--subset=sample-100BT",
    "--tokenizer=fla-hub/transformer-1.3B-100B", "--limit-tokens=16000000000",
)  # fmt: skip
PROGRAMS = {"hqlt": ("-m", "hqlt"), "torchrun": ("-m", "torch.distributed.run")}
"""Arguments that run each program with the current Python."""
GPU, PEAK, USED = "H100", 989e12, 0.4
"""A GPU, its peak FLOP/s in bfloat16, and the share of the peak that training is assumed to reach."""


class Run(NamedTuple):
    """The training and evaluation of one model."""

    name: str
    folder: Path
    data: Path
    commands: list[list[str]]
    hours: float
    """Estimated hours of one GPU."""

    @property
    def finished(self) -> bool:
        """Whether the model is evaluated, which is the last command."""
        return (self.folder / "eval" / "results.json").is_file()


def runs_of(what: str, gpus: int) -> list[Run]:
    """List the runs of a table: the paper's models, as in `hqlt/evaluate/paper.yaml`.

    Args:
        what: one of TABLES.
        gpus: number of GPUs that the commands are for.

    Raises:
        FileNotFoundError, ValueError: if a recipe is missing or invalid.
    """
    models = [(row["preset"], row.get("changes", {}), row) for row in tables()["models"].values()]
    of_table = {
        "language": [(name, changes) for name, changes, row in models if "language" in row and not changes],
        "language-ablations": [
            (name, changes) for name, changes, row in models if "language" in row and (changes or name == "hqlt-340m")
        ],
        "recall": [(name, changes) for name, changes, row in models if "recall" in row and "340m" in name],
    }
    return [run_of(name, changes, gpus) for name, changes in of_table[what]]


def run_of(preset: str, changes: Mapping[str, Any], gpus: int) -> Run:
    """Make the run of a preset with changes to its fields."""
    from hqlt.model import preset as preset_of
    from hqlt.train.language.cost import flops_per_token

    name = "-".join([preset, *(f"{key}-{value}" for key, value in changes.items())])
    folder = Path("runs") / name
    config, recipe = recipe_of("1.3b" if "1.3b" in preset else "340m")
    train = ["torchrun", f"--nproc-per-node={gpus}", "--module", "hqlt", "train", f"--config={config}"]
    train += [f"--preset={preset}", f"--folder={folder}", *(f"--model.{key}={value}" for key, value in changes.items())]
    score = ["hqlt", "eval", str(folder), "--suite=paper", "--device=cuda", f"--folder={folder / 'eval'}"]
    cost = flops_per_token(preset_of(preset, **changes), recipe.length)
    cost *= recipe.steps * recipe.batch_size * recipe.length
    if recipe.activation_checkpointing:
        cost *= 4 / 3  # a second forward pass; the backward pass costs as much as two
    return Run(name, folder, Path(recipe.data), [train, score], cost / (PEAK * USED) / 3600)


def recipe_of(size: str) -> tuple[str, TrainSettings]:
    """Return the name and the settings of the paper's recipe, as in `hqlt train --config=hqlt-SIZE`."""
    import yaml

    from hqlt.train.language.settings import TrainSettings

    name = f"hqlt-{size}"
    file = Path(str(resources.files("hqlt"))) / "configs" / f"{name}.yaml"
    return name, TrainSettings(**yaml.safe_load(file.read_text(encoding="utf-8")))


def print_and_run(what: str, only: str | None, console: Console) -> None:
    """Print every command with its estimated hours; if there are GPUs, run the commands in sequence on all of them.

    Unfinished runs are resumed, finished ones skipped.

    Args:
        what: one of TABLES.
        only: name of a single run; None for all.
        console: where the commands are printed.

    Raises:
        ValueError: for an unknown run.
        ChildProcessError: if a command fails.
    """
    import torch

    from hqlt.data.manifest import MANIFEST

    found = torch.cuda.device_count()
    runs = runs_of(what, found or 8)
    if only is not None:
        check_choice("only", only, [run.name for run in runs])
        runs = [run for run in runs if run.name == only]
    console.print(
        f"Estimated total: {sum(r.hours for r in runs):,.0f} hours on one {GPU}, at {USED:.0%} of its peak FLOP/s."
    )
    data = {run.data: [*DATA, f"--folder={run.data}"] for run in runs}
    blocks = [("data, once", list(data.values()))]
    for run in runs:
        note = ", already finished" if run.finished else ""
        blocks.append((f"{run.name}: {run.hours:,.0f} hours on one {GPU}{note}", run.commands))
    for title, commands in blocks:
        console.print(f"\n# {title}")
        for command in commands:
            console.print(shlex.join(command), soft_wrap=True)
    if not found:
        console.print("\nNo GPU found: nothing was run.")
        return
    waiting = [command for folder, command in data.items() if not (folder / MANIFEST).is_file()]
    for command in waiting + [command for run in runs if not run.finished for command in run.commands]:
        status = subprocess.run([sys.executable, *PROGRAMS[command[0]], *command[1:]], check=False).returncode
        if status:
            raise ChildProcessError(
                f"{shlex.join(command)}: expected exit status 0, got status {status}; see its output above; the same "
                f"hqlt reproduce resumes from there"
            )
