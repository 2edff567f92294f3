"""Deterministic tests: one thread, fixed seeds, a few fixed hypothesis examples.

`pytest --hypothesis-profile=thorough` runs many more examples, different each time.
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

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; commands under test inherit it
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
    """Allow the warning about the missing native library, so that tests also run without a compiler."""
    config.addinivalue_line("filterwarnings", "ignore:hqlt. .*slower torch implementations run instead:RuntimeWarning")


@pytest.fixture(autouse=True)
def restore_registry() -> Iterator[None]:
    """Remove the names that a test registered."""
    known = {kind: dict(classes) for kind, classes in registry._known.items()}
    yield
    for kind, now in registry._known.items():
        # modules of hqlt that were imported during the test
        ours = {name: cls for name, cls in now.items() if cls.__module__.startswith("hqlt.")}
        now.clear()
        now.update(ours | known[kind])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
