"""The colors of all figures, distinguishable for color-blind readers.

They are the palette of Okabe and Ito (2008) without yellow, which is too pale for lines on white. A model has the same
color in all figures; a model with a single memory has the color of that memory.
"""

from __future__ import annotations

SKY, BLACK, PURPLE, GREEN, ORANGE, BLUE, VERMILLION = PALETTE = (
    "#56b4e9", "#000000", "#cc79a7", "#009e73", "#e69f00", "#0072b2", "#d55e00",
)  # fmt: skip
"""Models without a color of their own take these in order."""
GREY = "#808080"
"""Baselines and annotations."""
KV, FW = ORANGE, BLUE
"""The two memories."""
MODELS = {
    "Transformer": KV,
    "DeltaNet": FW,
    "DeltaNet, β ≤ 2": FW,
    "FW alone": FW,
    "Delayed-Streaming": GREEN,
    "Delayed-Chunk": PURPLE,
    "Synchronous": VERMILLION,
    "LSTM": BLACK,
}
INK, GRID = BLACK, "#b0b0b0"
"""Matplotlib's default colors of text and axes, and of grids; on a page they are replaced by the page's colors."""
