"""MFQL on pixels: encoder, stacks of frames, crops, gradients, memory, resuming, and how OGBench's files become its
data. No network; only what draws frames needs OpenGL, and is skipped without it."""
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import mfql_offline_pixels as m
from data import fetch

ROOT = pathlib.Path(__file__).parents[1]
CPU = torch.device("cpu")
TASK = "visual-cube-single-play-singletask-task1-v0"
FLAGS = ("--no-cuda --batch-size 8 --eval-episodes 2 --log-interval 2 --eval-interval 4 --checkpoint-interval 3 "
         "--encoder-channels 2 --encoder-width 4 --policy-width 4 --policy-depth 1 --critic-width 4 --critic-depth 1 "
         "--num-candidates 2 --offline-steps 8")
TINY = FLAGS.split()


class Blob(gym.Env):
    """Frames of 8 x 8 in one colour, which counts the steps; ten steps."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros((8, 8, 3), np.uint8), {}

    def step(self, action):
        self.steps += 1
        return np.full((8, 8, 3), self.steps, np.uint8), float(action[0]), False, self.steps == 10, {}


gym.register("Blob-v0", entry_point=Blob, disable_env_checker=True)


@pytest.fixture(autouse=True)
def no_lasting_choice_of_opengl(monkeypatch):
    """The script sets it for its process, which here is that of other tests, too."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))


def write(path, lengths=(5, 4, 6), **changes):
    """A flat file whose frame number i has colour i, with episodes of these lengths."""
    rng, count = np.random.default_rng(1), sum(lengths)
    data = dict(frames=np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3)),
                actions=rng.uniform(-1, 1, (count, 2)).astype(np.float32), rewards=rng.normal(size=count),
                terminals=np.zeros(count, bool), timeouts=np.zeros(count, bool)) | changes
    data["timeouts"][np.cumsum(lengths) - 1] = True
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return path


def train(folder, *more, code=0):
    argv = ["--env-id", "Blob-v0", "--dataset-path", str(folder / "blob.hdf5"), "--runs-dir", str(folder / "runs")]
    assert m.main([*argv, *TINY, *more]) == code
    return folder / "runs" / f"Blob-v0__{m.SCRIPT}__1"


def make_agent(*more, shape=(3, 64, 64, 3)):
    args = m.parse_args([*TINY, *more])[0]
    torch.manual_seed(0)
    agent = m.Agent(shape, 5, args, CPU)
    with torch.no_grad():  # the policy is zero at first, where nothing would pass, and the target a copy
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent, args


# ---------------------------------------------------------------- encoder
def test_encoder_has_the_published_shapes_and_size():
    encoder = m.Encoder((3, 64, 64, 3), 16, 512)
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim > 1]
    stack = [[(o, i, 3, 3), (o, o, 3, 3), (o, o, 3, 3)] for i, o in ((9, 16), (16, 32), (32, 32))]
    assert shapes == [*sum(stack, []), (512, 2048)]
    by_hand = sum(9 * i * o + o + 2 * (9 * o * o + o) for i, o in ((9, 16), (16, 32), (32, 32))) + 2048 * 512 + 512
    assert sum(p.numel() for p in encoder.parameters()) == by_hand == 1_105_920
    x = torch.zeros(2, 9, 64, 64, dtype=torch.uint8)
    sizes = []
    for part in encoder.stacks:
        part.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))
    assert encoder(x).shape == (2, 512)
    assert sizes == [(16, 32, 32), (32, 16, 16), (32, 8, 8)]
    assert all((p == 0).all() for p in encoder.parameters() if p.ndim == 1)
    for weight in (p for p in encoder.parameters() if p.ndim > 1):  # Xavier: variance 2 / (fan in + fan out)
        fans = weight[0].numel() + weight.shape[0] * weight[0, 0].numel()
        assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.1)
        assert weight.abs().max() <= (6 / fans) ** 0.5


