"""Checkpoints by torch's DCP, as safetensors and JSON: whole or not there, the newest few kept, for any ranks."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hqlt.disk import beside
from hqlt.errors import first_line
from hqlt.train.language.ranks import Ranks
from hqlt.train.steps import advice, begin_step, finish_step, whole_steps

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant

TOLD = "trainer.json"


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-00000200/` with tensors (one safetensors file a rank) and trainer.json.

    Writing goes on beside training. A checkpoint has its name only once all of it is on disk; until then the last one
    stands.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self._writing: tuple[Path, Future[Any]] | None = None

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None: there is none."""
        return next(reversed(whole_steps(self.folder)), None)

    def save(self, step: int, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Copy the tensors, and begin to write them. What is told must be JSON."""
        self.wait()
        place = self.folder / f"step-{step:08d}"
        unfinished = beside(place)
        if self.ranks.first:
            begin_step(unfinished)
            (unfinished / TOLD).write_text(json.dumps({"step": step, **told}, indent=1))
        self.ranks.wait()
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        future = async_save(
            dict(tensors), storage_writer=writer, process_group=self.ranks.beside, no_dist=self.ranks.mesh is None
        )
        assert isinstance(future, Future)
        self._writing = place, future

    def wait(self) -> None:
        """Until what was begun is on disk under its name.

        Raises OSError where it could not be written: the checkpoints from before are untouched.
        """
        if self._writing is None:
            return
        (place, future), self._writing = self._writing, None
        unfinished = beside(place)
        try:
            future.result()
            if self.ranks.first:
                finish_step(unfinished, place, self.keep)
        except (Exception, CheckpointException) as error:
            if self.ranks.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            newest = self.newest()
            stands = f"{newest} is whole" if newest else "there is none from before"
            raise OSError(f"{place}: could not be written ({_innermost(error)}); {stands}") from error
        self.ranks.wait()

    def poll(self) -> None:
        """Give a checkpoint its name if all processes have written it. To be called by all of them alike."""
        if self._writing is not None and self.ranks.sum([float(self._writing[1].done())])[0] == self.ranks.count:
            self.wait()


def read_told(place: Path) -> dict[str, Any]:
    """What `save` was told.

    Raises ValueError where it cannot be read.
    """
    try:
        told: dict[str, Any] = json.loads((place / TOLD).read_bytes())
        int(told["step"]), int(told["skipped"]), dict(told["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error if isinstance(error, OSError | ValueError) else f"no step, skipped and run in it ({error})"
        raise ValueError(f"{place}: expected a checkpoint with a {TOLD}: {why}; {advice(place)}") from error
    return told


def load_into(place: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors, whole or sharded over any number of ranks, in place.

    Raises ValueError where the checkpoint is damaged, or holds others.
    """
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(place)), no_dist=ranks.mesh is None)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{place}: could not be read ({_innermost(error)}); {advice(place)}") from error


def _innermost(error: BaseException) -> str:
    """DCP wraps what went wrong on each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)
