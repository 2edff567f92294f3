"""`hqlt train`: train a language model from scratch, on a laptop or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.train.language.settings import TrainSettings


def train(folder: Path | None = None, device: str | None = None, wandb: bool = False, **settings: Any) -> None:
    """Train a language model from scratch, for example on a text file: `hqlt train --data=book.txt`.

    Without options, this trains the smallest model on the source code of Python's standard library. Run the same
    command again to resume exactly after an interruption; `--config=runs/X/config.json` repeats a run. `--config
    hqlt-340m` is the paper's recipe. Under `torchrun --no-python` the same command uses all processes. Any field of the
    model can be set with `--model.NAME`.

    Args:
        folder: the folder of the run; default: runs/PRESET-DATA.
        device: cuda or cpu; default: cuda if available.
        wandb: also report to Weights & Biases (package wandb; WANDB_MODE=offline writes to FOLDER/wandb only).
            TensorBoard and trackio are used if they are installed.
    """
    from hqlt.train.language.run import run

    run(TrainSettings(**settings), folder, device, wandb)
