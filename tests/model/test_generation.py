"""generate with a cache ≡ generate without one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from hqlt.model import HQLTCache

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


def test_left_padded_rows_are_what_they_are_alone(model, tokens):
    padded, mask = left_padding(tokens)
    together = generate(model, padded, attention_mask=mask, **GREEDY)
    for i in range(3):
        alone = generate(model, tokens[i : i + 1, mask[i].bool()], **GREEDY)
        assert torch.equal(together[i, 11:], alone[0, -5:])


def test_logits_of_every_step(model, tokens):
    """Not only the choice of tokens: the scores agree, in rows that ended at different steps as well."""
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


def test_goes_on_from_a_cache(model, tokens):
    """A conversation: what generate returned and what it remembers, then more."""
    first = model.generate(tokens, pad_token_id=0, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, HQLTCache)
    assert cache.get_seq_length() == 15
    longer = torch.cat([first.sequences, tokens[:, :3]], dim=1)
    options = {**GREEDY, "attention_mask": torch.ones_like(longer)}
    assert torch.equal(
        generate(model, longer, **options, past_key_values=cache), generate(model, longer, **options, use_cache=False)
    )


def test_one_prefix_many_continuations(model, tokens):
    prefix = model(tokens[:1, :8], use_cache=True).past_key_values
    for last in (2, 5):
        longer = torch.cat([tokens[:1, :8], torch.tensor([[last]])], dim=1)
        whole = generate(model, longer, **GREEDY)
        assert torch.equal(generate(model, longer, **GREEDY, past_key_values=prefix.fork()), whole)


def test_assisted_generation_is_refused(one_model, tokens):
    for assisted in ({"assistant_model": one_model}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(one_model, tokens[:1], **GREEDY, **assisted)


def test_other_caches_are_refused(one_model, tokens):
    with pytest.raises(TypeError, match="expected an HQLTCache"):
        generate(one_model, tokens, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"cache_implementation: expected None, .* got 'static'"):
        generate(one_model, tokens, **GREEDY, cache_implementation="static")


def test_no_square_mask_is_built(one_model, tokens):
    """The default mask for a hybrid layer type is plain causal, which a window is not."""
    mask = torch.ones_like(tokens)
    made = one_model.create_masks_for_generate(
        config=one_model.config, inputs_embeds=None, attention_mask=mask, past_key_values=None, position_ids=None
    )
    assert made is mask
    inputs = one_model.prepare_inputs_for_generation(tokens, past_key_values=HQLTCache(), attention_mask=mask)
    assert inputs["attention_mask"].shape == (3, 11)


def test_right_padded_prompts_are_refused(one_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="got right padding, after which generate would go on; pad on the left"):
        generate(one_model, tokens, attention_mask=mask, **GREEDY)


def test_saved_settings_are_used(one_model, tokens, tmp_path):
    one_model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    one_model.save_pretrained(tmp_path)
    loaded = type(one_model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(tokens), one_model.generate(tokens))
    assert loaded.generate(tokens).shape == (3, 14)
