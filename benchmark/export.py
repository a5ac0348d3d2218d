"""Writes a trained policy as one file that acts with torch alone, or with onnxruntime.

    python benchmark/export.py runs/RUN                     # RUN/policy.pt2, policy.onnx and policy.json
    python benchmark/export.py runs/RUN --num-candidates 1 --out elsewhere

Normalisation, the choice among N candidates, clipping and the environment's own action box are inside; the noise is an
input, so that the file is a function. Inputs, float32, for any number B of observations:

    observations (B, O)   raw, as the environment gives them (dictionaries flattened as by gymnasium.spaces.flatten)
    noise (B, N, A)       standard normal
    gumbel (B, N)         only of ofql_offline with N > 1, which draws by softmax: minus the log of exponential noise;
                          zeros take the candidate of the largest value instead
    -> actions (B, A)     in the environment's box

policy.json tells them with their sizes, the box, and where the policy comes from. `fold` computes once what does not
depend on the input. The result is compared with `Agent.act` in float64, and the files with the result.
policy.onnx needs: pip install onnx onnxscript
"""
import copy
import hashlib
import importlib.util
import io
import json
import logging
import pathlib
import platform
import sys
from dataclasses import dataclass

import gymnasium as gym
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mfql_offline  # noqa: E402
import mfql_offline_to_online  # noqa: E402
import ofql_offline  # noqa: E402
import som_online  # noqa: E402

SCRIPTS = {module.SCRIPT: module for module in (mfql_offline, mfql_offline_to_online, ofql_offline, som_online)}
BadInput, blame = mfql_offline.BadInput, mfql_offline.blame
INPUTS = dict(
    observations="raw, as the environment gives them (dictionaries flattened as by gymnasium.spaces.flatten)",
    noise="standard normal", gumbel="minus the log of exponential noise; zeros choose the largest value instead")


@dataclass
class Args:
    run: tyro.conf.Positional[pathlib.Path]
    """run folder, of which policy.pt is taken, or a file"""
    num_candidates: int | None = None
    """N, among which the policy chooses; None is what the run evaluates with"""
    out: pathlib.Path | None = None
    """folder for the files; None is the run folder"""
    env_id: str | None = None
    """the policy's environment, module:id, needed only to allow the import of a module of your own"""


# ---------------------------------------------------------------- folding
class Linear(nn.Module):
    """x W + b of rows x. nn.Linear keeps W transposed, which takes up to twice as long for a single row."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight.clone(memory_format=torch.contiguous_format)), nn.Buffer(bias)

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)

    def after(self, gain, shift):
        """This map of gain * x + shift."""
        return Linear(gain.unsqueeze(1) * self.weight, self.bias + shift @ self.weight)

    def then(self, other):
        """The other map of this one."""
        return Linear(self.weight @ other.weight, self.bias @ other.weight + other.bias)

    def times(self, gain, shift=0.0):
        """gain * this map + shift."""
        return Linear(self.weight * gain, self.bias * gain + shift)


class LayerNorm(nn.Module):
    def __init__(self, eps, gain=None, bias=None):
        super().__init__()
        self.eps = eps
        self.gain, self.bias = (None if x is None else nn.Buffer(x.clone()) for x in (gain, bias))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.eps)


class UnitNorm(nn.Module):
    """x / sqrt(|x|^2 + dim eps), the RMS norm but for a factor sqrt(dim), in three operations instead of five."""

    def __init__(self, like):
        super().__init__()
        self.floor = nn.Buffer(torch.full_like(like[0], (1e-6 * len(like)) ** 0.5))

    def forward(self, x):
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)


class Mish(nn.Module):
    """x tanh(log(1 + e^x)), for many rows in a third of the time of torch's."""

    def forward(self, x):
        return torch.addcdiv(x, x, (x.exp() + 1).square() + 1, value=-2)


class Block(nn.Module):
    """MFQL's block at t = 1: attention is one map; gains, shifts and gates are in the maps beside them."""

    def __init__(self, attention, mlp_in, mlp_out):
        super().__init__()
        self.attention, self.mlp_in, self.mlp_out = attention, mlp_in, mlp_out
        self.norm = UnitNorm(attention.bias)

    def forward(self, x):
        y = self.attention(self.norm(x))
        z = self.mlp_out(F.gelu(self.mlp_in(self.norm(x + y)), approximate="tanh"))
        return torch.add(x, y, alpha=0.1) + z


