"""The KV-memory: which pairs stay as they are."""

from hqlt.memory.kv.attention import KVMemory
from hqlt.memory.kv.retention import Candidates, Kept, Random, Recent, Retention, ValueNorm

__all__ = ["Candidates", "KVMemory", "Kept", "Random", "Recent", "Retention", "ValueNorm"]
