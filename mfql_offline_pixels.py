"""MFQL on pixels: MeanFlow Q-learning, offline, for OGBench's five visual-* tasks, in one file.

Paper: Wang, Li, Chen, Shi, Bai, Yu, Fu, "One-Step Generative Policies with Q-Learning: A Reformulation of MeanFlow",
AAAI 2026, arXiv 2511.13035. Its pixel tasks follow FQL: seohongpark/fql (JAX), commit 719d044.

The algorithm is that of `mfql_offline.py`, which explains the equations (1) to (9) and its deviations: networks,
losses and schedules stand here in the same text. Only what they call observations differs: *features*, which two
encoders, the policy's and the critics', make of three stacked frames, side by side in one tensor. Each network takes
its own half (`OwnFeatures`), so the critic loss trains the critics' encoder, the actor loss the policy's, and the Q
term of Eq. (7) leaves the critics' encoder alone. The target critic has an encoder of its own, which follows slowly.

  - an observation is the last three frames, oldest first, on the channels; an episode's first frame is repeated
  - for half of the batches all frames of a row, next observation included, are shifted by up to 3 pixels (random crop)
  - frames are divided by 255; there is no other normalisation
  - the replay holds each frame once, as bytes, where the training runs: rows refer to frames by their numbers

FQL's alpha per task is used, since MFQL's are unpublished. Why this is a file of its own, and what a run costs:
`docs/pixels.md`.
"""
import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), sys.exit(130)))  # also in the imports

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import grad_and_value, jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem
UPDATES_PER_REPLAY = 10  # gradient steps of one CUDA graph
gym.logger.min_level = gym.logger.ERROR  # else it advises against Hopper-v4 and the like, which D4RL's tasks need


@dataclass
class Args:
    env_id: str = "visual-cube-single-play-singletask-task1-v0"
    """an OGBench task that observes pixels, or a Gymnasium id of an environment whose observations are frames together
    with --dataset-path"""
    dataset_path: str | None = None
    """the data, if not at the usual place: a flat HDF5 file with `frames`, as data/fetch.py writes it"""

    # ---- experiment: the same in every script ----
    seed: int = 1
    """seed of the networks, the batches, the noise and the evaluation episodes"""
    cuda: bool = True
    """train on the first CUDA GPU if there is one, else on the CPU (says so in one line)"""
    compile: bool = False
    """compile the losses with torch.compile: faster after about half a minute (needs a C++ compiler on the CPU)"""
    cuda_graph: bool = True
    """on a GPU, replay gradient steps as a CUDA graph, offline ten at a time: make all intervals multiples of ten"""
    torch_deterministic: bool = True
    """refuse operations that are not deterministic, so that equal seeds give equal numbers on one machine"""
    track: bool = False
    """also log to Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline work as usual"""
    capture_video: bool = False
    """record the first episode of every evaluation under videos/ of the run folder (pip install moviepy)"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    run_name: str | None = None
    """name of the run folder; None is <env-id>__<script>__<seed>, which the same command finds again"""
    log_interval: int = 1000
    """steps (offline: gradient steps, online: environment steps) between two rows of losses in metrics.jsonl"""
    eval_interval: int = 50_000
    """steps between two evaluations; evaluating never changes the training"""
    eval_episodes: int = 50
    """episodes per evaluation, each with its own seed"""
    checkpoint_interval: int = 10_000
    """steps between two checkpoints; one is also written at the end and on Ctrl-C, SIGTERM and SIGHUP"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue bit for bit, with its flags unless given anew; auto: this command's run
    folder if it holds a checkpoint, else start it"""
    evaluate: str | None = None
    """run folder, checkpoint.pt or policy.pt: evaluate it for --eval-episodes episodes, print the result and exit"""

    # ---- algorithm ----
    offline_steps: int = 500_000
    """number of gradient steps W; the actor's learning rate decays over them"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (6)"""
    tau: float = 0.005
    """Polyak rate of the target critic and its encoder, after every step"""
    reward_scale: float = 1.0
    """factor on the rewards in training; large returns (thousands) keep the critic from catching up with its target"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training"""
    frame_stack: int = 3
    """frames of an observation"""
    random_crop: bool = True
    """shift the frames of every second batch, on average, by up to 3 pixels"""
    encoder_channels: int = 16
    """channels of the encoders' first stack; the second and the third have twice as many"""
    encoder_width: int = 512
    """number of features that an encoder makes of an observation"""
    policy_width: int = 256
    """width of the policy's hidden layers"""
    policy_depth: int = 3
    """number of the policy's residual blocks"""
    critic_width: int = 512
    """width of the critic's hidden layers"""
    critic_depth: int = 4
    """number of the critic's hidden layers"""
    num_candidates: int = 5
    """N of Eq. (5), wherever the flags below do not say otherwise"""
    num_candidates_eval: int | None = None
    """N when acting; None is --num-candidates. The final evaluation also reports N = 1"""
    num_candidates_target: int | None = None
    """N in the Bellman target, Eq. (6); None is --num-candidates"""
    alpha: float = 300.0
    """weight of the cloning loss in the actor loss, Eq. (7): larger stays closer to the data"""
    alpha_schedule: Literal["adaptive", "constant", "cosine"] = "adaptive"
    """adaptive: Eq. (9), the paper's; constant: alpha throughout; cosine: alpha decays to a tenth over the run"""
    normalize_q_loss: bool = False
    """divide the Q term of Eq. (7) by its own size, see mfql_offline.py; the alphas below are for the plain one"""
    q_aggregation: Literal["mean", "min"] = "mean"
    """how the two target critics become the one value of Eq. (6)"""
    time_steps: int = 50
    """T: t is drawn from {1/T, ..., 1}; above 1000 uniformly from [0, 1)"""
    bound_weight: float = 1.0
    """weight of L_bound, Eq. (8)"""
    actor_learning_rate: float = 1e-4
    """peak of the actor's Adam step size: linear warm-up over 5 % of the run, then a cosine down to a tenth of it"""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic, constant"""


RANGES = {  # least and largest value, for all scripts; other whole numbers 1 to a billion, other numbers 1e-12 to 1e9
    **dict.fromkeys(("gamma", "ema_rate", "flow_ratio", "adaptive_power"), (0, 1)), "tau": (1e-9, 1),
    **dict.fromkeys(("ema_start", "online_steps", "learning_starts"), (0, 10**9)), "seed": (0, 2**63 - 1),
    **dict.fromkeys(("alpha", "online_alpha", "eta", "bound_weight", "exploration_noise", "weight_decay",
                     "inverse_temperature", "noise_temperature"), (0, 1e9)), "reward_shift": (-1e9, 1e9),
    "utd": (1e-6, 1000), "batch_size": (1, 10**6), "policy_depth": (1, 1000), "critic_depth": (1, 1000),
    **dict.fromkeys(("eval_episodes", "num_envs", "policy_width", "critic_width", "num_candidates", "num_proposals",
                     "num_candidates_eval", "num_candidates_target"), (1, 10_000)),
}
ALPHA = {"cube-single": 300.0, "cube-double": 100.0, "scene": 100.0, "puzzle-3x3": 300.0, "puzzle-4x4": 300.0}  # FQL's
CROP = 3  # pixels that a random crop shifts at most


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict; a name that nothing is known of gets those of the class."""
    match = re.fullmatch(r"visual-(.+)-play-singletask(-task[1-5])?-v0", env_id)
    return dict(alpha=ALPHA[match[1]], eval_interval=100_000) if match and match[1] in ALPHA else {}


