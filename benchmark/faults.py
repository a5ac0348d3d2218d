"""Kills and hostile inputs, any number of them: what the scripts promise about signals, damage and bad flags, tried.

    python benchmark/faults.py --kills 100 --inputs 1000 --seed 1

A kill hits a run anywhere, --resume auto ends it, and it must equal an undisturbed run bit for bit. A hostile input (a
damaged or hand-made HDF5 file, Minari folder or checkpoint, a bad flag) must be refused in one line with code 2, or
change nothing: same rows, same checkpoint; a flag may also end in code 3. Every life is a fork of this process, which
has imported torch and the scripts. Prints the counts per outcome and how to do each violation again; then exit code 1.
"""
import argparse
import ast
import collections
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gymnasium as gym  # noqa: E402
import gymnasium.envs.mujoco.hopper_v5  # noqa: E402, F401 - not in every fork
import h5py  # noqa: E402
import minari  # noqa: E402, F401
import numpy as np  # noqa: E402
import test_behaviour as tests  # noqa: E402 - its tiny runs, its comparison, its places to be killed at
import torch  # noqa: E402

MEMORY = 6 * 2**30  # of one life; sizes beyond it must be refused, not kill the machine
MINARI_ID = "meanflow/hopper/medium-replay-v0"
PLACES = "start", "update", "SIGTERM", "evaluation", "SIGTERM in it", "row", "policy", "checkpoint", "rename", ""
NUMBERS = ["0", "-1", "-5", "0.5", "1.5", "3", "50", "100000", "1e9", "1000000000", "1000000000000", "1e300",
           "1e-320", "99999999999999999999999", "inf", "-inf", "nan", "x", "²", "1_0"]
TEXTS = ["", " ", "x", "/dev/null", "/proc/x/y", "~", "..", "a\tb", "x" * 300, "\udcff", "-", "é🦊", "os:system",
         "no/such/thing-v0", "hopper-medium-v9"]
ENTRIES = [None, "text", -5, float("nan"), [], {}, torch.ones(2, 3), torch.ones(()), 10**30, "missing", 0.5]
FRACTIONS = "gamma", "tau", "ema_rate", "flow_ratio", "policy_actions"  # must lie in 0..1
LEFT_OUT = "offline_steps", "online_steps", "total_timesteps", "utd", "cuda", "compile", "track", "capture_video"


def run_in_fork(m, argv, folder, act):
    """Ends this process like `python script.py argv` does: runs the script's last block, as it stands there."""
    code, main = 70, m.main

    def entered():  # from here on the script answers for Ctrl-C
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        return main()

    try:
        os.chdir(folder)
        os.environ["HOME"], m.main, sys.argv = str(folder), entered, [m.__file__, *argv]
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(name, os.O_WRONLY), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        act()
        block = ast.Module(ast.parse(pathlib.Path(m.__file__).read_text()).body[-1].body, [])
        exec(compile(block, m.__file__, "exec"), vars(m))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - a forked child must not come back into the caller
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def live(m, argv, folder, timeout=60, act=lambda: None, kill=None):
    """One life of a script's command line: its exit code (negative: a signal's, None: hung), stdout and stderr. `act`
    is called first; `kill`: a signal and when to send it."""
    folder.mkdir(exist_ok=True)
    files, began, hung = [folder / "stdout", folder / "stderr"], time.time(), False
    for path in files:
        path.write_bytes(b"")
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    pid = os.fork()
    if pid == 0:
        run_in_fork(m, argv, folder, act)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        hung = time.time() - began > timeout
        if hung or kill and time.time() - began > kill[1]:
            os.kill(pid, signal.SIGKILL if hung else kill[0])
            kill = None
        time.sleep(0.003)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if hung else code, *(path.read_text(errors="replace") for path in files)


def differences(run, whole):
    """Where a run that ended with code 0 is not the undisturbed one."""
    try:
        found = tests.differences(tests.result(run), tests.result(whole))
        return sorted(found)[:3] + ["metrics.jsonl"] * (tests.rows(run) != tests.rows(whole))
    except (ValueError, tests.pytest.fail.Exception) as error:  # rows that are no JSON, or NaN
        return [f"metrics.jsonl: {error}"]


