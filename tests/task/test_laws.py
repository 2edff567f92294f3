"""Every task obeys the laws of tasks: those of hqlt, and one that is registered from outside."""

import pytest

from hqlt.registry import find, names
from tests.task import verifiers
from tests.task.laws import Case, Laws
from tests.toys import task as toy


def at_the_end(answer):
    """Make a verifier from a function that maps all tokens to the answer at the last one."""
    return lambda row: {row.index(0) - 1: answer(row[: row.index(0)])} if 0 in row else {len(row) - 1: answer(row)}


def majority(row):
    return {len(row) - 1: 2 if row.count(2) > row.count(1) else 1}


CASES = [
    Case("parity", at_the_end(verifiers.parity)),
    Case("even-pairs", at_the_end(verifiers.even_pairs)),
    Case("cycle", at_the_end(verifiers.cycle)),
    Case("arithmetic", at_the_end(verifiers.arithmetic)),
    Case("bracketed-arithmetic", at_the_end(verifiers.arithmetic)),
    Case("permutations", at_the_end(verifiers.permutations_of("S3"))),
    Case("recall", verifiers.recall),
    Case("needles", verifiers.needles),
    Case("selective-copying", verifiers.selective_copying),
    Case("state-recall", lambda row: verifiers.state_recall(row, switches=1, symbols=16)),
    Case("text"),
    Case("fact-extraction"),
]
OURS = [name for name in names("task") if find("task", name).__module__.startswith("hqlt.")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestOurTasks(Laws):
    pass


class TestATaskFromOutside(Laws):
    @pytest.fixture
    def case(self):
        return Case("toy-majority", majority)


def test_every_task_of_hqlt_is_tested():
    assert {case.name for case in CASES} == set(OURS)
    assert toy.Majority.__module__ == "tests.toys.task"
