"""On a GPU: graphs, compiled losses and TF32. Skipped elsewhere; test_behaviour.py imitates graphs on the CPU."""
import importlib
import os
import shutil
import signal

import pytest
import torch
from test_behaviour import at_step, register_environments, write_data
from test_behaviour import train as train_script
from test_compile import SCRIPTS, SMALL, assert_close, assert_same_updates, large_steps, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("script", SCRIPTS)
def test_graphs_equal_eager_updates(script):
    m = importlib.import_module(script)
    assert_same_updates(m, train(m, 50, CUDA, graph=True, **large_steps(m)), CUDA, {}, **large_steps(m))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_graphs_equal_eager_updates(script):
    m = importlib.import_module(script)
    found = train(m, 50, CUDA, graph=True, compile=True, **large_steps(m))
    assert_same_updates(m, found, CUDA, {}, **large_steps(m))


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_never_wait_for_the_device(script):
    m = importlib.import_module(script)
    agent = m.Agent(11, 3, m.Args(**SMALL), torch.device("cuda"))
    batch = dict(observations=torch.randn(64, 11), actions=torch.rand(64, 3), rewards=torch.randn(64),
                 masks=torch.ones(64), next_observations=torch.randn(64, 11))
    batch = {key: value.cuda() for key, value in batch.items()}
    agent.update(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        agent.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_runs(script, tmp_path, monkeypatch):
    """With graphs, without, and interrupted and resumed: alike. A run begun on the CPU goes on."""
    m, data = importlib.import_module(script), write_data(tmp_path / "data.hdf5")
    register_environments()
    monkeypatch.setattr(m, "UPDATES_PER_REPLAY", 2, raising=False)

    def parameters(run):
        return torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")["agent"]

    def cut(folder, device):
        with at_step(monkeypatch, m, "row", 8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            run = train_script(m, data, tmp_path / folder, device, code=130)
        assert m.main(["--resume", str(run), "--cuda"]) == 0
        return run

    graphs = parameters(train_script(m, data, tmp_path / "graphs", "--cuda"))
    assert_close(parameters(train_script(m, data, tmp_path / "eager", "--cuda --no-cuda-graph")), graphs)
    assert_close(parameters(cut("cut", "--cuda")), graphs)
    assert all(value.isfinite().all() for value in parameters(cut("from_cpu", "--no-cuda")).values())