def arm(m, place, count):
    """Patches this process so that it is hit when it comes to `place` for the count-th time."""
    calls = itertools.count(1)

    def step(envs, actions, original=gym.vector.SyncVectorEnv.step):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(envs, actions)

    if place == "SIGTERM in it":
        gym.vector.SyncVectorEnv.step = step
    elif place not in ("start", ""):
        tests.arm(m, "before the rename" if place == "rename" else place, count)


# ---------------------------------------------------------------- hostile inputs
def damage(rng, path):
    """Flips, cuts, zeroes or draws bytes; half of the time near the beginning, where the structure lies."""
    old, how = path.read_bytes(), rng.choice(("flip", "cut", "zero", "noise"))
    new = bytearray(old)
    while bytes(new) == old:
        at = rng.randrange(len(new) if rng.random() < 0.5 else min(2500, len(new)))
        size = min(rng.choice((1, 4, 64, 1000)), len(new) - at)
        if how == "flip":
            new[at] ^= 1 << rng.randrange(8)
        else:
            new[at:len(new) if how == "cut" else at + size] = dict(
                cut=b"", zero=bytes(size), noise=rng.randbytes(size))[how]
    path.write_bytes(new)
    return f"{path.name}: {how} {size} at {at} of {len(old)}"


def column(rng, group, key):
    """Replaces one column of an HDF5 file by something that is none; also returns whether it must be refused."""
    old = group[key][()]
    n = len(old)
    values = dict(
        texts=np.array([b"0", b"1"] * n)[:n], strings=["0"] * n, nan=np.full(old.shape, np.nan), half=old * 0 + 0.5,
        two=old * 1.0 + 2, complex=old.astype(complex), empty=h5py.Empty("f4"), axis=old[..., None], none=old[:0],
        short=old[:-1], long=np.concatenate([old, old[-1:]]), scalar=np.float32(0), void=np.zeros(n, "V4"),
        compound=np.zeros(n, [("a", "f4")]), inf=np.full(old.shape, np.inf), missing=None, group=None, vlen=None,
        reference=np.array([group[key].ref] * n, h5py.ref_dtype), huge=None, same=old.astype(np.float64))
    what = rng.choice([name for name in values if not (  # other rewards are no damage; float64 rounds otherwise
        name in ("half", "two") and old.dtype != bool or name == "same" and key in ("actions", "rewards"))])
    del group[key]
    if what == "group":
        group.create_group(key)
    elif what == "vlen":
        group.create_dataset(key, (n,), h5py.vlen_dtype("f4"))
    elif what == "huge":
        group.create_dataset(key, (10**12, *old.shape[1:]), "f4", chunks=(1000, *old.shape[1:]))
    elif what != "missing":
        group[key] = values[what]
    return f"{group.name} {key} {what}", what != "same"


def make_hdf5(rng, m, campaign, folder):
    """What was done, the command line; whether no reader could notice it, and whether it may never be accepted."""
    how = rng.choice(("bytes", "bytes", "sums", "column", "column", "column", "attribute", "file"))
    path, hidden, fatal = folder / "data.hdf5", how == "bytes", how == "file"
    shutil.copy(campaign.folder / ("sums.hdf5" if how == "sums" else "data.hdf5"), path)
    if how in ("bytes", "sums"):
        what = damage(rng, path)
    elif how == "file":
        path.unlink()
        what = rng.choice(("mkfifo", "mkdir", "touch", "link to itself", "missing"))
        if what in ("mkfifo", "mkdir", "touch"):
            dict(mkfifo=os.mkfifo, mkdir=os.mkdir, touch=pathlib.Path.touch)[what](path)
        elif what == "link to itself":
            path.symlink_to(path)
    else:
        with h5py.File(path, "a") as file:
            if how == "column":
                what, fatal = column(rng, file, rng.choice(sorted(file)))
            else:
                key, value = rng.choice(("env_id", "ref_min_score", "ref_max_score")), rng.choice((
                    3, np.nan, b"Short-v0\xff", "", [1, 2], ["Short-v0"], h5py.Empty("f4"), 1j, "x", np.inf,
                    np.void(b"abc"), "os:system", "Short-v0"))
                file.attrs.update({"ref_min_score": 0.0, "ref_max_score": 1.0} if key != "env_id" else {})
                file.attrs[key] = value
                what, hidden = f"{key} = {value!r}", key == "ref_max_score" and isinstance(value, int)
    return f"{how}: {what}", campaign.argv(m, folder, path), hidden, fatal


