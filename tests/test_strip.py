"""The pictures in the documentation are those that its commands draw."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "strip.py"
film, strip = (runpy.run_path(str(SCRIPT))[name] for name in ("film", "strip"))
COMMANDS = re.findall(r"^    python docs/strip.py (.*)$", (ROOT / "docs" / "worlds.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_pictures_of_the_documentation(arguments, tmp_path, monkeypatch):
    from matplotlib.image import imread

    env, moves, picture, *options = shlex.split(arguments)
    monkeypatch.setattr(sys, "argv", ["strip", env, moves, str(tmp_path / "picture.png"), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert np.array_equal(imread(tmp_path / "picture.png"), imread(ROOT / picture))


def test_a_strip_of_frames():
    frames = film("TMazePassive", "rru", seed=0, corridor=2)
    assert len(frames) == 4
    height, width, _ = frames[0].shape
    assert strip(frames, gap=5).shape == (height, 4 * width + 15, 3)
    assert np.array_equal(strip(frames[:1]), frames[0])
    with pytest.raises(ValueError, match="moves: expected letters of udlr, got 'rx'"):
        film("TMazePassive", "rx")
