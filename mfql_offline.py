"""MFQL: MeanFlow Q-learning, offline, in one file.

Paper: Wang, Li, Chen, Shi, Bai, Yu, Fu, "One-Step Generative Policies with Q-Learning: A Reformulation of MeanFlow",
AAAI 2026, arXiv 2511.13035. Authors' code: HiccupRL/MeanFlowQL (JAX), commit 3fab100.

One network g(s, z_t, t) maps Gaussian noise e to an action in a single evaluation, a = g(s, e, 1). Behaviour cloning
needs no ODE: with t = 0 the data and t = 1 the noise, z_t = (1 - t) a + t e and v = e - a, the average velocity u from
0 to t obeys the MeanFlow identity u = v - t du/dt; the residual form g = z_t - u turns it into an identity for g. The
critic picks among N sampled actions and its gradient improves g directly. The equations, as this file numbers them:

  (1) z_t = (1 - t) a + t e,  v = e - a                              path from the data a to the noise e
  (2) g_tgt = sg[z_t + (t - 1) v - t dg/dt],  dg/dt = v dg/dz + dg/dt   MeanFlow identity for g, one JVP
  (3) L_MFI = mean sg[(d + c)^-p] d,  d = |g - g_tgt|^2 / dim(a)     adaptively weighted cloning loss
  (4) a(e) = clip(g(s, e, 1), -1, 1),  e ~ N(0, I)                   one-step action
  (5) best-of-N: a* = argmax_i Q'(s, a(e_i)), i = 1..N               value-guided rejection sampling, Q' the target
  (6) L_critic = mean_k (Q_k(s, a) - y)^2,  y = r + gamma (1 - done) Q'(s', a*(s'))
  (7) L_actor = -mean Q(s, a(e)) + L_bound + alpha L_MFI             gradient of Q straight through one step
  (8) L_bound = mean relu(g - 1) + mean relu(-1 - g)                 keeps g(s, e, 1) inside the action box
  (9) alpha <- 1.2 alpha if L_MFI > 5 avg, 0.8 alpha if L_MFI < avg / 5, every 2000 steps

Deviations from the authors' code, each for a reason:
- Attention over the single token is written as the linear map that it is: q, k and their norms have no gradient.
- alpha's rule (9) acts from the next step on instead of within the same step, and the mask over its window reads the
  stored values (the authors' mask reads empty slots until 20 values are in, which raises alpha in short runs).
- Observation statistics are those of the data rows, not of a 2M-row buffer padded with zeros.
- A consistency term of weight zero, early stopping and pretraining are left out.
Deviations of the code (followed here) from the paper: critic learning rate 3e-4 (paper 1e-4), Xavier-uniform critic
initialisation (paper Kaiming), power 0.2 weights and clipping of g_tgt to +-5 in the cloning loss.
The paper has no D4RL locomotion results; defaults for those tasks are ours (`TASKS`, `benchmark/results/`).
"""
import argparse
import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
from dataclasses import asdict, dataclass
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem


@dataclass
class Args:
    env_id: str = "meanflow/hopper/medium-replay-v0"
    """data and environment: a D4RL name (hopper-medium-v2), a Minari id (mujoco/hopper/medium-v0), an OGBench task
    (cube-single-play-singletask-task2-v0), or a Gymnasium id (Hopper-v5) together with --dataset-path"""
    dataset_path: str | None = None
    """where the data lies if not at the usual place: an HDF5 file (D4RL layout), an OGBench .npz file, or for a
    Minari id the folder that stands for ~/.minari/datasets"""

    # ---- experiment: the same in every script ----
    seed: int = 1
    """seed of the networks, the batches, the noise and the evaluation episodes"""
    cuda: bool = True
    """train on the first CUDA GPU if there is one, else on the CPU (says so in one line)"""
    compile: bool = False
    """compile the losses with torch.compile: faster after about half a minute (needs a C++ compiler on the CPU)"""
    cuda_graph: bool = True
    """on a GPU, replay gradient steps as a CUDA graph instead of launching each operation; offline ten at a time, so
    log, evaluation and checkpoint intervals should be multiples of ten"""
    tf32: bool = False
    """on a GPU, round the factors of matrix products to TF32's 10 bits: faster, results differ slightly"""
    torch_deterministic: bool = True
    """refuse operations that are not deterministic, so that equal seeds give equal numbers on one machine"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb; WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "meanflow-rl"
    """wandb project"""
    wandb_entity: str | None = None
    """wandb team; None is your own account"""
    capture_video: bool = False
    """record the first episode of every evaluation under videos/ of the run folder (pip install moviepy)"""
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    log_interval: int = 1000
    """steps (offline: gradient steps, online: environment steps) between two rows of losses in metrics.jsonl"""
    eval_interval: int = 50_000
    """steps between two evaluations; evaluating never changes the training"""
    eval_episodes: int = 50
    """episodes per evaluation, each with its own seed"""
    checkpoint_interval: int = 10_000
    """steps between two checkpoints; one is also written at the end, on Ctrl-C and on SIGTERM"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue bit for bit, with its own flags; flags given beside it override those"""
    evaluate: str | None = None
    """run folder, checkpoint.pt or policy.pt: evaluate it for --eval-episodes episodes, print the result and exit"""

    # ---- algorithm ----
    offline_steps: int = 1_000_000
    """number of gradient steps W; the actor's learning rate decays over them"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (6)"""
    tau: float = 0.005
    """Polyak rate of the target critic, after every step"""
    reward_normalization: Literal["none", "return_range", "standardize"] = "none"
    """return_range: rewards times 1000 / (best - worst return of the data); standardize: to mean 0 and deviation 1"""
    reward_scale: float = 1.0
    """factor on the rewards in training; large returns (thousands) keep the critic from catching up with its target"""
    reward_shift: float = 0.0
    """added to the (scaled) rewards in training"""
    observation_normalization: Literal["dataset", "none"] = "dataset"
    """dataset: subtract the data's mean and divide by its standard deviation"""
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
    alpha: float = 1.0
    """weight of the cloning loss in the actor loss, Eq. (7): larger stays closer to the data"""
    alpha_schedule: Literal["adaptive", "constant", "cosine"] = "adaptive"
    """adaptive: Eq. (9), the paper's; constant: alpha throughout; cosine: alpha decays to a tenth over the run"""
    normalize_q_loss: bool = True
    """divide the Q term of Eq. (7) by the batch mean of |Q|, which frees alpha from the scale of the rewards"""
    q_aggregation: Literal["mean", "min"] = "mean"
    """how the two target critics become one value, in Eq. (5) and (6)"""
    time_steps: int = 50
    """T: t is drawn from {1/T, ..., 1}; above 1000 uniformly from [0, 1)"""
    policy_form: Literal["residual", "meanflow", "naive"] = "residual"
    """residual: the paper's g = z_t - u; meanflow: the network is u itself and a = e - u(e, 1); naive: g sees only the
    noise e instead of z_t (the two forms that the paper argues against)"""
    adaptive_power: float = 0.2
    """p of Eq. (3); 0 is the plain squared error, 1 weighs every row alike"""
    adaptive_constant: float = 1e-4
    """c of Eq. (3)"""
    target_clip: float = 5.0
    """g_tgt of Eq. (2) is clipped to plus or minus this"""
    bound_weight: float = 1.0
    """weight of L_bound, Eq. (8)"""
    actor_learning_rate: float = 1e-4
    """peak of the actor's Adam step size: linear warm-up over 5 % of the run, then a cosine down to a tenth of it"""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic, constant"""
    max_grad_norm: float = 1.0
    """gradient-norm clip, for the actor and the critic apart"""


# Values that differ per task: the first pattern that matches --env-id sets the defaults of the flags it names.
# The paper's (its Table 7; alpha weighs against unnormalised Q) and ours for what the paper does not cover.
TASKS = {
    # pattern: alpha, N, T, gamma of the paper
    r"antmaze-umaze-v2": (100, 5, 10_000, 0.99),
    r"antmaze-umaze-diverse-v2": (130, 5, 100, 0.99),
    r"antmaze-medium-play-v2": (10, 5, 50, 0.99),
    r"antmaze-medium-diverse-v2": (50, 5, 50, 0.99),
    r"antmaze-large-(play|diverse)-v2": (10, 5, 100, 0.99),  # diverse: the value of play, unpublished
    r"pen-(human|cloned|expert)-v1": (10_000, 5, 100, 0.99),  # human and expert: the value of cloned, unpublished
    r"door-(human|cloned|expert)-v1": (9_000, 5, 50, 0.99),
    r"hammer-(human|cloned|expert)-v1": (11_000, 5, 100, 0.99),
    r"relocate-(human|cloned|expert)-v1": (10_000, 5, 50, 0.99),
    r"humanoidmaze-medium-.*singletask.*": (150, 5, 50, 0.995),  # task 1; the others unpublished
    r"humanoidmaze-large-.*singletask.*": (10_000, 5, 50, 0.995),
    r"cube-double-.*singletask.*": (120, 5, 50, 0.995),
    r"antmaze-giant-.*singletask.*": (10, 1, 50, 0.995),  # N published, alpha and gamma FQL's
    r"antsoccer-arena-.*singletask.*": (10, 10, 50, 0.995),
}
BUNDLED = "meanflow/hopper/medium-replay-v0"
# Ours, found on Hopper data (benchmark/results). A smaller reward and a larger tau let the critic converge sooner, min
# and N = 1 in the target keep it from overestimating, and the horizon is longer since returns count 1000 steps: with
# gamma 0.99 a leap and a fall after 200 steps is worth as much as walking on.
LOCOMOTION = dict(alpha=2.0, gamma=0.995, tau=0.01, reward_scale=0.1, q_aggregation="min", num_candidates_target=1)


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict; a name that nothing is known of gets those of the class."""
    if env_id == BUNDLED:  # sizes that two CPU cores train in minutes
        return dict(LOCOMOTION, tau=0.02, actor_learning_rate=3e-4, offline_steps=15_000, eval_episodes=20,
                    eval_interval=3_000, policy_width=64, policy_depth=2, critic_width=256, critic_depth=2,
                    compile=shutil.which("g++") is not None)
    if re.match(r"([\w.-]+/)?(hopper|halfcheetah|walker2d|ant)[-/]", env_id):
        return LOCOMOTION
    for pattern, (alpha, num_candidates, time_steps, gamma) in TASKS.items():
        if re.fullmatch(pattern, env_id):
            steps = 1_000_000 if "singletask" in env_id else 500_000
            shift = -1.0 if re.fullmatch(r"antmaze-.*-v2", env_id) else 0.0  # D4RL's 0 and 1 become -1 and 0
            return dict(alpha=alpha, num_candidates=num_candidates, time_steps=time_steps, gamma=gamma,
                        normalize_q_loss=False, offline_steps=steps, reward_shift=shift)
    return {}


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


