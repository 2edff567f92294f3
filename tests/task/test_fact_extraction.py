import re

import pytest
import torch

from hqlt.task import IGNORE, FactExtraction, generator_for
from hqlt.task.fact_extraction import FACT, facts_of
from hqlt.task.text import files_of


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_answer_is_the_last_value_that_the_passage_assigns_to_the_name(split):
    task = FactExtraction(length=300, labels="answer")
    batch = task.sample(generator_for(split, 1), 60, split)
    for inputs, targets, distance in zip(batch.inputs, batch.targets, batch.coordinate[:, 0].tolist(), strict=True):
        scored = (targets != IGNORE).nonzero()[:, 0]
        answer = bytes(targets[scored].tolist())
        passage, question = bytes(inputs[: scored[0] + 1].tolist()).rsplit(b"\n", 1)
        name = re.fullmatch(rb"([\w.]+) = ", question)[1]
        facts = [match for match in FACT.finditer(passage + b"\n") if match[1] == name]
        assert facts[-1][2] + b"\n" == answer
        again = rb"^[ \t]*" + re.escape(name) + rb"[ \t]*(:[^\n=]*)?([-+*/|&^%@]|//|<<|>>|\*\*)?=[^=]"
        assert not re.search(again, passage[facts[-1].end(2) :], re.MULTILINE)
        assert len(passage) - facts[-1].end(2) == distance < 300
        assert len(passage) <= 300
        assert bytes(inputs[scored[1:]].tolist()) == answer[:-1]


def test_distances_are_uniform_in_tests_and_log_uniform_in_training():
    task, generator = FactExtraction(length=256), generator_for("test", 0)
    tested, trained = ([task.distance(generator, split) for _ in range(2000)] for split in ("test", "train"))
    assert (min(trained), max(tested)) == (1, 255)
    assert max(trained) < 256
    for distances, half in ((tested, 128), (trained, 16)):
        assert sum(distance < half for distance in distances) == pytest.approx(1000, abs=100)


def test_training_may_score_every_byte():
    batch = FactExtraction(length=128).sample(generator_for("train", 0), 8, "train")
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        scored = int((targets != IGNORE).sum())
        assert torch.equal(targets[: scored - 1], inputs[1:scored])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_there_are_many_facts_and_their_values_occur_nowhere_else(split):
    facts = facts_of(split)
    assert len(facts.name) > {"train": 3000, "validation": 200, "test": 200}[split]
    library = b"\n".join(files_of(each)[0].numpy().tobytes() for each in ("train", "validation", "test"))
    source = files_of(split)[0].numpy().tobytes()
    for i in range(0, len(facts.name), len(facts.name) // 20):
        name, value = source[facts.name[i] : facts.value[i] - 3], source[facts.value[i] : facts.end[i]]
        assert name.split(b".")[-1] != value
        found = re.findall(rb"^[ \t]*[A-Za-z_][\w.]* = " + re.escape(value) + rb"\n", library, re.MULTILINE)
        assert len(found) == 1


@pytest.mark.parametrize("wrong", [{"length": 10}, {"labels": "none"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        FactExtraction(**wrong)
