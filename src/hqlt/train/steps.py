"""A folder of checkpoints, `step-00000200/` each: whole under its name, the newest few kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hqlt.disk import UNFINISHED, sync, sync_folder


def whole_steps(folder: Path) -> list[Path]:
    """The whole checkpoints, from the oldest to the newest."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def begin_step(unfinished: Path) -> None:
    """Make the folder that a checkpoint is written in, and remove those of writes that were killed."""
    for killed in unfinished.parent.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(killed)
    unfinished.mkdir(parents=True)


def finish_step(unfinished: Path, place: Path, keep: int) -> None:
    """Give a checkpoint its name once all of it is on disk, and let go of all but the newest."""
    for path in unfinished.iterdir():
        sync(path)
    sync_folder(unfinished)
    if place.exists():  # the same step, saved again
        shutil.rmtree(place)
    os.replace(unfinished, place)
    sync_folder(place.parent)
    for old in whole_steps(place.parent)[:-keep]:
        shutil.rmtree(old)


def advice(place: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    return f"remove {place.name} to go on from the checkpoint before it, or give another folder"
