"""One door to every world: ours by name, anyone's by its id in gymnasium."""

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
"""How ids begin, and the package (and extra of hqlt) that registers them when it is imported."""


def make_worlds(name: str, n: int, seed: int, **options: Any) -> VectorEnv[Any, Any, Any]:
    """n copies of a world, seeded: the first reset() needs no seed, and copy i's episodes follow from seed + i.

    name: a registered world's, with or without hqlt/ and -v0; or any id that gymnasium knows: popgym's and minigrid's,
        whose packages are imported for it, or one that you registered there. Those are stepped one by one, in a
        SyncVectorEnv. MODULE:NAME imports the module first, in either case.
    options: the world's arguments; of ids of gymnasium's also those of `gymnasium.make`, such as max_episode_steps.

    MiniGrid's dictionaries become their images, uint8 [3, 7, 7] of kinds, colours and states, channels first; direction
    and mission are left out.

    Raises ValueError for an unknown name or option, with the nearest one, and ImportError where a package is missing.
    """
    worlds = _worlds(name, n, options)
    worlds.reset(seed=seed)
    worlds.action_space.seed(seed)
    return worlds


def _worlds(name: str, n: int, options: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    module, _, id_there = name.rpartition(":")  # as in gymnasium.make: a module that registers it
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name}: expected a module that can be imported before the colon: {error}") from error
    own = id_there.removeprefix("hqlt/").removesuffix("-v0")
    if own not in names("world") and id_there not in gymnasium.registry:
        load_plugins()
    if own in names("world"):
        world = find("world", own)
        check_options(options, world)
        return world(num_envs=n, **options)
    package = next((package for start, package in EXTRAS.items() if name.startswith(start)), None)
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"{name}: expected the package {package}, which did not import ({error}); {how_to_install(package)}",
                name=package,
            ) from error
    if id_there not in gymnasium.registry:
        near = difflib.get_close_matches(id_there, [*names("world"), *gymnasium.registry], n=1, cutoff=0.5)
        raise ValueError(
            f"expected a world ({', '.join(names('world'))}) or an id that gymnasium knows, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    creator = gymnasium.spec(id_there).entry_point
    check_options(options, load_env_creator(creator) if isinstance(creator, str) else creator, gymnasium.make)
    image = partial(_image_of_minigrid, name, options)
    return SyncVectorEnv([image if package == "minigrid" else partial(gymnasium.make, name, **options)] * n)


def check_options(options: dict[str, Any], world: Any, *others: Any) -> None:
    """Raises ValueError for an option that neither the world's constructor nor the other functions take."""
    takers = [inspect.signature(taker).parameters for taker in (world, *others)]
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in takers[0].values()):
        return
    known = [name for taker in takers for name in taker if name not in ("num_envs", "id", "kwargs")]
    for name in options:
        check_choice("options", name, known)


def _image_of_minigrid(name: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Of the dictionary that is observed, its image, channels first."""
    environment = gymnasium.make(name, **options)
    space = environment.observation_space["image"]  # type: ignore[index]
    return gymnasium.wrappers.TransformObservation(
        environment,
        lambda seen: np.moveaxis(seen["image"], -1, 0),
        gymnasium.spaces.Box(0, 255, (space.shape[-1], *space.shape[:-1]), np.uint8),
    )


def register_with_gymnasium() -> None:
    """Make gymnasium.make and make_vec know our worlds: NAME is hqlt/NAME-v0 there."""
    for name in names("world"):
        if f"hqlt/{name}-v0" not in gymnasium.registry:
            world = find("world", name)
            one: Any = type(f"{name}Env", (SingleEnv,), {"World": world})
            gymnasium.register(f"hqlt/{name}-v0", one, vector_entry_point=world)
