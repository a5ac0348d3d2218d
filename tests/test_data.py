"""The data half of `mfql_offline.py`: what is loaded, what is refused and how, and the download.

No test needs a network or touches the home folder: servers are on 127.0.0.1, every folder is a temporary one. Each
trap of data (time limits, goals, reference scores, reward timing, ...) has a test that fails if it is walked into.
"""
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces

import mfql_offline as m

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"  # real files, on development machines only
D4RL_URLS, CLOSED = m.D4RL_URLS, "http://127.0.0.1:9/{folder}/{file}"  # nobody listens at port 9
CUBE = "cube-single-play-singletask-task2-v0"
SMALL = ["--no-cuda", "--policy-width", "8", "--policy-depth", "1", "--critic-width", "8", "--critic-depth", "1",
         "--offline-steps", "1", "--eval-episodes", "1"]  # ends at once if a test's bad input is not refused
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folders")]


class ToyEnv(gym.Env):
    """Random observations from any space; terminates or is cut off (truncated) after `length` steps, in turn."""

    metadata = {"render_modes": []}

    def __init__(self, kind="flat", length=4, render_mode=None):
        small, entry = spaces.Box(-9, 9, (2,), np.float32), spaces.Box(-9, 9, (2, 2), np.float64)
        goal = {"observation": entry, "desired_goal": small, "achieved_goal": small}
        self.observation_space = {
            "flat": small,
            "goal": spaces.Dict(goal),  # sorted by gymnasium
            "goal_unsorted": spaces.Dict(**goal),  # not sorted by gymnasium, but sorted in a Minari file
            "nested": spaces.Dict(z=spaces.Dict(b=small, a=entry), a=spaces.Tuple((small, entry))),
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
    """Home, caches and servers that belong to this test alone."""
    home = tmp_path_factory.mktemp("home")
    for name, folder in (("HOME", "."), ("D4RL_DATASET_DIR", "d4rl"), ("MINARI_DATASETS_PATH", "minari")):
        monkeypatch.setenv(name, str(home / folder))
    monkeypatch.setattr(m, "D4RL_URLS", (CLOSED, CLOSED + "?mirror"))
    return home


def d4rl_columns(rows=12, obs_dim=3, act_dim=1):
    """Row i is recognised by observation i, i + 0.25, ... and reward i; terminal at row 3, time limit at row 7."""
    return {"observations": (np.arange(rows)[:, None] + 0.25 * np.arange(obs_dim)).astype(np.float32),
            "actions": np.linspace(-0.9, 0.9, rows * act_dim).reshape(rows, act_dim).astype(np.float32),
            "rewards": np.arange(rows, dtype=np.float32),
            "terminals": np.arange(rows) == 3, "timeouts": np.arange(rows) == 7}


def write_d4rl(path, columns, env_id=None):
    """An HDF5 file in D4RL's layout; columns that are None are left out."""
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            if value is not None:
                file[key] = value
        if env_id is not None:
            file.attrs["env_id"] = env_id
    return str(path)


def load(env_id, dataset_path):
    args = m.Args(env_id=env_id, dataset_path=None if dataset_path is None else str(dataset_path))
    return m.load_dataset(args, m.make_env(args))


def files(*folders):
    """Every file below, with its contents: equal before and after means that nothing was written."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refuse(tmp_path, *flags):
    """The message with which this command line is refused; checks that it is one line and leaves nothing behind."""
    before = files(tmp_path, pathlib.Path(os.environ["HOME"]))
    with pytest.raises(m.BadInput) as caught:
        m.main([*SMALL, "--runs-dir", str(tmp_path / "runs"), *map(str, flags)])
    assert "\n" not in str(caught.value)
    assert files(tmp_path, pathlib.Path(os.environ["HOME"])) == before
    assert not (tmp_path / "runs").exists()
    return str(caught.value)


# ---------------------------------------------------------------- D4RL layout
@pytest.mark.parametrize("flag_dtype", [bool, np.uint8, np.float32])
def test_d4rl_rows_masks_and_returns(tmp_path, flag_dtype):
    columns = d4rl_columns()
    columns |= {key: columns[key].astype(flag_dtype) for key in ("terminals", "timeouts")}
    data, returns = load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]  # 7 is at a time limit and 11 the last row: no next observation
    np.testing.assert_array_equal(data["observations"], columns["observations"][kept])
    np.testing.assert_array_equal(data["next_observations"], columns["observations"][kept] + 1)
    np.testing.assert_array_equal(data["rewards"], kept)
    np.testing.assert_allclose(data["actions"], columns["actions"][kept] / 2, rtol=1e-6)  # Pendulum's box is +-2
    np.testing.assert_array_equal(data["masks"], [row != 3 for row in kept])  # the time limit is no termination
    np.testing.assert_array_equal(returns, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])  # the unfinished third does not count
    assert all(value.dtype == np.float32 and len(value) == len(kept) for value in data.values())


@pytest.mark.parametrize("seed", range(5))
def test_d4rl_against_a_plain_loop(tmp_path, seed):
    """Random episode ends, a terminal and a time limit in the same row among them, against the rule written out."""
    columns, draw = d4rl_columns(rows=200), np.random.default_rng(seed)
    columns |= {"terminals": draw.random(200) < 0.1, "timeouts": draw.random(200) < 0.1}
    data, returns = load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))
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


def test_float64_files_become_float32(tmp_path):
    columns = {k: v.astype(np.float64) for k, v in d4rl_columns().items()}
    data, returns = load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", columns))
    assert {value.dtype for value in data.values()} == {np.dtype(np.float32)}
    assert returns.dtype == np.float64


@pytest.mark.parametrize("env_id", ["Pendulum-v1", np.bytes_(b"Pendulum-v1"), "Pendulum-v0"])
def test_the_environment_named_in_the_file_may_be_bytes_or_another_version(tmp_path, env_id):
    assert len(load("Pendulum-v1", write_d4rl(tmp_path / "x.hdf5", d4rl_columns(), env_id))[0]["rewards"]) == 10


# ---------------------------------------------------------------- action boxes
def test_pendulum_actions_are_scaled_with_the_environment(tmp_path):
    """Pendulum's torques lie in +-2: a data action and the environment's action of the same number mean one torque."""
    torques = np.linspace(-2, 2, 12, dtype=np.float32)[:, None]
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns() | {"actions": torques, "timeouts": np.zeros(12, bool)})
    args = m.Args(env_id="Pendulum-v1", dataset_path=path)
    env = m.make_env(args)
    data, _ = m.load_dataset(args, env)
    np.testing.assert_allclose(data["actions"], torques[:11] / 2, atol=1e-4)
    assert np.abs(data["actions"]).max() < 1 and data["actions"].dtype == np.float32
    assert isinstance(env, gym.wrappers.RescaleAction) and (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for action, torque in zip(data["actions"], torques):
        env.step(action)
        assert env.unwrapped.last_u == pytest.approx(torque[0], abs=1e-4)


def test_a_crooked_action_box(tmp_path):
    """Box [-1, 3] x [0, 10]: each component by its own bounds."""
    actions = np.array([[-1, 0], [3, 10], [1, 5], [0, 7.5]] * 3, np.float32)
    columns = d4rl_columns(obs_dim=2) | {"actions": actions, "timeouts": np.arange(12) == 11}
    path = write_d4rl(tmp_path / "x.hdf5", columns)
    data, _ = load("DataTestToy_crooked_box-v0", path)
    np.testing.assert_allclose(data["actions"][:4], [[-1, -1], [1, 1], [0, 0], [-0.5, 0.5]], atol=2e-5)


def test_a_float64_action_box_gives_float32_actions(tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(obs_dim=2, act_dim=2))
    assert load("DataTestToy_float64_box-v0", path)[0]["actions"].dtype == np.float32


# ---------------------------------------------------------------- bad input, D4RL layout and names
BAD_COLUMNS = {
    "no transition is left": ({"timeouts": np.ones(12, bool)}, "transition"),
    "one row": ({k: v[:1] for k, v in d4rl_columns().items()}, "transition"),
    "no rows": ({k: v[:0] for k, v in d4rl_columns().items()}, "0"),
    "no episode ends": ({"terminals": np.zeros(12, bool), "timeouts": np.zeros(12, bool)}, "episode"),
    "wide observations": ({"observations": np.zeros((12, 4), np.float32)}, "observations have shape (4,)"),
    "wide actions": ({"actions": np.zeros((12, 2), np.float32)}, "actions have shape (2,)"),
    "flat actions": ({"actions": np.zeros(12, np.float32)}, "actions have shape"),
    "rewards as a column": ({"rewards": np.zeros((12, 1), np.float32)}, "rewards"),  # would broadcast to (B, B)
    "terminals as a column": ({"terminals": np.zeros((12, 1), bool)}, "terminals"),
    "timeouts as a column": ({"timeouts": np.zeros((12, 1), bool)}, "timeouts"),
    "a number for an array": ({"observations": np.float32(3)}, "x.hdf5"),
    **{f"no {key}": ({key: None}, f"{key} missing") for key in d4rl_columns()},
    **{f"short {key}": ({key: value[:-1]}, f"{key} 11") for key, value in d4rl_columns().items()},
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_refused(tmp_path, case):
    columns, message = BAD_COLUMNS[case]
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns() | columns)
    answer = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)
    assert message in answer and path in answer


@pytest.mark.parametrize("row", [2, 9])  # before and after the row at a time limit, which is left out
@pytest.mark.parametrize("key, value", [("observations", np.nan), ("actions", np.inf), ("rewards", -np.inf),
                                        ("rewards", np.nan), ("actions", 2.01), ("actions", -7)])
def test_bad_numbers_are_refused_by_the_files_row(tmp_path, key, value, row):
    """The row in the message is the file's, so that it can be found; Pendulum's box is +-2."""
    columns = d4rl_columns()
    columns[key][row] = value
    path = write_d4rl(tmp_path / "x.hdf5", columns)
    answer = refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)
    assert f"row {row}" in answer and key in answer and path in answer
    assert "1 rows" in answer or "1 actions" in answer


def test_another_environments_file_of_the_same_shape_is_refused(tmp_path):
    """HalfCheetah and Walker2d have the same shapes: only the name in the file tells them apart."""
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(obs_dim=17, act_dim=6), "HalfCheetah-v4")
    answer = refuse(tmp_path, "--env-id", "walker2d-medium-v2", "--dataset-path", path)
    assert "HalfCheetah-v4" in answer and "walker2d-medium-v2" in answer
    assert len(load("halfcheetah-medium-v2", path)[0]["rewards"]) == 10


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_hdf5_is_refused(tmp_path, share):
    path = pathlib.Path(write_d4rl(tmp_path / "x.hdf5", d4rl_columns(rows=5000)))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert str(path) in refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path)


def test_damaged_hdf5_never_ends_in_a_traceback(tmp_path):
    """Garbage in the file's tables: h5py raises OSError, KeyError or RuntimeError. All of them are bad input."""
    path, draw = pathlib.Path(write_d4rl(tmp_path / "x.hdf5", d4rl_columns())), np.random.default_rng(0)
    whole, refused = path.read_bytes(), 0
    for start in draw.integers(0, min(4000, len(whole)), 150):
        path.write_bytes(whole[:start] + draw.bytes(32) + whole[start + 32:])
        try:
            m.load_d4rl(m.Args(env_id="Pendulum-v1", dataset_path=str(path)))
        except m.BadInput:
            refused += 1
    assert refused > 20


def test_things_that_are_no_file(tmp_path):
    (tmp_path / "folder.hdf5").mkdir()
    (tmp_path / "page.hdf5").write_text("<html>not found</html>")
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        for key in d4rl_columns():
            file.create_group(key)
    for name in ("missing.hdf5", "folder.hdf5", "page.hdf5", "groups.hdf5"):
        for env_id in ("Pendulum-v1", "hopper-medium-v2"):
            with pytest.raises(m.BadInput, match=name):
                m.load_d4rl(m.Args(env_id=env_id, dataset_path=str(tmp_path / name)))


@pytest.mark.parametrize("env_id, message", [
    ("nonsense-v0", "nonsense"),
    ("", "is empty"),
    ("Hopper-v3", "Hopper-v3"),  # gymnasium raises ImportError, unless gymnasium-robotics is registered already
    ("GymV21Environment-v0", "shimmy"),  # ImportError without a name
    ("no_such_module:Foo-v0", "no_such_module"),  # and here ModuleNotFoundError without a name
    ("Pendulum-v1", "--dataset-path"),  # exists, but its data were not given
    ("antmaze-umaze-v1", "not supported"), ("antmaze-large-v2", "not supported"),
    ("antmaze-medium-play-v0", "not supported"), ("kitchen-complete-v1", "not supported"),
    ("kitchen-new-v0", "not supported"), ("hopper-medium-v0", "not supported"),
    ("pen-human-v0", "not supported"), ("walker2d-expert-v1", "not supported"),
])
def test_bad_names_are_refused(tmp_path, env_id, message):
    assert message in refuse(tmp_path, "--env-id", env_id)


@pytest.mark.parametrize("env_id, message", [
    ("CartPole-v1", "actions"), ("FrozenLake-v1", "observations"), ("Blackjack-v1", "actions"),
    ("DataTestToy_image-v0", "observations"), ("DataTestToy_text-v0", "observations"),
    ("DataTestToy_open_box-v0", "actions"),
])
def test_spaces_that_are_no_flat_vectors_of_bounded_numbers_are_refused(env_id, message):
    with pytest.raises(m.BadInput, match=message) as caught:
        m.make_env(m.Args(env_id=env_id, dataset_path="x.hdf5"))
    assert env_id in str(caught.value)


def test_runs_dir_that_cannot_be_written(tmp_path):
    path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns())
    (tmp_path / "file").write_text("mine")
    runs = tmp_path / "file" / "runs"
    assert "--runs-dir" in refuse(tmp_path, "--env-id", "Pendulum-v1", "--dataset-path", path, "--runs-dir", runs)


