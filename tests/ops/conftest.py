from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