class Actor(nn.Module):
    """The folded policy: raw observations and noise to actions in the box, as the top of this file tells.

    policy: rows of (observation - mean, noise) to actions, to which skip * noise is added if there is a skip;
    critics: two, of (observation - mean, action) to a value.
    """

    def __init__(self, policy, critics, mean, skip, low, high, average):
        super().__init__()
        self.policy, self.critics, self.average = policy, nn.ModuleList(critics), average
        self.mean, self.low, self.high = nn.Buffer(mean), nn.Buffer(low), nn.Buffer(high)
        self.skip = None if skip is None else nn.Buffer(skip)

    def forward(self, observations, noise, gumbel=None):
        batch, count, size = noise.shape
        observations, noise = observations - self.mean, noise.flatten(0, 1)
        if count > 1:
            observations = observations.unsqueeze(1).expand(-1, count, -1).flatten(0, 1)
        actions = self.policy(torch.cat([observations, noise], 1))
        if self.skip is not None:
            actions = torch.addcmul(actions, self.skip, noise)
        actions = torch.clamp(actions, self.low, self.high)
        if count == 1:
            return actions
        first, second = (critic(torch.cat([observations, actions], 1)) for critic in self.critics)
        values = (first + second if self.average else torch.minimum(first, second)).reshape(batch, count)
        index = (values if gumbel is None else values + gumbel).argmax(1)
        return actions.reshape(batch, count, size).gather(1, index.reshape(-1, 1, 1).expand(-1, 1, size)).squeeze(1)


def linear(layer):
    return Linear(layer.weight.T, layer.bias.clone())


def mfql_policy(policy):
    """g(s, e, 1) of rows (s, e)."""
    angles = policy.frequencies
    c = F.silu(policy.time_out(F.silu(policy.time_in(torch.cat([angles.cos(), angles.sin()])))))

    def gain(norm, scale):
        return norm.gain * len(norm.gain) * (1 + scale)

    layers = [linear(policy.embed).times(1, policy.position)]
    for block in policy.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6)
        value = linear(block.value).after(gain(block.norm1, scale1), shift1)
        layers.append(Block(value.then(linear(block.attention_out)).times(gate1),
                            linear(block.mlp_in).after(gain(block.norm2, scale2), shift2),
                            linear(block.mlp_out).times(0.1 * gate2)))
    shift, scale = policy.final_modulation(c).chunk(2)
    final = linear(policy.final).after(gain(policy.final_norm, scale), shift)
    return nn.Sequential(*layers, UnitNorm(policy.position), final)


def times_in_bias(policy, times):
    """The linear maps of OFQL's or SOM's hidden layers; the first one, of (e, times, s), becomes one of (s, e)."""
    first, *hidden = map(linear, policy.hidden)
    sizes = policy.final.out_features, len(times)
    e, t, s = first.weight.split([*sizes, len(first.weight) - sum(sizes)])
    return [Linear(torch.cat([s, e]), first.bias + times @ t), *hidden]


def ofql_policy(policy):
    """-u(e, 0, 1; s) of rows (s, e)."""
    one = policy.frequencies.new_ones(1)
    times = torch.cat([policy.embed(policy.embed_t, one), policy.embed(policy.embed_r, 0 * one)])
    layers = [part for layer in times_in_bias(policy, times) for part in (layer, Mish())]
    return nn.Sequential(*layers, linear(policy.final).times(-1))


def som_policy(policy):
    """The same."""
    layers = []
    for layer, norm in zip(times_in_bias(policy, policy.final.weight.new_tensor([0, 1])), policy.norms):
        layers += [layer, LayerNorm(norm.eps, norm.weight, norm.bias), Mish()]
    return nn.Sequential(*layers, linear(policy.final).times(-1))