def test_pooling_pads_as_jax_does():
    """SAME of even sizes: windows begin at 0, 2, 4, ... and the last one reaches over the right and bottom edge. The
    values are negative, where padding with zeros would show."""
    stack = m.Stack(1, 1)
    with torch.no_grad():
        for layer in (stack.conv, stack.residual1, stack.residual2):
            layer.weight.zero_()
            layer.bias.zero_()
        stack.conv.weight[0, 0, 1, 1] = 1  # the identity
        x = -torch.arange(16.0).reshape(1, 1, 4, 4)
        assert stack(x)[0, 0].tolist() == [[0, -2], [-8, -10]]
        assert stack(-16 - x)[0, 0].tolist() == [[-6, -5], [-2, -1]]


def test_encoder_against_one_written_with_numpy():
    torch.manual_seed(0)
    encoder = m.Encoder((1, 8, 8, 3), 2, 5).double()
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8))

    def conv(x, layer):
        weight, bias, size = layer.weight.detach().numpy(), layer.bias.detach().numpy(), x.shape[1]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        return np.array([[[(weight[o] * padded[:, i:i + 3, j:j + 3]).sum() + bias[o] for j in range(size)]
                          for i in range(size)] for o in range(len(bias))])

    x = image / 255
    for stack in encoder.stacks:
        x = conv(x, stack.conv)
        x = np.array([[[channel[i:i + 3, j:j + 3].max() for j in range(0, x.shape[1], 2)]
                       for i in range(0, x.shape[1], 2)] for channel in x])
        x = x + conv(np.maximum(conv(np.maximum(x, 0), stack.residual1), 0), stack.residual2)
    y = encoder.out.weight.detach().numpy() @ np.maximum(x, 0).ravel() + encoder.out.bias.detach().numpy()
    y = y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))
    found = encoder.out(torch.relu(encoder.stacks(torch.tensor(image)[None].double() / 255)).flatten(1))
    assert m.gelu(found)[0].detach().numpy() == pytest.approx(y)
    assert encoder.float()(torch.tensor(image)[None])[0].detach().numpy() == pytest.approx(y, abs=1e-5)


# ---------------------------------------------------------------- frames
def load(folder, **changes):
    path = write(folder / "blob.hdf5", **changes)
    task, path = m.find_frames("Blob-v0", path, 3)
    return m.load_frames(m.make_env(task), path, CPU)


def test_stacks_repeat_the_first_frame_of_their_episode(tmp_path):
    frames, replay, about = load(tmp_path)
    assert frames[:, 0, 0, 0].tolist() == list(range(15)) and frames.dtype == torch.uint8
    assert replay["stack"].tolist() == [
        [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4],
        [5, 5, 5, 6], [5, 5, 6, 7], [5, 6, 7, 8],
        [9, 9, 9, 10], [9, 9, 10, 11], [9, 10, 11, 12], [10, 11, 12, 13], [11, 12, 13, 14]]
    assert about["transitions"] == 12 and about["episodes"] == 3
    planes = m.to_planes(frames[replay["stack"][5:6]])  # channels: three colours of frames 5, 5, 6 and the next, 7
    assert planes[0, :, 0, 0].tolist() == [5] * 6 + [6] * 3 + [7] * 3


def test_a_done_task_does_not_end_the_episode(tmp_path):
    """OGBench's masks are 0 while the task is done, and its episodes go on."""
    terminals = np.zeros(15, bool)
    terminals[[2, 6]] = True
    _, replay, about = load(tmp_path, terminals=terminals)
    assert about["transitions"] == 12 and replay["stack"][3].tolist() == [1, 2, 3, 4]
    assert replay["masks"].tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]


