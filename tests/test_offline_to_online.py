"""What `mfql_offline_to_online.py` adds to `mfql_offline.py`: replay ring, online phase, both starting points."""
import importlib.util
import json
import os
import pathlib
import signal

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import mfql_offline
import mfql_offline_to_online as m

ROWS, OFFLINE = 400, 12  # rows of the data, offline gradient steps
FLAGS = ("--env-id Leaps-v0 --no-cuda --batch-size 32 --eval-episodes 2 --policy-width 16 --policy-depth 1 "
         f"--critic-width 16 --critic-depth 1 --offline-steps {OFFLINE} --log-interval 4 --eval-interval 10 "
         "--checkpoint-interval 6")
ONLINE = ["--online-steps", "30"]


class Leaps(gym.Env):
    """Episodes of 3 to 9 steps; half of them terminate, half run into a limit. The observation counts the steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), self.time, np.uint8)

    def observation(self):
        return np.array([self.time, self.length, self.np_random.random()], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.length = 0, int(self.np_random.integers(3, 10))
        return self.observation(), {}

    def step(self, action):
        self.time += 1
        end, terminates = self.time == self.length, self.length % 2 == 0
        reward = self.time + float(np.abs(action[0]))
        return self.observation(), reward, end and terminates, end and not terminates, {}


gym.register("Leaps-v0", entry_point=Leaps)
gym.register("kitchen-leaps-v0", entry_point=Leaps)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random transitions in D4RL's layout, every seventh of them terminal."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "data.hdf5"
    arrays = dict(observations=rng.normal(2, 3, (ROWS + 1, 3)).astype(np.float32), rewards=rng.normal(size=ROWS + 1),
                  actions=rng.uniform(-2, 2, (ROWS + 1, 1)).astype(np.float32), terminals=np.arange(ROWS + 1) % 7 == 6,
                  timeouts=np.arange(ROWS + 1) == ROWS)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


@pytest.fixture(autouse=True)
def no_leftovers():
    """main() installs signal handlers and makes torch deterministic: put both back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in before.items():
        signal.signal(number, handler)


