"""SOM: score-based one-step MeanFlow policy optimisation, online, in one file.

Paper: Kim, Ki, Ahn, Lee, "Score-Based One-step MeanFlow Policy Optimization", arXiv 2605.23365. Only its abstract and
introduction could be read when this was written. The equations come from a third-party implementation that cites the
paper's equations 5 and 8 and its table 3 (SakodaShintaro/vla_streaming_rl, commit 19922e1), the rest from the practice
of related work or from measurements (README). Nothing here is to be quoted as "the paper says".

The policy to be learned is p_0(a|s) ~ exp(alpha Q(s, a)). Diffusing its actions to noise defines a flow whose velocity
follows from the score of p_t, and the score is estimated from the critic alone, by Monte Carlo. One network
u(a_t, r, t; s), the average of that velocity between the times r and t, then maps noise to an action in a single
evaluation. Time t = 0 is the action and t = 1 the noise. The equations, as this file numbers them:

  (1) a_t = mu_t a_0 + sigma_t e,  mu_t = 1 - t,  sigma_t = t        path; with --path vp instead
      mu_t = exp(-B_t / 2),  sigma_t^2 = 1 - mu_t^2,  B_t = b0 t + (b1 - b0) t^2 / 2
  (2) a_0^i ~ N(a_t / mu_t, (sigma_t / mu_t)^2) within [-1, 1],  w_i = softmax_i(alpha Qbar(s, a_0^i)),  i = 1..K
  (3) S = (mu_t sum_i w_i a_0^i - a_t) / sigma_t^2                   score of p_t, as a posterior mean
  (4) v = (a_t - sum_i w_i a_0^i) / t = -(a_t + t S) / (1 - t)       velocity; with --path vp instead
      v = -(b_t / 2) (a_t + S),  b_t = b0 + (b1 - b0) t              probability-flow ODE
  (5) u_tgt = sg[v - (t - r) du/dt],  du/dt = v du/da + du/dt        MeanFlow identity, one JVP along (v, 0, 1)
  (6) L_actor = mean sg[(d + c)^-p] d,  d = |u - u_tgt|^2 / dim(a)
  (7) a(e) = clip(e - u(e, 0, 1; s), -1, 1),  e ~ N(0, I)            one-step action
  (8) L_critic = sum_k mean (Q_k(s, a) - y)^2,  y = rew + gamma (1 - done) min_k Q'_k(s', a*(s'))
  (9) a*(s) = argmax_i min_k Q_k(s, a(e_i)), i = 1..N                best of N: acting, evaluation and target apart
 (10) --score gradient: S = d/da_t log sum_i exp(alpha Qbar(s, a_t / mu_t + sigma_t / mu_t z_i))   literal reading

Known of the paper (at second hand): the path is vp with b0 = 0.1, b1 = 20, alpha = 1, K = 100, and the score is
normalised to length w = 25. Two readings of that are
  literal  --path vp --score gradient --alpha 1 --score-scale 25 --adaptive-power 1 --q-normalization batch
  box      --path vp --alpha 1 --score-scale 25
The literal one fails on every bandit of tests/test_som_bandits.py: near t = 1 its proposals lie 150 action boxes away,
where the critic is extrapolation. Proposals within the box cure that, and a score of fixed length then has the right
target, but no network of ours learned it. So the default leaves the length alone and raises alpha instead, on the
linear path (as in MFPO, arXiv 2604.14698), which the same network learns better than vp (README).
"""
import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem


@dataclass
class Args:
    env_id: str = "InvertedDoublePendulum-v4"
    """Gymnasium environment with flat observations and continuous actions"""

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
    total_timesteps: int = 1_000_000
    """environment steps, of all environments together"""
    num_envs: int = 5
    """environments that run side by side"""
    utd: float = 0.2
    """gradient steps per environment step (charts/UPS over charts/SPS)"""
    learning_starts: int = 10_000
    """environment steps with uniformly random actions before the first gradient step"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds; the oldest give way"""
    record_dataset: str | None = None
    """write everything that the run collected as a Minari dataset of this id (NAMESPACE/NAME-vN), at the end and on
    SIGTERM (pip install "minari[create]"); needs a replay buffer that holds all of it"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (8)"""
    tau: float = 0.02
    """Polyak rate of the target critic, after every gradient step (related work: 0.005; with few gradient steps per
    environment step the critic then lags behind for most of a run)"""
    reward_scale: float = 0.2
    """factor on the rewards in training"""
    policy_width: int = 256
    """width of the policy's hidden layers"""
    policy_depth: int = 3
    """number of the policy's hidden layers"""
    critic_width: int = 256
    """width of the critic's hidden layers"""
    critic_depth: int = 3
    """number of the critic's hidden layers"""
    critic_form: Literal["layer_norm", "plain"] = "plain"
    """plain: (Linear, Mish); layer_norm: (Linear, LayerNorm, Mish), the first with Tanh instead of Mish"""
    num_candidates: int = 32
    """N of Eq. (9) when acting in training, and in evaluation if --num-candidates-eval does not say otherwise"""
    num_candidates_eval: int | None = None
    """N in evaluation; None is --num-candidates. The final evaluation also reports N = 1"""
    num_candidates_target: int = 1
    """N in the Bellman target, Eq. (8)"""
    exploration_noise: float = 0.0
    """standard deviation of Gaussian noise on the actions in training, before clipping; the policy itself is random"""
    alpha: float = 10.0
    """inverse temperature of the policy to be learned, Eq. (2): larger is greedier"""
    num_proposals: int = 100
    """K, proposals per score estimate, Eq. (2)"""
    score: Literal["posterior", "gradient"] = "posterior"
    """posterior: Eq. (3), proposals within the action box; gradient: Eq. (10), the literal reading"""
    score_scale: float | None = None
    """w: give the score this length, keeping its direction (the paper's 25, with --path vp); None: as it is"""
    path: Literal["vp", "linear"] = "linear"
    """Eq. (1): linear learned the bandits better; vp is the paper's"""
    beta_min: float = 0.1
    """b0 of Eq. (1)"""
    beta_max: float = 20.0
    """b1 of Eq. (1)"""
    q_normalization: Literal["state", "batch", "none"] = "state"
    """Qbar of Eq. (2): standardised over the K proposals of each state, or over the whole batch, or not at all"""
    flow_ratio: float = 0.25
    """fraction of the batch with r = t"""
    adaptive_power: float = 0.0
    """p of Eq. (6); 0 is the plain squared error, 1 weighs every row alike"""
    adaptive_constant: float = 1e-3
    """c of Eq. (6)"""
    policy_actions: float = 0.0
    """fraction of the batch whose a_0 in Eq. (1) is the policy's own action instead of the replayed one"""
    learning_rate: float = 3e-4
    """step size of Adam, for the policy and the critic"""


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict."""
    if env_id == Args.env_id:  # sizes that two CPU cores train in minutes
        return dict(total_timesteps=100_000, learning_starts=5_000, eval_interval=10_000, eval_episodes=20,
                    batch_size=128, num_proposals=16, policy_width=128, policy_depth=2, critic_width=128,
                    critic_depth=2, compile=shutil.which("g++") is not None)
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
    """u(a_t, r, t; s), the average velocity from r to t: an MLP on action, the two times and state, with LayerNorm."""

    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        sizes = [act_dim + 2 + obs_dim, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.final = nn.Linear(width, act_dim)

    def forward(self, observations, a_t, r, t):
        """observations (..., O), a_t (..., A), r and t (..., 1) in [0, 1]; returns (..., A), unbounded."""
        times = torch.cat([r, t], -1).expand(*a_t.shape[:-1], -1)
        x = torch.cat([a_t, times, observations], -1)
        for layer, norm in zip(self.hidden, self.norms):
            x = mish(F.layer_norm(layer(x), norm.normalized_shape) * norm.weight + norm.bias)  # so it also compiles
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
def mu_sigma(t, args):
    """mu_t and sigma_t of Eq. (1), shaped like t."""
    if args.path == "linear":
        return 1 - t, t
    b = args.beta_min * t + 0.5 * (args.beta_max - args.beta_min) * t.square()
    return torch.exp(-0.5 * b), (-torch.expm1(-b)).sqrt()


def sample_times(batch_size, args, device):
    """t and r, (B, 1) each, r <= t: two sorted uniform times, r = t on a fraction of the batch."""
    times = torch.rand(2, batch_size, 1, device=device).clamp(1e-3, 1 - 1e-3)
    t, r = times.amax(0), times.amin(0)
    plain = int(args.flow_ratio * batch_size)
    r[:plain] = t[:plain]  # the rows are independent, so the first ones are as good as any
    return t, r


def truncated_normal(mean, std, count):
    """(K, B, A) draws of N(mean, std^2) within [-1, 1], by inversion in float64; far tails fall back on clipping."""
    mean, std = mean.double(), std.double()
    low, high = (-1 - mean) / std, (1 - mean) / std
    p_low, p_high = torch.special.ndtr(low), torch.special.ndtr(high)
    uniform = torch.rand(count, *mean.shape, dtype=torch.float64, device=mean.device)
    z = torch.special.ndtri(p_low + (p_high - p_low) * uniform)
    z = torch.where(z.isfinite(), z, torch.randn_like(z).clamp(low, high))
    return (mean + std * z).clamp(-1, 1).float()


def proposal_logits(critic, observations, proposals, args):
    """alpha Qbar(s, a_0^i), (K, B), of proposals (K, B, A), Q the smaller critic."""
    q = critic(observations.expand(len(proposals), -1, -1), proposals).amin(0)
    if args.q_normalization != "none":
        dims = 0 if args.q_normalization == "state" else (0, 1)
        q = (q - q.mean(dims, keepdim=True)) / (q.std(dims, keepdim=True) + 1e-6)
    return args.alpha * q


def score(critic, observations, a_t, t, args):
    """Monte Carlo estimate of the score of p_t at a_t, (B, A)."""
    mu, sigma = mu_sigma(t, args)
    if args.score == "posterior":
        proposals = truncated_normal(a_t / mu, sigma / mu, args.num_proposals)
        weights = torch.softmax(proposal_logits(critic, observations, proposals, args), 0)  # Eq. (2)
        return (mu * torch.einsum("kb,kba->ba", weights, proposals) - a_t) / sigma.square()  # Eq. (3)
    with torch.enable_grad():
        a_t = a_t.detach().requires_grad_()
        z = torch.randn(args.num_proposals, *a_t.shape, device=a_t.device)
        logits = proposal_logits(critic, observations, a_t / mu + sigma / mu * z, args)
        return torch.autograd.grad(logits.logsumexp(0).sum(), a_t)[0]  # Eq. (10)


@torch.no_grad()
def velocity(critic, observations, a_t, t, args):
    """v, (B, A): the derivative of a_t in t along the probability-flow ODE of p_t."""
    s = score(critic, observations, a_t, t, args)
    if args.score_scale is not None:
        s = args.score_scale * s / (s.norm(dim=-1, keepdim=True) + 1e-6)
    if args.path == "linear":
        return -(a_t + t * s) / (1 - t)  # (a_t - E[a_0 | a_t]) / t, written in terms of the score
    beta = args.beta_min + (args.beta_max - args.beta_min) * t
    return -0.5 * beta * (a_t + s)  # Eq. (4)


def one_step_action(policy, observations, noise):
    """clip(e - u(e, 0, 1; s)), (..., A): one evaluation of the network. Eq. (7)"""
    one = noise.new_ones((1,) * noise.dim())
    return (noise - policy(observations, noise, torch.zeros_like(one), one)).clamp(-1, 1)


def best_of_n(policy, critic, observations, noise):
    """Eq. (9): of the actions made from noise (B, N, A), the one that the critic likes best, (B, A)."""
    observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
    candidates = one_step_action(policy, observations, noise)  # (B, N, A)
    if noise.shape[1] == 1:
        return candidates[:, 0]
    index = critic(observations, candidates).amin(0).argmax(1)
    return candidates[torch.arange(len(index), device=index.device), index]


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (8): a scalar. next_noise: (B, N, A)."""
    with torch.no_grad():
        next_actions = best_of_n(policy, critic, batch["next_observations"], next_noise)
        q_next = target_critic(batch["next_observations"], next_actions).amin(0)
        q_target = args.reward_scale * batch["rewards"] + args.gamma * batch["masks"] * q_next
    return (critic(batch["observations"], batch["actions"]) - q_target).square().mean(1).sum()  # Eq. (8)


