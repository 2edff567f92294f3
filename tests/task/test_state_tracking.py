"""State-tracking tasks, checked against independently computed answers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqlt.task import (
    IGNORE,
    BracketedArithmetic,
    CycleNavigation,
    EvenPairs,
    ModularArithmetic,
    Parity,
    Permutations,
    generator_for,
)
from tests.task import verifiers

CASES = {
    "parity": (Parity, {}, verifiers.parity),
    "even pairs": (EvenPairs, {}, verifiers.even_pairs),
    "cycle": (CycleNavigation, {}, verifiers.cycle),
    "arithmetic": (ModularArithmetic, {}, verifiers.arithmetic),
    "brackets": (BracketedArithmetic, {}, verifiers.arithmetic),
    "S3": (Permutations, {"group": "S3"}, verifiers.permutations_of("S3")),
    "S4": (Permutations, {"group": "S4"}, verifiers.permutations_of("S4")),
    "A5": (Permutations, {"group": "A5"}, verifiers.permutations_of("A5")),
    "S5": (Permutations, {"group": "S5"}, verifiers.permutations_of("S5")),
}
WITH_PREFIXES = [name for name in CASES if name != "brackets"]

every_task = pytest.mark.parametrize("name", CASES)
seeds = st.integers(0, 1000)


@st.composite
def lengths(draw):
    shortest = draw(st.integers(3, 12))
    return shortest, draw(st.integers(shortest + 1, 40))


def rows_of(batch):
    """Yield each row's tokens without padding, their targets and its length n."""
    for inputs, targets, n in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.coordinate[:, 0].tolist(), strict=True
    ):
        tokens = inputs[: n - 1]
        assert 0 not in tokens
        assert set(inputs[n - 1 :]) <= {0}
        assert set(targets[n - 1 :]) <= {IGNORE}
        yield tokens, targets[: n - 1], n


@every_task
@given(lengths=lengths(), seed=seeds)
def test_the_answer_stands_at_the_last_token(name, lengths, seed):
    kind, options, answer = CASES[name]
    task = kind(train_lengths=lengths, test_lengths=lengths, **options)
    for split in ("train", "test"):
        for tokens, targets, n in rows_of(task.sample(generator_for(split, seed), 16, split)):
            assert lengths[0] <= n <= lengths[1]
            assert targets == [IGNORE] * (n - 2) + [answer(tokens)]


@pytest.mark.parametrize("name", WITH_PREFIXES)
@given(lengths=lengths(), seed=seeds)
def test_prefix_labels_are_used_in_training_only(name, lengths, seed):
    kind, options, answer = CASES[name]
    task = kind(train_lengths=lengths, test_lengths=lengths, labels="prefix", **options)
    for tokens, targets, _ in rows_of(task.sample(generator_for("train", seed), 8, "train")):
        assert targets == [answer(tokens[: i + 1]) for i in range(len(tokens))]
    for _, targets, n in rows_of(task.sample(generator_for("test", seed), 8, "test")):
        assert targets.count(IGNORE) == n - 2


@every_task
def test_every_length_and_every_answer_occurs(name):
    kind, options, _ = CASES[name]
    task = kind(**options)
    batch = task.sample(generator_for("train", 0), 5000, "train")
    lengths = range(3, 41, 2 if name == "arithmetic" else 1)
    assert set(batch.coordinate[:, 0].tolist()) == set(lengths)
    answers = batch.targets[batch.targets != IGNORE].bincount()
    assert (answers > 0).sum() == round(1 / task.chance)
    if name not in ("arithmetic", "brackets"):  # products make 0 more likely
        assert answers.max() < 1.5 * 5000 * task.chance + 20


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("S4", "A5", "S5")])  # the example is in S3
def test_the_worked_example(name):
    """The docstring's inputs, answer and prefix labels are right."""
    kind, _, answer = CASES[name]
    inputs = numbers(re.search(r"^ +inputs +([\d ]+)", kind.__doc__, flags=re.MULTILINE)[1])
    targets = re.search(r"^ +targets +((?:· +)+)(\d+)", kind.__doc__, flags=re.MULTILINE)
    assert targets[1].count("·") == len(inputs) - 1
    assert int(targets[2]) == answer(inputs)
    if name in WITH_PREFIXES:
        prefixes = numbers(re.search(r'labels "prefix": ([\d ]+)', kind.__doc__)[1])
        assert prefixes == [answer(inputs[: i + 1]) for i in range(len(inputs))]


def numbers(text):
    return [int(number) for number in text.split()]


def test_expressions_have_the_form_of_the_source():
    """Expressions have at most four characters, or are one pair of brackets around an operator."""
    batch = BracketedArithmetic(train_lengths=(3, 60)).sample(generator_for("train", 0), 300, "train")
    texts = [verifiers.expression(tokens) for tokens, _, _ in rows_of(batch)]
    short = {"d", "-d", "(d)", "(-d)"}
    for text in texts:
        shape = re.sub(r"\d", "d", text)
        while shape not in short:
            smaller = re.sub(r"\((?:-?d|\(-?d\)|E)[-+*](?:-?d|\(-?d\)|E)\)", "E", shape)
            if smaller == "E":
                break
            assert smaller != shape, text
            shape = smaller


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Parity, {"train_lengths": (2, 5)}, "train_lengths: expected the smallest and the largest length, 3 or more"),
        (Parity, {"test_lengths": (5, 4)}, "test_lengths: expected"),
        (Parity, {"labels": "all"}, "labels: expected one of 'answer', 'prefix', got 'all'"),
        (ModularArithmetic, {"train_lengths": (4, 4)}, "expected a range that contains an odd length, got 4 only"),
        (BracketedArithmetic, {"labels": "prefix"}, "an expression with open brackets has no value"),
        (CycleNavigation, {"positions": 1}, "positions: expected at least 2"),
        (Permutations, {"group": "A4"}, "group: expected one of 'S3', 'S4', 'A5', 'S5', got 'A4'"),
    ],
)
def test_impossible_settings_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
