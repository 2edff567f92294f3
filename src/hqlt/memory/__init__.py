"""The two memories, and the state that carries them from call to call."""

from hqlt.memory.fw import DeltaMemory, Errors, FWMemory, LinearMemory, Write
from hqlt.memory.heads import Heads
from hqlt.memory.kv import Candidates, Entries, Kept, KVMemory, Retention
from hqlt.memory.state import Entry, Held, MemoryState, Tree

__all__ = [
    "Candidates",
    "DeltaMemory",
    "Entries",
    "Entry",
    "Errors",
    "FWMemory",
    "Heads",
    "Held",
    "KVMemory",
    "Kept",
    "LinearMemory",
    "MemoryState",
    "Retention",
    "Tree",
    "Write",
]
