"""OFQL: one-step flow Q-learning, offline, in one file.

Paper: Nguyen, Yoo, "One-Step Flow Q-Learning", ICLR 2026, arXiv 2508.13904. Its authors have released no code. Where
the text is silent, this file follows one of three code bases: that of the first author's InsQL (a fork of
CleanDiffuser), here called the author's code base, CleanDiffuser, or the official diffusion Q-learning.

One network u(a_t, r, t; s), the average velocity [10] of a flow between the times r and t, maps Gaussian noise e to an
action in a single evaluation, a = e - u(e, 0, 1; s). Time t = 0 is the data and t = 1 the noise. The network imitates
the data by regression on the MeanFlow identity; half of each batch has r = t, which is plain flow matching. The
critic's gradient goes straight through the one step. The algorithm ends with `Agent`; data, evaluation, checkpoints
and the loop follow, with the same text in the sibling scripts. The equations, as this file numbers them, with [the
paper's numbers]:

  (1) a_t = (1 - t) a + t e,  v = e - a                              path from the data a to the noise e [8]
  (2) u_tgt = sg[v - (t - r) du/dt],  du/dt = v ∂u/∂a_t + ∂u/∂t      MeanFlow identity, one JVP along (v, 0, 1) [13-15]
  (3) L_FBC = mean |u - u_tgt|^2                                     cloning loss, mean over rows and numbers [13-15]
  (4) a(e) = clip(e - u(e, 0, 1; s), -1, 1),  e ~ N(0, I)            one-step action [12, 16]
  (5) t, r = max, min of two sigmoid(N(-0.4, 1));  r = t on half of the batch [Sec. 5]
  (6) L_critic = sum_k mean (Q_k(s, a) - y)^2,  y = sg[rew + gamma (1 - done) min_k max_i Q'_k(s', a'_i)] [17],
      Q' the target critics, a'_i = a(e_i) at s': one, or ten with --max-q-backup
  (7) L_actor = L_FBC - eta mean Q_i(s, a(e)) / sg[mean |Q_j(s, a(e))|],  {i, j} = {1, 2} at random [after 38]
  (8) acting: of N actions a(T e_i), i is drawn with probability softmax(w min_k Q'_k(s, a(T e_i))): CleanDiffuser's

On the paper's tasks (`TASKS`) the defaults are its text and, where that is silent, the author's code base; what that
code base does otherwise is a flag each, and all of it a command in docs/algorithms.md. Deviations from the text: (3)
is a mean (there a squared norm), which sets the unit of eta; (4) clips (not stated there); (7) takes one random critic
and divides by the other's mean |Q| at the policy's actions (there by that at the data's); all as in the three code
bases. eta per task is unpublished. On other data the defaults are ours: the policy itself proposes a' (in the paper
its moving average), and the critic has LayerNorm and a Tanh (there neither).
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
import shutil
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
from torch.func import functional_call, jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem
UPDATES_PER_REPLAY = 10  # gradient steps of one CUDA graph
EMA_INTERVAL = 5  # gradient steps between two of the policy's moving average: diffusion Q-learning, CleanDiffuser
MAX_Q_ACTIONS = 10  # next actions with --max-q-backup: diffusion Q-learning, CleanDiffuser, author's code base
gym.logger.min_level = gym.logger.ERROR  # else it advises against Hopper-v4 and the like, which D4RL's tasks need


@dataclass
class Args:
    env_id: str = "meanflow/hopper/medium-replay-v0"
    """a D4RL name (hopper-medium-v2), a Minari id (mujoco/hopper/medium-v0), an OGBench task
    (cube-single-play-singletask-task2-v0), or a Gymnasium id (Hopper-v5) together with --dataset-path"""
    dataset_path: str | None = None
    """the data, if not at the usual place: an HDF5 file in D4RL's layout, or a folder of Minari data sets"""

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
    offline_steps: int = 1_000_000
    """number of gradient steps"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (6)"""
    tau: float = 0.005
    """Polyak rate of the target critic, after every --target-interval steps (0.005 and 1: official diffusion
    Q-learning; 0.995 and 5, nearly a copy: CleanDiffuser, author's code base; the paper gives neither)"""
    target_interval: int = 1
    """gradient steps between two updates of the target critic"""
    reward_normalization: Literal["none", "return_range", "standardize"] = "none"
    """return_range: times 1000 / (best - worst return of the data) (author's code base, locomotion); standardize: to
    mean 0 and deviation 1 (official diffusion Q-learning, Adroit)"""
    reward_scale: float = 1.0
    """factor on the rewards in training; returns of thousands take the critic long to reach"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training"""
    observation_normalization: Literal["dataset", "none"] = "dataset"
    """dataset: subtract the data's mean and divide by its standard deviation (author's code base)"""
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
    """N of Eq. (8); the paper's timing suggests 50, CleanDiffuser's number. The final evaluation also reports N = 1"""
    inverse_temperature: float = 50.0
    """w of Eq. (8): larger is greedier; per task CleanDiffuser's. It has the unit of 1 / (scaled reward)"""
    noise_temperature: float = 0.5
    """T of Eq. (8): factor on the noise when acting (0.5: CleanDiffuser; 1: author's code base)"""
    acting_policy: Literal["ema", "online"] = "ema"
    """which policy acts: its moving average (CleanDiffuser) or itself (author's code base)"""
    target_policy: Literal["ema", "online"] = "online"
    """which policy proposes a' in Eq. (6): ema is the paper's text, online the author's code base"""
    ema_rate: float = 0.005
    """every 5 steps the moving average of the policy moves by this fraction of the distance to the policy"""
    ema_start: int = 1000
    """gradient steps before the moving average begins to move; until then it is the initial network"""
    max_q_backup: bool = False
    """Eq. (6) with the best of ten actions for each critic (the paper: AntMaze only) instead of a single action"""
    eta: float = 0.1
    """weight of the Q term in Eq. (7): smaller stays closer to the data (the paper's grid: .001, .01, .1, .3, .5)"""
    flow_ratio: float = 0.5
    """fraction of the batch with r = t, Eq. (5), the paper's lambda; 1 is plain flow matching"""
    time_sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    """distribution of the two times before they are sorted, Eq. (5); the paper compares the two"""
    learning_rate: float = 3e-4
    """step size of Adam, for the policy and the critic"""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: down to 0 over the run (author's code base); constant: official diffusion Q-learning in effect"""
    weight_decay: float = 0.0
    """decoupled weight decay of the policy's Adam (CleanDiffuser: 0.01)"""
    max_grad_norm: float | None = None
    """gradient-norm clip, for the policy and the critic apart; None is none (official diffusion Q-learning: 1..10)"""


RANGES = {  # least and largest value, for all scripts; other whole numbers 1 to a billion, other numbers 1e-12 to 1e9
    **dict.fromkeys(("gamma", "ema_rate", "flow_ratio", "adaptive_power"), (0, 1)), "tau": (1e-9, 1),
    **dict.fromkeys(("ema_start", "online_steps", "learning_starts"), (0, 10**9)), "seed": (0, 2**63 - 1),
    **dict.fromkeys(("alpha", "online_alpha", "eta", "bound_weight", "exploration_noise", "weight_decay",
                     "inverse_temperature", "noise_temperature"), (0, 1e9)), "reward_shift": (-1e9, 1e9),
    "utd": (1e-6, 1000), "batch_size": (1, 10**6), "policy_depth": (1, 1000), "critic_depth": (1, 1000),
    **dict.fromkeys(("eval_episodes", "num_envs", "policy_width", "critic_width", "num_candidates", "num_proposals",
                     "num_candidates_eval", "num_candidates_target"), (1, 10_000)),
}
# The paper's tasks: its text and, where that is silent, the author's code base (whose own settings are one command of
# docs/algorithms.md). The inverse temperatures are CleanDiffuser's. The paper publishes no eta per task: these are
# InsQL's in the author's code base, snapped to the paper's grid.
PAPER = dict(tau=0.995, target_interval=5, target_policy="ema", critic_form="plain", learning_rate_schedule="cosine",
             weight_decay=0.01)
MUJOCO = dict(PAPER, offline_steps=2_000_000)
ANTMAZE = dict(PAPER, reward_scale=4.0, reward_shift=-2.0)
TASKS = {
    # pattern: inverse temperature w, eta, further flags
    r"halfcheetah-medium-expert-v2": (50, 0.1, MUJOCO),
    r"hopper-medium-expert-v2": (8, 0.01, MUJOCO),
    r"halfcheetah-medium(-replay)?-v2": (50, 0.5, MUJOCO),  # no eta in the code base: the grid's largest
    r"hopper-medium(-replay)?-v2": (100, 0.01, MUJOCO),
    r"walker2d-medium(-expert)?-v2": (300, 0.1, MUJOCO),
    r"walker2d-medium-replay-v2": (300, 0.01, MUJOCO),
    r"antmaze-umaze(-diverse)?-v2": (10, 0.01, ANTMAZE),  # not in the paper: medium-play's w, eta
    r"antmaze-medium-play-v2": (10, 0.01, dict(ANTMAZE, max_q_backup=True)),
    r"antmaze-medium-diverse-v2": (5, 0.001, dict(ANTMAZE, max_q_backup=True)),
    r"antmaze-large-play-v2": (5, 0.3, dict(ANTMAZE, max_q_backup=True)),
    r"antmaze-large-diverse-v2": (10, 0.3, dict(ANTMAZE, max_q_backup=True)),
    r"kitchen-(complete|partial|mixed)-v0": (3, 0.01, PAPER),  # eta: official diffusion Q-learning's .005, snapped
    # reward and eta (human: .15) as official diffusion Q-learning; w ours
    r"pen-(human|cloned)-v1": (50, 0.1, dict(PAPER, reward_normalization="standardize")),
}
BUNDLED = "meanflow/hopper/medium-replay-v0"
# Other locomotion data: target network, schedule and noise temperature are the author's code base's, the rest ours
# (docs/early_results.md).
LOCOMOTION = dict(gamma=0.995, tau=0.995, target_interval=5, reward_scale=0.1, eta=0.1, inverse_temperature=30.0,
                  noise_temperature=1.0, learning_rate_schedule="cosine")


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict; a name that nothing is known of gets those of the class."""
    if env_id == BUNDLED:  # sizes that two CPU cores train in minutes
        return dict(LOCOMOTION, offline_steps=20_000, eval_episodes=20, eval_interval=4_000,
                    checkpoint_interval=1_000, policy_width=128, critic_width=128,
                    compile=shutil.which("g++") is not None)
    for pattern, (inverse_temperature, eta, more) in TASKS.items():
        if re.fullmatch(pattern, env_id):
            return dict(more, inverse_temperature=inverse_temperature, eta=eta)
    if re.match(r"([\w.-]+/)?halfcheetah[-/]", env_id.lower()):  # ours, from one file, which it does not master
        return dict(LOCOMOTION, gamma=0.99, tau=0.01, target_interval=1, eta=2.0, inverse_temperature=1.0,
                    offline_steps=2_000_000)
    if re.match(r"([\w.-]+/)?(hopper|walker2d|ant)[-/]", env_id.lower()):  # Hopper-v5 as well
        return dict(LOCOMOTION, offline_steps=2_000_000)
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
        return layers[1](mish(layers[0](torch.cat([angles.cos(), angles.sin()], -1))))

    def forward(self, observations, a_t, r, t):
        """observations (..., O), a_t (..., A), r and t (..., 1), or (1, 1) to be embedded once; returns (..., A)."""
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
        times = torch.sigmoid(-0.4 + torch.randn(2, batch_size, 1, device=device))  # Eq. (5): sigmoid(N(-0.4, 1))
    t, r = times.amax(0), times.amin(0)  # Eq. (5): t, r = max, min
    plain = int(args.flow_ratio * batch_size)
    r[:plain] = t[:plain]  # Eq. (5): r = t; the rows are independent, so the first ones are as good as any
    return t, r


def mean_flow_output_and_target(policy, observations, actions, noise, t, r):
    """The network's output at (a_t, r, t; s) and its stop-gradient regression target, both (B, A)."""
    a_t, v = (1 - t) * actions + t * noise, noise - actions  # Eq. (1): a_t = (1 - t) a + t e, v = e - a
    u, du_dt = jvp(lambda a, r, t: policy(observations, a, r, t), (a_t, r, t),
                   (v, torch.zeros_like(r), torch.ones_like(t)))  # Eq. (2): du/dt = v ∂u/∂a_t + ∂u/∂t
    u_tgt = v - (t - r) * du_dt  # Eq. (2): u_tgt = v - (t - r) du/dt
    return u, u_tgt.detach()


def mean_flow_loss(policy, observations, actions, noise, t, r):
    """L_FBC, Eq. (3): a scalar."""
    u, u_tgt = mean_flow_output_and_target(policy, observations, actions, noise, t, r)
    return (u - u_tgt).square().mean()  # Eq. (3): L_FBC = mean |u - u_tgt|^2


def one_step_action(policy, observations, noise):
    """The action that noise (..., A) becomes, (..., A): one evaluation of the network. Eq. (4)"""
    u = policy(observations, noise, noise.new_zeros(1, 1), noise.new_ones(1, 1))
    return (noise - u).clamp(-1, 1)  # Eq. (4): a(e) = clip(e - u(e, 0, 1; s), -1, 1)


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (6): a scalar. next_noise: (B, M, A), M = 10 with --max-q-backup and 1 without."""
    with torch.no_grad():
        observations = batch["next_observations"].unsqueeze(1).expand(-1, next_noise.shape[1], -1)
        q_next = target_critic(observations, one_step_action(policy, observations, next_noise))  # (2, B, M)
        q_next = q_next.amax(2).amin(0)  # Eq. (6): min_k max_i Q'_k(s', a'_i)
        y = batch["rewards"] + args.gamma * batch["masks"] * q_next  # Eq. (6): y = rew + gamma (1 - done) Q'
    q = critic(batch["observations"], batch["actions"])
    return (q - y).square().mean(1).sum()  # Eq. (6): sum_k mean (Q_k - y)^2


def actor_loss(policy, critic, batch, draws, args):
    """L_actor, Eq. (7): a scalar, and a dict of its parts."""
    noise, (t, r), actor_noise, swap = draws
    l_fbc = mean_flow_loss(policy, batch["observations"], batch["actions"], noise, t, r)
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    actions = one_step_action(policy, batch["observations"], actor_noise)
    q = functional_call(critic, frozen, (batch["observations"], actions))  # (2, B)
    q_i, q_j = torch.where(swap, q.flip(0), q)  # no `if`: a CUDA graph is to draw {i, j} anew at each replay
    l_q = -q_i.mean() / q_j.detach().abs().mean().clamp(min=1e-6)  # Eq. (7): -mean Q_i / sg[mean |Q_j|], never 0 / 0
    l_actor = l_fbc + args.eta * l_q  # Eq. (7): L_FBC - eta mean Q_i / sg[mean |Q_j|]
    return l_actor, dict(mean_flow=l_fbc.detach(), q=l_q.detach(), q_mean=q.detach().mean())


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


def reward_scale_and_shift(args, rewards, about_data):
    """(scale, shift) of the rewards in training, r -> scale r + shift, from the data's rewards and episode returns."""
    scale, shift = args.reward_scale, args.reward_shift
    if args.reward_normalization == "return_range":
        scale *= 1000 / max(about_data["best"] - about_data["worst"], 1e-6)
    elif args.reward_normalization == "standardize":
        std = max(rewards.std(dtype=np.float64), 1e-6)
        scale, shift = scale / std, shift - scale * rewards.mean(dtype=np.float64) / std
    return float(scale), float(shift)


class Agent(nn.Module):
    """Networks, optimisers and schedules of OFQL: `update` is one gradient step, `act` is Eq. (8)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.ema_policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.ema_policy.load_state_dict(self.policy.state_dict())
        self.ema_policy.requires_grad_(False)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # counted on the device, for the schedules
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
        next_noise = torch.randn(batch_size, MAX_Q_ACTIONS if args.max_q_backup else 1, act_dim, device=device)
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
        # An `if` would be settled when a CUDA graph is captured, so what is not due moves by the weight 0.
        target_due = self.updates % args.target_interval == 0
        ema_due = (self.updates % EMA_INTERVAL == 0) & (self.updates >= args.ema_start)
        move(self.target_critic, self.critic, args.tau * target_due)
        move(self.ema_policy, self.policy, args.ema_rate * ema_due)
        return dict(critic=l_critic.detach(), **parts)

    @torch.no_grad()
    def act(self, observations, num_candidates, generator):
        """One of `num_candidates` one-step actions, (B, A) in [-1, 1], for raw observations (B, O). Eq. (8)"""
        observations = (observations - self.obs_mean) / self.obs_std
        observations = observations.unsqueeze(1).expand(-1, num_candidates, -1)
        shape = *observations.shape[:2], self.policy.final.out_features
        noise = self.args.noise_temperature * torch.randn(shape, device=observations.device, generator=generator)
        policy = self.ema_policy if self.args.acting_policy == "ema" else self.policy
        candidates = one_step_action(policy, observations, noise)  # Eq. (8): a(T e_i), (B, N, A)
        if num_candidates == 1:
            return candidates[:, 0]
        q = self.target_critic(observations, candidates).amin(0)  # (B, N)
        gumbel = -torch.empty_like(q).exponential_(generator=generator).log()
        index = (self.args.inverse_temperature * q + gumbel).argmax(1)  # Eq. (8): i ~ softmax(w min_k Q'_k)
        return candidates[torch.arange(len(index), device=index.device), index]

    def charts(self):
        """What the log shows besides the losses."""
        return {"charts/learning_rate": self.actor_optimizer.param_groups[0]["lr"].item()}


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


D4RL = {  # successor of D4RL's environment, its arguments, and D4RL's returns of a random and of an expert policy
    "hopper": dict(env_id="Hopper-v4", kwargs={}, reference=(-20.272305, 3234.3)),
    "halfcheetah": dict(env_id="HalfCheetah-v4", kwargs={}, reference=(-280.178953, 12135.0)),
    "walker2d": dict(env_id="Walker2d-v4", kwargs={}, reference=(1.629008, 4592.3)),
    "ant": dict(env_id="Ant-v4", kwargs={"use_contact_forces": True}, reference=(-325.6, 3879.7)),
}


def load_hdf5(env_id, path):
    """Task, transitions, their rows and the episodes' returns of a file in D4RL's layout. A task is plain values, so
    that a checkpoint can hold it. A row at a timeout has no next observation and is left out, as is the last row."""
    import h5py

    folder = pathlib.Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    name = re.fullmatch(f"({'|'.join(D4RL)})-((random|medium|expert|full-replay)|medium-(replay|expert))-v2", env_id)
    usual = folder / (f"{name[1]}_{name[2].replace('-', '_')}-v2.hdf5" if name else f"flat/{env_id}.hdf5")
    path, missing = path or usual, path is None and not usual.exists()
    fetch = pathlib.Path(__file__).with_name("data") / "fetch.py"  # knows all tasks, and more than one server
    if missing and fetch.exists():
        if code := subprocess.run([sys.executable, fetch, env_id]).returncode:
            sys.exit(code)  # it has said why
    elif missing and name:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{path.name}", path)
    if not path.is_file():
        raise BadInput(f"{path} is no file: make it with data/fetch.py, or name one with --dataset-path")
    with h5py.File(path) as file:
        recorded_in, *reference = (file.attrs.get(key) for key in ("env_id", "ref_min_score", "ref_max_score"))
        keys = "rewards", "terminals", "timeouts", "observations", "actions"
        for key in keys:
            rows = file[key].shape if key in keys[:3] else file[key].shape[:1]
            if file[key].dtype.kind not in "biuf" or rows != file["rewards"].shape[:1]:
                raise BadInput(f"{path}: {key} must be numbers, one row for each reward, not {file[key]}")
        rewards, terminals, timeouts, observations, actions = (file[key][()] for key in keys)
    if not (np.isin(terminals, (0, 1)).all() and np.isin(timeouts, (0, 1)).all()):
        raise BadInput(f"{path}: terminals and timeouts must be 0 or 1")
    if str(recorded_in).endswith(f":{env_id}"):
        env_id = recorded_in  # data/fetch.py puts the module before it that knows the task
    reference = None if None in reference else tuple(map(float, reference))  # NumPy's would not load again
    task = D4RL[name[1]] if name else dict(env_id=env_id, kwargs={}, reference=reference)
    if recorded_in is not None and recorded_in.split("-v")[0] != task["env_id"].split("-v")[0]:
        raise BadInput(f"{path} was recorded in {recorded_in}, not in {task['env_id']}")
    rows, ends = np.flatnonzero(timeouts[:-1] == 0), np.flatnonzero(terminals + timeouts) + 1
    data = dict(observations=observations[rows], actions=actions[rows], rewards=rewards[rows],
                masks=1.0 - terminals[rows], next_observations=observations[rows + 1])
    return task, data, rows, [episode.sum() for episode in np.split(rewards, ends)[:len(ends)]]


def load_minari(env_id, folder):
    """The same of a Minari data set: in `folder`, or else bundled beside this file, or else in Minari's own folder,
    downloaded if need be. Minari stores an episode's last observation too, so no row is lost."""
    import minari

    if folder is None and (pathlib.Path(__file__).with_name("data") / env_id).exists():
        folder = pathlib.Path(__file__).with_name("data")
    dataset = minari.MinariDataset(folder / env_id / "data") if folder else minari.load_dataset(env_id, download=True)
    # The environment comes from Gymnasium's registry, by its name: the entry point in a file could be any code.
    metadata = dataset.storage.metadata
    spec = json.loads(metadata.get("eval_env_spec") or metadata["env_spec"])
    reference, limit = (metadata.get("ref_min_score"), metadata.get("ref_max_score")), spec["max_episode_steps"]
    if limit is not None and (type(limit) is not int or limit < 1):
        raise BadInput(f"max_episode_steps in env_spec of metadata.json must be a whole number or null, not {limit!r}")
    task = dict(env_id=spec["id"] if spec["id"] in gym.registry else f"gymnasium_robotics:{spec['id']}",
                kwargs={**spec["kwargs"], "max_episode_steps": limit},
                reference=None if None in reference else tuple(map(float, reference)))
    space, columns = gym.make(task["env_id"], **task["kwargs"]).observation_space, []

    def flat(space, values):
        """(T + 1, O), the entries of dictionaries in the order of FlattenObservation."""
        if isinstance(space, gym.spaces.Dict):
            return np.concatenate([flat(part, values[key]) for key, part in space.items()], axis=1)
        return values

    for episode in dataset.iterate_episodes():
        observations = flat(space, episode.observations)
        columns.append((observations[:-1], episode.actions, episode.rewards, 1.0 - episode.terminations,
                        observations[1:]))
        if len(set(map(len, columns[-1]))) > 1:
            raise BadInput(f"{env_id}: the arrays of episode {episode.id} differ in length")
    keys = "observations", "actions", "rewards", "masks", "next_observations"
    data = {key: np.concatenate(column) for key, column in zip(keys, zip(*columns))}
    if len(data["rewards"]) != metadata["total_steps"]:
        raise BadInput(f"{len(data['rewards'])} steps, but {metadata['total_steps']} in metadata.json")
    return task, data, np.arange(len(data["rewards"])), [column[2].sum() for column in columns]


def make_env(task, **kwargs):
    """The environment of a task with flat observations and actions in [-1, 1]; kwargs go to gymnasium.make."""
    env = gym.wrappers.FlattenObservation(gym.make(task["env_id"], **task["kwargs"], **kwargs))
    if len(env.action_space.shape) != 1:
        raise BadInput(f"actions must be vectors of numbers, not {env.action_space}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))  # minds what has no bounds


@np.errstate(over="ignore", invalid="ignore")  # what comes of that is refused
def prepare(env, data, rows, returns):
    """The transitions as float32 arrays, and what is to be known of them. `rows`: where they lie in the file.

    observations and next_observations (N, O), actions (N, A) in (-1, 1), rewards (N,) and masks (N,), which are
    1 - termination: a time limit never stops bootstrapping.
    """
    box, digest = env.env.action_space, hashlib.sha256()
    for key, column in data.items():
        if column.dtype.kind not in "biuf" or key in ("rewards", "masks") and column.ndim != 1:
            raise BadInput(f"{key} must be numbers, one row for each step, not {column.dtype} of shape {column.shape}")
    if not np.isin(data["masks"], (0, 1)).all():
        raise BadInput("terminations must be 0 or 1")
    found = data["observations"].shape[1:] + data["actions"].shape[1:]
    if found != env.observation_space.shape + box.shape:
        raise BadInput(f"observations and actions have {found} numbers, the environment {env.observation_space.shape} "
                       f"and {box.shape}")
    data["actions"] = 2 * (data["actions"] - box.low) / (box.high - box.low) - 1
    if not returns or len(rows) == 0:
        raise BadInput("no transition, or no episode ends: all terminals and timeouts are 0")
    for key in sorted(data):
        data[key] = np.ascontiguousarray(data[key], dtype=np.float32)
        bad = ~np.isfinite(data[key]) if key != "actions" else ~(np.abs(data[key]) < 1 + 1e-4)
        if bad.any():
            row = rows[bad.reshape(len(rows), -1).any(1).argmax()]
            raise BadInput(f"{bad.sum()} {key} are not finite or outside the action box, the first in row {row}")
        digest.update(data[key])
    data["actions"] = data["actions"].clip(-1 + 1e-5, 1 - 1e-5)
    quarter = np.sort(returns)[3 * len(returns) // 4:]
    return data, dict(sha256=digest.hexdigest(), transitions=len(rows), episodes=len(returns),
                      mean_return=float(np.mean(returns)), best_quarter=float(np.mean(quarter)),
                      best=float(max(returns)), worst=float(min(returns)))


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
    with blame(f"--env-id {args.env_id}, --dataset-path {args.dataset_path}"):
        path = args.dataset_path and pathlib.Path(args.dataset_path).expanduser()
        loader = load_hdf5 if "/" not in args.env_id or str(path).endswith((".hdf5", ".h5")) else load_minari
        task, *data = [checkpoint["task"]] if args.evaluate else loader(args.env_id, path)
        low, high = task["reference"] or (0, 1)
        if not -math.inf < low < high < math.inf:
            raise BadInput(f"ref_min_score {low} must lie below ref_max_score {high}, both finite")
        module = task["env_id"].rpartition(":")[0]  # Gymnasium imports it
        asked = " ".join(argv or sys.argv).replace("=", " ")  # a folder may be called like the task, so with its flag
        if module not in ("", "data.d4rl_tasks", "gymnasium_robotics") and f"--env-id {task['env_id']}" not in asked:
            raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {task['env_id']}")
        if args.capture_video and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's way to render without a screen
        env = make_env(task, **dict(render_mode="rgb_array") if args.capture_video else {})
        if args.capture_video and env.reset() and env.render() is not None:  # fails now rather than after hours
            import moviepy  # noqa: F401
        if not args.evaluate:
            data, about_data = prepare(env, *data)
    torch.manual_seed(args.seed)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args, device)
    step, optimizers = 0, (agent.actor_optimizer, agent.critic_optimizer)
    if checkpoint is not None:
        with blame(f"the checkpoint in {run_dir} does not fit these flags, or is a policy.pt, only to be evaluated"):
            agent.load_state_dict(checkpoint["agent"])
            step = checkpoint["step"]
            for optimizer, saved in () if args.evaluate else zip(optimizers, checkpoint["optimizers"]):
                # with this run's groups: learning rates may be given anew, the checkpoint be of another device
                optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    candidates = args.num_candidates
    video_dir = run_dir / "videos" if args.capture_video else None
    if args.evaluate:
        metrics = evaluate(agent, task, args, candidates, video_dir, step)
        print(json.dumps({"step": step, "num_candidates": candidates, **metrics}))
        return 0

    if checkpoint is not None:
        for key in ("seed", "observation_normalization"):
            if getattr(args, key) != checkpoint["args"][key]:
                raise BadInput(f"--{key.replace('_', '-')} cannot change in a resumed run; --run-name starts another")
        if about_data["sha256"] != checkpoint["data"]["sha256"]:
            raise BadInput(f"{run_dir} was trained on other data than {args.dataset_path or args.env_id} holds")
    elif args.observation_normalization == "dataset":
        std = torch.as_tensor(data["observations"].std(0, dtype=np.float64))
        agent.obs_mean.copy_(torch.as_tensor(data["observations"].mean(0, dtype=np.float64)))
        agent.obs_std.copy_(torch.where(std < 1e-6, 1.0, std))
    replay = {key: torch.as_tensor(value, device=device) for key, value in data.items()}
    for key in ("observations", "next_observations"):
        replay[key] = (replay[key] - agent.obs_mean) / agent.obs_std
    reward_scale, reward_shift = reward_scale_and_shift(args, data["rewards"], about_data)
    replay["rewards"] = reward_scale * replay["rewards"] + reward_shift
    del data

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
          f", learns from step {step} on; run folder {run_dir}")
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
        return agent.update(sample(replay, args.batch_size))

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
