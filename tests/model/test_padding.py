"""Padding never enters a memory, at any place of any call, and masks that contradict the cache are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def left_padded(rows: list[torch.Tensor], to: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.stack([F.pad(row, (to - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (to - len(row), 0)) for row in rows])
    return tokens, mask


class TestPadding:
    def test_left_padding_changes_nothing(self, model, tokens):
        rows = [tokens[0, :3], tokens[1, :11], tokens[2, :6]]
        padded, mask = left_padded(rows, 13)
        out = model(padded, attention_mask=mask, use_cache=True)
        for i, row in enumerate(rows):
            alone = model(row[None], use_cache=True)
            same(out.logits[i, 13 - len(row) :], alone.logits[0])
            mine = out.past_key_values.fork()
            mine.batch_select_indices(torch.tensor([i]))
            following = tokens[:1, :5]
            same(
                model(following, past_key_values=mine).logits,
                model(following, past_key_values=alone.past_key_values).logits,
            )

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_masks_of_other_types(self, one_model, tokens, dtype):
        padded, mask = left_padded([tokens[0, :3], tokens[1]], 11)
        same(
            one_model(padded, attention_mask=mask.to(dtype)).logits[0, 8:],
            one_model(tokens[:1, :3]).logits[0],
        )

    @pytest.mark.parametrize("chunks", [(2, 7, 4), (1,) * 13])
    @pytest.mark.parametrize("with_positions", [False, True])
    def test_left_padding_in_chunks(self, model, tokens, chunks, with_positions):
        """The mask covers past and new tokens; a row may consist of padding only in the first chunk."""
        rows = [tokens[0, :3], tokens[1, :11], tokens[2, :6]]
        padded, mask = left_padded(rows, 13)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)  # as `generate` computes them
        cache, logits, end = HQLTCache(), [], 0
        for chunk in padded.split(chunks, dim=1):
            start, end = end, end + chunk.shape[1]
            position_ids = positions[:, start:end] if with_positions else None
            logits.append(
                model(chunk, attention_mask=mask[:, :end], position_ids=position_ids, past_key_values=cache).logits
            )
        for i, row in enumerate(rows):
            same(torch.cat(logits, dim=1)[i, 13 - len(row) :], model(row[None]).logits[0])

    def test_right_padding_and_holes_are_not_remembered(self, model, tokens):
        mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]])
        out = model(tokens, attention_mask=mask, use_cache=True, output_hidden_states=True)
        following = tokens[:, :4]
        more = torch.cat([mask, torch.ones_like(following)], dim=1)
        after = model(following, attention_mask=more, past_key_values=out.past_key_values)
        for i in range(3):
            real = mask[i].bool()
            alone = model(tokens[i : i + 1, real], use_cache=True, output_hidden_states=True)
            same(out.logits[i, real], alone.logits[0])
            for mine, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
                same(mine[i, real], theirs[0])
            same(after.logits[i], model(following[i : i + 1], past_key_values=alone.past_key_values).logits[0])

    def test_right_padding_in_training_changes_no_loss(self, model, tokens):
        mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 4 + [0] * 7])
        labels = tokens.masked_fill(mask == 0, -100)
        padded = tokens.masked_fill(mask == 0, 0)
        loss = model(padded, attention_mask=mask, labels=labels).loss
        same(loss, model(tokens, labels=labels).loss)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_padding_after_tokens_is_not_read(self, model, tokens, compiled, monkeypatch):
        """Rows with any number of new tokens, from none to all, give what each of them gives alone."""
        first = torch.ones(3, 11, dtype=torch.bool)
        first[2, :4] = False
        cache = model(tokens, attention_mask=first, use_cache=True).past_key_values
        new = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
        if compiled:  # while tracing, rows must have all tokens or none
            new[2] = True
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        out = model(tokens[:, :4], attention_mask=torch.cat([first, new], 1), past_key_values=cache)
        last = model(tokens[:, 4:7], past_key_values=cache, output_hidden_states=True)
        for i in range(3):
            alone = model(tokens[i : i + 1, first[i]], use_cache=True).past_key_values
            if new[i].any():
                mine = model(tokens[i : i + 1, :4][:, new[i]], past_key_values=alone).logits[0]
                same(out.logits[i, new[i]], mine)
            same(last.logits[i : i + 1], model(tokens[i : i + 1, 4:7], past_key_values=alone).logits)

    def test_padding_beside_tokens_is_refused_while_tracing(self, one_model, tokens, monkeypatch):
        cache = one_model(tokens, use_cache=True).past_key_values
        mask = torch.ones(3, 13)
        mask[1, 11] = 0
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="expected, in compiled code, each row with a non-empty memory"):
            one_model(tokens[:, :2], attention_mask=mask, past_key_values=cache)

    def test_hidden_states_and_gradients_of_uneven_rows(self, model, tokens):
        cache = model(tokens, use_cache=True).past_key_values
        new = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
        mask = torch.cat([torch.ones(3, 11).bool(), new], 1)
        forks = [cache.fork(), cache.fork()]
        out = model(tokens[:, :4], attention_mask=mask, past_key_values=forks[0], output_hidden_states=True)
        gradient = torch.autograd.grad(out.logits[1, 3].sum(), model.lm_head.weight)[0]
        forks[1].batch_select_indices(torch.tensor([1]))
        alone = model(tokens[1:2, 3:4], past_key_values=forks[1], output_hidden_states=True)
        for mine, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
            same(mine[1, 3], theirs[0, 0])
            assert not mine[2].any()
        same(gradient, torch.autograd.grad(alone.logits.sum(), model.lm_head.weight)[0])

    def test_a_mask_that_contradicts_the_past_is_refused(self, one_model, tokens):
        """Whether the rows were read with a mask or without."""
        first = torch.ones(3, 11, dtype=torch.long)
        plain = one_model(tokens, use_cache=True).past_key_values
        first[1, :4] = 0
        padded = one_model(tokens, attention_mask=first, use_cache=True).past_key_values
        assert plain.attention_mask is None
        assert torch.equal(padded.attention_mask, first.bool())
        more = torch.cat([first, torch.ones(3, 2, dtype=torch.long)], dim=1)
        with pytest.raises(ValueError, match=r"start it with .* Column 0 of row 1 was read as a token"):
            one_model(tokens[:, :2], attention_mask=more, past_key_values=plain)
        with pytest.raises(ValueError, match="Column 0 of row 1 was read as padding"):
            one_model(tokens[:, :2], attention_mask=torch.ones_like(more), past_key_values=padded)
        same(
            one_model(tokens[:, :2], attention_mask=more, past_key_values=padded.fork()).logits,
            one_model(tokens[:, :2], past_key_values=padded).logits,
        )

    def test_a_mask_of_another_shape_is_refused(self, one_model, tokens):
        cache = one_model(tokens, use_cache=True).past_key_values
        with pytest.raises(
            ValueError, match=r"expected \[b, 13\], .* over the 11 tokens in the cache and the 2 new ones"
        ):
            one_model(tokens[:, :2], attention_mask=torch.ones(3, 2), past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask: expected \[b, 11\]"):
            one_model(tokens, attention_mask=torch.ones(3, 1, 11, 11))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside the compiler
def test_compiled_code_checks_what_eager_code_checks(small):
    torch.manual_seed(0)
    model = HQLTForCausalLM(HQLTConfig(**{**small, "num_hidden_layers": 1})).double().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.randint(1, 23, (3, 5))
    first = torch.arange(5) >= torch.tensor([0, 2, 3])[:, None]
    row_ended = torch.cat([first, torch.tensor([[True], [False], [True]])], dim=1)
    with torch.no_grad():
        caches = [HQLTCache(), HQLTCache()]
        for which, cache in zip((model, compiled), caches, strict=True):
            which(tokens, attention_mask=first, past_key_values=cache)
            which(tokens[:, :1], attention_mask=row_ended, past_key_values=cache)
        assert torch.equal(caches[0].attention_mask, caches[1].attention_mask)
        for mine, theirs in zip(*(cache.states[0].leaves() for cache in caches), strict=True):
            same(mine, theirs)
        for wrong, message in (
            (torch.ones(3, 8), "to match what the cache has read, got a different mask"),
            (torch.cat([row_ended, torch.tensor([[1, 1], [0, 1], [1, 1]])], dim=1), "got both"),
        ):
            with pytest.raises(RuntimeError, match=message):
                compiled(tokens[:, :2], attention_mask=wrong, past_key_values=caches[1].fork())
