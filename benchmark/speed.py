"""Median times of acting and updating with `som_online.py`, beside stable-baselines3's SAC, on the CPU.

    python benchmark/speed.py            # --help shows the sizes; pip install stable-baselines3==2.9.2

Acting: one Hopper observation, as numpy array in and out. Updating: one gradient step on made-up transitions. Every
row is the median over blocks of calls, with the lowest and highest block behind it.
"""
import pathlib
import sys
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import som_online  # noqa: E402

OBS_DIM, ACT_DIM = 11, 3  # Hopper


@dataclass
class Args:
    threads: int = 1
    """threads of torch"""
    blocks: int = 7
    """repeats of each measurement"""
    compile: bool = True
    """also time compiled updates (needs a C++ compiler)"""


def timed(blocks, name, call, *operands, seconds=1.0):
    """Prints microseconds per call: median of the blocks (lowest .. highest)."""
    call(*operands)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call(*operands)
        count += 1
    times = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(count):
            call(*operands)
        times.append((time.perf_counter() - start) / count * 1e6)
    print(f"| {name} | {np.median(times):,.0f} | {min(times):,.0f} .. {max(times):,.0f} |", flush=True)


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    torch.set_num_threads(args.threads)
    cpu, rng = torch.device("cpu"), np.random.default_rng(0)
    observation = rng.normal(size=(1, OBS_DIM)).astype(np.float32)
    print(f"torch {torch.__version__}, {args.threads} threads\n\n| | microseconds | spread |\n|---|---|---|")

    def act(agent, num_candidates):
        return agent.act(torch.as_tensor(observation), num_candidates).numpy()

    agent = som_online.Agent(OBS_DIM, ACT_DIM, som_online.Args(), cpu)
    for n in (1, 32):
        timed(args.blocks, f"SOM, one action, N = {n}", act, agent, n)
    sac = stable_baselines3.SAC("MlpPolicy", gym.make("Hopper-v5"), device="cpu", learning_starts=0)
    timed(args.blocks, "SAC (stable-baselines3), one action", sac.predict, observation)

    def batch(size):
        return dict(observations=torch.randn(size, OBS_DIM), actions=torch.rand(size, ACT_DIM) * 2 - 1,
                    rewards=torch.randn(size), masks=torch.ones(size), next_observations=torch.randn(size, OBS_DIM))

    sizes = {"default sizes (K = 100, batch 256, 256 x 3)": som_online.Args(),
             "sizes of the runs here (K = 16, batch 128, 128 x 3, critics 256 x 2)": som_online.Args(
                 num_proposals=16, batch_size=128, policy_width=128, critic_depth=2)}
    for name, flags in sizes.items():
        for flags.compile in (False, True) if args.compile else (False,):
            agent, data = som_online.Agent(OBS_DIM, ACT_DIM, flags, cpu), batch(flags.batch_size)
            timed(args.blocks, f"SOM, update, {name}{', compiled' if flags.compile else ''}", agent.update, data)
    sac.learn(600)
    timed(args.blocks, "SAC (stable-baselines3), update (batch 256, 256 x 2)", sac.train, 1, 256)


if __name__ == "__main__":
    main()
