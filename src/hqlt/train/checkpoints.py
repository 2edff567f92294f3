"""Checkpoints as safetensors and JSON: whole or not there, the newest few kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hqlt.disk import UNFINISHED, sync, sync_folder, unfinished_path
from hqlt.errors import first_line

TENSORS, METADATA = "tensors.safetensors", "trainer.json"


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-00000200/` with tensors and trainer.json.

    One is written beside its place and has its name only once all of it is on disk; until then the last one stands.
    """

    def __init__(self, folder: Path, max_to_keep: int) -> None:
        self.folder, self.max_to_keep = folder, max_to_keep

    def whole(self) -> list[Path]:
        """The whole ones, from the oldest to the newest."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Path | None:
        """None: there is none."""
        return next(reversed(self.whole()), None)

    def save(self, step: int, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """What is told must be JSON.

        Raises OSError where it could not be written: the checkpoints from before are untouched.
        """
        place = self.place(step)
        try:
            self.begin(place, told)
            save_file(dict(tensors), unfinished_path(place) / TENSORS)
            self.finish(place)
        except (OSError, SafetensorError) as error:
            raise self.not_written(place, error) from error

    def wait(self) -> None:
        """Until what was begun is on disk under its name."""

    def poll(self) -> None:
        """Give a checkpoint its name, if all of it is written."""

    def metadata(self, place: Path) -> dict[str, Any]:
        """What `save` was told. Raises ValueError where it cannot be read."""
        try:
            told: dict[str, Any] = json.loads((place / METADATA).read_bytes())
            int(told["step"]), dict(told["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = error if isinstance(error, OSError | ValueError) else f"no step and run in it ({error})"
            raise ValueError(
                f"{place}: expected a checkpoint with a {METADATA}: {why}; {recovery_hint(place)}"
            ) from error
        return told

    def load(self, place: Path) -> dict[str, Tensor]:
        """The tensors. Raises ValueError where they cannot be read."""
        try:
            return load_file(place / TENSORS)
        except (OSError, SafetensorError) as error:
            raise self.not_read(place, error) from error

    # In parts, for those who write beside training.

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(self, place: Path, told: Mapping[str, Any]) -> None:
        """Make the folder that it is written in, and remove those of writes that were killed."""
        for killed in self.folder.glob(f"step-*{UNFINISHED}"):
            shutil.rmtree(killed)
        unfinished_path(place).mkdir(parents=True)
        (unfinished_path(place) / METADATA).write_text(json.dumps(told, indent=1))

    def finish(self, place: Path) -> None:
        """Give it its name, and let go of all but the newest."""
        unfinished = unfinished_path(place)
        for path in unfinished.iterdir():
            sync(path)
        sync_folder(unfinished)
        if place.exists():  # the same step, saved again
            shutil.rmtree(place)
        os.replace(unfinished, place)
        sync_folder(self.folder)
        for old in self.whole()[: -self.max_to_keep]:
            shutil.rmtree(old)

    def not_written(self, place: Path, error: BaseException) -> OSError:
        shutil.rmtree(unfinished_path(place), ignore_errors=True)
        newest = self.newest()
        stands = f"{newest} is whole" if newest else "there is none from before"
        return OSError(f"{place}: could not be written ({first_line(error)}); {stands}")

    def not_read(self, place: Path, error: BaseException) -> ValueError:
        return ValueError(f"{place}: could not be read ({first_line(error)}); {recovery_hint(place)}")


def recovery_hint(place: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    return f"remove {place.name} to go on from the checkpoint before it, or give another folder"
