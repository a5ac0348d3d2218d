"""The tools in `data/`: what `fetch.py` writes and refuses, its downloads, an online run's data; `collect.py`.

No test needs a network or touches the home folder: servers are on 127.0.0.1, every folder is a temporary one.
"""
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
import zipfile

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch

from data import fetch

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real files, on development machines only
D4RL_URLS, CLOSED = fetch.D4RL_URLS, "http://127.0.0.1:9/{folder}/{file}"  # nobody listens at port 9
CUBE = "cube-single-play-singletask-task2-v0"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folders")]


@pytest.fixture
def own_folders(tmp_path_factory, monkeypatch):
    """Home, caches and servers that belong to this test alone; no other process tries files first, see fetch.py."""
    home = tmp_path_factory.mktemp("home")
    for name, folder in (("HOME", "."), ("D4RL_DATASET_DIR", "d4rl"), ("MINARI_DATASETS_PATH", "minari")):
        monkeypatch.setenv(name, str(home / folder))
    monkeypatch.setattr(fetch, "D4RL_URLS", (CLOSED, CLOSED + "?mirror"))
    monkeypatch.setattr(fetch, "subprocess", types.SimpleNamespace(
        run=lambda *args, **kwargs: types.SimpleNamespace(returncode=0)))
    return home


@pytest.fixture(autouse=True, scope="module")
def environments_made_once():
    """Making one takes up to seconds, and every reading makes one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "make_env", functools.cache(fetch.make_env))
        yield


def columns(rows=12, obs_dim=29, act_dim=8):
    """Of an AntMaze. Row i is recognised by observation i, i + 0.25, ... and reward i; terminal at 3, limit at 7."""
    return {"observations": (np.arange(rows)[:, None] + 0.25 * np.arange(obs_dim)).astype(np.float32),
            "actions": np.linspace(-0.9, 0.9, rows * act_dim).reshape(rows, act_dim).astype(np.float32),
            "rewards": np.arange(rows, dtype=np.float32),
            "terminals": np.arange(rows) == 3, "timeouts": np.arange(rows) == 7}


def write(path, values, **attributes):
    """An HDF5 file of these values; those that are None are left out."""
    with h5py.File(path, "w") as file:
        for key, value in values.items():
            if value is not None:
                file[key] = value
        file.attrs.update(attributes)
    return path


def read(path):
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}, dict(file.attrs)


def files(*folders):
    """Every file below, with its contents: equal before and after means that nothing was written."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def refuse(name, file=None, out=None):
    """The message with which this is refused; checks that it leaves nothing behind."""
    home = pathlib.Path(os.environ["HOME"])
    before = files(home)
    with pytest.raises(fetch.BadInput) as caught:
        fetch.fetch(name, file, out)
    assert files(home) == before
    return str(caught.value)


