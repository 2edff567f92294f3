"""What is done with states beyond one call: kept in files, and found again by the tokens that they have read."""

from hqlt.state.prefixes import Found, PrefixStore, Statistics
from hqlt.state.storage import fingerprint, load_notes, load_state, load_unread, save_state

__all__ = ["Found", "PrefixStore", "Statistics", "fingerprint", "load_notes", "load_state", "load_unread", "save_state"]
