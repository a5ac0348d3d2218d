"""Makes offline data of three qualities for a MuJoCo task from one run of stable-baselines3's SAC.

    pip install stable-baselines3==2.9.2
    python data/collect.py Hopper-v4 --quality all --out-dir sets                  # about an hour on one core
    python mfql_offline.py --env-id Hopper-v4 --dataset-path sets/Hopper-v4_medium-replay_1.hdf5

The *medium* policy is the first whose sampled actions reach --medium-score on average over --eval-episodes episodes
(if none does, the best one seen, and that is said); the *expert* is the best one seen in all of --total-timesteps.
  medium-replay    every step of the SAC run up to the medium policy, in order, the first ones random; whole episodes
  medium           --rows steps of the medium policy, actions sampled as in training; whole episodes
  medium-expert    half of those steps, then as many of the expert
Written are flat HDF5 files, as `fetch.py` describes them, OUT_DIR/ENV_QUALITY_SEED.hdf5, or a Minari data set
(--minari), with command, versions and measured scores. Equal seeds give equal numbers on one machine.

The bundled data set is the whole buffer of a run of fixed length, whose last policy is the medium one (it was made on
another machine, and would come out with the same rule but other numbers):
    python data/collect.py Hopper-v5 --quality medium-replay --medium-score None --total-timesteps 90923 \
        --minari meanflow/hopper/medium-replay-v0 --datasets-dir .
"""
import copy
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for the other files of this folder
from data import fetch  # noqa: E402
from data.d4rl_tasks import REFERENCE_SCORES  # noqa: E402


@dataclass
class Args:
    env_id: Annotated[str, tyro.conf.Positional]
    """Gymnasium id of a task with flat observations and actions"""
    quality: Literal["medium-replay", "medium", "medium-expert", "all"] = "all"
    """which data to write; all three come from one SAC run"""
    medium_score: float | None = 100 / 3
    """score of the medium policy, in percent of the way from D4RL's random to its expert return, or, for a task that
    D4RL does not have, its return; None: the policy after --total-timesteps is medium, and nothing is evaluated"""
    total_timesteps: int = 250_000
    """environment steps of SAC at most, all of them for an expert"""
    rows: int = 200_000
    """steps of medium and of medium-expert, to the next end of an episode"""
    eval_interval: int = 5_000
    """steps between two evaluations in the search for the medium policy and the expert"""
    eval_episodes: int = 10
    """episodes of such an evaluation"""
    seed: int = 1
    """seed of SAC, of its noise and of every episode's reset"""
    out_dir: pathlib.Path = pathlib.Path(".")
    """folder of the HDF5 files"""
    minari: str | None = None
    """write a Minari data set of this name (NAMESPACE/NAME-vN) instead; for a single quality"""
    datasets_dir: pathlib.Path | None = None
    """with --minari: folder that stands for ~/.minari/datasets"""


class SeededResets(gym.Wrapper):
    """Seeds each episode with the next number from seed * 1,000,000 + first on, whatever it is asked for."""

    def __init__(self, env, seed, first=0):
        super().__init__(env)
        self.next_seed = seed * 1_000_000 + first

    def reset(self, *, seed=None, options=None):
        self.next_seed += 1
        return self.env.reset(seed=self.next_seed - 1, options=options)


def roll_out(policy, env, steps=0, episodes=0):
    """Whole episodes with sampled actions until there are so many steps and episodes: (data, next observations), as
    dict of arrays (N, ...), see fetch.KEYS, and array (N, O)."""
    columns = {key: [] for key in (*fetch.KEYS, "next_observations")}
    while len(columns["rewards"]) < steps or sum(columns["terminals"]) + sum(columns["timeouts"]) < episodes:
        observation, ended = env.reset()[0], False
        while not ended:
            action, _ = policy.predict(observation, deterministic=False)
            following, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            for key, value in zip(columns, (observation, action, reward, terminated, truncated and not terminated,
                                            following)):
                columns[key].append(value)
            observation = following
    data = {key: np.array(value, dtype=bool if key in fetch.KEYS[3:] else np.float32)
            for key, value in columns.items()}
    return data, data.pop("next_observations")


def replayed(model):
    """The whole episodes of a SAC run so far, in the form of `roll_out`."""
    buffer, count = model.replay_buffer, model.replay_buffer.pos
    data = dict(observations=buffer.observations, actions=buffer.actions, rewards=buffer.rewards,
                terminals=(buffer.dones - buffer.timeouts) > 0, timeouts=buffer.timeouts > 0)
    whole = np.flatnonzero(buffer.dones[:count, 0])[-1] + 1
    data = {key: value[:whole, 0].astype(bool if key in fetch.KEYS[3:] else np.float32) for key, value in data.items()}
    data["actions"] = model.policy.unscale_action(data["actions"])
    return data, buffer.next_observations[:whole, 0].astype(np.float32)


def mean_return(data):
    """Mean return of the episodes of data that consist of whole ones."""
    return float(data["rewards"].sum(dtype=np.float64) / (data["terminals"] | data["timeouts"]).sum())


