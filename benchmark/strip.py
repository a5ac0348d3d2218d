"""Draws one episode of a trained policy as a strip of frames.

    python benchmark/strip.py runs/NAME docs/figures/hopper.png

Needs matplotlib, and a way to render: without a screen MuJoCo uses EGL.
"""
import importlib
import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """run folder"""
    out: Annotated[str, tyro.conf.Positional]
    """PNG file to write"""
    frames: int = 8
    """how many frames"""
    every: int = 10
    """environment steps between two of them"""
    skip: int = 100
    """environment steps before the first"""
    seed: int = 0
    """of the episode and of the noise"""


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    path = pathlib.Path(args.run) / "policy.pt"
    m = importlib.import_module(torch.load(path, map_location="cpu", weights_only=True)["script"])
    state = m.load(path)[1]
    env = m.make_env(state["task"], render_mode="rgb_array", camera_name="track")  # MuJoCo tasks have one that follows
    agent = m.Agent(env.observation_space.shape[0], env.action_space.shape[0], m.Args(**state["args"]),
                    torch.device("cpu"))
    agent.load_state_dict(state["agent"])
    generator, frames = torch.Generator().manual_seed(args.seed), []
    observation, ended = env.reset(seed=args.seed)[0], False
    for step in range(args.skip + args.frames * args.every):
        if ended:
            sys.exit(f"strip.py: the episode ended after {step} steps; take another --seed or a smaller --skip")
        if step >= args.skip and (step - args.skip) % args.every == 0:
            frames.append(env.render()[:, 120:-120])
        observation = torch.as_tensor(observation, dtype=torch.float32)
        action = agent.act(observation[None], agent.args.num_candidates, generator)[0]
        observation, _, terminated, truncated, _ = env.step(action.numpy())
        ended = terminated or truncated
    plt.imsave(args.out, np.concatenate(frames, 1)[::2, ::2])


if __name__ == "__main__":
    main()
