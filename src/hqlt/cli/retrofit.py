"""`hqlt retrofit`: a converted model gains a bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.train.retrofit.settings import RetrofitSettings


def retrofit(model: Path, folder: Path, device: str | None = None, **settings: Any) -> None:
    """Give a converted model a bounded memory: most layers attend to a window, with an FW-memory beside it.

    Stage 0 measures what the window costs each layer, and keeps those where it costs most as they are. Stage 1 fits
    each FW-memory to what its layer's attention said, stage 2 the whole model to the original's predictions, stage 3
    (by --tune.tokens) to the next token; each has a budget of its own. The result, FOLDER/model, is a model as any
    other. The same command resumes where an earlier one was stopped, exactly. Controls: --rule=none, --lora-rank=0,
    --full-choice=random.

    Args:
        model: a model's folder, as `hqlt convert` wrote it.
        folder: where everything goes.
        device: cuda or cpu; cuda where there is one by default.
    """
    from hqlt.train.retrofit.run import run

    run(RetrofitSettings(**settings), model, folder, device)
