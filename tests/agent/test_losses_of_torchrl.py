"""Our losses equal torchrl's for the same networks; skipped if torchrl is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hqlt.agent import losses

objectives = pytest.importorskip("torchrl.objectives", reason="torchrl is not installed", exc_type=ImportError)
B, D, A = 40, 6, 3
ALPHA, GAMMA = 0.3, 0.9


@pytest.fixture
def steps():
    """B steps, each in its own row."""
    draw = torch.Generator().manual_seed(1)
    return {
        "observation": torch.randn(B, D, generator=draw),
        "next_observation": torch.randn(B, D, generator=draw),
        "action": torch.randint(A, (B,), generator=draw),
        "reward": torch.randn(B, generator=draw),
        "terminated": torch.rand(B, generator=draw) < 0.3,
    }


def policy_of(linear):
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torch.distributions import Categorical

    return ProbabilisticTensorDictSequential(
        TensorDictModule(linear, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
        ),
    )


def batch_of(steps, **more):
    from tensordict import TensorDict

    ended = steps["terminated"][:, None]
    following = {"observation": steps["next_observation"], "reward": steps["reward"][:, None]}
    following |= {"done": ended, "terminated": ended}
    return TensorDict(
        {"observation": steps["observation"], "action": steps["action"], "next": following, **more}, batch_size=[B]
    )


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_sac_discrete(steps):
    from tensordict.nn import TensorDictModule

    actor = nn.Linear(D, A)
    theirs = objectives.DiscreteSACLoss(
        policy_of(actor),
        TensorDictModule(nn.Linear(D, A), in_keys=["observation"], out_keys=["action_value"]),
        action_space="categorical",
        num_actions=A,
        loss_function="l2",
        alpha_init=ALPHA,
        target_entropy_weight=0.5,
    )
    theirs.make_value_estimator(gamma=GAMMA)
    expected = theirs(batch_of(steps))

    def values(parameters, x):
        return [x @ w.T + b for w, b in zip(parameters["module", "weight"], parameters["module", "bias"], strict=True)]

    x, ahead, mask = steps["observation"][None], steps["next_observation"][None], torch.ones(1, B, dtype=torch.bool)
    q, next_q = values(theirs.qvalue_network_params, x), values(theirs.target_qvalue_network_params, ahead)
    target = losses.soft_target(
        steps["reward"][None], steps["terminated"][None], torch.minimum(*next_q), actor(ahead), ALPHA, GAMMA
    )
    actions = steps["action"][None]
    critic = sum(losses.q_loss(one, actions, target, mask) for one in q)
    torch.testing.assert_close(2 * critic, expected["loss_qvalue"])  # theirs has no factor ½
    torch.testing.assert_close(losses.actor_loss(actor(x), torch.minimum(*q), ALPHA, mask), expected["loss_actor"])
    log_alpha = torch.tensor(ALPHA).log()
    ours = losses.temperature_loss(log_alpha, actor(x), theirs.target_entropy.item(), mask)
    torch.testing.assert_close(
        ours / ALPHA * log_alpha, expected["loss_alpha"]
    )  # theirs has the factor log α instead of α


def test_clipped_policy_loss(steps):
    from tensordict.nn import TensorDictModule

    actor = nn.Linear(D, A)
    theirs = objectives.ClipPPOLoss(
        policy_of(actor),
        TensorDictModule(nn.Linear(D, 1), in_keys=["observation"], out_keys=["state_value"]),
        clip_epsilon=0.2,
        entropy_coeff=1.0,
    )
    before, advantages = torch.randn(B, A).log_softmax(-1), torch.randn(B)
    log_pi_before = losses.gather_actions(before, steps["action"])
    keys = {theirs.tensor_keys.sample_log_prob: log_pi_before, "advantage": advantages[:, None]}
    expected = theirs(batch_of(steps, **keys, value_target=torch.zeros(B, 1)))
    logits, mask = actor(steps["observation"][None]), torch.ones(1, B, dtype=torch.bool)
    log_pi = losses.gather_actions(logits.log_softmax(-1), steps["action"][None])
    ours = losses.clipped_policy_loss(log_pi, log_pi_before[None], advantages[None], 0.2, mask)
    torch.testing.assert_close(ours, expected["loss_objective"])
    torch.testing.assert_close(losses.entropy(logits).mean(), expected["entropy"])


def test_generalised_advantages():
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    rewards, values, next_values = torch.randn(3, 4, 11)
    terminated = torch.rand(4, 11) < 0.1
    ended = terminated | (torch.rand(4, 11) < 0.2)
    ours = losses.generalised_advantages(rewards, values, next_values, terminated, ended, GAMMA, 0.8)
    columns = (x[..., None] for x in (values, next_values, rewards, ended, terminated))
    theirs, _ = generalized_advantage_estimate(GAMMA, 0.8, *columns)
    torch.testing.assert_close(ours, theirs[..., 0])
