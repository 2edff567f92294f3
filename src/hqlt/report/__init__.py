"""Results for people: tables, plots, one HTML page, what each memory contributed, and what it kept."""

from hqlt.report.kept import KeptPairs, kept_pairs
from hqlt.report.shares import Shares, memory_shares

__all__ = ["KeptPairs", "Shares", "kept_pairs", "memory_shares"]
