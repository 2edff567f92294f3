"""Write rules: how a key and value are written to fast weights."""

from hqlt.memory.fw.comba import CombaMemory
from hqlt.memory.fw.delta import DeltaGates, DeltaMemory
from hqlt.memory.fw.delta_product import DeltaProductMemory
from hqlt.memory.fw.features import LearnedMap
from hqlt.memory.fw.gated_delta import GatedDeltaMemory
from hqlt.memory.fw.gated_delta_product import GatedDeltaProductMemory
from hqlt.memory.fw.gla import GLAMemory
from hqlt.memory.fw.hgrn2 import HGRN2Memory
from hqlt.memory.fw.kda import KDAMemory
from hqlt.memory.fw.lightning import LightningMemory
from hqlt.memory.fw.linear import LinearMemory
from hqlt.memory.fw.mamba2 import Mamba2Memory
from hqlt.memory.fw.mlstm import MLSTMMemory
from hqlt.memory.fw.recurrence import Erasing, MatrixState, Recurrence, Terms
from hqlt.memory.fw.retnet import RetNetMemory
from hqlt.memory.fw.rule import Errors, FWMemory, LowRank, Write, gate_projection, init_parameter
from hqlt.memory.fw.rwkv7 import RWKV7Memory

__all__ = [
    "CombaMemory",
    "DeltaGates",
    "DeltaMemory",
    "DeltaProductMemory",
    "Erasing",
    "Errors",
    "FWMemory",
    "GLAMemory",
    "GatedDeltaMemory",
    "GatedDeltaProductMemory",
    "HGRN2Memory",
    "KDAMemory",
    "LearnedMap",
    "LightningMemory",
    "LinearMemory",
    "LowRank",
    "MLSTMMemory",
    "Mamba2Memory",
    "MatrixState",
    "RWKV7Memory",
    "Recurrence",
    "RetNetMemory",
    "Terms",
    "Write",
    "gate_projection",
    "init_parameter",
]
