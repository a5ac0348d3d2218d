"""Kills and hostile inputs, any number of them: what the scripts promise about signals, damage and bad flags, tried.

    python benchmark/faults.py --kills 100 --inputs 1000 --seed 1

A kill hits a run anywhere, --resume auto ends it, and it must equal an undisturbed run bit for bit. A hostile input (a
damaged or hand-made HDF5 file, Minari folder or checkpoint, a bad flag) must be refused in one line with code 2, or
change nothing: same rows, same checkpoint. Every life is a fork of this process, which has imported torch and the
scripts. Prints how to do each violation again and the counts per outcome; exit code 1 if there is a violation.
"""
import argparse
import ast
import collections
import importlib
import json
import os
import pathlib
import random
import re
import resource
import select
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

import gymnasium.envs.mujoco.hopper_v5  # noqa: E402, F401 - here, so that not every fork imports it
import h5py  # noqa: E402
import minari  # noqa: E402, F401
import numpy as np  # noqa: E402
import test_behaviour as tests  # noqa: E402 - its tiny runs, its comparison, its places to be killed at
import torch  # noqa: E402

MEMORY, TIMEOUT = 6 * 2**30, 120  # bytes and seconds of one life: sizes beyond must be refused
MINARI_ID = "meanflow/hopper/medium-replay-v0"
PLACES = "start", "any time", *tests.PLACES
VALUES = [None, "x", float("nan"), float("inf"), 0, -1, 10**9, 3234.3, True, [], {}, "{}", "os:system", "missing",
          {"unknown": 1}, {"render_mode": 3}]
NUMBERS = ["0", "-1", "-5", "0.5", "1.5", "3", "50", "100000", "1e9", "1000000000", "1000000000000", "1e300",
           "1e-320", "99999999999999999999999", "inf", "-inf", "nan", "x", "²", "1_0"]
TEXTS = ["", " ", "x", "/dev/null", "/proc/x/y", "~", "..", "a\tb", "x" * 300, "\udcff", "-", "é🦊", "os:system",
         "no/such/thing-v0", "hopper-medium-v9"]
FRACTIONS = "gamma", "tau", "ema_rate", "flow_ratio"  # must lie in 0..1
LEFT_OUT = "offline_steps", "online_steps", "total_timesteps", "utd", "cuda", "compile", "track", "capture_video"
# what may stand beside the one line: a library's notice, progress bars, and tyro's box around its own complaint
NOTES = r"^AdroitHand|\d+%\||^[│╭╰]|^\s*\d*step \["


