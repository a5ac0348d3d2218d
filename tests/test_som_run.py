"""What only online runs have: several environments, episodes of all lengths, the replay buffer, the recorded dataset.

What they share with the other scripts is in test_behaviour.py.
"""
import collections
import itertools
import json
import math
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

import som_online as m

FLAGS = ("--env-id Pendulum-v1 --no-cuda --total-timesteps 390 --num-envs 3 --learning-starts 90 --num-proposals 8 "
         "--num-candidates 4 --batch-size 16 --policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1 "
         "--log-interval 60 --eval-interval 150 --checkpoint-interval 75 --eval-episodes 2")


class Walk(gym.Env):
    """Terminates after 3 to 9 steps, which only the seed decides; LIMIT cuts some of these episodes short. Observes
    the steps so far, that length, a position that the actions move, and the last action as it arrived."""

    LIMIT, LOW, HIGH = 6, np.float32([-3, 0]), np.float32([5, 0.5])
    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    action_space = gym.spaces.Box(LOW, HIGH)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = [0, self.np_random.integers(3, 10), self.np_random.normal(), 0, 0]
        return np.float32(self.now), {}

    def step(self, action):
        step, length, position, _, _ = self.now
        self.now = [step + 1, length, position + self.np_random.normal() * action.sum(), *action]
        return np.float32(self.now), float(self.now[2]), step + 1 == length, False, {}


gym.register("Walk-v0", entry_point=Walk, max_episode_steps=Walk.LIMIT)


@pytest.fixture(autouse=True)
def no_leftovers():
    """main() installs signal handlers and makes torch deterministic: put both back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in before.items():
        signal.signal(number, handler)


def updates_before(agent):
    """Gradient steps of all lives of a run so far."""
    return int(next(iter(agent.critic_optimizer.state.values()), {"step": 0})["step"])


def train(folder, *more, code=0):
    """Runs main and returns the run folder."""
    assert m.main([*FLAGS.split(), "--runs-dir", str(folder), *more]) == code
    run, = folder.iterdir()
    return run


def replay_of(run):
    """The columns (steps, ...) of replay.bin, all steps so far."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    obs_dim, act_dim = (state["agent"][name].shape[0] for name in ("obs_mean", "policy.final.bias"))
    sizes = dict(observations=obs_dim, actions=act_dim, rewards=1, masks=1, next_observations=obs_dim)
    rows = torch.tensor(np.fromfile(run / "replay.bin", np.float32)).view(state["step"], sum(sizes.values()))
    return {key: column.squeeze(1) if key in ("rewards", "masks") else column
            for key, column in zip(sizes, rows.split(list(sizes.values()), 1))}


