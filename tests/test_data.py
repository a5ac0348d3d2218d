"""The data half of `mfql_offline.py`, whose text the other data scripts share: what is read, what is refused, and how.

No test needs a network or touches the home folder. Each trap of data (time limits, goals, reference scores, code in a
data set, ...) has a test that fails if it is walked into. Downloads and D4RL's tasks are data/'s: test_data_tools.py.
"""
import json
import os
import pathlib
import shutil
import sys
import warnings

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_behaviour import save_sealed

import mfql_offline as m

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"  # real files, on development machines only
SMALL = ["--no-cuda", "--policy-width", "8", "--policy-depth", "1", "--critic-width", "8", "--critic-depth", "1",
         "--offline-steps", "1", "--eval-episodes", "1"]  # ends at once if a test's bad input is not refused
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folders")]


class ToyEnv(gym.Env):
    """Random observations from any space; terminates or is cut off (truncated) after `length` steps, in turn."""

    metadata = {"render_modes": []}

    def __init__(self, kind="flat", length=4, render_mode=None):
        small, entry = spaces.Box(-9, 9, (2,), np.float32), spaces.Box(-9, 9, (4,), np.float64)
        goal = {"observation": entry, "desired_goal": small, "achieved_goal": small}
        self.observation_space = {
            "flat": small,
            "goal": spaces.Dict(goal),  # sorted by gymnasium
            "goal_unsorted": spaces.Dict(**goal),  # not sorted by gymnasium, but sorted in a Minari file
            "nested": spaces.Dict(z=spaces.Dict(b=small, a=entry), a=small),
            "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "text": spaces.Dict(a=small, b=spaces.Sequence(small)),
        }.get(kind, small)
        self.action_space = {
            "crooked_box": spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32)),
            "float64_box": spaces.Box(-1, 1, (2,), np.float64),
            "open_box": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }.get(kind, spaces.Box(-1, 1, (2,), np.float32))
        self.length, self.episode = length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time, self.episode = 0, self.episode + 1
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        done, odd = self.time == self.length, self.episode % 2 == 1
        return self.observation_space.sample(), float(self.time), done and odd, done and not odd, {}


gym.register("DataTestToy-v0", entry_point=f"{__name__}:ToyEnv")
for toy_kind in ("crooked_box", "float64_box", "open_box", "image", "text"):
    gym.register(f"DataTestToy_{toy_kind}-v0", entry_point=f"{__name__}:ToyEnv", kwargs={"kind": toy_kind})


@pytest.fixture
def own_folders(tmp_path_factory, monkeypatch):
    """Home and caches that belong to this test alone."""
    home = tmp_path_factory.mktemp("home")
    for name, folder in (("HOME", "."), ("D4RL_DATASET_DIR", "d4rl"), ("MINARI_DATASETS_PATH", "minari")):
        monkeypatch.setenv(name, str(home / folder))
    return home


@pytest.fixture
def copied_alone(tmp_path, monkeypatch):
    """The script as a user who copied it has it: nothing lies beside it."""
    monkeypatch.setattr(m, "__file__", str(tmp_path / "alone" / "mfql_offline.py"))


def d4rl_columns(rows=12, obs_dim=3, act_dim=1):
    """Row i is recognised by observation i, i + 0.25, ... and reward i; terminal at row 3, time limit at row 7."""
    return {"observations": (np.arange(rows)[:, None] + 0.25 * np.arange(obs_dim)).astype(np.float32),
            "actions": np.linspace(-0.9, 0.9, rows * act_dim).reshape(rows, act_dim).astype(np.float32),
            "rewards": np.arange(rows, dtype=np.float32),
            "terminals": np.arange(rows) == 3, "timeouts": np.arange(rows) == 7}


def write_d4rl(path, columns, **attributes):
    """An HDF5 file in D4RL's layout; columns that are None are left out."""
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            if value is not None:
                file[key] = value
        file.attrs.update(attributes)
    return path


def load(env_id, path=None):
    """Task, data and what is known of them, as main reads them."""
    task, *data = (m.load_hdf5 if "/" not in env_id else m.load_minari)(env_id, path)
    return task, *m.prepare(m.make_env(task), *data)