# ---------------------------------------------------------------- algorithm
def sample_time(batch_size, time_steps, device):
    """t of shape (B, 1): uniform on {1/T, ..., 1}, or on [0, 1) when T > 1000."""
    if time_steps > 1000:
        return torch.rand(batch_size, 1, device=device)
    return torch.randint(1, time_steps + 1, (batch_size, 1), device=device) / time_steps


def mean_flow_output_and_target(policy, observations, actions, noise, t, args):
    """The network's output at (s, z_t, t) and its stop-gradient regression target, both (B, A)."""
    z_t, v = (1 - t) * actions + t * noise, noise - actions  # Eq. (1)
    point, tangent = (noise, torch.zeros_like(v)) if args.policy_form == "naive" else (z_t, v)
    g, dg_dt = jvp(lambda z, t: policy(observations, z, t), (point, t), (tangent, torch.ones_like(t)))
    if args.policy_form == "residual":
        g_tgt = z_t + (t - 1) * v - t * dg_dt  # Eq. (2)
    elif args.policy_form == "meanflow":
        g_tgt = v - t * dg_dt  # g is u here: the MeanFlow identity itself
    else:
        g_tgt = actions - t * dg_dt  # g = e - u along a path on which the input e does not move
    return g, g_tgt.detach().clamp(-args.target_clip, args.target_clip)


def mean_flow_loss(policy, observations, actions, noise, t, args):
    """L_MFI, Eq. (3): a scalar."""
    g, g_tgt = mean_flow_output_and_target(policy, observations, actions, noise, t, args)
    d = (g - g_tgt).square().mean(-1)  # (B,)
    weight = (d.detach() + args.adaptive_constant) ** -args.adaptive_power
    return (weight * d).mean()  # Eq. (3)


def one_step_action(policy, observations, noise, args):
    """g(s, e, 1) before clipping, (..., A): one evaluation of the network. Eq. (4)"""
    g = policy(observations, noise, noise.new_ones(1, 1))
    return noise - g if args.policy_form == "meanflow" else g


def best_of_n(policy, target_critic, observations, noise, args):
    """Eq. (5): of the actions made from noise (B, N, A), the one that the target critic likes best.

    Returns the actions (B, A) and their target values (B,).
    """
    observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
    candidates = one_step_action(policy, observations, noise, args).clamp(-1, 1)  # (B, N, A)
    q = target_critic(observations, candidates)  # (2, B, N)
    q = q.mean(0) if args.q_aggregation == "mean" else q.amin(0)
    q_best, index = q.max(1)
    return candidates[torch.arange(len(index), device=index.device), index], q_best


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (6): a scalar. next_noise: (B, N, A)."""
    with torch.no_grad():
        q_next = best_of_n(policy, target_critic, batch["next_observations"], next_noise, args)[1]
        q_target = batch["rewards"] + args.gamma * batch["masks"] * q_next
    return (critic(batch["observations"], batch["actions"]) - q_target).square().mean()  # Eq. (6)


def actor_loss(policy, critic, observations, noise, args):
    """The first two terms of Eq. (7) and the mean value of the policy's actions: three scalars."""
    g = one_step_action(policy, observations, noise, args)
    bound = F.relu(g - 1).mean() + F.relu(-1 - g).mean()  # Eq. (8)
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    q = functional_call(critic, frozen, (observations, g.clamp(-1, 1))).mean(0)
    scale = q.detach().abs().mean() if args.normalize_q_loss else 1.0
    return -q.mean() / scale, bound, q.detach().mean()


