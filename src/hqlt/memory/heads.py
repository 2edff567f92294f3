"""The number and width of a layer's heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Numbers and widths of heads. Query head i reads the KV entries and the matrix of head i // (queries / keys).

    Example:
        >>> from hqlt.memory import Heads
        >>> Heads(hidden_size=64, queries=4, keys=2, matrices=2, k=16, v=16).reads
        4
    """

    hidden_size: int
    """Width of the layer's input."""
    queries: int
    """Number of query heads."""
    keys: int
    """Number of key heads, and of heads of a KV entry."""
    matrices: int
    """Number of value heads, each with its own matrix: equal to `keys`, or a multiple of it without a KV-memory."""
    k: int
    """Width of a query or key head."""
    v: int
    """Width of a value head."""

    @property
    def reads(self) -> int:
        """Number of heads of a read."""
        return max(self.queries, self.matrices)

    @staticmethod
    def of(
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        num_value_heads: int | None,
        value_dim: int | None,
        alone: bool,
    ) -> Heads:
        """Return the heads that a layer's arguments describe. `alone` says that there is no KV-memory.

        Raises:
            ValueError: when the arguments do not fit together.
        """
        keys = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or hidden_size < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(
                f"num_heads: expected a positive number that divides hidden_size = {hidden_size}, got {num_heads}; "
                f"or give head_dim"
            )
        if keys < 1 or num_heads % keys:
            raise ValueError(f"num_kv_heads: expected a number that divides num_heads = {num_heads}, got {keys}")
        k = hidden_size // num_heads if head_dim is None else head_dim
        for name, value in {"num_value_heads": num_value_heads, "value_dim": value_dim}.items():
            if value is not None and not alone:
                raise ValueError(
                    f"{name}: expected none beside a KV-memory (only blend='fw-only' has none), got {value}"
                )
        matrices = keys if num_value_heads is None else num_value_heads
        if matrices % keys or (matrices != keys and keys != num_heads):
            raise ValueError(
                f"num_value_heads: expected a multiple of num_heads = {num_heads}, with as many key heads, got "
                f"{matrices} with num_kv_heads = {keys}"
            )
        v = k if value_dim is None else value_dim
        if min(k, v) < 1:
            raise ValueError(f"head_dim, value_dim: expected at least 1, got {k} and {v}")
        return Heads(hidden_size, num_heads, keys, matrices, k, v)
