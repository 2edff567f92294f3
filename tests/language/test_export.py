"""An exported folder is self-contained: transformers loads it, with and without `import hqlt`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import hqlt
from hqlt.cli import main
from hqlt.language.export import byte_tokenizer
from hqlt.language.folder import load_model, tokenizer_of
from tests.language.conftest import build

TOKENS = torch.tensor([list("an exported model β".encode())])

ELSEWHERE = """
import os, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "hqlt" not in sys.modules
folder, again = sys.argv[1:]
for here in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(here, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(here)
    logits = model(**tokenizer("an exported model β", return_tensors="pt")).logits
    print(repr(logits.sum().item()))
    if here == folder:
        model.save_pretrained(again), tokenizer.save_pretrained(again)  # a model loaded this way can be saved again
import hqlt
assert hqlt.HQLTConfig._auto_class is None
"""


@pytest.fixture
def exported(folder, tmp_path):
    main(["export", str(folder), str(tmp_path / "exported")])
    return tmp_path / "exported"


def test_loads_after_import(folder, exported):
    model = load_model(folder)
    for auto in (AutoModelForCausalLM, AutoModel):
        assert auto.from_pretrained(exported, dtype="auto").__module__ == "hqlt.model.language_model"
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert type(AutoConfig.from_pretrained(exported)) is hqlt.HQLTConfig
    assert torch.equal(load_model(exported)(TOKENS).logits, model(TOKENS).logits)


def test_loads_with_remote_code_alone(folder, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = map(float, done.stdout.split())
    assert first == second == pytest.approx(load_model(folder)(TOKENS).logits.sum().item())


def test_the_model_card(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| vocabulary | 256 (bytes) |" in card
    assert "trust_remote_code=True" in card


def test_bytes_as_a_tokenizer(exported):
    text = "".join(map(chr, range(1, 0x250))) + "  spaces\n\n\tβ 漢 🙂"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(byte_tokenizer()) == 256
    assert tokenizer_of(exported, 256).name == "bytes"  # so that reports count bytes


def test_batches_may_be_padded(exported):
    """As in the model card: padded rows of different lengths are continued as each of them alone."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    texts = ["a longer text", "β", "<|pad|> is a text"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)] == [
        list(text.encode()) for text in texts
    ]
    options = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(**batch, **options)
    for i, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert torch.equal(together[i, -4:], alone[0, -4:])


def test_with_a_tokenizer_and_in_another_dtype(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def export(self): return self"] * 9, trainer)
    tokenizer_files = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    tokenizer_files.save_pretrained(tmp_path / "model")
    build(vocab_size=300).save_pretrained(tmp_path / "model")
    main(["export", str(tmp_path), str(tmp_path / "exported"), "--dtype=bfloat16"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == tokenizer_files.eos_token_id
    text = "def export(β): return"
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")(text) == tokenizer_files(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").pad_token == "<|endoftext|>"
    assert tokenizer_of(tmp_path / "exported", 300).eos_id == tokenizer_files.eos_token_id


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    with pytest.raises(SystemExit, match="expected a new or empty folder"):
        main(["export", str(folder), str(tmp_path / "kept")])


@pytest.mark.parametrize("made", [False, True])
def test_a_failed_export_leaves_nothing(folder, tmp_path, monkeypatch, made):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hqlt.language.export.shutil.copyfile", full)
    if made:
        (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="No space left on device"):
        main(["export", str(folder), str(tmp_path / "out")])
    assert list(tmp_path.glob("out/*")) == [] and (tmp_path / "out").exists() == made


def test_an_unwritable_folder_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr("hqlt.language.export.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match="/proc/sys"):
        main(["export", str(folder), "/proc/sys"])