# ---------------------------------------------------------------- networks
def gelu(x):
    """GELU, tanh form: x (1 + tanh(y)) / 2 = x sigmoid(2 y), and the sigmoid is the cheaper of the two."""
    return x * torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))


class RMSNorm(nn.Module):
    """x / rms(x) * sqrt(dim) * gain. The factor sqrt(dim) is the authors' and makes the output's RMS sqrt(dim)."""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.gain * len(self.gain) ** 0.5)


class Block(nn.Module):
    """Transformer block with adaLN modulation on a single token, where attention is exactly two linear maps."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.value, self.attention_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        """x: (..., H) token, c: (..., H) or (1, H) activated time embedding; returns (..., H)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, -1)
        y = x + gate1 * self.attention_out(self.value(self.norm1(x) * (1 + scale1) + shift1))
        y = y + gate2 * self.mlp_out(gelu(self.mlp_in(self.norm2(y) * (1 + scale2) + shift2)))
        return x + 0.1 * (y - x)


class Policy(nn.Module):
    """g(s, z, t), the authors' one-token diffusion transformer; zero everywhere at initialisation."""

    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Linear(obs_dim + act_dim, width)
        self.position = nn.Parameter(0.005 * torch.randn(width))
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_norm, self.final_modulation = RMSNorm(width), nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, act_dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                # realised standard deviation sqrt(0.01 / fan_in): truncation at two sigma takes 12 % of it away
                sigma = (0.01 / layer.in_features) ** 0.5 / 0.87962566
                nn.init.trunc_normal_(layer.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
                nn.init.zeros_(layer.bias)
        for layer in (self.final, self.final_modulation, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)

    def forward(self, observations, z, t):
        """observations (..., O), z (..., A), t (..., 1) in [0, 1]; returns (..., A).

        A t of shape (1, 1) is embedded once and broadcast, which halves the cost of one-step actions.
        """
        angles = t * self.frequencies  # t is not rescaled
        c = F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1)))
        c = F.silu(self.time_out(c))
        x = self.embed(torch.cat([observations, z], -1)) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c).chunk(2, -1)
        return self.final(self.final_norm(x) * (1 + scale) + shift)


class TwinCritic(nn.Module):
    """Two independent critics Q_1, Q_2, each (Linear, GELU, LayerNorm) x depth and Linear, as batched products."""

    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        sizes = [obs_dim + act_dim, *[width] * depth, 1]
        self.weights = nn.ParameterList(torch.empty(2, i, o) for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(2, 1, o) for o in sizes[1:])
        self.norm_gains = nn.ParameterList(torch.ones(2, 1, width) for _ in range(depth))
        self.norm_biases = nn.ParameterList(torch.zeros(2, 1, width) for _ in range(depth))
        for weight in self.weights:
            for w in weight.data:
                nn.init.xavier_uniform_(w)

    def forward(self, observations, actions):
        """observations (..., O), actions (..., A); returns both values, (2, ...)."""
        x = torch.cat([observations, actions], -1)
        shape = x.shape[:-1]
        x = x.flatten(0, -2).expand(2, -1, -1)
        for i, (gain, bias) in enumerate(zip(self.norm_gains, self.norm_biases)):
            x = gelu(torch.baddbmm(self.biases[i], x, self.weights[i]))
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain + bias
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).reshape(2, *shape)