def outcome(run):
    """What a run computed, apart from what depends on the clock."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if not key.endswith("PS")} for row in numbers]
    return state["step"], {**state["agent"], **replay_of(run)}, numbers


def assert_equal(run, other):
    """Same networks, same replay buffer, same rows."""
    (step, tensors, numbers), (other_step, other_tensors, other_numbers) = outcome(run), outcome(other)
    assert step == other_step and numbers == other_numbers and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())


@pytest.mark.parametrize("env_id, stops", [("Pendulum-v1", (1,)), ("Pendulum-v1", (7, 61, 115)),
                                           ("Walk-v0", (20, 23, 99))])  # updates, of 120
def test_interrupted_runs_continue_bit_for_bit(tmp_path, monkeypatch, env_id, stops):
    """SIGTERM in the middle of episodes, several times over: same numbers as a run in one go. The episodes of Walk end
    one by one, those of Pendulum all at once."""
    more = ("--total-timesteps", "690", "--env-id", env_id)
    whole = train(tmp_path / "whole", *more)
    assert outcome(whole)[0] == 690 and any("charts/episodic_return" in row for row in outcome(whole)[2])
    update = m.Agent.update

    def interrupted(agent, batch):
        if (count := updates_before(agent)) in stops and count not in seen:
            seen.add(count)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, batch)

    seen = set()
    monkeypatch.setattr(m.Agent, "update", interrupted)
    run = train(tmp_path / "cut", *more, code=130)
    for attempt in itertools.count(2):
        code = m.main(["--resume", str(run)])
        if code == 0:
            break
        assert code == 130 and attempt <= len(stops)
    assert seen == set(stops)
    assert_equal(run, whole)


@pytest.mark.parametrize("utd", [0.5, 1])
def test_utd_and_learning_starts(tmp_path, monkeypatch, utd):
    """Gradient steps = utd * (steps - learning_starts), after each step of the 3 environments its share; the buffer
    holds what happened."""
    spread, sample = collections.Counter(), m.sample

    def counted(replay, batch_size, first, end):
        spread[int(end)] += 1  # the steps so far, since the buffer is larger
        return sample(replay, batch_size, first, end)

    monkeypatch.setattr(m, "sample", counted)
    run = train(tmp_path / "runs", "--utd", str(utd))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["updates"] == utd * 300 == spread.total()
    assert list(spread) == list(range(93, 391, 3)) and set(spread.values()) <= {int(3 * utd), math.ceil(3 * utd)}
    replay = replay_of(run)
    assert len(replay["rewards"]) == 390 and replay["masks"].eq(1).all()  # Pendulum never terminates
    first = replay["observations"][0::3]  # of the first environment: each row follows from the one before
    follows = (replay["next_observations"][0::3][:-1] == first[1:]).all(1)
    assert follows.sum() == 390 // 3 - 1  # 130 steps, fewer than an episode's 200
    assert replay["actions"].abs().max() <= 1 and replay["rewards"].min() < -1


def test_terminations_and_time_limits_in_the_replay(tmp_path):
    """An end by the environment has mask 0 and no bootstrap, one by the time limit mask 1 and a bootstrap. Both keep
    the true last observation, and the next row of that environment begins anew, while the others go on."""
    run = train(tmp_path / "runs", "--env-id", "Walk-v0")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    replay = replay_of(run)
    before, after = replay["observations"], replay["next_observations"]
    (step, length), limit = after[:, :2].T, Walk.LIMIT
    assert torch.equal(replay["masks"] == 0, step == length)
    ends = (step == length) | (step == limit)
    for i in range(3):  # how a reader of the buffer finds the ends
        found = (replay["masks"][i::3][:-1] == 0) | (after[i::3][:-1] != before[i::3][1:]).any(1)
        assert torch.equal(found, ends[i::3][:-1])
    terminated, truncated = ends & (replay["masks"] == 0), ends & (replay["masks"] == 1)
    assert min(terminated.sum(), truncated.sum()) > 10 and (terminated & (step == limit)).any()
    assert torch.equal(before[:, 0] + 1, step) and torch.equal(before[:, 1], length)  # each row within one episode
    assert torch.equal(replay["rewards"], after[:, 2])
    together = ends.reshape(-1, 3).sum(1)
    assert (together == 1).any() and (together == 2).any()
    for i in range(3):
        again = ends[i::3][:-1]
        assert torch.equal(before[i::3][1:][~again], after[i::3][:-1][~again])
        assert before[i::3][1:][again][:, [0, 3, 4]].eq(0).all()
    starts = before[before[:, 0] == 0]
    assert len(starts) == len(starts[:, 2].unique()) > 50  # every episode has its own seed

    logged = [row for row in outcome(run)[2] if "charts/episodic_return" in row]
    totals, lengths, expected = [0.0] * 3, [0] * 3, []
    for row, reward in enumerate(replay["rewards"].tolist()):
        i = row % 3
        totals[i], lengths[i] = totals[i] + reward, lengths[i] + 1
        if ends[row]:
            expected.append((3 * (row // 3) + 3, pytest.approx(totals[i], abs=1e-4), lengths[i]))
            totals[i], lengths[i] = 0.0, 0
    assert [(row["step"], row["charts/episodic_return"], row["charts/episodic_length"]) for row in logged] == expected

    agent = m.Agent(5, 2, m.parse_args(["--evaluate", str(run)])[0], torch.device("cpu"))
    agent.load_state_dict(state["agent"])
    for rows, same in ((terminated, True), (truncated, False)):
        batch = {key: value[rows] for key, value in replay.items()}
        other = dict(batch, next_observations=batch["next_observations"] + 1)
        noise = torch.zeros(len(batch["rewards"]), 1, 2)
        loss, other_loss = (m.critic_loss(agent.policy, agent.critic, agent.target_critic, b, noise, agent.args)
                            for b in (batch, other))
        assert (loss == other_loss) == same


def test_actions_reach_the_environment_in_its_own_box(tmp_path):
    """The replay's -1 is the low end of the box, its 1 the high one."""
    run = train(tmp_path / "runs", "--env-id", "Walk-v0", "--exploration-noise", "2")
    replay = replay_of(run)
    actions = replay["actions"].numpy()
    assert (actions.min(), actions.max()) == (-1, 1) and (abs(actions) < 0.9).any(0).all()
    arrived = replay["next_observations"][:, 3:].numpy()
    np.testing.assert_allclose(arrived, Walk.LOW + (actions + 1) / 2 * (Walk.HIGH - Walk.LOW), atol=1e-6)