def files(*folders):
    """Every file below, with its contents: equal before and after means that nothing was written."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refuse(tmp_path, *flags):
    """The message with which this command line is refused; checks that it leaves nothing behind."""
    before = files(tmp_path, pathlib.Path(os.environ["HOME"]))
    with pytest.raises(m.BadInput) as caught:
        m.main([*SMALL, "--runs-dir", str(tmp_path / "runs"), *map(str, flags)])
    assert files(tmp_path, pathlib.Path(os.environ["HOME"])) == before
    assert not (tmp_path / "runs").exists()
    return str(caught.value)


# ---------------------------------------------------------------- D4RL layout
@pytest.mark.parametrize("flag_dtype", [bool, np.uint8, np.float32])
def test_d4rl_rows_masks_and_returns(tmp_path, flag_dtype):
    columns = d4rl_columns()
    columns |= {key: columns[key].astype(flag_dtype) for key in ("terminals", "timeouts")}
    _, data, about = load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]  # 7 is at a time limit and 11 the last row: no next observation
    np.testing.assert_array_equal(data["observations"], columns["observations"][kept])
    np.testing.assert_array_equal(data["next_observations"], columns["observations"][kept] + 1)
    np.testing.assert_array_equal(data["rewards"], kept)
    np.testing.assert_allclose(data["actions"], columns["actions"][kept] / 2, rtol=1e-6)  # Pendulum's box is +-2
    np.testing.assert_array_equal(data["masks"], [row != 3 for row in kept])  # the time limit is no termination
    returns = 0 + 1 + 2 + 3, 4 + 5 + 6 + 7  # the unfinished third does not count
    assert about.pop("sha256") and about == dict(transitions=10, episodes=2, mean_return=sum(returns) / 2,
                                                 best_quarter=max(returns), best=max(returns), worst=min(returns))
    assert all(value.dtype == np.float32 and len(value) == len(kept) for value in data.values())


@pytest.mark.parametrize("seed", range(3))
def test_d4rl_against_a_plain_loop(tmp_path, seed):
    """Random episode ends, a terminal and a time limit in the same row among them, against the rule written out."""
    columns, draw = d4rl_columns(rows=200), np.random.default_rng(seed)
    columns |= {"terminals": draw.random(200) < 0.1, "timeouts": draw.random(200) < 0.1}
    data, _, returns = m.load_hdf5("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))[1:]
    rows, expected_returns, total = [], [], 0.0
    for row in range(200):
        reward, terminal, timeout = (columns[key][row] for key in ("rewards", "terminals", "timeouts"))
        total += reward
        if not timeout and row < 199:
            rows.append((row, row + 1, reward, 0.0 if terminal else 1.0))
        if terminal or timeout:
            expected_returns.append(total)
            total = 0.0
    got = zip(data["observations"][:, 0], data["next_observations"][:, 0], data["rewards"], data["masks"])
    assert [tuple(map(float, row)) for row in got] == rows
    np.testing.assert_allclose(returns, expected_returns)
    episode = np.concatenate([[0], np.cumsum(columns["terminals"] | columns["timeouts"])])  # of each row
    crossing = episode[data["next_observations"][:, 0].astype(int)] != episode[data["observations"][:, 0].astype(int)]
    assert not (crossing & (data["masks"] == 1)).any()  # across a border only behind mask 0


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4"])
def test_files_of_other_floats_become_float32(tmp_path, dtype):
    columns = {key: value.astype(dtype) for key, value in d4rl_columns().items()}
    data = load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))[1]
    assert {value.dtype for value in data.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(data["observations"][:4], columns["observations"][:4])


@pytest.mark.parametrize("recorded_in", ["Pendulum-v1", "Pendulum-v0", "some.module:Pendulum-v1"])
def test_the_environment_named_in_the_file(tmp_path, recorded_in):
    """Another version is fine; the module that registers it is taken over, where the name is the same."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(), env_id=recorded_in, ref_min_score=-2.0, ref_max_score=3.0)
    task = m.load_hdf5("Pendulum-v1", path)[0]
    assert task == dict(env_id=recorded_in if ":" in recorded_in else "Pendulum-v1", kwargs={}, reference=(-2.0, 3.0))
    assert m.load_hdf5("Pendulum-v1", write_d4rl(path, d4rl_columns(), ref_min_score=1.0))[0]["reference"] is None


def test_the_fingerprint_is_that_of_the_numbers(tmp_path):
    """Not of the file: its age or an attribute do not matter, one number does."""
    prints = []
    for change, attributes in ((0, {}), (0, {"note": 1}), (1e-3, {})):
        columns = d4rl_columns()
        columns["rewards"][5] += change
        prints.append(load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns, **attributes))[2]["sha256"])
    assert prints[0] == prints[1] != prints[2]


# ---------------------------------------------------------------- action boxes
def test_pendulum_actions_are_scaled_with_the_environment(tmp_path):
    """Pendulum's torques lie in +-2: a data action and the environment's action of the same number mean one torque."""
    torques = np.linspace(-2, 2, 12, dtype=np.float32)[:, None]
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns() | {"actions": torques, "timeouts": np.arange(12) == 11})
    task, data, _ = load("Pendulum-v1", path)
    env = m.make_env(task)
    np.testing.assert_allclose(data["actions"], torques[:11] / 2, atol=1e-4)
    assert np.abs(data["actions"]).max() < 1 and data["actions"].dtype == np.float32
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for action, torque in zip(data["actions"], torques):
        env.step(action)
        assert env.unwrapped.last_u == pytest.approx(torque[0], abs=1e-4)


