import pytest

from hqlt.task import IGNORE, AssociativeRecall, generator_for

TASK = AssociativeRecall(vocabulary=64, pairs=8, train_pairs=(2, 8))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_key_is_asked_for_once_and_its_value_is_the_answer(split):
    generator = generator_for(split, 0)
    for _ in range(6):
        batch = TASK.sample(generator, 20, split)
        pairs = batch.inputs.shape[1] // TASK.tokens_per_pair
        assert pairs in (TASK.train_pairs if split == "train" else [TASK.pairs])
        for inputs, targets, coordinate in zip(
            batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate.tolist(), strict=True
        ):
            keys, values = inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
            assert len(set(keys)) == pairs
            assert all(1 <= key < 32 for key in keys)
            assert all(32 <= value < 64 for value in values)
            asked = [i for i, target in enumerate(targets) if target != IGNORE]
            assert sorted(inputs[i] for i in asked) == sorted(keys)
            for i in asked:
                assert targets[i] == values[keys.index(inputs[i])]
                assert inputs[i - coordinate[i]] == targets[i]
            rest = [token for i, token in enumerate(inputs) if i >= 2 * pairs and i not in asked]
            assert set(rest) <= {0}


def test_soon_is_more_likely_than_late():
    batch = AssociativeRecall(vocabulary=64, pairs=4, train_pairs=(4,), tokens_per_pair=32).sample(
        generator_for("test", 0), 500, "test"
    )
    asked = (batch.targets != IGNORE).nonzero()[:, 1] - 8
    assert (asked < 40).float().mean() > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_pair": 3}, "tokens_per_pair: expected at least 4"),
        ({"vocabulary": 16, "pairs": 8, "train_pairs": (2,)}, "pairs: expected 1 to 7"),
        ({"vocabulary": 16, "pairs": 7, "train_pairs": (0,)}, "train_pairs: expected 1 to 7"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AssociativeRecall(**options)
