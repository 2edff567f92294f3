"""Reading in chunks, saving, loading and continuing equals reading the whole text."""

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


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("cut", [1, 20])
def test_reading_in_chunks_saving_and_loading_equals_reading_at_once(model, chunk, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    expected = model(torch.tensor([TEXT])).logits[0, -1]
    save_past(tmp_path / "state", prefill(model, TEXT[:cut]), model)
    loaded = load_past(tmp_path / "state", model)
    same(logits_after(model, prefill(model, TEXT[cut:], loaded)), expected)
    assert loaded.unread == TEXT[cut - 1]  # and it can be continued again
    same(logits_after(model, prefill(model, TEXT[cut:], loaded)), expected)


def test_the_past_after_a_continuation_includes_it(model):
    """The past is that of the prompt and the new text, so one continuation equals two halves."""
    new, past = continue_text(model, prefill(model, TEXT), max_new_tokens=6, greedy=True)
    assert new.shape == (1, 6)
    same(logits_after(model, past), model(torch.tensor([[*TEXT, *new[0].tolist()]])).logits[0, -1])
    first, middle = continue_text(model, prefill(model, TEXT), max_new_tokens=2, greedy=True)
    second, _ = continue_text(model, middle, max_new_tokens=4, greedy=True)
    assert torch.equal(torch.cat([first, second], dim=1), new)


def test_greedy_text_equals_generate_without_a_cache(model):
    tokens = torch.tensor([TEXT])
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(
        continue_text(model, prefill(model, TEXT), max_new_tokens=6, greedy=True)[0], expected[:, len(TEXT) :]
    )


def test_seeds(model):
    past = prefill(model, TEXT)
    options = {"max_new_tokens": 12, "num_return_sequences": 3, "temperature": 1.5}
    new, _ = continue_text(model, past, seed=1, **options)
    assert torch.equal(continue_text(model, past, seed=1, **options)[0], new)
    assert not torch.equal(continue_text(model, past, seed=2, **options)[0], new)
    assert not torch.equal(new[0], new[1])
    likeliest = continue_text(model, past, max_new_tokens=5, num_return_sequences=2, greedy=True)[0]
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(continue_text(model, past, max_new_tokens=5, num_return_sequences=2, **narrow)[0], likeliest)


def test_a_text_ends_at_an_end_token():
    model = build()
    past = prefill(model, TEXT)
    new, _ = continue_text(model, past, max_new_tokens=8, greedy=True)
    eos = [new[0, 3].item()]
    streamed: list[str] = []
    tokenizer = load_tokenizer("bytes")
    streamer = TextStreamer(tokenizer, 1, eos, lambda row, text: streamed.append(text))
    ended, _ = continue_text(model, past, max_new_tokens=8, greedy=True, eos=eos, streamer=streamer)
    first = new[0].tolist().index(*eos)
    assert ended[0].tolist() == new[0, : first + 1].tolist()
    assert "".join(streamed) == tokenizer.decode(new[0, :first].tolist())


def test_text_is_streamed_as_soon_as_characters_are_complete():
    streamed: list[tuple[int, str]] = []
    streamer = TextStreamer(load_tokenizer("bytes"), 2, (), lambda row, text: streamed.append((row, text)))
    for column in ([[9], [9]], [0xCE, 0x61], [0xB2, 0xCE]):  # the prompt, then β in row 0; a, then half of a character
        streamer.put(torch.tensor(column))
    streamer.end()
    rows = ["".join(text for row, text in streamed if row == i) for i in range(2)]
    assert rows == ["β", "a\N{REPLACEMENT CHARACTER}"]
    assert streamed[:3] == [(0, ""), (1, "a"), (0, "β")]


def test_a_space_after_the_prompt_is_streamed():
    streamed: list[str] = []
    tokenizer = prepending()
    streamer = TextStreamer(tokenizer, 1, (), lambda row, text: streamed.append(text))
    prompt = tokenizer.encode("to be")
    streamer.put(torch.tensor([prompt]))
    for token in tokenizer.encode("to be or not")[len(prompt) :]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamed) == " or not"


def test_empty_texts_and_foreign_files_are_refused(tmp_path):
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
