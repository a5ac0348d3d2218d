"""d3rlpy's TD3+BC under the protocol of the offline scripts, for comparison: pip install d3rlpy==2.8.1

Same file, evaluation environment and episodes (number i seeded with 1000 * seed + i), scores and metrics.jsonl;
networks, learning rates, alpha, observation normalisation and batch size are TD3+BC's own defaults.
"""
import json
import pathlib
import sys
import time
from dataclasses import asdict, dataclass

import d3rlpy
import gymnasium as gym
import h5py
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import ofql_offline  # noqa: E402


@dataclass
class Args:
    env_id: str = "halfcheetah-medium-replay-v2"
    """as in ofql_offline.py"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout"""
    seed: int = 1
    """seed of everything"""
    offline_steps: int = 100_000
    """gradient steps"""
    eval_interval: int = 10_000
    """gradient steps between two evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""


def evaluate(algorithm, args, task):
    """As in ofql_offline.py, with the mean action."""
    count = args.eval_episodes
    envs = gym.vector.SyncVectorEnv([lambda: ofql_offline.make_env(task)] * count)
    observations, _ = envs.reset(seed=[1000 * args.seed + i for i in range(count)])
    returns, running = np.zeros(count), np.ones(count, dtype=bool)
    while running.any():
        actions = algorithm.predict(np.asarray(observations, dtype=np.float32)).clip(-1, 1)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    low, high = task["reference"]
    return {"eval/episodic_return": float(returns.mean()), "eval/episodic_return_std": float(returns.std()),
            "eval/normalized_score": float(100 * (returns.mean() - low) / (high - low))}


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    d3rlpy.seed(args.seed)
    task, *_ = ofql_offline.load_hdf5(args.env_id, pathlib.Path(args.dataset_path))  # which also checks the file
    with h5py.File(args.dataset_path) as file:
        columns = [file[key][()].astype(np.float32)
                   for key in ("observations", "actions", "rewards", "terminals", "timeouts")]
    dataset = d3rlpy.dataset.MDPDataset(*columns)
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    algorithm = d3rlpy.algos.TD3PlusBCConfig(observation_scaler=scaler).create(device="cpu:0")
    run_dir = pathlib.Path(args.runs_dir) / f"{args.env_id}__td3_bc__{args.seed}__{int(time.time())}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(dict(args=asdict(args), d3rlpy=d3rlpy.__version__), indent=2))
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step, losses in algorithm.fitter(dataset, n_steps=args.offline_steps, n_steps_per_epoch=args.eval_interval,
                                             logger_adapter=d3rlpy.logging.NoopAdapterFactory(), show_progress=False):
            metrics = {"step": step * args.eval_interval, **evaluate(algorithm, args, task),
                       **{f"losses/{name}": float(value) for name, value in losses.items()}}
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            print(metrics, flush=True)


if __name__ == "__main__":
    main()
