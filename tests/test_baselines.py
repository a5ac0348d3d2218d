"""The baselines keep the scripts' promises about run folders: rows, equal numbers, resuming, signals, exit codes."""
import contextlib
import importlib
import itertools
import json
import os
import pathlib
import signal
import sys

import filelock
import pytest
import test_behaviour
import torch

import mfql_offline

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmark" / "baselines"))
import common  # noqa: E402

PACKAGES = dict(td3_bc="d3rlpy", iql="d3rlpy", sac="stable_baselines3")
STEPS = 24  # gradient steps, or steps of two environments


class Killed(Exception):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


@pytest.fixture(params=PACKAGES)
def baseline(request):
    """The module, after which the process is as before."""
    pytest.importorskip(PACKAGES[request.param])
    before = {number: signal.getsignal(number) for number in test_behaviour.SIGNALS}
    yield importlib.import_module(request.param)
    torch.use_deterministic_algorithms(False)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    test_behaviour.register_environments()
    return test_behaviour.write_data(tmp_path_factory.mktemp("data") / "data.hdf5")


def stride(baseline):
    return 2 if baseline.STEM == "sac" else 1


def flags(baseline, data, folder, *more):
    log, evaluation, checkpoint, steps = (stride(baseline) * count for count in (5, 10, 6, STEPS))
    text = (f"--env-id Short-v0 --no-cuda --batch-size 32 --eval-episodes 2 --hidden-width 16 --log-interval {log} "
            f"--eval-interval {evaluation} --checkpoint-interval {checkpoint} --runs-dir {folder} ")
    text += (f"--total-timesteps {steps} --num-envs 2 --learning-starts 16 --buffer-size 30"
             if baseline.STEM == "sac" else f"--offline-steps {steps} --dataset-path {data}")
    return [*text.split(), *more]


