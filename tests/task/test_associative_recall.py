import pytest

from hqlt.task import IGNORE, AssociativeRecall, generator_for

TASK = AssociativeRecall(vocabulary=64, train_sizes=((8, 2), (32, 8)), test_sizes=((24, 4), (32, 8)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_key_is_queried_once_and_its_value_is_the_answer(split):
    generator = generator_for(split, 0)
    sizes = set()
    for _ in range(6):
        batch = TASK.sample(generator, 20, split)
        for inputs, targets, coordinate in zip(
            batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate.tolist(), strict=True
        ):
            scored = [i for i, target in enumerate(targets) if target != IGNORE]
            pairs = len(scored)
            sizes.add(pairs)
            keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
            assert len(set(keys)) == pairs
            assert all(1 <= key < 32 for key in keys)
            assert all(32 <= value < 64 for value in values)
            assert sorted(inputs[i] for i in scored) == sorted(keys)
            for i in scored:
                assert targets[i] == values[keys.index(inputs[i])]
                assert inputs[i - coordinate[i]] == targets[i]
            rest = [token for i, token in enumerate(inputs) if i >= 2 * pairs and i not in scored]
            assert set(rest) <= {0}
    assert sizes == ({2, 8} if split == "train" else {4, 8})


def test_all_training_batches_have_the_same_number_of_queries():
    generator = generator_for("train", 0)
    batches = [TASK.sample(generator, 20, "train") for _ in range(6)]
    assert {tuple(batch.inputs.shape) for batch in batches} == {(80, 8), (20, 32)}
    assert {int((batch.targets != IGNORE).sum()) for batch in batches} == {160}


def test_all_test_sizes_are_equally_frequent():
    batch = TASK.sample(generator_for("test", 0), 20, "test")
    assert batch.inputs.shape == (20, 32)
    assert sorted((batch.targets != IGNORE).sum(dim=1).tolist()) == [4] * 10 + [8] * 10
    assert (batch.inputs[:10, 24:] == 0).all()


def test_the_coordinate_may_be_the_number_of_pairs():
    task = AssociativeRecall(vocabulary=64, test_sizes=((24, 4), (32, 8)), train_sizes=((8, 2),), against="pairs")
    batch = task.sample(generator_for("test", 0), 6, "test")
    scored = batch.targets != IGNORE
    assert [set(row[where].tolist()) for row, where in zip(batch.coordinate, scored, strict=True)] == [{4}] * 3 + [
        {8}
    ] * 3
    assert task.coordinate_name == "pairs"


def test_early_queries_are_more_likely_than_late_ones():
    batch = AssociativeRecall(vocabulary=64, test_sizes=((128, 4),), train_sizes=((128, 4),)).sample(
        generator_for("test", 0), 500, "test"
    )
    scored = (batch.targets != IGNORE).nonzero()[:, 1] - 8
    assert (scored < 40).float().mean() > 0.6


def test_the_worked_example():
    inputs, targets = [3, 5, 1, 6, 1, 0, 3, 0, 0, 0], {4: 6, 6: 5}
    assert "inputs    3 5 1 6               1 0 3 0 0 0" in AssociativeRecall.__doc__
    assert "targets   · · · ·               6 · 5 · · ·" in AssociativeRecall.__doc__
    assert all(inputs[inputs.index(inputs[i]) + 1] == target for i, target in targets.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sizes": ((6, 2),)}, "train_sizes: expected at least 4 tokens per pair"),
        ({"vocabulary": 16, "test_sizes": ((32, 8),)}, "test_sizes: expected 1 to 7 pairs"),
        ({"vocabulary": 16, "train_sizes": ((8, 0),)}, "train_sizes: expected 1 to 7 pairs"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AssociativeRecall(**{"train_sizes": ((8, 2),), "test_sizes": ((8, 2),)} | options)
