"""Agents with a memory, and partially observable worlds to try them in.

Where gymnasium is installed, importing this registers the worlds with it: `gymnasium.make("hqlt/VisualMatch-v0")`.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("gymnasium") is not None:
    from hqlt.agent.worlds import register_with_gymnasium

    register_with_gymnasium()
