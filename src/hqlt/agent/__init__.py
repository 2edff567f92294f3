"""Agents with a memory, for partially observable environments with the gymnasium API.

envs = make_worlds("TMazePassive", 16, seed=0)
memory = build_memory("synchronous", hidden_size=64, num_layers=1, window=16)
agent = PPO(envs, memory)
for progress in agent.train_in(envs, steps=100_000):
    print(progress.steps, progress.played.success)
evaluate(agent, envs, episodes=20).success
"""

from importlib.util import find_spec

from hqlt.errors import how_to_install

if find_spec("gymnasium") is None:
    raise ModuleNotFoundError(
        f"hqlt.agent: expected the package gymnasium, found none; {how_to_install('rl')}", name="gymnasium"
    )

from hqlt.agent.agent import Agent, Collected, Progress
from hqlt.agent.collect import Evaluation, evaluate, play
from hqlt.agent.core import Core, Inputs
from hqlt.agent.encoder import Encoder, build_encoder
from hqlt.agent.episode import Batch, Episode, Outcome
from hqlt.agent.memory_model import LSTM, HybridModel, MemoryModel, NoMemory, build_memory
from hqlt.agent.ppo import PPO, PPOSettings
from hqlt.agent.replay import Replay
from hqlt.agent.sac import SAC, SACSettings
from hqlt.agent.worlds import make_worlds, register_with_gymnasium

__all__ = [
    "LSTM",
    "PPO",
    "SAC",
    "Agent",
    "Batch",
    "Collected",
    "Core",
    "Encoder",
    "Episode",
    "Evaluation",
    "HybridModel",
    "Inputs",
    "MemoryModel",
    "NoMemory",
    "Outcome",
    "PPOSettings",
    "Progress",
    "Replay",
    "SACSettings",
    "build_encoder",
    "build_memory",
    "evaluate",
    "make_worlds",
    "play",
]

register_with_gymnasium()  # gymnasium.make("hqlt/VisualMatch-v0")
