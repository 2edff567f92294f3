from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import hqlt
from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM, HQLTModel


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def uniform(weight: torch.Tensor, bound: float) -> bool:
    return bool(weight.abs().max() <= bound and abs(weight.std() / (bound / 3**0.5) - 1) < 0.05)


def same_states(a: HQLTCache, b: HQLTCache) -> None:
    for mine, theirs in zip(a.states, b.states, strict=True):
        for x, y in zip(mine.leaves(), theirs.leaves(), strict=True):
            same(x, y)


class TestChunks:
    """One pass ≡ in chunks ≡ token by token, in training and evaluation mode: no call drops a state."""

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("chunks", [(1, 3, 7), (1,) * 11])
    def test_chunks(self, model, tokens, chunks, training):
        model.train(training)
        whole = model(tokens, use_cache=True)
        cache, logits = HQLTCache(), []
        for chunk in tokens.split(chunks, dim=1):
            out = model(chunk, past_key_values=cache)
            assert out.past_key_values is cache
            logits.append(out.logits)
        same(torch.cat(logits, dim=1), whole.logits)
        same_states(cache, whole.past_key_values)
        assert cache.get_seq_length() == 11

    def test_training_and_evaluation_agree(self, model, tokens):
        same(model.train()(tokens).logits, model.eval()(tokens).logits)

    def test_a_carried_state_carries_gradients(self, model, tokens):
        model.train()
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        first = model(inputs_embeds=embeddings[:, :6], use_cache=True)
        model(inputs_embeds=embeddings[:, 6:], past_key_values=first.past_key_values).logits.square().sum().backward()
        carried = embeddings.grad.clone()
        embeddings.grad = None
        model(inputs_embeds=embeddings).logits[:, 6:].square().sum().backward()
        same(carried, embeddings.grad)
        assert carried[:, :6].abs().sum() > 0

    def test_a_detached_state_does_not(self, one_model, tokens):
        embeddings = one_model.get_input_embeddings()(tokens).detach().requires_grad_()
        cache = one_model(inputs_embeds=embeddings[:, :6], use_cache=True).past_key_values.detach()
        one_model(inputs_embeds=embeddings[:, 6:], past_key_values=cache).logits.square().sum().backward()
        assert embeddings.grad[:, :6].abs().sum() == 0

    def test_positions_of_later_layers(self, model, tokens):
        """Every layer counts its own tokens. In the paper's code, one counter makes all but the first layer wrong."""
        out = model(tokens[:, :7], use_cache=True)
        for state in out.past_key_values.states:
            assert state.position.tolist() == [7, 7, 7]

    def test_causal(self, model, tokens):
        other = tokens.clone()
        other[:, 6:] = 1
        same(model(other).logits[:, :6], model(tokens).logits[:, :6])

    def test_no_state_without_a_cache(self, one_model, tokens):
        assert one_model(tokens, use_cache=False).past_key_values is None
        one_model.config.use_cache = False
        assert one_model(tokens).past_key_values is None


class TestForgetting:
    """transformers' own caches drop a recurrent state that has no convolution."""

    @pytest.mark.parametrize("fields", [{"window": 1}, {"layer_kinds": ["fw", "fw"]}, {"blend": "delayed-chunk"}])
    def test_a_model_without_convolution_remembers_tokens_beyond_the_window(self, small, tokens, fields):
        torch.manual_seed(0)
        model = HQLTForCausalLM(HQLTConfig(**{**small, **fields})).double()
        other = tokens.clone()
        other[:, 0] = (tokens[:, 0] + 1) % 23
        logits = []
        for row in (tokens, other):
            cache = model(row[:, :10], use_cache=True).past_key_values
            logits.append(model(row[:, 10:], past_key_values=cache).logits)
        assert (logits[0] - logits[1]).abs().max() > 1e-8