def command(*flags, before=""):
    """A process that runs fetch.py with these flags as a user would, after some lines of Python."""
    code = f"""
import runpy, sys
sys.path[0] = {str(ROOT / "data")!r}  # as for a script
{before}
sys.argv = ["data/fetch.py", *{list(map(str, flags))!r}]
runpy.run_path({str(ROOT / "data/fetch.py")!r}, run_name="__main__")
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*flags, before=""):
    process = command(*flags, before=before)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


# ---------------------------------------------------------------- names and addresses
def test_every_d4rl_name_has_its_folder_and_file():
    for task, kind in itertools.product(("halfcheetah", "hopper", "walker2d", "ant"), (
            "random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")):
        file = {"medium-replay": "medium_replay", "full-replay": "full_replay", "medium-expert": "medium_expert"}
        file = f"{task}_{file.get(kind, kind)}-v2.hdf5"
        assert fetch.d4rl_source(f"{task}-{kind}-v2")[:2] == ("gym_mujoco_v2", file)
    for task, kind in itertools.product(("pen", "door", "hammer", "relocate"), ("human", "cloned", "expert")):
        assert fetch.d4rl_source(f"{task}-{kind}-v1")[:2] == ("hand_dapg_v1", f"{task}-{kind}-v1.hdf5")
    for kind, maze, start, goal in (
            ("umaze", "u-maze", False, False), ("umaze-diverse", "u-maze", True, True),
            ("medium-play", "big-maze", True, False), ("medium-diverse", "big-maze", True, True),
            ("large-play", "hardest-maze", True, False), ("large-diverse", "hardest-maze", True, True)):
        file = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse_fixed.hdf5"
        assert fetch.d4rl_source(f"antmaze-{kind}-v2")[:2] == ("ant_maze_v2", file)
    for kind, file in (("complete", "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
                       ("partial", "kitchen_microwave_kettle_light_slider-v0.hdf5"),
                       ("mixed", "kitchen_microwave_kettle_bottomburner_light-v0.hdf5")):
        assert fetch.d4rl_source(f"kitchen-{kind}-v0")[:2] == ("kitchen", file)
    assert [url.format(folder="f", file="x") for url in D4RL_URLS] == [
        "http://rail.eecs.berkeley.edu/datasets/offline_rl/f/x",
        "https://huggingface.co/datasets/imone/D4RL/resolve/main/x"]


@pytest.mark.parametrize("name", [
    "nonsense", "", "antmaze-umaze-v1", "antmaze-large-v2", "antmaze-medium-play-v0", "hopper-medium-v0",
    "kitchen-complete-v1", "kitchen-new-v0", "pen-human-v0", "walker2d-expert-v1", "mujoco/hopper/medium-v0",
    "cube-single-play-singletask-task9-v0", "nothing-play-singletask-v0"])
def test_bad_names_are_refused_before_anything_is_asked_for(name):
    pytest.importorskip("ogbench")  # whose own names are no data sets
    assert f"{name} is not supported" in refuse(name)


def test_an_environment_is_no_data_set():
    pytest.importorskip("ogbench")
    for name in ("Hopper-v5", "Hopper-v4", "cube-single-singletask-task2-v0"):
        assert f"{name} is an environment" in (line := refuse(name)) and "--dataset-path" in line


# ---------------------------------------------------------------- D4RL layout
@pytest.mark.parametrize("flags", [bool, np.uint8, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("numbers", [np.float32, np.float64])
def test_a_flat_file(tmp_path, own_folders, flags, numbers):
    values = {key: value.astype(flags if key in ("terminals", "timeouts") else numbers)
              for key, value in columns().items()} | {"infos": np.zeros(3)}
    source = write(tmp_path / "x.hdf5", values)
    line = fetch.fetch("antmaze-umaze-v2", source, None)
    path = own_folders / "d4rl" / "flat" / "antmaze-umaze-v2.hdf5"
    data, attributes = read(path)
    for key, value in columns().items():
        np.testing.assert_array_equal(data[key], value)
        assert data[key].dtype == (bool if key in ("terminals", "timeouts") else np.float32)
    assert set(data) == set(columns())
    assert attributes == {
        "env_id": "data.d4rl_tasks:antmaze-umaze-v2", "ref_min_score": 0.0, "ref_max_score": 1.0,
        "source": f"{source}, as antmaze-umaze-v2", "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert line == f"wrote 12 rows of antmaze-umaze-v2 to {path}, from {source}"
    assert set(files(own_folders)) == {path}
    assert "is there already and sound" in fetch.fetch("antmaze-umaze-v2", None, None)  # and no server is asked
    env = gym.make(attributes["env_id"])
    assert env.observation_space.shape == data["observations"].shape[1:]


def test_a_locomotion_file_goes_as_it_is_to_the_official_place(tmp_path, own_folders):
    source = write(tmp_path / "x.hdf5", columns(obs_dim=11, act_dim=3), env_id="Hopper-v4")
    fetch.fetch("hopper-medium-replay-v2", source, None)
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium_replay-v2.hdf5": source.read_bytes()}
    fetch.fetch("hopper-medium-replay-v2", source, tmp_path / "new" / "y.hdf5")
    assert (tmp_path / "new" / "y.hdf5").read_bytes() == source.read_bytes()


def test_a_file_that_is_in_the_folder_already_is_used(own_folders):
    (own_folders / "d4rl").mkdir()
    official = write(own_folders / "d4rl" / "pen-human-v1.hdf5", columns(obs_dim=45, act_dim=24))
    pytest.importorskip("gymnasium_robotics")
    assert str(official) in fetch.fetch("pen-human-v1", None, None)
    attributes = read(own_folders / "d4rl" / "flat" / "pen-human-v1.hdf5")[1]
    assert attributes["ref_max_score"] == 3076.8331017826877 and official.exists()


def test_what_is_there_is_checked_too(own_folders):
    (own_folders / "d4rl").mkdir()
    official = own_folders / "d4rl" / "hopper_medium-v2.hdf5"
    official.write_text("<html>")
    assert str(official) in refuse("hopper-medium-v2")


def test_actions_that_rounding_put_outside_are_clipped(tmp_path):
    values = columns()
    values["actions"][2, 3] = -1.00005
    fetch.fetch("antmaze-umaze-v2", write(tmp_path / "x.hdf5", values), tmp_path / "y.hdf5")
    assert read(tmp_path / "y.hdf5")[0]["actions"].min() == -1


def one(key, row, value, dtype=np.float32):
    """A column with one other value in it."""
    array = columns()[key].astype(dtype)
    array[row] = value
    return {key: array}


BAD_COLUMNS = {
    "no transition is left": ({"timeouts": np.ones(12, bool)}, "no time limit"),
    "no rows": ({k: v[:0] for k, v in columns().items()}, "are 0"),
    "no episode ends": ({"terminals": np.zeros(12, bool), "timeouts": np.zeros(12, bool)}, "one whole episode"),
    "wide observations": ({"observations": np.zeros((12, 30), np.float32)}, "observations have shape (30,)"),
    "wide actions": ({"actions": np.zeros((12, 2), np.float32)}, "actions have shape (2,)"),
    "flat actions": ({"actions": np.zeros(12, np.float32)}, "actions have shape (12,)"),
    "rewards as a column": ({"rewards": np.zeros((12, 1), np.float32)}, "rewards have shape (12, 1)"),
    "terminals as a column": ({"terminals": np.zeros((12, 1), bool)}, "terminals have shape"),
    "a number for an array": ({"observations": np.float32(3)}, "observations have shape ()"),
    "an empty space": ({"rewards": h5py.Empty("f4")}, "rewards have shape None"),
    **{f"no {key}": ({key: None}, f"{key} missing") for key in columns()},
    **{f"short {key}": ({key: value[:-1]}, f"{key} 11") for key, value in columns().items()},
    "bytes": ({"rewards": np.array([b"1"] * 12)}, "rewards are not numbers"),
    "text": ({"rewards": np.array(["1"] * 12, dtype=h5py.string_dtype())}, "rewards are not numbers"),
    "arrays of any length": ({"rewards": np.array([np.zeros(2)] * 12 + [0], object)[:12].astype(
        h5py.vlen_dtype(np.float32))}, "rewards are not numbers"),
    "compounds": ({"rewards": np.zeros(12, [("a", "f4")])}, "rewards are not numbers"),
    "voids": ({"rewards": np.zeros(12, "V4")}, "rewards are not numbers"),
    "references": ({"rewards": np.array([h5py.Reference()] * 12, h5py.ref_dtype)}, "rewards are not numbers"),
    "complex numbers": ({"rewards": np.zeros(12, np.complex64)}, "rewards are not numbers"),
    "flags for numbers": ({"rewards": np.zeros(12, bool)}, "rewards are not numbers"),
    "text for flags": ({"terminals": np.array([b"1"] * 12)}, "terminals are not numbers"),
    "a terminal of 2": (one("terminals", 5, 2, np.uint8), "than 0 and 1 in 1 rows of terminals, the first is row 5"),
    "a timeout of a half": (one("timeouts", 9, 0.5), "than 0 and 1 in 1 rows of timeouts, the first is row 9"),
    "a timeout that is NaN": (one("timeouts", 0, np.nan), "1 rows of timeouts, the first is row 0"),
    "NaN": (one("observations", 2, np.nan), "in 1 rows of observations, the first is row 2"),
    "infinity": (one("rewards", 7, -np.inf), "in 1 rows of rewards, the first is row 7"),
    "a number too large for float32": (one("rewards", 4, 1e300, np.float64), "1 rows of rewards, the first is row 4"),
    "an action outside": (one("actions", 6, 1.001), "outside the action box in 1 rows of actions, the first is row 6"),
    "an action that is NaN": (one("actions", 1, np.nan), "in 1 rows of actions, the first is row 1"),
    "a soft link": ({"rewards": h5py.SoftLink("/actions")}, "rewards missing"),
    "a link to another file": ({"rewards": h5py.ExternalLink("/etc/passwd", "/x")}, "rewards missing"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_refused(tmp_path, case):
    change, message = BAD_COLUMNS[case]
    path = write(tmp_path / "x.hdf5", columns() | change)
    answer = refuse("antmaze-umaze-v2", path)
    assert message in answer and str(path) in answer


@pytest.mark.parametrize("shape", [(2**40, 29), (12, 2**40)])
@pytest.mark.parametrize("chunks", [None, True])
def test_sizes_that_are_declared_but_not_there_are_refused(tmp_path, shape, chunks):
    path = write(tmp_path / "x.hdf5", columns() | {"observations": None})
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", shape, np.float32, chunks=chunks and (12, 29))
    assert "observations claim" in refuse("antmaze-umaze-v2", path)


def test_arrays_that_lie_in_another_file_are_refused(tmp_path):
    (tmp_path / "raw").write_bytes(np.zeros(12, np.float32).tobytes())
    path = write(tmp_path / "x.hdf5", columns() | {"rewards": None})
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", 12, np.float32, external=[(str(tmp_path / "raw"), 0, 48)])
    assert "rewards lie in another file" in refuse("antmaze-umaze-v2", path)
    layout = h5py.VirtualLayout((12,), np.float32)
    layout[:] = h5py.VirtualSource(str(write(tmp_path / "z.hdf5", columns())), "rewards", (12,))
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file.create_virtual_dataset("rewards", layout)
    assert "rewards lie in another file" in refuse("antmaze-umaze-v2", path)


@pytest.mark.parametrize("name, recorded_in, shape, refused", [
    ("walker2d-medium-v2", "HalfCheetah-v4", (17, 6), True),
    ("halfcheetah-medium-v2", "HalfCheetah-v5", (17, 6), False),
    ("halfcheetah-medium-v2", np.bytes_(b"HalfCheetah-v4"), (17, 6), False),
    ("antmaze-umaze-diverse-v2", "data.d4rl_tasks:antmaze-umaze-v2", (29, 8), False),
    ("antmaze-medium-play-v2", "data.d4rl_tasks:antmaze-umaze-v2", (29, 8), True),
    ("door-cloned-v1", "AdroitHandDoor-v1", (39, 28), False),
    ("door-cloned-v1", "data.d4rl_tasks:door-human-v1", (39, 28), False)])
def test_data_that_name_another_task_are_refused(tmp_path, name, recorded_in, shape, refused):
    if name.startswith("door"):
        pytest.importorskip("gymnasium_robotics")
    path = write(tmp_path / "x.hdf5", columns(12, *shape), env_id=recorded_in)
    if refused:
        assert f"was recorded in {recorded_in}, but {name} means" in refuse(name, path)
    else:
        fetch.fetch(name, path, None)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_hdf5_is_refused(tmp_path, share):
    path = write(tmp_path / "x.hdf5", columns(rows=5000))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert str(path) in refuse("antmaze-umaze-v2", path)


def test_damaged_hdf5_never_ends_in_a_traceback(tmp_path):
    path, draw, refused = write(tmp_path / "x.hdf5", columns()), np.random.default_rng(0), 0
    whole = path.read_bytes()
    for start in draw.integers(0, min(4000, len(whole)), 150):
        path.write_bytes(whole[:start] + draw.bytes(32) + whole[start + 32:])
        try:
            fetch.read_d4rl(path, "antmaze-umaze-v2")
        except fetch.BadInput:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("what", ["crash", "loop"])
def test_files_that_hdf5_does_not_survive_are_refused(tmp_path, monkeypatch, what):
    """HDF5 can run for ever on damaged tables, deaf to signals: seen with one bit flipped in an attribute's heap."""
    monkeypatch.setattr(fetch, "subprocess", subprocess)
    assert "signal.alarm(60)" in fetch.HDF5_PROBE
    monkeypatch.setattr(fetch, "HDF5_PROBE", {
        "crash": "import os; os.abort()",
        "loop": fetch.HDF5_PROBE.replace("(60)", "(1)") + "\nwhile True: pass"}[what])
    answer = refuse("antmaze-umaze-v2", write(tmp_path / "x.hdf5", columns()))
    assert {"crash": "SIGABRT", "loop": "SIGALRM"}[what] in answer