def test_the_environment_stacks_like_the_data():
    env = m.make_env(dict(env_id="FrameStack-v0", kwargs=dict(env_id="Blob-v0", count=3)))
    seen = [env.reset(seed=1)[0], *(env.step(np.zeros(2, np.float32))[0] for _ in range(3))]
    assert [s.reshape(3, 8, 8, 3)[:, 0, 0, 0].tolist() for s in seen] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_crop_shifts_all_frames_of_a_row_alike_and_repeats_the_edge():
    frames = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    stack, offsets = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 1]]), torch.tensor([[0, 0], [-3, 2]])
    found = m.gather(frames, stack, offsets)
    assert found.shape == (2, 4, 8, 8, 3) and found.dtype == torch.uint8
    assert (found[0] == frames[stack[0]]).all()
    padded = np.pad(frames.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    assert (found[1].numpy() == padded[stack[1], 0:8, 5:13]).all()


def test_crop_offsets():
    torch.manual_seed(0)
    drawn = torch.stack([m.crop_offsets(64, CPU) for _ in range(400)])
    cropped = drawn.ne(0).flatten(1).any(1)
    assert 0.4 < cropped.float().mean() < 0.6  # one coin for the whole batch
    values, counts = drawn[cropped].unique(return_counts=True)
    assert values.tolist() == [-3, -2, -1, 0, 1, 2, 3] and counts.min() > 0.9 * counts.max()
    rows, columns = drawn[cropped].flatten(0, 1).float().T
    assert abs(torch.corrcoef(torch.stack([rows, columns]))[0, 1]) < 0.05


def test_update_sees_the_same_crop_in_observation_and_next_observation(monkeypatch):
    """With equal frames everywhere in a row, what the encoders see must be equal too, and cropped."""
    agent, _ = make_agent()
    frames = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    batch = dict(actions=torch.zeros(4, 5), rewards=torch.zeros(4), masks=torch.ones(4),
                 stack=torch.arange(4)[:, None].expand(4, 4))
    seen = {}
    for name in ("policy_encoder", "critic_encoder", "target_encoder"):
        getattr(agent, name).register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0]))
    monkeypatch.setattr(m, "crop_offsets", lambda *_: torch.tensor([[1, 2], [-3, 0], [3, 3], [0, -1]]))
    agent.update(frames, batch)
    (next_policy, policy), (critic,), (target,) = (seen[f"{name}_encoder"] for name in ("policy", "critic", "target"))
    assert all(x.shape == (4, 9, 64, 64) and (x == policy).all() for x in (next_policy, critic, target))
    assert (policy[0, :3, :-1, :-2] == frames[0].permute(2, 0, 1)[:, 1:, 2:]).all()
    seen.clear()
    agent.args.random_crop = False
    agent.update(frames, batch)
    assert (seen["critic_encoder"][0] == m.to_planes(frames[batch["stack"][:, :3]])).all()


def test_memory_is_one_copy_of_the_frames(tmp_path):
    """Peak memory of a process that loads n frames: n x 12,288 bytes and little more."""
    code = """
import resource, sys, torch
import mfql_offline_pixels as m, gymnasium as gym, numpy as np
class Env(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
gym.register("Env-v0", entry_point=Env)
def used():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
env = m.make_env(m.find_frames("Env-v0", m.pathlib.Path(sys.argv[2]), 3)[0])
m.load_frames(env, sys.argv[1], torch.device("cpu"))  # libraries
before = used()
frames, replay, _ = m.load_frames(env, sys.argv[2], torch.device("cpu"))
print(used() - before, len(frames) * 12_288, frames.nbytes + sum(value.nbytes for value in replay.values()))
"""
    for name, count in (("few", 4096), ("many", 40_960)):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("frames", (count, 64, 64, 3), np.uint8, chunks=(64, 64, 64, 3), fillvalue=7)
            file.update(dict(actions=np.zeros((count, 2), np.float32), rewards=np.zeros(count),
                             terminals=np.zeros(count, bool), timeouts=np.arange(count) % 100 == 99))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "few", tmp_path / "many"], capture_output=True,
                          text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, expected, tensors = map(int, done.stdout.split())
    assert expected < tensors < 1.01 * expected
    assert peak < 1.05 * expected + 4096 * 12_288, (peak / expected)


# ---------------------------------------------------------------- gradients
def gradients(agent, part):
    """Which networks get a gradient from one loss, as a set of names; the batch is random."""
    torch.manual_seed(1)
    planes = torch.randint(0, 256, (4, 9, 64, 64), dtype=torch.uint8)
    features = agent.features(agent.critic_encoder, planes)
    batch = dict(observations=features, next_observations=features.detach(), actions=torch.rand(4, 5) - 0.5,
                 rewards=torch.ones(4), masks=torch.ones(4))
    noise, t = torch.randn(4, 5), torch.full((4, 1), 0.5)
    loss = dict(critic=lambda: m.critic_loss(agent.policy, agent.critic, agent.target_critic, batch,
                                             torch.randn(4, 2, 5), agent.args),
                cloning=lambda: m.mean_flow_loss(agent.policy, features, batch["actions"], noise, t),
                q=lambda: m.actor_loss(agent.policy, agent.critic, features, noise, agent.args)[0])[part]()
    agent.zero_grad()
    loss.backward()
    names = "policy_encoder", "critic_encoder", "target_encoder", "policy", "critic", "target_critic"
    return {name for name in names
            if any(p.grad is not None and p.grad.any() for p in getattr(agent, name).parameters())}


