"""States between calls: saved to files, quantized, and looked up by the tokens they have read."""

from hqlt.state.prefixes import PrefixMatch, PrefixStore, StoreStatistics
from hqlt.state.quantization import QuantizedMatrix, pack, quantize_matrix, unpack
from hqlt.state.storage import fingerprint, load_notes, load_state, load_unread, save_state

__all__ = [
    "PrefixMatch",
    "PrefixStore",
    "QuantizedMatrix",
    "StoreStatistics",
    "fingerprint",
    "load_notes",
    "load_state",
    "load_unread",
    "pack",
    "quantize_matrix",
    "save_state",
    "unpack",
]