# ---------------------------------------------------------------- lives
def run_in_fork(m, argv, folder, act):
    """Ends this process as `python script.py argv` ends, by the two blocks under `if __name__ == "__main__"`."""
    code = 70
    try:
        os.chdir(folder)
        os.environ["HOME"], sys.argv, m.__name__ = str(folder), [m.__file__, *argv], "__main__"
        for number, path in ((1, os.devnull), (2, "stderr")):
            os.dup2(os.open(path, os.O_WRONLY), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a campaign in the background ignores it
        act()
        for block in (node for node in ast.parse(pathlib.Path(m.__file__).read_text()).body if type(node) is ast.If):
            exec(compile(ast.Module([block], []), m.__file__, "exec"), vars(m))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # the first one was about Ctrl-C
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - a forked child must not come back into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def live(m, argv, folder, act=lambda: None, kill=()):
    """One life of a script's command line: its exit code (negative: a signal's) and stderr. `act` is called first;
    `kill`: signals and when to send them. SIGKILL ends what hangs."""
    folder.mkdir(exist_ok=True)
    (folder / "stderr").write_bytes(b"")
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    pid = os.fork()
    if pid == 0:
        run_in_fork(m, argv, folder, act)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    process = os.pidfd_open(pid)
    for number, seconds in (*kill, (signal.SIGKILL, TIMEOUT)):
        if not select.select([process], [], [], seconds)[0]:
            os.kill(pid, number)
    os.close(process)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (folder / "stderr").read_text(errors="replace")


def differences(run, whole):
    """Where a run is not the undisturbed one."""
    try:
        found = tests.differences(tests.result(run), tests.result(whole))
        return sorted(found)[:3] + ["metrics.jsonl"] * (tests.rows(run) != tests.rows(whole))
    except (ValueError, tests.pytest.fail.Exception) as error:  # rows that are no JSON, or NaN
        return [f"metrics.jsonl: {error}"]


# ---------------------------------------------------------------- hostile inputs
# Each maker returns what it did, the command line, and what may come of it instead of a refusal: "nothing", "the same"
# as undisturbed, or "anything" where no reader could notice.
def damage(rng, path):
    """Flips a bit, or cuts, zeroes or draws bytes; half of the time near the beginning, where the structure lies."""
    old = path.read_bytes()
    at, size = rng.randrange(len(old) if rng.random() < 0.5 else min(2500, len(old))), rng.choice((1, 4, 64, 1000))
    how, part = rng.choice([("flip", bytes([old[at] ^ 1 << rng.randrange(8)])), ("cut", b""), ("zero", bytes(size)),
                            ("noise", rng.randbytes(size))])
    new = old[:at] + part + (b"" if how == "cut" else old[at + len(part):])
    if new == old:
        return damage(rng, path)
    path.write_bytes(new)
    return f"{path.name}: {how} {len(part)} at {at} of {len(old)}"


def spoil(rng, group, key):
    """Replaces one column of an HDF5 file by something that is none, or by the same numbers as float64."""
    old = group[key][()]
    n, like = len(old), lambda value: np.full(old.shape, value)
    values = dict(
        missing=None, texts=np.array([b"0", b"1"] * n)[:n], strings=["0"] * n, nan=like(np.nan), inf=like(np.inf),
        scalar=1.0, complex=old.astype(complex), empty=h5py.Empty("f4"), axis=old[..., None], none=old[:0],
        short=old[:-1], long=np.concatenate([old, old[-1:]]), void=np.zeros(n, "V4"),
        compound=np.zeros(n, [("a", "f4")]), reference=np.array([group[key].ref] * n, h5py.ref_dtype),
        vlen=dict(shape=n, dtype=h5py.vlen_dtype("f4")),
        huge=dict(shape=(10**12, *old.shape[1:]), dtype="f4", chunks=(1000, *old.shape[1:])))
    if old.dtype == bool:
        values.update(half=like(0.5), two=like(2))
    if key not in ("actions", "rewards"):  # there float64 rounds otherwise
        values["same"] = old.astype(np.float64)
    what = rng.choice(sorted(values))
    del group[key]
    if what != "missing":
        group.create_dataset(key, **values[what] if isinstance(values[what], dict) else dict(data=values[what]))
    return f"{group.name} {key}: {what}", "the same" if what == "same" else "nothing"


def make_data(rng, m, campaign, folder, kind):
    """An HDF5 file in D4RL's layout or a folder of Minari data sets."""
    root = shutil.copytree(campaign.folder / kind, folder / kind)
    hdf5, *more = sorted(path for path in root.rglob("*") if path.is_file())
    how = rng.choice(("bytes", "column", "column", *("env_spec", "env_spec", "metadata", "metadata") * len(more)))
    if how == "bytes":
        what, may = damage(rng, rng.choice((hdf5, *more))), "anything"
    elif how == "column":
        with h5py.File(hdf5, "a") as file:
            groups = [file] if kind == "hdf5" else rng.choice([[*file.values()], [file["episode_1"]]])
            key, seed = rng.choice(sorted({*groups[0]} - {"truncations", "infos"})), rng.random()  # these nobody reads
            for group in groups:
                what, may = spoil(random.Random(seed), group, key)
    else:
        about = json.loads(more[0].read_text())
        part = json.loads(about["env_spec"]) if how == "env_spec" else about
        key, value = rng.choice(sorted(part)), rng.choice(VALUES)
        part[key] = value
        if value == "missing":
            del part[key]
        more[0].write_text(json.dumps({**about, "env_spec": json.dumps(part)} if how == "env_spec" else about))
        plausible = value in (None, "missing") or isinstance(value, (int, float)) and abs(value) < np.inf
        meant = "score" in key and plausible or key == "max_episode_steps" and value in (None, 10**9)
        what, may = f"{key} = {value!r}", "anything" if meant else "the same"
    return f"{how}: {what}", campaign.argv(m, folder, kind, root), may


def make_checkpoint(rng, m, campaign, folder, kind):
    """Damaged, or sealed as it should be but something else."""
    old, flag = campaign.whole[m.SCRIPT, "hdf5"], rng.choice(("--resume", "--resume", "--evaluate"))
    path = shutil.copytree(old, folder / "runs" / old.name) / "checkpoint.pt"
    if flag == "--evaluate" and rng.random() < 0.5:
        path = path.with_name("policy.pt")
    steps = path.with_name("replay.bin")
    if steps.exists() and flag == "--resume" and rng.random() < 0.4:
        return damage(rng, steps), [flag, str(path)], "nothing"
    if rng.random() < 0.8:
        return damage(rng, path), [flag, str(path)], "nothing"
    state = rng.choice([[1], torch.ones(3), 1, "x", {}, {**torch.load(path, weights_only=True), "script": "x"}])
    tests.save_sealed(state, path)
    return f"sealed: {str(state)[:40]}", [flag, str(path)], "nothing"


def make_flag(rng, m, campaign, folder, kind):
    name, hint = rng.choice([item for item in typing.get_type_hints(m.Args).items() if item[0] not in LEFT_OUT])
    if {int, float} & {hint, *typing.get_args(hint)}:
        value = rng.choice(NUMBERS)
        least = -1e10 if name in ("reward_shift", "time_mean") else 0
        most = 1 if name in FRACTIONS else 2**63 if name == "seed" else 1e10
        bad = value in ("x", "²") or not least <= float(value) <= most
    else:
        bad = (value := rng.choice(TEXTS)) == ""
    argv = [*campaign.argv(m, folder, "hdf5"), f"--{name.replace('_', '-')}={value}"]
    return argv[-1], argv, "nothing" if bad else "anything"


MAKERS = dict(hdf5=make_data, minari=make_data, checkpoint=make_checkpoint, flag=make_flag)


# ---------------------------------------------------------------- the campaign
class Campaign:
    """Counts what became of every kill and input; `whole` has the undisturbed runs, by script and data."""

    def __init__(self, options, scripts, folder):
        self.options, self.scripts, self.folder = options, scripts, folder
        self.counts, self.whole, self.began = collections.defaultdict(collections.Counter), {}, time.time()
        (folder / "hdf5").mkdir()
        tests.write_data(folder / "hdf5" / "data.hdf5")
        source, copy = (parent / MINARI_ID / "data" for parent in (ROOT / "data", folder / "minari"))
        copy.mkdir(parents=True)
        about = json.loads((source / "metadata.json").read_text())
        with h5py.File(source / "main_data.hdf5") as old, h5py.File(copy / "main_data.hdf5", "w") as new:
            for i in range(3):
                old.copy(f"episode_{i}", new)
            steps = sum(len(new[f"episode_{i}/rewards"]) for i in range(3))
        (copy / "metadata.json").write_text(json.dumps({**about, "total_episodes": 3, "total_steps": steps}))
        for m in scripts:
            for kind in ("minari", "hdf5") if m.SCRIPT in tests.OFFLINE else ("hdf5",):
                at, began = folder / f"{m.SCRIPT}-{kind}", time.time()
                assert live(m, self.argv(m, at, kind), at)[0] == 0, at
                self.whole[m.SCRIPT, kind], = (at / "runs").iterdir()
                self.seconds = time.time() - began  # how long a life may take

    def argv(self, m, folder, kind, data=None):
        data = data or self.folder / kind
        data, more = (data, ["--env-id", MINARI_ID, "--no-compile"]) if kind == "minari" else (data / "data.hdf5", [])
        return [*tests.flags(m.SCRIPT, data, folder / "runs", "--eval-episodes 1"), *more]

    def note(self, what, outcome, detail, folder):
        """Counts; the folder of a violation stays."""
        self.counts[what][outcome] += 1
        if outcome.startswith("ok"):
            shutil.rmtree(folder)
        else:
            again = re.sub(r"(kill|input)(\d+)", r"--\1s 1 --first \2", folder.name)
            print(f"VIOLATION {what}: {outcome}: {detail}\n  in {folder}: python benchmark/faults.py {again} "
                  f"--seed {self.options.seed} --script {self.options.script}", flush=True)

    def kill(self, number):
        rng, folder = random.Random(f"kill {self.options.seed} {number}"), self.folder / f"kill{number}"
        m, place = self.scripts[number % len(self.scripts)], rng.choice(PLACES)
        how, kill, act = signal.SIGTERM if place == "SIGTERM" else signal.SIGKILL, (), lambda: None
        if place in tests.PLACES:
            count = rng.randint(1, 22 if place in ("update", "evaluation", "SIGTERM") else 5)
            act = lambda: tests.arm(m, place, count)
        else:
            how = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            kill = [(how, rng.uniform(0, 0.1 if place == "start" else self.seconds))]
        argv = [*self.argv(m, folder, "hdf5"), "--resume", "auto"]
        code, err = live(m, argv, folder, act, kill)
        again, more = live(m, argv, folder)
        found, outcome = [f"code {again}"], "ok: over before" if code == 0 else "ok: bit-equal"
        if again == 0:
            run, = (folder / "runs").iterdir()
            found = differences(run, self.whole[m.SCRIPT, "hdf5"]) + list(run.glob("*.tmp"))
        if code not in (0, 130, *[-how] * (place != "SIGTERM")):
            outcome = f"code {code}"
        elif "Traceback" in err + more:
            outcome = "traceback"
        elif found:
            outcome = "resumed to something else"
        what = f"kill: {place} {how.name}" if kill else f"kill: {place}"
        self.note(what, outcome, f"{m.SCRIPT}, {found}, {(err + more)[-300:]!r}", folder)

    def input(self, number):
        rng, folder = random.Random(f"input {self.options.seed} {number}"), self.folder / f"input{number}"
        m = self.scripts[number % len(self.scripts)]
        kind = rng.choice([*MAKERS][0 if m.SCRIPT in tests.OFFLINE else 2:])
        folder.mkdir()
        what, argv, may = MAKERS[kind](rng, m, self, folder, kind)
        code, err = live(m, argv, folder)
        said = [line for line in re.split("[\r\n]", err) if line.strip() and not re.search(NOTES, line)]
        found, outcome = [], {0: "ok: runs", 2: "ok: refused", 3: "ok: non-finite"}.get(code, f"code {code}")
        if code == 0 and may != "nothing" and kind != "flag":
            outcome, found = "ok: the same", differences(next((folder / "runs").iterdir()), self.whole[m.SCRIPT, kind])
        if "Traceback" in err:
            outcome = "traceback"
        elif len(said) > 1 or code == 2 and not err.strip():
            outcome = f"code {code}, {len(said)} lines"
        elif code == 2 and kind in ("hdf5", "minari") and (folder / "runs").exists():
            outcome = "refused, left a run folder"
        elif code == 3 and kind != "flag" or code == 0 and may == "nothing":
            outcome = "accepted"
        elif found:
            outcome = "ran on, changed" if may == "the same" else "ok: changed what nobody could notice"
        self.note(kind, outcome, f"{m.SCRIPT}, {what}, {found}, {' '.join(said)[-300:]!r}", folder)

    def report(self):
        """Prints all counts; returns the number of violations."""
        for what, outcomes in sorted(self.counts.items()):
            print(f"{what}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
        total, seconds = sum(self.counts.values(), collections.Counter()), time.time() - self.began
        violations = sum(count for outcome, count in total.items() if not outcome.startswith("ok"))
        print(f"{total.total()} kills and inputs in {seconds:.0f} s: {violations} violations", flush=True)
        return violations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(kills=0, inputs=0, seed=1, first=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--script", default="all", choices=["all", *tests.SCRIPTS])
    options = parser.parse_args()
    tests.register_environments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # this and the first jvp import seconds worth of torch: not in every life
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    scripts = [importlib.import_module(name) for name in tests.SCRIPTS if options.script in ("all", name)]
    campaign = Campaign(options, scripts, pathlib.Path(tempfile.mkdtemp(prefix="faults-")))
    for count, act in ((options.kills, campaign.kill), (options.inputs, campaign.input)):
        for number in range(options.first, options.first + count):
            act(number)
            if number % 100 == 99:
                campaign.report()
    violations = campaign.report()
    if not violations:
        shutil.rmtree(campaign.folder)
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main())
