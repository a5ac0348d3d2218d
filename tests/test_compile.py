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


def assert_close(found, expected, rtol=1e-3, atol=1e-4):
    """By default as on a GPU, where nobody has measured how much less would do."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


def assert_same_updates(m, found, device, near, **flags):
    """As 50 eager updates: the parameters, the learning rates, alpha and the moving averages are alike, within less
    than what any one step of any network does, since the 49 updates before the last are not alike in one of them."""
    assert_close(found, train(m, 50, device, **flags), **near)
    before = train(m, 49, device, **flags)
    for network in {name.split(".")[0] for name in before if "." in name}:
        with pytest.raises(AssertionError, match=network):
            assert_close(found, {name: value for name, value in before.items() if name.startswith(network)}, **near)


def large_steps(m):
    """Flags with which one step of any network is larger than a GPU's tolerance."""
    rates = [name for name in m.Args.__dataclass_fields__ if name.endswith("learning_rate") and "online" not in name]
    return dict.fromkeys(rates, 1e-3) | dict(tau=0.5) | (dict(ema_start=0, ema_rate=0.5) if "ofql" in m.SCRIPT else {})


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_updates_equal_eager_ones(script):
    m, cpu = importlib.import_module(script), torch.device("cpu")
    more = dict(ema_start=0, ema_rate=0.5) if script == "ofql_offline" else {}
    near = dict(rtol=1e-5, atol=5e-6)  # measured: 2e-6 at most, and one step 1e-5 at least
    assert_same_updates(m, train(m, 50, cpu, compile=True, **more), cpu, near, **more)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpus_tolerance_sees_a_missing_step(script):
    """What test_cuda.py does there, here with eager updates alone."""
    m, cpu = importlib.import_module(script), torch.device("cpu")
    assert_same_updates(m, train(m, 50, cpu, **large_steps(m)), cpu, {}, **large_steps(m))
    with pytest.raises(AssertionError):
        assert_same_updates(m, train(m, 49, cpu, **large_steps(m)), cpu, {}, **large_steps(m))