def test_reward_scale(tmp_path, monkeypatch):
    """The same as training in an environment with smaller rewards (a power of 2, so that the numbers are exact)."""
    by_flag = train(tmp_path / "flag", "--env-id", "Walk-v0", "--reward-scale", "0.25")
    step = Walk.step
    monkeypatch.setattr(Walk, "step", lambda env, action: (lambda o, r, *more: (o, r / 4, *more))(*step(env, action)))
    by_env = train(tmp_path / "env", "--env-id", "Walk-v0", "--reward-scale", "1")
    agents = [torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in (by_flag, by_env)]
    assert all(torch.equal(value, agents[1][key]) for key, value in agents[0].items())


def recorded(monkeypatch, action=None):
    """Stubs the evaluations and returns lists that fill with batches and with the observations that the policy acts
    on; its action then is `action`, if that is given."""
    batches, acted = [], []

    def update(agent, batch, original=m.Agent.update):
        batches.append({key: value.clone() for key, value in batch.items()})
        return original(agent, batch)

    def act(agent, observations, num_candidates, generator=None, original=m.Agent.act):
        acted.append(observations.clone())
        actions = original(agent, observations, num_candidates, generator)
        return actions if action is None else torch.full_like(actions, action)

    monkeypatch.setattr(m.Agent, "update", update)
    monkeypatch.setattr(m.Agent, "act", act)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    return batches, acted


