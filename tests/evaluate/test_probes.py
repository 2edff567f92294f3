"""Probes: values known by hand, a model with perfect recall, and models with their FW-memories bypassed."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqlt import HybridMemory
from hqlt.evaluate import probes
from hqlt.evaluate.probes import by_position, fw_bypassed, needles, probe, recall, token_losses
from hqlt.model import HQLTConfig, HQLTForCausalLM
from tests.language.conftest import SMALL

WORDS = SMALL["vocab_size"]


def small(**fields: Any) -> HQLTForCausalLM:
    """A small model with random gates, because those of mixer "add" are 0 at initialization."""
    torch.manual_seed(0)
    model = HQLTForCausalLM(HQLTConfig(**{**SMALL, **fields})).double().eval()
    for name, weight in model.named_parameters():
        if "gate_proj" in name and "mlp" not in name:
            nn.init.normal_(weight)
    return model


def text(n: int = 3, length: int = 100) -> Tensor:
    return torch.randint(WORDS, (n, length), generator=torch.Generator().manual_seed(1))


class Bigrams(nn.Module):
    """A model whose next-token logits are a row of a table."""

    def __init__(self, words: int = WORDS):
        super().__init__()
        self.table = nn.Parameter(torch.randn(words, words, dtype=torch.float64))

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=past_key_values)


class PerfectRecall(nn.Module):
    """Predicts the token that followed the longest earlier match of the current context."""

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, WORDS)
        for row, tokens in enumerate(input_ids.tolist()):
            alike = [0] * len(tokens)  # length of the match that ends at i
            for t, token in enumerate(tokens):
                alike = [(1 + alike[i - 1] if i else 1) if tokens[i] == token else 0 for i in range(t)] + [0] * (
                    len(tokens) - t
                )
                best = max(range(t), key=lambda i: (alike[i], i), default=0)
                logits[row, t, tokens[best + 1] if t else 0] = 1e4
        return SimpleNamespace(logits=logits, past_key_values=None)


class TestPerplexityByPosition:
    def test_by_hand(self):
        model, tokens = Bigrams(), text()
        log_p = model.table.log_softmax(dim=1)
        nll = [[-log_p[a, b].item() for a, b in itertools.pairwise(row)] for row in tokens.tolist()]
        result = probe(model, tokens, beyond=40)
        mean = sum(sum(row[39:]) for row in nll) / (3 * 60)
        assert (result["nll"], result["perplexity"]) == pytest.approx((mean, math.exp(mean)), abs=1e-10)
        bins = result["by_position"]
        assert [(one["begin"], one["end"]) for one in bins] == [(1, 32), (32, 45), (45, 64), (64, 91), (91, 100)]
        assert bins[1]["nll"] == pytest.approx(sum(sum(row[31:44]) for row in nll) / (3 * 13), abs=1e-10)

    def test_bins_hold_each_token_once(self):
        nll = torch.arange(1.0, 300).double()[None]  # the value at position p is p
        for one in by_position(nll):
            assert one["nll"] == (one["begin"] + one["end"] - 1) / 2

    @pytest.mark.parametrize("kind", [{}, {"layer_kinds": ["kv", "hybrid"], "mixer": "add", "fast_weights": "linear"}])
    def test_in_chunks(self, kind, monkeypatch):
        model, tokens = small(**kind), text()
        whole = token_losses(model, tokens)
        monkeypatch.setattr(probes, "CHUNK", 7)
        in_chunks = token_losses(model, tokens)
        torch.testing.assert_close(in_chunks[0], whole[0], atol=1e-10, rtol=0)
        assert torch.equal(in_chunks[1], whole[1])


class TestRecall:
    def test_perfect(self):
        tokens = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))[:240].view(
            2, 120
        )  # without repetition
        result = recall(PerfectRecall(), tokens, distance=70, paragraph=20)
        assert (result["nll"], result["accuracy"]) == (0.0, 1.0)
        assert result["nll_first"] > 1

    def test_layout_of_the_text(self, monkeypatch):
        """The paragraph, the end of the next row, the paragraph again."""
        seen = []
        monkeypatch.setattr(
            probes, "token_losses", lambda _, x: seen.append(x) or (torch.zeros(2, 6), torch.ones(2, 6))
        )
        recall(Bigrams(), torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), distance=5, paragraph=2)
        assert seen[0].tolist() == [[1, 2, 8, 9, 10, 1, 2], [6, 7, 3, 4, 5, 6, 7]]

    def test_a_model_without_memory_gains_nothing(self):
        result = recall(Bigrams(), text(), distance=50, paragraph=10)
        assert result["nll"] == pytest.approx(result["nll_first"], abs=1e-10)


class TestNeedles:
    def test_perfect(self):
        result = needles(PerfectRecall(), text(2, 128), [100, 128], [0.0, 0.5, 1.0])
        assert [(one["length"], one["depth"]) for one in result] == [(n, d) for n in (100, 128) for d in (0, 0.5, 1)]
        assert all((one["nll"], one["accuracy"]) == (0.0, 1.0) for one in result)

    def test_a_model_without_memory_finds_none(self):
        assert all(one["accuracy"] < 0.2 for one in needles(Bigrams(), text(8), [100], [0.0, 1.0]))

    def test_layout_of_the_text(self):
        texts, value_begins = probes.texts_with_needles(text(2, 100), 90, [1.0, 0.0], seed=0)
        assert texts.shape == (2, 90)
        for row, of_text in zip(texts.tolist(), text(2, 100).tolist(), strict=True):
            first, last = row[:8], row[66:74]
            assert row[8:66] == of_text[:58]
            assert row[74:] == [*last, *first], "the last fact is queried first"
            assert [row[i : i + 4] for i in value_begins] == [last[4:], first[4:]]

    def test_by_seed(self):
        first, again, other = (probes.texts_with_needles(text(), 100, [0.5], seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestShares:
    def test_by_layer(self):
        model = small(layer_kinds=["kv", "hybrid", "fw", "hybrid"], num_hidden_layers=4)
        shares = probe(model, text())["shares"]
        assert [one["layer"] for one in shares] == [1, 3]
        assert all(0 < one["share"] < 1 and 0 < one["gate"] < 1 for one in shares)

    def test_a_bypassed_branch_has_share_0(self):
        model = small(mixer="add")
        assert all(one["share"] > 0 for one in probe(model, text())["shares"])
        with fw_bypassed(model):
            assert [one["share"] for one in probe(model, text())["shares"]] == [0, 0]


class TestBypassed:
    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(text()).logits

    def test_a_model_without_fw_memories_does_not_change(self):
        model = small(layer_kinds=["kv", "kv"])
        before = self.logits(model)
        with fw_bypassed(model):
            assert torch.equal(self.logits(model), before)

    def test_add_is_its_attention(self):
        model = small(mixer="add")
        with_fw = self.logits(model)
        with fw_bypassed(model):
            bypassed = self.logits(model)
        assert torch.equal(self.logits(model), with_fw), "the model is restored"
        assert not torch.allclose(bypassed, with_fw)
        for layer in model.model.layers:
            nn.init.zeros_(layer.memory.mixer.gate_proj.weight)
        torch.testing.assert_close(bypassed, self.logits(model), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("kv_whole", [False, True])
    def test_add_with_a_gate_of_the_kv_read(self, kv_whole):
        model = small(mixer="add", options={"kv_gate": True})
        with fw_bypassed(model, kv_whole=kv_whole):
            bypassed = self.logits(model)
        for layer in model.model.layers:
            mixer = layer.memory.mixer
            nn.init.zeros_(mixer.gate_proj.weight if kv_whole else mixer.gate_proj.weight[: mixer.sizes[0]])
        torch.testing.assert_close(bypassed, self.logits(model), atol=1e-10, rtol=0)

    def test_vector_with_the_kv_read_whole(self):
        torch.manual_seed(0)
        layer, x = HybridMemory(16, 2, 4).double(), torch.randn(2, 11, 16, dtype=torch.float64)
        projected, _ = layer.project(x, None, None)
        reads, _ = layer.parts().read(projected, None, None)
        with fw_bypassed(layer, kv_whole=True):
            torch.testing.assert_close(layer(x)[0], layer.o_proj(layer.o_norm(reads.kv).flatten(2)), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
    def test_vector_keeps_the_gate_of_the_kv_read(self, blend):
        torch.manual_seed(0)
        layer = HybridMemory(16, 2, 4, blend).double()
        x = torch.randn(2, 11, 16, dtype=torch.float64)
        projected, _ = layer.project(x, None, None)
        reads, _ = layer.parts().read(projected, None, None)
        gamma = projected.gate.sigmoid().view_as(reads.kv)
        expected = layer.o_proj(layer.o_norm((1 - gamma) * reads.kv).flatten(2))
        with fw_bypassed(layer):
            torch.testing.assert_close(layer(x)[0], expected, atol=1e-10, rtol=0)

    def test_step_by_step(self):
        """The FW-memories are still written."""
        model, tokens = small(mixer="scalar"), text()
        with torch.no_grad():
            with fw_bypassed(model):
                past = model(tokens[:, :60], use_cache=True).past_key_values
            expected = model(tokens[:, :60], use_cache=True).past_key_values
        assert past.states[0].position.equal(expected.states[0].position)
        assert past.states[0].fw.matrix.abs().sum() > 0

    def test_ends_with_an_error(self):
        model = small()
        before = self.logits(model)
        with pytest.raises(RuntimeError), fw_bypassed(model):
            raise RuntimeError
        assert torch.equal(self.logits(model), before)


class TestProbe:
    def test_is_json_and_deterministic(self):
        model = small(mixer="add")
        result = probe(model, text())
        assert json.loads(json.dumps(result)) == result == probe(model, text())
        assert (result["window"], result["rows"], result["length"], result["beyond"]) == (4, 3, 100, 50)

    def test_default_sizes_for_long_texts(self, monkeypatch):
        lengths = []
        monkeypatch.setattr(
            probes, "token_losses", lambda _, x: lengths.append(x.shape[1]) or (torch.zeros(1, x.shape[1] - 1),) * 2
        )
        result = probe(Bigrams(), text(1, 1024))
        assert lengths == [1024, 464, 256, 512, 1024]
        assert (result["beyond"], result["recall"]["distance"], result["window"]) == (256, 400, None)

    def test_window(self):
        assert probe(small(layer_kinds=["kv", "hybrid"]), text())["window"] == 4
        assert probe(small(layer_kinds=["kv", "kv"]), text())["window"] is None
        assert probe(small(layer_kinds=["kv", "kv"]), text(), window=9)["window"] == 9

    def test_of_transformers(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        from hqlt.model.pretrained import from_transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=WORDS)).double().eval()
        theirs, ours = probe(llama, text()), probe(from_transformers(llama), text())
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)
        assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"tokens": text(1, 79)}, "tokens: expected .* at least one row of 80"),
            ({"beyond": 100}, "beyond: expected 1 to 99"),
            ({"distance": 101}, "distance: expected 2 to 100"),
            ({"paragraph": 1}, "paragraph: expected 2 to 100"),
            ({"lengths": [90, 200]}, "lengths: expected 80 to 100 .* got 200"),
        ],
    )
    def test_refuses_too_few_tokens(self, given, message):
        with pytest.raises(ValueError, match=message):
            probe(Bigrams(), **{"tokens": text(), **given})


class TestState:
    @pytest.mark.parametrize("kinds", [["hybrid", "hybrid"], ["kv", "hybrid"], ["hybrid", "fw"]])
    def test_equals_the_size_of_a_cache(self, kinds):
        model = small(layer_kinds=kinds, retention="value-norm", kept=3)
        result = probes.state_bytes(model)
        for t in (10, 37):
            with torch.no_grad():
                states = model(text(1, t), use_cache=True).past_key_values.states
            assert sum(state.bytes_per_row() for state in states) == result["fixed"] + t * result["per_token"]

    def test_other_models_have_none(self):
        assert probes.state_bytes(Bigrams()) is None


def test_rows_of_a_report():
    tokens = text()
    (row,) = probes.probe_rows("original", small(layer_kinds=["kv", "kv"]), tokens)
    assert row["name"] == "original"
    own, bypassed = probes.probe_rows("ours", small(mixer="add"), tokens, beyond=30)
    assert own["probe"] == probe(small(mixer="add"), tokens, beyond=30)
    assert (bypassed["name"], bypassed["bypassed"]) == ("ours", True)
    assert bypassed["probe"]["perplexity"] != own["probe"]["perplexity"]


def test_rows_are_bypassed_in_the_way_with_the_lower_loss():
    for seed in range(4):
        model = small(mixer="add", options={"kv_gate": True})
        nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(seed))
        _, bypassed = probes.probe_rows("ours", model, text(2))
        losses = {whole: probes.loss_bypassed(model, text(2), whole) for whole in (False, True)}
        assert losses[bypassed["kv_whole"]] == min(losses.values()) != max(losses.values())
        with fw_bypassed(model, kv_whole=bypassed["kv_whole"]):
            assert bypassed["probe"] == probe(model, text(2))