class TestPacking:
    """Packed documents ≡ separate documents: nothing crosses a boundary, in neither memory."""

    LENGTHS = (3, 6, 2)

    def boundaries(self, tokens):
        positions = torch.cat([torch.arange(n) for n in self.LENGTHS])[None].expand(3, -1)
        return positions, positions == 0

    @pytest.mark.parametrize("form", ["resets", "position_ids", "one row of position_ids"])
    def test_packed_is_separate(self, model, tokens, form):
        positions, resets = self.boundaries(tokens)
        given = {
            "resets": {"resets": resets},
            "position_ids": {"position_ids": positions},
            "one row of position_ids": {"position_ids": positions[:1]},
        }[form]
        packed = model(tokens, use_cache=True, **given)
        alone = [model(part, use_cache=True) for part in tokens.split(self.LENGTHS, dim=1)]
        same(packed.logits, torch.cat([out.logits for out in alone], dim=1))
        same(
            model(tokens[:, :4], past_key_values=packed.past_key_values).logits,
            model(tokens[:, :4], past_key_values=alone[-1].past_key_values).logits,
        )

    def test_packed_in_chunks(self, model, tokens):
        _, resets = self.boundaries(tokens)
        cache = HQLTCache()
        logits = [
            model(chunk, resets=reset, past_key_values=cache).logits
            for chunk, reset in zip(tokens.split(2, dim=1), resets.split(2, dim=1), strict=True)
        ]
        same(torch.cat(logits, dim=1), model(tokens, resets=resets).logits)

    def test_resets_win_over_positions(self, one_model, tokens):
        positions, resets = self.boundaries(tokens)
        nowhere = torch.zeros_like(resets)
        same(one_model(tokens, resets=nowhere, position_ids=positions).logits, one_model(tokens).logits)

    def test_packed_and_padded(self, model, tokens):
        positions, resets = self.boundaries(tokens)
        padded = F.pad(tokens, (2, 0))
        mask = F.pad(torch.ones_like(tokens), (2, 0))
        out = model(padded, attention_mask=mask, resets=F.pad(resets, (2, 0)))
        same(out.logits[:, 2:], model(tokens, position_ids=positions).logits)

    def test_wrong_shapes(self, one_model, tokens):
        with pytest.raises(ValueError, match=r"resets: expected a bool tensor of shape \[b, t\] = \[3, 11\]"):
            one_model(tokens, resets=torch.zeros(3, 11))
        with pytest.raises(ValueError, match=r"position_ids: expected \[b, t\] = \[3, 11\] or \[1, 11\]"):
            one_model(tokens, position_ids=torch.arange(5)[None])

    def test_packing_that_the_model_does_not_read_is_refused(self, one_model, tokens):
        with pytest.raises(ValueError, match="cu_seq_lens_q: expected packed documents to be marked"):
            one_model(tokens, cu_seq_lens_q=torch.tensor([0, 3, 11]))


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("carried", [False, True])
    def test_gradients_are_the_same(self, model, tokens, reentrant, carried):
        model.train()

        def gradients():
            model.zero_grad()
            cache = model(tokens, use_cache=True).past_key_values if carried else None
            model(tokens, past_key_values=cache).logits.square().sum().backward()
            return [p.grad.clone() for p in model.parameters()]

        plain = gradients()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})  # the older name
        for a, b in zip(plain, gradients(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class TestLoss:
    def test_labels_are_shifted_here(self, one_model, tokens):
        labels = tokens.clone()
        labels[:, 4] = -100
        out = one_model(tokens, labels=labels)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected)

    def test_num_items_in_batch(self, one_model, tokens):
        """Gradient accumulation divides by the items of all micro-batches."""
        mean = one_model(tokens, labels=tokens).loss
        total = one_model(tokens, labels=tokens, num_items_in_batch=60).loss
        torch.testing.assert_close(total, mean * 30 / 60)

    def test_a_document_boundary_is_scored_unless_masked(self, one_model, tokens):
        """transformers' convention: the first token of a document is scored unless its label is −100."""
        resets = torch.zeros_like(tokens, dtype=torch.bool)
        resets[:, 5] = True
        logits = one_model(tokens, resets=resets).logits
        scored = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        torch.testing.assert_close(one_model(tokens, resets=resets, labels=tokens).loss, scored)
        without = tokens.masked_fill(resets, -100)
        apart = [one_model(chunk, labels=chunk).loss * (chunk.shape[1] - 1) for chunk in tokens.split([5, 6], dim=1)]
        torch.testing.assert_close(one_model(tokens, resets=resets, labels=without).loss, sum(apart) / 9)

    def test_learns(self, small):
        torch.manual_seed(0)
        model = HQLTForCausalLM(HQLTConfig(**{**small, "initializer_range": 0.02})).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tokens = torch.randint(23, (4, 12))
        first = model(tokens, labels=tokens).loss
        assert abs(first.item() - math.log(23)) < 0.1
        for _ in range(30):
            optimiser.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimiser.step()
        assert model(tokens, labels=tokens).loss < first / 2


class TestForward:
    def test_outputs(self, one_model, tokens):
        out = one_model(tokens, output_hidden_states=True)
        assert out.logits.shape == (3, 11, 23)
        assert [h.shape for h in out.hidden_states] == [(3, 11, 16)] * 3
        same(one_model.lm_head(out.hidden_states[-1]), out.logits)
        as_tuple = one_model(tokens, return_dict=False)
        same(as_tuple[0], out.logits)
        same(one_model(inputs_embeds=one_model.get_input_embeddings()(tokens)).logits, out.logits)
        same(one_model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
        same(one_model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, out.logits[:, [1, 4]])

    @pytest.mark.parametrize("wrong", ["reset", "attention_masks", "past_key_value", "label"])
    def test_misspelt_arguments_are_refused(self, one_model, tokens, wrong):
        with pytest.raises(TypeError, match="did you mean"):
            one_model(tokens, **{wrong: None})

    def test_arguments_from_tokenizers_are_ignored(self, one_model, tokens):
        same(one_model(tokens, token_type_ids=torch.zeros_like(tokens)).logits, one_model(tokens).logits)

    def test_wrong_arguments(self, one_model, tokens):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected exactly one of them, got neither"):
            one_model()
        with pytest.raises(ValueError, match=r"input_ids: expected \[b, t\], got shape \[11\]"):
            one_model(tokens[0])
        with pytest.raises(ValueError, match="logits_to_keep: expected 0 with labels"):
            one_model(tokens, labels=tokens, logits_to_keep=1)

    def test_another_kind_of_cache_is_refused(self, one_model, tokens):
        with pytest.raises(TypeError, match=r"past_key_values: expected an HQLTCache .* got DynamicCache"):
            one_model(tokens, past_key_values=DynamicCache())

    def test_the_cache_of_another_model_is_refused(self, one_model, small, tokens):
        out = one_model(tokens, use_cache=True)
        other = HQLTForCausalLM(HQLTConfig(**{**small, "num_hidden_layers": 3})).double()
        with pytest.raises(ValueError, match="expected one state for each of the 3 layers, got 2"):
            other(tokens, past_key_values=out.past_key_values)
        other = HQLTForCausalLM(HQLTConfig(**{**small, "window": 6})).double()
        with pytest.raises(ValueError, match=r"state\.kv\.keys: expected shape"):
            other(tokens, past_key_values=out.past_key_values)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtypes(self, model, tokens, dtype):
        exact = model(tokens).logits
        model.to(dtype)
        out = model(tokens, use_cache=True)
        assert out.logits.dtype == dtype
        assert out.logits.isfinite().all()
        # The median over tokens, because the norm of a head whose read is almost zero amplifies rounding errors.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        assert (out.logits - exact).abs().mean(-1).median() < tolerance * exact.abs().mean()
        for state in out.past_key_values.states:
            assert {x.dtype for x in tree_leaves(state.fw)} <= {torch.float32}
        assert model(tokens, past_key_values=out.past_key_values).logits.dtype == dtype

    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch falls back to a slower norm
    def test_autocast(self, model, tokens):
        model.float().train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestInitialisation:
    def test_as_in_the_paper(self):
        torch.manual_seed(0)
        config = HQLTConfig(hidden_size=256, num_heads=4, num_hidden_layers=3, vocab_size=500, conv_size=4)
        model = HQLTForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" in name:
                assert (weight == 1).all(), name
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                bound = 1 / math.sqrt(weight.shape[1] * 2 * 3)
                assert uniform(weight, bound), name
            elif "conv" in name:
                assert uniform(weight, 0.5), name
            else:
                assert abs(weight.std() / 0.02 - 1) < 0.05, name

    def test_a_convolution_can_be_initialized_as_identity(self, small):
        model = HQLTForCausalLM(HQLTConfig(**{**small, "conv_size": 3, "conv_init": "identity"}))
        conv = model.model.layers[0].memory.conv
        x = torch.randn(2, 5, conv.weight.shape[0])
        same(conv(x, None, None)[0], x)

    def test_gates_get_their_initial_value_unless_loaded(self, small, tmp_path):
        """In custom code, transformers does not initialize modules without parameters of their own, such as a mixer."""
        model = HQLTForCausalLM(HQLTConfig(**{**small, "mixer": "vector"}, gate_bias=-2.0, beta_bias=-3.0))
        memories = [block.memory for block in model.model.layers]
        assert all((memory.mixer.gate_proj.bias == -2).all() for memory in memories)
        assert all((memory.fw.beta_proj.bias == -3).all() for memory in memories)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.25)
        model.save_pretrained(tmp_path)
        again = HQLTForCausalLM.from_pretrained(tmp_path)
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(again.parameters(), model.parameters(), strict=True)
        )

    def test_mixer_add_is_attention_at_initialization(self, small):
        """Mixer "add": a text within the window gives the same as attention only, with the same weights."""
        attention = HQLTForCausalLM(HQLTConfig(**small, layer_kinds=["kv", "kv"])).eval()
        both = HQLTForCausalLM(HQLTConfig(**small, layer_kinds=["hybrid", "hybrid"], mixer="add")).eval()
        both.load_state_dict(attention.state_dict(), strict=False)
        tokens = torch.arange(small["window"])[None]
        same(both(tokens).logits, attention(tokens).logits)

    def test_an_untied_head_and_no_biases(self, one_model):
        assert one_model.lm_head.weight is not one_model.get_input_embeddings().weight
        assert not [name for name, _ in one_model.named_parameters() if name.endswith("bias")]

    def test_a_tied_head(self, small, tokens, tmp_path):
        model = HQLTForCausalLM(HQLTConfig(**small, tie_word_embeddings=True)).eval()
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        same(HQLTForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


class TestSaving:
    def test_round_trip(self, model, tokens, tmp_path):
        model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.bin"))
        assert (tmp_path / "model.safetensors").exists()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(loaded, HQLTForCausalLM)
        assert loaded.dtype == torch.float64
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        same(loaded(tokens).logits, model(tokens).logits)  # rounding depends on the memory alignment of the weights

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_is_kept_or_converted(self, one_model, tokens, tmp_path, dtype):
        one_model.to(dtype).save_pretrained(tmp_path)
        assert HQLTForCausalLM.from_pretrained(tmp_path).dtype == dtype
        assert HQLTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64
        assert torch.equal(HQLTForCausalLM.from_pretrained(tmp_path)(tokens).logits, one_model(tokens).logits)

    def test_the_model_without_its_output_head(self, one_model, tokens, tmp_path):
        one_model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert isinstance(loaded, HQLTModel)
        same(loaded(tokens).last_hidden_state, one_model.model(tokens).last_hidden_state)

    def test_auto_classes_build_from_a_config(self, one_model):
        assert isinstance(AutoModelForCausalLM.from_config(one_model.config), HQLTForCausalLM)
        assert isinstance(AutoModel.from_config(one_model.config), HQLTModel)

    def test_states_on_disk(self, model, tokens, tmp_path):
        """Continuing from saved states equals reading the prefix again: no part of a state is missing."""
        cache = model(tokens[:, :8], use_cache=True).past_key_values
        hqlt.save_state(tmp_path / "prefix.safetensors", cache.states, model)
        loaded = HQLTCache.from_states(hqlt.load_state(tmp_path / "prefix.safetensors", model))
        assert loaded.get_seq_length() == 8
        same(model(tokens[:, 8:], past_key_values=loaded).logits, model(tokens).logits[:, 8:])

    def test_from_the_package(self):
        assert hqlt.HQLTForCausalLM is HQLTForCausalLM
        assert hqlt.preset("tiny").model_type == "hqlt"