def test_each_encoder_learns_from_the_losses_that_it_should():
    """The actor's losses train the policy and its encoder, and the Q term leaves the critics' encoder alone."""
    agent, _ = make_agent()
    assert gradients(agent, "critic") == {"critic", "critic_encoder"}
    assert gradients(agent, "cloning") == {"policy", "policy_encoder"}
    assert gradients(agent, "q") == {"policy", "policy_encoder"}


def test_updates_move_every_encoder():
    agent, args = make_agent(shape=(3, 8, 8, 3))
    frames = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8)
    batch = dict(actions=torch.rand(8, 5) - 0.5, rewards=torch.ones(8), masks=torch.ones(8),
                 stack=torch.randint(0, 10, (8, 4)))
    agent.update(frames, batch)  # the actor's first step size is 0
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.update(frames, batch)
    after = agent.state_dict()
    for name in ("policy_encoder", "critic_encoder", "target_encoder"):
        weight = f"{name}.stacks.0.conv.weight"
        assert not torch.equal(before[weight], after[weight]), name
    for name in agent.target_encoder.state_dict():
        follows = torch.lerp(before[f"target_encoder.{name}"], after[f"critic_encoder.{name}"], args.tau)
        assert torch.allclose(after[f"target_encoder.{name}"], follows, atol=1e-7)


def test_the_algorithm_is_that_of_the_state_script():
    """Letter for letter: a file that says so must not drift."""
    import mfql_offline

    for name in ("gelu", "RMSNorm", "Block", "Policy", "TwinCritic", "sample_time", "mean_flow_output_and_target",
                 "mean_flow_loss", "one_step_action", "best_of_n", "critic_loss", "actor_loss", "losses",
                 "actor_learning_rate", "next_alpha_factor"):
        assert inspect.getsource(getattr(m, name)) == inspect.getsource(getattr(mfql_offline, name)), name


def test_acting_encodes_frames_as_training_does():
    agent, _ = make_agent("--num-candidates", "3")
    frames = torch.randint(0, 256, (16, 3, 64, 64, 3), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    found = agent.act(frames.flatten(1).float(), 3, generator)
    noise = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(0))
    features = agent.features(agent.target_encoder, m.to_planes(frames))
    assert torch.equal(found, m.best_of_n(agent.policy, agent.target_critic, features, noise, agent.args)[0])
    assert agent.act(frames.flatten(1).float(), 1, generator).shape == (16, 5)


# ---------------------------------------------------------------- whole runs
def result(run):
    state = m.load(run)[1]
    keys = "agent", "step", "optimizers", "random_cpu", "evaluated"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: state[key] for key in keys}, [{k: v for k, v in row.items() if k != "charts/UPS"} for row in rows]


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_resuming_is_bit_for_bit(tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "blob.hdf5")
    whole = train(tmp_path / "whole")
    update, calls = m.Agent.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(m.Agent, "update", interrupted)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            parts = train(tmp_path / "parts", code=130)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert m.load(parts)[1]["step"] == 5 and not (parts / "done.json").exists()
    assert m.main(["--resume", str(parts)]) == 0
    assert equal(result(whole), result(parts))
    assert {"eval/episodic_return", "losses/mean_flow"} <= {key for row in result(whole)[1] for key in row}
    assert m.main(["--evaluate", str(whole / "policy.pt")]) == 0


def refused(folder):
    with pytest.raises(m.BadInput) as caught:
        train(folder)
    assert not (folder / "runs").exists()
    return str(caught.value)