def train(script, data, folder, *more, code=0):
    """Runs main and returns the run folder."""
    argv = [*FLAGS.split(), "--dataset-path", str(data), "--runs-dir", str(folder), *more]
    assert script.main(argv) == code
    run, = pathlib.Path(folder).iterdir()
    return run


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def metrics(run):
    """The rows, apart from what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("PS")} for row in rows]


def assert_equal(one, other):
    """Same networks, same optimisers, same online transitions."""
    one, other = checkpoint(one), checkpoint(other)
    assert all(torch.equal(value, other["agent"][key]) for key, value in one["agent"].items())
    for ours, theirs in zip(one["optimizers"], other["optimizers"], strict=True):
        for index, state in ours["state"].items():
            assert all(torch.equal(state[key], theirs["state"][index][key]) for key in state)
    for key, value in one.get("online", {}).get("transitions", {}).items():
        assert torch.equal(value, other["online"]["transitions"][key])


def after_each_step(monkeypatch, act):
    """Calls act(step) after each offline gradient step and after each step of the environment."""
    def update(agent, batch, original=m.Agent.update):
        parts = original(agent, batch)
        if agent.updates <= OFFLINE:
            act(int(agent.updates))
        return parts

    def step(online, policy, original=m.Online.step):
        metrics = original(online, policy)
        act(OFFLINE + online.steps)
        return metrics

    monkeypatch.setattr(m.Agent, "update", update)
    monkeypatch.setattr(m.Online, "step", step)


# ---------------------------------------------------------------- replay
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("data_rows, capacity", [(5, 5), (5, 8), (5, 30), (1, 2)])
def test_ring_against_a_list(balanced, data_rows, capacity):
    """The oldest give way; with balanced sampling only the oldest of the new ones."""
    if balanced and capacity == data_rows:
        pytest.skip("refused by main")
    args = m.Args(balanced_sampling=balanced)
    ring = [f"d{i}" for i in range(data_rows)] + [None] * (capacity - data_rows)
    kept, queue = (ring[:data_rows], []) if balanced else ([], ring[:data_rows])
    for k in range(40):
        ring[m.ring_row(k, data_rows, capacity, args)] = k
        queue = [*queue, k][-(capacity - len(kept)):]
        assert None not in ring[:min(data_rows + k + 1, capacity)]  # what sample_online draws from
        assert sorted(map(str, filter(lambda x: x is not None, ring))) == sorted(map(str, kept + queue))


def test_balanced_sampling_counts():
    """Half of each batch from the data, half from what is filled of the new rows; without the flag all alike."""
    torch.manual_seed(0)
    replay = dict(rewards=torch.arange(1000.0), masks=torch.arange(1000.0))
    batch = m.sample_online(replay, 900, 910, m.Args(balanced_sampling=True, batch_size=65))
    assert (batch["rewards"] < 900).sum() == 32 and (batch["rewards"] >= 900).sum() == 33
    assert batch["rewards"].max() < 910 and torch.equal(batch["rewards"], batch["masks"])
    batch = m.sample_online(replay, 900, 910, m.Args(batch_size=20_000))
    assert batch["rewards"].max() == 909 and 100 < (batch["rewards"] >= 900).sum() < 350  # 220 expected


# ---------------------------------------------------------------- phases
@pytest.mark.parametrize("flags", [["--reward-scale", "0.5", "--reward-shift", "-1"],
                                   ["--q-aggregation", "min", "--num-candidates-target", "2", "--time-steps", "2000",
                                    "--no-normalize-q-loss", "--observation-normalization", "none"]])
def test_without_online_steps_it_is_mfql_offline(data, tmp_path, flags):
    """Parameter for parameter, row for row."""
    both = train(m, data, tmp_path / "both", "--online-steps", "0", *flags)
    offline = train(mfql_offline, data, tmp_path / "offline", *flags)
    assert_equal(offline, both)
    assert metrics(both) == metrics(offline)


@pytest.mark.parametrize("flags", [
    dict(), dict(q_aggregation="min"), dict(num_candidates_target=1), dict(normalize_q_loss=False, alpha=10.0),
    dict(alpha_schedule="constant"), dict(alpha_schedule="cosine"), dict(time_steps=2000), dict(bound_weight=0.1),
    dict(tau=0.5, gamma=0.5), dict(policy_depth=2, critic_depth=2), dict(num_candidates_eval=2)])
def test_the_agent_is_mfqls_until_it_goes_online(flags):
    """Whatever the online flags say; also where alpha moves, at gradient step 2000, and how it acts."""
    agents = []
    for script, more in ((mfql_offline, {}), (m, dict(online_alpha=0.1, online_actor_learning_rate=1.0, utd=2.0))):
        torch.manual_seed(0)
        args = script.Args(**{**SIZES, "offline_steps": 2001, **flags, **more})
        agent = script.Agent(3, 2, args, torch.device("cpu"))
        agent.updates.fill_(1998), agent.alpha_history.fill_(1e-9)
        for seed in range(3):
            torch.manual_seed(seed)
            batch = {key: torch.randn(value.shape) for key, value in BATCH.items()}
            parts = agent.update(dict(batch, actions=batch["actions"].clamp(-1, 1), masks=torch.tensor([1., 0, 1, 0])))
        actions = agent.act(torch.randn(5, 3), 4, torch.Generator().manual_seed(0))
        agents.append([*agent.state_dict().values(), *parts.values(), actions, *agent.charts().values()])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*agents, strict=True))


def test_online_transitions_are_what_happened(data, tmp_path):
    """Normalised with the data's frozen statistics, rewards scaled and shifted like theirs, truncations bootstrap."""
    run = train(m, data, tmp_path, *ONLINE, "--reward-scale", "0.5", "--reward-shift", "-1")
    state = checkpoint(run)
    with h5py.File(data) as file:
        mean, std = file["observations"][:ROWS].mean(0), file["observations"][:ROWS].std(0)
    np.testing.assert_allclose(state["agent"]["obs_mean"], mean, rtol=1e-5)  # 30 steps later
    np.testing.assert_allclose(state["agent"]["obs_std"], std, rtol=1e-5)
    online = {key: value.numpy() for key, value in state["online"]["transitions"].items()}
    assert state["online"]["rows"].tolist() == list(range(ROWS, ROWS + 30))
    observations, following = (online[key] * std + mean for key in ("observations", "next_observations"))
    time, length = observations[:, 0].round(), observations[:, 1].round()
    np.testing.assert_allclose(following[:, 0], time + 1, atol=1e-4)  # the last of an episode too
    ends = time + 1 == length
    assert ends.sum() >= 3
    np.testing.assert_array_equal(time[1:], np.where(ends, 0, time + 1)[:-1])
    np.testing.assert_array_equal(online["masks"], 1 - (ends & (length % 2 == 0)))
    assert (length[ends] % 2 == 0).any() and (length[ends] % 2 == 1).any()
    raw = time + 1 + np.abs(2 * online["actions"][:, 0])  # the environment's box is twice as wide
    np.testing.assert_allclose(online["rewards"], 0.5 * raw - 1, atol=1e-4)
    episodes = [row for row in metrics(run) if "charts/episodic_return" in row]
    assert [row["step"] for row in episodes] == (OFFLINE + 1 + np.flatnonzero(ends)).tolist()
    parts = np.split(raw, np.flatnonzero(ends) + 1)[:len(episodes)]
    assert [row["charts/episodic_return"] for row in episodes] == pytest.approx([x.sum() for x in parts], rel=1e-4)
    assert [row["charts/episodic_length"] for row in episodes] == [len(x) for x in parts]


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_of_the_online_phase(data, tmp_path, monkeypatch, balanced):
    """Offline all rows are the data's, bit for bit; online half of each batch is new if balanced, else by chance, and
    no row is one that has not been filled yet. Each row is one of the buffer in all its columns."""
    def update(agent, batch, original=m.Agent.update):
        seen.append({key: value.clone() for key, value in batch.items()})
        return original(agent, batch)

    seen = []
    monkeypatch.setattr(m.Agent, "update", update)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    run = train(m, data, tmp_path, *ONLINE, *(["--balanced-sampling"] if balanced else []), "--batch-size", "64")
    new = checkpoint(run)["online"]["transitions"]
    counts = []
    for step, batch in enumerate(seen):
        filled = max(step - OFFLINE + 1, 0)
        # an action of the data is never 1, and no two rows have one observation
        same = (batch["observations"].unsqueeze(1) == new["observations"][:filled]).all(2)
        counts.append(same.any(1).sum().item())
        for key, value in batch.items():
            rows = new[key][:filled][same.float().argmax(1)] if filled else value
            assert torch.equal(value[same.any(1)], rows[same.any(1)]), key
        assert (batch["observations"] != 0).any(1).all() and (batch["actions"] != 0).any(1).all()
    assert counts[:OFFLINE] == [0] * OFFLINE and len(counts) == OFFLINE + 30
    if balanced:
        assert counts[OFFLINE:] == [32] * 30
    else:
        assert 0 < max(counts) < 20 and abs(sum(counts) - 64 * sum(k / (ROWS + k) for k in range(1, 31))) < 50


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_exploration_noise(data, tmp_path, monkeypatch, noise):
    """Gaussian, of that deviation, new in each step, and clipped to the box; the policy here says 0.8 and raw
    observations reach it. What the buffer holds is what was played."""
    def act(agent, observations, num_candidates, generator):
        if generator is None:
            seen.append(observations[0, :2].tolist())
        return torch.full((len(observations), 1), 0.8)

    seen = []
    monkeypatch.setattr(m.Agent, "act", act)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    run = train(m, data, tmp_path, "--online-steps", "400", "--utd", "0.01", "--exploration-noise", str(noise))
    actions = checkpoint(run)["online"]["transitions"]["actions"]
    assert len(seen) == 400 and {length for _, length in seen} == set(range(3, 10)) and min(seen)[0] == 0
    if noise == 0:
        assert (actions == torch.tensor(0.8)).all()
        return
    inside = actions[actions < 1]
    assert actions.max() == 1 and (actions == 1).float().mean().item() == pytest.approx(0.345, abs=0.1)  # P(e > 0.4)
    assert len(inside.unique()) == len(inside) and actions.min() < -0.2
    below = (0.8 - actions[actions < 0.8]) / noise  # half a normal distribution
    assert len(below) == pytest.approx(200, abs=40) and below.square().mean().item() == pytest.approx(1, abs=0.35)


