import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqlt.data import load_tokenizer, train_tokenizer
from tests.data.conftest import texts

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.add(id) for id in ids]
    return [*pieces, stream.end()]


@given(text=TEXT)
def test_bytes_survive_a_round_trip(text):
    bytes_ = load_tokenizer("bytes")
    assert bytes_.encode(text) == list(text.encode()) == bytes_.encode_batch([text])[0].tolist()
    assert bytes_.decode(bytes_.encode(text)) == text
    assert "".join(streamed(bytes_, bytes_.encode(text))) == text
    assert (bytes_.vocab_size, bytes_.eos_id) == (256, None)


@given(text=TEXT)
def test_any_text_survives_a_round_trip_through_bpe(text, bpe):
    tokenizer = load_tokenizer(bpe)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.encode_batch([text, "a"])[0].tolist() == ids
    assert max(ids, default=0) < tokenizer.vocab_size == 300


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_stream_returns_complete_characters(name, bpe):
    tokenizer = load_tokenizer("bytes" if name == "bytes" else bpe)
    assert streamed(tokenizer, tokenizer.encode("ф𝄞"))[-2:] == ["𝄞", ""]
    half = tokenizer.encode("ф𝄞")[:-1]
    assert "".join(streamed(tokenizer, half)).rstrip("\N{REPLACEMENT CHARACTER}") == "ф"
    assert streamed(tokenizer, half)[-1].startswith("\N{REPLACEMENT CHARACTER}")
    assert tokenizer.decode(half).startswith("ф\N{REPLACEMENT CHARACTER}")


def test_a_special_token_spelled_out_is_text(bpe):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.eos_id == 0
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"


def test_transformers_loads_a_trained_tokenizer(bpe):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(bpe), load_tokenizer(bpe)
    text = "Naïve  memory,\n\n\tdef f(x): 日本 <|endoftext|"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)


def test_a_saved_tokenizer_is_the_same(bpe, tmp_path):
    tokenizer = load_tokenizer(bpe)
    tokenizer.save(tmp_path / "copy")
    for place in (tmp_path / "copy", tmp_path / "copy" / "tokenizer.json"):
        copy = load_tokenizer(place)
        assert (copy.digest, copy.eos_id, copy.vocab_size) == (tokenizer.digest, 0, 300)
    config = tmp_path / "copy" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "a"}}))
    other = load_tokenizer(tmp_path / "copy")
    assert other.eos_id == tokenizer.encode("a")[0]
    assert other.digest != tokenizer.digest


def test_a_slow_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    tokenizer = load_tokenizer(tmp_path / "byt5")
    ids = tokenizer.encode("naïve </s>")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "naïve </s>" == "".join(streamed(tokenizer, ids))
    assert tokenizer.encode_batch(["naïve </s>"])[0].tolist() == ids
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").digest == tokenizer.digest


def test_the_same_texts_give_the_same_tokenizer(bpe, tmp_path):
    code = (
        "import sys; from hqlt.data import train_tokenizer; from tests.data.conftest import texts; "
        "train_tokenizer(texts(), 300, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True)
    for file in bpe.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_training_stops_reading_at_the_limit(tmp_path):
    def counted():
        for text in texts():
            read.append(text)
            yield text

    read = []
    train_tokenizer(counted(), 260, tmp_path / "a", limit_bytes=100)
    assert sum(len(text.encode()) for text in read[:-1]) < 100 <= sum(len(text.encode()) for text in read)


def test_errors(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary: expected at least 257 .* got 256"):
        train_tokenizer(["a"], 256, tmp_path / "new")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        train_tokenizer(["a"], 300, bpe)
    with pytest.raises(ValueError, match=r"expected a folder with a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer.json of `tokenizers`, got"):
        load_tokenizer(tmp_path)


def test_an_unknown_name_is_refused(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"tokenizer: expected bytes, .* got 'no/such', which could not be loaded"):
        load_tokenizer("no/such")
