"""SOM on bandits with a known Q: the tables of docs/algorithms.md (five minutes).

    python benchmark/bandit.py > benchmark/results/bandit.md
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import som_online  # noqa: E402

CENTRES = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.6, -0.6], [-0.6, -0.6]])
SETTINGS = {  # name: gradient steps, flags
    "score of length 25, alpha 1, vp": (2000, dict(path="vp", alpha=1.0, score_scale=25.0)),
    "alpha 10, vp": (1000, dict(path="vp", alpha=10.0)),
    "alpha 10, linear": (1000, dict(alpha=10.0)),
    "alpha 10, linear, 3,000 steps": (3000, dict(alpha=10.0)),
    f"default: alpha {som_online.Args.alpha:g}, linear": (1000, dict()),
    "default, 3,000 steps": (3000, dict()),
}


def bumps(observations, actions):
    """Four bumps of height 1; a uniform action has 0.34 on average. (2, ...), both critics equal."""
    distance = (actions.unsqueeze(-2) - CENTRES).square().sum(-1)
    return torch.exp(-distance / (2 * 0.25**2)).amax(-1).expand(2, *actions.shape[:-1])


def hill(observations, actions):
    """-|a - 0.2|^2."""
    return -(actions - 0.2).square().sum(-1).expand(2, *actions.shape[:-1])


def train(steps, flags, batch_size=256):
    """Policy 128 x 3 after `steps` of L_actor with K = 16, on actions from the whole box; cosine decay to 0."""
    torch.manual_seed(0)
    args = som_online.Args(num_proposals=16, **flags)
    policy = som_online.Policy(1, 2, 128, 3)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = dict(observations=torch.zeros(batch_size, 1), actions=2 * torch.rand(batch_size, 2) - 1)
        draws = som_online.actor_draws(batch_size, 2, args, "cpu")
        loss = som_online.actor_loss(policy, bumps, batch, draws, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def integrate(dim, steps=200, count=1000, **flags):
    """Actions of the target field itself on the hill, by Euler steps from noise to t = 0."""
    args = som_online.Args(**flags)
    torch.manual_seed(0)
    a_t, observations = torch.randn(count, dim), torch.zeros(count, 1)
    times = torch.linspace(1 - 1e-3, 1e-3, steps + 1)
    for t, t_next in zip(times, times[1:]):
        draws = som_online.actor_draws(count, dim, args, "cpu")
        a_t = a_t - (t - t_next) * som_online.velocity(hill, observations, a_t, t.expand(count, 1), draws, args)
    return a_t.clamp(-1, 1)


def soft_policy(alpha, dim):
    """(standard deviation of an action's numbers, mean Q) of p(a) ~ exp(alpha Q(a) / s), s the standard deviation of Q
    over uniform actions: a Gaussian around 0.2, of which the box cuts off next to nothing."""
    moments = 1 / 3 + 0.2**2, 1 / 5 + 6 * 0.2**2 / 3 + 0.2**4  # of (a - 0.2)^2, a uniform
    variance = math.sqrt(dim * (moments[1] - moments[0]**2)) / (2 * alpha)
    return math.sqrt(variance), -dim * variance


def main():
    torch.set_num_threads(1)
    print("| target | N = 1 | N = 32 | share near each of the four |\n|---|---|---|---|")
    for name, (steps, flags) in SETTINGS.items():
        policy = train(steps, flags)
        with torch.no_grad():
            actions = som_online.one_step_action(policy, torch.zeros(2000, 32, 1), torch.randn(2000, 32, 2))
        values, first = bumps(None, actions)[0], actions[:, 0]
        near = [(first - centre).norm(dim=1).lt(0.35).float().mean().item() for centre in CENTRES]
        print(f"| {name} | {values[:, 0].mean():.2f} | {values.amax(1).mean():.2f} | "
              f"{', '.join(f'{share:.2f}' for share in near)} |", flush=True)
    print("\n| numbers in an action | alpha | exp(alpha Q / s) | K = 16 | K = 100 |\n|---|---|---|---|---|")
    for dim in (1, 6):
        for alpha in (10.0, 30.0, 100.0):
            cells = [soft_policy(alpha, dim)]
            for count in (16, 100):
                actions = integrate(dim, alpha=alpha, num_proposals=count)
                cells.append((actions.std(0).mean().item(), hill(None, actions)[0].mean().item()))
            text = " | ".join(f"{std:.3f}, {value:.3f}" for std, value in cells)
            print(f"| {dim} | {alpha:g} | {text} |", flush=True)


if __name__ == "__main__":
    main()
