"""An environment of your own and an agent with a memory: a number is shown once and must be named five steps later."""

import gymnasium

from hqlt.agent import PPO, PPOSettings, build_memory, evaluate


class Recall(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Discrete(4), gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.time = int(self.np_random.integers(3)), 0
        return self.number, {}

    def step(self, action):
        self.time += 1
        right = self.time == 5 and action == self.number
        return 3, float(right), self.time == 5, False, {"success": bool(right)}


envs = gymnasium.vector.SyncVectorEnv([Recall] * 16)
memory = build_memory("synchronous", hidden_size=32, num_layers=1, window=3)
agent = PPO(envs, memory, PPOSettings(learning_rate=1e-3, rollout_steps=40, num_minibatches=2))
for progress in agent.train_in(envs, steps=20_000):
    print(f"{progress.steps:6} steps   success {progress.played.success:.2f}")
print(evaluate(agent, envs, episodes=20).success)