class Stack(nn.Module):
    """A stack of the IMPALA encoder: convolution, max-pooling to half the size, residual block."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        self.residual1, self.residual2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        """x: (B, I, H, W), even sizes; returns (B, C, H / 2, W / 2)."""
        x = F.pad(self.conv(x), (0, 1, 0, 1), value=-math.inf)  # JAX's SAME pads even sizes at right and bottom
        x = F.max_pool2d(x, 3, 2)
        return x + self.residual2(F.relu(self.residual1(F.relu(x))))


class Encoder(nn.Module):
    """Features of a stack of frames: FQL's `impala_small`."""

    def __init__(self, frames_shape, channels, width):
        super().__init__()
        count, height, frame_width, colours = frames_shape
        sizes = count * colours, channels, 2 * channels, 2 * channels
        self.stacks = nn.Sequential(*(Stack(i, o) for i, o in zip(sizes, sizes[1:])))
        self.out = nn.Linear(sizes[-1] * (height // 8) * (frame_width // 8), width)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, planes):
        """planes: (B, F C, H, W), colours from 0 to 255; returns (B, width)."""
        return gelu(self.out(F.relu(self.stacks(planes.float() / 255)).flatten(1)))


class OwnFeatures(nn.Module):
    """A network that takes its half of the features of both encoders, (..., 2 width), for its observations."""

    def __init__(self, network, half):
        super().__init__()
        self.network, self.half = network, half

    def forward(self, features, *inputs):
        return self.network(features.chunk(2, -1)[self.half], *inputs)


# ---------------------------------------------------------------- frames
def crop_offsets(batch_size, device):
    """By how many pixels frames are shifted, (B, 2) in -CROP..CROP; for half of the batches by none."""
    coin = torch.rand((), device=device) < 0.5
    return torch.where(coin, torch.randint(-CROP, CROP + 1, (batch_size, 2), device=device), 0)


def gather(frames, stack, offsets):
    """The frames of `frames` (N, H, W, C) with the numbers `stack` (B, F), shifted by their row's offsets (B, 2) with
    the edge repeated: (B, F, H, W, C)."""
    (height, width), device = frames.shape[1:3], frames.device
    rows = (torch.arange(height, device=device) + offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=device) + offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    return frames[stack[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def to_planes(frames):
    """(B, F, H, W, C) to (B, F C, H, W), oldest frame first."""
    return frames.permute(0, 1, 4, 2, 3).flatten(1, 2)


# ---------------------------------------------------------------- algorithm: that of mfql_offline.py
def sample_time(batch_size, time_steps, device):
    """t of shape (B, 1): uniform on {1/T, ..., 1}, or on [0, 1) when T > 1000."""
    if time_steps > 1000:
        return torch.rand(batch_size, 1, device=device)
    return torch.randint(1, time_steps + 1, (batch_size, 1), device=device) / time_steps


def mean_flow_output_and_target(policy, observations, actions, noise, t):
    """The network's output at (s, z_t, t) and its stop-gradient regression target, both (B, A)."""
    z_t, v = (1 - t) * actions + t * noise, noise - actions  # Eq. (1): z_t = (1 - t) a + t e, v = e - a
    g, dg_dt = jvp(lambda z, t: policy(observations, z, t), (z_t, t),
                   (v, torch.ones_like(t)))  # Eq. (2): dg/dt = v ∂g/∂z + ∂g/∂t
    g_tgt = z_t + (t - 1) * v - t * dg_dt  # Eq. (2): g_tgt = z_t + (t - 1) v - t dg/dt
    return g, g_tgt.detach().clamp(-5, 5)


def mean_flow_loss(policy, observations, actions, noise, t):
    """L_MFI, Eq. (3): a scalar."""
    g, g_tgt = mean_flow_output_and_target(policy, observations, actions, noise, t)
    d = (g - g_tgt).square().mean(-1)  # (B,)
    return ((d.detach() + 1e-4) ** -0.2 * d).mean()  # Eq. (3): L_MFI = mean sg[(d + c)^-p] d


def one_step_action(policy, observations, noise):
    """g(s, e, 1) before clipping, (..., A): one evaluation of the network. Eq. (4)"""
    return policy(observations, noise, noise.new_ones(1, 1))


def best_of_n(policy, target_critic, observations, noise, args):
    """Of the actions made from noise (B, N, A), the one that the target critic likes best. Eq. (5)

    Returns the actions (B, A) and their target values (B,).
    """
    observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
    candidates = one_step_action(policy, observations, noise).clamp(-1, 1)  # Eq. (4): clip(g(s, e, 1), -1, 1)
    q = target_critic(observations, candidates)  # (2, B, N)
    index = q.mean(0).argmax(1)  # Eq. (5): argmax_i Q'(s, a(e_i))
    rows = torch.arange(len(index), device=index.device)
    q_best = q[:, rows, index]  # (2, B)
    return candidates[rows, index], q_best.mean(0) if args.q_aggregation == "mean" else q_best.amin(0)


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (6): a scalar. next_noise: (B, N, A)."""
    with torch.no_grad():
        q_next = best_of_n(policy, target_critic, batch["next_observations"], next_noise, args)[1]
        y = batch["rewards"] + args.gamma * batch["masks"] * q_next  # Eq. (6): y = r + gamma (1 - done) Q'
    return (critic(batch["observations"], batch["actions"]) - y).square().mean()  # Eq. (6): mean_k (Q_k - y)^2


def actor_loss(policy, critic, observations, noise, args):
    """The first two terms of Eq. (7) and the mean value of the policy's actions: three scalars."""
    g = one_step_action(policy, observations, noise)
    bound = F.relu(g - 1).mean() + F.relu(-1 - g).mean()  # Eq. (8): L_bound = mean relu(g - 1) + mean relu(-1 - g)
    actions = g.clamp(-1, 1)
    with torch.no_grad():  # by the critic's parameters; grad_and_value derives by the actions all the same
        dq_da, q = grad_and_value(lambda a: critic(observations, a).mean(0).sum())(actions)
    q = q / len(actions)
    scale = dq_da.square().mean().sqrt().clamp(min=1e-6) * dq_da.shape[-1] if args.normalize_q_loss else 1.0
    l_q = -q - (dq_da * (actions - actions.detach())).sum(-1).mean()  # -q; the bracket is 0, its gradient dq_da
    return l_q / scale, bound, q


def losses(policy, critic, target_critic, batch, draws, alpha, args):
    """The sum of all losses, to be differentiated once, and a dict of its parts."""
    noise, t, actor_noise, next_noise = draws
    l_critic = critic_loss(policy, critic, target_critic, batch, next_noise, args)
    l_mfi = mean_flow_loss(policy, batch["observations"], batch["actions"], noise, t)
    l_q, l_bound, q = actor_loss(policy, critic, batch["observations"], actor_noise, args)
    l_actor = l_q + args.bound_weight * l_bound + alpha * l_mfi  # Eq. (7): -mean Q + L_bound + alpha L_MFI
    parts = dict(critic=l_critic, q=l_q, bound=l_bound, mean_flow=l_mfi, q_mean=q)
    return l_critic + l_actor, {name: value.detach() for name, value in parts.items()}


def actor_learning_rate(step, args):
    """Step size of gradient step number `step` (from 0), tensors: linear from 0, a cosine to a tenth, then that."""
    warmup = int(0.05 * args.offline_steps)
    progress = ((step - warmup) / max(args.offline_steps - warmup, 1)).clamp(0, 1)
    cosine = 0.1 + 0.9 * 0.5 * (1 + torch.cos(math.pi * progress))
    return args.actor_learning_rate * torch.where(step < warmup, step / max(warmup, 1), cosine)


def next_alpha_factor(factor, history, l_mfi, step, args):
    """alpha / --alpha and the window after gradient step number `step` (from 1), all tensors, so that a CUDA graph can
    hold the rule: torch.where instead of `if`. `history`: the last 20 checked losses, -1 where there is none yet."""
    if args.alpha_schedule == "cosine":
        progress = (step / args.offline_steps).clamp(max=1)
        return 0.1 + 0.9 * 0.5 * (1 + torch.cos(math.pi * progress)), history
    if args.alpha_schedule == "constant":
        return factor, history
    check, seen = step % 2000 == 0, history >= 0
    average = torch.where(seen, history, 0).sum() / seen.sum()
    ready = check & (step >= int(0.1 * args.offline_steps)) & (seen.sum() >= 2)
    raised, lowered = (1.2 * factor).clamp(max=10), (0.8 * factor).clamp(min=0.1)
    factor = torch.where(ready & (l_mfi > 5 * average), raised, factor)  # Eq. (9): 1.2 alpha if L_MFI > 5 avg
    factor = torch.where(ready & (l_mfi < average / 5), lowered, factor)  # Eq. (9): 0.8 alpha if L_MFI < avg / 5
    return factor, torch.where(check, torch.cat([history[1:], l_mfi.reshape(1)]), history)


class Agent(nn.Module):
    """Encoders, networks, optimisers and schedules of MFQL: `update` is one gradient step, `act` is Eq. (5)."""

    def __init__(self, frames_shape, act_dim, args, device):
        super().__init__()
        self.args, self.frames_shape, self.act_dim = args, frames_shape, act_dim
        self.policy_encoder, self.critic_encoder, self.target_encoder = (
            Encoder(frames_shape, args.encoder_channels, args.encoder_width) for _ in range(3))
        self.policy = OwnFeatures(Policy(args.encoder_width, act_dim, args.policy_width, args.policy_depth), 0)
        self.critic, self.target_critic = (
            OwnFeatures(TwinCritic(args.encoder_width, act_dim, args.critic_width, args.critic_depth), 1)
            for _ in range(2))
        self.target_encoder.load_state_dict(self.critic_encoder.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_encoder.requires_grad_(False)
        self.target_critic.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # counted on the device, for the schedules
        self.register_buffer("alpha_factor", torch.ones(()))
        self.register_buffer("alpha_history", torch.full((20,), -1.0))
        self.register_buffer("obs_mean", torch.zeros(()))  # nothing is subtracted; tells `evaluate` the device
        self.to(device)
        self.actor_parameters = [*self.policy.parameters(), *self.policy_encoder.parameters()]
        self.critic_parameters = [*self.critic.parameters(), *self.critic_encoder.parameters()]
        self.target_parameters = [*self.target_critic.parameters(), *self.target_encoder.parameters()]
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=torch.zeros((), device=device), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic_parameters, lr=args.critic_learning_rate, **adam)
        self.losses = torch.compile(losses) if args.compile else losses

    def features(self, critic_encoder, planes):
        """What both encoders see in (B, F C, H, W), side by side as `OwnFeatures` wants it: (B, 2 width)."""
        return torch.cat([self.policy_encoder(planes), critic_encoder(planes)], -1)

    def update(self, frames, batch):
        """One gradient step on rows of the replay, whose frames are among `frames`; returns the losses as device
        scalars."""
        args, device, (batch_size, act_dim) = self.args, self.obs_mean.device, batch["actions"].shape
        draws = (
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
            sample_time(batch_size, args.time_steps, device),
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (7)
            torch.randn(batch_size, args.num_candidates_target or args.num_candidates, act_dim, device=device),
        )
        offsets = crop_offsets(batch_size, device) * args.random_crop
        planes, colours = to_planes(gather(frames, batch["stack"], offsets)), self.frames_shape[-1]
        with torch.no_grad():
            next_features = self.features(self.target_encoder, planes[:, colours:])
        features = self.features(self.critic_encoder, planes[:, :-colours])
        batch = {**batch, "observations": features, "next_observations": next_features}
        alpha = args.alpha * self.alpha_factor
        total, parts = self.losses(self.policy, self.critic, self.target_critic, batch, draws, alpha, args)
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.actor_parameters, 1.0)
        nn.utils.clip_grad_norm_(self.critic_parameters, 1.0)
        self.actor_optimizer.param_groups[0]["lr"].copy_(actor_learning_rate(self.updates, args))
        self.actor_optimizer.step()
        self.critic_optimizer.step()
        with torch.no_grad():  # else the target would carry the history of every update
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, args.tau)
        self.updates += 1
        factor, history = next_alpha_factor(self.alpha_factor, self.alpha_history, parts["mean_flow"], self.updates,
                                            args)
        self.alpha_factor.copy_(factor)
        self.alpha_history.copy_(history)
        return parts

    @torch.no_grad()
    def act(self, observations, num_candidates, generator):
        """Best of `num_candidates` one-step actions, (B, A) in [-1, 1], for flattened frames (B, F H W C). Eq. (5)"""
        planes = to_planes(observations.unflatten(1, self.frames_shape))
        features = self.features(self.target_encoder, planes)  # encoded once for all candidates
        noise = torch.randn(len(features), num_candidates, self.act_dim, device=features.device, generator=generator)
        if num_candidates == 1:
            return one_step_action(self.policy, features, noise[:, 0]).clamp(-1, 1)  # Eq. (4)
        return best_of_n(self.policy, self.target_critic, features, noise, self.args)[0]

    def charts(self):
        """What the log shows besides the losses."""
        return {"charts/alpha": self.args.alpha * self.alpha_factor.item(),
                "charts/actor_learning_rate": self.actor_optimizer.param_groups[0]["lr"].item()}


# ---------------------------------------------------------------- data and environment
class BadInput(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""


@contextlib.contextmanager
def blame(what):
    """Whatever fails in here is the fault of `what`, something that the user can mend: no traceback."""
    try:
        yield
    except Exception as error:
        # the first sentence of two lines: torch's second one advises to run what a file says
        first = "\n".join(f"{type(error).__name__}: {error}".splitlines()[:2]).split(". ")[0]
        text = str(error) if isinstance(error, BadInput) else first
        hint = f" (pip install {error.name} mujoco==3.11.0)" if isinstance(error, ImportError) and error.name else ""
        raise BadInput(f"{what}: {text}{hint}") from error


def frame_stack(env_id, count, **kwargs):
    """The environment whose observations are its last `count` frames, oldest first."""
    return gym.wrappers.FrameStackObservation(gym.make(env_id, **kwargs), count)


gym.register("FrameStack-v0", entry_point=frame_stack, disable_env_checker=True)


def find_frames(env_id, path, count):
    """Task and file of a name. A task is plain values, so that a checkpoint can hold it."""
    import h5py

    usual = pathlib.Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser() / f"flat/{env_id}.hdf5"
    fetch = pathlib.Path(__file__).with_name("data") / "fetch.py"
    if path is None and not usual.exists() and fetch.exists() and (
            code := subprocess.run([sys.executable, fetch, env_id]).returncode):
        sys.exit(code)  # it has said why
    path = path or usual
    if not path.is_file():
        raise BadInput(f"{path} is no file: make it with data/fetch.py, or name one with --dataset-path")
    with h5py.File(path) as file:
        recorded_in = file.attrs.get("env_id")
    if str(recorded_in).endswith(f":{env_id}"):
        env_id = recorded_in  # data/fetch.py puts the module before it that knows the task
    if recorded_in is not None and recorded_in.split("-v")[0] != env_id.split("-v")[0]:
        raise BadInput(f"{path} was recorded in {recorded_in}, not in {env_id}")
    return dict(env_id="FrameStack-v0", kwargs=dict(env_id=env_id, count=count), reference=None), path


def load_frames(env, path, device):
    """The frames (N, H, W, C) of a file, as bytes on the device, its transitions and what is to be known of them.

    A row of the file is a frame and what was done there. timeouts = 1 ends an episode: it has no next frame and is
    left out. terminals = 1 says that the task is done, after which OGBench's episodes go on. A transition's `stack`
    (F + 1) holds the numbers of its observation's frames and of the next frame; actions (A,) lie in (-1, 1).
    """
    import h5py

    box, digest, (count, *shape) = env.env.action_space, hashlib.sha256(), env.env.env.observation_space.shape
    keys = "actions", "rewards", "terminals", "timeouts"
    with h5py.File(path) as file:
        source, columns = file["frames"], {key: file[key][()] for key in keys}
        fits = source.dtype == np.uint8 and list(source.shape[1:]) == shape and len(shape) == 3
        if not fits or any(side % 8 for side in shape[:2]):
            raise BadInput(f"{path}: frames are {source.dtype} {source.shape[1:]}; it takes bytes in the shape of the "
                           f"environment's observations, {tuple(shape)}, with sides that are multiples of 8")
        for key, column in columns.items():
            digest.update(np.ascontiguousarray(column))
            if column.dtype.kind not in "biuf" or column.shape != source.shape[:1] + box.shape * (key == "actions"):
                raise BadInput(f"{path}: {key} must be numbers, one row for each frame, not {file[key]}")
        frames = torch.empty(source.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(source), 4096):  # 50 MB; all at once would be a second copy
            block = source[first:first + 4096]
            digest.update(block)
            frames[first:first + len(block)] = torch.as_tensor(block)
    actions, rewards, terminals, timeouts = columns.values()
    actions = 2 * (actions - box.low) / (box.high - box.low) - 1
    if not (np.isin(terminals, (0, 1)).all() and np.isin(timeouts, (0, 1)).all()):
        raise BadInput(f"{path}: terminals and timeouts must be 0 or 1")
    if (bad := ~(np.abs(actions) < 1 + 1e-4).all(1) | ~np.isfinite(rewards)).any():
        raise BadInput(f"{path}: actions outside their box or rewards not finite, the first in row {bad.argmax()}")
    rows, ends = np.flatnonzero(timeouts[:-1] == 0), np.flatnonzero(timeouts) + 1
    if len(rows) == 0 or len(ends) == 0:
        raise BadInput(f"{path}: no transition, or no episode ends: all timeouts are 0")
    starts = np.append(0, ends)
    first = starts[np.searchsorted(starts, rows, side="right") - 1]  # frame of the row's episode
    stack = np.stack([*(np.maximum(rows - i, first) for i in reversed(range(count))), rows + 1], axis=1)
    data = dict(actions=actions[rows].clip(-1 + 1e-5, 1 - 1e-5), rewards=rewards[rows], masks=1.0 - terminals[rows])
    data = {key: torch.as_tensor(value, dtype=torch.float32, device=device) for key, value in data.items()}
    data["stack"] = torch.as_tensor(stack, device=device)
    returns = [episode.sum() for episode in np.split(rewards, ends)[:len(ends)]]
    quarter = np.sort(returns)[3 * len(returns) // 4:]
    return frames, data, dict(sha256=digest.hexdigest(), transitions=len(rows), episodes=len(returns),
                              mean_return=float(np.mean(returns)), best_quarter=float(np.mean(quarter)),
                              best=float(max(returns)), worst=float(min(returns)))


def make_env(task, **kwargs):
    """The environment of a task with flat observations and actions in [-1, 1]; kwargs go to gymnasium.make."""
    env = gym.wrappers.FlattenObservation(gym.make(task["env_id"], **task["kwargs"], **kwargs))
    if len(env.action_space.shape) != 1:
        raise BadInput(f"actions must be vectors of numbers, not {env.action_space}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))  # minds what has no bounds


# ---------------------------------------------------------------- replay
def sample(replay, batch_size, first=0, end=None):
    """A uniform batch, with replacement, of the rows first .. end - 1, drawn where the replay tensors live; `end` may
    be a scalar of the device, so that it can grow under a captured graph."""
    end = len(replay["rewards"]) if end is None else end
    index = first + torch.randint(2**62, (batch_size,), device=replay["rewards"].device) % (end - first)
    return {key: value[index] for key, value in replay.items()}


def capture(function, count):
    """`count` calls of `function` as one CUDA graph: returns a function that replays them and returns the last result.

    `function` must have run before, must read its state from tensors alone, and may not wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # where it has run before
        for _ in range(count):
            result = function()
    return lambda: (graph.replay(), result)[1]


# ---------------------------------------------------------------- evaluation
def evaluate(agent, task, args, num_candidates, video_dir=None, step=0, interrupts=()):
    """Runs --eval-episodes episodes side by side, number i seeded with 1000 * seed + i; returns the eval/ metrics.

    Environments and random generator are its own, so training does not notice. `step` names the video of the first
    episode. Raises KeyboardInterrupt once `interrupts` holds something.
    """
    count, device = args.eval_episodes, agent.obs_mean.device
    generator = torch.Generator(device).manual_seed(args.seed)
    makers = [lambda: make_env(task)] * count
    if video_dir is not None:
        makers[0] = lambda: gym.wrappers.RecordVideo(
            make_env(task, render_mode="rgb_array"), str(video_dir), lambda episode: episode == 0,
            name_prefix=f"step-{step}-n-{num_candidates}", disable_logger=True)
    envs = gym.vector.SyncVectorEnv(makers)
    observations, _ = envs.reset(seed=[1000 * args.seed + i for i in range(count)])
    returns, lengths, successes, running = np.zeros(count), np.zeros(count), None, np.ones(count, dtype=bool)
    while running.any():  # an environment that is done goes on until all are, but no longer counts
        if interrupts:
            raise KeyboardInterrupt
        observations = torch.as_tensor(observations, dtype=torch.float32, device=device)
        actions = agent.act(observations, num_candidates, generator).cpu().numpy()
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        returns += rewards * running
        lengths += running
        if "success" in infos:
            successes = (False if successes is None else successes) | running & infos["success"].astype(bool)
        running &= ~(terminated | truncated)
    envs.close()
    metrics = {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std(),
               "eval/episodic_length": lengths.mean()}
    if task["reference"] is not None:
        low, high = task["reference"]
        metrics["eval/normalized_score"] = 100 * (returns.mean() - low) / (high - low)
    if successes is not None:
        metrics["eval/success_rate"] = successes.mean()
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- flags, checkpoint, training loop
def load(path, script=SCRIPT):
    """Folder and contents of a checkpoint of `script`, read as data only: nothing in the file is executed."""
    path = pathlib.Path(path).expanduser()
    path = path / "checkpoint.pt" if path.is_dir() else path
    with blame(f"checkpoint {path}"):
        contents = path.read_bytes()
        if hashlib.sha256(contents[:-32]).digest() != contents[-32:]:  # torch would take a damaged file for good
            raise BadInput("damaged, or not as the script wrote it: its last 32 bytes are not the SHA-256 of the rest")
        state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        if dict(state)["script"] != script:  # dict: what is none says so
            raise BadInput(f"of {state['script']}, not of {script}")
    return path.parent, state


def parse_args(argv=None):
    """Flags, over those of the checkpoint that --resume or --evaluate names, or else over the task's defaults.

    Returns the args, the run folder and the checkpoint (None without one).
    """
    given = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)[0]  # a first look
    env_name = given.env_id.replace("/", "_").replace(":", "_")
    run_dir = pathlib.Path(given.runs_dir).expanduser() / (given.run_name or f"{env_name}__{SCRIPT}__{given.seed}")
    checkpoint = None
    if given.evaluate or given.resume not in (None, "", "auto"):
        run_dir, checkpoint = load(given.evaluate or given.resume)
    elif (run_dir / "checkpoint.pt").exists() or (run_dir / "done.json").exists():
        if given.resume != "auto":
            raise BadInput(f"{run_dir} holds a run: --resume auto continues it, --run-name NAME starts another")
        run_dir, checkpoint = load(run_dir)
    with blame(f"{run_dir}, written by another version of {SCRIPT}"):
        flags = checkpoint["args"] if checkpoint else dict(env_id=given.env_id, **task_defaults(given.env_id))
        defaults = Args(**{**flags, "resume": None, "evaluate": None})
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__.split("\n")[0])
    if args.resume and args.evaluate:
        raise BadInput("--resume and --evaluate exclude each other: the one trains on, the other only evaluates")
    for key, value in asdict(args).items():
        flag = f"--{key.replace('_', '-')}"
        if value == "":
            raise BadInput(f"{flag} is empty; is a shell variable unset?")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = RANGES.get(key, (1, 10**9) if isinstance(value, int) else (1e-12, 1e9))
            if not low <= value <= high:
                raise BadInput(f"{flag} {value} must lie between {low:,} and {high:,}")
    return args, run_dir, checkpoint


def main(argv=None):
    """Runs the command line `argv` and returns the exit code: 0 done, 3 non-finite loss, 130 interrupted."""
    args, run_dir, checkpoint = parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it for --torch-deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a busy machine two that wait for each other are many times slower
    if args.cuda and device.type == "cpu":
        print(f"no CUDA device: running on the CPU, threads: {torch.get_num_threads()} (OMP_NUM_THREADS)",
              file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # what a graph captures may not have begun on the default stream
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's way to render without a screen
    if args.env_id.startswith("visual-"):  # fails now rather than after 12 GB were read
        with blame(f"pixels need OpenGL, which MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} does not give (on Debian, "
                   "apt install libegl1 libgl1-mesa-dri for egl, libosmesa6 for osmesa)"):
            import mujoco

            mujoco.GLContext(64, 64).free()
    with blame(f"--env-id {args.env_id}, --dataset-path {args.dataset_path}"):
        path = args.dataset_path and pathlib.Path(args.dataset_path).expanduser()
        task, *file = [checkpoint["task"]] if args.evaluate else find_frames(args.env_id, path, args.frame_stack)
        inner = task["kwargs"]["env_id"]
        module = inner.rpartition(":")[0]  # Gymnasium imports it
        asked = " ".join(argv or sys.argv).replace("=", " ")  # a folder may be called like the task, so with its flag
        if module not in ("", "data.d4rl_tasks") and f"--env-id {inner}" not in asked:
            raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {inner}")
        env = make_env(task, **dict(render_mode="rgb_array") if args.capture_video else {})
        if args.capture_video and env.reset() and env.render() is not None:  # fails now rather than after hours
            import moviepy  # noqa: F401
        if not args.evaluate:
            frames, replay, about_data = load_frames(env, *file, device)
    torch.manual_seed(args.seed)
    agent = Agent(env.env.env.observation_space.shape, env.action_space.shape[0], args, device)
    env.close()
    step, optimizers = 0, (agent.actor_optimizer, agent.critic_optimizer)
    if checkpoint is not None:
        with blame(f"the checkpoint in {run_dir} does not fit these flags, or is a policy.pt, only to be evaluated"):
            agent.load_state_dict(checkpoint["agent"])
            step = checkpoint["step"]
            for optimizer, saved in () if args.evaluate else zip(optimizers, checkpoint["optimizers"]):
                # with this run's groups: learning rates may be given anew, the checkpoint be of another device
                optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    candidates = args.num_candidates_eval or args.num_candidates
    video_dir = run_dir / "videos" if args.capture_video else None
    if args.evaluate:
        metrics = evaluate(agent, task, args, candidates, video_dir, step)
        print(json.dumps({"step": step, "num_candidates": candidates, **metrics}))
        return 0

    if checkpoint is not None:
        for key in ("seed", "frame_stack"):
            if getattr(args, key) != checkpoint["args"][key]:
                raise BadInput(f"--{key.replace('_', '-')} cannot change in a resumed run; --run-name starts another")
        if about_data["sha256"] != checkpoint["data"]["sha256"]:
            raise BadInput(f"{run_dir} was trained on other data than {args.dataset_path or args.env_id} holds")
    replay["rewards"] = args.reward_scale * replay["rewards"] + args.reward_shift

    with blame(f"run folder {run_dir}, perhaps in use (--runs-dir and --run-name give another)"):
        if args.track:
            import wandb  # fails before anything is written
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)  # two processes never write one folder
        versions = {package.name: package.version for package in importlib.metadata.distributions()}
        about = dict(args=asdict(args), task=task, data=about_data, device=str(device),
                     threads=torch.get_num_threads(), python=sys.version, versions=versions)
        (run_dir / "args.json").write_text(json.dumps(about, indent=2))
        (run_dir / "done.json").unlink(missing_ok=True)
        log_file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        end = min(checkpoint["log_offset"], log_file.tell()) if checkpoint else 0
        log_file.seek(log_file.truncate(end))  # later rows will be written again
        if args.track:
            wandb.init(config=asdict(args), id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow")
    print(f"{args.env_id}: {about_data['transitions']} transitions, {about_data['episodes']} episodes, mean return "
          f"{about_data['mean_return']:.1f}, best {about_data['best']:.1f}; evaluates every {args.eval_interval} steps"
          f", learns from step {step} on; frames take {frames.nbytes / 1e9:.3g} GB; run folder {run_dir}")
    if args.compile:
        print("compiles before the first gradient step: half a minute or, on a busy machine, minutes")

    def log(metrics):
        log_file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        if args.track:
            wandb.log(metrics, step=step)

    def evaluate_and_log(*numbers):
        """Evaluates with these numbers of candidates, then logs: an interruption leaves all of their rows or none."""
        found = [evaluate(agent, task, args, number, video_dir, step, interrupts) for number in numbers]
        for prefix, number, metrics in zip(("eval/", "eval_n1/"), numbers, found):
            log({name.replace("eval/", prefix): value for name, value in metrics.items()})
            text = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {step}, N = {number}: {text}")

    def save():
        """policy.pt and checkpoint.pt, each always a whole file: written under another name, flushed, renamed."""
        state = dict(script=SCRIPT, args=asdict(args), step=step, task=task, data=about_data, agent=agent.state_dict())
        more = dict(optimizers=[optimizer.state_dict() for optimizer in optimizers], random_cpu=torch.get_rng_state(),
                    random_cuda=torch.cuda.get_rng_state() if device.type == "cuda" else None,
                    log_offset=log_file.tell(), evaluated=evaluated)
        for path, contents in ((run_dir / "policy.pt", state), (run_dir / "checkpoint.pt", {**state, **more})):
            partial = path.with_suffix(".tmp")
            try:
                with blame(f"{path} cannot be written, the one before stays"), open(partial, "w+b") as file:
                    torch.save(contents, file)
                    file.seek(0)
                    file.write(hashlib.sha256(file.read()).digest())  # see load
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        interrupts.append(number)
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step\n".encode())

    interrupts = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    stop = evaluated = False  # evaluated: whether the log has this step's rows of eval/
    if checkpoint is not None:
        evaluated = checkpoint["evaluated"]
        torch.set_rng_state(checkpoint["random_cpu"])
        if device.type == "cuda" and checkpoint["random_cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random_cuda"])
    bar = tqdm(total=args.offline_steps, initial=step, unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step = time.time(), step
    # A graph may only hold what has run before: three updates launch operation by operation first.
    graphs, graphs_from, replay_updates = args.cuda_graph and device.type == "cuda", step + 3, None

    def update():
        return agent.update(frames, sample(replay, args.batch_size))

    try:
        while step < args.offline_steps and not stop:
            if step and step % args.eval_interval == 0 and not evaluated:  # after the checkpoint: resuming repeats it
                paused = time.time()
                evaluate_and_log(candidates)
                clock += time.time() - paused
            evaluated = False
            intervals = args.log_interval, args.eval_interval, args.checkpoint_interval
            until_due = min(args.offline_steps - step, *(n - step % n for n in intervals))
            if graphs and step >= graphs_from and until_due >= UPDATES_PER_REPLAY:
                replay_updates = replay_updates or capture(update, UPDATES_PER_REPLAY)
                parts, count = replay_updates(), UPDATES_PER_REPLAY
            else:
                parts, count = update(), 1
            step += count
            bar.update(count)
            stop = bool(interrupts)
            save_due = step % args.checkpoint_interval == 0 or step == args.offline_steps or stop
            if save_due or step % args.log_interval == 0 or step % args.eval_interval == 0:  # else nothing is copied
                values = {f"losses/{name}": value.item() for name, value in parts.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    bar.close()
                    print(f"{SCRIPT}: step {step}: {bad[0]} is {values[bad[0]]}; {run_dir} has what was saved before",
                          file=sys.stderr)
                    return 3
                if step % args.log_interval == 0:
                    ups, clock, clock_step = (step - clock_step) / (time.time() - clock), time.time(), step
                    log({"charts/UPS": ups, **agent.charts(), **values})
            if save_due:
                save()
        if not stop and not evaluated:
            evaluate_and_log(candidates, 1)
            evaluated = True
            save()  # so that extending the run keeps these rows
    except KeyboardInterrupt:  # of an evaluation
        save()
    bar.close()
    if interrupts:
        print(f"interrupted at step {step}; continue with: python {SCRIPT}.py --resume {run_dir}", file=sys.stderr)
        return 130
    (run_dir / "done.json").write_text(json.dumps({"step": step}))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(main())
    except (BadInput, OSError, MemoryError, RuntimeError) as error:  # OSError: full disk, lost folder, closed pipe
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's error for sizes that do not fit
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python minds the closed pipe once more
        tqdm.write(f"{SCRIPT}: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)  # one line
        sys.exit(2)
