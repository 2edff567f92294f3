"""The two memories, and the state that carries them from call to call."""

from hqlt.memory.fw import DeltaMemory, FastWeights, FWMemory, LinearMemory
from hqlt.memory.kv import KVMemory
from hqlt.memory.state import MemoryState
from hqlt.memory.storage import fingerprint, load_state, save_state

__all__ = [
    "DeltaMemory",
    "FWMemory",
    "FastWeights",
    "KVMemory",
    "LinearMemory",
    "MemoryState",
    "fingerprint",
    "load_state",
    "save_state",
]
