"""MFQL's update as one would port it from the authors' JAX code: the baseline of `speed.py`, not for training.

The same numbers of rows, layers and gradient steps as `mfql_offline.py`, but attention with queries and keys on its
single token, the time embedded anew for every row of one-step actions, critics one after the other, a JVP beside a
normal forward pass of the same network, one backward pass, Adam without fusion. Without the loss of weight zero.
"""
import math

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

HEADS = 2


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * x.shape[-1] ** 0.5 * self.gain


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // HEADS), RMSNorm(width // HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1, H / heads) each
        q, k = self.q_norm(q), self.k_norm(k)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2, self.attention = RMSNorm(width), RMSNorm(width), Attention(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, -1)
        y = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return y + gate2 * self.mlp_out(F.gelu(self.mlp_in(self.norm2(y) * (1 + scale2) + shift2), approximate="tanh"))


class Policy(nn.Module):
    def __init__(self, obs_dim, act_dim, width, depth):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(128) / 128))
        self.embed, self.position = nn.Linear(obs_dim + act_dim, width), nn.Parameter(torch.zeros(1, 1, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_norm, self.final_modulation = RMSNorm(width), nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, act_dim)

    def forward(self, observations, z, t):
        """observations (B, O), z (B, A), t (B, 1); returns (B, A)."""
        angles = t * self.frequencies
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1)).unsqueeze(1)  # (B, 1, H)
        x = self.embed(torch.cat([observations, z], -1)).unsqueeze(1) + self.position
        for block in self.blocks:
            x = x + 0.1 * (block(x, c) - x)
        shift, scale = self.final_modulation(F.silu(c)).chunk(2, -1)
        return self.final(self.final_norm(x) * (1 + scale) + shift).squeeze(1)


class Critic(nn.Sequential):
    def __init__(self, obs_dim, act_dim, width, depth):
        sizes, layers = [obs_dim + act_dim, *[width] * depth], []
        for i, o in zip(sizes, sizes[1:]):
            layers += [nn.Linear(i, o), nn.GELU(approximate="tanh"), nn.LayerNorm(o, eps=1e-6)]
        super().__init__(*layers, nn.Linear(width, 1))


class Plain:
    """Networks and optimisers; `update` is one gradient step on a batch of `mfql_offline.sample`."""

    def __init__(self, obs_dim, act_dim, args, device):
        self.args = args
        self.policy = Policy(obs_dim, act_dim, args.policy_width, args.policy_depth).to(device)
        critic = lambda: Critic(obs_dim, act_dim, args.critic_width, args.critic_depth).to(device)
        self.critics, self.targets = [critic(), critic()], [critic(), critic()]
        self.actor_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.actor_learning_rate)
        self.critic_parameters = [parameter for critic in self.critics for parameter in critic.parameters()]
        self.target_parameters = [parameter for critic in self.targets for parameter in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(self.critic_parameters, lr=args.critic_learning_rate)

    def update(self, batch):
        args, (size, act_dim) = self.args, batch["actions"].shape
        observations, actions, device = batch["observations"], batch["actions"], batch["actions"].device
        count = args.num_candidates_target or args.num_candidates
        with torch.no_grad():
            states = batch["next_observations"].repeat_interleave(count, 0)
            candidates = self.policy(states, torch.randn(size * count, act_dim, device=device),
                                     torch.ones(size * count, 1, device=device)).clamp(-1, 1)
            pairs = torch.cat([states, candidates], -1)
            q = torch.stack([target(pairs) for target in self.targets])
            q = (q.mean(0) if args.q_aggregation == "mean" else q.amin(0)).reshape(size, count).amax(1)
            q_target = batch["rewards"] + args.gamma * batch["masks"] * q
        pairs = torch.cat([observations, actions], -1)
        l_critic = sum((critic(pairs).squeeze(-1) - q_target).square().mean() for critic in self.critics) / 2

        noise = torch.randn_like(actions)
        t = torch.randint(1, args.time_steps + 1, (size, 1), device=device) / args.time_steps
        z_t, v = (1 - t) * actions + t * noise, noise - actions
        parameters = {name: parameter.detach() for name, parameter in self.policy.named_parameters()}
        _, dg_dt = jvp(lambda z, t: functional_call(self.policy, parameters, (observations, z, t)), (z_t, t),
                       (v, torch.ones_like(t)))
        g_tgt = (z_t + (t - 1) * v - t * dg_dt).detach().clamp(-5, 5)
        d = (self.policy(observations, z_t, t) - g_tgt).square().mean(-1)
        l_mfi = ((d.detach() + 1e-4) ** -0.2 * d).mean()

        g = self.policy(observations, torch.randn_like(actions), torch.ones_like(t))
        bound = F.relu(g - 1).mean() + F.relu(-1 - g).mean()
        for parameter in self.critic_parameters:
            parameter.requires_grad_(False)
        q = sum(critic(torch.cat([observations, g.clamp(-1, 1)], -1)) for critic in self.critics) / 2
        for parameter in self.critic_parameters:
            parameter.requires_grad_(True)
        total = l_critic - q.mean() / q.detach().abs().mean() + args.bound_weight * bound + args.alpha * l_mfi
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        nn.utils.clip_grad_norm_(self.critic_parameters, 1.0)
        self.actor_optimizer.step()
        self.critic_optimizer.step()
        with torch.no_grad():
            for target, parameter in zip(self.target_parameters, self.critic_parameters):
                target.copy_(args.tau * parameter + (1 - args.tau) * target)
        return {"critic": l_critic.detach(), "mean_flow": l_mfi.detach()}
