"""stable-baselines3's SAC under the protocol of `som_online.py`, for comparison: pip install stable-baselines3==2.9.2

Same environments side by side, environment steps, gradient steps per environment step, random first steps, evaluation
episodes and metrics.jsonl; networks, learning rate and batch size are SAC's own defaults (2 x 256, 3e-4, 256). SAC
acts by its mean in evaluation (eval/) and by a sample in the final eval_n1/.
"""
import json
import pathlib
import time
import warnings
from dataclasses import asdict, dataclass

import gymnasium as gym
import numpy as np
import stable_baselines3
import tyro
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

warnings.filterwarnings("ignore", message=".*is out of date.*")


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium environment"""
    seed: int = 1
    """seed of everything; the evaluation episodes are those of som_online.py"""
    total_timesteps: int = 200_000
    """environment steps, of all environments together"""
    num_envs: int = 5
    """environments side by side; one gradient step for all of them, so that the UTD is 1 / num_envs"""
    learning_starts: int = 10_000
    """environment steps with random actions"""
    tau: float = 0.005
    """Polyak rate of the target critics (SAC's own; som_online.py has 0.02)"""
    eval_interval: int = 20_000
    """environment steps between two evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""


def evaluate(model, args, deterministic, prefix):
    """As in som_online.py: episode i is seeded with 1000 * seed + i."""
    count = args.eval_episodes
    envs = gym.vector.SyncVectorEnv([lambda: gym.make(args.env_id)] * count)
    observations, _ = envs.reset(seed=[1000 * args.seed + i for i in range(count)])
    returns, lengths, running = np.zeros(count), np.zeros(count), np.ones(count, dtype=bool)
    while running.any():
        actions, _ = model.predict(observations, deterministic=deterministic)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    return {f"{prefix}episodic_return": returns.mean(), f"{prefix}episodic_return_std": returns.std(),
            f"{prefix}episodic_length": lengths.mean()}


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    run_dir = pathlib.Path(args.runs_dir) / f"{args.env_id}__sac__{args.seed}__{int(time.time())}"
    run_dir.mkdir(parents=True)
    versions = dict(stable_baselines3=stable_baselines3.__version__, gymnasium=gym.__version__)
    (run_dir / "args.json").write_text(json.dumps(dict(args=asdict(args), versions=versions), indent=2))
    envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    model = stable_baselines3.SAC("MlpPolicy", envs, learning_starts=args.learning_starts, train_freq=1,
                                  gradient_steps=1, seed=args.seed, device="cpu", tau=args.tau)
    model.set_logger(Logger(folder=None, output_formats=[]))  # else it leaves folders in the temporary directory
    with (run_dir / "metrics.jsonl").open("w") as file:
        def log(metrics):
            file.write(json.dumps({"step": model.num_timesteps, **metrics}) + "\n")
            file.flush()

        while model.num_timesteps < args.total_timesteps:
            start = time.time()
            model.learn(args.eval_interval, reset_num_timesteps=False)
            log({"charts/SPS": args.eval_interval / (time.time() - start)})
            metrics = evaluate(model, args, True, "eval/")
            log(metrics)
            print(f"step {model.num_timesteps}: {metrics}", flush=True)
        log(evaluate(model, args, False, "eval_n1/"))


if __name__ == "__main__":
    main()
