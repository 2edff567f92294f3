"""Reports: tables, plots, HTML pages, the contribution of each memory, and the KV entries that are kept."""

from hqlt.report.kept import KeptPairs, kept_pairs
from hqlt.report.shares import Shares, memory_shares

__all__ = ["KeptPairs", "Shares", "kept_pairs", "memory_shares"]
