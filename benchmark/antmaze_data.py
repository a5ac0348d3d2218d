"""Makes an AntMaze dataset in D4RL's layout: a noisy policy in some episodes, random actions in the others.

    python benchmark/antmaze_data.py ../shared/parity/antmaze_umaze_10_policy.npz antmaze.hdf5      # a few minutes
    python data/fetch.py antmaze-umaze-v2 --file antmaze.hdf5
    python mfql_offline.py --env-id antmaze-umaze-v2

The policy is one of `antmaze_policies.py`. Rewards are 0 and 1 as D4RL's; an episode ends at the goal (terminals) or
after 700 steps (timeouts).
"""
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated

import gymnasium as gym
import h5py
import numpy as np
import tyro
from tqdm import tqdm

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[i]) for i in (0, 1)]
from antmaze_policies import FixedPolicy  # noqa: E402


@dataclass
class Args:
    policy: Annotated[pathlib.Path, tyro.conf.Positional]
    """weights of the policy"""
    out: Annotated[pathlib.Path, tyro.conf.Positional]
    """HDF5 file to write"""
    env_id: str = "antmaze-umaze-v2"
    """the task that the policy was trained for"""
    episodes: int = 400
    """episodes of the policy and random ones together"""
    noise: float = 0.5
    """standard deviation of the Gaussian noise on the policy's actions, before clipping"""
    random: float = 0.5
    """fraction of the episodes whose actions are uniformly random"""
    seed: int = 1
    """seed of everything"""


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    env, policy = gym.make(f"data.d4rl_tasks:{args.env_id}"), FixedPolicy(args.policy)
    rng = np.random.default_rng(args.seed)
    columns = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    successes = {"policy": [], "random": []}
    for _ in tqdm(range(args.episodes)):
        kind = "random" if rng.random() < args.random else "policy"
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        terminated = truncated = False
        while not (terminated or truncated):
            if kind == "random":
                action = rng.uniform(-1, 1, 8)
            else:
                action = np.clip(policy.act(observation) + args.noise * rng.standard_normal(8), -1, 1)
            columns["observations"].append(observation.astype(np.float32))
            columns["actions"].append(action.astype(np.float32))
            observation, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            columns["rewards"].append(np.float32(reward))
            columns["terminals"].append(terminated)
            columns["timeouts"].append(truncated and not terminated)
        successes[kind].append(terminated)
    with h5py.File(args.out, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=np.array(column), compression="gzip")
        file.attrs.update(env_id=f"data.d4rl_tasks:{args.env_id}", policy=args.policy.name, episodes=args.episodes,
                          noise=args.noise, random=args.random, seed=args.seed, gymnasium=gym.__version__)
    print(f"{len(columns['rewards'])} steps; success of " + ", of ".join(
        f"{kind} {np.mean(found):.3f} ({len(found)} episodes)" for kind, found in successes.items() if found)
        + f", of all {np.mean(successes['policy'] + successes['random']):.3f}")


if __name__ == "__main__":
    main()
