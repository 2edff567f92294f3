"""Results for people: tables, plots, one HTML page, and what each memory contributed."""

from hqlt.report.shares import Shares, memory_shares

__all__ = ["Shares", "memory_shares"]
