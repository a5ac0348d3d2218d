"""Data and flags arrive where they should: the first batch that the agent sees against the file, N in every place that
uses it, the noise of an evaluation, and every flag of the algorithms changing what an agent computes."""
import ast
import dataclasses
import importlib
import json
import pathlib
import signal

import h5py
import numpy as np
import pytest
import torch

OFFLINE = ["mfql_offline", "ofql_offline", "mfql_offline_to_online"]
SCRIPTS = [*OFFLINE, "som_online"]
OBS, ACT, ROWS = 3, 2, 200
FLAGS = ("--env-id Pendulum-v1 --no-cuda --policy-width 8 --policy-depth 1 --critic-width 8 --critic-depth 1 "
         "--batch-size 500")
LENGTH = {  # a run of one or two gradient steps
    "mfql_offline": "--offline-steps 2 --eval-interval 1",
    "ofql_offline": "--offline-steps 2 --eval-interval 1",
    "mfql_offline_to_online": "--offline-steps 1 --online-steps 1",
    "som_online": "--total-timesteps 2 --num-envs 1 --learning-starts 1 --utd 1 --num-proposals 4 --eval-interval 1",
}


@pytest.fixture(params=SCRIPTS)
def m(request):
    """The script. main() installs signal handlers and makes torch deterministic: both are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield importlib.import_module(request.param)
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random rows in D4RL's layout, whose observations have a large, a constant and a tiny column; some of them
    terminal, some at a time limit, the last one both neither."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "data.hdf5"
    observations = rng.normal(size=(ROWS, 3)) * [100, 0, 0.01] + [-20, 5, 1]
    columns = dict(observations=observations.astype(np.float32), actions=rng.uniform(-2, 2, (ROWS, 1)),
                   rewards=rng.normal(3, 2, ROWS), terminals=np.arange(ROWS) % 20 == 9,
                   timeouts=np.arange(ROWS) % 20 == 19)
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            file[key] = value
    return path


def train(m, data, folder, *more):
    argv = [*FLAGS.split(), *LENGTH[m.SCRIPT].split(), "--runs-dir", str(folder), *more]
    assert m.main(argv + (["--dataset-path", str(data)] if m.SCRIPT in OFFLINE else [])) == 0
    return next(folder.iterdir())


# ---------------------------------------------------------------- the first batch
REWARDS = {  # flags, and what they make of the data's rewards r and of the episodes' returns
    "": lambda r, returns: r,
    "--reward-scale 0.5 --reward-shift -1": lambda r, returns: 0.5 * r - 1,
    "--reward-normalization standardize --reward-scale 3": lambda r, returns: 3 * (r - r.mean()) / r.std(),
    "--reward-normalization return_range --reward-shift 2":
        lambda r, returns: r * 1000 / (max(returns) - min(returns)) + 2,
}
CASES = [(script, flags, "dataset") for script in OFFLINE for flags in REWARDS
         if script == "ofql_offline" or "normalization" not in flags] + [(script, "", "none") for script in OFFLINE]


@pytest.mark.parametrize("m, flags, normalization", CASES, indirect=["m"])
def test_the_first_batch_is_rows_of_the_file(m, data, tmp_path, monkeypatch, flags, normalization):
    """Times the standard deviation plus the mean, both by NumPy over the transitions: each row of the batch is one row
    of the file in all its columns, and the next observation is the file's next row. A constant column is only shifted,
    and the losses are finite."""
    with h5py.File(data) as file:
        columns = {key: file[key][()] for key in file}
    kept = np.flatnonzero(~columns["timeouts"])  # a row at a time limit has no next observation
    observations = columns["observations"].astype(np.float64)
    mean, std = observations[kept].mean(0), observations[kept].std(0)
    assert std[1] == 0
    mean, std = (mean, np.where(std == 0, 1, std)) if normalization == "dataset" else (0, 1)
    returns = [part.sum() for part in np.split(columns["rewards"], np.arange(10, ROWS, 10))]
    rewards = REWARDS[flags](columns["rewards"][kept], returns)

    def update(agent, batch, original=m.Agent.update):
        seen.append({key: value.double().numpy() for key, value in batch.items()})
        deterministic.append(torch.are_deterministic_algorithms_enabled())
        parts = original(agent, batch)
        assert all(value.isfinite() for value in parts.values())
        agents.append(agent)
        return parts

    seen, agents, deterministic = [], [], []
    monkeypatch.setattr(m.Agent, "update", update)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    train(m, data, tmp_path, "--observation-normalization", normalization, *flags.split())
    batch = seen[0]
    assert deterministic[0] and len(batch["rewards"]) == 500
    np.testing.assert_allclose(agents[0].obs_std, np.broadcast_to(std, 3), rtol=1e-5)
    np.testing.assert_allclose(agents[0].obs_mean, np.broadcast_to(mean, 3), rtol=1e-5)
    now, following = batch["observations"] * std + mean, batch["next_observations"] * std + mean
    index = np.abs(now[:, :1] - observations[kept, 0]).argmin(1)  # which row it is
    row, near = kept[index], dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(now, observations[row], **near)
    np.testing.assert_allclose(following, observations[row + 1], **near)
    np.testing.assert_allclose(batch["actions"], columns["actions"][row] / 2, **near)  # Pendulum's box is [-2, 2]
    np.testing.assert_allclose(batch["rewards"], rewards[index], **near)
    np.testing.assert_array_equal(batch["masks"], ~columns["terminals"][row])
    assert len(set(row)) > 0.8 * len(kept) and (batch["masks"] == 0).any()


# ---------------------------------------------------------------- N
def n_flags(script):
    """Flags, and the N to be found when acting in training, in the target, and in evaluations."""
    if script == "ofql_offline":
        return [("--num-candidates 3", None, 1, 3), ("--max-q-backup --num-candidates 1", None, 10, 1)]
    one = 1 if script == "som_online" else 3  # what the target takes by default
    act = None if script == "mfql_offline" else 3
    return [("--num-candidates 3", act, one, 3),
            ("--num-candidates 3 --num-candidates-eval 4", act, one, 4),
            ("--num-candidates 3 --num-candidates-eval 4 --num-candidates-target 2", act, 2, 4)]


@pytest.mark.parametrize("m, flags, act, target, evaluation",
                         [(script, *case) for script in SCRIPTS for case in n_flags(script)], indirect=["m"])
def test_n_of_acting_target_and_evaluation(m, data, tmp_path, monkeypatch, capsys, flags, act, target, evaluation):
    """The final evaluation also has N = 1, in rows of its own; --evaluate takes the same N and says it."""
    acted, targets = [], []

    def recorded_act(agent, observations, num_candidates, generator=None, original=m.Agent.act):
        acted.append(num_candidates)
        return original(agent, observations, num_candidates, generator)

    def recorded_loss(*inputs, original=m.critic_loss):
        targets.append(inputs[4].shape[1])
        return original(*inputs)

    monkeypatch.setattr(m.Agent, "act", recorded_act)
    monkeypatch.setattr(m, "critic_loss", recorded_loss)
    monkeypatch.setattr(m, "evaluate", lambda *inputs: {"eval/n": inputs[3]})
    run = train(m, data, tmp_path, *flags.split())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(targets) == {target} and set(acted) == ({act} if act else set())
    assert {row["eval/n"] for row in rows if "eval/n" in row} == {evaluation}
    assert [row["step"] for row in rows if row.get("eval/n")] == [1, 2]
    assert [row["eval_n1/n"] for row in rows if "eval_n1/n" in row] == (
        [1, 1] if m.SCRIPT == "mfql_offline_to_online" else [1])
    capsys.readouterr()
    assert m.main(["--evaluate", str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 2, "num_candidates": evaluation, "eval/n": evaluation}


@pytest.mark.parametrize("seed", [3, 4])
def test_evaluation_hands_on_n_and_noise_of_the_seed(m, seed):
    """With the number it was given, and the same generator throughout, seeded with --seed alone."""
    seen = []

    class Still(torch.nn.Module):
        obs_mean = torch.zeros(3)

        def act(self, observations, num_candidates, generator):
            seen.append((num_candidates, generator.initial_seed(), id(generator), generator.get_state().sum().item()))
            torch.randn(3, generator=generator)
            return torch.zeros(len(observations), 1)

    task = dict(env_id="Pendulum-v1", kwargs=dict(max_episode_steps=3), reference=None)
    m.evaluate(Still(), task, m.Args(seed=seed, eval_episodes=2), 7)
    assert {row[:2] for row in seen} == {(7, seed)} and len({row[2] for row in seen}) == 1
    assert len({row[3] for row in seen}) == len(seen) == 3 and seen[0][2] != id(torch.default_generator)


# ---------------------------------------------------------------- every flag counts
SIZES = dict(policy_width=8, policy_depth=1, critic_width=8, critic_depth=1)
OTHER_SIZES = dict(policy_width=16, policy_depth=2, critic_width=16, critic_depth=2)
MFQL = dict(OTHER_SIZES, gamma=0.9, tau=0.5, num_candidates=2, num_candidates_target=2, alpha=2.0, bound_weight=0.5,
            alpha_schedule="constant", normalize_q_loss=False, q_aggregation="min", time_steps=5, offline_steps=1500,
            actor_learning_rate=1e-3, critic_learning_rate=1e-3)
BASE = {  # gradient step 2000, at which alpha may move, is the second of five; offline to online the last one offline
    "mfql_offline": dict(SIZES, offline_steps=3000),
    "mfql_offline_to_online": dict(SIZES, offline_steps=2000, online_alpha_steps=2),
    "ofql_offline": dict(SIZES, offline_steps=3000, learning_rate_schedule="cosine"),
    "som_online": SIZES,
}
CHANGED = {  # flag: another value
    "mfql_offline": MFQL,
    "mfql_offline_to_online": dict(MFQL, online_alpha=0.5, online_actor_learning_rate=0.1),
    "ofql_offline": dict(
        OTHER_SIZES, offline_steps=2500, gamma=0.9, tau=0.5, target_interval=2, critic_form="plain",
        inverse_temperature=0.0, noise_temperature=1.0, acting_policy="online", target_policy="ema", ema_rate=0.5,
        ema_start=5000, max_q_backup=True, eta=0.5, flow_ratio=0.25, time_sampling="uniform", learning_rate=1e-3,
        learning_rate_schedule="constant", weight_decay=0.1, max_grad_norm=1e-4),
    "som_online": dict(
        OTHER_SIZES, gamma=0.9, tau=0.5, reward_scale=1.0, num_candidates_target=3, alpha=3.0, num_proposals=50,
        score="gradient", score_scale=1.0, path="vp", q_normalization="none", flow_ratio=0.5, adaptive_power=0.5,
        learning_rate=1e-3),
}
OF_MAIN = {  # and where they are tested
    "offline_steps", "batch_size", "reward_scale", "reward_shift", "reward_normalization",  # here
    "observation_normalization", "num_candidates", "num_candidates_eval",  # here
    "online_steps", "utd", "from_checkpoint", "buffer_size", "balanced_sampling", "online_alpha_steps",  # ..to_online
    "exploration_noise", "total_timesteps", "num_envs", "learning_starts"}  # test_som_run.py, ..to_online


def fingerprint(m, **flags):
    """All that an agent holds and shows after five updates, and how it acts then."""
    torch.manual_seed(0)
    agent = m.Agent(OBS, ACT, m.Args(**{**BASE[m.SCRIPT], **flags}), torch.device("cpu"))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # MFQL's policy begins at 0
    if hasattr(agent, "updates"):
        agent.updates.fill_(1998)
    if hasattr(agent, "alpha_history"):
        agent.alpha_history.fill_(1e-9)  # so that alpha rises at step 2000
    for seed in range(5):
        torch.manual_seed(seed)
        batch = dict(observations=torch.randn(8, OBS), actions=2 * torch.rand(8, ACT) - 1, rewards=torch.randn(8),
                     masks=torch.ones(8), next_observations=torch.randn(8, OBS))
        agent.update(batch)
    charts = agent.charts() if hasattr(agent, "charts") else {}
    actions = agent.act(torch.randn(64, OBS), 3, torch.Generator().manual_seed(0))
    return [*agent.state_dict().values(), actions, torch.tensor(list(charts.values()))]


@pytest.fixture(scope="module")
def plain():
    return {script: fingerprint(importlib.import_module(script)) for script in SCRIPTS}


@pytest.mark.parametrize("m, flag", [(script, flag) for script in SCRIPTS for flag in CHANGED[script]],
                         indirect=["m"])
def test_every_flag_of_the_agent_changes_what_it_computes(m, plain, flag):
    again, changed = plain[m.SCRIPT], fingerprint(m, **{flag: CHANGED[m.SCRIPT][flag]})
    assert len(again) != len(changed) or any(a.shape != b.shape or not torch.equal(a, b)
                                             for a, b in zip(again, changed))


def test_no_flag_is_forgotten(m, plain):
    """The table above and the flags of main are all that the algorithm's half of Args has; and equal flags give equal
    numbers, without which a change would prove nothing."""
    again = fingerprint(m)
    assert all(torch.equal(a, b) for a, b in zip(plain[m.SCRIPT], again, strict=True))
    text = pathlib.Path(m.__file__).read_text()
    args = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    mark = text[:text.index("# ---- algorithm ----")].count("\n") + 1
    half = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign) and node.lineno > mark}
    assert half - OF_MAIN == CHANGED[m.SCRIPT].keys() - OF_MAIN and half > OTHER_SIZES.keys()
    assert half < {field.name for field in dataclasses.fields(m.Args)}
