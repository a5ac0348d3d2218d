"""What users may rely on, whatever the algorithm: run folders, equal numbers, resuming, signals, exit codes, flags.

Every test runs once per script of SCRIPTS, or of OFFLINE if it is about data, on made-up data and networks of a few
hundred weights. Run as a program, this file is the driver of the SIGKILL test: it forks one process per life of a run,
so that torch is imported once.
"""
import ast
import collections
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import zipfile

import filelock
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = pathlib.Path(__file__).resolve().parents[1]
OFFLINE = ["mfql_offline", "ofql_offline", "mfql_offline_to_online"]
SCRIPTS = [*OFFLINE, "som_online"]
SMALL = {  # flags that make a script's networks small, and the same with other sizes
    "mfql_offline": ("--policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1", "--critic-width 24"),
    "ofql_offline": ("--policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1 --num-candidates 5 "
                     "--ema-start 7 --target-interval 3 --learning-rate-schedule cosine", "--critic-width 24"),
    "mfql_offline_to_online": ("--policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1",
                               "--critic-width 24"),
    # two environments and one gradient step per step of both: gradient step k ends at environment step 2 k
    "som_online": ("--policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1 --num-candidates 4 "
                   "--num-proposals 8 --num-envs 2 --learning-starts 1 --utd 0.5", "--critic-width 24"),
}
# what --*-interval counts, per gradient step
STRIDE = {"mfql_offline": 1, "ofql_offline": 1, "mfql_offline_to_online": 1, "som_online": 2}
TASK = {  # a task and values of its flags: as the script lists them, or the same for every task
    "mfql_offline": ("cube-double-play-singletask-task2-v0", dict(alpha=120, num_candidates=5, gamma=0.995)),
    "mfql_offline_to_online": ("cube-double-play-singletask-task2-v0",
                               dict(alpha=120, num_candidates=5, gamma=0.995)),
    "ofql_offline": ("antmaze-medium-diverse-v2", dict(eta=0.001, inverse_temperature=5, gamma=0.99)),
    "som_online": ("Walker2d-v4", dict(alpha=100, num_candidates=32, gamma=0.99)),
}
EPISODE = 20  # steps of an episode of Short-v0
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Scripted(gym.Env):
    """An environment whose episodes are fixed by their seeds alone: lengths, rewards and successes differ."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.truncates = int(self.np_random.integers(2, 9)), self.np_random.random() < 0.5
        return self.np_random.random(3, dtype=np.float32), {}

    def step(self, action):
        self.left -= 1
        end, success = self.left == 0, bool(self.np_random.random() < 0.15)
        observation, reward = self.np_random.random(3, dtype=np.float32), float(self.np_random.random())
        return observation, reward, end and not self.truncates, end and self.truncates, {"success": success}

    def render(self):
        return np.full((32, 32, 3), 20 * self.left, dtype=np.uint8)


def register_environments():
    """Pendulum with short episodes, which makes evaluations cheap, and the environment above."""
    gym.register("Short-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=EPISODE)
    gym.register("Scripted-v0", entry_point=Scripted)


def write_data(path, seed=0, rows=400):
    """Random transitions in D4RL's layout that fit Pendulum's spaces."""
    rng = np.random.default_rng(seed)
    data = dict(observations=rng.uniform(-1, 1, (rows, 3)).astype(np.float32), rewards=rng.normal(size=rows),
                actions=rng.uniform(-2, 2, (rows, 1)).astype(np.float32), terminals=np.zeros(rows, bool),
                timeouts=np.arange(rows) % EPISODE == EPISODE - 1)
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return path


def budget(script, updates):
    """The flags for a run of so many gradient steps; mfql_offline_to_online goes online after 16, or after 3 of 4."""
    if script == "mfql_offline_to_online":
        offline = updates if updates < 2 else min(16, updates - 1)
        return f"--offline-steps {offline} --online-steps {updates - offline}"
    return f"--{'offline-steps' if script in OFFLINE else 'total-timesteps'} {STRIDE[script] * updates}"


def longer(script, updates):
    """The flag that makes a finished run of more than 16 updates longer: the online phase grows, if there is one."""
    return f"--online-steps {updates - 16}" if script == "mfql_offline_to_online" else budget(script, updates)


def flags(script, data, folder, *more):
    """The command line of a small run whose run folder will lie in `folder`. The last of equal flags counts. The
    intervals share few multiples, so that rows, evaluations and checkpoints come in every order."""
    log, evaluation, checkpoint = (STRIDE[script] * interval for interval in (4, 10, 6))
    text = " ".join(["--env-id Short-v0 --no-cuda --batch-size 32 --eval-episodes 2", SMALL[script][0],
                     f"--log-interval {log} --eval-interval {evaluation} --checkpoint-interval {checkpoint}",
                     budget(script, 24), *more])
    return ["--runs-dir", str(folder), *(["--dataset-path", str(data)] if script in OFFLINE else []), *text.split()]


def train(m, data, folder, *more, code=0):
    """Trains in this process and returns the run folder."""
    assert m.main(flags(m.SCRIPT, data, folder, *more)) == code
    run, = pathlib.Path(folder).iterdir()
    return run


def rows(run):
    """The rows of metrics.jsonl without what depends on the clock. Fails on a line that is not JSON."""
    found = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("charts/UPS", "charts/SPS")} for row in found]


def result(run):
    """All that a run computed: networks, optimisers, step, random states, replay buffer and unfinished episodes; not
    where it was written, nor the former learning rates, which nobody reads."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["optimizers"] = [optimizer["state"] for optimizer in state["optimizers"]]
    return {key: value for key, value in state.items() if key not in ("args", "log_offset")}


def differences(a, b, at=""):
    """Where two nested results are not equal, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() ^ b.keys(), key=str)
        return [f"{at}.{key} only once" for key in keys] + [
            place for key in a.keys() & b.keys() for place in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [place for i, (x, y) in enumerate(zip(a, b)) for place in differences(x, y, f"{at}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        equal = type(a) is type(b) and a == b
    return [] if equal else [at]


def assert_same_run(run, other):
    """Two runs must have computed the same and written the same rows."""
    assert rows(run) == rows(other)
    assert differences(result(run), result(other)) == []
    assert differences(torch.load(run / "policy.pt", weights_only=True)["agent"], result(other)["agent"]) == []


def contents(folder):
    """Every file of a folder with its bytes and time of change, but for the lock, which is no part of the run."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def process(command, **more):
    """Runs a command on one thread, whatever happens to it: the caller looks at the result."""
    environ = {**more.pop("env", os.environ), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, **more)


@contextlib.contextmanager
def at_step(monkeypatch, m, place, step, act):
    """Calls act() at the end of the update number `step`, or where an evaluation or a row of its step begins."""
    def update(agent, batch, original=m.Agent.update):
        parts = original(agent, batch)
        if next(iter(agent.critic_optimizer.state.values()))["step"] == step:  # counts over all lives of a run
            act()
        return parts

    def evaluate(*inputs, original=m.evaluate):
        if inputs[5] == step * STRIDE[m.SCRIPT]:
            act()
        return original(*inputs)

    def dumps(row, original=json.dumps, **more):
        if len(row) > 1 and row.get("step") == step * STRIDE[m.SCRIPT]:
            act()
        return original(row, **more)

    with monkeypatch.context() as patch:
        patch.setattr(*{"update": (m.Agent, "update", update), "evaluate": (m, "evaluate", evaluate),
                        "row": (m.json, "dumps", dumps)}[place])
        yield


