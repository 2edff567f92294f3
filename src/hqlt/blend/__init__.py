"""Blends: when a token reaches each memory."""

from hqlt.blend.alone import FWOnly, KVOnly
from hqlt.blend.blend import Blend, Memories, Reads, Timeline, Tokens
from hqlt.blend.delayed_chunk import DelayedChunk
from hqlt.blend.delayed_streaming import DelayedStreaming
from hqlt.blend.synchronous import Synchronous

__all__ = [
    "Blend",
    "DelayedChunk",
    "DelayedStreaming",
    "FWOnly",
    "KVOnly",
    "Memories",
    "Reads",
    "Synchronous",
    "Timeline",
    "Tokens",
]
