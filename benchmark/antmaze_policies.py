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

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mfql_offline  # noqa: E402

POLICIES = {"umaze_10": "antmaze-umaze-v2", "medium_0": "antmaze-medium-play-v2"}  # file: task


class FixedPolicy:
    """What `evaluate` needs of an agent; acts with the mean action of two tanh layers."""

    def __init__(self, path):
        weights = np.load(path)
        self.official_success = float(weights["official_success"])
        self.weights = {key: torch.as_tensor(weights[key]) for key in ("W0", "b0", "W1", "b1", "Wm", "bm")}
        self.obs_mean, self.step = torch.zeros(29), 0

    def act(self, observations, num_candidates, generator):
        w = self.weights
        hidden = torch.tanh(torch.tanh(observations @ w["W0"] + w["b0"]) @ w["W1"] + w["b1"])
        return (hidden @ w["Wm"] + w["bm"]).clamp(-1, 1)


def success_rate(name, folder, episodes, seed=1, script=mfql_offline):
    """({metric: value} of `script`'s own evaluation, published success rate) of one of POLICIES."""
    policy = FixedPolicy(pathlib.Path(folder) / f"antmaze_{name}_policy.npz")
    args = script.Args(env_id=POLICIES[name], eval_episodes=episodes, seed=seed)
    return script.evaluate(policy, args, 1, script.reference_scores(args)), policy.official_success


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where the two .npz files lie")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=POLICIES)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    for name in [flags.only] if flags.only else POLICIES:
        start = time.time()
        metrics, official = success_rate(name, flags.folder, flags.episodes, flags.seed)
        rate = metrics["eval/success_rate"]
        error = (rate * (1 - rate) / flags.episodes) ** 0.5
        print(json.dumps({"policy": name, "task": POLICIES[name], "episodes": flags.episodes, "seed": flags.seed,
                          "success": rate, "standard_error": round(error, 3), "official_success": official,
                          "score": metrics["eval/normalized_score"], "length": metrics["eval/episodic_length"],
                          "seconds": round(time.time() - start)}), flush=True)
