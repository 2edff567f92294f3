"""`hqlt train`: a language model from scratch, on a laptop or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.train.language.settings import TrainSettings


def train(folder: Path | None = None, device: str | None = None, **settings: Any) -> None:
    """Train a language model from scratch, on a text file for one: `hqlt train --data=book.txt`.

    Without options: the smallest model on the source of Python's standard library. The same command resumes where an
    earlier one was stopped, exactly; `--config=runs/X/config.json` repeats a run. `--config hqlt-340m` is
    the paper's recipe; under `torchrun --no-python` the same command uses all processes. Any field of the model can be
    given by `--model.NAME`.

    Args:
        folder: where everything goes; runs/PRESET-DATA by default.
        device: cuda or cpu; cuda where there is one by default.
    """
    from hqlt.train.language.run import run

    run(TrainSettings(**settings), folder, device)
