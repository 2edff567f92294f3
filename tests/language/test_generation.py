"""What was read and saved, loaded and continued ≡ everything read anew."""

from __future__ import annotations

import pytest
import torch

from hqlt.data import load_tokenizer
from hqlt.language import generation
from hqlt.language.generation import Past, TextStreamer, continue_text, load_past, prefill, save_past
from hqlt.model import HQLTCache
from tests.language.conftest import build, prepending

TEXT = list(b"a long document, and then some more of it")


def logits_after(model, past: Past) -> torch.Tensor:
    cache = HQLTCache.from_states(past.states)
    return model(torch.tensor([[past.unread]]), past_key_values=cache).logits[0, -1]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("piece", [1, 7, 1024])
@pytest.mark.parametrize("cut", [1, 20])
def test_read_in_pieces_saved_and_loaded_is_read_anew(model, piece, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", piece)
    anew = model(torch.tensor([TEXT])).logits[0, -1]
    save_past(tmp_path / "state", prefill(model, TEXT[:cut]), model)
    kept = load_past(tmp_path / "state", model)
    same(logits_after(model, prefill(model, TEXT[cut:], kept)), anew)
    assert kept.unread == TEXT[cut - 1]  # and the kept one can be gone on from again
    same(logits_after(model, prefill(model, TEXT[cut:], kept)), anew)


def test_what_was_made_is_remembered(model):
    """After new text, the past is that of the prompt and the text; one continuation is as good as two halves."""
    made, past = continue_text(model, prefill(model, TEXT), max_new_tokens=6, greedy=True)
    assert made.shape == (1, 6)
    same(logits_after(model, past), model(torch.tensor([[*TEXT, *made[0].tolist()]])).logits[0, -1])
    first, middle = continue_text(model, prefill(model, TEXT), max_new_tokens=2, greedy=True)
    second, _ = continue_text(model, middle, max_new_tokens=4, greedy=True)
    assert torch.equal(torch.cat([first, second], dim=1), made)


def test_as_transformers_without_a_cache(model):
    tokens = torch.tensor([TEXT])
    anew = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(
        continue_text(model, prefill(model, TEXT), max_new_tokens=6, greedy=True)[0], anew[:, len(TEXT) :]
    )


def test_seeds(model):
    past = prefill(model, TEXT)
    options = {"max_new_tokens": 12, "num_return_sequences": 3, "temperature": 1.5}
    made, _ = continue_text(model, past, seed=1, **options)
    assert torch.equal(continue_text(model, past, seed=1, **options)[0], made)
    assert not torch.equal(continue_text(model, past, seed=2, **options)[0], made)
    assert not torch.equal(made[0], made[1])
    likeliest = continue_text(model, past, max_new_tokens=5, num_return_sequences=2, greedy=True)[0]
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(continue_text(model, past, max_new_tokens=5, num_return_sequences=2, **narrow)[0], likeliest)


def test_a_text_ends_where_the_model_ends_it():
    model = build()
    past = prefill(model, TEXT)
    made, _ = continue_text(model, past, max_new_tokens=8, greedy=True)
    eos = [made[0, 3].item()]
    told: list[str] = []
    tokenizer = load_tokenizer("bytes")
    streamer = TextStreamer(tokenizer, 1, eos, lambda row, text: told.append(text))
    ended, _ = continue_text(model, past, max_new_tokens=8, greedy=True, eos=eos, streamer=streamer)
    first = made[0].tolist().index(*eos)
    assert ended[0].tolist() == made[0, : first + 1].tolist()
    assert "".join(told) == tokenizer.decode(made[0, :first].tolist())


def test_text_comes_out_as_soon_as_it_is_complete():
    told: list[tuple[int, str]] = []
    streamer = TextStreamer(load_tokenizer("bytes"), 2, (), lambda row, text: told.append((row, text)))
    for column in ([[9], [9]], [0xCE, 0x61], [0xB2, 0xCE]):  # the prompt, then β in row 0; a, then half of a letter
        streamer.put(torch.tensor(column))
    streamer.end()
    rows = ["".join(text for row, text in told if row == i) for i in range(2)]
    assert rows == ["β", "a\N{REPLACEMENT CHARACTER}"]
    assert told[:3] == [(0, ""), (1, "a"), (0, "β")]


def test_a_blank_after_the_prompt_is_told():
    told: list[str] = []
    tokenizer = prepending()
    streamer = TextStreamer(tokenizer, 1, (), lambda row, text: told.append(text))
    prompt = tokenizer.encode("to be")
    streamer.put(torch.tensor([prompt]))
    for token in tokenizer.encode("to be or not")[len(prompt) :]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(told) == " or not"


def test_nothing_to_read_and_foreign_files(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="expected a text of at least one token"):
        prefill(model, [])
    save_past(tmp_path / "state", prefill(model, TEXT), model)
    with pytest.raises(ValueError, match="structure or weights differ"):
        load_past(tmp_path / "state", build(window=5))
    from hqlt import save_state

    save_state(tmp_path / "other", prefill(model, TEXT).states, model)
    with pytest.raises(ValueError, match="with its last token, as `hqlt generate` saves it"):
        load_past(tmp_path / "other", model)
