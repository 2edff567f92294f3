"""Small, strict and the same on every machine: one thread, fixed seeds, few and derandomised examples.

`pytest --hypothesis-profile=thorough` looks much harder, with new examples each time.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from hqlt import registry

pytest.register_assert_rewrite("tests.laws")

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell; commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

INHERITED_LAWS_WITH_FIXTURES = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "fast",
    max_examples=4,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[*INHERITED_LAWS_WITH_FIXTURES, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("fast"), max_examples=100, derandomize=False)
settings.load_profile("fast")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but a machine without a compiler runs what needs none: GPU kernels, plain torch."""
    config.addinivalue_line("filterwarnings", "ignore:hqlt. .*slower torch implementations run instead:RuntimeWarning")


@pytest.fixture(autouse=True)
def names_of_this_test_alone() -> Iterator[None]:
    """What a test registers, nobody knows after it."""
    known = {kind: dict(classes) for kind, classes in registry._known.items()}
    yield
    for kind, now in registry._known.items():
        ours = {name: cls for name, cls in now.items() if cls.__module__.startswith("hqlt.")}  # imported meanwhile
        now.clear()
        now.update(ours | known[kind])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
