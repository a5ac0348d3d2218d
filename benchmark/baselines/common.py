"""What the baselines share: flags, run folder, checkpoint, signals and exit codes as the scripts at the top have them.

Three things are simpler than there: --resume takes only auto, a run goes on with the flags that it began with, and a
finished run cannot be made longer.
"""
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import filelock
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import mfql_offline  # noqa: E402
from mfql_offline import BadInput, blame  # noqa: E402

with contextlib.suppress(ImportError):  # without it nothing imports gym, which would advise the user against itself
    import gym_notices.notices

    gym_notices.notices.notices.clear()


@dataclass
class Args:
    env_id: str
    """the task, as in the scripts at the top"""
    seed: int = 1
    """seed of the networks, the batches, the noise and the evaluation episodes"""
    cuda: bool = True
    """train on the first CUDA GPU if there is one, else on the CPU (says so in one line)"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    run_name: str | None = None
    """name of the run folder; None is <env-id>__<script>__<seed>, which the same command finds again"""
    log_interval: int = 1000
    """steps (offline: gradient steps, online: environment steps) between two rows of losses in metrics.jsonl"""
    eval_interval: int = 50_000
    """steps between two evaluations"""
    eval_episodes: int = 50
    """episodes per evaluation, each with its own seed"""
    checkpoint_interval: int = 10_000
    """steps between two checkpoints"""
    resume: Literal["auto"] | None = None
    """auto: continue this command's run folder if it holds a checkpoint, do nothing if it is done, else start it"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target networks"""
    hidden_width: int = 256
    """width of the two hidden layers of every network"""


def parse(defaults, stem, description, argv, task_defaults=lambda env_id: {}):
    """Flags, over the task's defaults over `defaults`; the run folder; its checkpoint, or None, or "done"."""
    given = tyro.cli(type(defaults), args=argv, default=defaults, add_help=False, return_unknown_args=True)[0]
    defaults = type(defaults)(**{**asdict(defaults), **task_defaults(given.env_id)})
    args = tyro.cli(type(defaults), args=argv, default=defaults, description=description.split("\n")[0])
    for key, value in asdict(args).items():
        flag = f"--{key.replace('_', '-')}"
        if value == "":
            raise BadInput(f"{flag} is empty; is a shell variable unset?")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 1 if isinstance(value, int) else 1e-12
            low, high = mfql_offline.RANGES.get(key, (least, 10**9))
            if not low <= value <= high:
                raise BadInput(f"{flag} {value} must lie between {low:,} and {high:,}")
    env_name = args.env_id.replace("/", "_").replace(":", "_")
    run_dir = pathlib.Path(args.runs_dir).expanduser() / (args.run_name or f"{env_name}__{stem}__{args.seed}")
    done, begun = ((run_dir / name).exists() for name in ("done.json", "checkpoint.pt"))
    if not done and not begun:
        return args, run_dir, None
    if not args.resume:
        raise BadInput(f"{run_dir} holds a run: --resume auto continues it, --run-name NAME starts another")
    with blame(f"{run_dir}, written by another version of {stem}"):
        before = json.loads((run_dir / "args.json").read_text())["args"]
        for key, value in asdict(args).items():
            if key not in ("cuda", "runs_dir", "run_name", "resume") and before[key] != value:
                raise BadInput(f"--{key.replace('_', '-')} was {before[key]}, is {value}; --run-name starts another")
    if done:
        print(f"{run_dir} is done")
        return args, run_dir, "done"
    return args, run_dir, mfql_offline.load(run_dir, stem)[1]


