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
import json
import pathlib
import platform
import sys
from dataclasses import dataclass

import gymnasium as gym
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

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


class RMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """MFQL's block at t = 1: attention is one map; gains, shifts and gates are in the maps beside them."""

    def __init__(self, attention, mlp_in, mlp_out):
        super().__init__()
        self.attention, self.mlp_in, self.mlp_out, self.norm = attention, mlp_in, mlp_out, RMSNorm()

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
        return norm.gain * len(norm.gain) ** 0.5 * (1 + scale)

    layers = [linear(policy.embed).times(1, policy.position)]
    for block in policy.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6)
        value = linear(block.value).after(gain(block.norm1, scale1), shift1)
        layers.append(Block(value.then(linear(block.attention_out)).times(gate1),
                            linear(block.mlp_in).after(gain(block.norm2, scale2), shift2),
                            linear(block.mlp_out).times(0.1 * gate2)))
    shift, scale = policy.final_modulation(c).chunk(2)
    return nn.Sequential(*layers, RMSNorm(), linear(policy.final).after(gain(policy.final_norm, scale), shift))


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
    layers = [part for layer in times_in_bias(policy, times) for part in (layer, nn.Mish())]
    return nn.Sequential(*layers, linear(policy.final).times(-1))


def som_policy(policy):
    """The same."""
    layers = []
    for layer, norm in zip(times_in_bias(policy, policy.final.weight.new_tensor([0, 1])), policy.norms):
        layers += [layer, LayerNorm(norm.eps, norm.weight, norm.bias), nn.Mish()]
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
            layers += [maps[i], LayerNorm(1e-5, gain, bias), nn.Tanh() if i == 0 else nn.Mish()] if norms else [
                maps[i], nn.Mish()]
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
    actor = Actor(policy, critics, mean, skip, low, high, getattr(args, "q_aggregation", "min") == "mean")
    return actor.to(agent.obs_mean.dtype)


def draw(script, batch, count, size, generator=None, dtype=torch.float32):
    """The random inputs of an Actor, a tuple: what `Agent.act` draws from a generator of the same state."""
    noise = torch.randn(batch, count, size, generator=generator)
    if script != "ofql_offline" or count == 1:
        return (noise,)
    return noise, -torch.empty(batch, count, dtype=dtype).exponential_(generator=generator).log()


# ---------------------------------------------------------------- files
def load_agent(path):
    """Agent, contents and SHA-256 of a policy, on the CPU."""
    path = path.expanduser()
    path = path / "policy.pt" if path.is_dir() else path
    with blame(f"policy {path}"):
        script = torch.load(path, map_location="cpu", weights_only=True)["script"]
        if script not in SCRIPTS:
            raise BadInput(f"made by {script}, which is none of {', '.join(SCRIPTS)}")
        module = SCRIPTS[script]
        state = mfql_offline.load(path, script)[1]
        args = module.Args(**{**state["args"], "compile": False})
        weights = state["agent"]
        agent = module.Agent(len(weights["obs_mean"]), len(weights["policy.final.bias"]), args, torch.device("cpu"))
        agent.load_state_dict(weights)
        return agent, state, hashlib.sha256(path.read_bytes()).hexdigest()


def about_environment(task, allowed):
    """Action box (low, high) of the environment itself, and what it tells of its observations."""
    module = task["env_id"].rpartition(":")[0]  # Gymnasium imports it
    if module not in ("", "data.d4rl_tasks", "gymnasium_robotics") and task["env_id"] != allowed:
        raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {task['env_id']}")
    with blame(f"environment {task['env_id']}"):
        env = mfql_offline.make_env(task).env  # without the rescaling
        space = env.env.observation_space
        found = dict(space=str(space))
        if isinstance(space, gym.spaces.Dict):
            found["order"] = {key: gym.spaces.flatdim(part) for key, part in space.items()}
        if hasattr(env.unwrapped, "observation_structure"):  # MuJoCo's positions and velocities
            found["structure"] = env.unwrapped.observation_structure
        if hasattr(env.unwrapped, "model"):
            found["units"] = "MuJoCo's: m, rad, s, N as the model defines them"
        return [torch.as_tensor(edge) for edge in (env.action_space.low, env.action_space.high)], found


def check(what, found, wanted, tolerance):
    error = float((found - wanted).abs().max())
    if not error <= tolerance * float(wanted.abs().max()):  # nor NaN
        raise BadInput(f"{what} differs by {error:.1e}, so nothing is written; were the networks changed?")


@torch.no_grad()
def export(agent, script, count, low, high, folder):
    """Writes the files of the policy with `count` candidates and returns what policy.json tells of them."""
    batch, obs_dim, act_dim = 16, len(agent.obs_mean), len(low)
    observations = torch.randn(batch, obs_dim) * getattr(agent, "obs_std", 1) + agent.obs_mean
    exact = copy.deepcopy(agent).double()
    seed = torch.Generator().manual_seed
    expected = exact.act(observations.double(), count, seed(0))
    inputs = observations.double(), *draw(script, batch, count, act_dim, seed(0), torch.float64)
    check("the folded policy", fold(exact)(*inputs), expected, 1e-9)

    actor, inputs = fold(agent, low, high).eval(), tuple(x.float() for x in inputs)
    if count == 1:
        del actor.critics[:]
    expected = actor(*inputs)
    rows = [{0: torch.export.Dim("B", min=1)} for _ in inputs]
    program = torch.export.export(actor, inputs, dynamic_shapes=tuple(rows))
    torch.export.save(program, folder / "policy.pt2")
    check("policy.pt2", torch.export.load(folder / "policy.pt2").module()(*inputs), expected, 1e-6)
    names, shapes = list(INPUTS)[:len(inputs)], [["B", *x.shape[1:]] for x in inputs]
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        print(f"no policy.onnx: pip install {' '.join(missing)}", file=sys.stderr)
    else:
        torch.onnx.export(program, f=folder / "policy.onnx", external_data=False, input_names=names,
                          output_names=["actions"], verbose=False)
    return dict(
        inputs=[dict(name=name, shape=shape, dtype="float32", meaning=INPUTS[name])
                for name, shape in zip(names, shapes)],
        outputs=[dict(name="actions", shape=["B", act_dim], dtype="float32", low=low.tolist(), high=high.tolist())])


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    agent, state, digest = load_agent(args.run)
    flags = agent.args
    count = args.num_candidates or getattr(flags, "num_candidates_eval", None) or flags.num_candidates
    (low, high), about = about_environment(state["task"], args.env_id)
    folder = args.out or (args.run if args.run.is_dir() else args.run.parent)
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    files = export(agent, state["script"], count, low, high, folder)
    versions = dict(python=platform.python_version(), torch=torch.__version__, gymnasium=gym.__version__)
    about = dict(script=state["script"], env_id=state["args"]["env_id"], environment=state["task"], step=state["step"],
                 num_candidates=count, **files, observations=about, versions=versions, sha256=digest)
    (folder / "policy.json").write_text(json.dumps(about, indent=2) + "\n")
    print(folder / "policy.json")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
