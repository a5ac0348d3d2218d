"""Compiling the losses and replaying updates change no result. On the CPU here, on a GPU from test_cuda.py."""
import importlib
import shutil

import pytest
import torch

SCRIPTS = ["mfql_offline", "ofql_offline", "mfql_offline_to_online", "som_online"]
SMALL = dict(policy_width=64, policy_depth=2, critic_width=64, critic_depth=2, batch_size=64)


def train(m, updates, device, graph=False, **flags):
    """The parameters of a small agent after so many updates: eager, or the last of them replayed ten at a time."""
    torch.manual_seed(0)
    if hasattr(m.Args, "offline_steps"):  # a schedule that the updates feel
        flags = dict(flags, offline_steps=100)
    agent = m.Agent(11, 3, m.Args(**SMALL, **flags), device)
    replay = dict(observations=torch.randn(500, 11), actions=torch.rand(500, 3) * 2 - 1, rewards=torch.randn(500),
                  masks=torch.ones(500), next_observations=torch.randn(500, 11))
    replay = {key: value.to(device) for key, value in replay.items()}

    def update():
        return agent.update(m.sample(replay, 64))

    if not graph:
        for _ in range(updates):
            update()
    else:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                update()
            replay_updates = m.capture(update, 10)
            for _ in range(updates // 10 - 1):
                replay_updates()
            torch.cuda.synchronize()
    return {name: value.clone() for name, value in agent.state_dict().items()}


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_updates_equal_eager_ones(script):
    """After 50 updates the parameters, the learning rates, alpha and the moving averages are alike."""
    m, cpu = importlib.import_module(script), torch.device("cpu")
    with torch._inductor.config.patch(fallback_random=True):  # SOM draws in the compiled loss
        compiled = train(m, 50, cpu, compile=True)
    assert_close(compiled, train(m, 50, cpu))
