"""The training loop of the offline baselines, whose algorithms are d3rlpy's.

d3rlpy gives networks, losses and optimizers. Data, batches, evaluation and the run folder are those of the scripts at
the top, since d3rlpy's own loop collects each batch row by row in Python and cannot be continued.
d3rlpy 2.8.1 asks for gymnasium 1.0 but works with ours, so it is installed without its pins: see INSTALL.
"""
import pathlib
import sys
import types
from dataclasses import dataclass

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import common  # noqa: E402

import mfql_offline  # noqa: E402
from mfql_offline import BadInput, blame  # noqa: E402

INSTALL = "pip install colorama dataclasses-json gym scikit-learn structlog && pip install --no-deps d3rlpy==2.8.1"


@dataclass
class Args(common.Args):
    env_id: str = mfql_offline.BUNDLED
    """a D4RL name, a Minari id, an OGBench task, or a Gymnasium id together with --dataset-path, as in the scripts"""
    dataset_path: str | None = None
    """the data, if not at the usual place: an HDF5 file in D4RL's layout, or a folder of Minari data sets"""
    offline_steps: int = 1_000_000
    """number of gradient steps"""
    reward_scale: float | None = 1.0
    """factor on the rewards in training; None is 1000 / (best - worst return of the data's episodes)"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training"""


def load_data(args, argv):
    """Task, environment, transitions as float32 arrays, and what is to be known of them."""
    with blame(f"--env-id {args.env_id}, --dataset-path {args.dataset_path}"):
        path = args.dataset_path and pathlib.Path(args.dataset_path).expanduser()
        hdf5 = "/" not in args.env_id or str(path).endswith((".hdf5", ".h5"))
        task, *data = (mfql_offline.load_hdf5 if hdf5 else mfql_offline.load_minari)(args.env_id, path)
        module = task["env_id"].rpartition(":")[0]  # Gymnasium imports it
        asked = " ".join(argv or sys.argv).replace("=", " ")
        if module not in ("", "data.d4rl_tasks", "gymnasium_robotics") and f"--env-id {task['env_id']}" not in asked:
            raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {task['env_id']}")
        env = mfql_offline.make_env(task)
        return task, env, *mfql_offline.prepare(env, *data)


def main(stem, description, defaults, create, argv=None, task_defaults=lambda env_id: {}, epsilon=None):
    """Trains what `create(d3rlpy, args, device)` returns; the exit code: 0 done, 3 non-finite loss, 130 interrupted.

    `epsilon` is added to the standard deviations that divide the observations; None does not normalise them.
    """
    args, run_dir, checkpoint = common.parse(defaults, stem, description, argv, task_defaults)
    if checkpoint == "done":
        return 0
    try:
        import d3rlpy
    except ImportError as error:
        raise BadInput(f"{error}; {INSTALL}") from error
    device = common.prepare_torch(args)
    task, env, data, about_data = load_data(args, argv)
    if checkpoint and about_data["sha256"] != checkpoint["data"]["sha256"]:
        raise BadInput(f"{run_dir} was trained on other data than {args.dataset_path or args.env_id} holds")
    mean, std = torch.zeros(data["observations"].shape[1]), torch.ones(data["observations"].shape[1])
    if epsilon is not None:
        mean = torch.as_tensor(data["observations"].mean(0, dtype=np.float64)).float()
        std = torch.as_tensor(data["observations"].std(0, dtype=np.float64)).float() + epsilon
    mean, std = mean.to(device), std.to(device)
    replay = {key: torch.as_tensor(value, device=device) for key, value in data.items()}
    for key in ("observations", "next_observations"):
        replay[key] = (replay[key] - mean) / std
    spread = about_data["best"] - about_data["worst"]
    scale = args.reward_scale or (1000 / spread if spread else 1.0)
    replay["rewards"] = scale * replay["rewards"][:, None] + args.reward_shift
    replay["terminals"] = 1 - replay.pop("masks")[:, None]
    del data

    algorithm = create(d3rlpy, args, str(device))
    algorithm.create_impl(env.observation_space.shape, env.action_space.shape[0])
    parts = vars(algorithm.impl.modules)  # networks and optimizers by name
    if checkpoint:
        with blame(f"the checkpoint in {run_dir} does not fit"):
            for name, part in parts.items():
                part.load_state_dict(checkpoint["state"][name])
    agent = types.SimpleNamespace(obs_mean=mean, act=lambda observations, *_:
                                  algorithm.impl.predict_best_action((observations - mean) / std).detach())
    ones = torch.ones(args.batch_size, 1, device=device)

    def advance(step):
        batch = mfql_offline.sample(replay, args.batch_size)
        batch = d3rlpy.torch_utility.TorchMiniBatch(**batch, intervals=ones, device=str(device),
                                                    next_actions=ones, returns_to_go=ones)  # both unused
        return {f"losses/{name}": value for name, value in algorithm.impl.update(batch, step).items()}

    return common.train(
        stem, args, run_dir, checkpoint, dict(data=about_data), device, args.offline_steps, 1,
        advance=advance, charts=lambda steps, seconds: {"charts/UPS": steps / seconds},
        evaluate=lambda interrupts, prefix: mfql_offline.evaluate(agent, task, args, 1, interrupts=interrupts),
        state=lambda: {name: part.state_dict() for name, part in parts.items()})
