import pytest

from hqlt.task import IGNORE, Parity, generator_for


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_asks_for_the_parity_of_the_bits(split):
    task = Parity()
    batch = task.sample(generator_for(split, 0), 200, split)
    shortest, longest = task.train_lengths if split == "train" else task.test_lengths
    for inputs, targets, coordinate in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate, strict=True
    ):
        bits = [token - 1 for token in inputs if token != 0]
        assert inputs[: len(bits)] == [bit + 1 for bit in bits]  # padding stands on the right
        (asked,) = [i for i, target in enumerate(targets) if target != IGNORE]
        assert asked == len(bits) - 1
        assert targets[asked] == sum(bits) % 2 + 1
        assert shortest <= len(bits) + 1 <= longest
        assert coordinate[asked] == len(bits) + 1


def test_all_lengths_and_both_answers_come():
    batch = Parity().sample(generator_for("train", 0), 4000, "train")
    assert set((batch.coordinate[:, 0]).tolist()) == set(range(3, 41))
    answers = batch.targets[batch.targets != IGNORE].double()
    assert abs(answers.mean() - 1.5) < 0.05


def test_the_worked_example():
    batch = Parity(train_lengths=(5, 5)).sample(generator_for("train", 0), 500, "train")
    rows = batch.inputs.tolist()
    assert batch.targets[rows.index([2, 1, 2, 2])].tolist() == [IGNORE, IGNORE, IGNORE, 2]