def test_a_crooked_action_box(tmp_path):
    """Box [-1, 3] x [0, 10]: each component by its own bounds."""
    actions = np.array([[-1, 0], [3, 10], [1, 5], [0, 7.5]] * 3, np.float32)
    columns = d4rl_columns(obs_dim=2) | {"actions": actions, "timeouts": np.arange(12) == 11}
    data = load("DataTestToy_crooked_box-v0", write_d4rl(tmp_path / "x.hdf5", columns))[1]
    np.testing.assert_allclose(data["actions"][:4], [[-1, -1], [1, 1], [0, 0], [-0.5, 0.5]], atol=2e-5)


def test_a_float64_action_box_gives_float32_actions(tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(obs_dim=2, act_dim=2))
    assert load("DataTestToy_float64_box-v0", path)[1]["actions"].dtype == np.float32


# ---------------------------------------------------------------- bad input: columns, numbers, files, names
TEXT, PAIRS = np.array([b"0"] * 12), np.zeros(12, [("a", "f4"), ("b", "f4")])
BAD_COLUMNS = {
    "one row": ({k: v[:1] for k, v in d4rl_columns().items()}, "no episode ends"),
    "no rows": ({k: v[:0] for k, v in d4rl_columns().items()}, "no episode ends"),
    "no transition is left": ({"timeouts": np.ones(12, bool)}, "no transition"),
    "no episode ends": ({"terminals": np.zeros(12, bool), "timeouts": np.zeros(12, bool)}, "no episode ends"),
    "wide observations": ({"observations": np.zeros((12, 4), np.float32)}, "(4, 1) numbers"),
    "wide actions": ({"actions": np.zeros((12, 2), np.float32)}, "(3, 2) numbers"),
    "flat actions": ({"actions": np.zeros(12, np.float32)}, "(3,) numbers"),
    "a number for an array": ({"observations": np.float32(3)}, "observations must be numbers, one row"),
    "rewards as a column": ({"rewards": np.zeros((12, 1), np.float32)}, ""),  # would broadcast to (B, B)
    **{f"{key} as a column": ({key: np.zeros((12, 1), bool)}, f"{key} must be numbers, one row for each reward")
       for key in ("terminals", "timeouts")},
    **{f"no {key}": ({key: None}, f"{key}' doesn't exist") for key in d4rl_columns()},
    **{f"short {key}": ({key: value[:-1]}, "one row for each reward") for key, value in d4rl_columns().items()},
    **{f"{key} of {name}": ({key: value}, f"{key} must be numbers") for key in d4rl_columns()
       for name, value in (("text", TEXT), ("pairs", PAIRS), ("complex numbers", np.zeros(12, complex)))},
    **{f"{key} of {value}": ({key: np.where(np.arange(12) == 3, value, 0.0)}, "must be 0 or 1")
       for key in ("terminals", "timeouts") for value in (0.5, np.nan, -1, 2, np.inf)},
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_refused(tmp_path, case):
    columns, message = BAD_COLUMNS[case]
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns() | columns)
    answer = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)
    assert message in answer and str(path) in answer


@pytest.mark.parametrize("row", [2, 9])  # before and after the row at a time limit, which is left out
@pytest.mark.parametrize("key, value", [("observations", np.nan), ("actions", np.inf), ("rewards", -np.inf),
                                        ("rewards", np.nan), ("actions", 2.01), ("actions", -7)])
def test_bad_numbers_are_refused_by_the_files_row(tmp_path, key, value, row):
    """The row in the message is the file's, so that it can be found; Pendulum's box is +-2."""
    columns = d4rl_columns()
    columns[key][row] = value
    path = write_d4rl(tmp_path / "x.hdf5", columns)
    answer = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)
    found = f"next_observations are not finite or outside the action box, the first in row {row - 1}" \
        if key == "observations" else f"1 {key} are not finite or outside the action box, the first in row {row}"
    assert found in answer and str(path) in answer


def test_a_bad_number_beside_a_time_limit_counts_as_a_next_observation(tmp_path):
    columns = d4rl_columns()
    columns["observations"][7] = np.nan
    path = write_d4rl(tmp_path / "x.hdf5", columns)
    assert "next_observations" in refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)


@pytest.mark.parametrize("env_id, recorded_in", [("walker2d-medium-v2", "HalfCheetah-v4"),
                                                 ("halfcheetah-medium-v2", "Walker2d-v4"),
                                                 ("Walker2d-v5", "data.d4rl_tasks:HalfCheetah-v5")])