def losses(policy, critic, target_critic, batch, draws, alpha, args):
    """The sum of all losses, to be differentiated once, and a dict of its parts."""
    noise, t, actor_noise, next_noise = draws
    l_critic = critic_loss(policy, critic, target_critic, batch, next_noise, args)
    l_mfi = mean_flow_loss(policy, batch["observations"], batch["actions"], noise, t, args)
    l_q, l_bound, q = actor_loss(policy, critic, batch["observations"], actor_noise, args)
    total = l_critic + l_q + args.bound_weight * l_bound + alpha * l_mfi  # Eq. (6) + Eq. (7)
    parts = dict(critic=l_critic, q=l_q, bound=l_bound, mean_flow=l_mfi, q_mean=q)
    return total, {name: value.detach() for name, value in parts.items()}


def actor_learning_rate(step, args):
    """Step size of gradient step number `step` (from 0), tensors: linear from 0, a cosine to a tenth, then that."""
    warmup = int(0.05 * args.offline_steps)
    progress = ((step - warmup) / max(args.offline_steps - warmup, 1)).clamp(0, 1)
    cosine = 0.1 + 0.9 * 0.5 * (1 + torch.cos(math.pi * progress))
    return args.actor_learning_rate * torch.where(step < warmup, step / max(warmup, 1), cosine)


def next_alpha(alpha, history, l_mfi, step, args):
    """alpha and the window after gradient step number `step` (from 1), all tensors; `history` is the window of the
    last 20 checked losses, -1 where there is none yet."""
    if args.alpha_schedule == "cosine":
        progress = (step / args.offline_steps).clamp(max=1)
        return args.alpha * (0.1 + 0.9 * 0.5 * (1 + torch.cos(math.pi * progress))), history
    if args.alpha_schedule == "constant":
        return alpha, history
    check, seen = step % 2000 == 0, history >= 0
    average = torch.where(seen, history, 0).sum() / seen.sum()
    ready = check & (step >= int(0.1 * args.offline_steps)) & (seen.sum() >= 2)
    raised, lowered = (1.2 * alpha).clamp(max=10 * args.alpha), (0.8 * alpha).clamp(min=0.1 * args.alpha)
    alpha = torch.where(ready & (l_mfi > 5 * average), raised, alpha)  # Eq. (9)
    alpha = torch.where(ready & (l_mfi < average / 5), lowered, alpha)  # Eq. (9)
    return alpha, torch.where(check, torch.cat([history[1:], l_mfi.reshape(1)]), history)


class Agent(nn.Module):
    """Networks, optimisers and schedules of MFQL: `update` is one gradient step, `act` is Eq. (5)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args, self.step = args, 0  # gradient steps; `updates` counts them on the device, for the schedules
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("alpha", torch.tensor(float(args.alpha)))
        self.register_buffer("alpha_history", torch.full((20,), -1.0))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.to(device)
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.policy.parameters(), lr=torch.zeros((), device=device), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.critic_learning_rate, **adam)
        self.losses = torch.compile(losses) if args.compile else losses

    def update(self, batch):
        """One gradient step on a batch of normalised observations; returns the losses as device scalars."""
        args, device, (batch_size, act_dim) = self.args, self.alpha.device, batch["actions"].shape
        draws = (
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
            sample_time(batch_size, args.time_steps, device),
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (7)
            torch.randn(batch_size, args.num_candidates_target or args.num_candidates, act_dim, device=device),
        )
        total, parts = self.losses(self.policy, self.critic, self.target_critic, batch, draws, self.alpha, args)
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)
        self.actor_optimizer.param_groups[0]["lr"].copy_(actor_learning_rate(self.updates, args))
        self.actor_optimizer.step()
        self.critic_optimizer.step()
        with torch.no_grad():  # else the target would carry the history of every update
            torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), args.tau)
        self.updates += 1
        alpha, history = next_alpha(self.alpha, self.alpha_history, parts["mean_flow"], self.updates, args)
        self.alpha.copy_(alpha)
        self.alpha_history.copy_(history)
        return parts

    @torch.no_grad()
    def act(self, observations, num_candidates, generator):
        """Best of `num_candidates` one-step actions, (B, A) in [-1, 1], for raw observations (B, O). Eq. (5)"""
        observations = (observations - self.obs_mean) / self.obs_std
        shape = len(observations), num_candidates, self.policy.final.out_features
        noise = torch.randn(shape, device=observations.device, generator=generator)
        if num_candidates == 1:
            return one_step_action(self.policy, observations, noise[:, 0], self.args).clamp(-1, 1)
        return best_of_n(self.policy, self.target_critic, observations, noise, self.args)[0]

    def charts(self):
        """What the log shows besides the losses."""
        return {"charts/alpha": self.alpha.item(),
                "charts/actor_learning_rate": self.actor_optimizer.param_groups[0]["lr"].item()}

    def training_state(self):
        """What continuing needs besides `state_dict()`."""
        return dict(actor_optimizer=self.actor_optimizer.state_dict(),
                    critic_optimizer=self.critic_optimizer.state_dict())

    def load_training_state(self, state):
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.critic_optimizer.param_groups[0]["lr"] = self.args.critic_learning_rate  # may be given anew
        for optimizer in (self.actor_optimizer, self.critic_optimizer):  # the checkpoint may come from another device
            group, device = optimizer.param_groups[0], self.obs_mean.device
            group["capturable"] = device.type == "cuda"
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(device)


# ---------------------------------------------------------------- data
class BadInput(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""


D4RL_URLS = (  # tried in this order
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{folder}/{file}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
)
D4RL_TASKS = {  # successor of D4RL's environment, and D4RL's reference returns (random, expert)
    "hopper": ("Hopper-v4", (-20.272305, 3234.3)),
    "halfcheetah": ("HalfCheetah-v4", (-280.178953, 12135.0)),
    "walker2d": ("Walker2d-v4", (1.629008, 4592.3)),
    "ant": ("Ant-v4", (-325.6, 3879.7)),
    "antmaze": ("AntMaze", (0.0, 1.0)),  # a class of the dataset scripts
    "kitchen": ("FrankaKitchen-v1", (0.0, 4.0)),
    "pen": ("AdroitHandPen-v1", (96.262799, 3076.8331017826877)),
    "door": ("AdroitHandDoor-v1", (-56.512833, 2880.5693087298737)),
    "hammer": ("AdroitHandHammer-v1", (-274.856578, 12794.134825156867)),
    "relocate": ("AdroitHandRelocate-v1", (-6.425911, 4233.877797728884)),
}

ANT_FILE = "ant_maze_v2/Ant_maze_{}_sparse_fixed.hdf5"
D4RL_FILES = {  # folder and file on the servers; then its size in bytes and first digits of its SHA-256, where known
    "antmaze-umaze-v2": (ANT_FILE.format("u-maze_noisy_multistart_False_multigoal_False"), 232532949, ""),
    "antmaze-umaze-diverse-v2": (ANT_FILE.format("u-maze_noisy_multistart_True_multigoal_True"), 230854272, ""),
    "antmaze-medium-play-v2": (ANT_FILE.format("big-maze_noisy_multistart_True_multigoal_False"), 231110764, ""),
    "antmaze-medium-diverse-v2": (ANT_FILE.format("big-maze_noisy_multistart_True_multigoal_True"), 231095166, ""),
    "antmaze-large-play-v2": (ANT_FILE.format("hardest-maze_noisy_multistart_True_multigoal_False"), 230880653, ""),
    "antmaze-large-diverse-v2": (ANT_FILE.format("hardest-maze_noisy_multistart_True_multigoal_True"), 0, ""),
    "kitchen-complete-v0": ("kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5", 556544, "cd797c38cd52dfbe"),
    "kitchen-partial-v0": ("kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5", 19558459, "57bfd9c5"),
    "kitchen-mixed-v0": ("kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5", 19560760, "a30382a5"),
    "pen-cloned-v1": ("hand_dapg_v1/pen-cloned-v1.hdf5", 155074191, "6d1a982cee1950501bedebbddedbcbb3"),
    "door-cloned-v1": ("hand_dapg_v1/door-cloned-v1.hdf5", 294356136, "1f6a60ecc4d2a2e5c02f41dd3412be61"),
    "hammer-cloned-v1": ("hand_dapg_v1/hammer-cloned-v1.hdf5", 446616879, ""),
    "relocate-cloned-v1": ("hand_dapg_v1/relocate-cloned-v1.hdf5", 581319494, "8baf2b7f"),
}
ANT_MAZES = {  # time limit, rows of 4 m cells: # wall, R start, G goal; play and diverse are two data sets of one task
    "umaze": (700, "##### #R..# ###.# #G..# #####"),
    "medium": (1000, "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########"),
    "large": (1000, "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### "
                    "#..#...#.G.# ############"),
}


class AntMaze(gym.Env):
    """D4RL's AntMaze -v2: an ant walks through a maze to within 0.5 m of a goal that it is not told.

    Gymnasium's ant with D4RL's torque, time step and contacts: policies trained in D4RL's walk here as well as there
    (`benchmark/antmaze_policies.py`). Observation (29): qpos (x, y, z, quaternion w x y z, 8 joints) and qvel (14); x
    and y are 0 in the start cell, y grows with the map's row. Reward 1 and termination at the goal, else 0; falling
    ends nothing. A step takes 0.1 s.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)

    def __init__(self, maze, render_mode=None):
        self.render_mode, self.renderer = render_mode, None
        cells = np.array([list(row) for row in ANT_MAZES[maze][1].split()])
        centre = {mark: 4.0 * (np.argwhere(cells == mark)[:, ::-1] - 1) for mark in "#RG"}  # xy of the cells, m
        spec = mujoco.MjSpec.from_file(str(pathlib.Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml"))
        for x, y in centre["#"]:
            spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, 1], size=[2, 2, 1], contype=1,
                                    conaffinity=1, rgba=[0.6, 0.5, 0.4, 1])
        self.model = spec.compile()
        self.model.opt.timestep = 0.02  # s, gymnasium 0.01
        self.model.actuator_gear[:, 0] = 30  # N m at action 1, gymnasium 150
        self.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01  # gymnasium 0.9 0.95 0.001
        self.data, self.goal_cell, self.middle = mujoco.MjData(self.model), centre["G"][0], centre["#"].mean(0)

    def observation(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self.goal_cell + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)  # one-sided
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += self.np_random.uniform(-0.1, 0.1, 15)
        self.data.qvel = 0.1 * self.np_random.standard_normal(14)
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)  # as MuJoCo 2 did before the first observation
        mujoco.mj_forward(self.model, self.data)
        return self.observation(), {}

    def step(self, action):
        self.data.ctrl = action  # MuJoCo clips it to [-1, 1]
        mujoco.mj_step(self.model, self.data, nstep=5)
        success = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.observation(), float(success), success, False, {"success": success}

    def render(self):
        """The maze from above, x to the right and y upwards; (480, 480, 3)."""
        self.renderer = self.renderer or mujoco.Renderer(self.model, 480, 480)
        camera = mujoco.MjvCamera()
        camera.lookat[:2], camera.distance, camera.azimuth, camera.elevation = self.middle, 60, 90, -90
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()


