import torch

from hqlt.task import Parity, generator_for


def test_packing_leaves_little_padding():
    batch = Parity().sample(generator_for("train", 0), 64, "train")
    assert (batch.inputs == 0).float().mean() > 0.4
    assert (batch.packed().inputs == 0).float().mean() < 0.1


def test_splits_do_not_share_seeds():
    drawn = [torch.rand(4, generator=generator_for(split, 0)) for split in ("train", "validation", "test")]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 3
