import pytest
import torch

from hqlt.task import TASKS, generator_for


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


def test_splits_never_share_a_seed():
    drawn = {split: torch.rand(4, generator=generator_for(split, 0)) for split in ("train", "validation", "test")}
    assert not torch.equal(drawn["validation"], drawn["test"])
    assert not torch.equal(drawn["train"], drawn["test"])