def make_minari(rng, m, campaign, folder):
    """The same of a Minari folder."""
    how, fatal = rng.choice(("metadata", "metadata", "spec", "spec", "column", "column", "bytes")), False
    root, hidden = pathlib.Path(shutil.copytree(campaign.folder / "minari", folder / "in")), how == "bytes"
    hdf5, metadata = (root / MINARI_ID / "data" / name for name in ("main_data.hdf5", "metadata.json"))
    if how == "bytes":
        what = damage(rng, rng.choice((hdf5, metadata)))
    elif how == "column":
        key = rng.choice(("observations", "actions", "rewards", "terminations"))
        one, seed = rng.randrange(6), rng.random()
        with h5py.File(hdf5, "a") as file:
            for name in list(file) if one > 2 else [f"episode_{one}"]:  # all of them alike, or one
                what, fatal = column(random.Random(seed), file[name], key)
    else:
        about = json.loads(metadata.read_text())
        target = json.loads(about["env_spec"]) if how == "spec" else about
        key = rng.choice(("id", "entry_point", "max_episode_steps", "kwargs") if how == "spec" else (
            "total_episodes", "total_steps", "ref_min_score", "ref_max_score", "env_spec", "eval_env_spec",
            "observation_space", "action_space", "data_format"))
        value = rng.choice((None, "x", float("nan"), 0, -1, 10**9, [], {}, "{}", 1e400, "os:system", "missing", 3234.3,
                            True, {"unknown": 1}, {"render_mode": 3}, {"id": "Hopper-v5"}))
        target[key] = value
        if value == "missing":
            del target[key]
        metadata.write_text(json.dumps({**about, "env_spec": json.dumps(target)} if how == "spec" else about))
        what, number = f"{key} = {value!r}", type(value) in (int, float, bool) and abs(value) < 1e99
        hidden = key == "max_episode_steps" and value in (None, 10**9) or key.startswith("ref") and (  # may be meant
            value in (None, "missing") or number and (value < 3234 if key == "ref_min_score" else value >= 0))
    return f"{how}: {what}", campaign.argv(m, folder, root), hidden, fatal