def test_random_actions_until_learning_starts(tmp_path, monkeypatch):
    """Uniform over the whole box; from then on the policy acts, on each observation, and a batch is rows that have
    been filled, the newest among them."""
    batches, acted = recorded(monkeypatch)
    run = train(tmp_path, "--env-id", "Walk-v0", "--learning-starts", "300", "--utd", "1", "--batch-size", "64")
    replay = replay_of(run)
    first = replay["actions"][:300].sort(0).values
    uniform = 2 * (torch.arange(300) + 0.5) / 300 - 1
    assert (first - uniform.unsqueeze(1)).abs().max() < 0.25  # Kolmogorov and Smirnov at 2e-4
    assert torch.equal(torch.cat(acted), replay["observations"][300:])
    assert len(acted) == 30 and len(batches) == 90
    newest = []
    for update, batch in enumerate(batches):
        filled = 300 + 3 * (update // 3 + 1)
        same = (batch["observations"].unsqueeze(1) == replay["observations"][:filled]).all(2)
        assert same.any(1).all(), "a row that nothing has been written to yet"
        index = same.float().argmax(1)  # the first of equal ones; every row is one of the buffer in all its columns
        assert all(torch.equal(value, replay[key][index]) for key, value in batch.items())
        newest.append(filled - 1 - index.max().item())
    assert min(newest) == 0


def test_a_full_buffer_holds_the_newest_transitions(tmp_path, monkeypatch):
    """Also where it is no multiple of the environments, and after resuming: a batch is rows of the newest 100, all of
    which have been drawn after a while."""
    batches, _ = recorded(monkeypatch)
    run = train(tmp_path, "--learning-starts", "300", "--buffer-size", "100", "--env-id", "Walk-v0", "--utd", "1",
                "--batch-size", "64")
    assert m.main(["--resume", str(run), "--total-timesteps", "450"]) == 0
    replay, drawn = replay_of(run), set()
    assert len(replay["rewards"]) == 450 and len(batches) == 150
    for update, batch in enumerate(batches):
        last = 300 + 3 * (update // 3 + 1)
        same = (batch["observations"].unsqueeze(1) == replay["observations"][last - 100:last]).all(2)
        assert same.any(1).all()
        index = last - 100 + same.float().argmax(1)
        assert all(torch.equal(value, replay[key][index]) for key, value in batch.items())
        drawn.update(index.tolist())
    assert drawn >= set(range(240, 440))  # the others were or are in the buffer for a few batches only


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_exploration_noise(tmp_path, monkeypatch, noise):
    """Gaussian, of that deviation, new for each environment and step, and clipped to the box; the policy says 0.8."""
    recorded(monkeypatch, 0.8)
    run = train(tmp_path, "--exploration-noise", str(noise), "--total-timesteps", "690", "--utd", "0.05")
    actions = replay_of(run)["actions"][90:]
    if noise == 0:
        assert (actions == torch.tensor(0.8)).all()
        return
    inside = actions[actions < 1]
    assert actions.max() == 1 and (actions == 1).float().mean().item() == pytest.approx(0.345, abs=0.08)  # P(e > 0.4)
    assert len(inside.unique()) == len(inside) and actions.min() < -0.2
    below = (0.8 - actions[actions < 0.8]) / noise  # half a normal distribution
    assert len(below) == pytest.approx(300, abs=50) and below.square().mean().item() == pytest.approx(1, abs=0.3)


def test_every_seed_has_its_own_episodes(tmp_path, monkeypatch):
    recorded(monkeypatch)
    starts = []
    for seed in ("1", "2"):
        run = train(tmp_path / seed, "--env-id", "Walk-v0", "--seed", seed, "--utd", "0.01")
        before = replay_of(run)["observations"]
        starts += before[before[:, 0] == 0][:, 2].tolist()
    assert len(set(starts)) == len(starts) > 100


def test_intervals_that_are_no_multiple_of_the_environments(tmp_path, monkeypatch):
    """A row, an evaluation and a checkpoint where all environments have passed the multiple."""
    recorded(monkeypatch)
    monkeypatch.setattr(m, "evaluate", lambda *inputs: {"eval/step": inputs[5]})
    saved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: saved.append(paths[1].name) or replace(*paths))
    run = train(tmp_path, "--log-interval", "50", "--eval-interval", "100", "--checkpoint-interval", "130")
    rows = outcome(run)[2]
    assert [row["step"] for row in rows if "losses/actor" in row] == [102, 150, 201, 252, 300, 351]
    assert [row["eval/step"] for row in rows if "eval/step" in row] == [102, 201, 300, 390]
    assert saved.count("checkpoint.pt") == 4  # at 132, 261 and 390, and after the last evaluation


@pytest.mark.parametrize("flags, reason", [
    (["--env-id", "CartPole-v1"], "actions must be vectors"),
    (["--env-id", "Nothing-v9"], "doesn't exist"),
    (["--num-envs", "0"], "--num-envs 0 must lie between 1"),
    (["--learning-starts", "390"], "--learning-starts must be below --total-timesteps 390"),
    (["--buffer-size", "2"], "--buffer-size must be at least --num-envs 3"),
])
def test_refusals(tmp_path, flags, reason):
    """One line, before anything is written."""
    with pytest.raises(m.BadInput, match=reason):
        train(tmp_path / "runs", *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag, value", [("--num-envs", "5"), ("--buffer-size", "100"), ("--buffer-size", "9000"),
                                         ("--seed", "2"), ("--env-id", "Walk-v0"), ("--utd", "2"),
                                         ("--learning-starts", "60")])
