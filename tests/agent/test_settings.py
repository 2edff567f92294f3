"""Every numeric setting has a range; values out of range are refused by the name of the option."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from hqlt.agent import PPOSettings, SACSettings
from hqlt.ranges import COUNT, FRACTION, POSITIVE, POSITIVE_FRACTION, Range
from hqlt.train.agent import AgentSettings
from hqlt.train.agent.cell import AgentBudget

PREFIXES = {PPOSettings: "ppo.", SACSettings: "sac.", AgentSettings: "", AgentBudget: ""}


def numeric_fields():
    for settings in PREFIXES:
        for field in dataclasses.fields(settings):
            if {"int", "float"} & set(str(field.type).replace("[", " ").replace(",", " ").split()):
                yield pytest.param(settings, field, id=f"{settings.__name__}.{field.name}")


def settings_of(kind, **fields):
    return kind(**({"steps": 1} if kind is AgentBudget else {}) | fields)


@pytest.mark.parametrize(("settings", "field"), [*numeric_fields()])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1, -0.5, "3", True])
def test_every_number_has_a_range(settings, field, wrong):
    value = (wrong,) if "tuple" in str(field.type) else wrong
    name = (PREFIXES[settings] + field.name).replace(".", r"\.")
    if "dict" in str(field.type):
        pytest.skip("arguments of the environment, which checks them itself")
    with pytest.raises(ValueError, match=rf"^{name}: expected a (whole )?number .*, got "):
        settings_of(settings, **{field.name: value})


@pytest.mark.parametrize(("settings", "field"), [*numeric_fields()])
def test_none_is_accepted_only_if_the_type_allows_it(settings, field):
    if "None" in str(field.type):
        settings_of(settings, **{field.name: None})
    elif "dict" not in str(field.type):
        with pytest.raises(ValueError, match="got None"):
            settings_of(settings, **{field.name: None})


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (COUNT, [1, 10**9, np.int64(3)], [0, 1.0, True], "a whole number of at least 1"),
        (POSITIVE, [1e-9, 3, np.float32(0.5)], [0, -1, math.nan, math.inf], "a number above 0"),
        (FRACTION, [0, 1, 0.5], [-1e-9, 1.1], "a number from 0 to 1"),
        (POSITIVE_FRACTION, [1, 1e-9], [0, 1.1], "a number above 0 and at most 1"),
        (Range(0, 22, whole=True), [0, 22], [23, 3.5], "a whole number from 0 to 22"),
    ],
)
def test_ranges(allowed, inside, outside, text):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == text
