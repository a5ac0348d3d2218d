"""The baselines keep the scripts' promises about run folders: rows, equal numbers, resuming, signals, exit codes."""
import contextlib
import importlib
import itertools
import json
import os
import pathlib
import signal
import sys

import pytest
import test_behaviour
import torch

import mfql_offline

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark" / "baselines"))
NEEDS = dict(td3_bc="d3rlpy", iql="d3rlpy")
STEPS = 24


class Killed(Exception):
    """Ends a run in the middle of a step, as SIGKILL does: nothing is saved."""


@pytest.fixture(params=NEEDS)
def baseline(request):
    pytest.importorskip(NEEDS[request.param])
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def settings():
    """What the baselines change in the process."""
    before = {number: signal.getsignal(number) for number in test_behaviour.SIGNALS}
    yield
    torch.use_deterministic_algorithms(False)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    test_behaviour.register_environments()
    return test_behaviour.write_data(tmp_path_factory.mktemp("data") / "data.hdf5")


def flags(data, folder, *more):
    text = (f"--env-id Short-v0 --no-cuda --batch-size 32 --eval-episodes 2 --hidden-width 16 --offline-steps {STEPS} "
            "--log-interval 5 --eval-interval 10 --checkpoint-interval 6")
    return ["--dataset-path", str(data), "--runs-dir", str(folder), *text.split(), *more]


def rows(folder):
    """The rows of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "charts/UPS"} for row in found]


def at(monkeypatch, calls):
    """`calls`: {number of the batch: function called when that batch is drawn}."""
    sample, count = mfql_offline.sample, itertools.count(1)

    def counted(*args):
        calls.get(next(count), lambda: None)()
        return sample(*args)

    monkeypatch.setattr(mfql_offline, "sample", counted)


def test_run_folder(baseline, data, tmp_path):
    assert baseline.main(flags(data, tmp_path)) == 0
    run = tmp_path / f"Short-v0__{baseline.STEM}__1"
    assert json.loads((run / "done.json").read_text()) == {"step": STEPS}
    about = json.loads((run / "args.json").read_text())
    assert {"args", "data", "device", "threads", "versions"} <= set(about)
    assert {"transitions", "episodes", "mean_return", "best", "sha256"} <= set(about["data"])
    assert about["args"]["batch_size"] == 32 and about["versions"]["d3rlpy"]
    names = ["eval/episodic_return", "eval/episodic_return_std", "eval/episodic_length"]
    assert [(row["step"], *row) for row in rows(run) if "eval/episodic_return" in row] == \
        [(step, "step", *names) for step in (10, 20, STEPS)]
    assert [row["step"] for row in rows(run) if "losses/actor_loss" in row] == [5, 10, 15, 20]
    final, single = rows(run)[-2:]
    assert {name.replace("eval/", "eval_n1/"): value for name, value in final.items()} == single


def test_resume_is_exact(baseline, data, tmp_path, monkeypatch):
    """Killed in the middle, interrupted by a signal, continued: the rows of an undisturbed run."""
    assert baseline.main(flags(data, tmp_path, "--run-name", "whole")) == 0
    more = flags(data, tmp_path, "--run-name", "parts", "--resume", "auto")
    run = tmp_path / "parts"

    def kill():
        raise Killed

    interrupt = lambda: os.kill(os.getpid(), signal.SIGTERM)
    for calls, code in (({4: kill}, None), ({17: kill}, None), ({3: interrupt}, 130), ({9: kill}, None), ({}, 0)):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            at(patch, calls)
            assert baseline.main(more) == code
        assert (run / "done.json").exists() == (code == 0)
    assert rows(run) == rows(tmp_path / "whole")
    before = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(mfql_offline, "sample", kill)
    assert baseline.main(more) == 0  # done: at once
    assert (run / "metrics.jsonl").read_bytes() == before


def test_bad_input(baseline, data, tmp_path):
    for more, message in ((["--env-id", "Nothing-v0"], "Nothing"), (["--gamma", "2"], "--gamma"),
                          (["--run-name", ""], "--run-name is empty")):
        with pytest.raises(mfql_offline.BadInput, match=message):
            baseline.main(flags(data, tmp_path, *more))
    assert not list(tmp_path.iterdir())
    assert baseline.main(flags(data, tmp_path)) == 0
    for more, message in (([], "holds a run"), (["--resume", "auto", "--tau", "0.1"], "--tau was 0.005, is 0.1")):
        with pytest.raises(mfql_offline.BadInput, match=message):
            baseline.main(flags(data, tmp_path, *more))
