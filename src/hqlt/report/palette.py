"""The colours of all figures, which colour-blind readers tell apart: those of Okabe and Ito (2008) but for yellow,
too pale for a line on white. A model has the same colour in all figures; one of a single memory has that memory's."""

from __future__ import annotations

SKY, BLACK, PURPLE, GREEN, ORANGE, BLUE, VERMILLION = PALETTE = (
    "#56b4e9", "#000000", "#cc79a7", "#009e73", "#e69f00", "#0072b2", "#d55e00",
)  # fmt: skip
"""In the order in which models take them that have none of their own."""
GREY = "#808080"
"""Of what all else is compared with, and of notes."""
KV, FW = ORANGE, BLUE
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
"""What matplotlib draws text, axes and grids in by default; on a page they take the reader's colours."""
