"""OFQL: one-step flow Q-learning, offline, in one file.

Paper: Nguyen, Yoo, "One-Step Flow Q-Learning", ICLR 2026, arXiv 2508.13904. Its authors have released no code. Where
the text is silent, this file follows the code of the first author's next paper (InsQL, a fork of CleanDiffuser),
CleanDiffuser or the official diffusion Q-learning; each flag's docstring says which.

One network u(a_t, r, t; s), the average velocity of a flow between the times r and t, maps Gaussian noise e to an
action in a single evaluation, a = e - u(e, 0, 1; s). Time t = 0 is the data and t = 1 the noise. The network is cloned
with the MeanFlow identity, on half of each batch with r = t, where it is plain flow matching; the critic's gradient
goes straight through the one step. The equations, as this file numbers them:

  (1) a_t = (1 - t) a + t e,  v = e - a                              path from the data a to the noise e
  (2) u_tgt = sg[v - (t - r) du/dt],  du/dt = v du/da + du/dt        MeanFlow identity, one JVP along (v, 0, 1)
  (3) L_FBC = mean |u - u_tgt|^2                                     cloning loss, mean over batch and dimensions
  (4) a(e) = clip(e - u(e, 0, 1; s), -1, 1),  e ~ N(0, I)            one-step action
  (5) t, r = max, min of two sigmoid(N(-0.4, 1));  r = t on a fraction of the batch
  (6) L_critic = sum_k mean (Q_k(s, a) - y)^2,  y = rew + gamma (1 - done) min_k max_i Q'_k(s', a'_i),  one a'_i or ten
  (7) L_actor = L_FBC - eta mean Q_i(s, a(e)) / sg[mean |Q_j(s, a(e))|],  {i, j} = {1, 2} at random
  (8) acting: of N actions a(T e_i), i is drawn with probability softmax(w min_k Q'_k(s, a(T e_i)))

What the paper's text (with official diffusion Q-learning for what it leaves open) and the author's code base do
differently is a flag each: `--critic-form`, `--observation-normalization`, `--reward-normalization`, `--tau` with
`--target-interval`, `--target-policy`, `--learning-rate-schedule`, `--weight-decay`, `--max-grad-norm`. The README
gives both sets as commands.
Deviations from the paper: eta per task is unpublished, so the values in `TASKS` are those that the first author's code
uses for the sibling method, snapped to the paper's grid; batches are drawn with replacement; the times with r = t are
the first rows of the batch, which are as random as any others. The defaults for locomotion (`LOCOMOTION`) and for
tasks that the paper does not cover are ours.
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
    """number of gradient steps W"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (6)"""
    tau: float = 0.005
    """Polyak rate of the target critic, after every --target-interval steps (0.005 and 1: official diffusion
    Q-learning; 0.995 and 5: CleanDiffuser and the author's code base, nearly a copy)"""
    target_interval: int = 1
    """gradient steps between two updates of the target critic"""
    reward_normalization: Literal["none", "return_range", "standardize"] = "none"
    """return_range: rewards times 1000 / (best - worst return of the data); standardize: to mean 0 and deviation 1"""
    reward_scale: float = 1.0
    """factor on the rewards in training; large returns (thousands) keep the critic from catching up with its target"""
    reward_shift: float = 0.0
    """added to the (scaled) rewards in training"""
    observation_normalization: Literal["dataset", "none"] = "dataset"
    """dataset: subtract the data's mean and divide by its standard deviation (author's code base; none: the paper)"""
    policy_width: int = 256
    """width of the policy's hidden layers"""
    policy_depth: int = 3
    """number of the policy's hidden layers"""
    critic_width: int = 256
    """width of the critic's hidden layers"""
    critic_depth: int = 3
    """number of the critic's hidden layers"""
    critic_form: Literal["layer_norm", "plain"] = "layer_norm"
    """plain: (Linear, Mish) as in the paper; layer_norm: (Linear, LayerNorm, Mish), the first with Tanh instead of
    Mish, as in the author's code base"""
    num_candidates: int = 50
    """N of Eq. (8); the paper's timing suggests 50, CleanDiffuser's number"""
    num_candidates_eval: int | None = None
    """N when acting; None is --num-candidates. The final evaluation also reports N = 1"""
    inverse_temperature: float = 50.0
    """w of Eq. (8): larger is greedier. It weighs values in units of the scaled reward (CleanDiffuser's, per task)"""
    noise_temperature: float = 0.5
    """T of Eq. (8): factor on the noise when acting (0.5: CleanDiffuser; 1: author's code base)"""
    acting_policy: Literal["ema", "online"] = "ema"
    """which policy acts: its moving average (CleanDiffuser) or itself (author's code base)"""
    target_policy: Literal["ema", "online"] = "online"
    """which policy proposes a' in Eq. (6): ema is the paper's text, online the author's code base"""
    ema_rate: float = 0.005
    """every 5 steps the moving average of the policy moves this far towards the policy"""
    ema_start: int = 1000
    """gradient steps before the moving average of the policy begins to move"""
    max_q_backup: bool = False
    """Eq. (6) with the best of ten actions for each critic (the paper: AntMaze only) instead of a single action"""
    eta: float = 0.1
    """weight of the Q term in Eq. (7): smaller stays closer to the data (the paper's grid: .001, .01, .1, .3, .5)"""
    flow_ratio: float = 0.5
    """fraction of the batch with r = t, Eq. (5); 1 is plain flow matching"""
    time_sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    """distribution of the two times before they are sorted, Eq. (5)"""
    time_mean: float = -0.4
    """mean of the normal distribution behind logit-normal times"""
    time_std: float = 1.0
    """standard deviation of the normal distribution behind logit-normal times"""
    learning_rate: float = 3e-4
    """step size of Adam, for the policy and the critic"""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: down to 0 over the run (author's code base); constant: official diffusion Q-learning in effect"""
    weight_decay: float = 0.0
    """decoupled weight decay of the policy's Adam (CleanDiffuser: 0.01)"""
    max_grad_norm: float | None = None
    """gradient-norm clip, for the policy and the critic apart; None is none (official diffusion Q-learning: 1..10)"""


# Values that differ per task: the first pattern that matches --env-id sets the defaults of the flags it names. The
# inverse temperatures are CleanDiffuser's. The paper publishes no eta per task: these are the ones that the author's
# code base uses for the sibling method, on the paper's grid. Rewards and steps are the paper's except for the shift of
# AntMaze (author's code base; the paper: --reward-scale 4 --reward-shift -2).
TASKS = {
    # pattern: inverse temperature w, eta, further flags
    r"antmaze-umaze(-diverse)?-v2": (10, 0.01, dict(reward_shift=-1.0)),  # not in the paper: medium-play's values
    r"antmaze-medium-play-v2": (10, 0.01, dict(reward_shift=-1.0, max_q_backup=True)),
    r"antmaze-medium-diverse-v2": (5, 0.001, dict(reward_shift=-1.0, max_q_backup=True)),
    r"antmaze-large-play-v2": (5, 0.3, dict(reward_shift=-1.0, max_q_backup=True)),
    r"antmaze-large-diverse-v2": (10, 0.3, dict(reward_shift=-1.0, max_q_backup=True)),
    r"kitchen-(partial|mixed)-v0": (3, 0.01, dict()),
    r"pen-(human|cloned)-v1": (50, 0.1, dict(reward_normalization="standardize")),  # all official diffusion Q-learning
}
BUNDLED = "meanflow/hopper/medium-replay-v0"
# The code base's target network and schedule, the rest ours, found on Hopper data (benchmark/results; on HalfCheetah a
# slower target network did better). The README gives the paper's and the code base's own settings as commands, with
# their eta and w for each task.
LOCOMOTION = dict(gamma=0.995, tau=0.995, target_interval=5, reward_scale=0.1, eta=0.1, inverse_temperature=30.0,
                  noise_temperature=1.0, learning_rate_schedule="cosine")


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict; a name that nothing is known of gets those of the class."""
    if env_id == BUNDLED:  # sizes that two CPU cores train in minutes
        return dict(LOCOMOTION, offline_steps=20_000, eval_episodes=20, eval_interval=4_000,
                    policy_width=128, critic_width=128, compile=shutil.which("g++") is not None)
    if re.match(r"([\w.-]+/)?halfcheetah[-/]", env_id):  # never falls: a short horizon and a strong Q term serve
        return dict(LOCOMOTION, gamma=0.99, tau=0.01, target_interval=1, eta=2.0, inverse_temperature=1.0,
                    offline_steps=2_000_000)
    if re.match(r"([\w.-]+/)?(hopper|walker2d|ant)[-/]", env_id):
        return dict(LOCOMOTION, offline_steps=2_000_000)
    for pattern, (inverse_temperature, eta, more) in TASKS.items():
        if re.fullmatch(pattern, env_id):
            return dict(inverse_temperature=inverse_temperature, eta=eta, **more)
    return {}


# ---------------------------------------------------------------- networks
def mish(x):
    """Mish, x tanh(log(1 + e^x)); compiled as x n / (n + 2) with n = e^x (e^x + 2), which has one exponential."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    w = x.clamp(max=20).exp()
    n = w * (w + 2)
    return x * n / (n + 2)


class Policy(nn.Module):
    """u(a_t, r, t; s), the average velocity from r to t: an MLP on action, state and the two embedded times."""

    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(32) / 32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed_t, self.embed_r = (nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 64)]) for _ in "tr")
        sizes = [obs_dim + act_dim + 128, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.final = nn.Linear(width, act_dim)

    def embed(self, layers, t):
        """(..., 1) times, not rescaled, to (..., 64) features."""
        angles = t * self.frequencies
        first, second = layers
        return second(mish(first(torch.cat([angles.cos(), angles.sin()], -1))))

    def forward(self, observations, a_t, r, t):
        """observations (..., O), a_t (..., A), r and t (..., 1) in [0, 1]; returns (..., A), unbounded.

        Times of shape (1, 1) are embedded once and broadcast, which makes one-step actions cheaper.
        """
        times = torch.cat([self.embed(self.embed_t, t), self.embed(self.embed_r, r)], -1)
        x = torch.cat([a_t, times.expand(*a_t.shape[:-1], -1), observations], -1)
        for layer in self.hidden:
            x = mish(layer(x))
        return self.final(x)


class TwinCritic(nn.Module):
    """Two independent critics Q_1, Q_2, as batched products; --critic-form says what follows each linear map."""

    def __init__(self, obs_dim, act_dim, width, depth, form):
        super().__init__()
        self.form = form
        sizes = [obs_dim + act_dim, *[width] * depth, 1]
        self.weights = nn.ParameterList(torch.empty(2, i, o) for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.empty(2, 1, o) for o in sizes[1:])
        norms = depth if form == "layer_norm" else 0
        self.norm_gains = nn.ParameterList(torch.ones(2, 1, width) for _ in range(norms))
        self.norm_biases = nn.ParameterList(torch.zeros(2, 1, width) for _ in range(norms))
        for weight, bias in zip(self.weights, self.biases):  # nn.Linear's initialisation
            nn.init.uniform_(weight, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)
            nn.init.uniform_(bias, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)

    def forward(self, observations, actions):
        """observations (..., O), actions (..., A); returns both values, (2, ...)."""
        x = torch.cat([observations, actions], -1)
        shape = x.shape[:-1]
        x = x.flatten(0, -2).expand(2, -1, -1)
        for i in range(len(self.weights) - 1):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            if self.form == "layer_norm":
                x = F.layer_norm(x, x.shape[-1:]) * self.norm_gains[i] + self.norm_biases[i]
            x = x.tanh() if self.form == "layer_norm" and i == 0 else mish(x)
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).reshape(2, *shape)