def test_things_that_are_no_file(tmp_path, own_folders):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "page").write_text("<html>not found</html>")
    write(tmp_path / "groups", {})
    for name, complaint in (("missing", "cannot be read"), ("folder", "not a regular file"),
                            ("pipe", "not a regular file"), ("page", "not an HDF5 file"), ("groups", "missing")):
        for task in ("antmaze-umaze-v2", "hopper-medium-v2"):
            assert complaint in refuse(task, tmp_path / name)
    assert "/dev/zero is not a regular file" in refuse("antmaze-umaze-v2", pathlib.Path("/dev/zero"))
    (own_folders / "d4rl").mkdir(exist_ok=True)
    os.mkfifo(own_folders / "d4rl" / "pen-human-v1.hdf5")
    pytest.importorskip("gymnasium_robotics")
    assert "not a regular file" in refuse("pen-human-v1")


def test_nothing_is_written_over_a_device_or_folder(tmp_path):
    source = write(tmp_path / "x.hdf5", columns())
    for out in ("/dev/null", tmp_path):
        assert "not a regular file" in refuse("antmaze-umaze-v2", source, pathlib.Path(out))


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    source, out = write(tmp_path / "x.hdf5", columns()), tmp_path / "out" / "y.hdf5"
    fetch.fetch("antmaze-umaze-v2", source, out)
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fetch.fetch("antmaze-umaze-v2", source, out)
    assert files(tmp_path) == before and not fetch.UNFINISHED


