"""Runs a suite, scripts x tasks x seeds, on this machine or on a Ray cluster. The same command again continues it.

    python benchmark/suite.py smoke                      # as many runs at a time as there are cores, or GPUs
    python benchmark/suite.py d4rl --dry-run             # the commands, what they cost, what is missing
    python benchmark/suite.py stand-in --only "MFQL__.*__1$"
    RAY_ADDRESS=auto python benchmark/suite.py d4rl --backend ray --gpus-per-run 0.25        # docs/cluster.md

A suite is a TOML file, benchmark/suites/NAME.toml, see smoke.toml. A run is one command with --resume auto and the
folder RUNS_DIR/SUITE/LABEL__TASK__SEED; what it says goes to that name with .log. What has a done.json is left out.
The first seed comes first, so that an interrupted suite has whole tables, but before it whatever has begun.
Exit code 0: all done, 1: some failed (their last lines come at the end, the others went on), 2: bad input,
130: stopped by Ctrl-C, SIGTERM or SIGHUP, after every run has saved; a second one does not wait for that. Needs
Python 3.11.
"""
import collections
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import platform
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import filelock
import tomllib
import tyro
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = "offline_steps", "online_steps", "total_timesteps"  # the flags that make up the length of a run
# Steps per second of CPU time on one core of an Intel Xeon, beside other work: default sizes, Hopper, not compiled.
# `rate` of a method in a suite goes before that, and before both what earlier runs of the suite logged.
RATES = {"mfql_offline.py": 2.5, "ofql_offline.py": 23.0, "benchmark/baselines/td3_bc.py": 108.0,
         "benchmark/baselines/iql.py": 70.0, "som_online.py": 11.0}
PACKAGES = {  # what a command that matches needs beyond requirements.txt
    r"singletask": "ogbench", r"--env-id (kitchen|pen|door|hammer|relocate)-": "gymnasium_robotics",
    r"baselines/(td3_bc|iql)\.py": "d3rlpy", r"baselines/sac\.py": "stable_baselines3",
}
# Becomes the command, after it has asked the kernel for a SIGHUP at its parent's death and gone to its core. SIGHUP: a
# scheduler may send SIGTERM to all processes, and a script that gets the same signal twice ends without saving.
SHIM = """import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup is for this process's parent
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGHUP)
    if sys.argv[2] != "None":
        os.sched_setaffinity(0, [int(sys.argv[2])])
if os.getppid() != int(sys.argv[1]):
    sys.exit(130)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])"""


