import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqlt.task import IGNORE, StateRecall, generator_for
from tests.task.verifiers import state_recall as answers


def rows_of(batch):
    return zip(batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate[:, 0].tolist(), strict=True)


@given(
    switches=st.integers(1, 2),
    symbols=st.integers(1, 4),
    longest=st.integers(3, 20),
    questions=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_value_of_symbol_and_setting_is_the_answer(switches, symbols, longest, questions, seed):
    task = StateRecall(switches=switches, symbols=symbols, values=20, questions=questions, test_lengths=(3, longest))
    for inputs, targets, walk in rows_of(task.sample(generator_for("test", seed), 20, "test")):
        found = answers(inputs, switches, symbols)
        assert {i: target for i, target in enumerate(targets) if target != IGNORE} == found
        assert len(found) == questions
        assert all(1 <= token <= task.settings for token in inputs[:walk])
        values = [token for token in inputs if token >= task.vocab_size - task.values]
        assert len(set(values)) == len(values) == task.pairs
        assert set(inputs[walk + 2 * task.pairs + 2 * questions :]) <= {0}
        assert max(inputs) < task.vocab_size


def test_prefix_labels_are_the_setting():
    task = StateRecall(switches=2, symbols=1, values=4, labels="prefix", train_lengths=(2, 9), test_lengths=(2, 9))
    for inputs, targets, walk in rows_of(task.sample(generator_for("train", 0), 50, "train")):
        setting = 0
        for i in range(walk):
            setting ^= inputs[i] - 1
            assert targets[i] == 1 + setting
        rest = {i: target for i, target in enumerate(targets) if target != IGNORE and i >= walk}
        for i in answers(inputs, 2, 1):
            setting ^= inputs[i - 1] - 1
            assert rest.pop(i - 1) == 1 + setting
        assert rest == answers(inputs, 2, 1)
    tested = task.sample(generator_for("test", 0), 50, "test")
    assert ((tested.targets != IGNORE).sum(dim=1) == task.questions).all()


def test_the_worked_example():
    inputs = [int(n) for n in re.search(r"inputs +([\d ]+)", StateRecall.__doc__)[1].split()]
    targets = re.search(r"targets +([\d· ]+)", StateRecall.__doc__)[1].split()
    assert len(targets) == len(inputs)
    assert {i: int(target) for i, target in enumerate(targets) if target != "·"} == answers(inputs, 1, 2)
    prefixes = re.search(r"after every flip: ([\d ]+)", StateRecall.__doc__)[1].split()
    setting = 0
    for flip, label in zip(inputs, prefixes, strict=False):
        setting ^= flip - 1
        assert int(label) == 1 + setting


def test_a_walk_without_its_first_flip_reveals_nothing():
    """Given all flips but one, every setting is equally likely: this bounds what a window can do."""
    task = StateRecall(switches=2, symbols=1, values=4, questions=1, train_lengths=(2, 2))
    batch = task.sample(generator_for("train", 0), 8000, "train")
    scored = batch.targets[batch.targets != IGNORE]
    setting = [
        (inputs[inputs.tolist().index(target) - 1] - 6).item()
        for inputs, target in zip(batch.inputs, scored.tolist(), strict=True)
        if inputs[1] == 2 and inputs[10] == 1
    ]
    assert len(setting) > 200
    assert all(abs(setting.count(i) / len(setting) - 0.25) < 0.1 for i in range(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switches": 0}, "switches: expected at least 1"),
        ({"values": 31}, "values: expected at least 32, one for each of 16 symbols in each of 2 settings, got 31"),
        ({"labels": "all"}, "labels: expected one of 'answer', 'prefix'"),
        ({"train_lengths": (5, 3)}, "train_lengths: expected the smallest and the largest length"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StateRecall(**options)
