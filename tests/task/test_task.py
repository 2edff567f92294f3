import itertools

import pytest
import torch

from hqlt.task import IGNORE, TASKS, generator_for


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_batches_and_another_others(name):
    task = TASKS[name]()
    draw = [task.sample(generator_for("train", seed), 4, "train").inputs for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert draw[0].shape != draw[2].shape or not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_the_shape_that_it_says(name):
    task = TASKS[name]()
    assert task.name == name
    batch = task.sample(generator_for("validation", 0), 3, "validation")
    assert batch.inputs.shape == batch.targets.shape == batch.coordinate.shape
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.vocab_size


@pytest.mark.parametrize("rows", [7, 8])
@pytest.mark.parametrize("name", ["parity", "arithmetic", "recall", "state-recall"])
def test_packed_sequences_stand_behind_one_another_and_begin_segments(name, rows):
    task = TASKS[name](**({"vocabulary": 64, "train_sizes": ((16, 4),), "test_sizes": ()} if name == "recall" else {}))
    batch = task.sample(generator_for("train", 0), rows, "train")
    packed = batch.packed()
    assert len(packed.inputs) == (len(batch.inputs) + 1) // 2
    found = []
    for row in range(len(packed.inputs)):
        begins = [*packed.resets[row].nonzero()[:, 0].tolist(), packed.inputs.shape[1]]
        for start, end in itertools.pairwise(begins):
            found.append([part[row, start:end].tolist() for part in packed[:3]])
    found = [sequence for sequence in found if set(sequence[1]) != {IGNORE}]  # an odd row out has nothing behind it
    given = [[part[row].tolist() for part in batch[:3]] for row in range(len(batch.inputs))]
    assert sorted(map(until_the_last_target, found)) == sorted(map(until_the_last_target, given))


def test_packing_leaves_little_padding():
    batch = TASKS["parity"]().sample(generator_for("train", 0), 64, "train")
    assert (batch.inputs == 0).float().mean() > 0.4
    assert (batch.packed().inputs == 0).float().mean() < 0.1


def until_the_last_target(sequence):
    inputs, targets, coordinate = sequence
    end = max(i for i, target in enumerate(targets) if target != IGNORE) + 1
    return inputs[:end], targets[:end], coordinate[:end]


def test_segments_stay_as_they_are():
    batch = TASKS["text"](length=16).sample(generator_for("train", 0), 2, "train")
    assert batch.packed() is batch


def test_splits_never_share_a_seed():
    drawn = {split: torch.rand(4, generator=generator_for(split, 0)) for split in ("train", "validation", "test")}
    assert not torch.equal(drawn["validation"], drawn["test"])
    assert not torch.equal(drawn["train"], drawn["test"])