def fold_critic(critic, k, script):
    """Q_k of rows (s, a)."""
    maps = [Linear(weight[k], bias[k, 0].clone()) for weight, bias in zip(critic.weights, critic.biases)]
    norms, layers = list(zip(getattr(critic, "norm_gains", ()), getattr(critic, "norm_biases", ()))), []
    for i in range(len(maps) - 1):
        gain, bias = (x[k, 0] for x in norms[i]) if norms else (None, None)
        if script.startswith("mfql"):  # gain and bias go into the next map
            layers += [maps[i], nn.GELU(approximate="tanh"), LayerNorm(1e-6)]
            maps[i + 1] = maps[i + 1].after(gain, bias)
        else:
            layers += [maps[i], LayerNorm(1e-5, gain, bias), nn.Tanh() if i == 0 else Mish()] if norms else [
                maps[i], Mish()]
    return nn.Sequential(*layers, maps[-1])


@torch.no_grad()
def fold(agent, low=None, high=None):
    """The `Actor` that does what `agent.act` does, with the box [low, high] instead of [-1, 1]: exact but for
    rounding, computed in float64 and returned in the agent's dtype. Later updates of the agent do not change it."""
    script, args = type(agent).__module__, agent.args
    source, critic, skip, fold_policy = agent.policy, agent.target_critic, None, mfql_policy
    if script == "ofql_offline":
        source = agent.ema_policy if args.acting_policy == "ema" else agent.policy
        skip, fold_policy = args.noise_temperature, ofql_policy
    elif script == "som_online":
        critic, skip, fold_policy = agent.critic, 1.0, som_policy
    policy = fold_policy(copy.deepcopy(source).double())
    critics = [fold_critic(copy.deepcopy(critic).double(), k, script) for k in range(2)]
    mean = agent.obs_mean.double()
    mean, std = (0 * mean, 0 * mean + 1) if script == "som_online" else (mean, agent.obs_std.double())
    one = mean.new_ones(source.final.out_features)
    low, high = (edge if x is None else x.to(mean) for edge, x in ((-one, low), (one, high)))
    half, center = (high - low) / 2, (high + low) / 2
    # What the networks see is (observation - mean) / std and an action in [-1, 1]. The mean stays out of the maps: it
    # may be many std, which would cost digits.
    noise_gain = one if skip is None else skip * one
    policy[0] = policy[0].after(torch.cat([1 / std, noise_gain]), 0 * torch.cat([std, one]))
    policy[-1] = policy[-1].times(half, center)
    for critic in critics:
        critic[0] = critic[0].after(torch.cat([1 / std, 1 / half]), torch.cat([0 * mean, -center / half]))
        if script == "ofql_offline":
            critic[-1] = critic[-1].times(args.inverse_temperature)
    skip = None if skip is None else skip * half
    actor = Actor(policy, critics, mean, skip, low, high, average=script.startswith("mfql"))
    return actor.to(agent.obs_mean.dtype)


def draw(script, batch, count, size, generator=None, dtype=torch.float32):
    """The random inputs of an Actor, a tuple: what `Agent.act` draws from a generator of the same state."""
    noise = torch.randn(batch, count, size, generator=generator)
    if script != "ofql_offline" or count == 1:
        return (noise,)
    return noise, -torch.empty(batch, count, dtype=dtype).exponential_(generator=generator).log()


# ---------------------------------------------------------------- files
def load_agent(path):
    """Agent and contents of a policy, on the CPU."""
    with blame(f"policy {path}"):
        script = torch.load(path, map_location="cpu", weights_only=True)["script"]
        if script not in SCRIPTS:
            raise BadInput(f"made by {script}, which is none of {', '.join(SCRIPTS)}")
        state = mfql_offline.load(path, script)[1]
        args, weights = SCRIPTS[script].Args(**{**state["args"], "compile": False}), state["agent"]
        sizes = len(weights["obs_mean"]), len(weights["policy.final.bias"])
        agent = SCRIPTS[script].Agent(*sizes, args, torch.device("cpu"))
        agent.load_state_dict(weights)
        return agent, state


