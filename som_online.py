"""SOM: score-based one-step MeanFlow policy optimisation, online, in one file.

Paper: Kim, Ki, Ahn, Lee, "Score-Based One-step MeanFlow Policy Optimization", arXiv 2605.23365. Only its abstract and
introduction could be read when this was written. The equations come from a third-party implementation that cites the
paper's equations 5 and 8 and its table 3 (SakodaShintaro/vla_streaming_rl, commit 19922e1), the rest from the practice
of related work or from measurements (docs/algorithms.md). Nothing here is to be quoted as "the paper says".

The policy to be learned is p_0(a|s) ~ exp(alpha Q(s, a)). Diffusing its actions to noise defines a flow whose velocity
follows from the score of p_t, and the score is estimated from the critic alone, by Monte Carlo. One network
u(a_t, r, t; s), the average of that velocity between the times r and t, then maps noise to an action in a single
evaluation. Time t = 0 is the action and t = 1 the noise. The algorithm ends with `Agent`; evaluation, checkpoints and
the loop follow, with the same text in the sibling scripts where it can be. `data/fetch.py --from-run RUN-FOLDER NAME`
makes a Minari data set of what a run collected. The equations, as this file numbers them ("its": the paper's own):

  (1) a_t = mu_t a_0 + sigma_t e,  mu_t = 1 - t,  sigma_t = t        path; with --path vp instead (its table 3)
      mu_t = exp(-B_t / 2),  sigma_t^2 = 1 - mu_t^2,  B_t = b0 t + (b1 - b0) t^2 / 2,  b0 = 0.1,  b1 = 20
  (2) a_0^i ~ N(a_t / mu_t, (sigma_t / mu_t)^2) within [-1, 1],  w_i = softmax_i(alpha Qbar(s, a_0^i)),  i = 1..K,
      Qbar = min_k Q_k / (its standard deviation between uniform actions of one state; root mean square over the batch)
  (3) S = (mu_t sum_i w_i a_0^i - a_t) / sigma_t^2                   score of p_t, as a posterior mean
  (4) v = (a_t - sum_i w_i a_0^i) / t = -(a_t + t S) / (1 - t)       velocity; with --path vp instead (its Eq. 8, there
      v = -(b_t / 2) (a_t + S),  b_t = b0 + (b1 - b0) t              with w S / |S| for S, which is --score-scale w)
  (5) u_tgt = sg[v - (t - r) du/dt],  du/dt = v ∂u/∂a_t + ∂u/∂t      MeanFlow identity, one JVP along (v, 0, 1)
  (6) L_actor = mean sg[(d + c)^-p] d,  d = |u - u_tgt|^2 / dim(a)   c 1e-3
  (7) a(e) = clip(e - u(e, 0, 1; s), -1, 1),  e ~ N(0, I)            one-step action
  (8) L_critic = sum_k mean (Q_k(s, a) - y)^2,  y = rew + gamma (1 - done) min_k Q'_k(s', a*(s'))
  (9) a*(s) = argmax_i min_k Q_k(s, a(e_i)), i = 1..N                best of N: acting, evaluation and target apart
 (10) S = ∂/∂a_t log sum_i exp(alpha Qbar(s, a_t / mu_t + sigma_t / mu_t z_i))   --score gradient (its Eq. 5, literal)

Two readings of its table 3 (vp, alpha = 1, K = 100, a score of length w = 25), neither of which is the default:
  literal  --path vp --score gradient --alpha 1 --score-scale 25 --adaptive-power 1 --q-normalization batch
  box      --path vp --alpha 1 --score-scale 25
The literal one fails on every bandit of tests/test_som_bandits.py: near t = 1 its proposals lie 150 action boxes away,
where the critic is extrapolation. The other has the right target, but no network of ours learned it. So the default
leaves the score's length alone and raises alpha instead, on the linear path (as in MFPO, arXiv 2604.14698).
"""
import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import shutil
import signal
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
from torch.func import jvp
from tqdm import tqdm