def test_every_seed_has_its_own_episodes(data, tmp_path, monkeypatch):
    """In the online phase as well, and no episode twice."""
    firsts = []
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    for seed in ("1", "2"):
        run = train(m, data, tmp_path / seed, *ONLINE, "--seed", seed, "--observation-normalization", "none")
        observations = checkpoint(run)["online"]["transitions"]["observations"]
        firsts.append(observations[observations[:, 0] == 0][:, 2].tolist())
    assert len(set(firsts[0] + firsts[1])) == len(firsts[0] + firsts[1]) > 5


def test_one_axis_and_marks_of_the_change(data, tmp_path):
    """Rows go on from the offline steps; at the change and at the end there are evaluations with N and with one."""
    run = train(m, data, tmp_path, *ONLINE)
    rows = metrics(run)
    assert [row["step"] for row in rows if "losses/critic" in row] == list(range(4, 43, 4))
    assert [row["step"] for row in rows if "eval/episodic_return" in row] == [10, OFFLINE, 20, 30, 40, 42]
    assert [row["step"] for row in rows if "eval_n1/episodic_return" in row] == [OFFLINE, 42]
    assert checkpoint(run)["step"] == 42


@pytest.mark.parametrize("utd, updates", [("0.5", 15), ("1", 30), ("2", 60)])
def test_utd(data, tmp_path, utd, updates):
    run = train(m, data, tmp_path, *ONLINE, "--utd", utd)
    assert checkpoint(run)["agent"]["updates"] == OFFLINE + updates