# ---------------------------------------------------------------- download
def answer_whole(handler, body, head=True):
    handler.send_response(200)
    if head:
        handler.send_header("Content-Length", str(len(body)))
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


def answer_odd_length(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "many")
    handler.end_headers()


def answer_hanging(handler, body):
    answer_cut(handler, body)
    handler.wfile.flush()
    time.sleep(3)


BAD_ANSWERS = {
    "404": answer_404, "cut": answer_cut, "cut chunk": answer_cut_chunk, "odd length": answer_odd_length,
    "half a file": lambda handler, body: answer_whole(handler, body[:len(body) // 2]),
    "page": lambda handler, body: answer_whole(handler, b"<html>please log in</html>"),
    "nothing": lambda handler, body: setattr(handler, "close_connection", True),
    "garbage": lambda handler, body: handler.wfile.write(b"this is not HTTP\r\n\r\n"),
    "too late": lambda handler, body: time.sleep(3), "hanging": answer_hanging,
    "other numbers": lambda handler, body: answer_whole(handler, bad_body()),
}


def bad_body():
    buffer = io.BytesIO()
    write(buffer, columns(obs_dim=11, act_dim=3) | {"timeouts": np.full(12, 2)})
    return buffer.getvalue()


@pytest.fixture
def servers(monkeypatch, tmp_path):
    """`answers` maps the first folder of an address to what it answers; official and mirror, as `fetch.D4RL_URLS`."""
    answers, asked, urlopen = {}, [], urllib.request.urlopen

    def patient(url, timeout=10):
        assert timeout <= 10
        return urlopen(url, timeout=timeout / 10)  # a test need not wait as long

    monkeypatch.setattr(urllib.request, "urlopen", patient)
    body = write(tmp_path / "served.hdf5", columns(obs_dim=11, act_dim=3)).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            answers[self.path.split("/")[1]](self, body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(fetch, "D4RL_URLS", (address + "/official/{folder}/{file}", address + "/mirror/{file}"))
    yield answers, asked, body
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("head", [True, False])
def test_download_from_the_first_server(servers, own_folders, head):
    """The file arrives whole, and the second time no server is asked."""
    answers, asked, body = servers
    answers |= {"official": functools.partial(answer_whole, head=head), "mirror": answer_404}
    assert fetch.D4RL_URLS[0].split("{")[0] in fetch.fetch("hopper-medium-replay-v2", None, None)
    assert "already" in fetch.fetch("hopper-medium-replay-v2", None, None)
    assert asked == ["/official/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"]
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium_replay-v2.hdf5": body}


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_the_mirror_serves_where_the_official_server_fails(servers, own_folders, answer):
    answers, asked, body = servers
    answers |= {"official": BAD_ANSWERS[answer], "mirror": answer_whole}
    line = fetch.fetch("hopper-medium-v2", None, None)
    assert asked == ["/official/gym_mujoco_v2/hopper_medium-v2.hdf5", "/mirror/hopper_medium-v2.hdf5"]
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium-v2.hdf5": body}
    assert "/mirror/hopper_medium-v2.hdf5" in line and "/official/" not in line


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_where_every_server_fails_nothing_is_left(servers, own_folders, answer):
    answers, asked, _ = servers
    answers |= {"official": BAD_ANSWERS[answer], "mirror": BAD_ANSWERS[answer]}
    message = refuse("hopper-medium-v2")
    for text in ("/official/gym_mujoco_v2/hopper_medium-v2.hdf5", "/mirror/hopper_medium-v2.hdf5", "--file",
                 str(own_folders)):
        assert text in message
    assert len(asked) == 2


@pytest.mark.parametrize("change, complaint", [
    (lambda body: body.replace(np.float32(9).tobytes(), np.float32(8).tobytes()), "SHA-256"),
    (lambda body: body + bytes(7), "bytes are served")])
@pytest.mark.parametrize("digits", [64, 8, 0])
def test_a_file_that_is_known_must_be_that_file(servers, own_folders, monkeypatch, change, complaint, digits):
    """Size and SHA-256, whole or in part, where the table has them; flat files are made of a download that is gone."""
    answers, asked, _ = servers
    buffer = io.BytesIO()
    write(buffer, columns())
    good = buffer.getvalue()
    monkeypatch.setitem(fetch.D4RL_FILES, "antmaze-umaze-v2",
                        ("ant/x.hdf5", len(good), hashlib.sha256(good).hexdigest()[:digits]))
    answers |= {"official": lambda handler, _: answer_whole(handler, change(good)),
                "mirror": lambda handler, _: answer_whole(handler, good)}
    passed = complaint == "SHA-256" and digits == 0
    assert ("/mirror/" in fetch.fetch("antmaze-umaze-v2", None, None)) != passed
    path = own_folders / "d4rl" / "flat" / "antmaze-umaze-v2.hdf5"
    assert set(files(own_folders)) == {path}
    if not passed:
        assert read(path)[1]["sha256"] == hashlib.sha256(good).hexdigest()
        path.unlink()
        answers["mirror"] = answers["official"]
        message = refuse("antmaze-umaze-v2")
        assert message.count(complaint) == 2


def redirected():
    """Lines of Python after which another process asks the `servers` instead of D4RL's."""
    url = fetch.D4RL_URLS[0].format(folder="x", file="y")
    return f"import urllib.request as u; o = u.urlopen; u.urlopen = lambda url, timeout: o({url!r}, timeout=timeout)"


def test_two_fetches_of_one_name_at_once_both_succeed(servers, own_folders):
    answers, _, body = servers
    both = threading.Barrier(2)

    def answer(handler, body):
        both.wait(30)
        answer_whole(handler, body)

    answers["official"] = answer
    processes = [command("hopper-medium-v2", before=redirected()) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all(len(out.splitlines()) == 1 and not error for out, error in outputs)
    assert files(own_folders) == {own_folders / "d4rl" / "hopper_medium-v2.hdf5": body}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_download_leaves_nothing(servers, own_folders, number):
    answers, asked, _ = servers
    answers["official"] = lambda handler, body: (answer_cut(handler, body), handler.wfile.flush(), time.sleep(20))
    process = command("hopper-medium-v2", before=redirected())
    while not files(own_folders):
        time.sleep(0.02)
    process.send_signal(number)
    out, error = process.communicate(timeout=10)
    assert process.returncode == 130 and not out and len(error.splitlines()) == 1 and number.name in error
    assert files(own_folders) == {}


def test_exit_codes_and_one_line(tmp_path, own_folders):
    """The true process, from another folder than the repository's."""
    source = write(tmp_path / "x.hdf5", columns())
    code, out, error = run("antmaze-umaze-v2", "--file", source)
    assert (code, error) == (0, "") and len(out.splitlines()) == 1 and "wrote 12 rows" in out
    for flags in (["antmaze-umaze-v1"], [], ["--nonsense"], ["antmaze-umaze-v2", "--file", tmp_path],
                  ["antmaze-umaze-v2", "--file", source, "--out", source / "x"]):
        code, out, error = run(*flags)
        assert code == 2 and not out and len(error.splitlines()) == 1 and error.startswith("fetch.py: "), error
    code, out, error = run("--help")
    assert code == 0 and "--from-run" in out and not error


# ---------------------------------------------------------------- OGBench
@pytest.fixture(scope="module")
def cube_rows():
    """Two episodes of five rows: the cube lies at task 2's goal in row 1 of the first and in row 4, the last, too."""
    pytest.importorskip("ogbench")
    env = fetch.make_env(CUBE)
    env.reset()
    goal, draw = env.unwrapped._data.mocap_pos[0], np.random.default_rng(0)
    qpos = np.zeros((10, env.unwrapped._model.nq), np.float32)
    qpos[:, 14:17] = goal + [0.3, 0, 0]
    qpos[[1, 4], 14:17] = goal
    return {"observations": draw.normal(size=(10, *env.observation_space.shape)).astype(np.float32),
            "actions": draw.uniform(-1, 1, (10, 5)).astype(np.float32), "terminals": np.arange(10) % 5 == 4,
            "qpos": qpos, "qvel": np.zeros((10, 3), np.float32)}


def write_npz(path, values):
    np.savez_compressed(path, **{key: value for key, value in values.items() if value is not None})
    return path


def test_ogbench_rows_rewards_and_ends(cube_rows, tmp_path, own_folders):
    """No -val.npz is needed; the end of a recording is no termination; no transition is lost."""
    source = write_npz(tmp_path / "cube.npz", cube_rows)
    fetch.fetch(CUBE, source, None)
    data, attributes = read(own_folders / "d4rl" / "flat" / f"{CUBE}.hdf5")
    np.testing.assert_array_equal(data["observations"], cube_rows["observations"])
    np.testing.assert_array_equal(data["timeouts"], cube_rows["terminals"])
    np.testing.assert_array_equal(data["rewards"], [-1, 0, -1, -1, 0, -1, -1, -1, -1, 0])  # 0 in the own last rows
    np.testing.assert_array_equal(data["terminals"], np.arange(10) == 1)
    np.testing.assert_array_equal(data["actions"][:4], cube_rows["actions"][:4])
    assert not data["actions"][[4, 9]].any()
    assert attributes["env_id"] == f"data.d4rl_tasks:{CUBE}" and "ref_min_score" not in attributes
    assert attributes["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "already" in fetch.fetch(CUBE, None, None)


def test_ogbench_rows_are_those_of_ogbenchs_own_loading(cube_rows, tmp_path):
    import ogbench

    for name in ("cube.npz", "cube-val.npz"):
        write_npz(tmp_path / name, cube_rows)
    _, theirs, _ = ogbench.make_env_and_datasets(CUBE, dataset_path=str(tmp_path / "cube.npz"), success_timing="post")
    ours = fetch.read_ogbench(tmp_path / "cube.npz", CUBE)
    kept = np.flatnonzero(~ours["timeouts"][:-1])
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(ours[key][kept], theirs[key])
    np.testing.assert_array_equal(ours["observations"][kept + 1], theirs["next_observations"])
    np.testing.assert_array_equal(1 - ours["terminals"][kept], theirs["masks"])


BAD_NPZ = {
    "no actions": ({"actions": None}, "actions"), "no qpos": ({"qpos": None}, "qpos"),
    "short qpos": ({"qpos": np.zeros((9, 21))}, "lengths differ"),
    "objects": ({"actions": np.array([{}] * 10)}, "numbers"),
    "text": ({"terminals": np.array(["a"] * 10)}, "not numbers"),
    "NaN": ({"observations": np.full((10, 28), np.nan)}, "row 0"),
    "NaN in qpos": ({"qpos": np.full((10, 21), np.nan)}, "rows of qpos"),
    "wide": ({"actions": np.zeros((10, 6))}, "(6,)"),
    "a terminal of 2": ({"terminals": np.full(10, 2)}, "other than 0 and 1"),
    "outside": ({"actions": np.full((10, 5), 1.1)}, "box"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_ogbench_arrays_are_refused(cube_rows, tmp_path, case):
    change, message = BAD_NPZ[case]
    path = write_npz(tmp_path / "cube.npz", cube_rows | change)
    answer = refuse(CUBE, path)
    assert message in answer and str(path) in answer


@pytest.mark.parametrize("case", ["missing", "empty", "half", "bit rot", "page", "a header that lies", "torn header"])
def test_bad_ogbench_files_are_refused(cube_rows, tmp_path, case):
    path = write_npz(tmp_path / "cube.npz", cube_rows)
    whole = path.read_bytes()
    if case == "missing":
        path.unlink()
    elif case in ("a header that lies", "torn header"):
        lie = {"torn header": b"'shape': (10, 28   ", "a header that lies": b"'shape': (99999,28)"}[case]
        np.savez(tmp_path / "sound.npz", **cube_rows)
        with zipfile.ZipFile(tmp_path / "sound.npz") as sound, zipfile.ZipFile(path, "w") as archive:
            for name in sound.namelist():  # with the checksum of what is in it
                archive.writestr(name, sound.read(name).replace(b"'shape': (10, 28), ", lie))
    else:
        rotten = whole[:300] + bytes(64) + whole[364:]
        path.write_bytes({"empty": b"", "half": whole[:len(whole) // 2], "bit rot": rotten, "page": b"<html>"}[case])
    answer = refuse(CUBE, path)
    assert str(path) in answer and ("claim" in answer) == (case == "a header that lies")


def test_ogbench_download_by_its_library(servers, cube_rows, own_folders, tmp_path, monkeypatch):
    """Fetched once for all tasks of one data set, without the -val.npz; a damaged file is not kept."""
    import ogbench

    answers, asked, _ = servers
    body = write_npz(tmp_path / "cube.npz", cube_rows).read_bytes()
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", fetch.D4RL_URLS[0].split("/official")[0] + "/ogbench")
    answers["ogbench"] = lambda handler, _: answer_whole(handler, body[:900])
    assert "OGBench's server" in refuse(CUBE)
    answers["ogbench"] = answer_404
    message = refuse(CUBE)
    assert "404" in message and "--file" in message and str(own_folders / ".ogbench" / "data") in message
    answers["ogbench"] = lambda handler, _: answer_whole(handler, body)
    fetch.fetch(CUBE, None, None)
    fetch.fetch("cube-single-play-singletask-v0", None, None)
    assert asked == ["/ogbench/cube-single-play-v0.npz"] * 3
    assert (own_folders / ".ogbench" / "data" / "cube-single-play-v0.npz").read_bytes() == body
    assert len(files(own_folders)) == 3


# ---------------------------------------------------------------- what an online run collected
def online_run(folder, steps, num_envs=2, env_id="Pendulum-v1", act_dim=1, obs_dim=3):
    """A run folder like som_online.py's, and its rows. Environment i has episodes of 4 + i steps, of which every other
    one terminates; row number r, of environment r % num_envs, has observation r."""
    rows = np.arange(steps)
    time_of, i = rows // num_envs, rows % num_envs
    ends, number = time_of % (4 + i) == 3 + i, time_of // (4 + i)
    observations = np.repeat(rows[:, None], obs_dim, 1).astype(np.float32)
    following = observations + num_envs + 0.5 * ends[:, None]  # not what the next row begins with where one ends
    values = dict(observations=observations, actions=np.linspace(-1, 1, steps)[:, None].repeat(act_dim, 1),
                  rewards=rows, masks=1 - (ends & (number % 2 == 0)), next_observations=following)
    values = {key: np.float32(value) for key, value in values.items()}
    contents = np.concatenate([value.reshape(steps, -1) for value in values.values()], 1).tobytes()
    folder.mkdir()
    (folder / "replay.bin").write_bytes(contents + b"steps after the checkpoint")
    torch.save({"script": "som_online", "step": steps, "replay": hashlib.sha256(contents).hexdigest(),
                "observations": torch.zeros(num_envs, obs_dim), "args": {"env_id": env_id}}, folder / "checkpoint.pt")
    return values, ends, i


def test_an_online_run_becomes_a_minari_data_set(tmp_path, own_folders):
    """Row by row against a plain loop, in the environment's torques."""
    values, ends, environment = online_run(tmp_path / "run", 90)
    line = fetch.from_run(tmp_path / "run", "me/pendulum-v0", None)
    expected = []
    for i in (0, 1):
        episode = []
        for row in range(90):
            if environment[row] == i:
                episode.append(row)
                if ends[row] or row + 2 >= 90:
                    expected.append(episode)
                    episode = []
    dataset = minari.load_dataset("me/pendulum-v0")
    assert dataset.total_episodes == len(expected) and dataset.env_spec.id == "Pendulum-v1"
    for episode, rows in zip(dataset.iterate_episodes(), expected):
        np.testing.assert_array_equal(episode.observations[:, 0], [*rows, values["next_observations"][rows[-1], 0]])
        np.testing.assert_allclose(episode.actions, 2 * values["actions"][rows], rtol=1e-6)  # Pendulum's box is +-2
        np.testing.assert_array_equal(episode.rewards, rows)
        np.testing.assert_array_equal(episode.terminations, values["masks"][rows] == 0)
        np.testing.assert_array_equal(episode.truncations, (np.array(rows) == rows[-1]) & (values["masks"][rows] == 1))
    assert "wrote 90 steps" in line and sum(map(len, expected)) == 90
    assert "ref_min_score" not in dataset.storage.metadata
    names = {path.name for path in files(own_folders)}
    assert names == {"main_data.hdf5", "metadata.json"}


def test_from_run_as_a_process_without_jax_and_with_reference_scores(tmp_path, own_folders):
    online_run(tmp_path / "run", 40, env_id="Hopper-v5", obs_dim=11, act_dim=3)
    flags = ["--from-run", tmp_path / "run", "me/hopper/own-v3", "--datasets-dir", tmp_path / "sets"]
    code, out, error = run(*flags, before="sys.modules['jax'] = sys.modules['jaxlib'] = None")
    assert (code, error) == (0, "") and len(out.splitlines()) == 1
    metadata = json.loads((tmp_path / "sets/me/hopper/own-v3/data/metadata.json").read_text())
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    assert not files(own_folders)
    code, out, error = run(*flags)
    assert code == 2 and "exists" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("case, at", [
    ("name", "x"), ("no run", "checkpoint.pt"), ("half", "checkpoint.pt"), ("another file", "checkpoint.pt"),
    ("no replay", "checkpoint.pt"), ("pickle", "checkpoint.pt"), ("wrong shape", "replay.bin"), ("NaN", "replay.bin"),
    ("no steps", "replay.bin"), ("a bit", "replay.bin"), ("cut", "replay.bin"), ("longer checkpoint", "replay.bin")])
def test_bad_runs_are_refused(tmp_path, own_folders, case, at):
    path, steps, name = tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "replay.bin", "me/x-v0"
    online_run(tmp_path / "run", 400, obs_dim=4 if case == "wrong shape" else 3)
    whole, checkpoint, table = path.read_bytes(), torch.load(path), bytearray(steps.read_bytes())
    if case == "name":
        name = "x"
    elif case == "no run":
        path.unlink()
    elif case == "half":
        path.write_bytes(whole[:len(whole) // 2])
    elif case == "another file":
        path.write_text("hello")
    elif case == "no replay":
        torch.save({"args": {}, "step": 3}, path)
    elif case == "pickle":
        torch.save({"args": os.system}, path)
    elif case == "NaN":
        table[36 * 17 + 16:36 * 17 + 20] = np.float32(np.nan).tobytes()  # the reward of row 17
        steps.write_bytes(table)
        torch.save(checkpoint | {"replay": hashlib.sha256(table[:36 * 400]).hexdigest()}, path)
    elif case == "no steps":
        steps.unlink()
    elif case == "a bit":
        table[5000] ^= 64
        steps.write_bytes(table)
    elif case == "cut":
        steps.write_bytes(table[:4000])
    elif case == "longer checkpoint":
        torch.save(checkpoint | {"step": 402}, path)
    with pytest.raises(fetch.BadInput) as caught:
        fetch.from_run(tmp_path / "run", name, None)
    assert at in str(caught.value) and not files(own_folders)


# ---------------------------------------------------------------- collect.py and the benchmark's data
@pytest.fixture
def quick_sac(monkeypatch):
    """SAC that never gets to a gradient step."""
    sac = pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(sac, "SAC", functools.partial(sac.SAC, learning_starts=10**6))
    from data import collect

    return collect


def test_collected_files_of_three_qualities(quick_sac, tmp_path, capsys):
    """Hopper falls within a second, so most episodes end there; the replay is exactly what SAC's environment gave."""
    args = quick_sac.Args("Hopper-v4", medium_score=1.0, total_timesteps=600, rows=300, eval_interval=200,
                          eval_episodes=2, out_dir=tmp_path)
    quick_sac.collect(args)
    replay, attributes = read(tmp_path / "Hopper-v4_medium-replay_1.hdf5")
    env = quick_sac.SeededResets(gym.make("Hopper-v4"), 1)
    observation = env.reset()[0]
    for row in range(len(replay["rewards"])):
        np.testing.assert_allclose(replay["observations"][row], observation, rtol=1e-5, atol=1e-6)
        observation, reward, terminated, truncated, _ = env.step(replay["actions"][row])
        assert reward == pytest.approx(replay["rewards"][row], rel=1e-5)
        assert (terminated, truncated) == (replay["terminals"][row], replay["timeouts"][row])
        if terminated or truncated:
            observation = env.reset()[0]
    assert replay["terminals"][-1] and 100 < len(replay["rewards"]) <= 600
    assert attributes["env_id"] == "Hopper-v4" and attributes["ref_max_score"] == 3234.3
    assert "stable-baselines3" in attributes["source"] and "medium policy of step" in attributes["source"]
    medium, mixed = (read(tmp_path / f"Hopper-v4_{quality}_1.hdf5")[0] for quality in ("medium", "medium-expert"))
    assert 300 <= len(medium["rewards"]) < 400 and medium["terminals"][-1]
    ends = 1 + np.flatnonzero(mixed["terminals"] | mixed["timeouts"])
    half = ends[ends >= 150][0]
    np.testing.assert_array_equal(mixed["actions"][:half], medium["actions"][:half])
    assert 150 <= len(mixed["rewards"]) - half < 250
    assert len(files(tmp_path)) == 3 and "wrote" in capsys.readouterr().out
    for path in files(tmp_path):  # the layout of the official files
        fetch.fetch("hopper-medium-v2", path, tmp_path / "out.hdf5")
    with pytest.raises(fetch.BadInput, match="exists"):
        quick_sac.collect(args)


def test_time_limits_and_other_boxes_in_a_replay(quick_sac, tmp_path):
    """Pendulum: episodes of 200 steps that never terminate, torques up to 2, no reference scores."""
    quick_sac.collect(quick_sac.Args("Pendulum-v1", quality="medium-replay", medium_score=None, total_timesteps=450,
                                     out_dir=tmp_path))
    data, attributes = read(tmp_path / "Pendulum-v1_medium-replay_1.hdf5")
    assert np.flatnonzero(data["timeouts"]).tolist() == [199, 399] and not data["terminals"].any()
    assert len(data["rewards"]) == 400 and 1.5 < np.abs(data["actions"]).max() <= 2
    assert "ref_min_score" not in attributes


def test_the_bundled_sets_rule(quick_sac, tmp_path):
    """Its first steps are random and come out again; those after gradient steps differ from machine to machine."""
    quick_sac.collect(quick_sac.Args(
        "Hopper-v5", quality="medium-replay", medium_score=None, total_timesteps=100, datasets_dir=tmp_path,
        minari="meanflow/hopper/medium-replay-v0"))
    ours = minari.MinariDataset(tmp_path / "meanflow/hopper/medium-replay-v0/data")
    bundled = minari.MinariDataset(ROOT / "data/meanflow/hopper/medium-replay-v0/data")
    assert ours.total_episodes >= 3
    for episode, theirs in zip(ours.iterate_episodes(range(3)), bundled.iterate_episodes(range(3))):
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(episode, key), getattr(theirs, key))
    assert ours.storage.metadata["ref_max_score"] == 3234.3


def test_rollouts_of_a_policy_become_ant_maze_data(tmp_path):
    policy = SHARED / "parity" / "antmaze_umaze_10_policy.npz"
    if not policy.exists():
        pytest.skip("the policies are not on this machine")
    script = ROOT / "benchmark" / "antmaze_data.py"
    subprocess.run([sys.executable, script, policy, tmp_path / "x.hdf5", "--episodes", "4"], check=True,
                   capture_output=True, timeout=120)
    assert "wrote" in fetch.fetch("antmaze-umaze-v2", tmp_path / "x.hdf5", None)


# ---------------------------------------------------------------- real files
def shared(name):
    if not (SHARED / "data" / name).exists():
        pytest.skip(f"{name} is not on this machine")
    return SHARED / "data" / name


@pytest.mark.parametrize("file, name, rows, episodes, mean, best", [
    ("hopper_medium-replay-like.hdf5", "hopper-medium-replay-v2", 199_998, 972, 535, 3199),
    ("halfcheetah_medium-replay-like.hdf5", "halfcheetah-medium-replay-v2", 200_000, 200, 2699, 5872),
    ("door-human-v1.hdf5", "door-human-v1", 6_729, 25, 803, 1505)])
def test_real_d4rl_files(tmp_path, file, name, rows, episodes, mean, best):
    """The figures of the table in ../shared/data/README.md."""
    if name.startswith("door"):
        pytest.importorskip("gymnasium_robotics")
    fetch.fetch(name, shared(file), tmp_path / "x.hdf5")
    data, _ = read(tmp_path / "x.hdf5")
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    returns = [data["rewards"][first:end].sum() for first, end in zip([0, *ends[:-1]], ends)]
    assert (len(data["rewards"]), len(returns)) == (rows, episodes)
    assert (round(np.mean(returns)), round(max(returns))) == (mean, best)


def test_a_real_ogbench_file(tmp_path):
    pytest.importorskip("ogbench")
    fetch.fetch(CUBE, shared("cube-single-play-v0.npz"), tmp_path / "x.hdf5")
    data, _ = read(tmp_path / "x.hdf5")
    kept = ~data["timeouts"]
    assert kept.sum() == 150_000 and len(kept) == 150_150
    np.testing.assert_array_equal(data["rewards"][kept] == 0, data["terminals"][kept])  # at the goal
    assert set(np.unique(data["rewards"])) == {-1, 0}
