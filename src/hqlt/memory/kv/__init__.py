"""The KV-memory: which pairs stay as they are."""

from hqlt.memory.kv.attention import KVMemory
from hqlt.memory.kv.kept import Candidates, Kept
from hqlt.memory.kv.retention import Entries, Random, Recent, Retention, Surprise, ValueNorm

__all__ = ["Candidates", "Entries", "KVMemory", "Kept", "Random", "Recent", "Retention", "Surprise", "ValueNorm"]
