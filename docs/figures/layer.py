"""Draws a layer and its three blends: python docs/figures/layer.py FILE.svg

Colors follow the light or dark mode of the browser and are color-blind safe (Okabe and Ito 2008).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

WINDOW, TOKENS, CELL = 4, 14, 28
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #24292f } .small { font-size: 12px } .bold { font-weight: 600 }
  .middle { text-anchor: middle } .line { stroke: #57606a; fill: none; stroke-width: 1.5 } .head { fill: #57606a }
  .box { fill: #f6f8fa; stroke: #57606a } .cell { fill: none; stroke: #8c959f }
  .kv { fill: #e69f00 } .fw { fill: #0072b2 }
   @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .line { stroke: #9198a1 } .head { fill: #9198a1 } .box { fill: #161b22; stroke: #9198a1 }
    .cell { stroke: #6e7681 } .fw { fill: #56b4e9 }
  }
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{content}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" class="line" marker-end="url(#head)"/>'


def layer() -> Iterator[str]:
    """x → q, k, v → two memories → mixer → y."""
    yield text(20, 28, "One layer, two memories", "bold")
    yield from (text(30, 165, "x"), arrow((42, 160), (70, 160)))
    yield from (box(72, 136, 76, 48), text(110, 165, "q, k, v", "middle"))
    for y, kind, name, what in (
        (66, "kv", "KV-memory", "the latest KV pairs, exact"),
        (196, "fw", "FW-memory", "one matrix, no window"),
    ):
        middle = y + 36
        yield arrow((148, 160), (168, 160), (168, middle), (192, middle))
        yield from (box(194, y, 190, 72), box(194, y, 10, 72, kind))
        yield from (text(294, y + 30, name, "middle bold"), text(294, y + 52, what, "middle small"))
        yield arrow((384, middle), (404, middle), (404, 160), (424, 160))
    yield from (
        box(426, 136, 66, 48),
        text(459, 165, "mixer", "middle"),
        arrow((492, 160), (520, 160)),
        text(526, 165, "y"),
    )


def in_kv(blend: str, token: int) -> bool:
    """Whether the KV-memory holds this token when the last token is read."""
    last = TOKENS - 1
    return token >= last // WINDOW * WINDOW if blend == "Delayed-Chunk" else token > last - WINDOW


def blends() -> Iterator[str]:
    """One row per blend: which memory holds each token when the last one is read."""
    left = 166
    yield text(20, 318, "Which memory holds each token when token t is read", "bold")
    yield text(left + CELL * (TOKENS - 0.5), 320, "t", "middle")
    for row, (blend, both) in enumerate(
        (("Synchronous", True), ("Delayed-Streaming", False), ("Delayed-Chunk", False))
    ):
        y = 330 + row * (CELL + 16)
        yield text(20, y + CELL / 2 + 5, blend)
        for token in range(TOKENS):
            x, kv = left + token * CELL, in_kv(blend, token)
            fw = both or not kv
            height = CELL / (kv + fw)
            if kv:
                yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{height}" class="kv"/>'
            if fw:
                yield f'<rect x="{x}" y="{y + CELL - height}" width="{CELL}" height="{height}" class="fw"/>'
            yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" class="cell"/>'
            if blend == "Delayed-Chunk" and token % WINDOW == 0:
                yield f'<path d="M{x},{y - 4} v{CELL + 8}" class="line"/>'
    y = 330 + 3 * (CELL + 16) + 6
    yield from (box(left, y, 14, 14, "kv"), text(left + 20, y + 12, f"in the KV-memory (window {WINDOW})", "small"))
    yield from (box(left + 220, y, 14, 14, "fw"), text(left + 240, y + 12, "in the FW-memory", "small"))


HEAD = """<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">
<path d="M0,0 L8,4 L0,8 z" class="head"/></marker>"""


def svg() -> str:
    parts = "\n".join([*layer(), *blends()])
    title = (
        "<title>A layer with a KV-memory and an FW-memory, and which of them holds each token in three blends</title>"
    )
    about = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 496" width="580" height="496" role="img"'
    return f"<svg {about}>{title}<style>{STYLE}</style><defs>{HEAD}</defs>\n{parts}\n</svg>\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(), encoding="utf-8")