@pytest.mark.parametrize("changes, text", [
    (dict(frames=np.zeros((15, 8, 8, 3), np.float32)), "frames are float32"),
    (dict(frames=np.zeros((15, 8, 16, 3), np.uint8)), "shape of the environment's observations"),
    (dict(actions=np.zeros((15, 3))), "actions must be numbers, one row for each frame"),
    (dict(actions=np.full((15, 2), 1.5)), "outside their box or rewards not finite, the first in row 0"),
    (dict(rewards=np.where(np.arange(15) == 7, np.nan, 0)), "first in row 7"),
    (dict(terminals=np.full(15, 2)), "must be 0 or 1"),
    (dict(timeouts=np.ones(15, bool)), "no transition"),
])
def test_bad_files_are_refused(tmp_path, changes, text):
    write(tmp_path / "blob.hdf5", **changes)
    assert text in refused(tmp_path)


def test_a_file_cannot_have_a_module_imported(tmp_path):
    path = write(tmp_path / "blob.hdf5")
    with h5py.File(path, "a") as file:
        file.attrs["env_id"] = "evil:Blob-v0"
    assert "asks for the import of evil" in refused(tmp_path)


def test_without_opengl_there_is_one_line(tmp_path):
    environment = {**os.environ, "MUJOCO_GL": "off", "D4RL_DATASET_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "mfql_offline_pixels.py", "--env-id", TASK, "--no-cuda"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert "pixels need OpenGL, which MUJOCO_GL=off does not give" in line and "apt install libegl1" in line
    assert not list(tmp_path.iterdir())


def test_ogbench_draws_what_the_encoder_takes():
    """One reset and a step of the real task, in a process of its own, where OpenGL is there; nothing on stderr."""
    pytest.importorskip("ogbench")
    code = f"""
import mfql_offline_pixels as m, numpy as np, sys
try:
    import mujoco
    mujoco.GLContext(64, 64).free()
except Exception as error:
    sys.exit(print("skip", error))
task = dict(env_id="FrameStack-v0", kwargs=dict(env_id="data.d4rl_tasks:{TASK}", count=3))
env = m.make_env(task, render_mode="rgb_array")
stacks = [o.reshape(3, 64, 64, 3) for o in (env.reset(seed=1)[0], env.step(np.ones(5, np.float32))[0])]
print(env.render_mode, env.env.env.observation_space.shape, stacks[0].dtype, stacks[0].std() > 5,
      (stacks[0] == stacks[0][0]).all(), (stacks[1][:2] == stacks[0][0]).all(), (stacks[1][2] != stacks[0][0]).any())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "MUJOCO_GL": "egl"})
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert (done.stdout, done.stderr) == ("rgb_array (3, 64, 64, 3) uint8 True True True True\n", "")


def test_task_defaults():
    for world, alpha in (("cube-single", 300), ("cube-double", 100), ("scene", 100), ("puzzle-3x3", 300),
                         ("puzzle-4x4", 300)):
        args = m.parse_args(["--env-id", f"visual-{world}-play-singletask-task1-v0"])[0]
        assert (args.alpha, args.gamma, args.tau, args.offline_steps, args.batch_size, args.eval_interval,
                args.normalize_q_loss, args.q_aggregation, args.frame_stack, args.eval_episodes) == (
                    alpha, 0.99, 0.005, 500_000, 256, 100_000, False, "mean", 3, 50)


# ---------------------------------------------------------------- OGBench's files
def ogbench_file(path, lengths=(6, 5), **changes):
    """In the form of OGBench's: the cube of every second row lies at the goal of task 1."""
    pytest.importorskip("ogbench")
    count, rng = sum(lengths), np.random.default_rng(0)
    terminals = np.zeros(count, bool)
    terminals[np.cumsum(lengths) - 1] = True
    env = fetch.make_env(TASK)
    env.reset()
    qpos = np.zeros((count, env.unwrapped._data.qpos.size), np.float32)
    qpos[::2, 14:17] = env.unwrapped._data.mocap_pos[0]
    arrays = dict(observations=rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8), terminals=terminals,
                  actions=rng.uniform(-1, 1, (count, 5)).astype(np.float32), qpos=qpos,
                  qvel=np.zeros((count, 20), np.float32)) | changes
    np.savez_compressed(path, **arrays)
    return arrays


