"""A small learning fact that cannot come out by luck: improvement over the behaviour that made the data.

One-step episodes whose reward is largest at one action per observation; the data's actions are uniform. Cloning must
reproduce the spread of the data, Q-learning must find the best action, from a single candidate.
"""
import importlib

import numpy as np
import pytest
import torch

SIZES = dict(offline_steps=500, policy_width=32, critic_width=64, critic_depth=2)
SCRIPTS = {  # flags, those that make Q-learning strong, those that leave cloning alone
    "mfql_offline": (dict(SIZES, policy_depth=1, actor_learning_rate=1e-3, critic_learning_rate=1e-3),
                     dict(alpha=0.1), dict(alpha=1e6)),
    "ofql_offline": (dict(SIZES, policy_depth=2, learning_rate=1e-3, noise_temperature=1.0, acting_policy="online"),
                     dict(eta=10.0), dict(eta=0.0)),
}


def distance_to_best(m, **flags):
    """Mean |a - a*| of one-step actions, N = 1, after 500 updates on 4000 one-step episodes."""
    generator = np.random.default_rng(0)
    observations = generator.uniform(-1, 1, (4000, 2)).astype(np.float32)
    actions = generator.uniform(-1, 1, (4000, 2)).astype(np.float32)
    best = 0.7 * observations[:, ::-1]
    data = dict(observations=observations, actions=actions, rewards=-np.square(actions - best).sum(1),
                masks=np.zeros(4000, np.float32), next_observations=observations)
    replay = {key: torch.as_tensor(np.ascontiguousarray(value)) for key, value in data.items()}
    torch.manual_seed(0)
    agent = m.Agent(2, 2, m.Args(**flags), torch.device("cpu"))
    for _ in range(flags["offline_steps"]):
        agent.update(m.sample(replay, 128))
    action = agent.act(replay["observations"], 1, torch.Generator().manual_seed(1)).numpy()
    return np.abs(action - best).mean()


@pytest.mark.parametrize("script", SCRIPTS)
def test_q_learning_beats_cloning(script):
    """Uniform actions are 0.58 from the best ones on average; cloning stays there, Q-learning comes within 0.2."""
    m, (flags, learning, cloning) = importlib.import_module(script), SCRIPTS[script]
    assert distance_to_best(m, **flags, **learning) < 0.2
    assert distance_to_best(m, **flags, **cloning) > 0.4
