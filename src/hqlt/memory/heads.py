"""How many heads a layer has, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Grouped freely: query head i reads the pairs and the matrix of head i // (query heads / their heads)."""

    hidden_size: int
    """Of the layer's input."""
    queries: int
    """Heads of q."""
    pairs: int
    """Heads of k, and of the pairs that a KV-memory holds."""
    matrices: int
    """Heads of v, each with a matrix of its own: as many as `pairs`, or a multiple of them without a KV-memory."""
    k: int
    """Width of a query or key head."""
    v: int
    """Width of a value head."""

    @property
    def reads(self) -> int:
        """Heads of what is read."""
        return max(self.queries, self.matrices)
