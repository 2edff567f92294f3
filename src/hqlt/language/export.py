"""Export to a self-contained folder in Hugging Face format: weights, config, code, tokenizer, model card."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hqlt.data import Tokenizer as OurTokenizer
from hqlt.disk import new_folder
from hqlt.language.folder import find_model, load_model, read_config, tokenizer_of
from hqlt.language.template import plain_template
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained import config_as, to_transformers

CODE = "modeling_hqlt"
CLASSES = {"AutoConfig": "HQLTConfig", "AutoModel": "HQLTModel", "AutoModelForCausalLM": "HQLTForCausalLM"}
PAD = 0xFF
"""The byte that serves as padding token, because UTF-8 never uses it."""
MEMORIES = {
    "hybrid": "an exact KV-memory over a short window and a compressed FW-memory over the whole text",
    "kv": "a KV-memory (softmax attention)",
    "fw": "an FW-memory (fast weights)",
}
"""The memories of each kind of layer, as described in the model card."""


def export(where: str | Path, folder: Path, dtype: torch.dtype | None = None, architecture: str | None = None) -> None:
    """Export a model to a new folder that transformers' Auto classes load.

    They need `import hqlt` first, or `trust_remote_code=True`. A byte model gets a tokenizer with 256 tokens that
    AutoTokenizer loads.

    Args:
        where: the model's folder, or the run that trained it.
        folder: where to write; new or empty.
        dtype: dtype of the weights. Default: unchanged.
        architecture: one of `hqlt.model.pretrained.ARCHITECTURES`, to write a model of transformers that does not need
            hqlt.

    Raises:
        FileExistsError: when the folder is not empty.
        OSError: when it cannot be written.
        ValueError: when the architecture cannot express the model, and as `load_model` and `tokenizer_of` do.
    """
    config = read_config(where)
    if architecture is not None:
        config_as(config, architecture)
    tokenizer = tokenizer_of(where, config.vocab_size)
    with new_folder(folder):
        model, source = load_model(where), str(find_model(where))
        if dtype is not None:
            nn.Module.to(model, dtype)
        if architecture is None:
            save(model, tokenizer, source, folder)
        else:
            save_weights(to_transformers(model, architecture), tokenizer, source, folder)


def save(model: HQLTForCausalLM, tokenizer: OurTokenizer | None, source: str | None, folder: Path) -> None:
    """Write everything that `save_weights` writes, and the code and the model card."""
    config: Any = model.config
    config.auto_map = {auto: f"{CODE}.{name}" for auto, name in CLASSES.items()}
    save_weights(model, tokenizer, source, folder)
    package = resources.files("hqlt.language")
    shutil.copyfile(str(package / f"{CODE}.py"), folder / f"{CODE}.py")
    card = (package / "model_card.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.format(**facts_of(model, tokenizer, folder)), encoding="utf-8")


def save_weights(model: PreTrainedModel, tokenizer: OurTokenizer | None, source: str | None, folder: Path) -> None:
    """Write weights, configs and the tokenizer's files.

    Args:
        model: the model.
        tokenizer: its tokenizer; None: write none.
        source: folder or name of the tokenizer's files. Not used for bytes.
        folder: where to write.
    """
    config: Any = model.config
    generation: Any = model.generation_config
    if config.eos_token_id is None and tokenizer is not None and tokenizer.eos_id is not None:
        config.eos_token_id = generation.eos_token_id = tokenizer.eos_id
    if tokenizer is not None:
        theirs: Any = byte_tokenizer() if tokenizer.name == "bytes" else AutoTokenizer.from_pretrained(source)
        theirs.chat_template = theirs.chat_template or plain_template(tokenizer)  # `transformers serve` needs one
        theirs.pad_token = theirs.pad_token or theirs.eos_token
        if generation.pad_token_id is None:
            generation.pad_token_id = theirs.pad_token_id
        theirs.save_pretrained(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: token i is byte i, and byte 255 is padding."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # byte-level BPE maps these to themselves
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(PAD)} | {"<|pad|>": PAD}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        pad_token="<|pad|>",
        padding_side="left",
        split_special_tokens=True,  # the text "<|pad|>" is encoded as its bytes
    )


def facts_of(model: HQLTForCausalLM, tokenizer: OurTokenizer | None, folder: Path) -> dict[str, str]:
    """The fields of the model card."""
    config: Any = model.config
    kinds = {kind: config.kinds.count(kind) for kind in dict.fromkeys(config.kinds)}
    rules = [block.memory.fw for block in model.model.layers if block.memory.fw is not None]
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        "hidden size, heads": f"{config.hidden_size}, {config.num_heads}",
        "blend, mixer, window": f"{config.blend}, {config.mixer}, {config.window}",
        "fast weights": f"{config.fast_weights} ({rules[0].extra_repr()})" if rules else "none",
        "vocabulary": f"{config.vocab_size:,} ({'bytes' if tokenizer and tokenizer.name == 'bytes' else 'tokens'})",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return {
        "name": folder.name,
        "where": folder.name,
        "memories": " or ".join(MEMORIES[kind] for kind in kinds),
        "facts": "\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    }
