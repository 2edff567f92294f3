"""Checkpoints of agents, as safetensors and JSON: whole or not there, the newest few kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from hqlt.disk import beside
from hqlt.train.agent.settings import AgentSettings
from hqlt.train.agent.trainer import AgentTrainer
from hqlt.train.steps import advice, begin_step, finish_step, whole_steps

FREE = ("steps", "keep")
"""Settings that may change when a run goes on."""


class AgentCheckpoints:
    """The folder `checkpoints/` of a run: `step-000020000/` with agent.safetensors, replay.safetensors (SAC's) and
    trainer.json.

    One is written beside its place and then moved there, so a kill leaves the last good one standing.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None: there is none."""
        return next(reversed(whole_steps(self.folder)), None)

    def save(self, trainer: AgentTrainer, **told: Any) -> None:
        """told: anything else, as JSON has it.

        Raises OSError where it could not be written: the checkpoints from before are untouched.
        """
        place = self.folder / f"step-{trainer.steps:09d}"
        unfinished = beside(place)
        try:
            begin_step(unfinished)
            save_file(trainer.tensors(), unfinished / "agent.safetensors")
            if (arrays := trainer.arrays()) is not None:
                save_arrays(arrays, unfinished / "replay.safetensors")
            told = {**told, **trainer.told(), "settings": fixed(trainer.settings)}
            (unfinished / "trainer.json").write_text(json.dumps(told, indent=1))
            finish_step(unfinished, place, self.keep)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"{place}: could not be written ({error}); checkpoints from before are whole") from error

    def resume(self, trainer: AgentTrainer) -> dict[str, Any] | None:
        """Fill the trainer from the newest checkpoint → what `save` was told; None: there is none.

        Raises ValueError where it is damaged, or belongs to another run.
        """
        place = self.newest()
        if place is None:
            return None
        try:
            told = json.loads((place / "trainer.json").read_text())
            theirs = dict(told["settings"])
            tensors = load_file(place / "agent.safetensors")
            replay = place / "replay.safetensors"
            arrays = load_arrays(replay) if replay.exists() else None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{place}: expected a whole checkpoint: {error}; {advice(place)}") from error
        ours = fixed(trainer.settings)
        for name in ours:
            if ours[name] != theirs.get(name):
                raise ValueError(
                    f"{name}: expected {theirs.get(name)!r}, as {place} was trained with, got {ours[name]!r}; "
                    f"give another folder for another run"
                )
        try:
            trainer.restore(tensors, arrays, told)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{place}: expected a checkpoint of this agent: {error}; {advice(place)}") from error
        return dict(told)


def fixed(settings: AgentSettings) -> dict[str, Any]:
    """What must stay as it is, as JSON gives it back. Of the two algorithms' settings, those that are used."""
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    unused = {"ppo": "sac", "sac": "ppo"}[settings.algorithm]
    return {name: value for name, value in plain.items() if name not in (*FREE, unused)}