def train(model, args, score, goal, best=(None, 0, -np.inf)):
    """Trains until a policy reaches the score `goal`, or to the end: (copy of the best policy, its step, its score).

    `best` is the best one so far. With goal None nothing is evaluated and the last policy, of score None, is returned.
    """
    if goal is None:
        model.learn(args.total_timesteps, log_interval=100)
        return copy.deepcopy(model.policy), model.num_timesteps, None
    while model.num_timesteps < args.total_timesteps and best[2] < goal:
        steps = min(args.eval_interval, args.total_timesteps - model.num_timesteps)
        model.learn(steps, log_interval=100, reset_num_timesteps=model.num_timesteps == 0)
        env = SeededResets(gym.make(args.env_id), args.seed, 800_000)  # the same episodes each time
        with torch.random.fork_rng():  # evaluating changes nothing
            torch.manual_seed(args.seed)
            reached = score(mean_return(roll_out(model.policy, env, episodes=args.eval_episodes)[0]))
        print(f"step {model.num_timesteps}: score {reached:.1f}", flush=True)
        if reached > best[2]:
            best = copy.deepcopy(model.policy), model.num_timesteps, reached
    return best


def collect(args):
    try:
        import stable_baselines3
    except ImportError as error:
        raise fetch.BadInput(f"{error}; pip install stable-baselines3==2.9.2") from error
    try:
        env = gym.make(args.env_id)
    except (gym.error.Error, ImportError) as error:
        raise fetch.BadInput(f"{args.env_id}: {error}") from error
    if not all(isinstance(space, gym.spaces.Box) for space in (env.observation_space, env.action_space)):
        raise fetch.BadInput(f"{args.env_id}: observations and actions must be vectors of numbers")
    reference = REFERENCE_SCORES.get(env.spec.name.lower())
    references = dict(zip(("ref_min_score", "ref_max_score"), reference or ()))
    qualities = ["medium-replay", "medium", "medium-expert"] if args.quality == "all" else [args.quality]
    if args.minari and len(qualities) > 1:
        raise fetch.BadInput("--minari is the name of one data set: give one --quality")
    paths = {quality: args.out_dir.resolve() / f"{args.env_id}_{quality}_{args.seed}.hdf5" for quality in qualities}
    if args.minari:
        paths = {args.quality: fetch.minari_folder(args.minari, args.datasets_dir)}
    for path in paths.values():  # now rather than in an hour
        if path.exists():
            raise fetch.BadInput(f"{path} exists; delete it or give another place")
        with fetch.temporary(path) as partial:
            partial.touch()

    packages = "stable-baselines3", "torch", "gymnasium", "mujoco", "numpy"
    versions = {package: importlib.metadata.version(package) for package in packages}
    about = f"{shlex.join(['python', *sys.argv])}, Python {platform.python_version()}, {json.dumps(versions)}"

    def score(episodic_return):
        low, high = reference or (0, 100)
        return 100 * (episodic_return - low) / (high - low)

    def write(quality, data, next_observations, policies):
        if quality not in qualities:
            return
        ends = np.flatnonzero(data["terminals"] | data["timeouts"])
        text = f"{quality} of {args.env_id}: {policies}. Made by {about}"
        if args.minari:
            fetch.write_minari(
                paths[quality], args.minari, data, ends, next_observations[ends], env, description=text,
                algorithm_name="stable-baselines3 SAC, default hyper-parameters", code_permalink="data/collect.py",
                **references)
        else:
            with fetch.temporary(paths[quality]) as partial:
                fetch.write_flat(partial, data, env_id=args.env_id, source=text, **references)
                fetch.publish(partial, paths[quality])
        print(f"wrote {len(data['rewards'])} steps, {len(ends)} episodes, mean score {score(mean_return(data)):.1f}, "
              f"to {paths[quality]} ({policies})", flush=True)

    model = stable_baselines3.SAC("MlpPolicy", SeededResets(gym.make(args.env_id), args.seed), seed=args.seed,
                                  device="cpu", verbose=1, buffer_size=args.total_timesteps + 1)  # never full
    medium = train(model, args, score, args.medium_score)
    named = f"medium policy of step {medium[1]}" + ("" if medium[2] is None else f", score {medium[2]:.1f}")
    if medium[2] is not None and medium[2] < args.medium_score:
        print(f"no policy reached {args.medium_score:.1f}: the best, of step {medium[1]}, is medium and expert",
              file=sys.stderr)
    write("medium-replay", *replayed(model), named)
    if qualities == ["medium-replay"]:
        return
    with torch.random.fork_rng():  # further training does not depend on what is written
        rows = args.rows if "medium" in qualities else args.rows // 2
        data, following = roll_out(medium[0], SeededResets(gym.make(args.env_id), args.seed, 400_000), rows)
    write("medium", data, following, named)
    if "medium-expert" not in qualities:
        return
    policy, step, _ = train(model, args, score, np.inf, medium)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    half = ends[ends >= args.rows // 2][0]
    data, following = {key: value[:half] for key, value in data.items()}, following[:half]
    expert, then = roll_out(policy, SeededResets(gym.make(args.env_id), args.seed, 600_000), args.rows // 2)
    write("medium-expert", {key: np.concatenate([value, expert[key]]) for key, value in data.items()},
          np.concatenate([following, then]), f"{named}; expert of step {step}, score "
          f"{score(mean_return(expert)):.1f}")


def main():
    fetch.leave_nothing_when_stopped()
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 on purpose
    torch.set_num_threads(1)
    try:
        collect(tyro.cli(Args, description=__doc__))
        return 0
    except (fetch.BadInput, OSError) as error:
        print("collect.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