class Kitchen(gym.Wrapper):
    """D4RL's kitchen -v0 on gymnasium-robotics' FrankaKitchen-v1, whose physics are the same.

    Observation (60): qpos of the robot (9) and of the objects (21), both noisy, and the goal (30), which is 0 wherever
    the four subtasks ask for nothing. Reward: how many subtasks come within 0.3 of their goals in this step, each
    counted once; with the fourth the episode terminates. (D4RL's data reward a subtask in every step that it is done.)
    """

    def __init__(self, env, kind):
        from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.robot, self.goal = env.unwrapped.robot_env, np.zeros(30)
        names = "microwave", "kettle", "light switch", "bottom burner" if kind == "mixed" else "slide cabinet"
        self.subtasks = {name: OBS_ELEMENT_INDICES[name] for name in names}  # where in the 30 numbers
        for name, index in self.subtasks.items():
            self.goal[index] = OBS_ELEMENT_GOALS[name]
        self.robot.robot_noise_ratio = 0.1  # of each joint's amplitude; it also disturbs the controller
        self.noise = 0.1 * np.append(self.robot.robot_pos_noise_amp[9:], 0.005)  # the robot lacks the last amplitude
        self.robot.model.geom_contype[1] = self.robot.model.geom_conaffinity[1] = 0  # D4RL's pedestal touches nothing

    def observe(self, robot):
        objects = self.robot.data.qpos[9:] + self.noise * self.robot.np_random.uniform(-1, 1, 21)
        return np.concatenate([robot["observation"][:9], objects, self.goal])

    def reset(self, *, seed=None, options=None):
        self.todo = set(self.subtasks)
        return self.observe(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action):
        robot, _, _, truncated, _ = self.env.step(action)
        observation = self.observe(robot)
        error = observation[:30] - self.goal
        done = {name for name in self.todo if np.linalg.norm(error[self.subtasks[name]]) < 0.3}
        self.todo -= done
        return observation, float(len(done)), not self.todo, truncated, {}


class Adroit(gym.Wrapper):
    """Gymnasium-robotics' AdroitHand -v1 with two rules of D4RL: an episode of pen ends when the pen drops, and in the
    other tasks the distance from palm to object lowers the reward; releases 1.2.1 to 1.4.2 have that sign wrong."""

    def __init__(self, env, task):
        super().__init__(env)
        self.task, version = task, importlib.metadata.version("gymnasium-robotics")
        if version != "1.4.2":  # another one may have the sign right already
            raise BadInput(f"D4RL's {task} is rebuilt on gymnasium-robotics 1.4.2, not {version}: pip install "
                           "gymnasium-robotics==1.4.2 mujoco==3.11.0")

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.task == "pen":
            return observation, reward, bool(observation[26] < 0.075), truncated, info  # its height, m
        palm_to_object = {"door": observation[35:38], "hammer": observation[33:36] - observation[36:39],
                          "relocate": observation[30:33]}[self.task]  # m
        return observation, reward - 0.2 * np.linalg.norm(palm_to_object), terminated, truncated, info


