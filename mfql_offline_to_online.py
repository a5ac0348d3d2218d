"""MFQL: MeanFlow Q-learning, offline and then online, in one file.

Paper: Wang, Li, Chen, Shi, Bai, Yu, Fu, "One-Step Generative Policies with Q-Learning: A Reformulation of MeanFlow",
AAAI 2026, arXiv 2511.13035. Authors' code: HiccupRL/MeanFlowQL (JAX), commit 3fab100.

One network g(s, z_t, t) maps Gaussian noise e to an action in a single evaluation, a = g(s, e, 1). Behaviour cloning
needs no ODE: with t = 0 the data and t = 1 the noise, the average velocity u from 0 to t obeys the MeanFlow identity
u = v - t du/dt, and the residual form g = z_t - u turns it into one for g. The critic picks among N sampled actions,
and its gradient improves g directly. The algorithm ends with `Online`; data, evaluation, checkpoints and the loop
follow, with the same text in the sibling scripts. The equations, as this file numbers them:

  (1) z_t = (1 - t) a + t e,  v = e - a                              path from the data a to the noise e
  (2) g_tgt = sg[z_t + (t - 1) v - t dg/dt],  dg/dt = v ∂g/∂z + ∂g/∂t   MeanFlow identity for g, one JVP
  (3) L_MFI = mean sg[(d + c)^-p] d,  d = |g - g_tgt|^2 / dim(a)     adaptively weighted cloning loss, p .2, c 1e-4
  (4) a(e) = clip(g(s, e, 1), -1, 1),  e ~ N(0, I)                   one-step action
  (5) best-of-N: a* = argmax_i Q'(s, a(e_i)), i = 1..N               value-guided rejection sampling, Q' the target
  (6) L_critic = mean_k (Q_k(s, a) - y)^2,  y = r + gamma (1 - done) Q'(s', a*(s'))
  (7) L_actor = -mean Q(s, a(e)) + L_bound + alpha L_MFI             gradient of Q straight through one step
  (8) L_bound = mean relu(g - 1) + mean relu(-1 - g)                 keeps g(s, e, 1) inside the action box
  (9) alpha <- 1.2 alpha if L_MFI > 5 avg, 0.8 alpha if L_MFI < avg / 5, every 2000 steps    (the paper's Eq. 21)

Deviations from the authors' code, each for a reason:
- Attention over the single token is written as the linear map that it is: q, k and their norms have no gradient.
- alpha's rule (9) acts from the next step on instead of within the same step, and the mask over its window reads the
  stored values (the authors' mask reads empty slots until 20 values are in, which raises alpha in short runs).
- Observation statistics are those of the data rows, not of a 2M-row buffer padded with zeros.
- `--normalize-q-loss`, for tasks that the paper does not have, divides the Q term's gradient by its own size. (The
  authors' code and its relatives divide Q by mean |Q|, which grows 15-fold in a run while the gradient does not.)
- A consistency term of weight zero, early stopping and pretraining are left out.
Deviations of the code (followed here) from the paper: critic learning rate 3e-4 (paper 1e-4), Xavier-uniform critic
initialisation (paper Kaiming), power 0.2 weights and clipping of g_tgt to +-5 in the cloning loss, gradient norms of
at most 1.
The paper has no D4RL locomotion results; defaults for those tasks are ours (`LOCOMOTION`).

Online (authors' code): after W gradient steps on the data the policy acts by Eq. (5), without further noise; each
transition joins the data, and a gradient step with the same losses follows. The observations' statistics stay those
of the data, the actor's learning rate is constant. From there on the log counts environment steps.
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
from torch.func import grad_and_value, jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem
UPDATES_PER_REPLAY = 10  # gradient steps of one CUDA graph
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
    """number of gradient steps W on the data alone; the actor's learning rate decays over them"""
    online_steps: int = 1_000_000
    """number of environment steps after those; 0 makes this script mfql_offline.py with the same flags"""
    utd: float = 1.0
    """gradient steps per environment step in the online phase"""
    from_checkpoint: str | None = None
    """run folder or checkpoint.pt of mfql_offline.py: its flags, networks and optimisers, and only the online phase"""
    buffer_size: int = 2_000_000
    """rows of the replay buffer, at least the data; the oldest give way (of the new with --balanced-sampling)"""
    balanced_sampling: bool = False
    """online, half of each batch from the data and half from the new transitions, instead of all alike"""
    exploration_noise: float = 0.0
    """standard deviation of Gaussian noise on the actions in the online phase, before clipping"""
    online_actor_learning_rate: float | None = None
    """step size of the actor in the online phase; None is where the offline phase ends, a tenth of the peak"""
    online_alpha: float | None = None
    """where alpha goes online, to stay; None: its schedule goes on. On Adroit 300 to 3000 serve (third-party runs)"""
    online_alpha_steps: int = 1
    """gradient steps over which alpha moves to --online-alpha, on a straight line"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (6)"""
    tau: float = 0.005
    """Polyak rate of the target critic, after every step"""
    reward_scale: float = 1.0
    """factor on the rewards in training; large returns (thousands) keep the critic from catching up with its target"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training"""
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
    """N in evaluation; None is --num-candidates, with which the online phase acts. N = 1 is also reported"""
    num_candidates_target: int | None = None
    """N in the Bellman target, Eq. (6); None is --num-candidates"""
    alpha: float = 1.0
    """weight of the cloning loss in the actor loss, Eq. (7): larger stays closer to the data"""
    alpha_schedule: Literal["adaptive", "constant", "cosine"] = "adaptive"
    """adaptive: Eq. (9), the paper's; constant: alpha throughout; cosine: alpha decays to a tenth offline"""
    normalize_q_loss: bool = True
    """divide the Q term of Eq. (7) by the root mean square of its gradient by the action, times dim(a), so that
    the same alpha means the same for all rewards, tasks and stages of a run"""
    q_aggregation: Literal["mean", "min"] = "mean"
    """how the two target critics become the one value of Eq. (6); Eq. (5) always chooses by their mean"""
    time_steps: int = 50
    """T: t is drawn from {1/T, ..., 1}; above 1000 uniformly from [0, 1)"""
    bound_weight: float = 1.0
    """weight of L_bound, Eq. (8)"""
    actor_learning_rate: float = 1e-4
    """peak of the actor's Adam step size: linear warm-up over 5 % of W, then a cosine down to a tenth of it at W"""
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
# Ours, found with small networks on Hopper and HalfCheetah (docs/early_results.md). A smaller reward and a larger tau
# let the critic converge sooner, min and N = 1 in the target keep it from overestimating, and the horizon is longer
# since returns count 1000 steps: with gamma 0.99 a leap and a fall after 200 steps is worth as much as walking on.
LOCOMOTION = dict(alpha=5.0, alpha_schedule="constant", gamma=0.995, tau=0.02, reward_scale=0.1, q_aggregation="min",
                  num_candidates_target=1)


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict; a name that nothing is known of gets those of the class."""
    if env_id == BUNDLED:  # sizes that two CPU cores train in minutes
        return dict(LOCOMOTION, actor_learning_rate=3e-4, offline_steps=10_000, online_steps=15_000,
                    eval_episodes=20, eval_interval=5_000, checkpoint_interval=1_000, policy_width=64, policy_depth=2,
                    critic_width=256, critic_depth=2, compile=shutil.which("g++") is not None)
    if re.match(r"([\w.-]+/)?(hopper|halfcheetah|walker2d|ant)[-/]", env_id.lower()):  # Hopper-v5 as well
        return dict(LOCOMOTION, alpha=2.0 if "halfcheetah" in env_id.lower() else 5.0)  # as relatives do
    for pattern, (alpha, num_candidates, time_steps, gamma) in TASKS.items():
        if re.fullmatch(pattern, env_id):
            shift = -1.0 if re.fullmatch(r"antmaze-.*-v2", env_id) else 0.0  # D4RL's 0 and 1 become -1 and 0
            return dict(alpha=alpha, num_candidates=num_candidates, time_steps=time_steps, gamma=gamma,
                        normalize_q_loss=False, reward_shift=shift)
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


def next_online_factor(factor, step, args):
    """alpha / --alpha after gradient step number `step` of the whole run, in the online phase: linear to its end."""
    left = (args.online_alpha_steps + 1 - (step - args.offline_steps)).clamp(min=1)
    return factor + (args.online_alpha / args.alpha - factor) / left


class Agent(nn.Module):
    """Networks, optimisers and schedules of MFQL: `update` is one gradient step, `act` is Eq. (5)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # counted on the device, for the schedules
        self.register_buffer("alpha_factor", torch.ones(()))
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
        args, device, (batch_size, act_dim) = self.args, self.obs_mean.device, batch["actions"].shape
        draws = (
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
            sample_time(batch_size, args.time_steps, device),
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (7)
            torch.randn(batch_size, args.num_candidates_target or args.num_candidates, act_dim, device=device),
        )
        alpha = args.alpha * self.alpha_factor
        total, parts = self.losses(self.policy, self.critic, self.target_critic, batch, draws, alpha, args)
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        rate = actor_learning_rate(self.updates, args)
        if args.online_actor_learning_rate is not None:
            rate = torch.where(self.updates < args.offline_steps, rate, args.online_actor_learning_rate)
        self.actor_optimizer.param_groups[0]["lr"].copy_(rate)
        self.actor_optimizer.step()
        self.critic_optimizer.step()
        with torch.no_grad():  # else the target would carry the history of every update
            torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), args.tau)
        self.updates += 1
        factor, history = next_alpha_factor(self.alpha_factor, self.alpha_history, parts["mean_flow"], self.updates,
                                            args)
        if args.online_alpha is not None:
            online_factor = next_online_factor(self.alpha_factor, self.updates, args)
            factor = torch.where(self.updates > args.offline_steps, online_factor, factor)
        self.alpha_factor.copy_(factor)
        self.alpha_history.copy_(history)
        return parts

    @torch.no_grad()
    def act(self, observations, num_candidates, generator):
        """Best of `num_candidates` one-step actions, (B, A) in [-1, 1], for raw observations (B, O). Eq. (5)"""
        observations = (observations - self.obs_mean) / self.obs_std
        shape = len(observations), num_candidates, self.policy.final.out_features
        noise = torch.randn(shape, device=observations.device, generator=generator)
        if num_candidates == 1:
            return one_step_action(self.policy, observations, noise[:, 0]).clamp(-1, 1)  # Eq. (4)
        return best_of_n(self.policy, self.target_critic, observations, noise, self.args)[0]

    def charts(self):
        """What the log shows besides the losses."""
        return {"charts/alpha": self.args.alpha * self.alpha_factor.item(),
                "charts/actor_learning_rate": self.actor_optimizer.param_groups[0]["lr"].item()}