class BadInput(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""


@dataclass
class Args:
    suite: Annotated[str, tyro.conf.Positional]
    """name of a suite in benchmark/suites, or a TOML file"""
    backend: Literal["local", "ray"] = "local"
    """local: the cores and GPUs that this process may use; ray: the cluster of $RAY_ADDRESS, or one of this machine"""
    jobs: int | None = None
    """runs at a time; None: local, one per core or 1 / --gpus-per-run per GPU; ray, what the cluster has room for"""
    gpus_per_run: float = 1.0
    """share of a GPU that a run gets where there are any: 0.25 puts four runs on each, 0 keeps to the CPU"""
    runs_dir: str = "runs"
    """folder of the suites' folders, relative to the repository; on a cluster one that all machines share"""
    only: str | None = None
    """only the runs in whose name, LABEL__TASK__SEED, this regular expression is found"""
    index: int | None = None
    """only this one of them, from 0 in the order of --dry-run: for the array jobs of a scheduler"""
    retries: int = 2
    """how often a run is begun again when something killed it"""
    dry_run: bool = False
    """only print the commands, what they cost and what is missing"""


@dataclass(frozen=True)
class Run:
    label: str
    script: str
    task: str
    seed: int
    flags: tuple[str, ...]
    folder: pathlib.Path


# ---------------------------------------------------------------- suites
def load_suite(suite, runs_dir="runs"):
    """The contents of a suite's TOML file and its runs, the first seed first. `suite`: a name or a path."""
    path = pathlib.Path(suite) if suite.endswith(".toml") else ROOT / "benchmark" / "suites" / f"{suite}.toml"
    try:
        contents = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml")))
        raise BadInput(f"there is no suite {path}; in its folder: {known or 'none'}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: {error}") from error
    known = {"a suite": "description seeds flags methods tasks", "a method": "label script tasks flags seeds rate",
             "a task": "flags paper"}
    parts = {"a suite": [contents], "a method": contents.get("methods", []),
             "a task": contents.get("tasks", {}).values()}
    for kind, keys in known.items():
        if unknown := {key for part in parts[kind] for key in part} - {*keys.split()}:
            raise BadInput(f"{path}: {kind} has no {', '.join(sorted(unknown))}, only {keys}")
    folder, runs = (ROOT / pathlib.Path(runs_dir).expanduser() / path.stem).resolve(), []
    try:
        methods, tasks = contents["methods"], contents["tasks"]
        for method in methods:
            if lacking := set(method.get("tasks", [])) - set(tasks):
                raise BadInput(f"{path}: {method['label']} names tasks that are not there: {', '.join(lacking)}")
        seeds = dict.fromkeys(seed for method in methods for seed in method.get("seeds", contents["seeds"]))
        for seed in seeds:
            for task, about in tasks.items():
                for method in methods:
                    if task not in method.get("tasks", tasks) or seed not in method.get("seeds", contents["seeds"]):
                        continue
                    text = " ".join(part.get("flags", "") for part in (contents, method, about))
                    flags = [word for flag in shlex.split(text)
                             for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
                    flags += [] if "--env-id" in flags else ["--env-id", task]
                    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{method['label']}__{task}__{seed}")
                    runs.append(Run(method["label"], method["script"], task, seed, tuple(flags), folder / name))
    except KeyError as error:
        raise BadInput(f"{path} lacks {error}") from error
    if twice := [folder for folder, count in collections.Counter(run.folder for run in runs).items() if count > 1]:
        raise BadInput(f"{path}: two runs would share the folder {twice[0]}")
    return contents, runs


def command(run):
    return [run.script, *run.flags, "--seed", str(run.seed), "--runs-dir", str(run.folder.parent),
            "--run-name", run.folder.name, "--resume", "auto"]


def log_of(run):
    return run.folder.with_name(run.folder.name + ".log")


def done(run):
    return (run.folder / "done.json").exists()


def length(run):
    """Steps of a whole run: from its args.json, or else from its flags; None if they do not say."""
    try:
        flags = json.loads((run.folder / "args.json").read_text())["args"]
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or just being written
        flags = {flag[2:].replace("-", "_"): value for flag, value in zip(run.flags, run.flags[1:])}
    return sum(int(flags[key]) for key in STEPS if key in flags) or None


def last_step(run):
    """Step of the last whole row of metrics.jsonl, 0 without one."""
    if not (run.folder / "metrics.jsonl").exists():
        return 0
    with (run.folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 20_000))
        rows = re.findall(rb'^\{"step": (\d+), .*\}$', file.read(), re.MULTILINE)
    return int(rows[-1]) if rows else 0


def fraction(run):
    return 1.0 if done(run) else min(last_step(run) / (length(run) or 1e12), 1.0)


# ---------------------------------------------------------------- one run
def locked(folder):
    """Whether a process writes this run folder."""
    if not folder.exists():
        return False
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            return False
    except filelock.Timeout:
        return True


def train(run, retries, stopped=lambda: False, core=None, gpu=None):
    """Runs a run to its end, again if something kills it: (exit code, last line that it wrote)."""
    code, last = 130, ""
    for _ in range(retries + 1):
        deadline = time.time() + 60  # the child of a worker that was killed may still be saving
        while locked(run.folder) and time.time() < deadline and not stopped():
            time.sleep(0.2)
        if done(run):
            return 0, ""
        if stopped():
            return 130, ""
        with log_of(run).open("ab") as log:
            log.write(f"$ {shlex.join(['python', *command(run)])}\n".encode())
            log.flush()
            start = log.tell()
            child = subprocess.Popen(
                [sys.executable, "-c", SHIM, str(os.getpid()), str(core), *command(run)], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,  # Ctrl-C comes through us
                env={**os.environ, "OMP_NUM_THREADS": "1", **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})})
            while child.poll() is None and not stopped():
                time.sleep(0.2)
            interrupted = child.poll() is None
            if interrupted:
                child.send_signal(signal.SIGHUP)
            code = child.wait()
        with log_of(run).open("rb") as log:
            log.seek(start)
            last = ([""] + re.split(r"[\r\n]+", log.read().decode(errors="replace").strip()))[-1]
        if interrupted:
            return (0 if code == 0 else 130), last
        if code >= 0 and code != 130:
            break
    return code, last


def catch_signals(stop):
    """Sets `stop` on SIGINT, SIGTERM and SIGHUP; a second one ends this process at once."""
    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends this process at once
        os.write(2, f"\n{signal.Signals(number).name}: waiting for the runs to save\n".encode())
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)