def d4rl_task(env_id):
    """(task, folder on the server, file) of a D4RL name; None if it is not one."""
    kinds = "random|medium|expert|medium-replay|full-replay|medium-expert"
    if match := re.fullmatch(rf"(halfcheetah|hopper|walker2d|ant)-({kinds})-v2", env_id):
        return match[1], "gym_mujoco_v2", f"{match[1]}_{match[2].replace('-', '_')}-v2.hdf5"
    if match := re.fullmatch(r"(pen|door|hammer|relocate)-(human|cloned|expert)-v1", env_id):
        return match[1], "hand_dapg_v1", f"{env_id}.hdf5"
    if env_id in D4RL_FILES:
        return env_id.split("-")[0], *D4RL_FILES[env_id][0].split("/")
    if re.fullmatch(rf"(antmaze|kitchen|pen|door|hammer|relocate)-[a-z-]+-v\d|[a-z0-9]+-({kinds})-v\d", env_id):
        raise BadInput(f"--env-id {env_id} is not supported; of D4RL, locomotion -v2 (hopper, halfcheetah, walker2d, "
                       "ant), AntMaze -v2 (umaze, umaze-diverse, medium-play, medium-diverse, large-play, "
                       "large-diverse), kitchen -v0 (complete, partial, mixed) and Adroit -v1 (human, cloned, expert) "
                       "are")
    return None


def source(args):
    """Which kind of name --env-id is: ogbench, d4rl, minari or gymnasium."""
    if "-singletask" in args.env_id:
        return "ogbench"
    if d4rl_task(args.env_id):
        return "d4rl"
    has_file = str(args.dataset_path).endswith((".hdf5", ".h5"))
    return "minari" if "/" in args.env_id and not has_file else "gymnasium"


def minari_dataset(args):
    """The Minari dataset --env-id: under --dataset-path, or else bundled beside this file, or else in Minari's folder
    (downloaded there if need be)."""
    import minari
    from minari.storage import get_dataset_path

    bundled = pathlib.Path(__file__).resolve().parent / "data"
    folder = pathlib.Path(args.dataset_path or bundled) / args.env_id / "data"
    try:
        if folder.exists() or args.dataset_path or args.env_id == BUNDLED:
            return minari.MinariDataset(folder)
        if not get_dataset_path(args.env_id).exists():
            urllib.request.urlopen("https://huggingface.co", timeout=10).close()  # fails at once, where Minari retries
        return minari.load_dataset(args.env_id, download=True)
    except Exception as error:  # Minari and its download clients fail in many ways
        raise BadInput(f"Minari dataset {args.env_id}: {error or type(error).__name__}. Ways out: give the folder "
                       f"that holds it as --dataset-path; run `minari download {args.env_id}` where there is a "
                       f"network; or run the bundled data, `python {SCRIPT}.py`, with the folder data/ beside the "
                       "script") from error


class SeedNumPy(gym.Wrapper):
    """OGBench's mazes draw their starts from NumPy's global generator: seeded here, so that episodes repeat."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed % 2**32)
        return self.env.reset(seed=seed, options=options)


def make_env(args, **kwargs):
    """The environment of --env-id with flat observations and actions in [-1, 1]; kwargs go to gymnasium.make."""
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # D4RL's tasks are -v4 on purpose
    try:
        if source(args) == "ogbench":
            if args.env_id.startswith("visual-"):  # before OpenGL is asked for frames
                raise BadInput(f"--env-id {args.env_id}: pixel tasks are not supported (benchmark/pixels.md)")
            import ogbench

            env = ogbench.make_env_and_datasets(args.env_id, env_only=True, success_timing="post", **kwargs)
            env = SeedNumPy(env)
        elif source(args) == "minari":
            env = minari_dataset(args).recover_environment(eval_env=True, **kwargs)
        else:
            task, kind, *_ = args.env_id.split("-") if d4rl_task(args.env_id) else (None, None)
            env_id = D4RL_TASKS[task][0] if task else args.env_id
            if env_id.startswith(("Adroit", "Franka")):
                import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            if env_id == "Ant-v4":
                kwargs["use_contact_forces"] = True  # D4RL's observation has them
            if env_id == "AdroitHandPen-v1":
                kwargs["max_episode_steps"] = 100  # D4RL's limit; here it is 200
            if task == "antmaze":
                limit = ANT_MAZES[kind][0]
                env_id = gym.envs.registration.EnvSpec(args.env_id, AntMaze, max_episode_steps=limit)
                kwargs["maze"] = kind
            if task == "kitchen":
                kwargs["disable_env_checker"] = True  # it minds that the goal is the same object in every step
            env = gym.make(env_id, **kwargs)
            if task == "kitchen":
                env = Kitchen(env, kind)
            if task in ("pen", "door", "hammer", "relocate"):
                env = Adroit(env, task)
    except (gym.error.Error, ImportError, ValueError) as error:
        package = getattr(error, "name", None)  # of an import that failed
        package = {"PIL": "pillow", "gymnasium_robotics": "gymnasium-robotics==1.4.2"}.get(package, package)
        advice = f"pip install {package} mujoco==3.11.0" if package else "see --help"
        raise BadInput(f"--env-id {args.env_id} cannot be made ({error}): {advice}") from error
    if isinstance(env.observation_space, (gym.spaces.Dict, gym.spaces.Tuple)):
        env = gym.wrappers.FlattenObservation(env)  # every entry, the goal included
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            raise BadInput(f"--env-id {args.env_id}: {name} must be flat vectors of numbers, not {space}")
    if not env.action_space.is_bounded():
        raise BadInput(f"--env-id {args.env_id}: actions must lie in a bounded box, not {env.action_space}")
    if (env.action_space.low == -1).all() and (env.action_space.high == 1).all():
        return env
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def reference_scores(args):
    """Returns of a random and of an expert policy, for the normalised score; None where nobody defined them."""
    if source(args) == "d4rl":
        return D4RL_TASKS[d4rl_task(args.env_id)[0]][1]
    metadata = minari_dataset(args).storage.metadata if source(args) == "minari" else {}
    reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if None in reference else reference


def normalized_score(episodic_return, reference):
    """A return in percent of the way from the random to the expert reference."""
    return 100 * (episodic_return - reference[0]) / (reference[1] - reference[0])


def download_d4rl(env_id, path):
    """Fetches a D4RL file to `path` from the first of D4RL_URLS that has it whole, and says which one served."""
    _, folder, file = d4rl_task(env_id)
    _, known_size, known_sha256 = D4RL_FILES.get(env_id, (None, 0, ""))
    failures, partial = [], path.with_suffix(f".{os.getpid()}.part")  # of this process alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path} does not exist and cannot be made ({error}): set D4RL_DATASET_DIR") from error
    for url in (template.format(folder=folder, file=file) for template in D4RL_URLS):
        try:
            with urllib.request.urlopen(url, timeout=10) as response, open(partial, "wb") as out:
                size = int(response.headers.get("Content-Length") or known_size)
                with tqdm.wrapattr(out, "write", total=size or None, desc=file) as bar:
                    shutil.copyfileobj(response, bar)
            if size and partial.stat().st_size != size:
                raise OSError(f"only {partial.stat().st_size} of {size} bytes came")
            if known_size and size != known_size:
                raise OSError(f"{size} bytes are served, the file is known to have {known_size}")
            if known_sha256 and not hashlib.sha256(partial.read_bytes()).hexdigest().startswith(known_sha256):
                raise OSError(f"its SHA-256 does not begin with {known_sha256}, which is known of the file")
            read_d4rl(partial)  # keys and row counts
            os.replace(partial, path)
            print(f"downloaded {path} from {url}")
            return
        except (OSError, http.client.HTTPException, BadInput) as error:  # no route, 404 and timeouts are OSErrors
            failures.append(f"{url}: {error}")
        finally:
            partial.unlink(missing_ok=True)
    raise BadInput(f"{path} does not exist and no server gave it ({'; '.join(failures)}). Ways out: give the file as "
                   "--dataset-path; put it there or set D4RL_DATASET_DIR to where it lies; or run the bundled data, "
                   f"`python {SCRIPT}.py`")


def read_d4rl(path):
    """The five arrays of an HDF5 file in D4RL's layout, and the name of the environment if the file has it."""
    import h5py

    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path, "r") as file:
            if missing := [key for key in keys if key not in file]:
                raise BadInput(f"{path}: {' and '.join(missing)} missing; D4RL's layout has {', '.join(keys)}")
            data, env_id = {key: file[key][()] for key in keys}, file.attrs.get("env_id")
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # h5py's, for damaged files
        raise BadInput(f"{path}: missing, damaged or not an HDF5 file ({error})") from error
    if wrong := [key for key in keys if data[key].ndim != (2 if key in ("observations", "actions") else 1)]:
        raise BadInput(f"{path}: {wrong[0]} have shape {data[wrong[0]].shape}; D4RL's layout has a vector per row of "
                       "observations and actions and a number per row of the others")
    if len({len(value) for value in data.values()}) != 1 or len(data["rewards"]) == 0:
        raise BadInput(f"{path}: lengths differ or are 0: " + ", ".join(f"{key} {len(data[key])}" for key in keys))
    return data, env_id.decode() if isinstance(env_id, bytes) else env_id