def test_another_environments_file_of_the_same_shape_is_refused(tmp_path, env_id, recorded_in):
    """HalfCheetah and Walker2d have the same shapes: only the name in the file tells them apart."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(obs_dim=17, act_dim=6), env_id=recorded_in)
    answer = refuse(tmp_path, "--env-id", env_id, "--dataset-path", path)
    assert f"was recorded in {recorded_in}, not in " in answer and str(path) in answer
    if env_id == "halfcheetah-medium-v2":
        assert load("walker2d-medium-v2", path)[2]["transitions"] == 10


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_hdf5_is_refused(tmp_path, share):
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(rows=5000))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert str(path) in refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)


def test_things_that_are_no_file(tmp_path):
    (tmp_path / "folder.hdf5").mkdir()
    (tmp_path / "page.hdf5").write_text("<html>not found</html>")
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        for key in d4rl_columns():
            file.create_group(key)
    for name in ("folder.hdf5", "page.hdf5", "groups.hdf5"):
        for env_id in ("Pendulum-v1", "hopper-medium-v2"):
            assert name in refuse(tmp_path, "--env-id", env_id, "--dataset-path", tmp_path / name)


def test_a_missing_file_is_asked_of_data_fetch(tmp_path, capfd):
    """It knows the task or does not; its exit code and its one line are the script's, which adds no other."""
    before = files(tmp_path)
    with pytest.raises(SystemExit) as caught:
        m.main([*SMALL, "--env-id", "nonsense-v0", "--runs-dir", str(tmp_path / "runs")])
    line, = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and "nonsense-v0" in line and files(tmp_path) == before


def test_a_missing_file_that_data_fetch_makes(own_folders, tmp_path, monkeypatch):
    """What it is called with, and where its file is looked for."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fetch.py").write_text(
        "import pathlib, shutil, sys\n"
        f"folder = pathlib.Path({str(own_folders)!r}) / 'd4rl'\n"
        "places = {'hopper-medium-replay-v2': 'hopper_medium_replay-v2', 'Pendulum-v1': 'flat/Pendulum-v1'}\n"
        "(folder / 'flat').mkdir(parents=True, exist_ok=True)\n"
        "name, = sys.argv[1:]\n"
        f"shutil.copy({str(tmp_path)!r} + '/' + name, folder / (places[name] + '.hdf5'))\n")
    write_d4rl(tmp_path / "hopper-medium-replay-v2", d4rl_columns(obs_dim=11, act_dim=3))
    write_d4rl(tmp_path / "Pendulum-v1", d4rl_columns())
    monkeypatch.setattr(m, "__file__", str(tmp_path / "mfql_offline.py"))
    for name in ("hopper-medium-replay-v2", "Pendulum-v1"):
        assert load(name)[2]["transitions"] == 10
    (tmp_path / "data" / "fetch.py").write_text("raise SystemExit(7)")
    assert load("Pendulum-v1")[2]["transitions"] == 10  # it is there: nobody is asked
    with pytest.raises(SystemExit) as caught:
        load("hopper-medium-v2")
    assert caught.value.code == 7


@pytest.mark.usefixtures("copied_alone")
def test_a_file_copied_alone_fetches_d4rls_locomotion_itself(own_folders, monkeypatch):
    """By one library call; torch.hub writes under another name first."""
    def download(url, path):
        asked.append((url, path))
        write_d4rl(path, d4rl_columns(obs_dim=17, act_dim=6))

    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        task, data, _ = load("halfcheetah-medium-expert-v2")
        assert task["env_id"] == "HalfCheetah-v4" and len(data["rewards"]) == 10
    name = "halfcheetah_medium_expert-v2.hdf5"
    assert asked == [(f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{name}", own_folders / "d4rl" / name)]


@pytest.mark.usefixtures("copied_alone")
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "antmaze-umaze-v2", "hopper-medium-v0", "walker2d-expert-v1",
                                    "nonsense-v0"])
def test_a_name_without_data_in_a_file_copied_alone(tmp_path, own_folders, env_id):
    """What was looked for, and two ways out; names of D4RL's older data are not taken for those of v2."""
    answer = refuse(tmp_path, "--env-id", env_id)
    assert f"{own_folders / 'd4rl' / 'flat' / env_id}.hdf5 is no file" in answer
    assert "data/fetch.py" in answer and "--dataset-path" in answer


@pytest.mark.usefixtures("copied_alone")
def test_no_network(tmp_path, monkeypatch):
    def fail(*more):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(m.BadInput, match="--env-id hopper-medium-v2, --dataset-path None: OSError: no route to host"):
        m.main([*SMALL, "--env-id", "hopper-medium-v2", "--runs-dir", str(tmp_path / "runs")])
    assert not files(tmp_path)


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch, copied_alone):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "d4rl"))
    assert str(tmp_path / "file") in refuse(tmp_path, "--env-id", "hopper-medium-v2")