def mean_flow_output_and_target(policy, critic, observations, actions, noise, t, r, args):
    """The network's output at (a_t, r, t; s) and its stop-gradient regression target, both (B, A)."""
    mu, sigma = mu_sigma(t, args)
    a_t = mu * actions + sigma * noise  # Eq. (1)
    v = velocity(critic, observations, a_t, t, args)
    u, du_dt = jvp(lambda a, r, t: policy(observations, a, r, t), (a_t, r, t),
                   (v, torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = v - (t - r) * du_dt  # Eq. (5)
    return u, u_tgt.detach()


def actor_loss(policy, critic, batch, draws, args):
    """L_actor, Eq. (6): a scalar."""
    noise, (t, r), own_noise = draws
    actions = batch["actions"]
    if args.policy_actions > 0:
        own = torch.rand_like(t) < args.policy_actions
        with torch.no_grad():
            actions = torch.where(own, one_step_action(policy, batch["observations"], own_noise), actions)
    u, u_tgt = mean_flow_output_and_target(policy, critic, batch["observations"], actions, noise, t, r, args)
    d = (u - u_tgt).square().mean(-1)  # (B,)
    weight = (d.detach() + args.adaptive_constant) ** -args.adaptive_power
    return (weight * d).mean()  # Eq. (6)


class Agent(nn.Module):
    """Networks and optimisers of SOM: `update` is one gradient step, `act` is Eq. (9)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args, self.step, self.updates = args, 0, 0  # environment and gradient steps
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth, args.critic_form)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))  # only tells evaluate() the device
        self.to(device)
        adam = dict(lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.policy.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.critic_loss = torch.compile(critic_loss) if args.compile else critic_loss
        self.actor_loss = torch.compile(actor_loss) if args.compile else actor_loss

    def update(self, batch):
        """One gradient step on a batch; returns the losses as device scalars."""
        args, device, (batch_size, act_dim) = self.args, self.obs_mean.device, batch["actions"].shape
        next_noise = torch.randn(batch_size, args.num_candidates_target, act_dim, device=device)
        draws = (
            torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
            sample_times(batch_size, args, device),
            torch.randn(batch_size, act_dim, device=device),  # for a_0 of the policy
        )
        l_critic = self.critic_loss(self.policy, self.critic, self.target_critic, batch, next_noise, args)
        self.critic_optimizer.zero_grad()
        l_critic.backward()
        self.critic_optimizer.step()

        l_actor = self.actor_loss(self.policy, self.critic, batch, draws, args)
        self.actor_optimizer.zero_grad()
        l_actor.backward()
        self.actor_optimizer.step()

        with torch.no_grad():  # else the target would carry the history of every update
            torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), args.tau)
        return dict(critic=l_critic.detach(), actor=l_actor.detach())

    @torch.no_grad()
    def act(self, observations, num_candidates, generator=None):
        """Best of `num_candidates` one-step actions, (B, A) in [-1, 1], for observations (B, O). Eq. (9)"""
        shape = len(observations), num_candidates, self.policy.final.out_features
        noise = torch.randn(shape, device=observations.device, generator=generator)
        return best_of_n(self.policy, self.critic, observations, noise)

    def training_state(self):
        """What continuing needs besides `state_dict()`."""
        return dict(actor_optimizer=self.actor_optimizer.state_dict(), updates=self.updates,
                    critic_optimizer=self.critic_optimizer.state_dict())

    def load_training_state(self, state):
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"] = self.args.learning_rate  # may be given anew beside --resume
            optimizer.param_groups[0]["capturable"] = self.obs_mean.is_cuda  # the checkpoint may be from a CPU
        self.updates = state["updates"]


# ---------------------------------------------------------------- environment
class BadInput(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""


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


def make_env(args, **kwargs):
    """The environment of --env-id with flat observations and actions in [-1, 1]; kwargs go to gymnasium.make."""
    warnings.filterwarnings("ignore", message=".*is out of date.*")  # -v4 on purpose
    try:
        env = gym.make(args.env_id, **kwargs)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise BadInput(f"--env-id {args.env_id} cannot be made ({error}): see --help") from error
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            raise BadInput(f"--env-id {args.env_id}: {name} must be flat vectors of numbers, not {space}")
    if not env.action_space.is_bounded():
        raise BadInput(f"--env-id {args.env_id}: actions must lie in a bounded box, not {env.action_space}")
    if (env.action_space.low == -1).all() and (env.action_space.high == 1).all():
        return env
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def normalized_score(episodic_return, reference):
    """A return in percent of the way from the random to the expert reference."""
    return 100 * (episodic_return - reference[0]) / (reference[1] - reference[0])


# ---------------------------------------------------------------- recorded dataset
def check_recordable(args, capacity, own):
    """Raises BadInput, before anything is trained, for a --record-dataset that could not be written at the end. `own`
    is the name that this run may have written before it was resumed."""
    try:
        import jax  # noqa: F401  Minari needs it to write
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path

        parse_dataset_id(args.record_dataset)
        path = get_dataset_path(args.record_dataset)
    except ImportError as error:
        raise BadInput(f'--record-dataset: {error}; pip install "minari[create]"') from error
    except ValueError as error:
        raise BadInput(f"--record-dataset {args.record_dataset}: {error}") from error
    if path.exists() and args.record_dataset != own:
        raise BadInput(f"--record-dataset {args.record_dataset}: {path} exists; delete it or give another name")
    needed = -(-args.total_timesteps // args.num_envs) * args.num_envs  # whole steps of all environments
    if capacity < needed:
        raise BadInput(f"--record-dataset needs a --buffer-size of at least {needed}")


def record_dataset(args, env, replay, ends, count):
    """Writes the first `count` rows of the replay as the Minari dataset --record-dataset, whole or not at all."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage import get_dataset_path

    box = env.unwrapped.action_space
    arrays = {key: value[:count].cpu().numpy() for key, value in replay.items()}
    arrays["actions"] = (box.low + (arrays["actions"] + 1) / 2 * (box.high - box.low)).clip(box.low, box.high)
    episodes = []
    for i in range(args.num_envs):  # row number is step * num_envs + environment
        rows = np.arange(i, count, args.num_envs)
        for part in np.split(rows, np.flatnonzero(ends[rows[:-1]]) + 1):
            terminations, truncations = arrays["masks"][part] == 0, np.zeros(len(part), dtype=bool)
            truncations[-1] = not terminations[-1]  # at the time limit, or where the run ended
            observations = np.concatenate([arrays["observations"][part], arrays["next_observations"][part[-1:]]])
            episodes.append(EpisodeBuffer(id=len(episodes), observations=observations, actions=arrays["actions"][part],
                                          rewards=arrays["rewards"][part], terminations=terminations,
                                          truncations=truncations))
    references = [scores for name, scores in D4RL_TASKS.values() if name.split("-")[0] == args.env_id.split("-")[0]]
    low, high = references[0] if references else (None, None)
    final = get_dataset_path(args.record_dataset)
    partial = get_dataset_path(f".{os.getpid()}")  # hidden from Minari, and on the same disk as the final place
    folder = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(partial)
    minari.create_dataset_from_buffers(
        args.record_dataset, episodes, env=env.spec.id, ref_min_score=low, ref_max_score=high,
        observation_space=gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
        action_space=box, algorithm_name=SCRIPT, code_permalink=f"{SCRIPT}.py",
        requirements=["gymnasium[mujoco]>=1.1"],
        description=f"Everything that {SCRIPT}.py collected in {count} steps with {json.dumps(asdict(args))}")
    del os.environ["MINARI_DATASETS_PATH"]
    if folder is not None:
        os.environ["MINARI_DATASETS_PATH"] = folder
    shutil.rmtree(final, ignore_errors=True)  # of an earlier life of this run
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial / args.record_dataset, final)
    shutil.rmtree(partial)
    print(f"wrote {len(episodes)} episodes, {count} steps, as Minari dataset {args.record_dataset} to {final}")


# ---------------------------------------------------------------- replay
def sample(replay, batch_size, first=0, end=None):
    """A uniform batch, with replacement, of the rows first .. end - 1, drawn where the replay tensors live; `end` may
    be a scalar of the device, so that it can grow under a captured graph."""
    end = len(replay["rewards"]) if end is None else end
    index = first + torch.randint(2**62, (batch_size,), device=replay["rewards"].device) % (end - first)
    return {key: value[index] for key, value in replay.items()}


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
    env = make_env(args)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, act_dim, args, device)
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
        metrics = evaluate(agent, args, candidates, None, video_dir, agent.step)
        print(json.dumps({"step": agent.step, "num_candidates": candidates, **metrics}))
        return 0

    for key in ("seed", "num_envs", "utd", "learning_starts", "buffer_size") if args.resume else ():
        if getattr(args, key) != checkpoint["args"][key]:
            raise BadInput(f"--{key.replace('_', '-')} cannot change in a resumed run: its unfinished episodes and "
                           "its replay buffer go on")
    if args.num_proposals < 2 and args.q_normalization == "state":
        raise BadInput("--num-proposals 1 has no spread to normalise by: take more, or --q-normalization none")
    capacity = min(args.buffer_size, max(args.total_timesteps, agent.step) + args.num_envs)
    replay = dict(observations=torch.zeros(capacity, obs_dim, device=device),
                  actions=torch.zeros(capacity, act_dim, device=device), rewards=torch.zeros(capacity, device=device),
                  masks=torch.zeros(capacity, device=device),
                  next_observations=torch.zeros(capacity, obs_dim, device=device))
    ends = np.zeros(capacity, dtype=bool)  # terminated or truncated, for --record-dataset
    if args.record_dataset:
        check_recordable(args, capacity, checkpoint["args"]["record_dataset"] if args.resume else None)

    def episode_seed(number):
        """Every episode has its own seed, so that a resumed run can play the unfinished ones again."""
        return int(np.random.SeedSequence([args.seed, number]).generate_state(1)[0])

    envs = gym.vector.SyncVectorEnv([lambda: make_env(args)] * args.num_envs,
                                    autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    count = args.num_envs
    running = dict(episodes=count, number=list(range(count)), total=[0.0] * count, actions=[[] for _ in range(count)])
    if args.resume:
        running = checkpoint["running"]
    observations, _ = envs.reset(seed=[episode_seed(number) for number in running["number"]])
    if args.resume:  # plays the unfinished episodes again: same seed, same actions, same state
        for i, actions in enumerate(running["actions"]):
            for action in actions:
                observations[i] = envs.envs[i].step(action.numpy())[0]
        if not np.array_equal(observations, checkpoint["observations"].numpy()):
            raise BadInput(f"{args.env_id} is not deterministic: the unfinished episodes of {checkpoint_path} went "
                           "another way, so the run cannot be continued bit for bit")
        for key, value in checkpoint["replay"].items():
            replay[key][:len(value)] = value.to(device)
        ends[:len(value)] = checkpoint["ends"].numpy()
        del checkpoint["replay"], value  # as large as the buffer
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and checkpoint["random"]["cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"])

    name = f"{args.env_id.replace('/', '_')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = checkpoint_path.parent if args.resume else pathlib.Path(args.runs_dir) / name
    video_dir = run_dir / "videos" if args.capture_video else None
    if args.track and not importlib.util.find_spec("wandb"):
        raise BadInput("--track needs wandb: pip install wandb")
    if args.capture_video:
        make_video_env(args, pathlib.Path(args.runs_dir), "test").close()  # fails now rather than after hours
    packages = ("torch", "numpy", "gymnasium", "mujoco")
    about = {"args": asdict(args), "device": str(device), "threads": torch.get_num_threads(),
             "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}}
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        (run_dir / "args.json").write_text(json.dumps(about, indent=2))
        log = Log(run_dir, args, checkpoint["log_offset"] if args.resume else 0)
    except OSError as error:
        raise BadInput(f"the run folder cannot be written ({error}): give another --runs-dir") from error
    print(f"{args.env_id}: {args.num_envs} environments, run folder {run_dir}")

    def evaluate_and_log(prefix, num_candidates):
        metrics = evaluate(agent, args, num_candidates, None, video_dir, agent.step)
        log(agent.step, {name.replace("eval/", prefix): value for name, value in metrics.items()})
        text = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"step {agent.step}, N = {num_candidates}: {text}")

    interrupts = []
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
        signal.signal(number, lambda n, _: (interrupts.append(n), signal.signal(n, signal.SIG_DFL)))
    bar = tqdm(total=args.total_timesteps, initial=agent.step, unit="step",
               mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step, clock_updates = time.time(), agent.step, agent.updates
    burst = max(round(args.utd * args.num_envs), 1)  # gradient steps per step of all environments
    # A graph may only hold what has run before: three updates launch operation by operation first.
    graphs, graphs_from = args.cuda_graph and device.type == "cuda", agent.updates + 3
    replay_act = replay_updates = None
    parts, stop, filled = {}, False, torch.tensor(0, device=device)
    current = torch.zeros(args.num_envs, obs_dim, device=device)  # where the graph of `act` reads

    def act():
        actions = agent.act(current, args.num_candidates)
        return (actions + args.exploration_noise * torch.randn_like(actions)).clamp(-1, 1)

    def update():
        return agent.update(sample(replay, args.batch_size, 0, filled))

    while agent.step < args.total_timesteps and not stop:
        def due(interval):
            """Whether the last step of all environments reached a multiple of `interval`."""
            return agent.step // interval > max(agent.step - args.num_envs, 0) // interval

        if due(args.eval_interval):  # after the checkpoint, so that resuming repeats it
            paused = time.time()
            evaluate_and_log("eval/", candidates)
            clock += time.time() - paused
        if agent.step < args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, act_dim, device=device) - 1
        else:
            current.copy_(torch.as_tensor(observations))
            if graphs and agent.updates >= graphs_from:
                replay_act = replay_act or capture(act, 1)
            actions = (replay_act or act)()
        played = actions.cpu()
        next_observations, rewards, terminated, truncated, _ = envs.step(played.numpy())
        done = terminated | truncated
        rows = torch.arange(agent.step, agent.step + args.num_envs, device=device) % capacity
        for key, value in (("observations", observations), ("actions", actions), ("rewards", rewards),
                           ("masks", 1.0 - terminated), ("next_observations", next_observations)):
            replay[key][rows] = torch.as_tensor(value, dtype=torch.float32, device=device)
        ends[np.arange(agent.step, agent.step + args.num_envs) % capacity] = done
        observations = next_observations
        for i in range(args.num_envs):
            running["actions"][i].append(played[i])
            running["total"][i] += float(rewards[i])
        agent.step += args.num_envs
        bar.update(args.num_envs)
        if done.any():
            for i in np.flatnonzero(done):
                if math.isfinite(running["total"][i]):  # else the losses are not either, which ends the run soon
                    log(agent.step, {"charts/episodic_return": running["total"][i],
                                     "charts/episodic_length": len(running["actions"][i])})
                running["number"][i], running["total"][i], running["actions"][i] = running["episodes"], 0.0, []
                running["episodes"] += 1
            observations, _ = envs.reset(seed=[episode_seed(number) for number in running["number"]],
                                         options={"reset_mask": done})

        filled.fill_(min(agent.step, capacity))
        while (left := math.ceil(args.utd * (agent.step - args.learning_starts)) - agent.updates) > 0:
            if graphs and left >= burst and agent.updates >= graphs_from:
                replay_updates = replay_updates or capture(update, burst)
                parts = replay_updates()
                agent.updates += burst
            else:
                parts = update()
                agent.updates += 1

        stop = agent.step >= args.total_timesteps or bool(interrupts)
        save_due = due(args.checkpoint_interval) or stop
        if due(args.log_interval) or save_due or due(args.eval_interval):  # else losses stay on the device
            values = {f"losses/{name}": value.item() for name, value in parts.items()}
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                bar.close()
                log.close()
                print(f"{SCRIPT}: step {agent.step}: {bad[0]} is {values[bad[0]]}; the last good checkpoint is "
                      f"{run_dir / 'checkpoint.pt'}, if one was due", file=sys.stderr)
                return 3
            if due(args.log_interval):
                seconds, clock = time.time() - clock, time.time()
                log(agent.step, {"charts/SPS": (agent.step - clock_step) / seconds,
                                 "charts/UPS": (agent.updates - clock_updates) / seconds, **values})
                clock_step, clock_updates = agent.step, agent.updates
        if save_due:
            state = dict(script=SCRIPT, args=asdict(args), step=agent.step, agent=agent.state_dict())
            save(state, run_dir / "policy.pt")
            cuda_state = torch.cuda.get_rng_state() if device.type == "cuda" else None
            save(dict(state, training=agent.training_state(), log_offset=log.file.tell(),
                      replay={key: value[:agent.step].to("cpu", copy=True) for key, value in replay.items()},
                      ends=torch.as_tensor(ends[:agent.step]), running=running,
                      observations=torch.as_tensor(observations),
                      random=dict(cpu=torch.get_rng_state(), cuda=cuda_state)), run_dir / "checkpoint.pt")
    bar.close()
    if args.record_dataset:
        record_dataset(args, env, replay, ends, agent.step)
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
