"""Mixers: how the reads of the two memories are combined."""

from hqlt.mixer.add import AddMixer
from hqlt.mixer.mixer import Alone, Gated, Mixer
from hqlt.mixer.plain_sum import SumMixer
from hqlt.mixer.scalar import ScalarMixer
from hqlt.mixer.vector import VectorMixer

__all__ = ["AddMixer", "Alone", "Gated", "Mixer", "ScalarMixer", "SumMixer", "VectorMixer"]
