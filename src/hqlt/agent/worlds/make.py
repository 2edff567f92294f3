"""Build parallel environments: the built-in and registered ones by name, others by their gymnasium id."""

from __future__ import annotations

import difflib
import importlib
import inspect
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import SyncVectorEnv, VectorEnv

from hqlt.agent.worlds.world import SingleEnv
from hqlt.errors import how_to_install
from hqlt.registry import check_choice, find, load_plugins, names

EXTRAS = {"popgym-": "popgym", "MiniGrid-": "minigrid", "BabyAI-": "minigrid"}
"""Prefix of ids: the package, also an extra of hqlt, that registers them when imported."""


def make_worlds(name: str, n: int, seed: int, **options: Any) -> VectorEnv[Any, Any, Any]:
    """Build n parallel environments, already seeded: environment i with seed + i, so the first `reset()` needs no seed.

    Built-in environments run in parallel in NumPy; others run one after another in gymnasium's SyncVectorEnv. Of
    MiniGrid's observations only the image is kept, uint8 [3, 7, 7] with channels first.

    Args:
        name: "TMazePassive", "TMazeActive", "KeyToDoor", "VisualMatch", the name of a registered environment, or any
            gymnasium id, popgym's and minigrid's included. MODULE:NAME imports the module first.
        n: number of environments.
        seed: of the first environment.
        options: arguments of the environment; with a gymnasium id also those of `gymnasium.make`, such as
            max_episode_steps.

    Returns:
        The environments as a gymnasium.vector.VectorEnv.

    Raises:
        ValueError: when the name or an option is unknown (the message suggests the nearest one).
        ImportError: when a package is missing.

    Example:
        >>> from hqlt.agent import make_worlds
        >>> envs = make_worlds("VisualMatch", 1024, seed=0, distractor=100)
        >>> observations, _ = envs.reset()
        >>> observations.shape
        (1024, 3, 5, 5)
    """
    envs = _unseeded(name, n, options)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    return envs


def _unseeded(name: str, n: int, options: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    module, _, gymnasium_id = name.rpartition(":")  # MODULE:ID, as in gymnasium.make
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name}: expected an importable module before the colon: {error}") from error
    own = gymnasium_id.removeprefix("hqlt/").removesuffix("-v0")
    if own not in names("world") and gymnasium_id not in gymnasium.registry:
        load_plugins()
    if own in names("world"):
        env = find("world", own)
        check_options(options, env)
        return env(num_envs=n, **options)
    package = next((package for start, package in EXTRAS.items() if name.startswith(start)), None)
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"{name}: expected the package {package}, which did not import ({error}); {how_to_install(package)}",
                name=package,
            ) from error
    if gymnasium_id not in gymnasium.registry:
        near = difflib.get_close_matches(gymnasium_id, [*names("world"), *gymnasium.registry], n=1, cutoff=0.5)
        raise ValueError(
            f"expected an environment ({', '.join(names('world'))}) or a gymnasium id, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    creator = gymnasium.spec(gymnasium_id).entry_point
    check_options(options, load_env_creator(creator) if isinstance(creator, str) else creator, gymnasium.make)
    image = partial(_image_of_minigrid, name, options)
    return SyncVectorEnv([image if package == "minigrid" else partial(gymnasium.make, name, **options)] * n)


def check_options(options: dict[str, Any], env: Any, *others: Any) -> None:
    """Raise ValueError for an option that neither the environment nor one of the other functions takes."""
    takers = [inspect.signature(taker).parameters for taker in (env, *others)]
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in takers[0].values()):
        return
    known = [name for taker in takers for name in taker if name not in ("num_envs", "id", "kwargs")]
    for name in options:
        check_choice("options", name, known)


def _image_of_minigrid(name: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Reduce MiniGrid's observations to their image, channels first."""
    environment = gymnasium.make(name, **options)
    space = environment.observation_space["image"]  # type: ignore[index]
    return gymnasium.wrappers.TransformObservation(
        environment,
        lambda observation: np.moveaxis(observation["image"], -1, 0),
        gymnasium.spaces.Box(0, 255, (space.shape[-1], *space.shape[:-1]), np.uint8),
    )


def register_with_gymnasium() -> None:
    """Register every environment NAME with gymnasium, as hqlt/NAME-v0."""
    for name in names("world"):
        if f"hqlt/{name}-v0" not in gymnasium.registry:
            env = find("world", name)
            single: Any = type(f"{name}Env", (SingleEnv,), {"World": env})
            gymnasium.register(f"hqlt/{name}-v0", single, vector_entry_point=env)