# ---------------------------------------------------------------- algorithm
def sample_times(batch_size, args, device):
    """t and r, (B, 1) each, r <= t. Eq. (5)"""
    if args.time_sampling == "uniform":
        times = torch.rand(2, batch_size, 1, device=device)
    else:
        times = torch.sigmoid(args.time_mean + args.time_std * torch.randn(2, batch_size, 1, device=device))
    t, r = times.amax(0), times.amin(0)
    plain = int(args.flow_ratio * batch_size)
    r[:plain] = t[:plain]  # the rows are independent, so the first ones are as good as any
    return t, r


def mean_flow_output_and_target(policy, observations, actions, noise, t, r):
    """The network's output at (a_t, r, t; s) and its stop-gradient regression target, both (B, A)."""
    a_t, v = (1 - t) * actions + t * noise, noise - actions  # Eq. (1)
    u, du_dt = jvp(lambda a, r, t: policy(observations, a, r, t), (a_t, r, t),
                   (v, torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = v - (t - r) * du_dt  # Eq. (2)
    return u, u_tgt.detach()


def mean_flow_loss(policy, observations, actions, noise, t, r):
    """L_FBC, Eq. (3): a scalar."""
    u, u_tgt = mean_flow_output_and_target(policy, observations, actions, noise, t, r)
    return (u - u_tgt).square().mean()  # Eq. (3)


def one_step_action(policy, observations, noise):
    """clip(e - u(e, 0, 1; s)), (..., A): one evaluation of the network. Eq. (4)"""
    one = noise.new_ones((1,) * noise.dim())
    return (noise - policy(observations, noise, torch.zeros_like(one), one)).clamp(-1, 1)


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (6): a scalar. next_noise: (B, M, A), M = 10 with --max-q-backup and 1 without."""
    with torch.no_grad():
        observations = batch["next_observations"].unsqueeze(1).expand(-1, next_noise.shape[1], -1)
        q_next = target_critic(observations, one_step_action(policy, observations, next_noise))  # (2, B, M)
        q_next = q_next.amax(2).amin(0)  # the best action of each critic, then the smaller critic
        q_target = batch["rewards"] + args.gamma * batch["masks"] * q_next
    return (critic(batch["observations"], batch["actions"]) - q_target).square().mean(1).sum()  # Eq. (6)


def actor_loss(policy, critic, batch, draws, args):
    """L_actor, Eq. (7): a scalar, and a dict of its parts."""
    noise, (t, r), actor_noise, swap = draws
    l_fbc = mean_flow_loss(policy, batch["observations"], batch["actions"], noise, t, r)
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    actions = one_step_action(policy, batch["observations"], actor_noise)
    q = functional_call(critic, frozen, (batch["observations"], actions))  # (2, B)
    q_i, q_j = torch.where(swap, q.flip(0), q)
    l_q = -q_i.mean() / q_j.detach().abs().mean()
    return l_fbc + args.eta * l_q, dict(mean_flow=l_fbc.detach(), q=l_q.detach(), q_mean=q.detach().mean())  # Eq. (7)


def learning_rate(step, args):
    """Step size of gradient step number `step` (from 0), a tensor."""
    if args.learning_rate_schedule == "constant":
        return torch.full_like(step, args.learning_rate, dtype=torch.float32)
    return args.learning_rate * 0.5 * (1 + torch.cos(math.pi * (step / args.offline_steps).clamp(max=1)))


@torch.no_grad()  # else the copies would carry the history of every update
def move(target, source, weight):
    """target += weight (source - target), parameter by parameter; weight: a scalar of the device."""
    targets, sources = list(target.parameters()), list(source.parameters())
    steps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(targets, steps)


class Agent(nn.Module):
    """Networks, optimisers and schedules of OFQL: `update` is one gradient step, `act` is Eq. (8)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args, self.step = args, 0  # gradient steps; `updates` counts them on the device, for the schedules
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.ema_policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.ema_policy.load_state_dict(self.policy.state_dict())
        self.ema_policy.requires_grad_(False)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.to(device)
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.AdamW(self.policy.parameters(), lr=torch.zeros((), device=device),
                                                 weight_decay=args.weight_decay, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=torch.zeros((), device=device), **adam)
        self.critic_loss = torch.compile(critic_loss) if args.compile else critic_loss
        self.actor_loss = torch.compile(actor_loss) if args.compile else actor_loss

    def update(self, batch):
        """One gradient step on a batch of normalised observations; returns the losses as device scalars."""
        args, device, (batch_size, act_dim) = self.args, self.obs_mean.device, batch["actions"].shape
        next_noise = torch.randn(batch_size, 10 if args.max_q_backup else 1, act_dim, device=device)
        draws = (
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
            sample_times(batch_size, args, device),
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (7)
            torch.rand((), device=device) < 0.5,  # which critic is i in Eq. (7)
        )
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"].copy_(learning_rate(self.updates, args))

        target_policy = self.ema_policy if args.target_policy == "ema" else self.policy
        l_critic = self.critic_loss(target_policy, self.critic, self.target_critic, batch, next_noise, args)
        self.critic_optimizer.zero_grad()
        l_critic.backward()
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)
        self.critic_optimizer.step()

        l_actor, parts = self.actor_loss(self.policy, self.critic, batch, draws, args)
        self.actor_optimizer.zero_grad()
        l_actor.backward()
        if args.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        self.actor_optimizer.step()

        self.updates += 1
        target_due = self.updates % args.target_interval == 0
        ema_due = (self.updates % 5 == 0) & (self.updates >= args.ema_start)
        move(self.target_critic, self.critic, args.tau * target_due)
        move(self.ema_policy, self.policy, args.ema_rate * ema_due)
        return dict(critic=l_critic.detach(), **parts)

    @torch.no_grad()
    def act(self, observations, num_candidates, generator):
        """One of `num_candidates` one-step actions, (B, A) in [-1, 1], for raw observations (B, O). Eq. (8)"""
        observations = (observations - self.obs_mean) / self.obs_std
        observations = observations.unsqueeze(1).expand(-1, num_candidates, -1)
        shape = *observations.shape[:2], self.policy.final.out_features
        noise = torch.randn(shape, device=observations.device, generator=generator)
        policy = self.ema_policy if self.args.acting_policy == "ema" else self.policy
        candidates = one_step_action(policy, observations, self.args.noise_temperature * noise)  # (B, N, A)
        if num_candidates == 1:
            return candidates[:, 0]
        q = self.target_critic(observations, candidates).amin(0)  # (B, N)
        index = torch.multinomial(torch.softmax(self.args.inverse_temperature * q, 1), 1, generator=generator)
        return candidates[torch.arange(len(index), device=index.device), index[:, 0]]

    def charts(self):
        """What the log shows besides the losses."""
        return {"charts/learning_rate": self.actor_optimizer.param_groups[0]["lr"].item()}

    def training_state(self):
        """What continuing needs besides `state_dict()`."""
        return dict(actor_optimizer=self.actor_optimizer.state_dict(),
                    critic_optimizer=self.critic_optimizer.state_dict())

    def load_training_state(self, state):
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
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
