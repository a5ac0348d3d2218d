"""Makes the bundled dataset `meanflow/hopper/medium-replay-v0`: the replay buffer of one SAC run on Hopper-v5.

    pip install stable-baselines3==2.9.2 "minari[create]==0.5.4"
    python data/collect_hopper.py

Every transition that stable-baselines3's SAC (default hyper-parameters) sees while it learns is kept, from the first
random step to the medium policy at the end, in Minari format under `data/meanflow/hopper/medium-replay-v0`. One torch
thread and seeded resets make the run repeatable on one machine; about 20 minutes on one core.
"""
import importlib.metadata
import json
import os
import pathlib
import platform
from dataclasses import dataclass

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro

DATASET_ID = "meanflow/hopper/medium-replay-v0"


@dataclass
class Args:
    seed: int = 1
    """Seed of SAC, of the action noise and of every episode's reset."""
    total_timesteps: int = 90_923
    """Environment steps, all of them recorded; the default ends with the 433rd episode, at a medium policy."""
    output_dir: str = str(pathlib.Path(__file__).resolve().parent)
    """Folder that takes the place of `~/.minari/datasets`."""


class SeededResets(gym.Wrapper):
    """Seeds each episode from (seed, episode number); Minari's collector would draw a seed from the system instead."""

    def __init__(self, env, seed):
        super().__init__(env)
        self.next_seed = seed * 1_000_000

    def reset(self, *, seed=None, options=None):
        self.next_seed += 1
        return self.env.reset(seed=self.next_seed - 1, options=options)


def repack(path):
    """Rewrites Minari's HDF5 compressed, one chunk per array: a tenth of the size, the same episodes."""
    packed = path.with_suffix(".packed")
    with h5py.File(path, "r") as source, h5py.File(packed, "w", libver="latest") as target:
        for name, episode in source.items():
            group = target.create_group(name)
            for key in ("id", "seed", "total_steps"):
                group.attrs[key] = episode.attrs[key]
            for key in ("observations", "actions", "rewards", "terminations", "truncations"):
                array = episode[key]
                group.create_dataset(key, data=array[()], chunks=array.shape, compression="gzip", compression_opts=9,
                                     shuffle=True)
    os.replace(packed, path)


def main():
    args = tyro.cli(Args)
    os.environ["MINARI_DATASETS_PATH"] = args.output_dir
    import minari  # reads the variable above
    import stable_baselines3

    torch.set_num_threads(1)
    class Float32(minari.StepDataCallback):
        """Halves the file; the offline scripts train in float32 anyway."""

        def __call__(self, env, **step):
            data = super().__call__(env, **step)
            return data | {key: np.float32(data[key]) for key in ("observation", "reward") if data[key] is not None}

    env = gym.make("Hopper-v5")
    space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    collector = minari.DataCollector(env, Float32, observation_space=space)
    model = stable_baselines3.SAC("MlpPolicy", SeededResets(collector, args.seed), seed=args.seed, device="cpu",
                                  verbose=1)
    model.learn(args.total_timesteps, log_interval=50)

    versions = {p: importlib.metadata.version(p)
                for p in ("stable-baselines3", "torch", "gymnasium", "mujoco", "minari", "numpy")}
    dataset = collector.create_dataset(
        dataset_id=DATASET_ID,
        algorithm_name="stable-baselines3 SAC, default hyper-parameters, whole replay buffer",
        code_permalink="data/collect_hopper.py",
        # D4RL's reference scores of Hopper, so that scores are on the field's scale
        ref_min_score=-20.272305,
        ref_max_score=3234.3,
        requirements=["gymnasium[mujoco]>=1.1"],
        description=(
            f"Replay buffer of stable-baselines3's SAC on Hopper-v5, {args.total_timesteps} environment steps, seed "
            f"{args.seed}, made by `python data/collect_hopper.py --seed {args.seed} --total-timesteps "
            f"{args.total_timesteps}` with Python {platform.python_version()} and {json.dumps(versions)}. The "
            "reference scores are D4RL's for Hopper (random -20.272305, expert 3234.3)."),
    )
    repack(pathlib.Path(args.output_dir) / DATASET_ID / "data" / "main_data.hdf5")
    returns = np.array([episode.rewards.sum() for episode in dataset.iterate_episodes()])
    print(f"{dataset.total_episodes} episodes, {dataset.total_steps} steps, return {returns.mean():.1f} "
          f"(std {returns.std():.1f}, best {returns.max():.1f}, last 20 episodes {returns[-20:].mean():.1f})")


if __name__ == "__main__":
    main()