SCRIPT = pathlib.Path(__file__).stem
BETA_MIN, BETA_MAX = 0.1, 20.0  # b0 and b1 of Eq. (1)
gym.logger.min_level = gym.logger.ERROR  # else it advises against Hopper-v4 and the like, which D4RL's tasks need


@dataclass
class Args:
    env_id: str = "InvertedDoublePendulum-v4"
    """Gymnasium environment with continuous actions (Hopper-v5, my_package:MyTask-v0)"""

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
    total_timesteps: int = 1_000_000
    """environment steps, of all environments together"""
    num_envs: int = 5
    """environments that run side by side"""
    utd: float = 0.2
    """gradient steps per environment step (charts/UPS over charts/SPS)"""
    learning_starts: int = 10_000
    """environment steps with uniformly random actions before the first gradient step"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer; the oldest give way"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount factor, Eq. (8)"""
    tau: float = 0.02
    """Polyak rate of the target critic, after every gradient step (related work: 0.005, too slow for a small --utd)"""
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
    num_candidates: int = 32
    """N of Eq. (9) when acting in training, and in evaluation if --num-candidates-eval does not say otherwise"""
    num_candidates_eval: int | None = None
    """N in evaluation; None is --num-candidates. The final evaluation also reports N = 1"""
    num_candidates_target: int = 1
    """N in the Bellman target, Eq. (8)"""
    exploration_noise: float = 0.0
    """standard deviation of Gaussian noise on the actions in training, before clipping; the policy itself is random"""
    alpha: float = 100.0
    """inverse temperature of the policy to be learned, Eq. (2), per standard deviation of Q: larger is greedier"""
    num_proposals: int = 100
    """K, proposals per score estimate, Eq. (2)"""
    score: Literal["posterior", "gradient"] = "posterior"
    """posterior: Eq. (3), proposals within the action box; gradient: Eq. (10), the literal reading"""
    score_scale: float | None = None
    """w: give the score this length, keeping its direction (the paper's 25, with --path vp); None: as it is"""
    path: Literal["vp", "linear"] = "linear"
    """Eq. (1): linear learned the bandits better; vp is the paper's"""
    q_normalization: Literal["spread", "batch", "none"] = "spread"
    """Qbar of Eq. (2): Q over its standard deviation between uniform actions of one state (root mean square over the
    batch), or standardised over all proposals of the batch (sharper the smaller t is), or Q itself"""
    flow_ratio: float = 0.25
    """fraction of the batch with r = t"""
    adaptive_power: float = 0.0
    """p of Eq. (6); 0 is the plain squared error, 1 weighs every row alike"""
    learning_rate: float = 3e-4
    """step size of Adam, for the policy and the critic"""


RANGES = {  # least and largest value, for all scripts; other whole numbers 1 to a billion, other numbers 1e-12 to 1e9
    **dict.fromkeys(("gamma", "ema_rate", "flow_ratio", "adaptive_power"), (0, 1)), "tau": (1e-9, 1),
    **dict.fromkeys(("ema_start", "online_steps", "learning_starts"), (0, 10**9)), "seed": (0, 2**63 - 1),
    **dict.fromkeys(("alpha", "online_alpha", "eta", "bound_weight", "exploration_noise", "weight_decay",
                     "inverse_temperature", "noise_temperature"), (0, 1e9)), "reward_shift": (-1e9, 1e9),
    "utd": (1e-6, 1000), "batch_size": (1, 10**6), "policy_depth": (1, 1000), "critic_depth": (1, 1000),
    **dict.fromkeys(("eval_episodes", "num_envs", "policy_width", "critic_width", "num_candidates", "num_proposals",
                     "num_candidates_eval", "num_candidates_target"), (1, 10_000)),
}