def make_checkpoint(rng, m, campaign, folder):
    """The same of a run folder that is resumed or evaluated."""
    evaluates, how = rng.random() < 0.25, rng.choice(("bytes", "bytes", "entry", "entry", "entry", "file"))
    old, hidden = campaign.whole[m.SCRIPT, "hdf5", "whole" if evaluates else "half"], False
    run = shutil.copytree(old, folder / "runs" / old.name)
    path = run / (rng.choice(("policy.pt", "checkpoint.pt")) if evaluates else "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    if how == "bytes":
        what = damage(rng, path)
    elif how == "file":
        what, junk = rng.choice((("policy", (run / "policy.pt").read_bytes()), ("empty", b""), ("text", b"x" * 999),
                                 ("list", [1]), ("tensor", torch.ones(3)), ("script", {**state, "script": "x"})))
        path.write_bytes(junk) if isinstance(junk, bytes) else torch.save(junk, path)
    else:
        at, keys = state, []
        while isinstance(at, (dict, list)) and at and (not keys or rng.random() < 0.8):
            parent, key = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at, keys, value = at[key], [*keys, key], rng.choice(ENTRIES)
        parent[key] = value
        if isinstance(value, str) and value == "missing":
            del parent[key]
        torch.save(state, path)
        what = f"{keys} was {str(at)[:30]!r}, now {value!r}"
        hidden = isinstance(at, float) and type(value) in (int, float) or (  # may be meant
            isinstance(at, torch.Tensor) and at.shape == getattr(value, "shape", None))
    return f"{how}: {what}", ["--evaluate" if evaluates else "--resume", str(path)], hidden, False


def make_flags(rng, m, campaign, folder):
    """The same of one flag."""
    name = rng.choice([field.name for field in dataclasses.fields(m.Args) if field.name not in LEFT_OUT])
    hint = typing.get_type_hints(m.Args)[name]
    number = {int, float} & {hint, *typing.get_args(hint)}
    value = rng.choice(NUMBERS if number else TEXTS)
    size = 0.0 if not number else float("nan") if value in ("x", "²") else float(value)
    fatal = value == "" or not abs(size) < 1e10 or size < 0 and name != "reward_shift"
    fatal = (fatal or name in FRACTIONS and size > 1) and not (name == "seed" and 0 <= size < 2**63)
    argv = [*campaign.argv(m, folder, campaign.folder / "data.hdf5"), f"--{name.replace('_', '-')}={value}"]
    return argv[-1], argv, True, fatal


class Campaign:
    """Counts what became of every kill and input; `whole` has the undisturbed runs, by script, data and kind."""

    def __init__(self, options, folder):
        self.options, self.folder, self.whole, self.counts, self.violations = options, folder, {}, {}, []
        tests.write_data(folder / "data.hdf5")
        with h5py.File(folder / "data.hdf5") as plain, h5py.File(folder / "sums.hdf5", "w", libver="latest") as file:
            for key in plain:  # a file that can tell its own damage
                file.create_dataset(key, data=plain[key][()], chunks=plain[key].shape, fletcher32=True)
        source, copy = ROOT / "data" / MINARI_ID / "data", folder / "minari" / MINARI_ID / "data"
        copy.mkdir(parents=True)
        about = json.loads((source / "metadata.json").read_text())
        with h5py.File(source / "main_data.hdf5") as old, h5py.File(copy / "main_data.hdf5", "w") as new:
            for i in range(3):
                old.copy(f"episode_{i}", new)
            steps = sum(len(new[f"episode_{i}/rewards"]) for i in range(3))
        (copy / "metadata.json").write_text(json.dumps({**about, "total_episodes": 3, "total_steps": steps}))

    def argv(self, m, folder, data):
        more = ["--env-id", MINARI_ID, "--no-compile"] if (data / MINARI_ID).exists() else []
        return [*tests.flags(m.SCRIPT, data, folder / "runs", "--eval-episodes 1"), *more]

    def undisturbed(self, m, kind):
        """Makes a whole run on the HDF5 file or the Minari folder, one killed half-way, and its evaluation."""
        if (m.SCRIPT, kind, "whole") not in self.whole:
            for name, act in (("whole", lambda: None), ("half", lambda: tests.arm(m, "update", 14))):
                at = self.folder / f"{m.SCRIPT}-{kind}-{name}"
                argv = self.argv(m, at, self.folder / ("minari" if kind == "minari" else "data.hdf5"))
                code, _, err = live(m, argv, at, act=act)
                assert code == (0 if name == "whole" else -9), err
                self.whole[m.SCRIPT, kind, name] = next((at / "runs").iterdir())
            shown = ["--evaluate", str(self.whole[m.SCRIPT, kind, "whole"])]
            self.whole[m.SCRIPT, kind, "evaluate"] = live(m, shown, self.folder / "shown")[1]
        return self.whole[m.SCRIPT, kind, "whole"]

    def note(self, what, outcome, detail, flag, number, folder):
        """Counts; the folder of a violation stays."""
        self.counts.setdefault(what, collections.Counter())[outcome] += 1
        if self.options.verbose:
            print(f"{flag} {number} {what}: {outcome}: {detail}", flush=True)
        if outcome.startswith("ok"):
            shutil.rmtree(folder)
            return
        again = " ".join(f"{key} {value}" for key, value in {"--kills": 0, "--inputs": 0, flag: 1}.items())
        self.violations.append(f"{what}: {outcome}: {detail}\n  in {folder}: python benchmark/faults.py {again} "
                               f"--seed {self.options.seed} --first {number} --script {self.options.script}")

    def kill(self, number, scripts):
        """Every place in every script in turn."""
        rng, folder = random.Random(f"kill {self.options.seed} {number}"), self.folder / f"kill{number}"
        m, place = scripts[number % len(scripts)], PLACES[number // len(scripts) % len(PLACES)]
        whole, how = self.undisturbed(m, "hdf5"), rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        kill = (how, rng.uniform(0, 0.1 if place == "start" else 1.0)) if place in ("start", "") else None
        how = how if kill else signal.SIGTERM if "SIGTERM" in place else signal.SIGKILL
        argv = [*self.argv(m, folder, self.folder / "data.hdf5"), "--resume", "auto"]
        count = rng.randint(1, 22 if place in ("update", "SIGTERM", "SIGTERM in it", "evaluation") else 5)
        code, _, err = live(m, argv, folder, self.options.timeout, lambda: arm(m, place, count), kill)
        expected = {signal.SIGINT: (0, 130), signal.SIGTERM: (0, 130, -15), signal.SIGKILL: (0, -9)}[how]
        again, _, more = live(m, argv, folder, self.options.timeout)
        runs = list((folder / "runs").glob("*"))
        found = differences(runs[0], whole) + list(runs[0].glob("*.tmp")) if again == 0 and runs else [again]
        outcome = "ok: over before" if code == 0 else "ok: bit-equal"
        if code not in expected or "Traceback" in err + more:
            outcome = f"code {code}, {'Traceback' in err + more}"
        elif found:
            outcome = "resumed to something else"
        self.note(f"{how.name} at {place or 'any time'}", outcome,
                  f"{m.SCRIPT}, {found}, {(err + more)[-300:]!r}", "--kills", number, folder)

    def input(self, number, scripts):
        rng, folder = random.Random(f"input {self.options.seed} {number}"), self.folder / f"input{number}"
        m = scripts[number % len(scripts)]
        data_makers = (make_hdf5, make_hdf5, make_minari, make_minari) if m.SCRIPT in tests.OFFLINE else ()
        make = rng.choice((*data_makers, make_checkpoint, make_checkpoint, make_flags))
        kind, _ = make.__name__.removeprefix("make_"), folder.mkdir()
        whole = self.undisturbed(m, "minari" if kind == "minari" else "hdf5")
        what, argv, hidden, fatal = make(rng, m, self, folder)
        code, out, err = live(m, argv, folder, self.options.timeout)
        note = r"no CUDA device|^AdroitHand|\d+%\||^[│╭╰]|^\s*\d*step \["  # and progress bars and tyro's boxes
        said = [line for line in re.split("[\r\n]", err) if line.strip() and not re.search(note, line)]
        found = []
        if code == 0 and "--evaluate" in argv:
            found = [out] * (out != self.whole[m.SCRIPT, "hdf5", "evaluate"])
        elif code == 0 and kind != "flags":
            found = differences(next((folder / "runs").iterdir()), whole)
        outcome = {0: "ok: changes nothing", 2: "ok: refused", 3: "ok: non-finite"}.get(code, f"code {code}")
        if code is None or "Traceback" in err:
            outcome = "hang" if code is None else "traceback"
        elif len(said) > 1 or code == 2 and not err.strip():
            outcome = f"code {code} with {len(said)} lines"
        elif code == 0 and fatal or code == 3 and kind != "flags":
            outcome = "accepted"
        elif found:
            outcome = "ok: changed what nobody could notice" if hidden else "ran on, changed"
        elif code == 2 and kind in ("hdf5", "minari") and (folder / "runs").exists():
            outcome = "refused, left a run folder"
        self.note(kind, outcome, f"{m.SCRIPT}, {what}, {found}, {' '.join(said)[-300:]!r}", "--inputs", number, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(kills=100, inputs=1000, seed=1, first=0, timeout=60).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--script", default="all", choices=["all", *tests.SCRIPTS])
    parser.add_argument("--verbose", action="store_true", help="a line for everything that is tried")
    options = parser.parse_args()
    tests.register_environments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # this and the first jvp import seconds worth of torch: not in every life
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    scripts = [importlib.import_module(name) for name in tests.SCRIPTS if options.script in ("all", name)]
    began, folder = time.time(), pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(options, folder)
    for count, act in ((options.kills, campaign.kill), (options.inputs, campaign.input)):
        for number in range(options.first, options.first + count):
            act(number, scripts)
    print("\n".join(campaign.violations))
    for what, outcomes in sorted(campaign.counts.items()):
        print(f"{what}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    print(f"{options.kills} kills and {options.inputs} inputs in {time.time() - began:.0f} s: "
          f"{len(campaign.violations)} violations")
    if not campaign.violations:
        shutil.rmtree(folder)
    return bool(campaign.violations)


if __name__ == "__main__":
    sys.exit(main())
