"""The KV-memory: which pairs stay as they are."""

from hqlt.memory.kv.attention import KVMemory, rotary_table

__all__ = ["KVMemory", "rotary_table"]
