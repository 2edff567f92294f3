"""The KV-memory: which pairs stay as they are."""

from hqlt.memory.kv.attention import KVMemory

__all__ = ["KVMemory"]
