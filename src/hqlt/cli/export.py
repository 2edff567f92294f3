"""`hqlt export`: a model as a folder in Hugging Face's form."""

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
    """Write a model with its tokenizer, code and card to a folder that transformers loads, ready to be shared.

    It loads with AutoModelForCausalLM after `import hqlt`, and with `trust_remote_code=True` without.

    Args:
        model: a model's folder, or the run that trained it.
        folder: where to write; new or empty.
        dtype: of the weights; as they are by default.
        as_: write it as a model of transformers, which needs no hqlt; for models that it can express.
    """
    import torch

    from hqlt.language import export as writer

    writer.export(model, folder, getattr(torch, dtype) if dtype else None, as_)
    Console().print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}", highlight=False)
