"""Checkpoints with torch's DCP: one safetensors file per rank, written asynchronously, for any number of ranks."""

from __future__ import annotations

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

from hqlt.disk import unfinished_path
from hqlt.train.checkpoints import Checkpoints
from hqlt.train.language.ranks import Ranks

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended: a single process
warnings.filterwarnings(
    "ignore", "TypedStorage is deprecated", module="torch.distributed.checkpoint"
)  # raised inside torch 2.9


class DistributedCheckpoints(Checkpoints):
    """Checkpoints that all processes of a run write together, in the background: `save` only copies the tensors."""

    def __init__(self, folder: Path, max_to_keep: int, ranks: Ranks) -> None:
        super().__init__(folder, max_to_keep)
        self.ranks = ranks
        self._writing: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        self.wait()
        place = self.place(step)
        if self.ranks.first:
            self.begin(place, metadata)
        self.ranks.wait()
        writer = HuggingFaceStorageWriter(str(unfinished_path(place)), save_distributed=True)
        future = async_save(
            dict(tensors), storage_writer=writer, process_group=self.ranks.background, no_dist=self.ranks.mesh is None
        )
        assert isinstance(future, Future)
        self._writing = place, future

    def wait(self) -> None:
        if self._writing is None:
            return
        (place, future), self._writing = self._writing, None
        try:
            future.result()
            if self.ranks.first:
                self.finish(place)
        except (Exception, CheckpointException) as error:
            raise self.not_written(place, _innermost(error)) from error
        self.ranks.wait()

    def poll(self) -> None:
        """Finish the checkpoint if all processes have written it. All processes must call this together."""
        if self._writing is not None and self.ranks.sum([float(self._writing[1].done())])[0] == self.ranks.count:
            self.wait()

    def load_into(self, place: Path, tensors: Mapping[str, Tensor]) -> None:
        """Load the checkpoint into these tensors in place; they may be sharded over any number of ranks.

        Raises ValueError if the checkpoint is damaged or has other tensors.
        """
        reader = HuggingFaceStorageReader(str(place))
        try:
            load(dict(tensors), storage_reader=reader, no_dist=self.ranks.mesh is None)
        except (Exception, CheckpointException) as error:
            raise self.not_read(place, _innermost(error)) from error


def _innermost(error: BaseException) -> BaseException:
    """The original error of a rank, which DCP wraps in its own."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error