def episode_returns(rewards, ends):
    """The sum of rewards of every episode that ends, given the flags of last rows."""
    ends = np.flatnonzero(ends) + 1
    return [rewards[first:end].sum() for first, end in zip([0, *ends[:-1]], ends)]


def load_d4rl(args):
    """A row at a timeout has no next observation in the file and is left out, as is the last row."""
    path, task = args.dataset_path, d4rl_task(args.env_id)
    if path is None and task is None:
        raise BadInput(f"--env-id {args.env_id}: not a D4RL name, Minari id (NAMESPACE/NAME-vN) or OGBench single "
                       "task; for a Gymnasium environment give its data as --dataset-path FILE.hdf5")
    if path is None:
        path = pathlib.Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser() / task[2]
        if not path.exists():
            download_d4rl(args.env_id, path)
    data, recorded_in = read_d4rl(path)
    env_id = D4RL_TASKS[task[0]][0] if task else args.env_id
    if recorded_in and recorded_in.split("-v")[0] != env_id.split("-v")[0]:
        raise BadInput(f"{path} was recorded in {recorded_in}, but --env-id {args.env_id} means {env_id}")
    terminals, timeouts = data["terminals"].astype(bool), data["timeouts"].astype(bool)
    rows = np.flatnonzero(~timeouts[:-1])
    return dict(observations=data["observations"][rows], actions=data["actions"][rows], rewards=data["rewards"][rows],
                masks=1.0 - terminals[rows], next_observations=data["observations"][rows + 1], rows=rows,
                ), episode_returns(data["rewards"], terminals | timeouts)


def flatten_entries(space, values):
    """A Minari episode's observations as one array (T, O), entries in the order of FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten_entries(part, values[key]) for key, part in space.spaces.items()], axis=1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([flatten_entries(part, value) for part, value in zip(space.spaces, values)], axis=1)
    return np.asarray(values, dtype=np.float32).reshape(len(values), -1)


def load_minari(args):
    """Minari stores an episode's last observation too, so no row is lost."""
    if match := re.match("D4RL/(antmaze|kitchen)/", args.env_id):
        print(f"{args.env_id} is Minari's own {match[1]}, neither D4RL's data nor its task: its scores do not compare "
              "with the papers'", file=sys.stderr)
    dataset, columns, returns = minari_dataset(args), [], []
    space = dataset.recover_environment(eval_env=True).observation_space  # the file's has its entries in other order
    try:
        for episode in dataset.iterate_episodes():
            observations = flatten_entries(space, episode.observations)
            masks = 1.0 - episode.terminations
            columns.append((observations[:-1], episode.actions, episode.rewards, masks, observations[1:]))
            returns.append(episode.rewards.sum())
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"Minari dataset {args.env_id}: damaged ({error}); delete it and fetch it again") from error
    keys = ("observations", "actions", "rewards", "masks", "next_observations")
    return {key: np.concatenate(column) for key, column in zip(keys, zip(*columns))}, returns


def load_ogbench(args):
    """Rewards and masks as OGBench labels them, with the reward timing of the papers."""
    import ogbench

    try:
        _, data, _ = ogbench.make_env_and_datasets(args.env_id, dataset_path=args.dataset_path, success_timing="post")
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"OGBench data of {args.env_id}: {error}. Ways out: give the .npz file (its -val.npz "
                       "beside it) as --dataset-path; or put both into ~/.ogbench/data") from error
    returns = episode_returns(data["rewards"], data.pop("terminals"))
    return data, returns


def load_dataset(args, env):
    """The transitions of --env-id as float32 arrays of N rows each, and the returns of the data's episodes.

    Keys: observations and next_observations (N, O), actions (N, A) in (-1, 1), rewards (N,) and masks (N,), which are
    1 - termination: a time limit never stops bootstrapping. Raises BadInput for data that cannot be trained on.
    """
    loaders = dict(ogbench=load_ogbench, minari=load_minari, d4rl=load_d4rl, gymnasium=load_d4rl)
    data, returns = loaders[source(args)](args)
    rows = data.pop("rows", np.arange(len(data["rewards"])))  # where each transition lies in the file
    data = {key: np.asarray(value, dtype=np.float32) for key, value in data.items()}
    name = args.dataset_path or args.env_id
    if {len(value) for value in data.values()} != {len(rows)}:
        raise BadInput(f"{name}: lengths differ: {', '.join(f'{key} {len(value)}' for key, value in data.items())}")
    if len(rows) == 0 or len(returns) == 0:
        raise BadInput(f"{name}: {len(rows)} transitions and {len(returns)} whole episodes; it takes one of each")
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if data[key].shape[1:] != space.shape:
            raise BadInput(f"{name}: {key} have shape {data[key].shape[1:]}, but --env-id {args.env_id} wants "
                           f"{space.shape}; is this another environment's data?")
    for key, value in data.items():
        bad = ~np.isfinite(value).reshape(len(value), -1).all(1)
        if bad.any():
            first = rows[bad.argmax()]
            raise BadInput(f"{name}: NaN or infinity in {bad.sum()} rows of {key}, the first is row {first}")
    box = env.env.action_space if isinstance(env, gym.wrappers.RescaleAction) else env.action_space
    data["actions"] = (2 * (data["actions"] - box.low) / (box.high - box.low) - 1).astype(np.float32)
    outside = np.abs(data["actions"]).max(1) > 1 + 1e-4
    if outside.any():
        first = rows[outside.argmax()]
        raise BadInput(f"{name}: {outside.sum()} actions outside the action box, the first is row {first}")
    data["actions"] = data["actions"].clip(-1 + 1e-5, 1 - 1e-5)
    return data, np.array(returns, dtype=np.float64)


