"""benchmark/suite.py: what it runs and in which order, that a failure stays one, and that kills cost nothing."""
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import suite  # noqa: E402

BEGUN = []  # the suites that a test has begun
SUITES = sorted(path.stem for path in (ROOT / "benchmark" / "suites").glob("*.toml"))
FAKE = """
import argparse, json, os, pathlib, signal, sys
parser = argparse.ArgumentParser()
for flag in ("env-id", "seed", "runs-dir", "run-name", "resume", "offline-steps"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
folder = pathlib.Path(args.runs_dir, args.run_name)
first = not folder.exists()
folder.mkdir(exist_ok=True)
if args.env_id == "bad":
    sys.exit("fake: no such data")
if args.env_id == "dying" or args.env_id == "dying-once" and first:
    os.kill(os.getpid(), signal.SIGKILL)
about = dict(cores=sorted(os.sched_getaffinity(0)), threads=os.environ["OMP_NUM_THREADS"],
             gpu=os.environ.get("CUDA_VISIBLE_DEVICES"))
(folder / "args.json").write_text(json.dumps(dict(args=dict(offline_steps=10), about=about)))
(folder / "metrics.jsonl").write_text('{"step": 10, "charts/UPS": 4.0}\\n')
(folder / "done.json").write_text('{"step": 10}')
"""
TINY = """
seeds = [1]
[[methods]]
label = "OFQL"
script = "ofql_offline.py"
flags = "--no-cuda --no-compile --batch-size 32 --policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1 \
--num-candidates 5 --eval-episodes 1 --offline-steps 1500 --eval-interval 150 --log-interval 50 \
--checkpoint-interval 100"
[tasks]
"the bundled" = {flags = "--env-id meanflow/hopper/medium-replay-v0"}
"""


def write(folder, text=TINY, name="tiny"):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def fake(folder, *tasks, seeds="[1]", more=""):
    """A suite of a script that takes no time and does what the name of its task says."""
    (folder / "fake.py").write_text(FAKE)
    return write(folder, f'seeds = {seeds}\nflags = "--offline-steps 10"\n[[methods]]\nlabel = "Fake"\n'
                         f'script = "{folder}/fake.py"\n{more}\n[tasks]\n'
                         + "".join(f'"{task}" = {{}}\n' for task in tasks), "fake")


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test that fails leaves no suite running."""
    yield
    while BEGUN:
        BEGUN.pop().kill()


def begin(path, folder, *more):
    BEGUN.append(subprocess.Popen(
        [sys.executable, "benchmark/suite.py", str(path), "--runs-dir", str(folder), *more], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return BEGUN[-1]


def run(path, folder, *more, code=0):
    """Runs a suite to its end: (stdout, stderr)."""
    process = begin(path, folder, *more)
    said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def rows(run):
    """The rows of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("charts/UPS", "charts/SPS")} for row in found]


def training(run):
    """The process that trains in this run folder: (its id, its parent's), None if there is none."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[1:2] == [b"ofql_offline.py"] and run.name.encode() in words and str(run.parent).encode() in words:
                return int(process.name), int(re.search(r"PPid:\t(\d+)", (process / "status").read_text())[1])
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    return None


def until(condition, seconds=240):
    """The first true value of `condition`."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    return pytest.fail(f"not within {seconds} seconds")


def next_row(run):
    """Waits until a process trains in the run folder and has written a row: (its id, its parent's)."""
    before = len(rows(run)) if (run / "metrics.jsonl").exists() else 0
    until(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) > before)
    return until(lambda: training(run))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of the tiny suite's one run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(write(folder), folder)
    return rows(folder / "tiny" / "OFQL__the_bundled__1")


# ---------------------------------------------------------------- suites
def test_a_suite_is_its_runs_in_order_the_first_seed_first(tmp_path):
    path = write(tmp_path, """
seeds = [1, 2]
flags = "--gamma 0.9"
[[methods]]
label = "A+"
script = "a.py"
flags = "--tau 0.1"
[[methods]]
label = "B"
script = "b.py"
tasks = ["one"]
seeds = [2, 3]
[tasks]
"one" = {flags = "--env-id=One-v0 --dataset-path 'a b'", paper = {B = 1.5}}
"two-v2" = {}
""")
    contents, runs = suite.load_suite(str(path), tmp_path)
    assert contents["tasks"]["one"]["paper"] == {"B": 1.5}
    assert [run.folder.relative_to(tmp_path / "tiny").name for run in runs] == [
        "A___one__1", "A___two-v2__1", "A___one__2", "B__one__2", "A___two-v2__2", "B__one__3"]
    assert runs[0].flags == ("--gamma", "0.9", "--tau", "0.1", "--env-id", "One-v0", "--dataset-path", "a b")
    assert runs[1].flags == ("--gamma", "0.9", "--tau", "0.1", "--env-id", "two-v2")
    assert suite.command(runs[3]) == [
        "b.py", "--gamma", "0.9", "--env-id", "One-v0", "--dataset-path", "a b", "--seed", "2",
        "--runs-dir", str(tmp_path / "tiny"), "--run-name", "B__one__2", "--resume", "auto"]
    assert suite.load_suite(str(path))[1][0].folder == ROOT / "runs" / "tiny" / "A___one__1"