def task_defaults(env_id):
    """Defaults of `Args` for one task, as a dict."""
    if env_id == Args.env_id:  # sizes that two CPU cores train in minutes
        return dict(total_timesteps=100_000, learning_starts=5_000, eval_interval=10_000, eval_episodes=20,
                    batch_size=128, num_proposals=16, policy_width=128, policy_depth=2, critic_width=128,
                    critic_depth=2, compile=shutil.which("g++") is not None, checkpoint_interval=1_000)
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
    """Two independent critics Q_1, Q_2, each (Linear, Mish) x depth and Linear, as batched products."""

    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        sizes = [obs_dim + act_dim, *[width] * depth, 1]
        self.weights = nn.ParameterList(torch.empty(2, i, o) for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.empty(2, 1, o) for o in sizes[1:])
        for weight, bias in zip(self.weights, self.biases):  # nn.Linear's initialisation
            nn.init.uniform_(weight, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)
            nn.init.uniform_(bias, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)

    def forward(self, observations, actions):
        """observations (..., O), actions (..., A); returns both values, (2, ...)."""
        x = torch.cat([observations, actions], -1)
        shape = x.shape[:-1]
        x = x.flatten(0, -2).expand(2, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = mish(torch.bmm(x, weight) + bias)
        return (torch.bmm(x, self.weights[-1]) + self.biases[-1]).reshape(2, *shape)


# ---------------------------------------------------------------- algorithm
def mu_sigma(t, args):
    """mu_t and sigma_t of Eq. (1), shaped like t."""
    if args.path == "linear":
        return 1 - t, t  # Eq. (1): mu_t = 1 - t, sigma_t = t
    b = BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t.square()  # Eq. (1): B_t = b0 t + (b1 - b0) t^2 / 2
    return torch.exp(-0.5 * b), (-torch.expm1(-b)).sqrt()  # Eq. (1): mu_t = exp(-B_t / 2), sigma_t^2 = 1 - mu_t^2


def sample_times(batch_size, args, device):
    """t and r, (B, 1) each, r <= t: two sorted uniform times, r = t on a fraction of the batch."""
    times = torch.rand(2, batch_size, 1, device=device).clamp(1e-3, 1 - 1e-3)
    t, r = times.amax(0), times.amin(0)
    plain = int(args.flow_ratio * batch_size)
    r[:plain] = t[:plain]  # the rows are independent, so the first ones are as good as any
    return t, r


def actor_draws(batch_size, act_dim, args, device):
    """All that is random in `actor_loss`, drawn here, so that a compiled loss has the same numbers."""
    draw_proposals = torch.rand if args.score == "posterior" else torch.randn
    return dict(
        noise=torch.randn(batch_size, act_dim, device=device),  # e of Eq. (1)
        times=sample_times(batch_size, args, device),
        proposals=draw_proposals(args.num_proposals, batch_size, act_dim, device=device),  # for a_0^i of Eq. (2)
        pair=2 * torch.rand(2, batch_size, act_dim, device=device) - 1,  # two actions per state, for Qbar
    )


def truncated_normal(mean, std, uniform):
    """(K, B, A) draws of N(mean, std^2) within [-1, 1], by inversion, from uniform (K, B, A) in [0, 1)."""
    side, mean = torch.where(mean < 0, -1.0, 1.0), mean.abs()  # float32 resolves the lower tail only: mirror the other
    low, high = (-1 - mean) / std, (1 - mean) / std
    p_low, p_high = (0.5 * torch.erfc(-z / math.sqrt(2)) for z in (low, high))  # special.ndtr is 0 below -5.4
    z = torch.special.ndtri(p_low + (p_high - p_low) * uniform.clamp_min(2**-25))  # of 0 it is not finite
    z = torch.where(z.isfinite(), z, high)  # 13 deviations away all of it lies at the wall
    return side * (mean + std * z).clamp(-1, 1)


def proposal_logits(critic, observations, proposals, pair, args):
    """alpha Qbar(s, a_0^i), (K, B), of proposals (K, B, A), Q the smaller critic."""
    size = 4 if proposals.device.type == "cpu" else len(proposals)  # parts that stay in a CPU's cache: faster
    q = torch.cat([critic(observations.expand(len(x), -1, -1), x).amin(0) for x in proposals.split(size)])
    if args.q_normalization == "spread":
        first, second = critic(observations.expand(2, -1, -1), pair).amin(0)
        q = q / (((first - second).square().mean() / 2).sqrt() + 1e-6)  # mean variance of Q over uniform actions
    if args.q_normalization == "batch":
        q = (q - q.mean()) / (q.std() + 1e-6)
    return args.alpha * q


def score(critic, observations, a_t, t, draws, args):
    """Monte Carlo estimate of the score of p_t at a_t, (B, A): Eq. (3), or Eq. (10)."""
    mu, sigma = mu_sigma(t, args)
    if args.score == "posterior":
        proposals = truncated_normal(a_t / mu, sigma / mu, draws["proposals"])  # Eq. (2): a_0^i within [-1, 1]
        logits = proposal_logits(critic, observations, proposals, draws["pair"], args)
        weights = torch.softmax(logits, 0)  # Eq. (2): w_i = softmax_i(alpha Qbar(s, a_0^i))
        mean = torch.einsum("kb,kba->ba", weights, proposals)
        return (mu * mean - a_t) / sigma.square()  # Eq. (3): S = (mu_t sum_i w_i a_0^i - a_t) / sigma_t^2
    with torch.enable_grad():
        a_t = a_t.detach().requires_grad_()
        logits = proposal_logits(critic, observations, a_t / mu + sigma / mu * draws["proposals"], draws["pair"], args)
        return torch.autograd.grad(logits.logsumexp(0).sum(), a_t)[0]  # Eq. (10): S = ∂/∂a_t log sum_i exp(alpha Qbar)


@torch.no_grad()
def velocity(critic, observations, a_t, t, draws, args):
    """v, (B, A): the derivative of a_t in t along the probability-flow ODE of p_t. Eq. (4)"""
    s = score(critic, observations, a_t, t, draws, args)
    if args.score_scale is not None:
        s = args.score_scale * s / (s.norm(dim=-1, keepdim=True) + 1e-6)
    if args.path == "linear":
        return -(a_t + t * s) / (1 - t)  # Eq. (4): v = -(a_t + t S) / (1 - t)
    b = BETA_MIN + (BETA_MAX - BETA_MIN) * t
    return -0.5 * b * (a_t + s)  # Eq. (4): v = -(b_t / 2) (a_t + S)


def one_step_action(policy, observations, noise):
    """a(e), (..., A): one evaluation of the network. Eq. (7)"""
    one = noise.new_ones((1,) * noise.dim())
    u = policy(observations, noise, torch.zeros_like(one), one)
    return (noise - u).clamp(-1, 1)  # Eq. (7): a(e) = clip(e - u(e, 0, 1; s), -1, 1)


def best_of_n(policy, critic, observations, noise):
    """Of the actions made from noise (B, N, A), the one that the critic likes best, (B, A). Eq. (9)"""
    observations = observations.unsqueeze(1).expand(-1, noise.shape[1], -1)
    candidates = one_step_action(policy, observations, noise)  # (B, N, A)
    if noise.shape[1] == 1:
        return candidates[:, 0]
    index = critic(observations, candidates).amin(0).argmax(1)  # Eq. (9): argmax_i min_k Q_k(s, a(e_i))
    return candidates[torch.arange(len(index), device=index.device), index]


def critic_loss(policy, critic, target_critic, batch, next_noise, args):
    """L_critic, Eq. (8): a scalar. next_noise: (B, N, A)."""
    with torch.no_grad():
        next_actions = best_of_n(policy, critic, batch["next_observations"], next_noise)
        q_next = target_critic(batch["next_observations"], next_actions).amin(0)
        rewards = args.reward_scale * batch["rewards"]
        y = rewards + args.gamma * batch["masks"] * q_next  # Eq. (8): y = rew + gamma (1 - done) min_k Q'_k
    q = critic(batch["observations"], batch["actions"])
    return (q - y).square().mean(1).sum()  # Eq. (8): L_critic = sum_k mean (Q_k - y)^2


def mean_flow_output_and_target(policy, critic, observations, actions, draws, args):
    """The network's output at (a_t, r, t; s) and its stop-gradient regression target, both (B, A)."""
    t, r = draws["times"]
    mu, sigma = mu_sigma(t, args)
    a_t = mu * actions + sigma * draws["noise"]  # Eq. (1): a_t = mu_t a_0 + sigma_t e
    v = velocity(critic, observations, a_t, t, draws, args)
    u, du_dt = jvp(lambda a, r, t: policy(observations, a, r, t), (a_t, r, t),
                   (v, torch.zeros_like(r), torch.ones_like(t)))  # Eq. (5): du/dt = v ∂u/∂a_t + ∂u/∂t
    u_tgt = v - (t - r) * du_dt  # Eq. (5): u_tgt = v - (t - r) du/dt
    return u, u_tgt.detach()


def actor_loss(policy, critic, batch, draws, args):
    """L_actor, Eq. (6): a scalar. draws: of `actor_draws`."""
    u, u_tgt = mean_flow_output_and_target(policy, critic, batch["observations"], batch["actions"], draws, args)
    d = (u - u_tgt).square().mean(-1)  # (B,)
    return ((d.detach() + 1e-3) ** -args.adaptive_power * d).mean()  # Eq. (6): L_actor = mean sg[(d + c)^-p] d


class Agent(nn.Module):
    """Networks and optimisers of SOM: `update` is one gradient step, `act` is Eq. (9)."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth)
        self.critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
        self.target_critic = TwinCritic(obs_dim, act_dim, args.critic_width, args.critic_depth)
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
        draws = actor_draws(batch_size, act_dim, args, device)
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


# ---------------------------------------------------------------- environment
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
    if checkpoint is not None and not args.evaluate:
        for key in ("env_id", "seed", "num_envs", "utd", "learning_starts", "buffer_size"):
            if getattr(args, key) != checkpoint["args"][key]:
                raise BadInput(f"--{key.replace('_', '-')} cannot change in a resumed run; --run-name starts another")
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
    with blame(f"--env-id {args.env_id}"):
        task = dict(env_id=args.env_id, kwargs={}, reference=None)
        module = task["env_id"].rpartition(":")[0]  # Gymnasium imports it
        asked = " ".join(argv or sys.argv).replace("=", " ")  # a folder may be called like the task, so with its flag
        if module not in ("", "data.d4rl_tasks", "gymnasium_robotics") and f"--env-id {task['env_id']}" not in asked:
            raise BadInput(f"a file asks for the import of {module}; allow it with --env-id {task['env_id']}")
        if args.capture_video and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's way to render without a screen
        env = make_env(task, **dict(render_mode="rgb_array") if args.capture_video else {})
        if args.capture_video and env.reset() and env.render() is not None:  # fails now rather than after hours
            import moviepy  # noqa: F401
    torch.manual_seed(args.seed)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, act_dim, args, device)
    step, updates, optimizers = 0, 0, (agent.actor_optimizer, agent.critic_optimizer)
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

    if args.learning_starts >= args.total_timesteps:
        raise BadInput(f"--learning-starts must be below --total-timesteps {args.total_timesteps}, or nothing trains")
    if args.buffer_size < args.num_envs:
        raise BadInput(f"--buffer-size must be at least --num-envs {args.num_envs}: it holds whole steps of them")

    running = [dict(number=i, total=0.0, actions=[]) for i in range(args.num_envs)]  # the unfinished episodes
    running = checkpoint["running"] if checkpoint else running

    def reset(i):
        """Begins the episode of environment i. Each has its own seed, so that a resumed run can play it again."""
        seed = np.random.SeedSequence([args.seed, running[i]["number"]]).generate_state(1)[0]
        return envs[i].reset(seed=int(seed))[0]

    with blame(f"--env-id {args.env_id}, --buffer-size {args.buffer_size}"):  # which may be more than the memory holds
        capacity = min(args.buffer_size, max(args.total_timesteps, step) + args.num_envs)
        sizes = dict(observations=obs_dim, actions=act_dim, rewards=1, masks=1, next_observations=obs_dim)
        buffer, digest = torch.zeros(capacity, sum(sizes.values()), device=device), hashlib.sha256()
        replay = dict(zip(sizes, buffer.split(list(sizes.values()), 1)))
        replay |= {key: replay[key][:, 0] for key in ("rewards", "masks")}
        envs = [make_env(task) for _ in running]
        observations = np.stack([reset(i) for i in range(args.num_envs)])
        for i, episode in enumerate(running):  # of a resumed run: same seed, same actions, same state
            for action in episode["actions"]:
                observations[i] = envs[i].step(action.numpy())[0]
        if checkpoint is not None and not np.array_equal(observations, checkpoint["observations"].numpy()):
            raise BadInput(f"not deterministic: the unfinished episodes in {run_dir} went another way this time")
    # replay.bin holds every step so far, float32 (step, sum(sizes)), and only grows; the checkpoint knows its digest.
    replay_bytes = 4 * buffer.shape[1] * step
    if checkpoint is not None:
        with blame(f"{run_dir / 'replay.bin'}, which belongs to the checkpoint"):
            with open(run_dir / "replay.bin", "rb") as file:
                contents = file.read(replay_bytes)
            digest.update(contents)
            if digest.hexdigest() != checkpoint["replay"]:
                raise BadInput("damaged, or of another run")
            rows = np.frombuffer(contents, np.float32).reshape(step, -1)[-capacity:]
            buffer[torch.arange(step - len(rows), step, device=device) % capacity] = torch.tensor(rows, device=device)
            del contents, rows

    with blame(f"run folder {run_dir}, perhaps in use (--runs-dir and --run-name give another)"):
        if args.track:
            import wandb  # fails before anything is written
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)  # two processes never write one folder
        versions = {package.name: package.version for package in importlib.metadata.distributions()}
        about = dict(args=asdict(args), task=task, device=str(device), threads=torch.get_num_threads(),
                     python=sys.version, versions=versions)
        (run_dir / "args.json").write_text(json.dumps(about, indent=2))
        (run_dir / "done.json").unlink(missing_ok=True)
        log_file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        end = min(checkpoint["log_offset"], log_file.tell()) if checkpoint else 0
        log_file.seek(log_file.truncate(end))  # later rows will be written again
        replay_file = (run_dir / "replay.bin").open("ab")
        replay_file.seek(replay_file.truncate(replay_bytes))
        if args.track:
            wandb.init(config=asdict(args), id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow")
    print(f"{args.env_id}: {args.num_envs} environments; evaluates every {args.eval_interval} steps, learns from step "
          f"{max(step, args.learning_starts)} on; run folder {run_dir}")
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
        state = dict(script=SCRIPT, args=asdict(args), step=step, task=task, agent=agent.state_dict())
        more = dict(optimizers=[optimizer.state_dict() for optimizer in optimizers], random_cpu=torch.get_rng_state(),
                    random_cuda=torch.cuda.get_rng_state() if device.type == "cuda" else None,
                    log_offset=log_file.tell(), evaluated=evaluated, updates=updates, running=running,
                    observations=torch.as_tensor(observations), replay=digest.hexdigest())
        replay_file.flush()
        os.fsync(replay_file.fileno())
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
        evaluated, updates = checkpoint["evaluated"], checkpoint["updates"]
        torch.set_rng_state(checkpoint["random_cpu"])
        if device.type == "cuda" and checkpoint["random_cuda"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(checkpoint["random_cuda"])
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=1 if sys.stderr.isatty() else 60)
    clock, clock_step, clock_updates = time.time(), step, updates
    # A graph may only hold what has run before: three updates launch operation by operation first.
    graphs, graphs_from = args.cuda_graph and device.type == "cuda", updates + 3
    replay_act, replay_update, parts = None, None, {}
    # What a graph reads must be a tensor that stays where it is: the rows in the buffer, and what `act` looks at.
    filled, current = torch.tensor(0, device=device), torch.zeros(args.num_envs, obs_dim, device=device)

    def act():
        actions = agent.act(current, args.num_candidates)
        return (actions + args.exploration_noise * torch.randn_like(actions)).clamp(-1, 1)

    def update():
        return agent.update(sample(replay, args.batch_size, 0, filled))

    def due(interval):
        """Whether the last step of all environments reached a multiple of `interval`."""
        return step // interval > max(step - args.num_envs, 0) // interval

    try:
        while step < args.total_timesteps and not stop:
            if due(args.eval_interval) and not evaluated:  # after the checkpoint: resuming repeats it
                paused = time.time()
                evaluate_and_log(candidates)
                clock += time.time() - paused
            evaluated = False
            if step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, act_dim, device=device) - 1
            else:
                current.copy_(torch.as_tensor(observations))
                if graphs and updates >= graphs_from:
                    replay_act = replay_act or capture(act, 1)
                actions = (replay_act or act)()
            played = actions.cpu()
            results = [env.step(action) for env, action in zip(envs, played.numpy())]
            next_observations, rewards, terminated, truncated = map(np.stack, list(zip(*results))[:4])
            rows = torch.arange(step, step + args.num_envs, device=device) % capacity
            values = np.concatenate([observations, played, rewards[:, None], 1.0 - terminated[:, None],
                                     next_observations], 1, dtype=np.float32)
            buffer.index_copy_(0, rows, torch.as_tensor(values, device=device))
            replay_file.write(values)
            digest.update(values)
            step += args.num_envs
            bar.update(args.num_envs)
            observations = next_observations.copy()
            for i, episode in enumerate(running):
                episode["actions"].append(played[i])
                episode["total"] += float(rewards[i])
                if terminated[i] or truncated[i]:
                    if math.isfinite(episode["total"]):  # else the losses are not either, which ends the run soon
                        log({"charts/episodic_return": episode["total"],
                             "charts/episodic_length": len(episode["actions"])})
                    running[i] = dict(number=1 + max(e["number"] for e in running), total=0.0, actions=[])
                    observations[i] = reset(i)

            filled.fill_(min(step, capacity))
            while updates < args.utd * (step - args.learning_starts):
                if graphs and updates >= graphs_from:
                    replay_update = replay_update or capture(update, 1)
                parts = (replay_update or update)()
                updates += 1
            stop = bool(interrupts)
            save_due = due(args.checkpoint_interval) or step >= args.total_timesteps or stop
            if save_due or due(args.log_interval) or due(args.eval_interval):  # else the losses stay on the device
                values = {f"losses/{name}": value.item() for name, value in parts.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    bar.close()
                    print(f"{SCRIPT}: step {step}: {bad[0]} is {values[bad[0]]}; {run_dir} has what was saved before",
                          file=sys.stderr)
                    return 3
                if due(args.log_interval):
                    seconds, clock = time.time() - clock, time.time()
                    log({"charts/SPS": (step - clock_step) / seconds,
                         "charts/UPS": (updates - clock_updates) / seconds, **values})
                    clock_step, clock_updates = step, updates
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
