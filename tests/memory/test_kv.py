"""Reads of the KV-memory. Rotary tables are tested in test_rotary, the laws with the layers."""

from __future__ import annotations

import pytest

from hqlt.memory import Heads, KVMemory
from tests.laws import close, normal

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}


@pytest.mark.parametrize("options", [{}, {"partial_rotary_factor": 0.5}, {"rope_scaling": YARN}, {"rope_theta": None}])
def test_only_differences_of_positions_matter(options):
    """Ten older entries out of reach change nothing; four query heads share two KV heads."""
    memory = KVMemory(Heads(hidden_size=16, queries=4, keys=2, matrices=2, k=4, v=4), **options)
    q, k, v = normal(1, 5, 4, 4), normal(1, 15, 2, 4), normal(1, 15, 2, 4, seed=1)
    close(memory.read(q, k[:, -7:], v[:, -7:], 3, None), memory.read(q, k, v, 3, None))
