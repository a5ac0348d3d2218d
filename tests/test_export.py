"""benchmark/export.py: folded and exported policies act as `Agent.act` does, for every script."""
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch

from benchmark import export

LOW, HIGH = np.array([-2, 0.5], np.float32), np.array([1, 5], np.float32)
SMALL = dict(env_id="Odd-v0", policy_width=16, policy_depth=2, critic_width=24, critic_depth=2, compile=True)
CASES = {  # every way to act
    "mfql mean": ("mfql_offline", dict(num_candidates=3)),
    "mfql min": ("mfql_offline", dict(num_candidates=9, num_candidates_eval=3, q_aggregation="min")),
    "online": ("mfql_offline_to_online", dict(num_candidates=3)),
    "ofql ema": ("ofql_offline", dict(num_candidates=5, critic_form="layer_norm", noise_temperature=0.5)),
    "ofql policy": ("ofql_offline", dict(num_candidates=5, critic_form="plain", acting_policy="online")),
    "som": ("som_online", dict(num_candidates=4)),
}
COUNT = {"mfql min": 3, "online": 3, "ofql ema": 5, "som": 4}  # those that files are made of, and their N


class Odd(gym.Env):
    """Spaces are all that an export asks for; the box is neither symmetric nor that of the networks."""

    observation_space = gym.spaces.Dict(speed=gym.spaces.Box(-1, 1, (2,)), place=gym.spaces.Box(-1, 1, (3,)))
    action_space = gym.spaces.Box(LOW, HIGH)


gym.register("Odd-v0", entry_point=Odd)


def made_up(case):
    """An agent whose every parameter matters: nothing is zero or one as at initialisation."""
    script, flags = CASES[case]
    module = export.SCRIPTS[script]
    torch.manual_seed(0)
    agent = module.Agent(5, 2, module.Args(**{**SMALL, **flags, "compile": False}), torch.device("cpu"))
    with torch.no_grad():
        for parameter in agent.parameters():
            scale = 0.6 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
        if script != "som_online":
            agent.obs_mean.normal_(0, 20)
            agent.obs_std.uniform_(0.1, 3)
    return agent


def write(agent, case, folder, **other):
    """policy.pt as the scripts write it."""
    state = dict(script=CASES[case][0], args={**asdict(agent.args), "compile": True}, step=7, agent=agent.state_dict(),
                 task=dict(env_id="Odd-v0", kwargs={}, reference=None))
    file = io.BytesIO()
    torch.save({**state, **other}, file)
    contents = file.getvalue()
    (folder / "policy.pt").write_bytes(contents + hashlib.sha256(contents).digest())
    return folder


def situation(agent, case, batch, count):
    """Observations, random inputs of an Actor, and what the agent does with the same."""
    dtype = agent.obs_mean.dtype
    observations = torch.randn(batch, 5, dtype=dtype) * getattr(agent, "obs_std", 1) + agent.obs_mean
    seeded = torch.Generator().manual_seed
    inputs = export.draw(CASES[case][0], batch, count, 2, seeded(3), dtype)
    return (observations, *inputs), agent.act(observations, count, seeded(3))


def in_box(actions):
    return torch.as_tensor(LOW) + torch.as_tensor(HIGH - LOW) * (actions + 1) / 2


@pytest.mark.parametrize("case", CASES)
def test_folding_is_exact(case):
    agent = made_up(case).double()
    for count in (1, agent.args.num_candidates):
        inputs, actions = situation(agent, case, 50, count)
        assert 0.1 < (actions.abs() < 1).double().mean() < 0.98 and len(actions.unique(dim=0)) > 20  # some clipped
        torch.testing.assert_close(export.fold(agent)(*inputs), actions, rtol=0, atol=1e-12)
        found = export.fold(agent, torch.as_tensor(LOW), torch.as_tensor(HIGH))(*inputs)
        torch.testing.assert_close(found, in_box(actions), rtol=0, atol=1e-11)
        assert (found >= torch.as_tensor(LOW)).all() and (found <= torch.as_tensor(HIGH)).all()


def test_a_folded_policy_does_not_follow_the_agent():
    agent = made_up("som")
    actor, (inputs, _) = export.fold(agent), situation(agent, "som", 3, 4)
    before = actor(*inputs)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(1.0)
    assert torch.equal(actor(*inputs), before)


@pytest.fixture(scope="module", params=COUNT)
def exported(request, tmp_path_factory):
    """Case, agent and folder of exported files."""
    folder = write(made_up(request.param), request.param, tmp_path_factory.mktemp("run"))
    export.main([str(folder)])
    return request.param, made_up(request.param), folder