@pytest.mark.parametrize("case", ["other environment", "folder"])
def test_exit_code_2_and_one_line_on_stderr(tmp_path, case):
    """The true process. A folder in place of the file matters because HDF5's own message has two lines."""
    (tmp_path / "folder.hdf5").mkdir()
    path = tmp_path / "folder.hdf5"
    if case == "other environment":
        path = write_d4rl(tmp_path / "x.hdf5", d4rl_columns(obs_dim=17, act_dim=6), "HalfCheetah-v4")
    command = [sys.executable, m.__file__, *SMALL, "--env-id", "walker2d-medium-v2", "--dataset-path", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("mfql_offline: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert str(path) in done.stderr and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- D4RL names and scores
def test_every_d4rl_name_has_its_folder_and_file():
    for task, kind in itertools.product(("halfcheetah", "hopper", "walker2d", "ant"), (
            "random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")):
        file = {"medium-replay": "medium_replay", "full-replay": "full_replay", "medium-expert": "medium_expert"}
        assert m.d4rl_task(f"{task}-{kind}-v2") == (task, "gym_mujoco_v2", f"{task}_{file.get(kind, kind)}-v2.hdf5")
    for task, kind in itertools.product(("pen", "door", "hammer", "relocate"), ("human", "cloned", "expert")):
        assert m.d4rl_task(f"{task}-{kind}-v1") == (task, "hand_dapg_v1", f"{task}-{kind}-v1.hdf5")
    assert m.d4rl_task("Hopper-v5") is None and m.d4rl_task("mujoco/hopper/medium-v0") is None
    _, folder, file = m.d4rl_task("walker2d-full-replay-v2")
    assert [url.format(folder=folder, file=file) for url in D4RL_URLS] == [
        "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/walker2d_full_replay-v2.hdf5",
        "https://huggingface.co/datasets/imone/D4RL/resolve/main/walker2d_full_replay-v2.hdf5"]


@pytest.mark.parametrize("env_id, random, expert, obs_dim, act_dim", [
    ("hopper-medium-v2", -20.272305, 3234.3, 11, 3), ("halfcheetah-medium-v2", -280.178953, 12135.0, 17, 6),
    ("walker2d-medium-v2", 1.629008, 4592.3, 17, 6), ("ant-medium-v2", -325.6, 3879.7, 111, 8),
    ("pen-human-v1", 96.262799, 3076.8331017826877, 45, 24), ("door-human-v1", -56.512833, 2880.5693087298737, 39, 28),
    ("hammer-human-v1", -274.856578, 12794.134825156867, 46, 26),
    ("relocate-human-v1", -6.425911, 4233.877797728884, 39, 30),
])
def test_d4rl_reference_scores_and_environments(env_id, random, expert, obs_dim, act_dim):
    """D4RL's published numbers, typed anew here, and the sizes of its observations and actions."""
    args = m.Args(env_id=env_id)
    reference = m.reference_scores(args)
    assert m.normalized_score(expert, reference) == pytest.approx(100)
    assert m.normalized_score(random, reference) == pytest.approx(0, abs=1e-9)
    assert m.normalized_score((random + expert) / 2, reference) == pytest.approx(50)
    if env_id.endswith("-v1"):
        pytest.importorskip("gymnasium_robotics")
    env = m.make_env(args)
    assert (env.observation_space.shape, env.action_space.shape) == ((obs_dim,), (act_dim,))
    assert env.spec.max_episode_steps == {"pen-human-v1": 100}.get(env_id, 200 if env_id.endswith("-v1") else 1000)


def test_gymnasium_ids_have_no_reference_scores():
    assert m.reference_scores(m.Args(env_id="Hopper-v4", dataset_path="x.hdf5")) is None


@pytest.mark.parametrize("env_id", [
    "antmaze-giant-navigate-singletask-v0", "antmaze-giant-navigate-singletask-task1-v0", CUBE,
    "humanoidmaze-medium-navigate-singletask-v0", "cube-double-play-singletask-task2-v0"])
def test_ogbench_names_are_not_taken_for_d4rl_names(env_id):
    """`antmaze-giant-navigate-singletask-v0` looks like an AntMaze name of D4RL, and is not."""
    assert m.task_defaults(env_id).get("offline_steps", 1_000_000) == 1_000_000
    assert m.source(m.Args(env_id=env_id)) == "ogbench"


# ---------------------------------------------------------------- download
def answer_whole(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def answer_without_length(handler, body):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body)


def answer_404(handler, body):
    handler.send_error(404)


def answer_cut(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:len(body) // 2])


def answer_cut_chunk(handler, body):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(f"{len(body):x}\r\n".encode() + body[:len(body) // 2])


def answer_half_a_file(handler, body):
    answer_whole(handler, body[:len(body) // 2])


def answer_html(handler, body):
    answer_whole(handler, b"<html>please log in</html>")


def answer_missing_key(handler, body):
    buffer = io.BytesIO()
    write_d4rl(buffer, d4rl_columns(obs_dim=11, act_dim=3) | {"timeouts": None})
    answer_whole(handler, buffer.getvalue())


def answer_unequal_rows(handler, body):
    buffer = io.BytesIO()
    write_d4rl(buffer, d4rl_columns(obs_dim=11, act_dim=3) | {"rewards": np.zeros(5, np.float32)})
    answer_whole(handler, buffer.getvalue())


def answer_nothing(handler, body):
    handler.close_connection = True


def answer_garbage(handler, body):
    handler.wfile.write(b"this is not HTTP\r\n\r\n")


def answer_too_late(handler, body):
    time.sleep(3)


def answer_hanging(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:len(body) // 2])
    handler.wfile.flush()
    time.sleep(3)


BAD_ANSWERS = [answer_404, answer_cut, answer_cut_chunk, answer_half_a_file, answer_html, answer_missing_key,
               answer_unequal_rows, answer_nothing, answer_garbage, answer_too_late, answer_hanging]


@pytest.fixture
def servers(monkeypatch, tmp_path):
    """`answers` maps the first folder of an address to what it answers; official and mirror, as `m.D4RL_URLS`."""
    answers, asked, urlopen = {}, [], urllib.request.urlopen

    def patient(url, timeout):
        assert timeout <= 10
        return urlopen(url, timeout=timeout / 10)  # a test need not wait as long

    monkeypatch.setattr(urllib.request, "urlopen", patient)
    body = pathlib.Path(write_d4rl(tmp_path / "served.hdf5", d4rl_columns(obs_dim=11, act_dim=3))).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            answers[self.path.split("/")[1]](self, body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(m, "D4RL_URLS", (address + "/official/{folder}/{file}", address + "/mirror/{file}"))
    yield answers, asked, body
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", [answer_whole, answer_without_length])
def test_download_from_the_first_server(servers, own_folders, capsys, answer):
    """The file arrives whole, is used, and the second time no server is asked."""
    answers, asked, body = servers
    answers |= {"official": answer, "mirror": answer_404}
    for _ in range(2):
        data, returns = load("hopper-medium-replay-v2", None)
        assert len(data["rewards"]) == 10 and returns.tolist() == [6, 22]
    assert asked == ["/official/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"]
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium_replay-v2.hdf5": body}
    printed = capsys.readouterr().out
    assert printed.count("downloaded") == 1 and m.D4RL_URLS[0].split("{")[0] in printed


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_the_mirror_serves_where_the_official_server_fails(servers, own_folders, capsys, answer):
    answers, asked, body = servers
    answers |= {"official": answer, "mirror": answer_whole}
    assert len(load("hopper-medium-v2", None)[0]["rewards"]) == 10
    assert asked == ["/official/gym_mujoco_v2/hopper_medium-v2.hdf5", "/mirror/hopper_medium-v2.hdf5"]
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium-v2.hdf5": body}
    printed = capsys.readouterr().out
    assert "/mirror/hopper_medium-v2.hdf5" in printed and "/official/" not in printed


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_where_every_server_fails_nothing_is_left(servers, own_folders, answer):
    answers, asked, _ = servers
    answers |= {"official": answer, "mirror": answer}
    with pytest.raises(m.BadInput) as caught:
        load("hopper-medium-v2", None)
    message = str(caught.value)
    assert "/official/gym_mujoco_v2/hopper_medium-v2.hdf5" in message and "/mirror/hopper_medium-v2.hdf5" in message
    assert len(asked) == 2 and files(own_folders) == {}


def altered(handler, body):
    """A sound file of the same length with other numbers in it."""
    numbers = np.float32(9).tobytes() + np.float32(9.25).tobytes()  # of observation 9
    assert numbers in body
    answer_whole(handler, body.replace(numbers, numbers[::-1]))


def longer(handler, body):
    answer_whole(handler, body + bytes(7))


@pytest.mark.parametrize("answer, complaint", [(altered, "SHA-256"), (longer, "bytes are served")])
@pytest.mark.parametrize("known", ["all of its SHA-256", "some of its SHA-256", "its size"])
def test_a_file_that_is_known_must_be_that_file(servers, own_folders, monkeypatch, answer, complaint, known):
    """Size and SHA-256, whole or in part, where the table has them; one that is not known passes."""
    answers, asked, body = servers
    digits = {"a": 64, "s": 8, "i": 0}[known[0]]
    monkeypatch.setitem(m.D4RL_FILES, "pen-cloned-v1", (
        "hand_dapg_v1/pen-cloned-v1.hdf5", len(body), hashlib.sha256(body).hexdigest()[:digits]))
    path = own_folders / "d4rl" / "pen-cloned-v1.hdf5"
    answers |= {"official": answer, "mirror": answer_whole}
    m.download_d4rl("pen-cloned-v1", path)
    passed = answer is altered and digits == 0
    assert len(asked) == (1 if passed else 2) and (path.read_bytes() == body) != passed
    path.unlink()
    answers["mirror"] = answer
    if not passed:
        with pytest.raises(m.BadInput, match=f"(?s){complaint}.*{complaint}"):
            m.download_d4rl("pen-cloned-v1", path)
        assert files(own_folders) == {}
    monkeypatch.delitem(m.D4RL_FILES, "pen-cloned-v1")
    m.download_d4rl("pen-cloned-v1", path)
    assert path.exists()


def test_a_server_that_names_no_length_and_sends_too_little(servers, own_folders, monkeypatch):
    answers, asked, body = servers
    monkeypatch.setitem(m.D4RL_FILES, "pen-cloned-v1", ("hand_dapg_v1/pen-cloned-v1.hdf5", len(body) + 1, ""))
    answers |= {"official": answer_without_length, "mirror": answer_without_length}
    with pytest.raises(m.BadInput, match=f"only {len(body)} of {len(body) + 1} bytes"):
        m.download_d4rl("pen-cloned-v1", own_folders / "d4rl" / "pen-cloned-v1.hdf5")
    assert len(asked) == 2 and files(own_folders) == {}


def test_ctrl_c_during_a_download_leaves_nothing(servers, own_folders, monkeypatch):
    answers, _, _ = servers
    answers["official"] = answer_whole

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("hopper-medium-v2", None)
    assert files(own_folders) == {}


def test_no_data_and_no_network(tmp_path, own_folders):
    """What was looked for, where, and three ways out."""
    answer = refuse(tmp_path, "--env-id", "hopper-medium-v2")
    file = str(own_folders / "d4rl" / "hopper_medium-v2.hdf5")
    for text in (file, "127.0.0.1:9/gym_mujoco_v2/hopper_medium-v2.hdf5", "?mirror", "--dataset-path",
                 "D4RL_DATASET_DIR", "python mfql_offline.py"):
        assert text in answer


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "d4rl"))
    assert "D4RL_DATASET_DIR" in refuse(tmp_path, "--env-id", "hopper-medium-v2")


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
def test_minari_rows_masks_and_order_of_entries(kind, where, tmp_path, monkeypatch):
    """All four rows of every episode of three; the first and third terminate, the second is cut off.

    The order of a dict's entries is FlattenObservation's on the evaluation environment, which the policy will see.
    """
    actions, shown = collect("test/toy-v0", kind)
    if where == "dataset_path":
        shutil.move(minari_folder(), tmp_path / "elsewhere")
    args = m.Args(env_id="test/toy-v0", dataset_path=str(tmp_path / "elsewhere") if where == "dataset_path" else None)
    env = m.make_env(args)
    data, returns = m.load_dataset(args, env)
    assert shown.shape[:2] == (3, 5) and env.observation_space.shape == shown.shape[2:]
    width = shown.shape[2]
    assert width == {"flat": 2, "goal": 8, "goal_unsorted": 8, "nested": 12}[kind]  # nothing dropped, no goal either
    shown = shown.astype(np.float32)
    np.testing.assert_array_equal(data["observations"], shown[:, :-1].reshape(12, width))
    np.testing.assert_array_equal(data["next_observations"], shown[:, 1:].reshape(12, width))  # true last ones too
    np.testing.assert_array_equal(data["masks"], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(data["rewards"], [1, 2, 3, 4] * 3)
    np.testing.assert_allclose(data["actions"], actions, rtol=1e-6)
    assert returns.tolist() == [10, 10, 10]
    assert {value.dtype for value in data.values()} == {np.dtype(np.float32)}


def test_pixel_tasks_are_refused_before_anything_is_rendered():
    with pytest.raises(m.BadInput, match="visual-scene.*pixel tasks are not supported"):
        m.make_env(m.Args(env_id="visual-scene-play-singletask-task1-v0"))


@pytest.mark.parametrize("dataset_id, own", [
    ("D4RL/antmaze/umaze-v1", "antmaze"), ("D4RL/kitchen/mixed-v2", "kitchen"), ("D4RL/door/human-v2", None)])
def test_minari_antmaze_and_kitchen_are_not_d4rls(dataset_id, own, capsys):
    collect(dataset_id)
    m.load_minari(m.Args(env_id=dataset_id))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "neither" in line] == (
        [f"{dataset_id} is Minari's own {own}, neither D4RL's data nor its task: its scores do not compare with the "
         "papers'"] if own else [])


def test_bundled_dataset():
    """The data of the run without arguments, as the README states them; also covers Minari where jax is missing."""
    args = m.Args()
    data, returns = m.load_dataset(args, m.make_env(args))
    assert data["observations"].shape == (90_923, 11) and data["actions"].shape == (90_923, 3) and len(returns) == 433
    assert abs(returns.mean() - 580.47) < 0.01 and m.reference_scores(args) == (-20.272305, 3234.3)
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
    data, returns = load("test/pendulum-v0", None)
    np.testing.assert_array_equal(data["masks"], [1] * 9 + [0])
    np.testing.assert_allclose(data["actions"], torques.reshape(10, 1) / 2, atol=1e-5)
    np.testing.assert_allclose(data["next_observations"], observations[:, 1:].reshape(10, 3), rtol=1e-6)
    assert returns.tolist() == [2.5, 2.5]


def test_minari_evaluates_in_the_evaluation_environment():
    collect("test/toy-v0", eval_env=gym.make("DataTestToy-v0", length=9))
    env = m.make_env(m.Args(env_id="test/toy-v0"))
    assert env.unwrapped.length == 9


def evaluation(env_id):
    args = m.Args(env_id=env_id, eval_episodes=2, policy_width=8, policy_depth=1, critic_width=8, critic_depth=1)
    env = m.make_env(args)
    agent = m.Agent(env.observation_space.shape[0], env.action_space.shape[0], args, m.torch.device("cpu"))
    return m.evaluate(agent, args, 1, m.reference_scores(args))


def test_minari_reference_scores():
    """Both in the metadata: percent of the way between them. ToyEnv's return is always 1 + 2 + 3 + 4 = 10."""
    collect("test/scored-v0", ref_min_score=4.0, ref_max_score=16.0)
    metrics = evaluation("test/scored-v0")
    assert metrics["eval/episodic_return"] == 10 and metrics["eval/normalized_score"] == pytest.approx(50)


@pytest.mark.parametrize("left_in", [(), ("ref_min_score",), ("ref_max_score",)])
def test_without_reference_scores_there_is_no_normalized_score(left_in):
    """Neither raw returns nor 0..1 may pass for a score."""
    collect("test/scored-v0", ref_min_score=0.0, ref_max_score=16.0)
    file = minari_folder() / "test" / "scored-v0" / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    for key in {"ref_min_score", "ref_max_score"} - set(left_in):
        del metadata[key]
    file.write_text(json.dumps(metadata))
    assert m.reference_scores(m.Args(env_id="test/scored-v0")) is None
    metrics = evaluation("test/scored-v0")
    assert metrics["eval/episodic_return"] == 10 and "eval/normalized_score" not in metrics


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


def unknown_to_the_server(*args, **kwargs):
    raise ValueError("Couldn't find any version for dataset test/none in the remote Farama server.")


def lost_connection(*args, **kwargs):
    """huggingface_hub lets its HTTP client's own errors through, which are no OSError."""
    raise Exception("connection lost")  # noqa: TRY002


@pytest.mark.parametrize("download, reason", [
    (None, "no route to host"), (unknown_to_the_server, "Couldn't find any"), (lost_connection, "connection lost")])
def test_minari_id_that_does_not_exist(tmp_path, monkeypatch, download, reason):
    """Three ways out, whether there is no network, no such dataset or a connection that breaks."""
    monkeypatch.setattr(urllib.request, "urlopen", no_network if download is None else lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(minari, "load_dataset", download)
    answer = refuse(tmp_path, "--env-id", "test/none-v0")
    for text in (reason, "test/none-v0", "--dataset-path", "minari download test/none-v0", "python mfql_offline.py"):
        assert text in answer


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


def edit_metadata(data, *keys):
    metadata = json.loads((data / "metadata.json").read_text())
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
}


@pytest.mark.parametrize("case", MINARI_DAMAGE)
def test_damaged_minari_datasets_are_refused(tmp_path, case):
    collect("test/toy-v0")
    MINARI_DAMAGE[case](minari_folder() / "test" / "toy-v0" / "data")
    assert "test/toy-v0" in refuse(tmp_path, "--env-id", "test/toy-v0")


# ---------------------------------------------------------------- OGBench
@pytest.fixture(scope="module")
def cube_env():
    pytest.importorskip("ogbench")
    return m.make_env(m.Args(env_id=CUBE))


@pytest.fixture(scope="module")
def cube_rows(cube_env):
    """Two episodes of five rows: the cube lies at task 2's goal in row 1 of the first and in row 4, the last, too."""
    cube_env.reset()
    goal, draw = cube_env.unwrapped._data.mocap_pos[0], np.random.default_rng(0)
    observations = draw.normal(size=(10, *cube_env.observation_space.shape)).astype(np.float32)
    qpos = np.zeros((10, cube_env.unwrapped._model.nq), np.float32)
    qpos[:, 14:17] = goal + [0.3, 0, 0]
    qpos[[1, 4], 14:17] = goal
    return {"observations": observations, "actions": draw.uniform(-1, 1, (10, 5)).astype(np.float32),
            "terminals": np.arange(10) % 5 == 4, "qpos": qpos, "qvel": np.zeros((10, 3), np.float32)}


@pytest.fixture
def made_once(cube_env, monkeypatch):
    """Building the environment takes seconds, and reading a file of OGBench builds it anew each time."""
    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: cube_env)


def write_ogbench(folder, rows):
    for name in ("cube.npz", "cube-val.npz"):
        np.savez_compressed(folder / name, **rows)
    return str(folder / "cube.npz")


def test_ogbench_success_is_judged_after_the_step(cube_env):
    """OGBench 1.2 judges single tasks before the step unless told otherwise; the published scores are 'post'."""
    assert cube_env.unwrapped._success_timing == "post"
    assert "SeedNumPy" in str(cube_env)


def test_ogbench_rows_rewards_and_masks(cube_env, cube_rows, made_once, tmp_path):
    args = m.Args(env_id=CUBE, dataset_path=write_ogbench(tmp_path, cube_rows))
    data, returns = m.load_dataset(args, cube_env)
    kept = [0, 1, 2, 3, 5, 6, 7, 8]  # an episode's last row has no next observation
    np.testing.assert_array_equal(data["observations"], cube_rows["observations"][kept])
    np.testing.assert_array_equal(data["next_observations"], cube_rows["observations"][[row + 1 for row in kept]])
    np.testing.assert_array_equal(data["rewards"], [-1, 0, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(data["masks"], [1, 0, 1, 1, 1, 1, 1, 1])  # the end of a recording is no termination
    assert returns.tolist() == [-3, -4]
    assert set(data) == {"observations", "actions", "rewards", "masks", "next_observations"}


@pytest.mark.parametrize("case", ["missing", "no -val.npz", "empty", "half", "bit rot", "page", "no actions"])
def test_bad_ogbench_files_are_refused(cube_rows, made_once, tmp_path, case):
    path = pathlib.Path(write_ogbench(tmp_path, cube_rows))
    whole = path.read_bytes()
    if case == "no actions":
        write_ogbench(tmp_path, {key: value for key, value in cube_rows.items() if key != "actions"})
    elif case in ("missing", "no -val.npz"):
        path.with_stem("cube" if case == "missing" else "cube-val").unlink()
    else:
        rotten = whole[:300] + bytes(64) + whole[364:]
        path.write_bytes({"empty": b"", "half": whole[:len(whole) // 2], "bit rot": rotten, "page": b"<html>"}[case])
    with pytest.raises(m.BadInput, match="OGBench") as caught:
        m.load_ogbench(m.Args(env_id=CUBE, dataset_path=str(path)))
    assert "--dataset-path" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("env_id", ["cube-single-play-singletask-task9-v0", "nothing-play-singletask-v0"])
def test_unknown_ogbench_tasks_are_refused(tmp_path, env_id):
    pytest.importorskip("ogbench")
    assert env_id in refuse(tmp_path, "--env-id", env_id)


def test_ogbench_without_data_and_network(tmp_path, monkeypatch, made_once):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert "--dataset-path" in refuse(tmp_path, "--env-id", CUBE)


@pytest.mark.parametrize("env_id, package", [
    (CUBE, "ogbench"), ("door-human-v1", "gymnasium-robotics"), ("kitchen-mixed-v0", "gymnasium-robotics")])
def test_optional_packages_are_named_when_they_are_missing(tmp_path, monkeypatch, env_id, package):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # import now raises ModuleNotFoundError
    assert f"pip install {package}" in refuse(tmp_path, "--env-id", env_id)


# ---------------------------------------------------------------- real files
def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not on this machine")
    return SHARED / name


@pytest.mark.parametrize("name, env_id, rows, episodes, mean, best, score", [
    ("hopper_medium-like.hdf5", "hopper-medium-v2", 499_710, 1177, 1363, 3159, 42.5),
    ("hopper_medium-replay-like.hdf5", "hopper-medium-v2", 199_998, 972, 535, 3199, 17.1),
    ("hopper_medium-expert-like.hdf5", "hopper-medium-v2", 400_000, 670, 1913, 3270, 59.4),
    ("halfcheetah_medium-replay-like.hdf5", "halfcheetah-medium-replay-v2", 200_000, 200, 2699, 5872, 24.0),
    ("door-human-v1.hdf5", "door-human-v1", 6_729, 25, 803, 1505, 29.3),
])
def test_real_d4rl_files(name, env_id, rows, episodes, mean, best, score):
    """The figures of the table in ../shared/data/README.md."""
    path = shared(name)
    if env_id.startswith("door"):
        pytest.importorskip("gymnasium_robotics")
    data, returns = load(env_id, path)
    with h5py.File(path) as file:
        timeouts = file["timeouts"][()]
        assert len(timeouts) == rows
    assert len(data["rewards"]) == (~timeouts[:-1]).sum()
    assert (len(returns), round(returns.mean()), round(returns.max())) == (episodes, mean, best)
    assert round(m.normalized_score(returns.mean(), m.reference_scores(m.Args(env_id=env_id))), 1) == score


def test_real_ogbench_file(cube_env):
    path = shared("cube-single-play-v0.npz")
    data, returns = m.load_dataset(m.Args(env_id=CUBE, dataset_path=str(path)), cube_env)
    assert len(data["rewards"]) == 150_000 and len(returns) == 150  # 1001 rows each, the last without a successor
    assert set(np.unique(data["masks"])) == {0, 1} and set(np.unique(data["rewards"])) == {-1, 0}
    np.testing.assert_array_equal(data["rewards"], -data["masks"])  # at the goal: reward 0 and no bootstrapping


def test_numpy_seed_wrapper():
    """Episodes that draw from NumPy's global generator, as OGBench's mazes, repeat with their seed."""
    class Maze(gym.Env):
        observation_space = action_space = gym.spaces.Box(0, 1, (2,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.random.random(2).astype(np.float32), {}

    env = m.SeedNumPy(Maze())
    first, again, other = (env.reset(seed=seed)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(env.reset()[0], env.reset()[0])
