"""Blends and mixers by name."""

from __future__ import annotations

from hqlt.blend.alone import FWOnly, KVOnly
from hqlt.blend.blend import Blend, Reads, Timeline
from hqlt.blend.delayed_chunk import DelayedChunk
from hqlt.blend.delayed_streaming import DelayedStreaming
from hqlt.blend.fused import FUSED
from hqlt.blend.heads import Parts, Projected
from hqlt.blend.mixer import Mixer, NoMixer, ScalarMixer, SumMixer, VectorMixer
from hqlt.blend.synchronous import Synchronous

BLENDS: dict[str, type[Blend]] = {
    "synchronous": Synchronous,
    "delayed-streaming": DelayedStreaming,
    "delayed-chunk": DelayedChunk,
    "kv-only": KVOnly,
    "fw-only": FWOnly,
}
MIXERS = ("vector", "scalar", "sum")

__all__ = [
    "BLENDS",
    "FUSED",
    "MIXERS",
    "Blend",
    "DelayedChunk",
    "DelayedStreaming",
    "FWOnly",
    "KVOnly",
    "Mixer",
    "NoMixer",
    "Parts",
    "Projected",
    "Reads",
    "ScalarMixer",
    "SumMixer",
    "Synchronous",
    "Timeline",
    "VectorMixer",
]
