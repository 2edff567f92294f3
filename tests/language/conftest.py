"""Small byte models on disk, in float64, so that equal means equal to 1e-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hqlt.data.tokenizer import Fast
from hqlt.model import HQLTConfig, HQLTForCausalLM

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "window": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 256,
    "initializer_range": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "delayed-streaming": {"blend": "delayed-streaming"},
    "delayed-chunk": {"blend": "delayed-chunk"},
    "convolution": {"mixer": "sum", "conv_size": 3, "output_gate": True},
    "transformer": {"layer_kinds": ["kv", "kv"]},
    "alternating": {"layer_kinds": ["fw", "kv", "hybrid"], "num_hidden_layers": 3, "kv_window": 3, "beta_max": 1.0},
}


def build(**fields: Any) -> HQLTForCausalLM:
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**{**SMALL, **fields})).double().eval()


def prepending() -> Fast:
    """A tokenizer of characters that begins each text with a blank, ▁, and decodes without it, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = ["<s>", "</s>", "▁", "\n", *map(chr, range(0x21, 0x7F))]
    tokenizer: Any = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    return Fast("prepending", tokenizer, eos_id=1)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> HQLTForCausalLM:
    return build(**KINDS[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A synchronous model's folder, as a run leaves it."""
    build().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"
