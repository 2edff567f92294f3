"""Checkpoints as safetensors and JSON, written atomically. Only the newest ones are kept."""

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

    A checkpoint is written under a temporary name and renamed once it is completely on disk.
    """

    def __init__(self, folder: Path, max_to_keep: int) -> None:
        self.folder, self.max_to_keep = folder, max_to_keep

    def finished(self) -> list[Path]:
        """All finished checkpoints, from the oldest to the newest."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Path | None:
        """The newest finished checkpoint; None: there is none."""
        return next(reversed(self.finished()), None)

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint; metadata is saved as JSON.

        Raises OSError if it cannot be written; earlier checkpoints are not affected.
        """
        place = self.place(step)
        try:
            self.begin(place, metadata)
            save_file(dict(tensors), unfinished_path(place) / TENSORS)
            self.finish(place)
        except (OSError, SafetensorError) as error:
            raise self.not_written(place, error) from error

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is finished."""

    def poll(self) -> None:
        """Finish the checkpoint that is being written if all its data is on disk."""

    def metadata(self, place: Path) -> dict[str, Any]:
        """The metadata of a checkpoint. Raises ValueError if it cannot be read."""
        try:
            metadata: dict[str, Any] = json.loads((place / METADATA).read_bytes())
            int(metadata["step"]), dict(metadata["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = error if isinstance(error, OSError | ValueError) else f"no step and run in it ({error})"
            raise ValueError(
                f"{place}: expected a checkpoint with a {METADATA}: {why}; {recovery_hint(place)}"
            ) from error
        return metadata

    def load(self, place: Path) -> dict[str, Tensor]:
        """The tensors of a checkpoint. Raises ValueError if they cannot be read."""
        try:
            return load_file(place / TENSORS)
        except (OSError, SafetensorError) as error:
            raise self.not_read(place, error) from error

    # The steps of `save`, for subclasses that write in the background.

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(self, place: Path, metadata: Mapping[str, Any]) -> None:
        """Create the temporary folder with the metadata, and remove temporary folders of killed processes."""
        for killed in self.folder.glob(f"step-*{UNFINISHED}"):
            shutil.rmtree(killed)
        unfinished_path(place).mkdir(parents=True)
        (unfinished_path(place) / METADATA).write_text(json.dumps(metadata, indent=1))

    def finish(self, place: Path) -> None:
        """Give the checkpoint its final name, and remove all but the newest checkpoints."""
        unfinished = unfinished_path(place)
        for path in unfinished.iterdir():
            sync(path)
        sync_folder(unfinished)
        if place.exists():  # a checkpoint of the same step
            shutil.rmtree(place)
        os.replace(unfinished, place)
        sync_folder(self.folder)
        for old in self.finished()[: -self.max_to_keep]:
            shutil.rmtree(old)

    def not_written(self, place: Path, error: BaseException) -> OSError:
        shutil.rmtree(unfinished_path(place), ignore_errors=True)
        newest = self.newest()
        previous = f"{newest} is intact" if newest else "there is no earlier checkpoint"
        return OSError(f"{place}: could not be written ({first_line(error)}); {previous}")

    def not_read(self, place: Path, error: BaseException) -> ValueError:
        return ValueError(f"{place}: could not be read ({first_line(error)}); {recovery_hint(place)}")


def recovery_hint(place: Path) -> str:
    """What the user can do about a checkpoint that cannot be read."""
    return f"remove {place.name} to resume from the checkpoint before it, or give another folder"