def test_full_buffer(data, tmp_path):
    """The checkpoint holds the newest transitions only, as many as the ring has room for."""
    run = train(m, data, tmp_path / "small", *ONLINE, "--buffer-size", str(ROWS + 7), "--balanced-sampling")
    rows = checkpoint(run)["online"]["rows"].tolist()
    assert rows == list(range(ROWS, ROWS + 7))
    with pytest.raises(m.BadInput, match="--buffer-size above the data's 400"):
        train(m, data, tmp_path / "none", *ONLINE, "--buffer-size", "100", "--balanced-sampling")


# ---------------------------------------------------------------- schedules
BATCH = dict(observations=torch.zeros(4, 3), actions=torch.zeros(4, 2), rewards=torch.zeros(4), masks=torch.ones(4),
             next_observations=torch.zeros(4, 3))
SIZES = dict(offline_steps=100, policy_width=8, policy_depth=1, critic_width=8, critic_depth=1)


def charts(agent, step):
    """What the log shows after gradient step number `step`."""
    agent.updates.fill_(step - 1)
    agent.update(BATCH)
    return agent.charts()


@pytest.mark.parametrize("flag, rate", [(None, 1e-5), (3e-4, 3e-4)])
def test_actor_learning_rate_online(flag, rate):
    """Constant: a tenth of the peak, or the flag's; offline it decays to that tenth whatever the flag says."""
    agent = m.Agent(3, 2, m.Args(**SIZES, online_actor_learning_rate=flag), torch.device("cpu"))
    assert charts(agent, 100)["charts/actor_learning_rate"] == pytest.approx(1e-5, rel=0.1)
    for step in (101, 102, 900):
        assert charts(agent, step)["charts/actor_learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize("steps", [1, 4])
def test_online_alpha_moves_on_a_straight_line(steps):
    args = m.Args(**SIZES, alpha=10.0, online_alpha=2.0, online_alpha_steps=steps)
    agent = m.Agent(3, 2, args, torch.device("cpu"))
    values = [charts(agent, step)["charts/alpha"] for step in range(100, 107)]
    assert values[0] == 10, "the last offline step"
    assert values[1:] == pytest.approx([max(10 - 8 * k / steps, 2) for k in range(1, 7)])


# ---------------------------------------------------------------- resuming and starting from an offline run
@pytest.mark.parametrize("stops", [(5,), (OFFLINE,), (OFFLINE + 1,), (3, OFFLINE - 1, 30, 31)])
@pytest.mark.parametrize("more", [["--utd", "0.5"],  # step 32 logs the losses of step 31
                                  ["--buffer-size", str(ROWS + 7), "--utd", "2", "--online-alpha", "0.2",
                                   "--online-alpha-steps", "50", "--exploration-noise", "0.1"]])
def test_interrupted_runs_continue_bit_for_bit(data, tmp_path, monkeypatch, stops, more):
    """SIGTERM before, at and after the change, in the middle of episodes, also with a ring that has wrapped while
    alpha is still moving."""
    whole = train(m, data, tmp_path / "whole", *ONLINE, *more)
    seen = set()

    def interrupt(step):
        if step in stops and step not in seen:
            seen.add(step)
            os.kill(os.getpid(), signal.SIGTERM)

    after_each_step(monkeypatch, interrupt)
    run = train(m, data, tmp_path / "cut", *ONLINE, *more, code=130)
    while (code := m.main(["--resume", str(run)])) != 0:
        assert code == 130
    assert len(seen) == len(stops)
    assert_equal(whole, run)
    assert metrics(run) == metrics(whole)


def test_killed_between_checkpoints(data, tmp_path, monkeypatch):
    """Nothing is saved at the moment of death: the run falls back on its last checkpoint, rows included."""
    whole = train(m, data, tmp_path / "whole", *ONLINE)

    def die(step):
        if step == 34:
            raise SystemExit  # not caught by main, as SIGKILL

    with monkeypatch.context() as patch:
        after_each_step(patch, die)
        with pytest.raises(SystemExit):
            train(m, data, tmp_path / "cut", *ONLINE)
    run, = (tmp_path / "cut").iterdir()
    assert checkpoint(run)["step"] == 30
    assert m.main(["--resume", str(run)]) == 0
    assert_equal(whole, run)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("flag", [["--seed", "2"], ["--buffer-size", "500"], ["--balanced-sampling"],
                                  ["--offline-steps", "20"], ["--env-id", "Pendulum-v1"],
                                  ["--reward-scale", "0.5"], ["--reward-shift", "1"],
                                  ["--observation-normalization", "none"], ["--utd", "2"]])
def test_what_cannot_change_in_a_resumed_run(data, tmp_path, flag):
    """Refused before the run folder is touched."""
    run = train(m, data, tmp_path, *ONLINE)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(m.BadInput, match=f"{flag[0]} cannot change"):
        m.main(["--resume", str(run), "--online-steps", "40", *flag])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_what_may_change_before_the_online_phase(data, tmp_path):
    """A run that was stopped offline has no replay buffer of its own yet."""
    run = train(m, data, tmp_path / "cut", "--online-steps", "0")
    assert m.main(["--resume", str(run), *ONLINE, "--balanced-sampling"]) == 0
    assert_equal(train(m, data, tmp_path / "whole", *ONLINE, "--balanced-sampling"), run)


@pytest.mark.parametrize("more", [[], ["--buffer-size", str(ROWS + 7)]])
def test_resuming_for_longer_or_not_at_all(data, tmp_path, more):
    """--online-steps may change: more goes on as if it had been so from the start, fewer changes nothing."""
    run = train(m, data, tmp_path / "cut", "--online-steps", "20", *more)
    assert m.main(["--resume", str(run), "--online-steps", "10"]) == 0 and checkpoint(run)["step"] == OFFLINE + 20
    assert m.main(["--resume", str(run), "--online-steps", "30"]) == 0
    assert_equal(train(m, data, tmp_path / "whole", *ONLINE, *more), run)


def test_from_checkpoint_equals_both_phases(data, tmp_path):
    """The offline run's flags need not be repeated; the result is that of a run in one go, bit for bit."""
    both = train(m, data, tmp_path / "both", *ONLINE, "--gamma", "0.9", "--no-normalize-q-loss")
    offline = train(mfql_offline, data, tmp_path / "offline", "--gamma", "0.9", "--no-normalize-q-loss")
    assert m.main(["--from-checkpoint", str(offline), *ONLINE, "--runs-dir", str(tmp_path / "online")]) == 0
    online, = (tmp_path / "online").iterdir()
    assert_equal(both, online)
    later = [row for row in metrics(both) if row["step"] >= OFFLINE]
    assert metrics(online) == later[1:]  # the first are the losses of the last offline step


def test_from_checkpoint_of_a_run_that_was_cut_short(data, tmp_path, monkeypatch):
    """The online phase begins where that one stopped, whatever it had been meant to do."""
    update = mfql_offline.Agent.update

    def interrupted(agent, batch):
        if agent.updates == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, batch)

    monkeypatch.setattr(mfql_offline.Agent, "update", interrupted)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    offline = train(mfql_offline, data, tmp_path / "offline", code=130)
    assert m.main(["--from-checkpoint", str(offline), "--online-steps", "3", "--runs-dir", str(tmp_path / "on")]) == 0
    state = checkpoint(next((tmp_path / "on").iterdir()))
    assert (state["step"], state["agent"]["updates"], state["online"]["steps"]) == (8, 8, 3)
    assert state["args"]["offline_steps"] == 5