def reward_scale_and_shift(args, rewards, returns):
    """(scale, shift) of the rewards in training, r -> scale r + shift, from the data's rewards and episode returns."""
    scale, shift = args.reward_scale, args.reward_shift
    if args.reward_normalization == "return_range":
        scale *= 1000 / max(returns.max() - returns.min(), 1e-6)
    elif args.reward_normalization == "standardize":
        std = max(rewards.std(dtype=np.float64), 1e-6)
        scale, shift = scale / std, shift - scale * rewards.mean(dtype=np.float64) / std
    return float(scale), float(shift)


# ---------------------------------------------------------------- replay
def sample(replay, batch_size, first=0, end=None):
    """A uniform batch, with replacement, of the rows first .. end - 1, drawn where the replay tensors live; `end` may
    be a scalar of the device, so that it can grow under a captured graph."""
    end = len(replay["rewards"]) if end is None else end
    index = first + torch.randint(2**62, (batch_size,), device=replay["rewards"].device) % (end - first)
    return {key: value[index] for key, value in replay.items()}


UPDATES_PER_REPLAY = 10  # gradient steps of one CUDA graph


def capture(function, count):
    """`count` calls of `function` as one CUDA graph, launched at once instead of operation by operation.

    Returns a function that replays them and returns the last result. `function` must have run before, must read its
    state from tensors alone, and may not wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            result = function()

    def replay():
        graph.replay()
        return result

    return replay


# ---------------------------------------------------------------- evaluation
def make_video_env(args, folder, prefix):
    """The environment of --env-id; its first episode is written to `folder`."""
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos.*")  # a prefix for each evaluation
    try:
        env = make_env(args, render_mode="rgb_array")
        env.reset()
        env.render()
        return gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda episode: episode == 0,
                                        name_prefix=prefix, disable_logger=True)
    except Exception as error:  # rendering fails in a different way on every machine
        raise BadInput(f"--capture-video: {error} (pip install moviepy; MUJOCO_GL=egl without a screen)") from error


def evaluate(agent, args, num_candidates, reference=None, video_dir=None, step=0):
    """Runs --eval-episodes episodes side by side, number i seeded with 1000 * seed + i; returns the eval/ metrics.
    `step` names the video.

    Environments and random generator are its own, so training does not notice.
    """
    count, device = args.eval_episodes, agent.obs_mean.device
    generator = torch.Generator(device).manual_seed(args.seed)
    makers = [lambda: make_env(args)] * count
    if video_dir is not None:
        makers[0] = lambda: make_video_env(args, video_dir, f"step-{step}-n-{num_candidates}")
    envs = gym.vector.SyncVectorEnv(makers)
    observations, _ = envs.reset(seed=[1000 * args.seed + i for i in range(count)])
    returns, lengths, successes, running = np.zeros(count), np.zeros(count), None, np.ones(count, dtype=bool)
    while running.any():  # an environment that is done goes on until all are, but no longer counts
        observations = torch.as_tensor(observations, dtype=torch.float32, device=device)
        actions = agent.act(observations, num_candidates, generator).cpu().numpy()
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        returns += rewards * running
        lengths += running
        if "success" in infos:
            successes = np.zeros(count, dtype=bool) if successes is None else successes
            successes |= running & infos["success"].astype(bool)
        running &= ~(terminated | truncated)
    envs.close()
    metrics = {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std(),
               "eval/episodic_length": lengths.mean()}
    if reference is not None:
        metrics["eval/normalized_score"] = normalized_score(returns.mean(), reference)
    if successes is not None:
        metrics["eval/success_rate"] = successes.mean()
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- checkpoint and log
def save(state, path):
    """Writes a checkpoint so that `path` is always a whole file: to a temporary name, flushed, renamed."""
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path, script=SCRIPT):
    """(path, contents) of a checkpoint of `script`, read as data only: nothing in the file is executed."""
    path = pathlib.Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler fails in a dozen ways, and advises to run what the file says
        raise BadInput(f"{path}: missing, damaged or not a checkpoint ({type(error).__name__})") from error
    found = state.get("script") if isinstance(state, dict) else None
    if found != script:
        raise BadInput(f"{path}: a checkpoint of {found or 'something else'}, not of {script}")
    return path, state


class Log:
    """Rows of metrics, in metrics.jsonl and, with --track, in wandb."""

    def __init__(self, run_dir, args, offset):
        self.file, self.wandb = (run_dir / "metrics.jsonl").open("a"), None
        end = self.file.seek(min(offset, self.file.seek(0, os.SEEK_END)))
        self.file.truncate(end)  # rows after the checkpoint will be written again
        if args.track:
            import wandb

            try:
                self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args),
                                        id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow")
            except wandb.errors.Error as error:
                raise BadInput(f"--track: {error}; WANDB_MODE=offline needs no account and no network") from error

    def __call__(self, step, metrics):
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def parse_args(argv=None):
    """Flags, over the values of the checkpoint that --resume or --evaluate names, or else over the task's defaults.

    Returns the args, the checkpoint's path and its contents (both None without one).
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("env-id", "resume", "evaluate"):
        peek.add_argument(f"--{flag}", f"--{flag.replace('-', '_')}")
    given, _ = peek.parse_known_args(argv)
    path = checkpoint = None
    if given.resume and given.evaluate:
        raise BadInput("--resume and --evaluate exclude each other: the one trains on, the other only evaluates")
    if given.resume or given.evaluate:
        path, checkpoint = load(given.resume or given.evaluate)
        try:
            defaults = Args(**{**checkpoint["args"], "resume": None, "evaluate": None})
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path}: written by another version of {SCRIPT} ({error})") from error
    else:
        env_id = given.env_id or Args.env_id
        defaults = Args(env_id=env_id, **task_defaults(env_id))
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__.split("\n")[0])
    for key, value in asdict(args).items():
        flag = f"--{key.replace('_', '-')} {value}"
        least = 0 if key in ("seed", "ema_start", "online_steps") else 1
        if value == "":
            raise BadInput(f"{flag}is empty; is a shell variable unset?")
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value < 2**63:
            raise BadInput(f"{flag}: must be at least {least} and fit into 64 bits")
        if isinstance(value, float) and not (value >= 0 or key in ("reward_shift", "time_mean") and value > -math.inf):
            raise BadInput(f"{flag}: must be at least 0")
        if key == "utd" and value == math.inf:
            raise BadInput(f"{flag}: must be finite")
        if key in ("gamma", "tau") and not 0 <= value <= 1:
            raise BadInput(f"{flag}: must lie between 0 and 1")
        if checkpoint is not None and key not in ("resume", "evaluate") and value != getattr(defaults, key):
            print(f"{flag} instead of the checkpoint's {getattr(defaults, key)}")
    return args, path, checkpoint


