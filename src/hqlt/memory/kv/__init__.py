"""The KV-memory: which KV entries stay visible, and attention to them."""

from hqlt.memory.kv.attention import KVMemory
from hqlt.memory.kv.kept import Candidates, Kept
from hqlt.memory.kv.retention import Entries, Random, Recent, Retention, Surprise, ValueNorm

__all__ = ["Candidates", "Entries", "KVMemory", "Kept", "Random", "Recent", "Retention", "Surprise", "ValueNorm"]
