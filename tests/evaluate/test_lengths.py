"""Texts far longer than training: every token is predicted from all before it, in constant memory."""

from __future__ import annotations

import math
import resource
import sysconfig
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
import torch

from hqlt.cli.eval import tokens_of
from hqlt.data import load_tokenizer
from hqlt.evaluate import lengths, retrieval
from hqlt.evaluate.lengths import bin_edges, bits_by_position
from hqlt.evaluate.retrieval import PASSKEY, greedy_hits, haystack_tokens, lengths_up_to, needle
from tests.language.conftest import build, prepending
from tests.language.conftest import model as model

LIBRARY = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXT = list(islice(chain.from_iterable(path.read_bytes() for path in LIBRARY), 200_000))
BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize("chunk", [7, 64])
def test_bits_are_those_of_one_pass(model, chunk, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", chunk)
    tokens = torch.tensor([TEXT[:200]])
    bins = bits_by_position(model, TEXT[:200], reset_every=50)
    resets = (torch.arange(199) % 50 == 0)[None]
    for name, given in (("carried", {}), ("emptied", {"resets": resets})):
        log_p = model(tokens[:, :-1], **given).logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        for part in bins:
            expected = -log_p[part.begin : part.end].mean().item() / math.log(2)
            assert getattr(part, name) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 1000, 1024])
def test_bins_cover_every_position_once(positions):
    edges = bin_edges(positions)
    assert edges[0] == 0 and edges[-1] == positions
    assert all(a < b for a, b in pairwise(edges))


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="tokens: expected at least two tokens"):
        bits_by_position(build(), [1])


class TestConstantMemory:
    """A text ten times as long has states of the same size and no higher peak, up to noise of the allocator.

    (With full attention, the KV entries of 200,000 tokens would take 50 MB per row.)
    """

    SHORT, LONG, NOISE = 20_000, 200_000, 16

    def peak(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def test_bits_by_position(self, monkeypatch):
        model = build().float()
        sizes = set()
        monkeypatch.setattr(model.model, "forward", self.watched(model.model.forward, sizes))
        bits_by_position(model, TEXT[: self.SHORT])
        before = self.peak()
        bits_by_position(model, TEXT[: self.LONG])
        assert self.peak() - before < self.NOISE
        assert len(sizes) == 1

    def test_retrieval(self, monkeypatch):
        model = build().float()
        sizes = set()
        monkeypatch.setattr(model.model, "forward", self.watched(model.model.forward, sizes))
        for length in (self.SHORT, self.LONG):
            before = self.peak()
            retrieval.retrieval(model, BYTES, PASSKEY, [length], depths=(0.5,), trials=1)
        assert self.peak() - before < self.NOISE
        assert len(sizes) == 1

    def watched(self, forward, sizes):
        def run(*arguments, **given):
            out = forward(*arguments, **given)
            sizes.add(sum(state.bytes_per_row() for state in out.past_key_values.states))
            return out

        return run


class TestRetrieval:
    @pytest.mark.parametrize("haystack", [PASSKEY, needle("some real text, ")])
    @pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
    def test_the_fact_is_at_its_depth(self, haystack, depth):
        filler = BYTES.encode(haystack.filler)
        text = bytes(haystack_tokens(BYTES, haystack, filler, "12345", 700, depth)).decode()
        assert len(text) == 700
        fact = haystack.fact.format(key="12345")
        assert text.startswith(haystack.introduction) and text.endswith(haystack.question)
        room = 700 - len(haystack.introduction) - len(haystack.question) - len(fact)
        assert text.index(fact) == len(haystack.introduction) + round(depth * room)

    def test_a_text_begins_with_the_tokenizers_prefix(self, tmp_path):
        tokenizer = prepending()
        plain = list(haystack_tokens(tokenizer, PASSKEY, [1], "12345", 700, 0.5))
        tokenizer.prefix_ids = [0]
        begun = list(haystack_tokens(tokenizer, PASSKEY, [1], "12345", 700, 0.5))
        assert begun[0] == 0 and begun[1:9] == plain[:8] and len(begun) == 700
        (tmp_path / "a.txt").write_text("text")
        assert tokens_of(tmp_path / "a.txt", tokenizer, 4) == [0, *tokenizer.encode("text")][:4]

    def test_a_length_without_room_for_the_fact_is_refused(self):
        with pytest.raises(ValueError, match=r"length: expected at least .* tokens"):
            haystack_tokens(BYTES, PASSKEY, [1], "12345", 100, 0.5)

    def test_hits_are_what_greedy_decoding_generates(self, model, monkeypatch):
        monkeypatch.setattr(retrieval, "CHUNK", 16)
        prompts = [TEXT[:40], TEXT[40:80]]
        best = model.generate(torch.tensor(prompts), max_new_tokens=4, do_sample=False, pad_token_id=0)[:, 40:].tolist()
        assert greedy_hits(model, list(map(iter, prompts)), best) == [[True] * 4] * 2
        wrong = [[*best[0][:3], best[0][3] ^ 1], best[1][:2]]
        assert greedy_hits(model, list(map(iter, prompts)), wrong) == [[True, True, True, False], [True, True]]

    def test_what_is_counted(self, monkeypatch):
        """A key counts if all of it is right; the share of right tokens excludes the space before the key."""
        hits = iter([[[True] * 6, [True] * 3 + [False] * 3], [[True] * 6, [False] * 6]])
        monkeypatch.setattr(retrieval, "greedy_hits", lambda *_: next(hits))
        first, last = retrieval.retrieval(build(), BYTES, PASSKEY, [700], depths=(0.0, 1.0), trials=2)
        assert (first.right, first.tokens_right) == (2, 1.0)
        assert (last.right, last.tokens_right) == (0, pytest.approx(0.2))

    def test_an_answer_is_tokenized_after_the_question(self, monkeypatch):
        """On its own, " 12345" would begin with an additional space, which no greedy answer has."""
        found = []
        monkeypatch.setattr(
            retrieval, "greedy_hits", lambda _, texts, answers, on_progress: found.extend(answers) or [[True] * 6]
        )
        tokenizer = prepending()
        retrieval.retrieval(build(), tokenizer, PASSKEY, [700], depths=(0.0,), trials=1)
        ((space, *digits),) = found
        assert (tokenizer.tokenizer.id_to_token(space), len(digits)) == ("▁", 5)
        assert tokenizer.decode(digits).isdigit()

    def test_lengths(self):
        assert lengths_up_to(1_000_000) == [1000, 4000, 16_000, 64_000, 256_000, 1_000_000]
        assert lengths_up_to(500) == [500]