# ---------------------------------------------------------------- online phase
def ring_row(k, data_rows, capacity, args):
    """Row of the k-th online transition: behind the data, then from the oldest on (the data stay if balanced)."""
    first = data_rows if args.balanced_sampling else 0
    return first + (data_rows - first + k) % (capacity - first)


def sample_online(replay, data_rows, filled, args):
    """A batch for the online phase, from the first `filled` rows: all rows alike, or half data and half new."""
    if not args.balanced_sampling:
        return sample(replay, args.batch_size, 0, filled)
    size = args.batch_size // 2
    halves = sample(replay, size, 0, data_rows), sample(replay, args.batch_size - size, data_rows, filled)
    return {key: torch.cat([half[key] for half in halves]) for key in replay}


class Online:
    """Acts in `env`; the transitions join `data`, which `agent.update` takes batches of, in a replay buffer, a ring of
    rows. `state`: what `state_dict` gave, to go on from there, or None."""

    def __init__(self, env, agent, data, args, state):
        state = state or {"steps": 0, "episode": 0, "episode_return": 0.0, "actions": [], "transitions": {}}
        self.env, self.agent, self.args, self.data_rows = env, agent, args, len(data["rewards"])
        self.steps, self.episode, self.episode_return = state["steps"], state["episode"], state["episode_return"]
        new_rows = min(max(args.online_steps, self.steps), max(args.buffer_size - self.data_rows, 0))
        if args.balanced_sampling and args.online_steps and new_rows == 0:
            raise BadInput(f"--balanced-sampling needs a --buffer-size above the data's {self.data_rows} transitions")
        self.capacity, device = self.data_rows + new_rows, data["rewards"].device
        self.replay = {key: torch.cat([x, x.new_zeros(new_rows, *x.shape[1:])]) for key, x in data.items()}
        for key, value in state["transitions"].items():
            self.replay[key][state["rows"].to(device)] = value.to(device)
        # CUDA graphs read these two, which stay where they are: how many rows are filled, and what to act on
        self.filled = torch.tensor(min(self.data_rows + self.steps, self.capacity), device=device)
        self.current = torch.zeros_like(data["observations"][:1])
        self.reset()
        for action in state["actions"]:  # plays the unfinished episode again: same seed, same actions, same state
            self.observation = env.step(action.numpy())[0]
            self.actions.append(action)
        if self.actions and not np.array_equal(self.observation, state["observation"].numpy()):
            raise BadInput(f"{args.env_id} is not deterministic: the unfinished episode went another way this time")

    def reset(self):
        """Every episode has its own seed, so that a resumed run can play the unfinished one again."""
        seed = int(np.random.SeedSequence([self.args.seed, self.episode]).generate_state(1)[0])
        self.observation, _ = self.env.reset(seed=seed)
        self.actions = []

    def act(self):
        """(1, A) at the current observation, by Eq. (5)."""
        actions = self.agent.act(self.current, self.args.num_candidates, None)
        return (actions + self.args.exploration_noise * torch.randn_like(actions)).clamp(-1, 1)

    def step(self, act):
        """One step with `self.act`, or a CUDA graph of it; at an episode's end returns its metrics, else None."""
        self.current[0] = torch.as_tensor(self.observation)
        actions = act()
        self.actions.append(actions[0].cpu())
        self.observation, reward, terminated, truncated, _ = self.env.step(self.actions[-1].numpy())
        following = torch.as_tensor(self.observation, dtype=torch.float32, device=actions.device)
        row = ring_row(self.steps, self.data_rows, self.capacity, self.args)
        self.replay["observations"][row] = (self.current[0] - self.agent.obs_mean) / self.agent.obs_std
        self.replay["next_observations"][row] = (following - self.agent.obs_mean) / self.agent.obs_std
        self.replay["actions"][row] = actions[0]
        self.replay["rewards"][row] = self.args.reward_scale * float(reward) + self.args.reward_shift
        self.replay["masks"][row] = 1.0 - float(terminated)
        self.steps += 1
        self.filled.fill_(min(self.data_rows + self.steps, self.capacity))
        self.episode_return += float(reward)
        if terminated or truncated:
            metrics = {"charts/episodic_return": self.episode_return, "charts/episodic_length": len(self.actions)}
            self.episode, self.episode_return = self.episode + 1, 0.0
            self.reset()
            return metrics
        return None

    def state_dict(self):
        """What `__init__` needs to go on, with the transitions that are still in the buffer."""
        written = torch.arange(max(0, self.steps - self.capacity), self.steps, device=self.filled.device)
        rows = ring_row(written, self.data_rows, self.capacity, self.args).unique()
        return {"steps": self.steps, "episode": self.episode, "episode_return": self.episode_return,
                "actions": self.actions, "observation": torch.as_tensor(self.observation), "rows": rows,
                "transitions": {key: value[rows] for key, value in self.replay.items()}}


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