def test_flags_that_cannot_change_in_a_resumed_run(tmp_path, flag, value):
    """Refused in one line; the run folder stays as it is."""
    run = train(tmp_path, "--total-timesteps", "150")
    before = {path: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    with pytest.raises(m.BadInput, match=f"{flag} cannot change"):
        m.main(["--resume", str(run), flag, value])
    assert {path: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before


def test_resuming_with_a_smaller_budget_only_evaluates(tmp_path):
    """As offline."""
    run = train(tmp_path, "--total-timesteps", "150")
    before = outcome(run)
    assert m.main(["--resume", str(run), "--total-timesteps", "120"]) == 0
    assert outcome(run)[0] == 150 and outcome(run)[2] == before[2]


def test_unfinished_episodes_that_go_another_way(tmp_path, monkeypatch):
    """An environment that is not deterministic cannot be resumed bit for bit: said before anything is written."""
    run = train(tmp_path, "--total-timesteps", "150")
    before = {path: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    monkeypatch.setattr(PendulumEnv, "reset", lambda env, original=PendulumEnv.reset, **more: original(env))
    with pytest.raises(m.BadInput, match="not deterministic"):
        m.main(["--resume", str(run)])
    assert {path: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before


def test_metrics_stay_json_when_the_policy_is_not_finite(tmp_path, monkeypatch):
    """An episode that a poisoned policy ends before the losses are looked at has no return to write."""
    update = m.Agent.update

    def poisoned(agent, batch):
        return update(agent, dict(batch, rewards=batch["rewards"] * (math.nan if updates_before(agent) >= 100 else 1)))

    monkeypatch.setattr(m.Agent, "update", poisoned)
    run = train(tmp_path, "--total-timesteps", "690", "--log-interval", "600", "--eval-interval", "500", code=3)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("harm", ["a bit", "cut", "missing", "another run's"])
def test_damaged_steps_are_refused(tmp_path, harm):
    """Before anything is written; evaluating does not need them."""
    run = train(tmp_path / "runs")
    path = run / "replay.bin"
    contents = bytearray(path.read_bytes())
    contents[5000] ^= 64
    path.unlink() if harm == "missing" else path.write_bytes(
        {"a bit": contents, "cut": path.read_bytes()[:-4], "another run's": bytes(len(contents))}[harm])
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(m.BadInput, match="replay.bin, which belongs to the checkpoint: ") as caught:
        m.main(["--resume", str(run), "--total-timesteps", "450"])
    assert len(str(caught.value).splitlines()) == 1 and {path: path.read_bytes() for path in run.iterdir()} == before
    assert m.main(["--evaluate", str(run)]) == 0


def test_steps_after_the_last_checkpoint_are_written_again(tmp_path):
    """A killed run has more steps in replay.bin than its checkpoint knows, perhaps half a step at the end; a run that
    was killed before its first checkpoint starts anew."""
    whole = train(tmp_path / "whole", "--total-timesteps", "450")
    run = train(tmp_path / "runs")
    with (run / "replay.bin").open("ab") as file:
        file.write(b"12345" * 1000)
    assert m.main(["--resume", str(run), "--total-timesteps", "450"]) == 0
    assert (run / "replay.bin").read_bytes() == (whole / "replay.bin").read_bytes()
    fresh = tmp_path / "fresh" / whole.name
    fresh.mkdir(parents=True)
    (fresh / "replay.bin").write_bytes(b"12345" * 1000)
    assert train(tmp_path / "fresh", "--total-timesteps", "450") == fresh
    assert (fresh / "replay.bin").read_bytes() == (whole / "replay.bin").read_bytes()