def test_from_checkpoint_with_another_seed(data, tmp_path):
    """Other batches and other noise, not only other episodes; and another alpha is taken."""
    offline = train(mfql_offline, data, tmp_path / "offline")
    for seed in ("1", "2"):
        flags = ["--from-checkpoint", str(offline), "--online-steps", "1", "--seed", seed, "--alpha", "7"]
        assert m.main([*flags, "--runs-dir", str(tmp_path / seed)]) == 0
    one, two = (checkpoint(next((tmp_path / seed).iterdir())) for seed in ("1", "2"))
    assert not torch.equal(one["random_cpu"], two["random_cpu"])
    assert one["args"]["alpha"] == two["args"]["alpha"] == 7


@pytest.mark.parametrize("more, reason", [
    (["--env-id", "Pendulum-v1"], "env-id"),
    (["--critic-width", "24"], "does not fit"),
    (["--observation-normalization", "none"], "observation-normalization"),
    (["--reward-scale", "0.5"], "reward-scale"),
    (["--utd", "inf"], "--utd"),
    (["--offline-steps", "20"], "--offline-steps cannot change"),
    (["--resume", "RUN"], "excludes"),
])
def test_checkpoints_that_do_not_fit(data, tmp_path, more, reason):
    offline = train(mfql_offline, data, tmp_path / "offline")
    if "RUN" in more:
        more = ["--resume", str(train(m, data, tmp_path / "other", *ONLINE))]
    with pytest.raises(m.BadInput, match=reason):
        m.main(["--from-checkpoint", str(offline), *ONLINE, "--runs-dir", str(tmp_path / "none"), *more])
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is None, reason="needs moviepy")
def test_videos_are_named_after_the_steps_of_the_log(data, tmp_path):
    """With two gradient steps per environment step as well."""
    run = train(m, data, tmp_path, *ONLINE, "--utd", "2", "--eval-interval", "15", "--capture-video")
    filmed = {int(path.name.split("-")[1]) for path in (run / "videos").glob("*.mp4")}
    assert filmed == {row["step"] for row in metrics(run) if "eval/episodic_return" in row}


def test_from_checkpoint_wants_a_whole_checkpoint_of_mfql_offline(data, tmp_path):
    offline, own = train(mfql_offline, data, tmp_path / "offline"), train(m, data, tmp_path / "own", *ONLINE)
    with pytest.raises(m.BadInput, match="policy.pt, only to be evaluated"):
        m.main(["--from-checkpoint", str(offline / "policy.pt"), "--runs-dir", str(tmp_path / "none")])
    with pytest.raises(m.BadInput, match="of mfql_offline_to_online, not of mfql_offline"):
        m.main(["--from-checkpoint", str(own), "--runs-dir", str(tmp_path / "none")])


@pytest.mark.parametrize("env_id, steps, lines", [
    ("kitchen-leaps-v0", "5", 1), ("kitchen-leaps-v0", "0", 0), ("Leaps-v0", "5", 0)])
def test_kitchens_two_kinds_of_reward_are_told(data, tmp_path, capsys, env_id, steps, lines):
    train(m, data, tmp_path, "--env-id", env_id, "--online-steps", steps)
    assert capsys.readouterr().err.count("kitchen: data reward a subtask at every step") == lines
