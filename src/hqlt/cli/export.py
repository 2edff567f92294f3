"""`hqlt export`: write a model in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console


def export(
    model: Path,
    folder: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    as_: Literal["llama", "qwen2", "qwen3", "mistral", "qwen3_next", "qwen3_5_text", "olmo_hybrid"] | None = None,
) -> None:
    """Export a model with its tokenizer, code and model card to a folder that transformers can load.

    AutoModelForCausalLM loads it after `import hqlt`, or with `trust_remote_code=True`.

    Args:
        model: the model's folder, or the run that trained it.
        folder: output folder; new or empty.
        dtype: dtype of the weights; unchanged by default.
        as_: export as a model of transformers, which does not need hqlt, if that architecture can express the model.
    """
    import torch

    from hqlt.language import export as writer

    writer.export(model, folder, getattr(torch, dtype) if dtype else None, as_)
    Console().print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}", highlight=False)