@pytest.mark.parametrize("env_id, message", [
    ("Hopper-v3", "mujoco"),  # two kinds of error, depending on whether gymnasium-robotics is registered already
    ("GymV21Environment-v0", "shimmy"),  # ImportError without a name
    ("no_such_module:Foo-v0", "no_such_module"),  # and here ModuleNotFoundError without a name
    ("Nothing-v9", "Nothing"),
    ("CartPole-v1", "Discrete(2)"), ("Blackjack-v1", "Discrete(2)"), ("FrozenLake-v1", "Discrete(4)"),
    ("DataTestToy_image-v0", "(3, 1) numbers"), ("DataTestToy_text-v0", "TypeError"),
    ("DataTestToy_open_box-v0", "inf"),
])
def test_environments_that_cannot_be_used_are_refused(tmp_path, env_id, message):
    """Unknown names, packages that are missing, spaces that are no flat vectors of bounded numbers."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns())
    answer = refuse(tmp_path, "--env-id", env_id, "--dataset-path", path)
    assert message in answer and "pip install None" not in answer


# ---------------------------------------------------------------- D4RL names and scores
@pytest.mark.parametrize("name, random, expert, obs_dim, act_dim", [
    ("hopper", -20.272305, 3234.3, 11, 3), ("halfcheetah", -280.178953, 12135.0, 17, 6),
    ("walker2d", 1.629008, 4592.3, 17, 6), ("ant", -325.6, 3879.7, 111, 8)])
def test_d4rl_names_scores_and_environments(own_folders, name, random, expert, obs_dim, act_dim):
    """D4RL's published numbers, typed anew here, and the sizes of its observations and actions; six files each."""
    folder = own_folders / "d4rl"
    folder.mkdir()
    kinds = {"medium-replay": "medium_replay", "full-replay": "full_replay", "medium-expert": "medium_expert"}
    for i, kind in enumerate(("random", "medium", "expert", *kinds)):
        columns = d4rl_columns(obs_dim=obs_dim, act_dim=act_dim)
        columns["rewards"][0] = i
        write_d4rl(folder / f"{name}_{kinds.get(kind, kind)}-v2.hdf5", columns)
        task, data, _ = load(f"{name}-{kind}-v2")
        assert data["rewards"][0] == i
    env = m.make_env(task)
    assert task["reference"] == (random, expert) and env.spec.max_episode_steps == 1000
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))


@pytest.mark.parametrize("env_id", [
    "antmaze-giant-navigate-singletask-v0", "antmaze-giant-navigate-singletask-task1-v0",
    "humanoidmaze-medium-navigate-singletask-v0", "cube-double-play-singletask-task2-v0"])
def test_ogbench_names_are_not_taken_for_d4rl_names(env_id):
    """`antmaze-giant-navigate-singletask-v0` looks like an AntMaze name of D4RL, and is not."""
    assert m.task_defaults(env_id)["offline_steps"] == 1_000_000 and m.task_defaults(env_id)["reward_shift"] == 0


# ---------------------------------------------------------------- Minari
def collect(dataset_id, kind="flat", episodes=3, **metadata):
    """A Minari dataset of ToyEnv; returns the actions and what FlattenObservation shows of the same episodes."""
    pytest.importorskip("jax", reason="Minari makes datasets with jax: pip install minari[create]")
    recorder = minari.DataCollector(gym.make("DataTestToy-v0", kind=kind))
    shown, actions, flat = [], [], gym.make("DataTestToy-v0", kind=kind)
    if kind != "flat":
        flat = gym.wrappers.FlattenObservation(flat)
    draw = np.random.default_rng(0)
    for seed in range(episodes):
        recorder.reset(seed=seed)
        shown.append([flat.reset(seed=seed)[0]])
        done = False
        while not done:
            actions.append(draw.uniform(-0.9, 0.9, 2).astype(np.float32))
            _, _, terminated, truncated, _ = recorder.step(actions[-1])
            shown[-1].append(flat.step(actions[-1])[0])
            done = terminated or truncated
    recorder.create_dataset(dataset_id, **metadata)
    recorder.close()
    return np.array(actions), np.array(shown)


def minari_folder():
    return pathlib.Path(os.environ["MINARI_DATASETS_PATH"])