def environment(task, allowed):
    """The environment's own action box (low, high), and what is known of its observations."""
    module = task["env_id"].rpartition(":")[0]  # Gymnasium imports it
    if module not in ("", "data.d4rl_tasks", "gymnasium_robotics") and task["env_id"] != allowed:
        raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {task['env_id']}")
    with blame(f"environment {task['env_id']}"):
        env = mfql_offline.make_env(task).env  # without its last wrapper, which rescales the actions
        space, about = env.unwrapped.observation_space, {}
        if isinstance(space, gym.spaces.Dict):
            about["order"] = {key: gym.spaces.flatdim(part) for key, part in space.items()}
        if hasattr(env.unwrapped, "observation_structure"):
            about["structure"] = env.unwrapped.observation_structure  # of MuJoCo's positions and velocities
        if isinstance(env.unwrapped, MujocoEnv):
            about["units"] = "those of the MuJoCo model: m, rad and s in Gymnasium's"
        return torch.as_tensor(env.action_space.low), torch.as_tensor(env.action_space.high), about


def check(what, found, wanted, tolerance):
    error = float((found - wanted).abs().max())
    if not error <= tolerance * float(wanted.abs().max()):  # nor NaN
        raise BadInput(f"{what} differs by {error:.1e}, so nothing is written: are the networks the script's?")


@torch.no_grad()
def export(agent, script, count, low, high):
    """The policy with `count` candidates as an ExportedProgram, that as bytes, and the inputs it was tried with."""
    batch, seeded = 16, torch.Generator().manual_seed
    observations = torch.randn(batch, len(agent.obs_mean)) * getattr(agent, "obs_std", 1) + agent.obs_mean
    exact = copy.deepcopy(agent).double()
    expected = exact.act(observations.double(), count, seeded(0))
    inputs = observations.double(), *draw(script, batch, count, len(low), seeded(0), torch.float64)
    check("the folded policy", fold(exact)(*inputs), expected, 1e-6)
    actor, inputs = fold(agent, low, high).eval(), tuple(x.float() for x in inputs)
    if count == 1:
        del actor.critics[:]
    rows, file = tuple({0: torch.export.Dim("B", min=1)} for _ in inputs), io.BytesIO()
    program = torch.export.export(actor, inputs, dynamic_shapes=rows)
    torch.export.save(program, file)
    check("policy.pt2", torch.export.load(file).module()(*inputs), actor(*inputs), 1e-6)
    return program, file.getvalue(), inputs


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n")[0])
    path = args.run.expanduser()
    path = path / "policy.pt" if path.is_dir() else path
    agent, state = load_agent(path)
    flags, (low, high, about) = agent.args, environment(state["task"], args.env_id)
    count = getattr(flags, "num_candidates_eval", None) or flags.num_candidates  # as the script evaluates
    count = count if args.num_candidates is None else args.num_candidates
    if not 1 <= count <= 10_000:
        raise BadInput(f"--num-candidates {count} must lie between 1 and 10,000")
    program, contents, inputs = export(agent, state["script"], count, low, high)
    names = list(INPUTS)[:len(inputs)]
    out = (args.out or path.parent).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    (out / "policy.pt2").write_bytes(contents)
    (out / "policy.onnx").unlink(missing_ok=True)
    if all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # minds torchvision
        from onnxscript import opset18 as op

        hypot = {torch.ops.prims.hypot.default: lambda x, y: op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))}
        torch.onnx.export(program, f=out / "policy.onnx", external_data=False, verbose=False, input_names=names,
                          output_names=["actions"], custom_translation_table=hypot)
    else:
        print("no policy.onnx: pip install onnx onnxscript", file=sys.stderr)
    about = dict(
        script=state["script"], env_id=flags.env_id, environment=state["task"], step=state["step"],
        num_candidates=count, observation_dim=len(agent.obs_mean), action_dim=len(low),
        inputs=[dict(name=name, shape=["B", *x.shape[1:]], dtype="float32", meaning=INPUTS[name])
                for name, x in zip(names, inputs)],
        outputs=[dict(name="actions", shape=["B", len(low)], dtype="float32", low=low.tolist(), high=high.tolist())],
        observations=about, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, gymnasium=gym.__version__))
    (out / "policy.json").write_text(json.dumps(about, indent=2) + "\n")
    print(out / "policy.json")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