def test_fetch_makes_a_flat_file_of_frames(tmp_path, capsys, monkeypatch):
    arrays = ogbench_file(tmp_path / "x.npz")
    loaded = []
    get = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda file, key: (loaded.append(key), get(file, key))[1])
    line = fetch.fetch(TASK, tmp_path / "x.npz", tmp_path / "x.hdf5")
    assert "observations" not in loaded and "actions" in loaded  # which would be a copy of 12 GB
    assert line.startswith("wrote 11 rows of visual-cube-single")
    said = capsys.readouterr().err
    assert re.search(r": the flat file will take about .* GB of disk, .* and training 0.000135 GB of memory", said)
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert file.attrs["env_id"] == f"data.d4rl_tasks:{TASK}"
        assert (file["frames"][()] == arrays["observations"]).all() and "observations" not in file
        own = arrays["terminals"]
        assert (file["timeouts"][()] == own).all()
        assert (file["actions"][()][~own] == arrays["actions"][~own]).all()
        at_goal = (np.arange(11) % 2 == 0) & ~own
        assert (file["terminals"][()] == at_goal).all()
        assert (file["rewards"][()][~own] == at_goal[~own] - 1.0).all()


@pytest.mark.parametrize("changes, text", [
    (dict(observations=np.zeros((11, 64, 64, 3), np.float32)), "observations must be bytes"),
    (dict(observations=np.zeros((11, 28), np.uint8)), "observations must be bytes"),
    (dict(observations=np.zeros((10, 64, 64, 3), np.uint8)), "lengths differ"),
    (dict(actions=np.zeros((11, 4), np.float32)), "actions have shape"),
])
def test_fetch_refuses_other_frames(tmp_path, changes, text):
    ogbench_file(tmp_path / "x.npz", **changes)
    with pytest.raises(fetch.BadInput, match=text):
        fetch.fetch(TASK, tmp_path / "x.npz", tmp_path / "x.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_fetch_refuses_a_damaged_file_and_a_full_disk(tmp_path, monkeypatch):
    ogbench_file(tmp_path / "x.npz")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[60_000] ^= 1  # among the frames, which come first
    (tmp_path / "y.npz").write_bytes(data)
    with pytest.raises(fetch.BadInput, match="frames cannot be copied"):
        fetch.fetch(TASK, tmp_path / "y.npz", tmp_path / "x.hdf5")
    (tmp_path / "y.npz").write_bytes(b"no archive")
    with pytest.raises(fetch.BadInput, match="damaged"):
        fetch.fetch(TASK, tmp_path / "y.npz", tmp_path / "x.hdf5")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: fetch.shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(fetch.BadInput, match="1e-06 GB that are free"):
        fetch.fetch(TASK, tmp_path / "x.npz", tmp_path / "x.hdf5")


def test_generator_puts_a_frame_and_what_was_done_there_into_one_row():
    """On the environment without pixels, where the observation can be computed from qpos."""
    pytest.importorskip("ogbench")
    import ogbench.manipspace  # noqa: F401

    from data import collect_pixels

    env = gym.make("cube-single-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=120)
    policies = collect_pixels.make_policies(env, "cube-single")
    np.random.seed(0)
    rows, data = collect_pixels.play(env, policies, 0, seed=3), env.unwrapped._data
    target, again = data.mocap_pos.copy(), env.reset(seed=3)[0]
    assert rows["terminals"] == [False] * 119 + [True] and np.abs(rows["actions"]).max() <= 1
    assert (rows["observations"][0] == again).all() and (rows["qpos"][0] == data.qpos).all()
    assert (target != data.mocap_pos).any()  # a new one after the first plan
    for number in (1, 60, 119):
        joints = rows["observations"][number][:6]  # the arm's, with which the observation begins
        assert joints == pytest.approx(rows["qpos"][number][:6], abs=1e-12)
    cube = np.array(rows["qpos"])[:, 14:17]
    assert np.abs(cube[-1] - cube[0]).max() > 0.05  # it was carried


def test_the_state_script_refuses_frames_in_one_line(tmp_path):
    """Rather than making float32 copies of 12 GB of bytes."""
    import mfql_offline

    write(tmp_path / "blob.hdf5")
    with pytest.raises(mfql_offline.BadInput, match="object 'observations' doesn't exist"):
        mfql_offline.main(["--env-id", "Blob-v0", "--dataset-path", str(tmp_path / "blob.hdf5"), "--runs-dir",
                           str(tmp_path), "--no-cuda"])
