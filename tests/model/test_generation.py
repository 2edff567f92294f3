"""generate with a cache ≡ generate without one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from hqlt.model import HQLTCache
from hqlt.model.cache import CACHE

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def generate(model, tokens, *, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(tokens, pad_token_id=0, **options)


def left_padding(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 11, 4 and 7 tokens."""
    mask = torch.arange(11) >= torch.tensor([0, 7, 4])[:, None]
    return tokens * mask, mask.long()


@pytest.mark.parametrize(
    ("padded", "options"),
    [
        (False, GREEDY),
        (True, GREEDY),
        (True, {"max_new_tokens": 5, "do_sample": True, "top_k": 5}),
        (True, {"max_new_tokens": 5, "num_beams": 3}),
        (False, {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2, "do_sample": True}),
    ],
    ids=["greedy", "greedy padded", "sampling padded", "beams padded", "sampled beams"],
)
def test_cache_changes_nothing(model, tokens, padded, options):
    given = {}
    if padded:
        tokens, given["attention_mask"] = left_padding(tokens)
    with_cache = generate(model, tokens, **given, **options)
    without = generate(model, tokens, **given, **options, use_cache=False)
    assert torch.equal(with_cache, without)
    assert with_cache.shape[1] > 11


@pytest.mark.parametrize(("padded", "chunk"), [(True, 1), (False, 3), (True, 4), (False, 20)])
def test_chunked_prefill(model, tokens, padded, chunk):
    given = {}
    if padded:
        tokens, given["attention_mask"] = left_padding(tokens)
    whole = generate(model, tokens, **given, **GREEDY)
    assert torch.equal(generate(model, tokens, **given, **GREEDY, prefill_chunk_size=chunk), whole)


def test_left_padded_rows_equal_single_rows(model, tokens):
    padded, mask = left_padding(tokens)
    together = generate(model, padded, attention_mask=mask, **GREEDY)
    for i in range(3):
        alone = generate(model, tokens[i : i + 1, mask[i].bool()], **GREEDY)
        assert torch.equal(together[i, 11:], alone[0, -5:])


def test_logits_of_every_step(model, tokens):
    """Not only the chosen tokens but also the scores agree, also if rows end at different steps."""
    padded, mask = left_padding(tokens)
    scores = [
        model.generate(
            padded, attention_mask=mask, pad_token_id=0, **GREEDY, use_cache=use_cache,
            output_logits=True, return_dict_in_generate=True,
        ).logits
        for use_cache in (True, False)
    ]  # fmt: skip
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rows_that_end_early(model, tokens):
    ends = generate(model, tokens, **GREEDY)[0, 13].item()
    options = {**GREEDY, "eos_token_id": ends}
    assert torch.equal(generate(model, tokens, **options), generate(model, tokens, **options, use_cache=False))


def test_from_embeddings(model, tokens):
    embeddings = model.get_input_embeddings()(tokens)
    new = model.generate(inputs_embeds=embeddings, pad_token_id=0, **GREEDY)
    assert torch.equal(new, generate(model, tokens, **GREEDY)[:, 11:])


def test_in_training_mode(model, tokens):
    assert torch.equal(generate(model.train(), tokens, **GREEDY), generate(model.eval(), tokens, **GREEDY))


