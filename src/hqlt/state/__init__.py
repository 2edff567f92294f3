"""What is done with states beyond one call: kept in files, made small, and found again by the tokens that were read."""

from hqlt.state.prefixes import Found, PrefixStore, Statistics
from hqlt.state.small import Kept, keep, pack, unpack
from hqlt.state.storage import fingerprint, load_notes, load_state, load_unread, save_state

__all__ = [
    "Found",
    "Kept",
    "PrefixStore",
    "Statistics",
    "fingerprint",
    "keep",
    "load_notes",
    "load_state",
    "load_unread",
    "pack",
    "save_state",
    "unpack",
]