def prepare_torch(args):
    """Sets the seed, one thread (the networks are too small for more) and determinism; returns the device."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device: running on the CPU", file=sys.stderr)
    return torch.device("cuda:0" if args.cuda and torch.cuda.is_available() else "cpu")


def open_run(run_dir, args, checkpoint, about):
    """Locks the run folder and writes args.json. Returns the log, cut to what the checkpoint knows, and the lock."""
    with blame(f"run folder {run_dir} (--runs-dir and --run-name give another)"):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)  # two processes never write one folder
        about = dict(args=asdict(args), **about, threads=torch.get_num_threads(), python=sys.version,
                     versions={p.name: p.version for p in importlib.metadata.distributions()})
        (run_dir / "args.json").write_text(json.dumps(about, indent=2))
        log_file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        log_file.seek(log_file.truncate(min(checkpoint["log_offset"], log_file.tell()) if checkpoint else 0))
    print(f"{args.env_id}: run folder {run_dir}")
    return log_file, lock


def save(run_dir, state):
    """checkpoint.pt, always a whole file: written under another name, flushed, renamed."""
    path, partial = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    try:
        with blame(f"{path} cannot be written, the one before stays"), open(partial, "w+b") as file:
            torch.save(state, file)
            file.seek(0)
            file.write(hashlib.sha256(file.read()).digest())  # see mfql_offline.load
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def catch_signals():
    """A list that SIGINT, SIGTERM and SIGHUP append to from now on; a second one ends the process at once."""
    interrupts = []

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)
        interrupts.append(number)
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    return interrupts


def train(stem, args, run_dir, checkpoint, about, device, total, stride, advance, charts, evaluate, state):
    """The training loop and its files; the exit code: 0 done, 3 non-finite loss, 130 interrupted.

    Until `total` steps are done, `advance(step)` makes `stride` of them and returns their losses, those of them that
    it has; `charts(steps, seconds)` is what the log shows of the speed, `evaluate(interrupts, prefix)` makes the rows
    eval/ and eval_n1/, `state()` is what the checkpoint holds of the algorithm.
    """
    log_file, lock = open_run(run_dir, args, checkpoint, {**about, "device": str(device)})
    step, evaluated, losses = 0, False, {}
    if checkpoint:
        step, evaluated, losses = checkpoint["step"], checkpoint["evaluated"], checkpoint["losses"]
        torch.set_rng_state(checkpoint["random_cpu"])
        if device.type == "cuda" and checkpoint["random_cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random_cuda"])
    interrupts = catch_signals()

    def log(metrics):
        log_file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")

    def evaluate_and_log(*prefixes):
        """Evaluates, then logs: an interruption leaves all of the rows or none."""
        for prefix, metrics in [(prefix, evaluate(interrupts, prefix)) for prefix in prefixes]:
            log({name.replace("eval/", prefix): value for name, value in metrics.items()})
            text = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {step}, {prefix} {text}")

    def checkpoint_now():
        save(run_dir, dict(
            script=stem, args=asdict(args), data=about.get("data"), step=step, evaluated=evaluated, losses=losses,
            state=state(), log_offset=log_file.tell(), random_cpu=torch.get_rng_state(),
            random_cuda=torch.cuda.get_rng_state() if device.type == "cuda" else None))

    def due(interval):
        """Whether the last `stride` steps reached a multiple of `interval`."""
        return step // interval > max(step - stride, 0) // interval

    bar = tqdm(total=total, initial=step, unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step = time.time(), step
    try:
        while step < total and not interrupts:
            if due(args.eval_interval) and not evaluated:  # after the checkpoint: resuming repeats it
                paused = time.time()
                evaluate_and_log("eval/")
                clock += time.time() - paused
            evaluated = False
            losses |= advance(step)
            step += stride
            bar.update(stride)
            if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
                bar.close()
                print(f"{stem}: step {step}: {bad[0]} is {losses[bad[0]]}; {run_dir} has what was saved before",
                      file=sys.stderr)
                return 3
            if due(args.log_interval):
                log({**charts(step - clock_step, time.time() - clock), **losses})
                clock, clock_step = time.time(), step
            if due(args.checkpoint_interval) or step >= total or interrupts:
                checkpoint_now()
        if not interrupts and not evaluated:
            evaluate_and_log("eval/", "eval_n1/")
            evaluated = True
            checkpoint_now()  # so that a kill before done.json keeps these rows
    except KeyboardInterrupt:  # of an evaluation
        checkpoint_now()
    finally:
        bar.close()
        log_file.close()
        lock.release()
    if interrupts:
        print(f"interrupted at step {step}; the same command with --resume auto continues", file=sys.stderr)
        return 130
    (run_dir / "done.json").write_text(json.dumps({"step": step}))
    return 0


def call(main, stem):
    """Runs `main` and exits with its code, or with a line and code 2 or 130."""
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(main())
    except (BadInput, OSError, MemoryError, RuntimeError) as error:  # OSError: full disk, lost folder, closed pipe
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's error for sizes that do not fit
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python minds the closed pipe once more
        tqdm.write(f"{stem}: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{stem}: interrupted", file=sys.stderr)
        sys.exit(130)