def test_continues_from_a_cache(model, tokens):
    """A second call continues from the result and the cache of the first."""
    first = model.generate(tokens, pad_token_id=0, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, HQLTCache)
    assert cache.get_seq_length() == 15
    longer = torch.cat([first.sequences, tokens[:, :3]], dim=1)
    options = {**GREEDY, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(
        generate(model, longer, **options, past_key_values=cache), generate(model, longer, **options, use_cache=False)
    )


def ending(model, tokens: torch.Tensor, mask: torch.Tensor) -> int:
    """A token that greedy decoding produces early in one row and never in another."""
    made = generate(model, tokens, attention_mask=mask, **GREEDY)[:, 11:]
    return next(t for t in made[:, :2].flatten().tolist() if not (made == t).any(dim=1).all())


@pytest.mark.parametrize("pad", ["eos", 0])
def test_a_second_turn_after_rows_that_ended_early(model, tokens, pad):
    """Each row gives what it gives alone: padding after its end and before its next turn is not remembered."""
    padded, mask = left_padding(tokens)
    end = ending(model, padded, mask)
    options = {**GREEDY, "eos_token_id": end, "pad_token_id": end if pad == "eos" else pad}
    first = model.generate(padded, attention_mask=mask, **options, return_dict_in_generate=True)
    cache, made = first.past_key_values, first.sequences[:, 11:]
    real = (made == end).cumsum(dim=1) - (made == end).long() == 0  # up to and including the end token
    assert not real.all()
    is_token = torch.cat([mask.bool(), real], dim=1)
    assert torch.equal(cache.attention_mask, is_token[:, :-1])

    turn, is_new_token = tokens[:, :3], torch.tensor([[True] * 3, [False, True, True], [False, False, True]])
    text, whole = torch.cat([first.sequences, turn], dim=1), torch.cat([is_token, is_new_token], dim=1)
    second = model.generate(text, attention_mask=whole, past_key_values=cache.fork(), **GREEDY, pad_token_id=0)
    only_new = model.generate(
        text[:, cache.seen_tokens :], attention_mask=whole, past_key_values=cache, **GREEDY, pad_token_id=0
    )
    assert torch.equal(second[:, -5:], only_new[:, -5:])
    for i in range(3):
        row = text[i : i + 1, whole[i]]
        alone = generate(model, row, attention_mask=torch.ones_like(row), **GREEDY, use_cache=False)
        assert torch.equal(second[i, -5:], alone[0, -5:])


def test_rows_ended_by_other_criteria(one_model, tokens):
    """As in transformers: without an eos token, a row continues after its end instead of being padded."""

    def second_row_ends(ids: torch.Tensor, scores: object) -> torch.Tensor:
        return torch.tensor([False, ids.shape[1] > 12, False])

    options = {**GREEDY, "stopping_criteria": [second_row_ends], "pad_token_id": 0, "return_dict_in_generate": True}
    assert one_model.generate(tokens, **options).past_key_values.attention_mask is None
    ended = one_model.generate(tokens, **options, eos_token_id=22)
    assert ended.past_key_values.attention_mask.sum(dim=1).tolist() == [15, 13, 15]


def test_a_cache_without_unread_tokens_is_refused(one_model, tokens):
    """transformers would slice the prompt incorrectly, and read tokens twice or not at all."""
    cache = one_model(tokens, use_cache=True).past_key_values
    ones = torch.ones_like(tokens)
    for prompt, mask in (
        (tokens, None),
        (tokens, ones),
        (tokens[:, :3], None),
        (tokens[:, :3], torch.ones(3, 13)),
        (tokens[:, :3], torch.ones(3, 15)),
    ):
        for prefill in (None, 2):
            with pytest.raises(
                ValueError, match="expected a prompt with tokens that the cache has not read, after the"
            ):
                generate(
                    one_model, prompt, attention_mask=mask, past_key_values=cache, prefill_chunk_size=prefill, **GREEDY
                )
    embeddings = one_model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match="has not read"):
        one_model.generate(inputs_embeds=embeddings, past_key_values=cache, pad_token_id=0, **GREEDY)
    assert cache.get_seq_length() == 11


def test_a_cache_with_padding_needs_a_mask(one_model, tokens):
    padded, mask = left_padding(tokens)
    cache = one_model(padded, attention_mask=mask, use_cache=True).past_key_values
    longer = torch.cat([padded, tokens[:, :2]], dim=1)
    with pytest.raises(ValueError, match=r"attention_mask: expected one, because the cache has read padding"):
        generate(one_model, longer, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="Column 0 of row 1 was read as padding"):
        generate(one_model, longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **GREEDY)


def test_a_cache_has_two_names(one_model, tokens):
    """The name before transformers 5.24 and the later one both work, with any installed version."""
    cache = one_model(tokens[:, :8], use_cache=True).past_key_values
    longer = one_model(tokens).logits[:, 8:]
    for name in ("past_key_values", "cache"):
        torch.testing.assert_close(one_model(tokens[:, 8:], **{name: cache.fork()}).logits, longer, rtol=0, atol=1e-10)
        assert torch.equal(
            generate(one_model, tokens, **{name: cache.fork()}, **GREEDY), generate(one_model, tokens, **GREEDY)
        )
    with pytest.raises(ValueError, match="past_key_values, cache: expected one of them"):
        one_model(tokens[:, 8:], past_key_values=cache, cache=cache.fork())
    with pytest.raises(TypeError, match=r"expected a cache as past_key_values .* got it as 'mems'"):
        one_model(tokens[:, 8:], mems=cache)


def test_many_continuations_of_one_prefix(model, tokens):
    prefix = model(tokens[:1, :8], use_cache=True).past_key_values
    for last in (2, 5):
        longer = torch.cat([tokens[:1, :8], torch.tensor([[last]])], dim=1)
        whole = generate(model, longer, **GREEDY)
        assert torch.equal(generate(model, longer, **GREEDY, past_key_values=prefix.fork()), whole)


def test_other_caches_are_refused(one_model, tokens):
    with pytest.raises(TypeError, match="expected an HQLTCache"):
        generate(one_model, tokens, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"cache_implementation: expected None, .* got 'static'"):
        generate(one_model, tokens, **GREEDY, cache_implementation="static")


def test_no_square_mask_is_built(one_model, tokens):
    """transformers' default mask for a hybrid layer type is causal, without a window."""
    mask = torch.ones_like(tokens)
    made = one_model.create_masks_for_generate(
        config=one_model.config, inputs_embeds=None, attention_mask=mask, past_key_values=None, position_ids=None
    )
    assert made is mask
    inputs = one_model.prepare_inputs_for_generation(tokens, **{CACHE: HQLTCache()}, attention_mask=mask)
    assert inputs["attention_mask"].shape == (3, 11)


def test_right_padded_prompts_are_refused(one_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="got right padding, after which generate would continue; pad on the left"):
        generate(one_model, tokens, attention_mask=mask, **GREEDY)


def test_saved_settings_are_used(one_model, tokens, tmp_path):
    one_model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    one_model.save_pretrained(tmp_path)
    loaded = type(one_model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(tokens), one_model.generate(tokens))
    assert loaded.generate(tokens).shape == (3, 14)
