"""Makes data of OGBench's pixel tasks with OGBench's scripted play policies, in the format of OGBench's own files.

    python data/collect_pixels.py cube-single --episodes 1000 --out visual-cube-single-play-v0.npz     # as OGBench's
    python data/fetch.py visual-cube-single-play-singletask-task1-v0 --file visual-cube-single-play-v0.npz

The same policies, noise and rules as OGBench's `data_gen_scripts/generate_manipspace.py`, seeded: a plan through key
poses with smoothed noise, a new target whenever one is done. Needs `pip install ogbench mujoco==3.11.0` and OpenGL
(MUJOCO_GL, egl unless set). A frame takes milliseconds on a GPU and 0.2 s on a CPU; all are kept in memory meanwhile.
"""
import argparse
import os
import pathlib
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for the other files of this folder
from data import fetch  # noqa: E402

STACKING = {"cube-single": (0, 0), "cube-double": (0, 0.25)}  # range of an episode's probability to stack cubes


def make_policies(env, world):
    """OGBench's scripted policy for each kind of target that the world has."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    noise = dict(env=env, noise=0.1, noise_smoothing=0.5)
    if world.startswith("puzzle"):
        return {"button": button_plan.ButtonPlanOracle(**noise, gripper_always_closed=True)}
    policies = {"cube": cube_plan.CubePlanOracle(**noise)}
    if world == "scene":
        policies |= {"button": button_plan.ButtonPlanOracle(**noise), "drawer": drawer_plan.DrawerPlanOracle(**noise),
                     "window": window_plan.WindowPlanOracle(**noise)}
    return policies


def play(env, policies, stacking, seed):
    """One episode: dict of lists, a row each for a frame and what was done there; the last row ends the episode."""
    observation, info = env.reset(seed=seed)
    policy, ended = policies[info["privileged/target_task"]], False
    policy.reset(observation, info)
    rows = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel", "button_states")}
    while not ended:
        action = np.clip(policy.select_action(observation, info), -1, 1)
        following, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        for key, value in zip(rows, (observation, action, ended, info["prev_qpos"], info["prev_qvel"],
                                     info.get("prev_button_states", ()))):
            rows[key].append(value)
        observation = following
        if policy.done:
            env.unwrapped.set_new_target(return_info=False, p_stack=stacking)
            target = env.unwrapped.get_reset_info()
            policy = policies[target["privileged/target_task"]]
            policy.reset(observation, target)
    return rows


def cube_is_in_sight(rows):
    """OGBench's rule for the scene: the cube stays on the table, or in the drawer at the left."""
    _, y, z = np.array(rows["qpos"])[:, 14:17].T
    return not ((y >= 0.29) | (y <= -0.3) & ((z < 0.06) | (z > 0.08))).any()


def collect(args):
    path = args.out.resolve()
    if path.exists():
        raise fetch.BadInput(f"{path} exists; delete it or give another --out")
    try:
        import ogbench.manipspace  # noqa: F401  registers its environments
    except ImportError as error:
        raise fetch.BadInput(f"{error}; pip install ogbench mujoco==3.11.0") from error
    env = gym.make(f"visual-{args.world}-v0", terminate_at_goal=False, mode="data_collection",
                   max_episode_steps=args.steps, disable_env_checker=True)  # the checker has frames drawn
    policies, episodes, seed = make_policies(env, args.world), [], args.seed * 1_000_000
    np.random.seed(args.seed)  # where the policies draw from
    with fetch.temporary(path) as partial:
        while len(episodes) < args.episodes:
            rows = play(env, policies, np.random.uniform(*STACKING.get(args.world, (0.5, 0.5))), seed)
            seed += 1
            if args.world != "scene" or cube_is_in_sight(rows):
                episodes.append({key: np.array(column) for key, column in rows.items()})
                print(f"episode {len(episodes)} of {args.episodes}", end="\r", file=sys.stderr, flush=True)
        env.close()
        types = dict(observations=np.uint8, terminals=bool, button_states=np.int64)
        data = {key: np.concatenate([episode[key] for episode in episodes]).astype(types.get(key, np.float32))
                for key in episodes[0] if episodes[0][key].size}
        with open(partial, "wb") as file:
            np.savez_compressed(file, **data)
        fetch.publish(partial, path)
    print(f"wrote {len(data['actions'])} frames, {args.episodes} episodes, {path.stat().st_size} bytes, to {path}")


def main():
    fetch.leave_nothing_when_stopped()
    parser = fetch.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4"))
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1001, help="frames of an episode, the last without a successor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the .npz file to write")
    try:
        collect(parser.parse_args())
        return 0
    except (fetch.BadInput, OSError) as error:
        print("collect_pixels.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
