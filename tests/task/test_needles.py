import pytest

from hqlt.task import Needles, generator_for
from tests.task.verifiers import needles


def test_the_worked_example():
    inputs = [9, 12, 3, 6, 10, 10, 9, 1, 8, 11, 1, 0, 3, 0]
    assert needles(inputs, keys=4) == {10: 8, 12: 6}
    assert "inputs    9 12 3 6 10 10 9 1 8 11                               1 0 3 0" in Needles.__doc__


def test_lengths_are_equally_frequent_and_every_needle_is_queried_once():
    task = Needles(needles=3, test_lengths=(8, 20))
    batch = task.sample(generator_for("test", 0), 6, "test")
    for i, (row, coordinate) in enumerate(zip(batch.inputs.tolist(), batch.coordinate.tolist(), strict=True)):
        length = 8 if i < 3 else 20
        text, questions = row[:length], row[length : length + 6]
        assert 0 not in text and questions[1::2] == [0, 0, 0] and not any(row[length + 6 :])
        assert sorted(questions[::2]) == sorted(token for token in text if token <= 16)
        assert all(text[length + j - coordinate[length + j] - 1] == questions[j] for j in (0, 2, 4))


def test_needles_may_fill_the_whole_sequence():
    task = Needles(needles=4, train_lengths=(8,))
    for row in task.sample(generator_for("train", 0), 50, "train").inputs.tolist():
        assert all(1 <= key <= 16 < value <= 32 for key, value in zip(row[:8:2], row[1:8:2], strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needles": 17}, "needles: expected 1 to 16, the number of keys, got 17"),
        ({"values": 1}, "values: expected at least 2 tokens, got 1"),
        ({"noise": 0}, "noise: expected at least 1 tokens, got 0"),
        ({"train_lengths": (7,)}, r"train_lengths: expected lengths of at least 8 tokens, two per needle, got \[7\]"),
        ({"test_lengths": ()}, r"test_lengths: expected .* got \[\]"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Needles(**options)
