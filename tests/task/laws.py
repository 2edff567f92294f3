"""The laws of a task, written once and inherited by every task.

A test class inherits `Laws` and provides one fixture, `case`, which returns a `Case`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml

from hqlt.evaluate import evaluate
from hqlt.registry import build, find, name_of, options_of
from hqlt.study import read_study
from hqlt.task import IGNORE, generator_for
from hqlt.task.task import SPLITS
from hqlt.train.grid import as_json, load_result, save_result


class Case(NamedTuple):
    name: str
    """Name in the registry."""
    verifier: Callable[[list[int]], dict[int, int]] | None = None
    """Maps the tokens of a row to {position: target in tests}, computed independently."""

    @property
    def task(self):
        return build("task", self.name)

    def batch(self, split="train", seed=0, rows=6):
        return self.task.sample(generator_for(split, seed), rows, split)

    def study(self, folder, **changes):
        """A study of a small model on this task, with all options of the task in its file."""
        experiment = {
            "task": self.name,
            "options": json.loads(json.dumps(dataclasses.asdict(self.task))) | changes,
            "common": {"hidden_size": 8, "num_heads": 2, "num_hidden_layers": 1, "window": 4},
            "budget": {"steps": 2, "batch_size": 2, "validations": 1, "validation_rows": 7, "test_rows": 7},
        }
        file = folder / "study.yaml"
        study = {"title": "t", "introduction": "i", "models": {"Synchronous": {}}, "experiments": {"it": experiment}}
        file.write_text(yaml.safe_dump(study))
        return read_study(file)


class Laws:
    def test_its_name_finds_it(self, case):
        assert type(case.task) is find("task", case.name)
        assert name_of("task", type(case.task)) == case.name

    def test_an_unknown_option_is_refused_with_the_nearest(self, case):
        for option in options_of(type(case.task)):
            with pytest.raises(ValueError, match=rf"task {case.name}, option: expected .* did you mean '{option}'\?"):
                build("task", case.name, **{f"{option}s": 1})
        with pytest.raises(ValueError, match=r"option: expected .*, got 'metric'"):
            build("task", case.name, metric="accuracy")

    def test_it_is_immutable(self, case):
        with pytest.raises(dataclasses.FrozenInstanceError):
            case.task.metric = "bits"

    @pytest.mark.parametrize("split", SPLITS)
    def test_a_batch_has_the_documented_shapes_and_tokens(self, case, split):
        task, batch = case.task, case.batch(split, rows=7)
        assert batch.inputs.shape == batch.targets.shape == batch.coordinate.shape
        assert batch.inputs.dtype == batch.targets.dtype == torch.long
        assert batch.resets is None or (batch.resets.shape == batch.inputs.shape and batch.resets.dtype == torch.bool)
        assert len(batch.inputs) == 7 or (split == "train" and len(batch.inputs) > 7)
        assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.vocab_size
        scored = batch.targets != IGNORE
        assert scored.any(dim=1).all()
        assert 0 <= batch.targets[scored].min() <= batch.targets[scored].max() < task.vocab_size

    def test_equal_seeds_give_equal_batches_and_other_seeds_other_ones(self, case):
        first, again, other = (case.batch(seed=seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, first[:3], again[:3]))
        assert sequences(first).isdisjoint(sequences(other))

    def test_all_randomness_comes_from_the_generator(self, case):
        before = torch.get_rng_state()
        first = case.batch()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(case.batch().inputs, first.inputs)

    def test_no_sequence_is_in_two_splits(self, case):
        drawn = [sequences(case.batch(split, rows=12)) for split in SPLITS]
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(drawn, 2))

    def test_the_answers_match_independent_ones(self, case):
        if case.verifier is None:
            pytest.skip("has tests of its own")
        for split in ("validation", "test"):
            batch = case.batch(split, rows=12)
            for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
                scored = {i: target for i, target in enumerate(targets) if target != IGNORE}
                assert scored == case.verifier(inputs)

    def test_a_model_that_knows_every_answer_gets_the_best_score(self, case):
        task, batch = case.task, case.batch("test")
        logits = 100 * torch.nn.functional.one_hot(batch.targets.clamp(min=0), task.vocab_size).double()
        score = evaluate(FixedLogits(logits), task, batch)
        assert score.metric == task.metric
        assert score.value == pytest.approx(0.0 if task.metric == "bits" else 1.0, abs=1e-9)

    @pytest.mark.parametrize("rows", [5, 6])
    def test_packed_rows_hold_the_same_sequences(self, case, rows):
        batch = case.batch(rows=rows)
        if batch.resets is not None:
            assert batch.packed() is batch
            return
        packed = batch.packed()
        assert len(packed.inputs) == (len(batch.inputs) + 1) // 2
        found = []
        for row in range(len(packed.inputs)):
            begins = [*packed.resets[row].nonzero()[:, 0].tolist(), packed.inputs.shape[1]]
            for start, end in itertools.pairwise(begins):
                found.append([part[row, start:end].tolist() for part in packed[:3]])
        found = [
            sequence for sequence in found if set(sequence[1]) != {IGNORE}
        ]  # with an odd number of rows, one stays alone
        given = [[part[row].tolist() for part in batch[:3]] for row in range(len(batch.inputs))]
        assert sorted(map(until_the_last_target, found)) == sorted(map(until_the_last_target, given))

    def test_a_study_can_set_all_its_options_and_train_on_it(self, case, tmp_path):
        (cell,) = case.study(tmp_path).cells()
        drawn = cell.build_task().sample(generator_for("train", 0), 6, "train")
        assert torch.equal(drawn.inputs, case.batch().inputs)
        *_, result = cell.run(tmp_path)
        (tmp_path / "cells").mkdir()
        save_result(tmp_path, result)
        assert json.dumps(as_json(load_result(tmp_path, cell))) == json.dumps(as_json(result))
        assert result.fit.test.metric == case.task.metric

    def test_a_study_checks_the_types_of_its_options(self, case, tmp_path):
        for field in dataclasses.fields(case.task):
            with pytest.raises(
                ValueError, match=rf"experiments.it.options: {field.name}: expected .*, got {{'a': 1}}$"
            ):
                case.study(tmp_path, **{field.name: {"a": 1}})


class FixedLogits(torch.nn.Module):
    """A model with fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.row = logits, 0

    def forward(self, inputs, **_):
        rows = self.logits[self.row : self.row + len(inputs), : inputs.shape[1]]
        self.row += len(inputs)
        return SimpleNamespace(logits=rows)


def sequences(batch):
    """The set of the rows' tokens."""
    return set(map(tuple, batch.inputs.tolist()))


def until_the_last_target(sequence):
    inputs, targets, coordinate = sequence
    end = max(i for i, target in enumerate(targets) if target != IGNORE) + 1
    return inputs[:end], targets[:end], coordinate[:end]
