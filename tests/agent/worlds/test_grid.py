"""Rules of the grid environments: episodes worked out by hand, and random ones against a plain-Python reference."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hqlt.agent  # noqa: F401  registers the environments
from hqlt.agent.worlds import KeyToDoor, VisualMatch
from hqlt.agent.worlds.grid import COLOURS
from tests.agent.worlds.helpers import ReferenceBoard, board_of, play, position_of

RED, GREEN, BLUE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
TO_SQUARE = {"r": "uullluu", "g": "uuuu", "b": "uurrruu"}
"""Moves from the entrance of the third room to each square, with colors in the order rgb."""


def visual_match(target: str, **options):
    """Start an episode in which this color is shown, with all 22 apples."""
    environment = gymnasium.make(
        "hqlt/VisualMatch-v0", **{"explore": 2, "distractor": 5, "apples": 22, **options}
    ).unwrapped
    environment.reset(seed=0)
    while chr(environment.world._target[0]) != target:
        environment.reset()
    return environment


@pytest.mark.parametrize("target", "rgb")
@pytest.mark.parametrize("chosen", "rgb")
def test_visual_match_by_hand(target, chosen):
    """Enclosed; left, left to an apple, up, left to another, back; then to a square; then 8 steps without effect.

    #a.a.a.a.a#     row 3, not reached here
    #.a.a.a.a.#     the agent goes (5, 5) → (5, 4) → (5, 3)a → (4, 3) → (4, 2)a → (4, 3)
    #a.a.+.a.a#
    """
    to_square = TO_SQUARE[chosen]
    rewards, _, info = play(visual_match(target), "ud" + "llulr" + to_square + "d" * (15 - len(to_square)))
    final = 100 * (chosen == target)
    assert rewards == [0, 0] + [0, 1, 0, 1, 0] + [0] * (len(to_square) - 1) + [final] + [0] * (15 - len(to_square))
    assert info == {"success": chosen == target}


def test_the_first_square_decides():
    """Green first, then the place where red was: nothing is left there."""
    over_to_red = "uuuu" + "lll" + "uuuuuuuu"
    rewards, _, info = play(visual_match("r", wrong_reward=-1.0), "ud" + "uuuuu" + over_to_red)
    assert rewards[7:] == [0, 0, 0, -1] + [0] * 11
    assert not info["success"]
    rewards, _, info = play(visual_match("g", wrong_reward=-1.0), "ud" + "uuuuu" + over_to_red)
    assert rewards[7:] == [0, 0, 0, 100] + [0] * 11
    assert info["success"]


def test_observations_of_visual_match():
    environment = visual_match("g", distractor=1)
    world = environment.world
    image = world._observations()[0]
    assert image.shape == (3, 5, 5) and image.dtype == np.uint8
    assert tuple(image[:, 2, 2]) == COLOURS["+"]
    ring = [tuple(image[:, i, j]) for i in (1, 2, 3) for j in (1, 2, 3) if (i, j) != (2, 2)]
    assert sorted(ring) == sorted([GREEN] + [COLOURS["#"]] * 7)
    _, seen, _ = play(environment, "lr" + "u")
    assert (seen[0] == image).all()
    # the orchard from (5, 5), where row 7 is outside the board; then the third room from its entrance
    legend = {value: symbol for symbol, value in reversed(COLOURS.items())}

    def drawn(image):
        return ["".join(legend[tuple(image[:, i, j])] for j in range(5)).replace(" ", ".") for i in range(5)]

    assert drawn(seen[1]) == ["a.a.a", ".a.a.", "a.+.a", "#####", "....."]
    assert drawn(seen[2]) == [".....", "#...#", "#.+.#", "#####", "....."]


def test_an_episode_of_the_paper_has_780_steps():
    envs = VisualMatch(2)
    envs.reset(seed=0)
    ended = [envs.step(np.zeros(2, int))[2].all() for _ in range(780)]
    assert ended.index(True) == 779
    assert KeyToDoor(1).episode_length == 85


@pytest.mark.parametrize(
    ("respawn", "rewards"),
    [
        (0, [0, 1, 0, 1, 0, 1, 0, 1]),
        (1, [0, 1, 0, 0, 1, 0, 0, 1]),
        (4, [0, 1, 0, 0, 0, 0, 0, 1]),
        (5, [0, 1, 0, 0, 0, 0, 0, 0]),
        (None, [0, 1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_an_apple_respawns(respawn, rewards):
    """Eaten at step t, it returns after step t + respawn + 1 under the agent, which eats it one step later.

    The agent stays on the apple's cell because there is a wall below it.
    """
    environment = visual_match("r", distractor=len(rewards), respawn=respawn)
    assert play(environment, "ud" + "ll" + "d" * 6)[0] == [0, 0, *rewards]


def key_to_door(key: tuple[int, int], start: tuple[int, int], **options):
    """Start an episode with key and agent in these cells."""
    environment = gymnasium.make("hqlt/KeyToDoor-v0", **{"explore": 4, "distractor": 2, **options}).unwrapped
    environment.reset(seed=0)
    while position_of(environment.world) != start or board_of(environment.world)[key[0]][key[1]] != "k":
        environment.reset()
    return environment


@pytest.mark.parametrize(
    ("moves", "rewards", "success"),
    [
        (
            "uuud" + "lr" + "uuuduuuuuu",
            [0] * 7 + [5] + [0] * 8,
            True,
        ),  # out and back into the doorway: the reward is given once
        ("uudd" + "lr" + "uuuduuuuuu", [0] * 16, False),  # without the key the door is a wall
        ("luuu" + "lr" + "uuuduuuuuu", [0] * 16, False),  # a pillar blocks the way
    ],
)
def test_key_to_door_by_hand(moves, rewards, success):
    """
    ##..k..##    row 2; in row 3, columns 4 to 6 are free
    """
    environment = key_to_door((2, 4), (5, 4))
    got, _, info = play(environment, moves)
    assert got == rewards
    assert info == {"success": success}


LEGEND = {value: symbol for symbol, value in reversed(COLOURS.items())} | {COLOURS["+"]: "+", COLOURS["."]: "."}


def drawn(image: np.ndarray) -> list[str]:
    return ["".join(LEGEND[tuple(image[:, i, j].tolist())] for j in range(5)).replace("D", "d") for i in range(5)]


def test_lamp_and_door_are_those_of_the_published_game():
    """As in that game: the lamp is lit for one step, the door stays, and the agent can leave the room."""
    environment = key_to_door((2, 4), (5, 4))
    _, seen, _ = play(environment, "uuud" + "lr" + "uuuduurrrr")
    taken, after = drawn(seen[2]), drawn(seen[3])
    assert taken[0] == "###i#" and "i" not in "".join(after)
    before_the_door, in_it, outside, in_it_again = (drawn(seen[step]) for step in (6, 7, 8, 9))
    assert before_the_door == [".....", "##d##", "#.+.#", "#...#", "#...#"]
    assert in_it == in_it_again == [".....", ".....", "##d##", "#...#", "#...#"]
    assert outside == [".....", ".....", "..+..", "##d##", "#...#"]
    assert position_of(environment.world) == (0, 9)  # around the room, to the edge of the board
    assert drawn(seen[-1])[2] == "..+.."


def test_two_rewards_of_apples():
    envs = KeyToDoor(400, explore=1, distractor=40, apple_reward=(1.0, 10.0))
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    got = np.stack([envs.step(rng.integers(4, size=400))[1] for _ in range(41)])
    most = got.max(axis=0)
    assert set(np.unique(got)) == {0, 1, 10}
    assert all(set(np.unique(column)) <= {0, reward} for column, reward in zip(got.T, most, strict=True))
    assert 0.4 < (most[most > 0] == 10).mean() < 0.6


@pytest.mark.parametrize("kind", [VisualMatch, KeyToDoor])
@given(
    seed=st.integers(0, 9999),
    phases=st.tuples(st.integers(1, 12), st.integers(0, 30), st.integers(1, 20)),
    apples=st.integers(0, 22),
    respawn=st.none() | st.integers(0, 6),
)
def test_random_episodes_equal_the_reference(kind, seed, phases, apples, respawn):
    """Walls, apples, keys, doors and squares: the same rewards and images at every step."""
    n, (explore, distractor, _) = 3, phases
    times = dict(zip(("explore", "distractor", "reward"), phases, strict=True))
    envs = kind(n, **times, apples=apples, apple_reward=2.0, final_reward=7.0, respawn=respawn)
    envs.reset(seed=seed)
    target = [chr(symbol) for symbol in getattr(envs, "_target", np.zeros(n, int))]
    references = [ReferenceBoard(board_of(envs, i), position_of(envs, i), respawn) for i in range(n)]
    rng = np.random.default_rng(seed)
    won = [False] * n
    for time in range(1, sum(phases) + 1):
        # more often up, where the rewards are
        actions = rng.choice(4, size=n, p=[0.4, 0.2, 0.2, 0.2])
        seen, rewards, ended, _, info = envs.step(actions)
        for i, reference in enumerate(references):
            touched = reference.step(int(actions[i]))
            right = touched in ("D", target[i]) and not won[i]
            won[i] |= right
            assert rewards[i] == 2 * (touched == "a") + 7 * right
            if time in (explore, explore + distractor) and time < sum(phases):
                board = board_of(envs, i)
                if time == explore and distractor:
                    assert sum(row.count("a") for row in board) == apples
                reference = references[i] = ReferenceBoard(board, position_of(envs, i), respawn)
            assert position_of(envs, i) == reference.position
            colours = np.array([[COLOURS[symbol] for symbol in row] for row in reference.view()])
            assert (seen[i] == np.moveaxis(colours, -1, 0)).all()
    assert ended.all() and list(info["success"]) == won


def coloured(images: np.ndarray) -> np.ndarray:
    """Count the pixels of pure red, green or blue, [n]."""
    pixels = np.moveaxis(images, 1, -1)
    return sum((pixels == colour).all(axis=-1) for colour in (RED, GREEN, BLUE)).sum(axis=(1, 2))


@given(seed=st.integers(0, 9999), colours=st.sampled_from(["rgb", "bgr", "shuffled"]))
def test_the_colour_is_visible_only_in_the_first_phase(seed, colours):
    envs = VisualMatch(20, explore=4, distractor=30, colours=colours)
    seen, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for time in range(35):
        if time < 4:
            assert (coloured(seen) == 1).all()
        else:
            assert (coloured(seen) == 0).all()  # at time 34 the entrance of the third room is too far from the squares
        seen = envs.step(rng.integers(4, size=20))[0]


def test_orders_of_the_squares():
    def order(envs, i):
        return board_of(envs, i)[1].strip("#.").replace(".", "")

    for colours, expected in (("rgb", {"rgb"}), ("brg", {"brg"})):
        envs = VisualMatch(60, explore=1, distractor=0, colours=colours)
        envs.reset(seed=0)
        envs.step(np.zeros(60, int))
        assert {order(envs, i) for i in range(60)} == expected
    envs = VisualMatch(60, explore=1, distractor=0, colours="shuffled")
    envs.reset(seed=0)
    envs.step(np.zeros(60, int))
    assert len({order(envs, i) for i in range(60)}) == 6


def test_random_choices_are_uniform():
    """Frequencies in 3,000 environments are within 4.5 standard deviations of their expectation."""
    n = 3000

    def uniform(drawn, kinds, share):
        counts = np.array([(drawn == kind).sum() for kind in kinds])
        assert counts.sum() == drawn.size
        assert (abs(counts / n - share) < 4.5 * (share * (1 - share) / n) ** 0.5).all()

    envs = VisualMatch(n, explore=1, distractor=5)
    envs.reset(seed=0)
    uniform(envs._target, b"rgb", 1 / 3)
    where = np.nonzero(np.isin(envs._board, list(b"RGB")))[1]
    uniform(where, np.unique(where), 1 / 8)
    envs.step(np.zeros(n, int))
    trees = np.nonzero(envs._board == ord("a"))[1]
    assert len(np.unique(trees)) == 22
    uniform(trees, np.unique(trees), 10 / 22)
