"""Small byte models on disk, in float64, so that results agree to 1e-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hqlt.data.tokenizer import FastTokenizer
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


def prepending() -> FastTokenizer:
    """A character tokenizer that prepends a space, ▁, to each text and removes it when decoding, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = ["<s>", "</s>", "▁", "\n", *map(chr, range(0x21, 0x7F))]
    tokenizer: Any = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    return FastTokenizer("prepending", tokenizer, eos_id=1)


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)


def save_chat_tokenizer(folder: Path, template: str | None = CHATML) -> int:
    """Save a small BPE tokenizer with a chat template; returns its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["system user assistant the answer. \n\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)
    made.save_pretrained(folder)
    return len(made)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> HQLTForCausalLM:
    return build(**KINDS[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run folder of a synchronous model."""
    build().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"