@pytest.mark.parametrize("old, new, expected", [
    ("seeds", "seed", "a suite has no seed"), ("script", "scripts", "a method has no scripts"),
    ("flags = \"--env", "flag = \"--env", "a task has no flag"), ("[tasks]", "[tasks", "line"),
    ("seeds = [1]", "", "lacks 'seeds'"), ("script = \"ofql_offline.py\"", "", "lacks 'script'"),
    ("[tasks]", "tasks = [\"other\"]\n[tasks]", "names tasks that are not there: other"),
    ("[tasks]", "[tasks]\n\"the+bundled\" = {}", "two runs would share the folder"),
])
def test_a_wrong_suite_is_refused_in_one_line(old, new, expected, tmp_path):
    text = TINY.replace(old, new, 1)
    assert text != TINY
    path = write(tmp_path, text)
    with pytest.raises(suite.BadInput, match=re.escape(str(path))) as error:
        suite.load_suite(str(path))
    assert expected in str(error.value)


@pytest.mark.parametrize("words, expected", [
    ("nonsense", "smoke, stand-in"), ("smoke --only (", "--only (: "), ("smoke --only none", "leaves no run"),
    ("smoke --jobs 0", "--jobs must be"), ("smoke --index 7", "there are 7 runs"),
])
def test_wrong_flags_are_refused_in_one_line(words, expected, tmp_path):
    with pytest.raises(suite.BadInput, match=re.escape(expected)):
        suite.main([*words.split(), "--runs-dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", SUITES)
def test_the_scripts_take_the_flags_of_the_suites(name, tmp_path, monkeypatch):
    """Also that the data tools know the tasks, and that suite.py is not mistaken in how long a run is."""
    import gymnasium as gym

    import data.d4rl_tasks  # noqa: F401  registers its tasks
    from data import fetch

    contents, runs = suite.load_suite(name, tmp_path)
    assert contents["description"]
    for method in contents["methods"]:
        script = ROOT / method["script"]
        monkeypatch.syspath_prepend(str(script.parent))
        module = importlib.import_module(script.stem)
        for run in runs:
            if run.label == method["label"] and run.seed == runs[0].seed:
                flags = suite.command(run)[1:]
                if "baselines" in method["script"]:
                    args = importlib.import_module("common").parse(module.Args(), script.stem, "", flags)[0]
                else:
                    args = module.parse_args(flags)[0]
                assert (args.seed, args.run_name) == (run.seed, run.folder.name)
                assert suite.length(run) in (None, sum(getattr(args, key, 0) for key in suite.STEPS))
                known = args.env_id in gym.registry or fetch.d4rl_source(args.env_id) or (ROOT / "data" / args.env_id)
                assert known, args.env_id
    labels = {method["label"] for method in contents["methods"]}
    assert labels.issuperset(label for task in contents["tasks"].values() for label in task.get("paper", {}))


def test_a_run_that_is_just_writing_its_files_does_not_end_the_suite(tmp_path):
    _, (run, *_) = suite.load_suite(str(write(tmp_path)), tmp_path)
    run.folder.mkdir(parents=True)
    assert suite.fraction(run) == 0
    (run.folder / "args.json").write_text('{"args": {"offline_')
    (run.folder / "metrics.jsonl").write_text('{"step": 100, "charts/UPS": 4.0}\n{"step": 200, "cha')
    assert suite.fraction(run) == 100 / 1500 and suite.logged_rate([run]) == 4
    (run.folder / "args.json").write_text('{"args": {"offline_steps": 200}}')
    assert suite.fraction(run) == 0.5
    (run.folder / "done.json").write_text("")
    assert suite.fraction(run) == 1


# ---------------------------------------------------------------- local
def test_a_failed_run_is_named_at_the_end_and_the_others_go_on(tmp_path):
    path = fake(tmp_path, "good", "bad", "dying", "dying-once")
    said, _ = run(path, tmp_path, code=1)
    assert said.splitlines()[-3:] == [f"2 of 4 runs done in {tmp_path}/fake",
                                      "Fake__bad__1: exit code 1: fake: no such data",
                                      "Fake__dying__1: exit code -9: it said nothing"]
    assert (tmp_path / "fake" / "Fake__dying__1.log").read_text().count("$ python") == 3
    assert (tmp_path / "fake" / "Fake__dying-once__1.log").read_text().count("$ python") == 2


def test_each_run_has_one_core_one_thread_and_the_next_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = fake(tmp_path, "one", "two", "three", "four")
    run(path, tmp_path, "--gpus-per-run", "0.5")
    found = [json.loads((tmp_path / "fake" / f"Fake__{task}__1" / "args.json").read_text())["about"]
             for task in ("one", "two", "three", "four")]
    assert all(len(about["cores"]) == 1 and about["threads"] == "1" for about in found)
    assert sorted(about["gpu"] for about in found) == ["3", "3", "5", "5"]
    core = min(os.sched_getaffinity(0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command = ["taskset", "-c", str(core), sys.executable, "benchmark/suite.py", str(path), "--runs-dir",
               str(tmp_path / "second"), "--gpus-per-run", "0"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    about = json.loads((tmp_path / "second" / "fake" / "Fake__one__1" / "args.json").read_text())["about"]
    assert (about["cores"], about["gpu"]) == ([core], "")


def test_only_and_index_choose_runs_and_what_is_done_is_left_out(tmp_path):
    path = fake(tmp_path, "one", "two", seeds="[1, 2]")
    run(path, tmp_path, "--only", "two", "--index", "1")
    assert [folder.name for folder in (tmp_path / "fake").iterdir() if folder.is_dir()] == ["Fake__two__2"]
    said, _ = run(path, tmp_path)
    assert "4 of 4 runs done" in said and "Fake__two__2" not in said
    assert (tmp_path / "fake" / "Fake__two__2.log").read_text().count("$ python") == 1
    assert run(path, tmp_path, "--index", "4", code=2)[1] == "suite.py: --index 4: there are 4 runs\n"
    path.write_text(path.read_text().replace("--offline-steps 10", "--offline-steps 20"))
    assert run(path, tmp_path)[1].count("was begun with other flags") == 4


def test_a_dry_run_prints_commands_costs_and_what_is_missing_and_writes_nothing(tmp_path):
    path = fake(tmp_path, "hopper-medium-v2", "cube-single-play-singletask-v0", "Hopper-v4", more="rate = 2")
    environment = {**os.environ, "D4RL_DATASET_DIR": str(tmp_path)}
    command = [sys.executable, "benchmark/suite.py", str(path), "--runs-dir", str(tmp_path), "--dry-run"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    for expected in (f"# 0: Fake__hopper-medium-v2__1, new\npython {tmp_path}/fake.py --offline-steps 10 --env-id hop",
                     f"data {tmp_path}/hopper_medium-v2.hdf5", "no NVIDIA GPU",
                     f"{tmp_path}/flat/cube-single-play-singletask-v0.hdf5",
                     "Fake: 3 runs, 30 steps left, at 2.0 per second (rate of the suite)"):
        assert expected in said
    assert ("package ogbench" in said) == (importlib.util.find_spec("ogbench") is None)
    assert "Hopper-v4.hdf5" not in said and not (tmp_path / "fake").exists()
    run(path, tmp_path, "--index", "0")
    said, _ = run(path, tmp_path, "--dry-run")
    assert "__hopper-medium-v2__1, done" in said
    assert "20 steps left, at 4.0 per second (logged by runs of this suite)" in said


def test_kills_and_interruptions_cost_nothing(tmp_path, undisturbed):
    path, folder = write(tmp_path), tmp_path / "tiny" / "OFQL__the_bundled__1"
    process = begin(path, tmp_path)
    child, _ = next_row(folder)
    process.send_signal(signal.SIGTERM)
    os.kill(child, signal.SIGTERM)  # as schedulers do: to everybody
    said = process.communicate(timeout=240)
    assert "interrupted at step" in folder.with_name(folder.name + ".log").read_text()
    assert process.returncode == 130 and not training(folder)
    assert re.search(r"stopped after 0 of 1 runs, all have saved; continue with: python benchmark/suite.py .*\n$",
                     said[1])
    process = begin(path, tmp_path)
    next_row(folder)
    process.kill()
    process.communicate()
    until(lambda: not training(folder))
    # told by the kernel; it may be told twice, once for each thread of the parent, and the second time ends it at once
    assert folder.with_name(folder.name + ".log").read_text().count("interrupted at step") in (1, 2)
    assert not (folder / "done.json").exists()
    run(path, tmp_path)
    assert (tmp_path / "tiny" / "OFQL__the_bundled__1.log").read_text().count("$ python") == 3
    assert rows(folder) == undisturbed


# ---------------------------------------------------------------- ray
def test_ray_survives_kills_of_training_worker_and_driver(tmp_path, undisturbed):
    pytest.importorskip("ray")
    path, folder = write(tmp_path), tmp_path / "tiny" / "OFQL__the_bundled__1"
    process = begin(path, tmp_path, "--backend", "ray", "--jobs", "2")
    os.kill(next_row(folder)[0], signal.SIGKILL)
    child, worker = next_row(folder)
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    until(lambda: (training(folder) or (child,))[0] != child)  # the first one has saved and gone, another goes on
    next_row(folder)
    process.kill()
    process.communicate()
    until(lambda: not training(folder))
    process = begin(path, tmp_path, "--backend", "ray", "--jobs", "2")
    next_row(folder)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)
    if not (folder / "done.json").exists():  # a quiet machine may have been faster
        assert process.returncode == 130 and "all have saved; continue with" in said[1] and not training(folder)
    # saved, each time; but a Ray that lost its driver may end the training before it has said so
    assert folder.with_name(folder.name + ".log").read_text().count("interrupted at step") in (1, 2, 3)
    run(path, tmp_path)  # the backends know the same folders
    assert rows(folder) == undisturbed