def rows(folder):
    """The rows of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("charts/UPS", "charts/SPS")} for row in found]


def test_run_folder(baseline, data, tmp_path):
    assert baseline.main(flags(baseline, data, tmp_path)) == 0
    run, k, offline = tmp_path / f"Short-v0__{baseline.STEM}__1", stride(baseline), baseline.STEM != "sac"
    assert json.loads((run / "done.json").read_text()) == {"step": k * STEPS}
    about = json.loads((run / "args.json").read_text())
    assert about["args"]["batch_size"] == 32 and about["device"] == "cpu" and about["threads"] == 1
    assert "d3rlpy" in about["versions"] or not offline
    assert ("data" in about) == offline
    assert not offline or {"transitions", "episodes", "mean_return", "best", "sha256"} <= set(about["data"])
    names = ["step", *(f"eval/episodic_{name}" for name in ("return", "return_std", "length"))]
    found = rows(run)
    assert [(row["step"], list(row)) for row in found if "eval/episodic_return" in row] == \
        [(k * step, names) for step in (10, 20, STEPS)]
    first = 5 if offline else 10
    assert [row["step"] for row in found if "losses/actor_loss" in row] == [k * i for i in range(first, STEPS, 5)]
    assert '"charts/UPS"' in (run / "metrics.jsonl").read_text()
    final, single = found[-2:]
    assert list(single) == [name.replace("eval/", "eval_n1/") for name in final]
    assert (list(single.values()) == list(final.values())) == offline  # SAC: by a sample, not by the mean


def test_resume_is_exact(baseline, data, tmp_path, monkeypatch):
    """Killed and interrupted in training and in evaluations, and continued: the rows of an undisturbed run."""
    def kill():
        raise Killed

    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)

    def before(function, number, action):
        """`function`, with `action` before its call `number`."""
        count = itertools.count(1)

        def disturbed(*args, **more):
            if next(count) == number:
                action()
            return function(*args, **more)
        return disturbed

    assert baseline.main(flags(baseline, data, tmp_path, "--run-name", "whole")) == 0
    more, run = flags(baseline, data, tmp_path, "--run-name", "parts", "--resume", "auto"), tmp_path / "parts"
    train, evaluate = common.train, mfql_offline.evaluate
    lives = (("step", 4, kill, None), ("step", 8, kill, None), ("step", 3, interrupt, 130),
             ("evaluation", 1, interrupt, 130), ("evaluation", 2, kill, None), ("step", 3, kill, None),
             ("evaluation", 3, kill, None), ("", 0, None, 0))
    for where, number, action, code in lives:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            if where == "step":
                patch.setattr(common, "train", lambda *args, advance, number=number, action=action, **more:
                              train(*args, advance=before(advance, number, action), **more))
            elif where == "evaluation":
                patch.setattr(mfql_offline, "evaluate", before(evaluate, number, action))
            assert baseline.main(more) == code
        assert (run / "done.json").exists() == (code == 0)
    assert rows(run) == rows(tmp_path / "whole")
    contents = (run / "metrics.jsonl").read_bytes()
    (run / "done.json").unlink()  # as if killed just before it was written
    assert baseline.main(more) == 0 and (run / "done.json").exists()
    assert (run / "metrics.jsonl").read_bytes() == contents
    monkeypatch.setattr(common, "train", kill)
    assert baseline.main(more) == 0  # done: at once
    assert (run / "metrics.jsonl").read_bytes() == contents


def test_bad_input(baseline, data, tmp_path):
    def refused(match, *more):
        with pytest.raises(mfql_offline.BadInput, match=match):
            baseline.main(flags(baseline, data, tmp_path, *more))

    refused("Nothing", "--env-id", "Nothing-v0")
    refused("--gamma 2.0 must lie between", "--gamma", "2")
    refused("--run-name is empty", "--run-name", "")
    assert not list(tmp_path.iterdir())
    run = tmp_path / "run"
    run.mkdir()
    with filelock.FileLock(run / ".lock"):
        refused("could not be acquired", "--run-name", "run")
    assert baseline.main(flags(baseline, data, tmp_path, "--run-name", "run")) == 0
    refused("holds a run", "--run-name", "run")
    refused("--tau was 0.005, is 0.1", "--run-name", "run", "--tau", "0.1", "--resume", "auto")


def test_a_loss_that_is_not_finite_ends_the_run(baseline, data, tmp_path, capfd):
    assert baseline.main(flags(baseline, data, tmp_path, "--learning-rate", "1e9", "--tau", "1")) == 3
    assert "losses/" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/done.json"))


def test_a_missing_package_is_named(baseline, data, tmp_path, monkeypatch):
    package = PACKAGES[baseline.STEM]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(mfql_offline.BadInput, match=f"pip install .*{package.replace('_', '-')}=="):
        baseline.main(flags(baseline, data, tmp_path))
    assert not list(tmp_path.iterdir())


def test_iql_scales_rewards_and_decays_the_actors_learning_rate(data, tmp_path, monkeypatch):
    pytest.importorskip("d3rlpy")
    import iql
    shown, sample = [], mfql_offline.sample
    monkeypatch.setattr(mfql_offline, "sample", lambda replay, count: shown.append(replay) or sample(replay, count))
    assert iql.main(flags(iql, data, tmp_path, "--reward-scale", "None", "--reward-shift", "-1")) == 0
    rewards = mfql_offline.load_hdf5("Short-v0", data)[1]["rewards"]
    found = mfql_offline.load(tmp_path / "Short-v0__iql__1", "iql")[1]
    scaled = 1000 / (found["data"]["best"] - found["data"]["worst"]) * torch.as_tensor(rewards) - 1
    torch.testing.assert_close(shown[0]["rewards"][:, 0], scaled.float())
    assert found["state"]["actor_optim"]["optim"]["param_groups"][0]["lr"] < 1e-12
    assert iql.task_defaults("Hopper-v4") == iql.task_defaults("meanflow/hopper/medium-replay-v0") != {}
