"""Two policies trained in D4RL's AntMaze, evaluated in ours: their success should be what D4RL's gives them.

    python benchmark/antmaze_policies.py ../shared/parity            # 100 episodes each; --episodes 100 --seed 1

The policies are DOPE's (google-research/deep_ope, Apache-2.0): files antmaze_umaze_10_policy.npz and
antmaze_medium_0_policy.npz with their weights and `official_success`, measured in D4RL's v0 tasks.
"""
import argparse
import json
import pathlib
import sys
import time

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for data.d4rl_tasks
POLICIES = {"umaze_10": "antmaze-umaze-v2", "medium_0": "antmaze-medium-play-v2"}  # file: task


class FixedPolicy:
    """Acts with the mean action of two tanh layers; `act` maps an observation (29,) to an action (8,)."""

    def __init__(self, path):
        self.weights = dict(np.load(path))
        self.official_success = float(self.weights["official_success"])

    def act(self, observation):
        w = self.weights
        hidden = np.tanh(np.tanh(observation.astype(np.float32) @ w["W0"] + w["b0"]) @ w["W1"] + w["b1"])
        return (hidden @ w["Wm"] + w["bm"]).clip(-1, 1)


def returns_and_lengths(policy, task, episodes, seed=1):
    """Of so many episodes, each with its own seed: return (1 is success) and steps."""
    env, results = gym.make(f"data.d4rl_tasks:{task}"), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=1000 * seed + episode)
        rewards, ended = [], False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy.act(observation))
            ended = terminated or truncated
            rewards.append(reward)
        results.append((sum(rewards), len(rewards)))
    env.close()
    return np.array(results).T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the two .npz files lie")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=POLICIES)
    flags = parser.parse_args()
    for name in [flags.only] if flags.only else POLICIES:
        start, policy = time.time(), FixedPolicy(flags.folder / f"antmaze_{name}_policy.npz")
        success, steps = returns_and_lengths(policy, POLICIES[name], flags.episodes, flags.seed)
        rate = success.mean()
        print(json.dumps({"policy": name, "task": POLICIES[name], "episodes": flags.episodes, "seed": flags.seed,
                          "success": rate, "standard_error": round((rate * (1 - rate) / flags.episodes) ** 0.5, 3),
                          "official_success": policy.official_success, "length": steps.mean(),
                          "seconds": round(time.time() - start)}), flush=True)