@pytest.mark.parametrize("kind", ["flat", "goal", "goal_unsorted", "nested"])
@pytest.mark.parametrize("where", ["cache", "dataset_path"])
def test_minari_rows_masks_and_order_of_entries(kind, where, tmp_path):
    """All four rows of every episode of three; the first and third terminate, the second is cut off.

    The order of a dict's entries is FlattenObservation's on the evaluation environment, which the policy will see.
    """
    actions, shown = collect("test/toy-v0", kind)
    if where == "dataset_path":
        shutil.move(minari_folder(), tmp_path / "elsewhere")
    task, data, about = load("test/toy-v0", tmp_path / "elsewhere" if where == "dataset_path" else None)
    width = shown.shape[2]
    assert shown.shape[:2] == (3, 5) and m.make_env(task).observation_space.shape == (width,)
    assert width == {"flat": 2, "goal": 8, "goal_unsorted": 8, "nested": 8}[kind]  # nothing dropped, no goal either
    shown = shown.astype(np.float32)
    np.testing.assert_array_equal(data["observations"], shown[:, :-1].reshape(12, width))
    np.testing.assert_array_equal(data["next_observations"], shown[:, 1:].reshape(12, width))  # true last ones too
    np.testing.assert_array_equal(data["masks"], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(data["rewards"], [1, 2, 3, 4] * 3)
    np.testing.assert_allclose(data["actions"], actions, rtol=1e-6)
    assert (about["episodes"], about["best"], about["worst"]) == (3, 10, 10)
    assert {value.dtype for value in data.values()} == {np.dtype(np.float32)}


def test_minari_observations_that_are_no_vectors_are_refused(tmp_path):
    collect("test/toy-v0", "image")
    assert "test/toy-v0" in refuse(tmp_path, "--env-id", "test/toy-v0")


@pytest.mark.parametrize("low, high", [(5.0, 5.0), (6.0, 5.0), (np.nan, 5.0), (0.0, np.inf)])
def test_reference_returns_that_give_no_score_are_refused(tmp_path, low, high):
    write_d4rl(tmp_path / "data.hdf5", d4rl_columns(), ref_min_score=low, ref_max_score=high)
    message = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", str(tmp_path / "data.hdf5"))
    assert "must lie below ref_max_score" in message


@pytest.mark.parametrize("column, message", [
    (np.array([0, 0, 2]), "terminations must be 0 or 1"), (np.array([0.0, np.nan, 1]), "terminations must be 0 or 1"),
    (np.zeros((3, 1)), "masks must be numbers, one row"), (np.zeros(3, complex), "masks must be numbers")])
def test_masks_that_are_none_are_refused(column, message):
    """Whatever a Minari data set calls a termination; HDF5 files are checked as they are read."""
    env = m.make_env(dict(env_id="Pendulum-v1", kwargs={}, reference=None))
    data = dict(observations=np.zeros((3, 3)), actions=np.zeros((3, 1)), rewards=np.zeros(3), masks=1 - column,
                next_observations=np.zeros((3, 3)))
    with pytest.raises(m.BadInput, match=message):
        m.prepare(env, data, np.arange(3), [0.0])


def test_bundled_dataset():
    """The data of the run without arguments, as the README states them; also covers Minari where jax is missing."""
    task, data, about = load(m.Args().env_id)
    assert data["observations"].shape == (90_923, 11) and data["actions"].shape == (90_923, 3)
    assert about["episodes"] == 433 and abs(about["mean_return"] - 580.47) < 0.01
    assert task["reference"] == [-20.272305, 3234.3] or task["reference"] == (-20.272305, 3234.3)
    ends = np.flatnonzero((data["observations"][1:] != data["next_observations"][:-1]).any(1))
    assert len(ends) == 432  # every episode's last observation is its own
    assert (data["masks"] == 0).sum() > 300 and (data["masks"][ends] == 1).sum() > 0  # falls end, time limits do not


def test_minari_from_buffers(tmp_path):
    """float64 buffers, written without any environment running, for a real environment (Pendulum, box +-2)."""
    pytest.importorskip("jax", reason="Minari makes datasets with jax: pip install minari[create]")
    from minari.data_collector import EpisodeBuffer

    draw = np.random.default_rng(0)
    observations, torques = draw.uniform(-1, 1, (2, 6, 3)), draw.uniform(-2, 2, (2, 5, 1))
    buffers = [EpisodeBuffer(id=i, observations=observations[i].astype(np.float32), rewards=[-1.0, 2.0, 0.5, 0.0, 1.0],
                             actions=torques[i].astype(np.float32), terminations=[False] * 4 + [i == 1],
                             truncations=[False] * 4 + [i == 0]) for i in range(2)]
    minari.create_dataset_from_buffers("test/pendulum-v0", buffer=buffers, env="Pendulum-v1")
    _, data, about = load("test/pendulum-v0")
    np.testing.assert_array_equal(data["masks"], [1] * 9 + [0])
    np.testing.assert_allclose(data["actions"], torques.reshape(10, 1) / 2, atol=1e-5)
    np.testing.assert_allclose(data["next_observations"], observations[:, 1:].reshape(10, 3), rtol=1e-6)
    assert about["mean_return"] == about["best"] == 2.5


def test_minari_evaluates_in_the_evaluation_environment():
    """With its arguments and its time limit."""
    collect("test/toy-v0", eval_env=gym.make("DataTestToy-v0", length=9, max_episode_steps=7))
    env = m.make_env(load("test/toy-v0")[0])
    assert env.unwrapped.length == 9 and env.spec.max_episode_steps == 7


@pytest.mark.parametrize("left_in", [("ref_min_score", "ref_max_score"), (), ("ref_min_score",), ("ref_max_score",)])
def test_minari_reference_scores(left_in):
    """Both in the metadata: percent of the way between them; else neither raw returns nor 0..1 may pass for a score.
    ToyEnv's return is always 1 + 2 + 3 + 4 = 10."""
    collect("test/scored-v0", ref_min_score=4.0, ref_max_score=16.0)
    edit_metadata(minari_folder() / "test" / "scored-v0" / "data", *{"ref_min_score", "ref_max_score"} - set(left_in))
    task = load("test/scored-v0")[0]
    args = m.Args(eval_episodes=2, policy_width=8, policy_depth=1, critic_width=8, critic_depth=1)
    metrics = m.evaluate(m.Agent(2, 2, args, torch.device("cpu")), task, args, 1)
    assert metrics["eval/episodic_return"] == 10
    assert metrics.get("eval/normalized_score") == (pytest.approx(50) if len(left_in) == 2 else None)


def lost_connection(*args, **kwargs):
    """huggingface_hub lets its HTTP client's own errors through, which are no OSError."""
    raise Exception("connection lost")  # noqa: TRY002


def unknown_to_the_server(*args, **kwargs):
    raise ValueError("Couldn't find any version for dataset test/none in the remote Farama server")


@pytest.mark.parametrize("download, reason", [(unknown_to_the_server, "Couldn't find any"),
                                              (lost_connection, "connection lost")])
def test_minari_id_that_does_not_exist(tmp_path, monkeypatch, download, reason):
    monkeypatch.setattr(minari, "load_dataset", download)
    answer = refuse(tmp_path, "--env-id", "test/none-v0")
    assert reason in answer and "--env-id test/none-v0" in answer


def test_minari_dataset_path_without_the_dataset(tmp_path):
    collect("test/toy-v0")
    for folder in (tmp_path, tmp_path / "nothing", minari_folder() / "test"):  # never a silent look elsewhere
        answer = refuse(tmp_path, "--env-id", "test/toy-v0", "--dataset-path", folder)
        assert "test/toy-v0" in answer and str(folder) in answer


def edit_episode(data, key, change):
    with h5py.File(data / "main_data.hdf5", "a") as file:
        value = file[f"episode_1/{key}"][()]
        del file[f"episode_1/{key}"]
        if change is not None:
            file[f"episode_1/{key}"] = change(value)


def edit_metadata(data, *keys, limit=None, **changed):
    metadata = json.loads((data / "metadata.json").read_text()) | changed
    if limit is not None:
        metadata["env_spec"] = json.dumps({**json.loads(metadata["env_spec"]), "max_episode_steps": limit})
    (data / "metadata.json").write_text(json.dumps({k: v for k, v in metadata.items() if k not in keys}))


MINARI_DAMAGE = {
    "no metadata": lambda data: (data / "metadata.json").unlink(),
    "half the metadata": lambda data: os.truncate(data / "metadata.json", 200),
    "no HDF5": lambda data: (data / "main_data.hdf5").unlink(),
    "half the HDF5": lambda data: os.truncate(data / "main_data.hdf5", 3000),
    "an episode without rewards": lambda data: edit_episode(data, "rewards", None),
    "a reward too few": lambda data: edit_episode(data, "rewards", lambda value: value[:-1]),
    "no last observation": lambda data: edit_episode(data, "observations", lambda value: value[:-1]),
    "NaN": lambda data: edit_episode(data, "observations", lambda value: value * np.nan),
    "no environment": lambda data: edit_metadata(data, "env_spec"),
    "neither environment nor space": lambda data: edit_metadata(data, "env_spec", "observation_space"),
    "no time limit (Gymnasium's -1)": lambda data: edit_metadata(data, limit=-1),  # evaluating might never end
    "a time limit of one step": lambda data: edit_metadata(data, limit=True),
    "fewer episodes than there are": lambda data: edit_metadata(data, total_episodes=1),  # would train on one
    "more steps than there are": lambda data: edit_metadata(data, total_steps=10**9),
    "numbers beyond float32": lambda data: edit_episode(data, "rewards", lambda value: value + 1e300),
}


@pytest.mark.parametrize("case", MINARI_DAMAGE)
def test_damaged_minari_datasets_are_refused(tmp_path, case):
    collect("test/toy-v0")
    MINARI_DAMAGE[case](minari_folder() / "test" / "toy-v0" / "data")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        assert "test/toy-v0" in refuse(tmp_path, "--env-id", "test/toy-v0")
    assert not said  # NumPy's would be another line


# ---------------------------------------------------------------- no code from data
@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A file that exists once somebody has run what the attacks below say: a command, or the module `evil`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield tmp_path / "trace"
    sys.modules.pop("evil", None)


ATTACKS = {  # changes of the environment in a Minari data set; {trace} is the file that must not be made
    "a command": dict(id="Evil-v0", entry_point="os:system", kwargs=dict(command="touch {trace}")),
    "a command under a known name": dict(entry_point="os:system", kwargs=dict(command="touch {trace}")),
    "a module": dict(id="evil:Evil-v0"),
    "a module with a known name": dict(id="evil:Pendulum-v1"),
    "a module behind a trusted one": dict(id="data.d4rl_tasks:evil:Pendulum-v1"),
    "a wrapper": dict(additional_wrappers=[dict(name="x", entry_point="evil:Wrapper", kwargs={})]),
    "a vector entry point": dict(vector_entry_point="evil:Envs", entry_point="evil:Env"),
}


def attacked(folder, trace, attack, key="env_spec"):
    """A Minari data set of Pendulum whose environment is another; returns the environment's description."""
    from minari.data_collector import EpisodeBuffer

    buffer = EpisodeBuffer(id=0, observations=np.zeros((5, 3), np.float32), actions=np.zeros((4, 1), np.float32),
                           rewards=[0.0] * 4, terminations=[False] * 4, truncations=[False] * 3 + [True])
    minari.create_dataset_from_buffers("test/evil-v0", buffer=[buffer], env="Pendulum-v1")
    path = minari_folder() / "test" / "evil-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    changes = json.loads(json.dumps(ATTACKS[attack]).replace("{trace}", str(trace)))
    spec = {**json.loads(metadata["env_spec"]), **changes}
    path.write_text(json.dumps({**metadata, key: json.dumps(spec)}))
    shutil.copytree(minari_folder(), folder)
    return spec


@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_minari_data_set_does_not_run(tmp_path, trace, attack, key):
    """Whatever its environment's description says: what is built has its entry point from Gymnasium's registry."""
    spec = attacked(tmp_path / "sets", trace, attack, key)
    argv = [*SMALL, "--env-id", "test/evil-v0", "--dataset-path", str(tmp_path / "sets"), "--runs-dir",
            str(tmp_path / "runs")]
    try:
        m.main(argv)  # may be as harmless as the environment that the registry has
        assert attack in ("a wrapper", "a vector entry point")
    except m.BadInput:
        assert not (tmp_path / "runs").exists()
    assert not trace.exists()
    if attack.startswith("a command"):  # the attack is a real one
        with pytest.raises(Exception, match="reset|int|Env"):
            gym.make(gym.envs.registration.EnvSpec.from_json(json.dumps(spec)), disable_env_checker=True).reset()
        assert trace.exists()


def test_code_behind_a_checkpoint_does_not_run(tmp_path, trace):
    """Neither by the data set that its flags name, nor by its task."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns())
    argv = [*SMALL, "--env-id", "Pendulum-v1", "--dataset-path", str(path), "--runs-dir", str(tmp_path / "runs")]
    assert m.main(argv) == 0
    run, = (tmp_path / "runs").iterdir()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    attacked(tmp_path / "sets", trace, "a command")
    save_sealed(dict(state, args=dict(state["args"], env_id="test/evil-v0", dataset_path=str(tmp_path / "sets"))),
                run / "checkpoint.pt")
    with pytest.raises(m.BadInput):
        m.main(["--resume", str(run)])
    names = ("os:system", "evil:Pendulum-v1", "data.d4rl_tasks:evil:Pendulum-v1", "evil:Pendulum-v1\n",
             " evil:Pendulum-v1")
    tasks = [dict(env_id=name, kwargs=dict(command=f"touch {trace}"), reference=None) for name in names]
    tasks += [dict(task, kwargs={}) for task in tasks]
    tasks.append(dict(tasks[0], env_id="Pendulum-v1", kwargs=dict(entry_point="os:system", command=f"touch {trace}")))
    spec = {**json.loads(gym.spec("Pendulum-v1").to_json()), "entry_point": "os:system",
            "kwargs": dict(command=f"touch {trace}")}
    for task in [*tasks, dict(tasks[0], env_id=spec), dict(tasks[0], env_id=json.dumps(spec))]:
        save_sealed(dict(state, task=task), run / "checkpoint.pt")
        with pytest.raises(m.BadInput):
            m.main(["--evaluate", str(run)])
        assert not trace.exists(), task


def test_code_named_in_an_hdf5_file_runs_only_when_asked_for(tmp_path, trace):
    """Its environment may be of a module that registers it: that is only imported where --env-id says so, too."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(), env_id="evil:Pendulum-v1")
    answer = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)
    assert "asks for the import of evil; allow it with --env-id evil:Pendulum-v1" in answer and not trace.exists()
    argv = [*SMALL, "--dataset-path", str(path), "--runs-dir", str(tmp_path / "runs")]
    assert m.main([*argv, "--env-id", "evil:Pendulum-v1"]) == 0 and trace.exists()


# ---------------------------------------------------------------- real files
@pytest.mark.parametrize("name, env_id, rows, episodes, mean, best, score", [
    ("hopper_medium-replay-like.hdf5", "hopper-medium-v2", 199_998, 972, 535, 3199, 17.1),
    ("halfcheetah_medium-replay-like.hdf5", "halfcheetah-medium-replay-v2", 200_000, 200, 2699, 5872, 24.0),
])
def test_real_d4rl_files(name, env_id, rows, episodes, mean, best, score):
    """The figures of the table in ../shared/data/README.md."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not on this machine")
    task, data, about = load(env_id, SHARED / name)
    with h5py.File(SHARED / name) as file:
        timeouts = file["timeouts"][()]
        assert len(timeouts) == rows
    assert len(data["rewards"]) == (~timeouts[:-1]).sum()
    assert (about["episodes"], round(about["mean_return"]), round(about["best"])) == (episodes, mean, best)
    low, high = task["reference"]
    assert round(100 * (about["mean_return"] - low) / (high - low), 1) == score
