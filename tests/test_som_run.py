"""Runs of `som_online.py` on Pendulum: equal numbers, resuming, the recorded dataset, refusals."""
import itertools
import json
import os
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch

import som_online as m

FLAGS = ("--env-id Pendulum-v1 --no-cuda --total-timesteps 390 --num-envs 3 --learning-starts 90 --num-proposals 8 "
         "--num-candidates 4 --batch-size 16 --policy-width 16 --policy-depth 1 --critic-width 16 --critic-depth 1 "
         "--log-interval 60 --eval-interval 150 --checkpoint-interval 75 --eval-episodes 2")


@pytest.fixture(autouse=True)
def one_thread_and_no_leftovers():
    """main() installs signal handlers and makes torch deterministic: put both back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder, *more, code=0):
    """Runs main and returns the run folder."""
    assert m.main([*FLAGS.split(), "--runs-dir", str(folder), *more]) == code
    run, = folder.iterdir()
    return run


def outcome(run):
    """What a run computed, apart from what depends on the clock."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if not key.endswith("PS")} for row in numbers]
    return state["step"], {**state["agent"], **state["replay"]}, numbers


def assert_equal(run, other):
    """Same networks, same replay buffer, same rows."""
    (step, tensors, numbers), (other_step, other_tensors, other_numbers) = outcome(run), outcome(other)
    assert step == other_step and numbers == other_numbers and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())


@pytest.mark.parametrize("stops", [(1,), (20, 23), (7, 61, 115)])  # updates, of 120
def test_interrupted_runs_continue_bit_for_bit(tmp_path, monkeypatch, stops):
    """SIGTERM in the middle of episodes, several times over: same numbers as a run in one go."""
    whole = train(tmp_path / "whole", "--total-timesteps", "690")
    assert outcome(whole)[0] == 690 and any("charts/episodic_return" in row for row in outcome(whole)[2])
    update = m.Agent.update

    def interrupted(agent, batch):
        if agent.updates in stops and agent.updates not in seen:
            seen.add(agent.updates)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, batch)

    seen = set()
    monkeypatch.setattr(m.Agent, "update", interrupted)
    run = train(tmp_path / "cut", "--total-timesteps", "690", code=130)
    for attempt in itertools.count(2):
        code = m.main(["--resume", str(run)])
        if code == 0:
            break
        assert code == 130 and attempt <= len(stops)
    assert seen == set(stops)
    assert_equal(run, whole)


def test_seed_and_watching(tmp_path):
    """Another seed gives other numbers; evaluating, logging and saving more often does not."""
    one = train(tmp_path / "one")
    other = train(tmp_path / "other", "--eval-interval", "60", "--log-interval", "30", "--checkpoint-interval", "300")
    two = train(tmp_path / "two", "--seed", "2")
    weights = [outcome(run)[1] for run in (one, other, two)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not torch.equal(weights[0]["policy.final.weight"],
                           weights[2]["policy.final.weight"])


def test_utd_and_learning_starts(tmp_path):
    """Gradient steps = utd * (steps - learning_starts), and the buffer holds what happened."""
    run = train(tmp_path / "runs", "--utd", "0.5")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["training"]["updates"] == 150
    replay = state["replay"]
    assert len(replay["rewards"]) == 390 and replay["masks"].eq(1).all()  # Pendulum never terminates
    first = replay["observations"][0::3]  # of the first environment: each row follows from the one before
    follows = (replay["next_observations"][0::3][:-1] == first[1:]).all(1)
    assert follows.sum() == 390 // 3 - 1  # 130 steps, fewer than an episode's 200
    assert replay["actions"].abs().max() <= 1 and replay["rewards"].min() < -1


def test_recorded_dataset_is_what_happened(tmp_path, monkeypatch):
    """Loaded by Minari: the same transitions, actions in the environment's own box, ends marked."""
    pytest.importorskip("jax", reason="Minari needs it to write: pip install minari[create]")
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    run = train(tmp_path / "runs", "--record-dataset", "local/pendulum/som-v0", "--total-timesteps", "630")
    replay = torch.load(run / "checkpoint.pt", weights_only=True)["replay"]
    dataset = minari.load_dataset("local/pendulum/som-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (6, 630)  # three whole ones of 200, three of 10
    episodes = list(dataset.iterate_episodes())
    assert [len(episode.rewards) for episode in episodes] == [200, 10] * 3
    rewards = replay["rewards"].numpy()
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in episodes[2:4]]), rewards[1::3])
    actions = np.concatenate([e.actions for e in episodes[:2]])
    np.testing.assert_allclose(actions, 2 * replay["actions"][0::3], atol=1e-6)
    np.testing.assert_array_equal(episodes[0].observations[-1], replay["next_observations"][199 * 3])
    assert all(e.truncations[-1] and not e.truncations[:-1].any() and not e.terminations.any() for e in episodes)
    assert [path.name for path in (tmp_path / "minari").iterdir()] == ["local"]  # nothing half written
    with pytest.raises(m.BadInput, match="exists"):
        train(tmp_path / "again", "--record-dataset", "local/pendulum/som-v0")


class Images(gym.Env):
    """Observations that no script here can use."""

    observation_space, action_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("flags, reason", [
    (["--env-id", "Images-v0"], "flat vectors"),
    (["--env-id", "CartPole-v1"], "flat vectors"),
    (["--env-id", "Nothing-v9"], "cannot be made"),
    (["--record-dataset", "no id"], "no id"),
    (["--record-dataset", "local/x-v0", "--buffer-size", "100"], "--buffer-size"),
    (["--num-envs", "0"], "at least 1"),
])
def test_refusals(tmp_path, monkeypatch, flags, reason):
    """One line, before anything is written."""
    if "--record-dataset" in flags:
        pytest.importorskip("jax", reason="Minari needs it to write: pip install minari[create]")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    gym.register("Images-v0", entry_point=Images)
    with pytest.raises(m.BadInput, match=reason):
        train(tmp_path / "runs", *flags)
    assert not (tmp_path / "runs").exists()