# ---------------------------------------------------------------- backends: yield (run, code, last line) or None
def gpus():
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    return [str(i) for i in range(len([*pathlib.Path("/dev").glob("nvidia[0-9]*")]))]


def cores():
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * os.cpu_count()


def default_jobs(args):
    if args.jobs:
        return args.jobs
    return max(1, round(len(gpus()) / args.gpus_per_run)) if gpus() and args.gpus_per_run else len(cores())


def local(runs, args, stop):
    jobs, slots = default_jobs(args), queue.SimpleQueue()
    for i in range(jobs):
        gpu = "" if not args.gpus_per_run else gpus()[i % len(gpus())] if gpus() else None
        slots.put((cores()[i * len(cores()) // jobs % len(cores())], gpu))

    def in_slot(run):
        slot = slots.get()
        try:
            return train(run, args.retries, stop.is_set, *slot)
        finally:
            slots.put(slot)

    # A child's parent, whose death it is told, is the thread that started it: these live as long as the pool.
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(in_slot, run): run for run in runs}
        while futures:
            for future in concurrent.futures.wait(futures, 1, concurrent.futures.FIRST_COMPLETED).done:
                yield futures.pop(future), *future.result()
            yield None


def on_ray(runs, args, stop):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")  # else with SIGKILL, before they have saved
    try:
        import ray
    except ImportError as error:
        raise BadInput(f"{error}; pip install ray==2.60.0") from error
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    else:
        ray.init("local", log_to_driver=False, logging_level="ERROR", include_dashboard=False,
                 num_cpus=args.jobs or len(cores()), num_gpus=len(gpus()), object_store_memory=80_000_000)
    catch_signals(stop)  # again: Ray took SIGTERM
    share = args.gpus_per_run if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=share, max_retries=args.retries)(train)
    # A file tells the workers to stop: ray.cancel() needs SIGINT, which nohup and shells in the background ignore.
    marker = runs[0].folder.parent / f".stop-{platform.node()}-{os.getpid()}"
    waiting, tasks = collections.deque(runs), {}
    try:
        while tasks or waiting and not stop.is_set():
            while waiting and not stop.is_set() and len(tasks) < (args.jobs or len(runs)):
                run = waiting.popleft()
                tasks[task.remote(run, args.retries, marker.exists)] = run
            if stop.is_set() and not marker.exists():
                marker.touch()
            for reference in ray.wait([*tasks], timeout=1)[0]:
                try:
                    code, last = ray.get(reference)
                except ray.exceptions.RayError as error:
                    code, last = 1, f"{type(error).__name__}: {error}".splitlines()[0]
                yield tasks.pop(reference), code, last
            yield None
    finally:
        marker.unlink(missing_ok=True)


# ---------------------------------------------------------------- what a suite would do
def missing(runs):
    """Lines on what the runs lack on this machine."""
    sys.path.insert(0, str(ROOT))
    import gymnasium as gym

    from data import fetch

    def lacking(run):
        flags = dict(zip(run.flags, run.flags[1:]))
        env_id, path, usual = flags["--env-id"], flags.get("--dataset-path"), fetch.folder_of_data()
        if not (ROOT / run.script).exists():
            yield f"script {run.script}"
        if path:
            if not (ROOT / pathlib.Path(path).expanduser()).exists():
                yield f"data {path}"
        elif env_id not in gym.registry and "/" not in env_id:
            as_it_is = "-v2" in env_id and (fetch.d4rl_source(env_id) or [""])[0] == "gym_mujoco_v2"
            file = usual / (fetch.d4rl_source(env_id)[1] if as_it_is else f"flat/{env_id}.hdf5")
            if not file.exists():
                yield f"data {file}, python data/fetch.py {env_id}"
        elif "/" in env_id and not (ROOT / "data" / env_id).exists():
            minari = pathlib.Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
            if not (minari / env_id).exists():
                yield f"data {minari / env_id}, minari download {env_id}"
        for pattern, package in PACKAGES.items():
            if re.search(pattern, shlex.join([run.script, *run.flags])) and not importlib.util.find_spec(package):
                yield f"package {package}"

    found = collections.Counter(line for run in runs for line in lacking(run))
    return [f"{line}: {count} run(s)" for line, count in found.items()]


def logged_rate(runs):
    """Median of the steps per second that these runs have logged, None without any."""
    rates = []
    for file in (run.folder / "metrics.jsonl" for run in runs):
        text = file.read_text() if file.exists() else ""
        rates += re.findall(r'"charts/SPS": ([\d.e+-]+)', text) or re.findall(r'"charts/UPS": ([\d.e+-]+)', text)
    return statistics.median(map(float, rates)) if rates else None


def dry_run(contents, runs, args):
    for i, run in enumerate(runs):
        state = "done" if done(run) else f"at step {last_step(run)}" if run.folder.exists() else "new"
        print(f"# {i}: {run.folder.name}, {state}\npython {shlex.join(command(run))}")
    lines = missing(runs) + ([] if gpus() else ["no NVIDIA GPU: the runs use the CPU"])
    print("\n# missing here\n" + "\n".join(lines or ["nothing"]))
    total, unknown = 0.0, 0
    print("\n# cost, evaluations not counted")
    for method in contents["methods"]:
        own = [run for run in runs if run.label == method["label"]]
        steps = sum((1 - fraction(run)) * (length(run) or 0) for run in own)
        rate, basis = logged_rate(own), "logged by runs of this suite"
        if rate is None:
            rate, basis = method.get("rate"), "rate of the suite"
        if rate is None:
            rate, basis = RATES.get(method["script"]), "one CPU core, default sizes"
        if rate is None or not all(map(length, own)):
            print(f"{method['label']}: {len(own)} runs, unknown: no rate or no length among the flags")
            unknown += len(own)
            continue
        total += steps / rate / 3600
        print(f"{method['label']}: {len(own)} runs, {steps:,.0f} steps left, at {rate:.1f} per second ({basis}) "
              f"{steps / rate / 3600:,.1f} hours")
    jobs = default_jobs(args)
    print(f"together {total:,.1f} hours of one run at a time, {total / jobs:,.1f} hours with {jobs} at a time"
          + (f", and {unknown} runs whose cost is unknown" if unknown else ""))


# ---------------------------------------------------------------- main
def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.jobs is not None and args.jobs < 1 or args.gpus_per_run < 0 or args.retries < 0:
        raise BadInput("--jobs must be at least 1, --gpus-per-run and --retries at least 0")
    contents, runs = load_suite(args.suite, args.runs_dir)
    try:
        runs = [run for run in runs if re.search(args.only or "", run.folder.name)]
    except re.error as error:
        raise BadInput(f"--only {args.only}: {error}") from error
    if args.index is not None and not 0 <= args.index < len(runs):
        raise BadInput(f"--index {args.index}: there are {len(runs)} runs")
    runs = runs if args.index is None else [runs[args.index]]
    if not runs:
        raise BadInput(f"--only {args.only} leaves no run")
    if args.dry_run:
        dry_run(contents, runs, args)
        return 0
    for run in runs:  # what is there was perhaps made before the suite was changed
        text = log_of(run).read_text(errors="replace") if log_of(run).exists() else ""
        made = re.findall(r"^\$ python (.*?) --runs-dir", text, re.MULTILINE)
        if made and made[-1] != shlex.join(command(run)).split(" --runs-dir")[0]:
            print(f"{run.folder} was begun with other flags ({log_of(run)}): to begin anew, move it away",
                  file=sys.stderr)
    todo = sorted((run for run in runs if not done(run)), key=lambda run: not last_step(run))
    runs[0].folder.parent.mkdir(parents=True, exist_ok=True)
    failed, stop = [], threading.Event()
    catch_signals(stop)
    finished = len(runs) - len(todo)
    bar = tqdm(total=len(runs), initial=sum(map(fraction, runs)), smoothing=0,
               mininterval=1 if sys.stderr.isatty() else 60,
               bar_format="{desc} {percentage:.1f}%|{bar:20}| {elapsed} passed, {remaining} to go")
    try:
        for event in (local if args.backend == "local" else on_ray)(todo, args, stop) if todo else ():
            if event:
                run, code, last = event
                if code and not stop.is_set():
                    failed.append(f"{run.folder.name}: exit code {code}: {last or 'it said nothing'}")
                finished += code == 0
                if not stop.is_set():
                    bar.write(failed[-1] if code else f"{run.folder.name}: done")
            bar.set_description_str(f"{finished} of {len(runs)} runs", refresh=False)
            bar.update(sum(map(fraction, runs)) - bar.n)
    finally:
        stop.set()
        bar.close()
    print("\n".join([f"{finished} of {len(runs)} runs done in {runs[0].folder.parent}", *failed]))
    if finished + len(failed) < len(runs):
        print(f"stopped after {finished} of {len(runs)} runs, all have saved; continue with: "
              f"python benchmark/suite.py {shlex.join(argv or sys.argv[1:])}", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(main())
    except (BadInput, OSError) as error:
        print(f"suite.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
