import pytest

from hqlt.task import IGNORE, SelectiveCopying, generator_for


def test_the_targets_are_the_tokens_in_order():
    task = SelectiveCopying(length=20, tokens=5, vocabulary=8)
    batch = task.sample(generator_for("train", 0), 200, "train")
    for inputs, targets, coordinate in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate.tolist(), strict=True
    ):
        kept = [token for token in inputs[:20] if token != 0]
        assert len(kept) == 5
        assert all(2 <= token < 8 for token in kept)
        assert inputs[20:] == [1] * 5
        assert targets == [IGNORE] * 20 + kept
        assert [inputs[i - coordinate[i]] for i in range(20, 25)] == kept


def test_the_worked_example():
    inputs, targets = [0, 5, 0, 0, 3, 7, 0, 1, 1, 1], [5, 3, 7]
    assert "inputs    0 5 0 0 3 7 0    1 1 1" in SelectiveCopying.__doc__
    assert "targets   · · · · · · ·    5 3 7" in SelectiveCopying.__doc__
    assert [token for token in inputs if token > 1] == targets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 8, "tokens": 9}, r"tokens: expected 1 to 8 \(the length\)"),
        ({"vocabulary": 3}, "vocabulary: expected at least 4"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelectiveCopying(**options)
