"""Write rules: how a pair is written."""

from hqlt.memory.fw.delta import DeltaGates, DeltaMemory, DeltaState
from hqlt.memory.fw.linear import LinearMemory
from hqlt.memory.fw.rule import FWMemory, Write, gate_projection

__all__ = ["DeltaGates", "DeltaMemory", "DeltaState", "FWMemory", "LinearMemory", "Write", "gate_projection"]