# ---------------------------------------------------------------- fixtures
@pytest.fixture(scope="module", params=SCRIPTS)
def m(request):
    """The script."""
    register_environments()
    return importlib.import_module(request.param)


about_data = pytest.mark.parametrize("m", OFFLINE, indirect=True)  # leaves out som_online, which reads no dataset


@pytest.fixture(autouse=True)
def process_state():
    """main() installs signal handlers and makes torch deterministic: put both back. A signal that main does not
    handle ends the test, not pytest."""
    def unhandled(number, _):
        raise RuntimeError(f"nobody handles signal {number}")

    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.hdf5")


@pytest.fixture(scope="module")
def baseline(m, data, tmp_path_factory):
    """One run of 24 gradient steps in one go. Tests that change the folder work on a copy."""
    return train(m, data, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(baseline, tmp_path):
    return shutil.copytree(baseline, tmp_path / "runs" / baseline.name)


# ---------------------------------------------------------------- the run folder
def test_run_folder_holds_the_documented_files(m, data, baseline):
    """Scripts that read run folders rely on these names; data are known by fingerprint and by size."""
    assert baseline.name == f"Short-v0__{m.SCRIPT}__1"
    assert {path.name for path in baseline.iterdir()} - {".lock"} == {
        "args.json", "metrics.jsonl", "checkpoint.pt", "policy.pt", "done.json",
        *["replay.bin"] * (m.SCRIPT == "som_online")}
    about = json.loads((baseline / "args.json").read_text())
    assert about["args"] == m.asdict(m.parse_args(flags(m.SCRIPT, data, baseline.parent, "--run-name x"))[0]) | {
        "run_name": None}
    assert about["device"] == "cpu" and about["threads"] == 1 and "python" in about
    assert about["versions"]["torch"] == torch.__version__ and {"numpy", "gymnasium"} <= set(about["versions"])
    assert ("data" in about) == (m.SCRIPT in OFFLINE)
    if m.SCRIPT in OFFLINE:
        assert re.fullmatch("[0-9a-f]{64}", about["data"]["sha256"])
        assert about["data"]["transitions"] == 400 - 400 // EPISODE and about["data"]["episodes"] == 400 // EPISODE


def test_metric_names_and_steps(m, baseline):
    """Losses every log interval, evaluations every evaluation interval and at the end, N = 1 only at the end; online
    also the episodes of training, where they end; both evaluations also where a run goes online."""
    found = [json.loads(line) for line in (baseline / "metrics.jsonl").read_text().splitlines()]
    online, stride = m.SCRIPT not in OFFLINE, STRIDE[m.SCRIPT]
    speeds = {"charts/UPS", "charts/SPS"} if online else {"charts/UPS"}
    logged = [stride * update for update in (4, 8, 12, 16, 20, 24)]
    expected = {**dict.fromkeys(speeds, logged), "losses/": logged, "eval_n1/": [24 * stride],
                "eval/": [stride * update for update in (10, 20, 24)],
                "charts/episodic_return": [EPISODE * stride] * 2 if online else []}
    if m.SCRIPT == "mfql_offline_to_online":
        expected.update({"charts/SPS": [20, 24], "eval/": [10, 16, 20, 24], "eval_n1/": [16, 24]})
    assert expected == {prefix: [row["step"] for row in found if any(name.startswith(prefix) for name in row)]
                        for prefix in expected}
    for row in found:
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
        if any(name.startswith("losses/") for name in row):
            assert all(row[name] > 0 for name in speeds)
        elif "charts/episodic_return" in row:
            assert set(row) == {"step", "charts/episodic_return", "charts/episodic_length"}
            assert row["charts/episodic_length"] == EPISODE
        else:
            prefix = "eval_n1" if "eval_n1/episodic_return" in row else "eval"
            names = ("episodic_return", "episodic_return_std", "episodic_length")
            assert set(row) == {"step", *(f"{prefix}/{name}" for name in names)}
            assert row[f"{prefix}/episodic_length"] == EPISODE


def test_an_existing_run_is_not_written_over(m, data, run):
    """Another name, or --resume auto, must be asked for."""
    argv = flags(m.SCRIPT, data, run.parent)
    assert_refused(m, argv, run, match=f"{run} holds a run: --resume auto .* --run-name")
    assert m.parse_args([*argv, "--run-name", "other"])[1:] == (run.with_name("other"), None)
    assert m.parse_args([*argv, "--seed", "2"])[1:] == (run.with_name(f"Short-v0__{m.SCRIPT}__2"), None)
    assert m.parse_args(["--env-id", "a.b:c/d-v0"])[1] == pathlib.Path("runs") / f"a.b_c_d-v0__{m.SCRIPT}__1"


def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(m, data, run):
    """Its checkpoint.pt may have been deleted to save space; its rows must stay."""
    (run / "checkpoint.pt").unlink()
    argv = flags(m.SCRIPT, data, run.parent, "--resume", "auto")
    assert_refused(m, argv, run, match=f"^checkpoint {run}/checkpoint.pt: FileNotFoundError")


def test_resume_auto_starts_continues_and_leaves_alone(m, data, baseline, tmp_path, monkeypatch):
    """One command for a job that is put into the queue again: the run ends with the bits of an undisturbed one."""
    argv = flags(m.SCRIPT, data, tmp_path, "--resume auto")
    with at_step(monkeypatch, m, "update", 13, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert m.main(argv) == 130
    run, = tmp_path.iterdir()
    assert run.name == baseline.name and result(run)["step"] == 13 * STRIDE[m.SCRIPT]
    with at_step(monkeypatch, m, "update", 5, lambda: pytest.fail("begun anew")):
        assert m.main(argv) == 0
        logged = (run / "metrics.jsonl").read_bytes()
        assert m.main(argv) == 0  # it is over
    assert_same_run(run, baseline)
    assert (run / "metrics.jsonl").read_bytes() == logged
    assert list(tmp_path.iterdir()) == [run]


def test_done_is_written_last_and_taken_back_while_a_run_goes_on(m, data, tmp_path, monkeypatch):
    """And a finished run that is extended keeps all its rows, those of the final evaluation too."""
    def not_done():
        seen.append((tmp_path / f"Short-v0__{m.SCRIPT}__1" / "done.json").exists())

    seen = []
    with at_step(monkeypatch, m, "evaluate", 20, not_done):
        run = train(m, data, tmp_path, budget(m.SCRIPT, 20))
    written = rows(run)
    assert json.loads((run / "done.json").read_text()) == {"step": 20 * STRIDE[m.SCRIPT]}
    assert sum("eval_n1/episodic_return" in row and row["step"] == 20 * STRIDE[m.SCRIPT] for row in written) == 1
    with at_step(monkeypatch, m, "update", 22, not_done):
        assert m.main(["--resume", str(run), *longer(m.SCRIPT, 24).split()]) == 0
    assert seen == [False] * 3
    assert rows(run)[:len(written)] == written
    assert {row["step"] for row in rows(run)[len(written):]} == {24 * STRIDE[m.SCRIPT]}
    assert json.loads((run / "done.json").read_text()) == {"step": 24 * STRIDE[m.SCRIPT]} == {
        "step": result(run)["step"]}


def test_two_processes_never_write_one_folder(m, data, baseline, tmp_path, monkeypatch):
    """The second is told so at once; when the first is dead, its lock is gone."""
    def somebody_else_cannot_have_it():
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(lock).acquire(timeout=0)
        seen.append(lock)

    argv, seen = flags(m.SCRIPT, data, tmp_path, "--resume auto"), []
    lock = tmp_path / f"Short-v0__{m.SCRIPT}__1" / ".lock"
    with at_step(monkeypatch, m, "update", 7, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        run = train(m, data, tmp_path, code=130)
    before = contents(run)
    program = f"import filelock; lock = filelock.FileLock({str(lock)!r}); lock.acquire(); print(1); input()"
    with subprocess.Popen([sys.executable, "-uc", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"1\n"
            with pytest.raises(m.BadInput, match=f"run folder {run}, perhaps in use .*lock"):
                m.main(argv)
            assert contents(run) == before
        finally:
            other.kill()
    with at_step(monkeypatch, m, "update", 20, somebody_else_cannot_have_it):
        assert m.main(argv) == 0
    assert seen
    assert_same_run(run, baseline)


def test_unwritable_run_folder(m, data, tmp_path):
    """Found out before training, not at the first checkpoint."""
    (tmp_path / "file").touch()
    with pytest.raises(m.BadInput, match="--runs-dir"):
        m.main(flags(m.SCRIPT, data, tmp_path / "file" / "runs"))


# ---------------------------------------------------------------- equal numbers
def test_same_seed_same_numbers(m, data, baseline, tmp_path, monkeypatch, capsys):
    """Also when the CPU is only the fallback of --cuda, which one line of output says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_same_run(train(m, data, tmp_path, "--cuda"), baseline)
    said = capsys.readouterr()
    assert "no CUDA device: running on the CPU, threads: 1 (OMP_NUM_THREADS)" in said.err.splitlines()
    assert re.search(r"; evaluates every \d+ steps, learns from step \d+ on; run folder ", said.out.splitlines()[0])


def test_one_thread_unless_told_otherwise(m, data, tmp_path, monkeypatch):
    """Two that wait for each other on a busy machine made the default command look hung."""
    for name, expected in ((None, 1), ("2", 2)):
        monkeypatch.delenv("OMP_NUM_THREADS")
        if name:
            monkeypatch.setenv("OMP_NUM_THREADS", name)
        torch.set_num_threads(2)
        try:
            run = train(m, data, tmp_path / str(expected), budget(m.SCRIPT, 2))
        finally:
            torch.set_num_threads(1)
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert json.loads((run / "args.json").read_text())["threads"] == expected


def test_another_seed_other_numbers(m, data, baseline, tmp_path):
    """Initial weights, batches and evaluations must all depend on the seed."""
    run = train(m, data, tmp_path, "--seed 2")
    assert run.name == f"Short-v0__{m.SCRIPT}__2"
    one, two = result(baseline), result(run)
    weights = [name for name, value in one["agent"].items() if value.ndim > 1]
    assert weights and all(f".{name}" in differences(one["agent"], two["agent"]) for name in weights)
    assert differences(one["random_cpu"], two["random_cpu"])
    losses, other_losses = ([row for row in rows(folder) if "eval/episodic_return" not in row]
                            for folder in (baseline, run))
    assert all(a != b for a, b in zip(losses, other_losses))


def test_watching_does_not_change_training(m, data, baseline, tmp_path):
    """Evaluations, logs and checkpoints are read-only: other intervals, same weights and same random state."""
    run = train(m, data, tmp_path, "--eval-interval 3 --eval-episodes 5 --log-interval 7 --checkpoint-interval 23")
    assert differences(result(run), result(baseline)) == [] and rows(run) != rows(baseline)


# ---------------------------------------------------------------- evaluation
def scripted_agent(m, tmp_path, *more):
    args = m.parse_args(flags(m.SCRIPT, tmp_path / "none.hdf5", tmp_path, "--env-id Scripted-v0", *more))[0]
    torch.manual_seed(0)
    return m.Agent(3, 1, args, torch.device("cpu")), dict(env_id="Scripted-v0", kwargs={}, reference=None), args


def test_evaluation_counts_each_episode_once_to_its_end(m, tmp_path):
    """Against episodes played one by one: number i has seed 1000 * seed + i; nothing counts after its end."""
    agent, task, args = scripted_agent(m, tmp_path, "--eval-episodes 7 --seed 3")
    returns, lengths, successes = [], [], []
    for i in range(7):
        env, total, done, length, success = Scripted(), 0.0, False, 0, False
        env.reset(seed=3000 + i)
        while not done:
            _, reward, terminated, truncated, info = env.step(None)
            total, length, success = total + reward, length + 1, success or info["success"]
            done = terminated or truncated
        returns, lengths, successes = [*returns, total], [*lengths, length], [*successes, success]
    assert len(set(lengths)) > 2 and 0 < sum(successes) < 7
    metrics = m.evaluate(agent, dict(task, reference=(1.0, 3.0)), args, 2)
    assert metrics == pytest.approx({
        "eval/episodic_return": np.mean(returns), "eval/episodic_return_std": np.std(returns),
        "eval/episodic_length": np.mean(lengths), "eval/success_rate": np.mean(successes),
        "eval/normalized_score": 100 * (np.mean(returns) - 1) / 2})
    assert "eval/normalized_score" not in m.evaluate(agent, task, args, 2)
    with pytest.raises(KeyboardInterrupt):
        m.evaluate(agent, task, args, 2, None, 0, [signal.SIGINT])


def test_evaluation_repeats_and_leaves_the_random_state_alone(m, baseline):
    """Else evaluating more often would train another policy."""
    args, _, checkpoint = m.parse_args(["--evaluate", str(baseline)])
    agent, task = m.Agent(3, 1, args, torch.device("cpu")), checkpoint["task"]
    agent.load_state_dict(checkpoint["agent"])
    before, torch_state, numpy_state = agent.state_dict(), torch.get_rng_state(), np.random.get_state()[1].copy()
    before = {name: value.clone() for name, value in before.items()}
    first = m.evaluate(agent, task, args, 3)
    torch.manual_seed(12345)  # another place in the training stream gives the same episodes
    assert m.evaluate(agent, task, args, 3) == first
    torch.set_rng_state(torch_state)
    m.evaluate(agent, task, args, 3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert differences(before, agent.state_dict()) == []
    args.seed += 1
    assert m.evaluate(agent, task, args, 3) != first


def test_evaluate_flag_repeats_the_final_evaluation(m, data, tmp_path, capsys):
    """On the folder and on both files, without the data, changing nothing; --eval-episodes overrides."""
    copy = shutil.copy(data, tmp_path / "copy.hdf5")
    run = train(m, copy, tmp_path / "runs")
    os.remove(copy)
    final, before = [row for row in rows(run) if "eval/episodic_return" in row][-1], contents(run)
    for path in (run, run / "checkpoint.pt", run / "policy.pt"):
        capsys.readouterr()
        torch.manual_seed(len(path.name))  # the training stream must not matter
        assert m.main(["--evaluate", str(path)]) == 0
        line, = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert found.pop("num_candidates") >= 1 and found == final
    assert m.main(["--evaluate", str(run), "--eval-episodes", "5"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval/episodic_return"] != final["eval/episodic_return"]
    assert contents(run) == before
    copy_of_data = write_data(copy)
    assert copy_of_data.exists() and m.main(["--resume", str(run), *longer(m.SCRIPT, 26).split()]) == 0
    assert m.main(["--evaluate", str(run)]) == 0  # the run's own --resume is no request to resume again


# ---------------------------------------------------------------- killed, interrupted and resumed
PLACES = ("update", "evaluation", "row", "policy", "checkpoint", "before the rename", "after the rename", "SIGTERM")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(m, place, count):
    """Patches this process so that it is killed when it comes to `place` for the count-th time: after an update, while
    acting in an evaluation, half-way through a row or a file, or around a rename. SIGTERM comes after an update."""
    countdown = itertools.count(count - 1, -1)

    def update(agent, batch, original=m.Agent.update):
        parts = original(agent, batch)
        if next(countdown) == 0:
            os.kill(os.getpid(), signal.SIGTERM if place == "SIGTERM" else signal.SIGKILL)
        return parts

    def act(*more, original=m.Agent.act):  # of training without, of evaluations with a generator
        return die() if len(more) == 4 and more[3] is not None and next(countdown) == 0 else original(*more)

    class Log:
        """metrics.jsonl as opened by main."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, row):
            if next(countdown) == 0:
                self.file.write(row[:20])
                die()
            self.file.write(row)

    def open_file(path, *more, original=pathlib.Path.open, **options):
        file = original(path, *more, **options)
        return Log(file) if path.name == "metrics.jsonl" else file

    def write_file(state, file, original=torch.save):
        if place == ("checkpoint" if "optimizers" in state else "policy") and next(countdown) == 0:
            original(state, whole := io.BytesIO())
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            die()
        original(state, file)

    def rename(source, target, original=os.replace):
        if next(countdown) == 0:
            if place == "after the rename":
                original(source, target)
            die()
        original(source, target)

    owner, name, patched = {
        "update": (m.Agent, "update", update), "SIGTERM": (m.Agent, "update", update),
        "evaluation": (m.Agent, "act", act), "row": (pathlib.Path, "open", open_file),
        "policy": (torch, "save", write_file), "checkpoint": (torch, "save", write_file),
    }.get(place, (os, "replace", rename))
    setattr(owner, name, patched)


def live(m, argv, place=None, count=0, delay=None):
    """One life of a run in a forked process; returns its exit code, -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if place is not None:
                arm(m, place, count)
            code = m.main(argv)
        except BaseException:  # noqa: BLE001 - a forked child must not come back into the caller
            traceback.print_exc()
        os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # if it is over by then, it waits to be reaped
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def drive(script, data, folder, updates):
    """Trains once in one go into folder/whole and once killed again and again into folder/killed, then resumed to the
    end. Prints the places of the kills as JSON."""
    sys.path.insert(0, str(ROOT))
    register_environments()
    m, rng, folder, kills = importlib.import_module(script), random.Random(0), pathlib.Path(folder), []
    torch.use_deterministic_algorithms(True)  # this and the first jvp import seconds worth of torch: not in every life
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    if hasattr(m, "next_alpha_factor"):  # checks every 4 steps instead of 2000, so that its history is part of this
        m.next_alpha_factor = lambda factor, history, loss, step, args, original=m.next_alpha_factor: original(
            factor, history, loss, 500 * step, args)
    more = budget(script, int(updates))
    assert live(m, flags(script, data, folder / "whole", more)) == 0
    places = [*PLACES] * 2
    rng.shuffle(places)
    places = ["any time"] * 3 + places  # taken from the end, so that these come last: nobody knows how far they get
    attempts, run, code = 0, None, None
    while code != 0:
        place = places.pop() if places else None
        argv = ["--resume", str(run)] if run else flags(script, data, folder / f"killed{attempts}", more)
        if place == "any time":
            code = live(m, argv, delay=rng.uniform(0.02, 0.2))
        else:
            code = live(m, argv, place, rng.randint(1, dict(update=9, SIGTERM=9, evaluation=30).get(place, 3)))
        assert code in (0, 130 if place == "SIGTERM" else -signal.SIGKILL if place else 0), (place, code)
        if code:
            kills.append(place)
        if run is None:  # killed before the first checkpoint: nothing to resume
            run = next((path.parent for path in folder.glob(f"killed{attempts}/*/checkpoint.pt")), None)
            attempts += 1
    run.parent.rename(folder / "killed")
    print(json.dumps(kills))


def test_killed_at_random_moments_and_resumed(m, data, tmp_path):
    """A preempted run ends with the bits of an undisturbed one, wherever it was hit, half-written files included."""
    command = [sys.executable, __file__, m.SCRIPT, str(data), str(tmp_path), "96"]
    done = process(command)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) >= 10 and set(kills) >= set(PLACES), kills
    whole, = (tmp_path / "whole").iterdir()
    killed, = (tmp_path / "killed").iterdir()
    assert_same_run(killed, whole)
    more = {"som_online": 2 * (96 // EPISODE), "mfql_offline_to_online": 2 + 80 // EPISODE}.get(m.SCRIPT, 0)
    assert len(rows(whole)) == 24 + 9 + 2 + more
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("number, place, step, call", [
    (signal.SIGTERM, "update", 13, 1), (signal.SIGINT, "update", 10, 1), (signal.SIGHUP, "evaluate", 10, 1),
    (signal.SIGTERM, "evaluate", 24, 1), (signal.SIGINT, "evaluate", 24, 2), (signal.SIGHUP, "update", 24, 1),
    (signal.SIGTERM, "row", 8, 1), (signal.SIGINT, "evaluate", 16, 1), (signal.SIGTERM, "evaluate", 16, 2)])
def test_interrupted_and_resumed(m, data, baseline, tmp_path, monkeypatch, capfd, number, place, step, call):
    """Says so at once, saves, exit code 130, and goes on as if nothing had been; also at a step where an evaluation is
    due, within the first or the second evaluation of a step, and after the last update. A second signal kills."""
    def interrupt():
        calls.append(capfd.readouterr())
        if len(calls) == call:
            os.kill(os.getpid(), number)
            said.append(capfd.readouterr().err)
            assert signal.getsignal(number) is signal.SIG_DFL

    if step == 16 and m.SCRIPT != "mfql_offline_to_online":
        pytest.skip("no evaluation there: only one script goes online")
    calls, said = [], []
    with at_step(monkeypatch, m, place, step, interrupt):
        run = train(m, data, tmp_path, code=130)
    assert said[0].splitlines() == ["", f"{number.name}: saving after this step"]
    step_said, folder = re.search(r"interrupted at step (\d+); .*--resume (\S+)", capfd.readouterr().err).groups()
    assert int(step_said) == result(run)["step"] and folder == str(run) and not (run / "done.json").exists()
    assert int(step_said) / STRIDE[m.SCRIPT] in ([step] if place != "row" else [step, step + 1])
    assert m.main(["--resume", folder]) == 0
    assert_same_run(run, baseline)


def test_a_signal_that_the_parent_ignores(m, data, baseline, tmp_path, monkeypatch):
    """As SIGHUP under nohup, which is there to let a run go on."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with at_step(monkeypatch, m, "update", 13, lambda: os.kill(os.getpid(), signal.SIGHUP)):
        assert_same_run(train(m, data, tmp_path), baseline)


def test_interrupted_again_before_the_next_row(m, data, baseline, tmp_path, monkeypatch):
    """Rows that a killed process wrote after its checkpoint are dropped on resuming; an interruption right after that
    must remember the shortened file, not the long one."""
    with at_step(monkeypatch, m, "update", 13, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        run = train(m, data, tmp_path, code=130)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "losses/critic": 1.0}\n{"step": 20, "losses')
    with at_step(monkeypatch, m, "update", 14, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert m.main(["--resume", str(run)]) == 130
    assert m.main(["--resume", str(run)]) == 0
    assert_same_run(run, baseline)


def test_resuming_a_finished_run_changes_nothing(m, run, baseline):
    """Not even the time of its evaluations."""
    logged = (run / "metrics.jsonl").read_bytes()
    assert m.main(["--resume", str(run / "checkpoint.pt")]) == 0
    assert_same_run(run, baseline)
    assert (run / "metrics.jsonl").read_bytes() == logged


def test_resuming_a_checkpoint_that_was_moved(m, run, tmp_path):
    """Without its old metrics.jsonl the new one must still be JSON in every line."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(run / "checkpoint.pt", tmp_path / "elsewhere")
    if m.SCRIPT == "som_online":  # whose steps are part of it
        assert_refused(m, ["--resume", str(tmp_path / "elsewhere")], tmp_path / "elsewhere", match="replay.bin")
        shutil.copy(run / "replay.bin", tmp_path / "elsewhere")
    argv = ["--resume", str(tmp_path / "elsewhere" / "checkpoint.pt"), *longer(m.SCRIPT, 28).split()]
    assert m.main(argv) == 0
    assert {row["step"] for row in rows(tmp_path / "elsewhere")} == {28 * STRIDE[m.SCRIPT]}


def test_flags_beside_resume_override(m, run):
    """A finished run can be made longer, and learning rates and weights change: not only in args.json, since the
    optimiser's own state and the networks' hold the former ones."""
    rate = "critic_learning_rate" if m.SCRIPT.startswith("mfql") else "learning_rate"
    weight = {"ofql_offline": "eta"}.get(m.SCRIPT, "alpha")
    argv = [f"--{rate.replace('_', '-')}", "0.125", f"--{weight}", "7"]
    argv += ["--learning-rate-schedule", "constant"] if m.SCRIPT == "ofql_offline" else []
    assert m.main(["--resume", str(run), *longer(m.SCRIPT, 28).split(), *argv]) == 0
    state, about = torch.load(run / "checkpoint.pt", weights_only=True), json.loads((run / "args.json").read_text())
    assert state["step"] == 28 * STRIDE[m.SCRIPT]
    for args in (state["args"], about["args"]):
        assert args[rate] == 0.125 and args[weight] == 7 and args["resume"] == str(run)
    assert float(state["optimizers"][1]["param_groups"][0]["lr"]) == 0.125
    if m.SCRIPT.startswith("mfql"):
        assert [row["charts/alpha"] for row in rows(run) if row["step"] == 28 and "charts/alpha" in row] == [7]


def test_copies_of_networks_carry_no_history(m):
    """A target that moves with gradients on would keep the graph of every update, and all the memory in the end."""
    agent = m.Agent(3, 1, m.Args(policy_width=16, critic_width=16, ema_start=0) if m.SCRIPT == "ofql_offline"
                    else m.Args(policy_width=16, critic_width=16), torch.device("cpu"))
    batch = dict(observations=torch.randn(8, 3), next_observations=torch.randn(8, 3), actions=torch.zeros(8, 1),
                 rewards=torch.randn(8), masks=torch.ones(8))
    before = agent.target_critic.weights[0].clone()
    for _ in range(5):
        agent.update(batch)
    assert not torch.equal(before, agent.target_critic.weights[0])
    copies = [agent.target_critic, *([agent.ema_policy] if m.SCRIPT == "ofql_offline" else [])]
    assert not any(p.requires_grad or p.grad_fn for network in copies for p in network.parameters())


# ---------------------------------------------------------------- checkpoints that cannot be used
def seal(path):
    """Appends the SHA-256, as a script does: what it then makes of the contents is another question."""
    with path.open("ab") as file:
        file.write(hashlib.sha256(path.read_bytes()).digest())


def save_sealed(state, path):
    torch.save(state, path)
    seal(path)


def other_script(path):
    save_sealed(dict(torch.load(path, weights_only=True), script="another_script"), path)


def other_flags(path):
    state = torch.load(path, weights_only=True)
    save_sealed(dict(state, args=dict(state["args"], flag_of_an_older_version=1)), path)


def rewrite(path, name, change):
    """Changes one part of the file and keeps its checksums right."""
    with zipfile.ZipFile(path) as file:
        parts = {info.filename: file.read(info) for info in file.infolist()}
    found, = (part for part in parts if part.endswith(name))
    assert (changed := change(parts[found])) != parts[found]
    with zipfile.ZipFile(path, "w") as file:
        for part, contents in {**parts, found: changed}.items():
            file.writestr(part, contents)
    seal(path)


def flipped_bit(path):
    """In the middle of the largest tensor. torch does not notice."""
    with zipfile.ZipFile(path) as file:
        part = max((info for info in file.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
        place = path.read_bytes().index(file.read(part)) + part.file_size // 2
    state = bytearray(path.read_bytes())
    state[place] ^= 64
    path.write_bytes(state)
    torch.load(path, weights_only=True)


DAMAGES = {
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint\n" * 100),
    "short text": lambda path: path.write_text("}"),
    "a wrong instruction": lambda path: rewrite(path, "data.pkl", lambda s: s.replace(b"}q\x00(", b"}q\x00}", 1)),
    "a flipped bit": flipped_bit,
    "a list": lambda path: save_sealed([1, 2], path),
    "a tensor": lambda path: save_sealed(torch.ones(3), path),  # asked for its "script" torch warns in three lines
    "nothing but its script": lambda path: save_sealed(
        {"script": torch.load(path, weights_only=True)["script"]}, path),
    "another script": other_script,
    "another version's flags": other_flags,
    "missing": lambda path: path.unlink(),
}


def assert_refused(m, argv, run, match):
    """BadInput, and neither the run folder nor its parent changes."""
    before, folders = contents(run), sorted(run.parent.iterdir())
    with pytest.raises(m.BadInput, match=match) as caught:
        m.main(argv)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run what the file says
    assert contents(run) == before and sorted(run.parent.iterdir()) == folders


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_damaged_checkpoint_is_refused(m, run, flag, damage, recwarn):
    """One line that names the file, not a traceback, and no warning beside it."""
    DAMAGES[damage](run / "checkpoint.pt")
    match = rf"^checkpoint {run}/checkpoint.pt: |^{run}, written by another version of {m.SCRIPT}: "
    recwarn.clear()
    assert_refused(m, [flag, str(run)], run, match)
    assert not recwarn.list
    if damage == "a flipped bit":
        assert_refused(m, [flag, str(run)], run, match="damaged, or not as the script wrote it")


def test_checkpoints_that_do_not_fit_are_refused(m, run):
    """A policy.pt has no optimiser state; other sizes; observations of two numbers, and actions that are no vector."""
    assert_refused(m, ["--resume", str(run / "policy.pt")], run, match="policy.pt")
    for flag in ("--resume", "--evaluate"):
        assert_refused(m, [flag, str(run), *SMALL[m.SCRIPT][1].split()], run, match="does not fit these flags")
    for env_id, reason in (("CartPole-v1", "Discrete"), ("MountainCarContinuous-v0", r"\(2,\)")):
        assert_refused(m, ["--resume", str(run), "--env-id", env_id], run,
                       match=reason if m.SCRIPT in OFFLINE else "--env-id cannot change")


@pytest.mark.parametrize("change", ["step", "shape", "missing", "flag", "as it was"])
def test_a_checkpoint_changed_by_hand_is_refused(m, run, change):
    """Once, steps of -5 trained on, Adam's fused kernel crashed on a state of another shape, and an entry missing or
    of another type ended in a traceback, maybe hours later. All of them, like any flipped bit, break the seal."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    changed = {**state, **dict(
        step=dict(step=-5), flag=dict(args={**state["args"], "gamma": "x"}), missing=dict(random_cpu=None)
    ).get(change, {})}
    if change == "shape":
        changed["optimizers"][1]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(changed, run / "checkpoint.pt")  # without the seal even what is right
    for flag in ("--resume", "--evaluate"):
        assert_refused(m, [flag, str(run)], run, match="damaged, or not as the script wrote it")


def test_any_damaged_byte_is_seen(m, baseline, tmp_path):
    rng = random.Random(0)
    for name in ("policy.pt", "checkpoint.pt"):
        whole = (baseline / name).read_bytes()
        for at in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
            with pytest.raises(m.BadInput, match="damaged"):
                m.load(tmp_path / name)
        (tmp_path / name).write_bytes(whole)
        assert m.load(tmp_path / name)[1].keys() == torch.load(baseline / name, weights_only=True).keys()


def test_resume_with_another_seed_is_refused(m, run):
    assert_refused(m, ["--resume", str(run), "--seed", "2"], run, match="--seed cannot change")


@about_data
def test_resume_with_other_normalization_is_refused(m, run):
    assert_refused(m, ["--resume", str(run), "--observation-normalization", "none"], run, match="cannot change")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--env-id"])
def test_empty_flags_are_refused(m, flag):
    """As from a shell variable that is not set."""
    with pytest.raises(m.BadInput, match=f"{flag} is empty"):
        m.main([flag, ""])


@about_data
def test_resume_with_other_data_is_refused(m, run, tmp_path):
    """Same shapes, other numbers: only the fingerprint can tell."""
    other = write_data(tmp_path / "other.hdf5", seed=1)
    assert_refused(m, ["--resume", str(run), "--dataset-path", str(other)], run, match="other data")


def test_checkpoints_are_data(m, baseline):
    """torch.load needs no trust to read them."""
    for name in ("checkpoint.pt", "policy.pt"):
        state = torch.load(baseline / name, weights_only=True)
        assert state["step"] == 24 * STRIDE[m.SCRIPT]
        assert all(value.isfinite().all() for value in state["agent"].values())


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_code_in_a_checkpoint_does_not_run(m, tmp_path, write):
    """A checkpoint from the internet must be harmless, whatever is in it."""
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    write({"script": m.SCRIPT, "args": Bomb(trace)}, path)
    seal(path)
    with pytest.raises(m.BadInput, match="Unpickling"):
        m.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()  # the bomb is a real one


# ---------------------------------------------------------------- CUDA graphs, imitated on the CPU
class Recorder(TorchDispatchMode):
    """Records the tensor operations of a function and runs them again, as a CUDA graph does: Python has no say in it,
    and only what lies in tensors can change. Fails on an operation that would wait for the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, operands=(), options=None):
        aten = torch.ops.aten
        assert operation.overloadpacket not in (
            aten._local_scalar_dense, aten.nonzero, aten.equal, aten.multinomial, aten._unique2, aten.unique_dim,
            aten.masked_select), f"{operation} waits"
        found = operation(*operands, **(options or {}))
        self.calls.append((operation, operands, options or {}, found))
        return found

    @torch.no_grad()  # the operations of backward passes are among those recorded
    def again(self, result):
        """Runs what was recorded once more; returns the tensors that stand for those of `result`."""
        new = {}
        for operation, operands, options, found in self.calls:
            current = tree_map_only(torch.Tensor, lambda tensor: new.get(id(tensor), tensor), (operands, options))
            outputs = operation(*current[0], **current[1])
            for old, output in zip(tree_leaves(found), tree_leaves(outputs)):
                new.setdefault(id(old), output)
        return tree_map_only(torch.Tensor, lambda tensor: new[id(tensor)], result)


def as_on_a_gpu(m, counts):
    """The script with its graphs switched on, although there is no GPU, and bursts of 2; `counts` counts replays."""
    def capture(function, count):
        recorder, results = Recorder(), []

        def replay():
            counts[function.__name__, count] += 1
            if recorder.calls:
                return recorder.again(results[-1])
            with recorder:  # a real capture runs nothing, so that this is capture and first replay in one
                for _ in range(count):
                    results.append(function())
            return results[-1]

        return replay

    text = pathlib.Path(m.__file__).read_text()
    assert text.count('args.cuda_graph and device.type == "cuda"') == 1
    module = types.ModuleType(m.__name__ + "_with_graphs")
    module.__file__ = m.__file__
    sys.modules[module.__name__] = module  # where dataclasses look
    exec(compile(text.replace('args.cuda_graph and device.type == "cuda"', "args.cuda_graph"), m.__file__, "exec"),
         module.__dict__)
    module.capture, module.UPDATES_PER_REPLAY = capture, 2
    return module


class Unmoving:
    """Stands for an optimiser on the meta device, where those of torch do not work."""

    def __init__(self, parameters, **options):
        self.param_groups = [{"lr": torch.zeros((), device="meta")}]
        self.zero_grad = self.step = lambda: None


def test_updating_and_acting_read_nothing_back(m, monkeypatch):
    """On the meta device tensors have no numbers: whoever asks for one, or for a copy on another device, fails."""
    monkeypatch.setattr(torch.optim, "Adam", Unmoving)
    monkeypatch.setattr(torch.optim, "AdamW", Unmoving)
    agent = m.Agent(3, 2, m.Args(policy_width=16, critic_width=16), torch.device("meta"))
    shapes = dict(observations=(8, 3), next_observations=(8, 3), actions=(8, 2), rewards=(8,), masks=(8,))
    replay = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    parts = agent.update(m.sample(replay, 4))
    assert {part.device.type for part in parts.values()} == {"meta"} and not any(part.dim() for part in parts.values())
    for count in (1, 5):
        assert agent.act(torch.empty(7, 3, device="meta"), count, None).shape == (7, 2)


def test_replayed_updates_equal_eager_ones(m, data, tmp_path, monkeypatch):
    """Bit for bit, learning rates, alpha, moving averages and growing buffers included; evaluations and checkpoints
    where they are due; and no operation of an update waits for the device."""
    counts, more = collections.Counter(), {"mfql_offline_to_online": ["--utd 2"], "som_online": ["--utd 1"]}
    more = more.get(m.SCRIPT, [])
    graphs = as_on_a_gpu(m, counts)
    for module in (m, graphs):
        if hasattr(m, "next_alpha_factor"):  # checks at every step instead of every 2000th
            monkeypatch.setattr(
                module, "next_alpha_factor", lambda factor, history, loss, step, args, old=module.next_alpha_factor:
                old(factor, history, 99 * step * loss, 2000 * step, args))
    whole = train(m, data, tmp_path / "eager", *more)
    assert_same_run(train(graphs, data, tmp_path / "graphs", *more), whole)
    expected = {"mfql_offline": {("update", 2): 10}, "ofql_offline": {("update", 2): 10},
                "mfql_offline_to_online": {("update", 2): 6, ("update", 1): 12, ("act", 1): 6},
                "som_online": {("update", 1): 44, ("act", 1): 22}}
    assert counts == expected[m.SCRIPT]


# ---------------------------------------------------------------- non-finite losses
@pytest.mark.parametrize("poisoned, found, good", [(7, 8, 6), (9, 10, 6), (11, 12, 6), (2, 4, None)])
def test_non_finite_loss_stops_the_run(m, data, tmp_path, monkeypatch, capsys, poisoned, found, good):
    """At the next log, evaluation or checkpoint: exit code 3 and one line that says what, when and what is left. The
    checkpoint of before is whole and finite; the poisoned weights are neither written nor evaluated."""
    batches, stride = itertools.count(1), STRIDE[m.SCRIPT]

    def sample(*operands, original=m.sample):
        batch = original(*operands)
        return dict(batch, rewards=batch["rewards"] * 1e30) if next(batches) >= poisoned else batch

    monkeypatch.setattr(m, "sample", sample)
    run = train(m, data, tmp_path, code=3)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith(m.SCRIPT)]
    assert len(error) == 1 and f"step {found * stride}:" in error[0] and str(run) in error[0]
    assert re.search(r"losses/\w+ is (inf|nan)", error[0])
    assert [row["step"] for row in rows(run)] == [update * stride for update in (4, 8, 10) if update < found]
    assert (run / "checkpoint.pt").exists() == (good is not None) and not list(run.glob("*.tmp"))
    if good:
        state = result(run)
        assert state["step"] == good * stride and all(value.isfinite().all() for value in state["agent"].values())


# ---------------------------------------------------------------- flags
def fields(m):
    """Args as the source has it: (name, whether it is a bool, the docstring below it or "")."""
    body = next(node for node in ast.parse(pathlib.Path(m.__file__).read_text()).body
                if isinstance(node, ast.ClassDef) and node.name == "Args").body
    for node, after in itertools.zip_longest(body, body[1:]):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node.target.id, ast.unparse(node.annotation) == "bool", after.value.value if is_text else ""


def help_text(m, capsys, monkeypatch, *more):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        m.main([*more, "--help"])
    assert caught.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_every_flag_has_help(m, capsys, monkeypatch):
    """--help shows each flag with the words of its docstring, and booleans as pairs."""
    text = help_text(m, capsys, monkeypatch)
    for name, is_bool, doc in fields(m):
        words = " ".join(doc.split())
        assert len(words) > 10, f"{name} has no docstring"
        flag = f"--{name.replace('_', '-')}"
        pair = rf"{flag}, --no-{flag[2:]}" if is_bool else rf"{flag} \S+"
        assert re.search(rf"(^| ){pair}.{{0,80}}? {re.escape(words)}", text), name
    assert len(list(fields(m))) == len(m.asdict(m.Args())) > 20


def test_help_shows_the_values_of_the_task(m, capsys, monkeypatch):
    """What --help says is what a run with this --env-id takes."""
    env_id, values = TASK[m.SCRIPT]
    text = help_text(m, capsys, monkeypatch, "--env-id", env_id)
    for name, value in values.items():
        shown = re.search(rf"--{name.replace('_', '-')} [A-Z].*?\(default: (.*?)\)", text)
        assert float(shown[1]) == value, name


@pytest.mark.parametrize("style", ["--env-id NAME", "--env-id=NAME", "--env_id NAME"])
def test_task_values_are_defaults_and_flags_override_them(m, style):
    """The paper's table reaches the run, however the flag is spelled; a given flag wins."""
    env_id, values = TASK[m.SCRIPT]
    argv = style.replace("NAME", env_id).split()
    args, run_dir, checkpoint = m.parse_args(argv)
    assert run_dir == pathlib.Path("runs") / f"{env_id}__{m.SCRIPT}__1" and checkpoint is None
    assert args.env_id == env_id
    assert {name: getattr(args, name) for name in values} == values
    assert values["gamma"] != 0.5 and m.parse_args([*argv, "--gamma", "0.5"])[0].gamma == 0.5


def test_resume_and_evaluate_exclude_each_other(m, baseline):
    """Evaluating the one while the user waits for the other to train would lose an evening."""
    with pytest.raises(m.BadInput, match="exclude each other"):
        m.parse_args(["--resume", str(baseline), "--evaluate", str(baseline)])


def test_numbers_beyond_64_bits(m):
    """torch takes no larger seed."""
    assert m.parse_args(["--seed", str(2**63 - 1)])[0].seed == 2**63 - 1
    with pytest.raises(m.BadInput, match="--seed"):
        m.parse_args(["--seed", str(2**63)])


@about_data
def test_rewards_in_training_are_scaled_then_shifted(m, data, tmp_path):
    """The same as training on data whose rewards are 0.5 r - 1 (quarters, so that the numbers are exact)."""
    runs, offline = [], " --online-steps 0" if m.SCRIPT == "mfql_offline_to_online" else ""
    for name, scale, shift, more in (("flags", 1.0, 0.0, "--reward-scale 0.5 --reward-shift -1"),
                                     ("data", 0.5, -1.0, "--reward-scale 1 --reward-shift 0")):
        path = shutil.copy(data, tmp_path / f"{name}.hdf5")
        with h5py.File(path, "r+") as file:
            file["rewards"][...] = scale * np.round(4 * file["rewards"][...]) / 4 + shift
        runs.append(train(m, path, tmp_path / name, more + offline))
    assert differences(result(runs[0])["agent"], result(runs[1])["agent"]) == []


def test_flags_of_a_checkpoint_are_defaults(m, baseline):
    """--evaluate and --resume need no other flag."""
    args, run_dir, checkpoint = m.parse_args(["--evaluate", str(baseline)])
    assert args == m.Args(**dict(checkpoint["args"], evaluate=str(baseline)))
    assert run_dir == baseline and args.critic_width == 16 != m.Args().critic_width
    assert m.parse_args(["--resume", str(baseline), "--tau", "0.1"])[0].tau == 0.1


@pytest.mark.parametrize("wrong", ["--batch-size 0", "--gamma 1.5", "--gamma nan", "--tau -0.1", "--eval-episodes 0",
                                   "--seed -1", "no budget", "--log-interval -5"])
def test_flag_out_of_range(m, wrong):
    """Told at once and by name."""
    wrong = budget(m.SCRIPT, 0) if wrong == "no budget" else wrong
    with pytest.raises(m.BadInput, match=wrong.split()[0]):
        m.parse_args(wrong.split())


def test_no_number_may_be_negative(m):
    """A negative learning rate or norm would train the wrong way round without a word."""
    numbers = [name for name, value in m.asdict(m.Args()).items()
               if type(value) in (int, float) and name not in ("reward_shift", "time_mean")]
    assert len(numbers) > 15
    for flag in (f"--{name.replace('_', '-')}" for name in numbers):
        with pytest.raises(m.BadInput, match=f"{flag} -1"):
            m.parse_args([flag, "-1"])


@about_data
def test_reward_shift_may_be_negative(m):
    """Costs per step, say; but it must be a number."""
    assert m.parse_args(["--reward-shift", "-1"])[0].reward_shift == -1
    with pytest.raises(m.BadInput, match="--reward-shift nan"):
        m.parse_args(["--reward-shift", "nan"])


@pytest.mark.parametrize("wrong", ["--batch-size many", "--no-such-flag 1", "--track maybe"])
def test_flag_that_is_none(m, wrong, capsys):
    """tyro's own complaint, with the exit code of bad input."""
    with pytest.raises(SystemExit) as caught:
        m.main(wrong.split())
    assert caught.value.code == 2


# ---------------------------------------------------------------- the file alone, as a process
def alone(m, folder, *argv, command="", **environ):
    """Runs a copy of the script in a folder that holds nothing else, as a user who copied the file would."""
    shutil.copy(m.__file__, folder)
    environ = {**{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}, **environ}
    return process(command or [sys.executable, f"{m.SCRIPT}.py", *argv], cwd=folder, env=environ, shell=bool(command))


def test_script_runs_alone(m, data, tmp_path):
    """No sibling, no repository, no PYTHONPATH; on an environment that Gymnasium itself has. Importing it loads none
    of the packages that not every run needs. Bad input (here torch's of many lines) is one line and exit code 2."""
    program = (
        "import json, sys\n"
        f"import {m.SCRIPT} as m\n"
        "names = {'h5py', 'minari', 'moviepy', 'ogbench', 'gymnasium_robotics', 'wandb'}\n"
        "early = sorted(names & set(sys.modules))\n"
        "assert m.main(sys.argv[1:]) == 0\n"
        "print(json.dumps([early, sorted(names & set(sys.modules))]))\n")
    (tmp_path / "program.py").write_text(program)
    argv = flags(m.SCRIPT, data, "runs", "--env-id Pendulum-v1 --eval-episodes 1", budget(m.SCRIPT, 2))
    done = alone(m, tmp_path, command=" ".join([sys.executable, "program.py", *argv]))
    assert done.returncode == 0, done.stderr
    run, = (tmp_path / "runs").iterdir()
    assert run.name == f"Pendulum-v1__{m.SCRIPT}__1" and result(run)["step"] == 2 * STRIDE[m.SCRIPT]
    assert json.loads(done.stdout.splitlines()[-1]) == [[], ["h5py"] if m.SCRIPT in OFFLINE else []]
    before = contents(tmp_path / "runs")
    done = alone(m, tmp_path, "--resume", str(run), *SMALL[m.SCRIPT][1].split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{m.SCRIPT}: the checkpoint in {run} does not fit these flags")
    assert contents(tmp_path / "runs") == before


def test_closed_pipe(m, data, tmp_path):
    """`| head -1` ends a run in one line, and what was saved before can be resumed."""
    argv = flags(m.SCRIPT, data, "runs", "--env-id Pendulum-v1 --eval-episodes 1 --checkpoint-interval 2")
    run = " ".join([sys.executable, f"{m.SCRIPT}.py", *argv])
    done = alone(m, tmp_path, command=f"{{ {run}; echo $? >code; }} | head -1")
    lines = [line for line in done.stderr.splitlines() if line.strip() and "step" not in line]
    assert (tmp_path / "code").read_text() == "2\n" and len(done.stdout.splitlines()) == 1
    assert len(lines) == 1 and lines[0].startswith(f"{m.SCRIPT}: ") and "Broken pipe" in lines[0], done.stderr
    run, = (tmp_path / "runs").iterdir()
    assert not list(run.glob("*.tmp")) and m.load(run)[1]["step"] > 0


def test_interrupted_while_the_libraries_load(m):
    """One line and code 130, where Python has a traceback."""
    child = subprocess.Popen([sys.executable, m.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "numpy" not in pathlib.Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")


def test_sizes_that_do_not_fit_into_memory(m, data, tmp_path):
    """One line and code 2, before or after the run folder is made."""
    argv = flags(m.SCRIPT, data, tmp_path / "runs", "--batch-size 1000000 --critic-width 10000")
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    done = subprocess.run([sys.executable, m.__file__, *argv, "--env-id", "Pendulum-v1"], capture_output=True,
                          text=True, cwd=tmp_path, preexec_fn=limit)
    lines = [line for line in re.split("[\r\n]", done.stderr) if line.strip() and "step/s" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "memory" in lines[0], done.stderr


# ---------------------------------------------------------------- disks that are full and folders that vanish
def fill_disk():
    """No file of this process may grow beyond 5,000 bytes; a write beyond is an error, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("harm", ["full disk", "vanished folder"])
def test_checkpoint_that_cannot_be_written(m, data, tmp_path, monkeypatch, harm):
    """One line; no half-written file; the checkpoint of before is whole."""
    def act():
        if harm == "full disk":
            fill_disk()
        else:
            shutil.rmtree(tmp_path / "runs")

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        with at_step(monkeypatch, m, "update", 7, act), pytest.raises((m.BadInput, OSError)) as caught:
            train(m, data, tmp_path / "runs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(str(caught.value).splitlines()) == 1 and "policy.pt" in str(caught.value), caught.value
    if harm == "full disk":
        run, = (tmp_path / "runs").iterdir()
        assert not list(run.glob("*.tmp")) and result(run)["step"] == 6 * STRIDE[m.SCRIPT]
        for name in ("checkpoint.pt", "policy.pt"):
            m.load(run / name)
    else:
        assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- wandb and videos
def test_track_offline(m, data, tmp_path, monkeypatch):
    """WANDB_MODE=offline writes below the run folder and asks no server: there is none at this address."""
    wandb = pytest.importorskip("wandb")
    for name, value in dict(MODE="offline", SILENT="true", BASE_URL="http://127.0.0.1:9").items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged = []

    def log(run, metrics, step, original=wandb.Run.log):
        logged.append({"step": step, **metrics})
        original(run, metrics, step=step)

    monkeypatch.setattr(wandb.Run, "log", log)
    try:
        run = train(m, data, tmp_path, "--track")
        assert wandb.run.name == run.name
    finally:
        wandb.finish()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert logged == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_track_without_wandb(m, data, tmp_path, monkeypatch):
    """One line that says what to install, and no run folder is left behind."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(m.BadInput, match="pip install wandb"):
        m.main(flags(m.SCRIPT, data, tmp_path, "--track"))
    assert not list(tmp_path.iterdir())


def test_capture_video(m, data, tmp_path):
    """A video per evaluation, named after its step, and the training is the same with and without."""
    pytest.importorskip("moviepy")
    stride = STRIDE[m.SCRIPT]
    more = f"--env-id Scripted-v0 --eval-interval {2 * stride} {budget(m.SCRIPT, 4)}"
    plain = train(m, data, tmp_path / "plain", more)
    filmed = train(m, data, tmp_path / "filmed", more, "--capture-video")
    videos = list((filmed / "videos").glob("*.mp4"))
    assert len(videos) >= 2 and all(path.stat().st_size > 500 for path in videos)
    assert {int(re.search(r"step-(\d+)", path.name)[1]) for path in videos} == (
        {2, 3, 4} if m.SCRIPT == "mfql_offline_to_online" else {2 * stride, 4 * stride})
    assert_same_run(filmed, plain)
    shutil.rmtree(filmed / "videos")
    assert m.main(["--evaluate", str(filmed)]) == 0 and list((filmed / "videos").glob("*.mp4"))


@pytest.mark.parametrize("reason", ["no moviepy", "no picture"])
def test_video_that_cannot_be_made(m, data, tmp_path, monkeypatch, reason):
    """Found out before training, and no run folder is left behind."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if reason == "no moviepy":
        monkeypatch.setitem(sys.modules, "moviepy", None)
    else:
        monkeypatch.setattr(Scripted, "render", lambda env: 1 / 0)
    with pytest.raises(m.BadInput, match="pip install moviepy" if reason == "no moviepy" else "ZeroDivisionError"):
        m.main(flags(m.SCRIPT, data, tmp_path, "--env-id Scripted-v0 --capture-video"))
    assert not list(tmp_path.rglob("args.json"))
    assert os.environ["MUJOCO_GL"] == "egl"  # renders without a screen, and without GLFW's four warnings


if __name__ == "__main__":
    drive(*sys.argv[1:])