def test_files_act_as_the_agent(exported):
    case, agent, folder = exported
    about = json.loads((folder / "policy.json").read_text())
    count = COUNT[case]
    names = ["observations", "noise", "gumbel"][:2 + (case == "ofql ema")]
    assert [entry["name"] for entry in about["inputs"]] == names
    assert [entry["shape"] for entry in about["inputs"]] == [["B", 5], ["B", count, 2], ["B", count]][:len(names)]
    assert about["outputs"] == [dict(name="actions", shape=["B", 2], dtype="float32", low=[-2, 0.5], high=[1, 5])]
    assert about["sha256"] == hashlib.sha256((folder / "policy.pt").read_bytes()).hexdigest()
    assert (about["script"], about["env_id"], about["step"]) == (CASES[case][0], "Odd-v0", 7)
    assert about["num_candidates"] == count and about["observations"]["order"] == {"place": 3, "speed": 2}
    policy = torch.export.load(folder / "policy.pt2").module()
    for batch in (1, 40):
        inputs, actions = situation(agent, case, batch, count)
        torch.testing.assert_close(policy(*inputs), in_box(actions), rtol=0, atol=2e-5)  # 1e-5 of the networks' box


def test_onnx_acts_as_the_agent(exported):
    case, agent, folder = exported
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    for batch in (1, 40):
        inputs, actions = situation(agent, case, batch, COUNT[case])
        named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs)}
        np.testing.assert_allclose(session.run(["actions"], named)[0], in_box(actions), rtol=0, atol=2e-5)


def test_torch_alone_acts(tmp_path):
    """A run as it was trained, exported as it is from the command line, in a process that knows no repository."""
    run, out = tmp_path / "run", tmp_path / "out"
    program = f"""if True:
        import json, sys, torch
        about = json.load(open("{out}/policy.json"))
        policy = torch.export.load("{out}/policy.pt2").module()
        observations, noise, actions = torch.load("expected.pt")
        assert noise.shape[1:] == (about["num_candidates"], about["action_dim"])
        assert (policy(observations, noise) - actions).abs().max() < 2e-5
        assert not {{"som_online", "gymnasium", "tyro", "benchmark"}} & set(sys.modules)"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def python(*command):
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)

    python(export.som_online.__file__, "--env-id", "Pendulum-v1", "--total-timesteps", "20", "--learning-starts", "10",
           "--num-envs", "1", "--utd", "1", "--eval-episodes", "1", "--runs-dir", ".", "--run-name", "run",
           "--no-cuda", "--policy-width", "16", "--critic-width", "16", "--batch-size", "16")
    python(export.__file__, "run", "--num-candidates", "2", "--out", "out")
    agent, _ = export.load_agent(run / "policy.pt")
    observations, seeded = torch.randn(3, 3), torch.Generator().manual_seed
    noise, = export.draw("som_online", 3, 2, 1, seeded(0))
    torch.save((observations, noise, 2 * agent.act(observations, 2, seeded(0))), tmp_path / "expected.pt")
    python("-c", program)


def test_bad_input(tmp_path, monkeypatch):
    agent, run = made_up("som"), [str(tmp_path)]
    with pytest.raises(export.BadInput, match="No such file"):
        export.main(run)
    write(agent, "som", tmp_path)
    with pytest.raises(export.BadInput, match="--num-candidates 0 must lie"):
        export.main([*run, "--num-candidates", "0"])
    contents = bytearray((tmp_path / "policy.pt").read_bytes())
    contents[len(contents) // 2] ^= 1
    (tmp_path / "policy.pt").write_bytes(contents)
    with pytest.raises(export.BadInput, match="policy.pt"):
        export.main(run)
    write(agent, "som", tmp_path, script="mine")
    with pytest.raises(export.BadInput, match="made by mine, which is none of"):
        export.main(run)
    write(agent, "som", tmp_path, task=dict(env_id="evil:Odd-v0", kwargs={}, reference=None))
    with pytest.raises(export.BadInput, match="import of evil; allow it with --env-id evil:Odd-v0"):
        export.main(run)
    write(agent, "som", tmp_path)
    one_step_action = export.som_online.one_step_action
    monkeypatch.setattr(export.som_online, "one_step_action", lambda *inputs: 0.99 * one_step_action(*inputs))
    with pytest.raises(export.BadInput, match="the folded policy differs by"):
        export.main(run)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]
    program = [sys.executable, export.__file__, str(tmp_path / "nowhere")]
    found = subprocess.run(program, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("export.py: policy ") and found.stderr.count("\n") == 1
