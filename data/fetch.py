"""Makes the data of one task ready for the scripts: fetched or read, checked row by row, written whole or not at all.

    python data/fetch.py antmaze-umaze-v2                              # D4RL: download, check, convert
    python data/fetch.py door-human-v1 --file door-human-v1.hdf5       # the same from a file that is there already
    python data/fetch.py cube-single-play-singletask-task2-v0          # OGBench, rewards and masks as it labels them
    python data/fetch.py --from-run runs/Hopper-v5__som_online__1 me/hopper-v0   # what an online run saw, for Minari

Into $D4RL_DATASET_DIR or ~/.d4rl/datasets: a locomotion file (hopper-medium-v2) as it is, anything else as the flat
file flat/NAME.hdf5. That has D4RL's layout (observations (N, O), actions (N, A), rewards, terminals, timeouts (N,);
the next observation of a row is the following row's, and a row with timeouts=1 has none) and the attributes env_id,
ref_min_score, ref_max_score, source and sha256 (of the source). OGBench's pixel tasks (visual-...) have the bytes
`frames`, (N, 64, 64, 3), in place of observations. --from-run writes into Minari's folder. Says one line, code 0; for
bad input or where no server answers one line on stderr, code 2; for a signal one line, code 130.
"""
import argparse
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tokenize
import urllib.request
import warnings
import zipfile
import zlib
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for data.d4rl_tasks

UNFINISHED = set()  # files and folders of this process that a signal must remove
LIBRARY_ERRORS = (OSError, EOFError, KeyError, IndexError, RuntimeError, TypeError, ValueError, MemoryError,
                  struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # h5py's, NumPy's, zipfile's
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
HDF5_PROBE = """import h5py, signal, sys
signal.alarm(60)
with h5py.File(sys.argv[1], "r") as file:
    file.attrs.get("env_id"), [file[key].id.get_storage_size() for key in sys.argv[2:]]"""
D4RL_URLS = (  # tried in this order
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{folder}/{file}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
)
ANT_FILE = "ant_maze_v2/Ant_maze_{}_sparse_fixed.hdf5"
D4RL_FILES = {  # folder and file on the servers; then its size in bytes and first digits of its SHA-256, where known
    "antmaze-umaze-v2": (ANT_FILE.format("u-maze_noisy_multistart_False_multigoal_False"), 232532949, ""),
    "antmaze-umaze-diverse-v2": (ANT_FILE.format("u-maze_noisy_multistart_True_multigoal_True"), 230854272, ""),
    "antmaze-medium-play-v2": (ANT_FILE.format("big-maze_noisy_multistart_True_multigoal_False"), 231110764, ""),
    "antmaze-medium-diverse-v2": (ANT_FILE.format("big-maze_noisy_multistart_True_multigoal_True"), 231095166, ""),
    "antmaze-large-play-v2": (ANT_FILE.format("hardest-maze_noisy_multistart_True_multigoal_False"), 230880653, ""),
    "antmaze-large-diverse-v2": (ANT_FILE.format("hardest-maze_noisy_multistart_True_multigoal_True"), 0, ""),
    "kitchen-complete-v0": ("kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5", 556544, "cd797c38cd52dfbe"),
    "kitchen-partial-v0": ("kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5", 19558459, "57bfd9c5"),
    "kitchen-mixed-v0": ("kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5", 19560760, "a30382a5"),
    "pen-cloned-v1": ("hand_dapg_v1/pen-cloned-v1.hdf5", 155074191, "6d1a982cee1950501bedebbddedbcbb3"),
    "door-cloned-v1": ("hand_dapg_v1/door-cloned-v1.hdf5", 294356136, "1f6a60ecc4d2a2e5c02f41dd3412be61"),
    "hammer-cloned-v1": ("hand_dapg_v1/hammer-cloned-v1.hdf5", 446616879, ""),
    "relocate-cloned-v1": ("hand_dapg_v1/relocate-cloned-v1.hdf5", 581319494, "8baf2b7f"),
}
LOCOMOTION = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}


