"""`hqlt retrofit`: give a converted model a bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.train.retrofit.settings import RetrofitSettings


def retrofit(model: Path, folder: Path, device: str | None = None, wandb: bool = False, **settings: Any) -> None:
    """Give a converted model a bounded memory: most layers get windowed attention and an FW-memory.

    Stage 0 measures how much recall the window costs in each layer; layers where it costs most keep full attention.
    Stage 1 fits each FW-memory to the output of its layer's original attention, stage 2 the whole model to the
    original's predictions, and stage 3 (with --tune.tokens) to the next token. Each stage has its own token budget. The
    resulting model is FOLDER/model. The same command resumes an interrupted run exactly. Controls: --rule=none,
    --lora-rank=0, --full-choice=random.

    Args:
        model: the folder of a model, as written by `hqlt convert`.
        folder: output folder.
        device: cuda or cpu; by default cuda if available.
        wandb: also report to Weights & Biases (package wandb; WANDB_MODE=offline writes to FOLDER/wandb only).
            TensorBoard and trackio are used if they are installed.
    """
    from hqlt.train.retrofit.run import run

    run(RetrofitSettings(**settings), model, folder, device, wandb)
