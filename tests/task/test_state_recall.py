import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqlt.task import IGNORE, StateRecall, generator_for


def answers(tokens, switches):
    """{position: answer} by walking through the tokens one by one."""
    m = 2**switches
    setting, value_of, last_key, found = [False] * switches, {}, None, {}
    for i, token in enumerate(tokens):
        if 1 <= token <= m:  # a flip: the digits of token − 1 say which switches
            for switch in range(switches):
                if (token - 1) // 2**switch % 2:
                    setting[switch] = not setting[switch]
            if len(value_of) == m:
                found[i] = value_of[sum(on * 2**switch for switch, on in enumerate(setting))]
        elif 1 + m <= token <= 2 * m:
            last_key = token - 1 - m
        elif token > 2 * m:
            value_of[last_key] = token
    return found


@given(switches=st.integers(1, 3), longest=st.integers(3, 20), questions=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_value_of_the_setting_is_the_answer(switches, longest, questions, seed):
    task = StateRecall(switches=switches, values=12, questions=questions, test_lengths=(3, longest))
    batch = task.sample(generator_for("test", seed), 20, "test")
    for inputs, targets, walk in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate[:, 0].tolist(), strict=True
    ):
        assert {i: target for i, target in enumerate(targets) if target != IGNORE} == answers(inputs, switches)
        assert len(answers(inputs, switches)) == questions
        assert all(1 <= token <= task.settings for token in inputs[:walk])
        values = [token for token in inputs if token > 2 * task.settings]
        assert len(set(values)) == len(values) == task.settings
        assert set(inputs[walk + 2 * task.settings + questions :]) <= {0}


def test_the_worked_example():
    inputs = [int(n) for n in re.search(r"inputs +([\d ]+)", StateRecall.__doc__)[1].split()]
    targets = re.search(r"targets +((?:· +)+)(\d+) (\d+)", StateRecall.__doc__)
    assert targets[1].count("·") == 10
    assert answers(inputs, 2) == {10: int(targets[2]), 11: int(targets[3])}


def test_labels_at_every_prefix_name_the_setting():
    task = StateRecall(switches=2, values=4, labels="prefix", train_lengths=(2, 9), test_lengths=(2, 9))
    batch = task.sample(generator_for("train", 0), 50, "train")
    for inputs, targets, walk in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate[:, 0].tolist(), strict=True
    ):
        setting = 0
        for i in range(walk):
            setting ^= inputs[i] - 1
            assert targets[i] == 1 + 4 + setting
        rest = {i: target for i, target in enumerate(targets) if target != IGNORE and i >= walk}
        assert rest == answers(inputs, 2)
    tested = task.sample(generator_for("test", 0), 50, "test")
    assert ((tested.targets != IGNORE).sum(dim=1) == task.questions).all()


def test_the_last_flip_alone_tells_nothing():
    """Given all but the first flip of the walk, every setting is as likely: the bound on a window."""
    task = StateRecall(switches=2, values=4, questions=1, train_lengths=(2, 2))
    batch = task.sample(generator_for("train", 0), 4000, "train")
    asked = batch.targets[batch.targets != IGNORE]
    setting = [
        inputs[2:10].tolist().index(target) // 2
        for inputs, target in zip(batch.inputs, asked.tolist(), strict=True)
        if inputs[1] == 2 and inputs[10] == 1
    ]
    assert len(setting) > 100
    assert all(abs(setting.count(i) / len(setting) - 0.25) < 0.1 for i in range(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switches": 0}, "switches, questions: expected at least 1"),
        ({"values": 15}, "values: expected at least 16, one for each setting of 4 switches"),
        ({"labels": "all"}, "labels: expected 'answer' or 'prefix'"),
        ({"train_lengths": (5, 3)}, "train_lengths: expected the least and the greatest length"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StateRecall(**options)