def main(argv=None):
    """Runs the command line `argv` and returns the exit code: 0 done, 3 non-finite loss, 130 interrupted."""
    args, checkpoint_path, checkpoint = parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it for --torch-deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would write every new tensor twice
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("no CUDA device: running on the CPU")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # what a graph captures may not have begun on the default stream
    env, reference = make_env(args), reference_scores(args)
    torch.manual_seed(args.seed)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args, device)
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            agent.step = checkpoint["step"]
            if args.resume:
                agent.load_training_state(checkpoint["training"])
                if args.alpha != checkpoint["args"]["alpha"]:
                    agent.alpha.fill_(args.alpha)
        except (RuntimeError, KeyError, ValueError) as error:
            raise BadInput(f"{checkpoint_path} does not fit these flags, or is a policy.pt, which can be evaluated "
                           f"but not resumed ({str(error).splitlines()[0]})") from error
    candidates = args.num_candidates_eval or args.num_candidates
    if args.evaluate:
        video_dir = checkpoint_path.parent / "videos" if args.capture_video else None
        metrics = evaluate(agent, args, candidates, reference, video_dir, agent.step)
        print(json.dumps({"step": agent.step, "num_candidates": candidates, **metrics}))
        return 0

    data, data_returns = load_dataset(args, env)
    digest = hashlib.sha256()
    for key in sorted(data):
        digest.update(np.ascontiguousarray(data[key]))
    summary = {"sha256": digest.hexdigest(), "transitions": len(data["rewards"]), "episodes": len(data_returns),
               "mean_return": float(data_returns.mean()), "best_return": float(data_returns.max())}
    if checkpoint is None:
        if args.observation_normalization == "dataset":
            std = torch.as_tensor(data["observations"].std(0, dtype=np.float64))
            agent.obs_mean.copy_(torch.as_tensor(data["observations"].mean(0, dtype=np.float64)))
            agent.obs_std.copy_(torch.where(std < 1e-6, 1.0, std))
    elif checkpoint["data"]["sha256"] != summary["sha256"]:
        raise BadInput(f"{checkpoint_path} was trained on other data than {args.dataset_path or args.env_id} holds")
    elif checkpoint["args"]["observation_normalization"] != args.observation_normalization:
        raise BadInput("--observation-normalization cannot change in a resumed run")
    replay = {key: torch.as_tensor(value, device=device) for key, value in data.items()}
    for key in ("observations", "next_observations"):
        replay[key] = (replay[key] - agent.obs_mean) / agent.obs_std
    reward_scale, reward_shift = reward_scale_and_shift(args, data["rewards"], data_returns)
    replay["rewards"] = reward_scale * replay["rewards"] + reward_shift
    del data

    name = f"{args.env_id.replace('/', '_')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = checkpoint_path.parent if args.resume else pathlib.Path(args.runs_dir) / name
    video_dir = run_dir / "videos" if args.capture_video else None
    if args.track and not importlib.util.find_spec("wandb"):
        raise BadInput("--track needs wandb: pip install wandb")
    if args.capture_video:
        make_video_env(args, pathlib.Path(args.runs_dir), "test").close()  # fails now rather than after hours
    packages = ("torch", "numpy", "gymnasium", "mujoco", "minari")
    about = {"args": asdict(args), "data": summary, "device": str(device), "threads": torch.get_num_threads(),
             "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}}
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        (run_dir / "args.json").write_text(json.dumps(about, indent=2))
        log = Log(run_dir, args, checkpoint["log_offset"] if args.resume else 0)
    except OSError as error:
        raise BadInput(f"the run folder cannot be written ({error}): give another --runs-dir") from error
    score = "" if reference is None else f" (normalized {normalized_score(data_returns.mean(), reference):.1f})"
    print(f"{args.env_id}: {summary['transitions']} transitions, {summary['episodes']} episodes, mean return "
          f"{summary['mean_return']:.1f}{score}, best {summary['best_return']:.1f}; run folder {run_dir}")

    def evaluate_and_log(prefix, num_candidates):
        metrics = evaluate(agent, args, num_candidates, reference, video_dir, agent.step)
        log(agent.step, {name.replace("eval/", prefix): value for name, value in metrics.items()})
        text = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"step {agent.step}, N = {num_candidates}: {text}")

    interrupts = []
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
        signal.signal(number, lambda n, _: (interrupts.append(n), signal.signal(n, signal.SIG_DFL)))
    if args.resume:
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and checkpoint["random"]["cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"])
    bar = tqdm(total=args.offline_steps, initial=agent.step, unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step = time.time(), agent.step
    # A graph may only hold what has run before: three updates launch operation by operation first.
    graphs, graphs_from, replay_updates = args.cuda_graph and device.type == "cuda", agent.step + 3, None
    stop = False

    def update():
        return agent.update(sample(replay, args.batch_size))

    while agent.step < args.offline_steps and not stop:
        if agent.step and agent.step % args.eval_interval == 0:  # after the checkpoint, so that resuming repeats it
            paused = time.time()
            evaluate_and_log("eval/", candidates)
            clock += time.time() - paused
        intervals = args.log_interval, args.eval_interval, args.checkpoint_interval
        until_due = min(args.offline_steps - agent.step, *(n - agent.step % n for n in intervals))
        if graphs and agent.step >= graphs_from and until_due >= UPDATES_PER_REPLAY:
            replay_updates = replay_updates or capture(update, UPDATES_PER_REPLAY)
            parts, count = replay_updates(), UPDATES_PER_REPLAY
        else:
            parts, count = update(), 1
        agent.step += count
        bar.update(count)
        stop = agent.step == args.offline_steps or bool(interrupts)
        log_due, save_due = agent.step % args.log_interval == 0, agent.step % args.checkpoint_interval == 0 or stop
        if log_due or save_due or agent.step % args.eval_interval == 0:  # else losses stay on the device
            values = {f"losses/{name}": value.item() for name, value in parts.items()}
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                bar.close()
                log.close()
                print(f"{SCRIPT}: step {agent.step}: {bad[0]} is {values[bad[0]]}; the last good checkpoint is "
                      f"{run_dir / 'checkpoint.pt'}, if one was due", file=sys.stderr)
                return 3
            if log_due:
                ups, clock, clock_step = (agent.step - clock_step) / (time.time() - clock), time.time(), agent.step
                log(agent.step, {"charts/UPS": ups, **agent.charts(), **values})
        if save_due:
            state = dict(script=SCRIPT, args=asdict(args), step=agent.step, data=summary, agent=agent.state_dict())
            save(state, run_dir / "policy.pt")
            cuda_state = torch.cuda.get_rng_state() if device.type == "cuda" else None
            save(dict(state, training=agent.training_state(), log_offset=log.file.tell(),
                      random=dict(cpu=torch.get_rng_state(), cuda=cuda_state)), run_dir / "checkpoint.pt")
    bar.close()
    if interrupts:
        print(f"interrupted at step {agent.step}, state saved; continue with: python {SCRIPT}.py --resume {run_dir}")
        log.close()
        return 130
    evaluate_and_log("eval/", candidates)
    evaluate_and_log("eval_n1/", 1)
    log.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadInput as error:
        print(f"{SCRIPT}: {' '.join(str(error).split())}", file=sys.stderr)  # one line
        sys.exit(2)