class BadInput(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""


# ---------------------------------------------------------------- names and places
def d4rl_source(name):
    """(folder, file, size, first digits of its SHA-256) of a D4RL name on the servers, 0 and "" where the last two are
    unknown; None if it is no D4RL name."""
    if name in D4RL_FILES:
        path, size, digits = D4RL_FILES[name]
        return *path.split("/"), size, digits
    if match := re.fullmatch(rf"({'|'.join(LOCOMOTION)})-(random|expert|(?:medium|full)-replay|medium(?:-expert)?)-v2",
                             name):
        return "gym_mujoco_v2", f"{match[1]}_{match[2].replace('-', '_')}-v2.hdf5", 0, ""
    if re.fullmatch(r"(pen|door|hammer|relocate)-(human|cloned|expert)-v1", name):
        return "hand_dapg_v1", f"{name}.hdf5", 0, ""
    return None


def make_env(name):
    """The environment that a name's data are for; for a pixel task the one without pixels, which needs no OpenGL.
    BadInput if there is none or its packages are missing."""
    import gymnasium as gym

    import data.d4rl_tasks  # noqa: F401  registers them

    gym.logger.min_level = gym.logger.ERROR  # -v4 is out of date on purpose
    ogbench_task = getattr(gym.registry.get(name), "entry_point", None) == "data.d4rl_tasks:OGBenchTask"
    if d4rl_source(name) is None and not ogbench_task:
        if name in gym.registry:
            raise BadInput(f"{name} is an environment, not a data set: the scripts take it with --dataset-path FILE")
        raise BadInput(
            f"{name} is not supported; of D4RL, locomotion -v2 (hopper, halfcheetah, walker2d, ant), AntMaze -v2 "
            "(umaze, umaze-diverse, medium-play, medium-diverse, large-play, large-diverse), kitchen -v0 (complete, "
            "partial, mixed) and Adroit -v1 (human, cloned, expert) are, and OGBench's single tasks; "
            "Minari data sets (NAMESPACE/NAME-vN) are read by the scripts as they are")
    env_id = LOCOMOTION.get(name.split("-")[0], name.removeprefix("visual-"))
    try:
        return gym.make(env_id, **{"use_contact_forces": True} if env_id == "Ant-v4" else {})  # in D4RL's observation
    except (gym.error.Error, ImportError) as error:
        raise BadInput(str(error)) from error


def regular_file(path):
    """BadInput unless it is one: reading a pipe or a device could last for ever."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(f"{path} is not a regular file")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    return path


def remove(path):
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(path):
    """A name beside `path` for a file or folder of this process alone; what is left there at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    UNFINISHED.add(partial)
    try:
        yield partial
    finally:
        remove(partial)
        UNFINISHED.discard(partial)


def publish(partial, path):
    """The finished file or folder gets its own name, once it is on the disk."""
    for file in [partial, *partial.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.replace(partial, path)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def download_d4rl(name, path):
    """Fetches a D4RL file to `path` from the first of D4RL_URLS that has it whole and sound: (its arrays, address)."""
    from tqdm import tqdm

    folder, file, known_size, known_sha256 = d4rl_source(name)
    failures = []
    for url in (template.format(folder=folder, file=file) for template in D4RL_URLS):
        try:
            with urllib.request.urlopen(url, timeout=10) as response, open(path, "wb") as out:
                size = int(response.headers.get("Content-Length") or known_size)
                with tqdm.wrapattr(out, "write", total=size or None, desc=file) as bar:
                    shutil.copyfileobj(response, bar)
            if size and path.stat().st_size != size:
                raise OSError(f"only {path.stat().st_size} of {size} bytes came")
            if known_size and size != known_size:
                raise OSError(f"{size} bytes are served, the file is known to have {known_size}")
            if not sha256(path).startswith(known_sha256):
                raise OSError(f"its SHA-256 does not begin with {known_sha256}, which is known of the file")
            return read_d4rl(path, name), url
        except (OSError, ValueError, http.client.HTTPException, BadInput) as error:  # no route, 404: OSErrors
            failures.append(f"{url}: {error}")
    raise BadInput(f"no server gave {name} ({'; '.join(failures)}). Ways out: --file FILE, or put {file} into "
                   f"{folder_of_data()}, where it is looked for")


def download_ogbench(name, path):
    """OGBench's .npz of a name, fetched to `path` by its own function, which asks only for files that are missing."""
    import ogbench

    with temporary(path) as folder:
        folder.mkdir()
        (folder / f"{path.stem}-val.npz").touch()  # not needed for training
        try:
            socket.setdefaulttimeout(10)
            with contextlib.redirect_stdout(io.StringIO()):
                ogbench.download_datasets([path.stem], str(folder))
            read_ogbench(folder / path.name, name)
        except (OSError, ValueError, http.client.HTTPException, BadInput) as error:
            raise BadInput(f"OGBench's server did not give the data of {name} ({error}). Ways out: --file FILE.npz, "
                           f"or put {path.name} into {path.parent}, where it is looked for") from error
        publish(folder / path.name, path)


# ---------------------------------------------------------------- reading and checking
def check_declared(path, key, dtype, shape, stored, flag=False):
    """BadInput unless an array that a file declares is one of plain numbers that can be there. `stored`: its bytes in
    the file; deflate, the strongest compression in use, packs at most 1032 into one."""
    if dtype.kind not in ("biuf" if flag else "iuf") or dtype.itemsize > 8:
        raise BadInput(f"{path}: {key} are not numbers but {dtype}")
    if shape is None or len(shape) != (1 if key in ("rewards", "terminals", "timeouts") else 2):
        raise BadInput(f"{path}: {key} have shape {shape}; it takes a vector per row of observations and actions and "
                       "a number per row of rewards, terminals and timeouts")
    size = math.prod(map(int, shape)) * dtype.itemsize
    if size > 1032 * stored or size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise BadInput(f"{path}: {key} claim {size} bytes, more than its {stored} bytes can hold or than this machine")


def check_lengths(path, data):
    if len({len(value) for value in data.values()}) != 1 or len(data["actions"]) == 0:
        raise BadInput(f"{path}: lengths differ or are 0: " + ", ".join(f"{k} {len(v)}" for k, v in data.items()))


def check_rows(path, data, env):
    """BadInput, naming the first bad row, for arrays (dict, (N, ...) each) that cannot be trained on. Clips actions
    that rounding put outside their box, makes terminals and timeouts bool."""
    check_lengths(path, data)
    low, high = env.action_space.low, env.action_space.high
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if key in data and data[key].shape[1:] != space.shape:  # frames stay in their file
            raise BadInput(f"{path}: {key} have shape {data[key].shape[1:]}, but {env.spec.id} wants {space.shape}; "
                           "is this another environment's data?")
    for key, value in data.items():
        problem, bad = "NaN, infinity or a number too large", ~np.isfinite(value).reshape(len(value), -1).all(1)
        if key in ("terminals", "timeouts"):
            problem, bad = "a number other than 0 and 1", (value != 0) & (value != 1)
        elif key == "actions" and not bad.any():
            problem, bad = "a number outside the action box", ((value < low - 1e-4) | (value > high + 1e-4)).any(1)
        if bad.any():
            raise BadInput(f"{path}: {problem} in {bad.sum()} rows of {key}, the first is row {bad.argmax()}")
    np.clip(data["actions"], low, high, out=data["actions"])
    data |= {key: data[key].astype(bool) for key in ("terminals", "timeouts")}
    if data["timeouts"][:-1].all() or not (data["terminals"] | data["timeouts"]).any():
        raise BadInput(f"{path}: it takes one whole episode and a row before its last that is no time limit")


def read_d4rl(path, name):
    """The five arrays (dict, see KEYS) of an HDF5 file in D4RL's layout after all checks: float32, flags bool."""
    import gymnasium as gym
    import h5py

    env = make_env(name)
    try:  # damaged tables can make HDF5 crash or never return, deaf to signals: another process tries first
        probe = subprocess.run([sys.executable, "-c", HDF5_PROBE, regular_file(path), *KEYS], capture_output=True)
        if probe.returncode < 0:
            raise OSError(f"HDF5 does not get through it: {signal.Signals(-probe.returncode).name}")
        with h5py.File(path, "r") as file:
            if missing := [key for key in KEYS if not isinstance(file.get(key, getlink=True), h5py.HardLink)
                           or not isinstance(file[key], h5py.Dataset)]:
                raise BadInput(f"{path}: {' and '.join(missing)} missing; D4RL's layout has {', '.join(KEYS)}")
            for key, array in ((key, file[key]) for key in KEYS):
                if array.external or array.is_virtual:
                    raise BadInput(f"{path}: {key} lie in another file")
                check_declared(path, key, array.dtype, array.shape, array.id.get_storage_size(), key in KEYS[3:])
            data = {key: file[key][()] if key in KEYS[3:] else file[key].astype(np.float32)[()] for key in KEYS}
            recorded_in = file.attrs.get("env_id", "")
            recorded_in = recorded_in.decode() if isinstance(recorded_in, bytes) else str(recorded_in)
    except LIBRARY_ERRORS as error:
        raise BadInput(f"{path}: damaged or not an HDF5 file ({error})") from error
    ours, theirs = env.spec, gym.registry.get(recorded_in.removeprefix("data.d4rl_tasks:"))
    if theirs is None or (theirs.entry_point, theirs.kwargs) != (ours.entry_point, ours.kwargs):  # not the same task
        base = f"AdroitHand{name.split('-')[0].capitalize()}" if "task" in ours.kwargs else ours.id
        if recorded_in and recorded_in.split("-v")[0] != base.split("-v")[0]:
            raise BadInput(f"{path} was recorded in {recorded_in}, but {name} means {base}")
    check_rows(path, data, env)
    return data


def read_ogbench(path, name):
    """The five arrays of an OGBench .npz, with the rewards and masks of its single task by OGBench's own relabelling;
    for a pixel task those but the observations, which `write_frames` copies.

    Every row is kept. The last of a trajectory is there for its observation alone: action and reward 0, timeouts 1.
    """
    env, pixels = make_env(name), name.startswith("visual-")
    import ogbench
    from ogbench.relabel_utils import relabel_dataset

    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(regular_file(path)) as archive:
            for entry in archive.infolist():
                key = entry.filename.removesuffix(".npy")
                if key in ("observations", "actions", "terminals", "qpos", "qvel", "button_states"):
                    with archive.open(entry) as file:
                        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                    if pixels and key == "observations":
                        frames = shape
                        if dtype != np.uint8 or len(shape) != 4 or math.prod(shape) > entry.file_size:
                            raise BadInput(f"{path}: observations must be bytes, (N, 64, 64, 3), not {dtype} {shape}")
                        continue
                    check_declared(path, key, dtype, shape, entry.compress_size, key in KEYS[3:])
        if pixels:  # what follows, without the frames
            with np.load(path) as file:
                data = {key: file[key] for key in file.files if key != "observations"}
            data["actions"], data["valids"] = data["actions"].astype(np.float32), 1 - data["terminals"].astype(int)
        else:
            data = ogbench.load_dataset(str(path), compact_dataset=True, add_info=True)  # the form without copies
        check_lengths(path, {**data, "observations": range(frames[0])} if pixels else data)
        relabel_dataset(name, env, data)
    except LIBRARY_ERRORS as error:
        raise BadInput(f"{path}: damaged or not a file of OGBench's ({error})") from error
    data["timeouts"], data["terminals"] = 1 - data.pop("valids"), data.pop("masks") == 0
    own = data["timeouts"] != 0
    data["actions"][own], data["rewards"][own], data["terminals"][own] = 0, 0, False
    check_rows(path, data, env)  # with OGBench's qpos, which decides on rewards
    return {key: data[key] for key in KEYS if key in data}


def write_frames(path, source):
    """Adds the frames of an OGBench .npz to a flat file, 50 MB at a time."""
    import h5py

    try:
        with zipfile.ZipFile(source) as npz, npz.open("observations.npy") as stream, h5py.File(path, "a") as file:
            np.lib.format.read_magic(stream)
            shape = np.lib.format.read_array_header_1_0(stream)[0]
            frames = file.create_dataset("frames", shape, np.uint8, chunks=(min(64, shape[0]), *shape[1:]),
                                         fletcher32=True, compression="gzip")
            for first in range(0, shape[0], 4096):
                block = stream.read(4096 * math.prod(shape[1:]))  # at the end zipfile compares the checksum
                frames[first:first + 4096] = np.frombuffer(block, np.uint8).reshape(-1, *shape[1:])
    except LIBRARY_ERRORS as error:
        raise BadInput(f"{source}: its frames cannot be copied to {path.parent} ({error})") from error


def say_size(name, source, folder):
    """What a pixel task will take, on stderr; BadInput if the disk has too little room."""
    size = 1_001_000 * 64 * 64 * 3  # OGBench's frames, which pack to a seventh or so
    need, what = 0.4 * size, "the download and the flat file"
    if source.exists():
        try:
            with zipfile.ZipFile(regular_file(source)) as npz:
                size, packed = npz.getinfo("observations.npy").file_size, npz.getinfo("observations.npy").compress_size
                need, what = 1.5 * packed, "the flat file"
        except LIBRARY_ERRORS as error:
            raise BadInput(f"{source}: damaged or not a file of OGBench's ({error})") from error
    free = shutil.disk_usage(folder).free
    text = (f"{name}: {what} will take about {need / 1e9:.2g} GB of disk, of {free / 1e9:.2g} GB that are free in "
            f"{folder}, and training {size / 1e9:.3g} GB of memory, of the GPU if there is one")
    if free < need:
        raise BadInput(text)
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the three things to do
def folder_of_data():
    return pathlib.Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def write_flat(path, data, **attributes):
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
        file.attrs.update(attributes)


def fetch(name, file, out):
    """Makes the file of a D4RL or OGBench name, see the top; returns the line to print."""
    kwargs = make_env(name).spec.kwargs  # the name is good and the packages are there, before anything is fetched
    folder, official = (d4rl_source(name) or (None, None))[:2]
    as_it_is, pixels = folder == "gym_mujoco_v2", name.startswith("visual-")
    path = (out or folder_of_data() / (official if as_it_is else f"flat/{name}.hdf5")).expanduser().resolve()
    if path.exists():
        regular_file(path)
        if not (file or out):
            if not pixels:  # which are compared with their checksums when they are read
                read_d4rl(path, name)
            return f"{path} is there already and sound; delete it to have it made anew"
    with temporary(path) as partial, temporary(path.with_suffix(".download")) as raw:
        if official:
            source = file or folder_of_data() / official
            if file or source.exists():
                data = read_d4rl(source, name)
            else:
                source, (data, address) = raw, download_d4rl(name, raw)
        else:
            stem = re.sub("-singletask(-task[1-5])?", "", name)
            source = file or pathlib.Path("~/.ogbench/data").expanduser() / f"{stem}.npz"
            if pixels:
                say_size(name, source, path.parent)
            if not (file or source.exists()):
                download_ogbench(name, source)
            data = read_ogbench(source, name)
        origin = address if source is raw else source
        if as_it_is:
            shutil.copyfile(source, partial)
        else:
            write_flat(partial, data, env_id=f"data.d4rl_tasks:{name}", source=f"{origin}, as {name}",
                       sha256=sha256(source), **{k: v for k, v in kwargs.items() if k.startswith("ref_m")})
        if pixels:
            write_frames(partial, source)
        publish(partial, path)
    return f"wrote {len(data['rewards'])} rows of {name} to {path}, from {origin}"


def minari_folder(name, datasets_dir):
    """Where a new Minari data set belongs; BadInput if its name is none, or there is one already."""
    if not re.fullmatch(r"[-\w]+(/[-\w]+)*/[-\w]+-v\d+", name):
        raise BadInput(f"{name}: a Minari data set is called NAMESPACE/NAME-vN")
    root = pathlib.Path(datasets_dir or os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
    if (root / name).exists():
        raise BadInput(f"{root / name} exists; delete it or give another name")
    return root.resolve() / name


def write_minari(final, name, data, last, final_observations, env, **metadata):
    """Writes whole episodes, whose last rows in `data` (dict, see KEYS) are `last`, as the Minari data set `name` in
    the folder `final`. final_observations (E, O) are what followed those rows. Needs no jax: arrays are whole."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    def buffers():
        for i, (first, end) in enumerate(zip(np.append(0, last[:-1] + 1), last + 1)):
            part = {key: value[first:end] for key, value in data.items()}
            observations = np.append(part["observations"], final_observations[i:i + 1], axis=0)
            yield EpisodeBuffer(id=i, observations=observations, actions=part["actions"], rewards=part["rewards"],
                                terminations=part["terminals"], truncations=part["timeouts"])

    space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    with temporary(final) as partial, mock.patch.dict(os.environ, MINARI_DATASETS_PATH=str(partial)):
        minari.create_dataset_from_buffers(
            name, buffers(), env=gym.spec(env.spec.id), observation_space=space, action_space=env.action_space,
            requirements=["gymnasium[mujoco]>=1.1"], **metadata)
        compress(partial / name / "data" / "main_data.hdf5")
        publish(partial / name, final)


def compress(path):
    """Rewrites Minari's HDF5 with one compressed chunk per array: a tenth of the size, the same episodes."""
    import h5py

    with h5py.File(path, "r") as source, h5py.File(path.with_suffix(".packed"), "w", libver="latest") as target:
        for name, episode in source.items():
            target.create_group(name).attrs.update(episode.attrs)
            for key, array in ((key, array) for key, array in episode.items() if isinstance(array, h5py.Dataset)):
                target[name].create_dataset(key, data=array[()], chunks=array.shape, compression="gzip", shuffle=True)
    os.replace(path.with_suffix(".packed"), path)


def from_run(run, name, datasets_dir):
    """Writes all steps of a som_online.py run as a Minari data set, see the top; returns the line to print. An episode
    that the end of the run cuts off counts as truncated."""
    import gymnasium as gym
    import torch

    from data.d4rl_tasks import REFERENCE_SCORES

    final, path, steps = minari_folder(name, datasets_dir), regular_file(run / "checkpoint.pt"), run / "replay.bin"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        args, step, (num_envs, obs_dim) = checkpoint["args"], checkpoint["step"], checkpoint["observations"].shape
        gym.logger.min_level = gym.logger.ERROR  # as in make_env
        env = gym.make(args["env_id"])
        widths = obs_dim, *env.action_space.shape, 1, 1, obs_dim  # of the columns of replay.bin
        with open(regular_file(steps), "rb") as file:
            contents = file.read(4 * sum(widths) * step)
        if hashlib.sha256(contents).hexdigest() != checkpoint["replay"]:
            raise BadInput(f"{steps}: damaged, or not of the run in {path}")
        table = np.frombuffer(contents, np.float32).reshape(step, sum(widths))
        columns = np.split(table, np.cumsum(widths)[:-1], 1)
        episodes = []
        for i in range(num_envs):  # row = step * num_envs + environment
            rows = np.arange(i, step, num_envs)
            ends = columns[3][rows[:-1], 0] == 0
            ends |= (columns[4][rows[:-1]] != columns[0][rows[1:]]).any(1)
            episodes += np.split(rows, np.flatnonzero(ends) + 1)
        rows, last = np.concatenate(episodes), np.cumsum([len(episode) for episode in episodes]) - 1
        observations, actions, rewards, masks, next_observations = (column[rows] for column in columns)
        box, terminals = env.action_space, masks[:, 0] == 0
        data = dict(observations=observations, rewards=rewards[:, 0], terminals=terminals,
                    actions=(box.low + (actions + 1) / 2 * (box.high - box.low)).astype(box.dtype),
                    timeouts=np.isin(np.arange(len(rows)), last) & ~terminals)
        check_rows(steps, data, env)
        final_observations = next_observations[last]
    except (pickle.UnpicklingError, AttributeError, gym.error.Error, *LIBRARY_ERRORS) as error:
        raise BadInput(f"{path}: damaged or not a checkpoint of som_online.py ({error})") from error
    spec = gym.spec(env.spec.id)
    low, high = REFERENCE_SCORES.get(spec.name.lower(), (None, None))
    write_minari(
        final, name, data, last, final_observations, env, algorithm_name="som_online", code_permalink="som_online.py",
        ref_min_score=spec.kwargs.get("ref_min_score", low), ref_max_score=spec.kwargs.get("ref_max_score", high),
        description=f"What som_online.py collected in {step} steps with {json.dumps(args)}")
    return f"wrote {len(rows)} steps, {len(episodes)} episodes, to {final}: --env-id {name}"


# ---------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see --help")


def leave_nothing_when_stopped():
    """A signal ends the process at once, wherever it is: an exception could be swallowed by a library."""
    def stop(number, frame):
        for path in UNFINISHED:
            remove(path)
        print(f"{pathlib.Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}, nothing is half written",
              file=sys.stderr, flush=True)
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)


def main():
    leave_nothing_when_stopped()
    about, _, more = __doc__.partition("\n\n")
    parser = Parser(description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="D4RL name or OGBench single task; with --from-run, name of the Minari data set")
    parser.add_argument("--file", type=pathlib.Path, help="read this .hdf5 (D4RL) or .npz (OGBench), download nothing")
    parser.add_argument("--out", type=pathlib.Path, help="write this file instead of the one in the folder above")
    parser.add_argument("--from-run", type=pathlib.Path, metavar="RUN", help="run folder of som_online.py")
    parser.add_argument("--datasets-dir", help="with --from-run: folder that stands for ~/.minari/datasets")
    warnings.simplefilter("ignore")  # of libraries: one line is promised
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        args = parser.parse_args()
        print(from_run(args.from_run, args.name, args.datasets_dir) if args.from_run else
              fetch(args.name, args.file, args.out), flush=True)
        return 0
    except (BadInput, OSError, RuntimeError, MemoryError, ImportError) as error:  # a full disk, a missing package
        print("fetch.py:", " ".join(str(error or type(error).__name__).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