def offline_run(argv):
    """The run that --from-checkpoint names, as a checkpoint to go on from, and its flags in words."""
    given = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)[0]
    if not given.from_checkpoint:
        return None, []
    if given.evaluate or given.resume not in (None, "auto"):
        raise BadInput("--from-checkpoint starts a run: it excludes --resume RUN and --evaluate")
    _, state = load(given.from_checkpoint, script="mfql_offline")
    state["args"]["offline_steps"], words = state["step"], []
    for key, value in state["args"].items():
        if key not in ("run_name", "resume", "evaluate"):
            words += [f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", str(value)]
    return {**state, "log_offset": 0, "evaluated": False}, words


def main(argv=None):
    """Runs the command line `argv` and returns the exit code: 0 done, 3 non-finite loss, 130 interrupted."""
    offline, words = offline_run(argv)
    args, run_dir, checkpoint = parse_args(words + (sys.argv[1:] if argv is None else list(argv)))
    source, checkpoint = (args.from_checkpoint, offline) if offline and not checkpoint else (run_dir, checkpoint)
    if args.online_alpha is not None and args.alpha == 0:
        raise BadInput("--online-alpha needs an --alpha above 0, of which it is a multiple")
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
        with blame(f"the checkpoint in {source} does not fit these flags, or is a policy.pt, only to be evaluated"):
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

    state = checkpoint.get("online") if checkpoint else None  # None: the online phase starts here, or the run
    if checkpoint is not None:
        fixed = ["observation_normalization"] + (["seed"] if state else [])
        if state is None or state["steps"]:
            fixed += ["env_id", "offline_steps", "reward_scale", "reward_shift"]
        if state and state["steps"]:
            fixed += ["utd", "buffer_size", "balanced_sampling"]
        for key in fixed:
            if getattr(args, key) != checkpoint["args"][key]:
                raise BadInput(f"--{key.replace('_', '-')} cannot change in a resumed run; --run-name starts another")
        if state and not state["steps"] and args.offline_steps < step:
            raise BadInput(f"--offline-steps {args.offline_steps}: {step} have been done")
        if about_data["sha256"] != checkpoint["data"]["sha256"]:
            raise BadInput(f"{source} was trained on other data than {args.dataset_path or args.env_id} holds")
    elif args.observation_normalization == "dataset":
        std = torch.as_tensor(data["observations"].std(0, dtype=np.float64))
        agent.obs_mean.copy_(torch.as_tensor(data["observations"].mean(0, dtype=np.float64)))
        agent.obs_std.copy_(torch.where(std < 1e-6, 1.0, std))
    replay = {key: torch.as_tensor(value, device=device) for key, value in data.items()}
    for key in ("observations", "next_observations"):
        replay[key] = (replay[key] - agent.obs_mean) / agent.obs_std
    replay["rewards"] = args.reward_scale * replay["rewards"] + args.reward_shift
    with blame(f"the online phase of {source}"):
        online = Online(env, agent, replay, args, state)
    if args.online_steps and args.env_id.startswith("kitchen-"):  # as D4RL has it
        print("kitchen: data reward a subtask at every step once it is done, the environment once", file=sys.stderr)
    del data, replay

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
                    log_offset=log_file.tell(), evaluated=evaluated, online=online.state_dict(), parts=parts)
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
    parts, episode = {}, None  # episode: metrics of one that has just ended
    if checkpoint is not None and args.seed == checkpoint["args"]["seed"]:  # else other batches, other noise
        evaluated, parts = checkpoint["evaluated"], checkpoint.get("parts", {})
        rate = checkpoint["optimizers"][0]["param_groups"][0]["lr"]
        agent.actor_optimizer.param_groups[0]["lr"].copy_(rate)  # a row may come before the next update
        torch.set_rng_state(checkpoint["random_cpu"])
        if device.type == "cuda" and checkpoint["random_cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random_cuda"])
    total, updates = args.offline_steps + args.online_steps, int(agent.updates)
    bar = tqdm(total=total, initial=step, unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step, clock_updates = time.time(), step, updates
    # A graph may only hold what has run before: three updates launch operation by operation first.
    graphs, graphs_from, replay_updates = args.cuda_graph and device.type == "cuda", step + 3, None
    online_graphs, online_graphs_from = None, max(updates, args.offline_steps) + 3

    def update():
        if step < args.offline_steps:
            return agent.update(sample(online.replay, args.batch_size, 0, online.data_rows))
        return agent.update(sample_online(online.replay, online.data_rows, online.filled, args))

    try:
        while step < total and not stop:
            change = step == args.offline_steps  # evaluating comes after the checkpoint: resuming repeats it
            if (change or step and step % args.eval_interval == 0) and not evaluated:
                paused = time.time()
                evaluate_and_log(candidates, *[1] * change)
                clock += time.time() - paused
            evaluated = False
            intervals = args.log_interval, args.eval_interval, args.checkpoint_interval
            until_due = min(args.offline_steps - step, *(n - step % n for n in intervals))
            if step >= args.offline_steps:
                if graphs and updates >= online_graphs_from:
                    online_graphs = online_graphs or (capture(online.act, 1), capture(update, 1))
                act, online_update = online_graphs or (online.act, update)
                episode, count = online.step(act), 1
                while updates < args.offline_steps + args.utd * online.steps:
                    parts, updates = online_update(), updates + 1
            elif graphs and step >= graphs_from and until_due >= UPDATES_PER_REPLAY:
                replay_updates = replay_updates or capture(update, UPDATES_PER_REPLAY)
                parts, count = replay_updates(), UPDATES_PER_REPLAY
            else:
                parts, count = update(), 1
            step += count
            updates = max(updates, min(step, args.offline_steps))
            bar.update(count)
            stop = bool(interrupts)
            if episode and math.isfinite(episode["charts/episodic_return"]):  # else the losses soon end the run
                log(episode)
            save_due = step % args.checkpoint_interval == 0 or step in (args.offline_steps, total) or stop
            if save_due or step % args.log_interval == 0 or step % args.eval_interval == 0:  # else nothing is copied
                values = {f"losses/{name}": value.item() for name, value in parts.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    bar.close()
                    print(f"{SCRIPT}: step {step}: {bad[0]} is {values[bad[0]]}; {run_dir} has what was saved before",
                          file=sys.stderr)
                    return 3
                if step % args.log_interval == 0:
                    seconds, acted = time.time() - clock, min(step - clock_step, online.steps)
                    ups, sps = (updates - clock_updates) / seconds, {"charts/SPS": acted / seconds} if acted else {}
                    clock, clock_step, clock_updates = time.time(), step, updates
                    log({"charts/UPS": ups, **sps, **agent.charts(), **values})
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
