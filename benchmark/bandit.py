"""SOM's one-step actor on a bandit with four equally good actions: the table of docs/algorithms.md (three minutes).

    python benchmark/bandit.py
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import som_online  # noqa: E402

CENTRES = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.6, -0.6], [-0.6, -0.6]])
SETTINGS = {  # name: gradient steps, peak learning rate, flags
    "score of length 25, alpha 1, vp": (2000, 1e-3, dict(path="vp", alpha=1.0, score_scale=25.0)),
    "alpha 10, vp": (1000, 1e-3, dict(path="vp", alpha=10.0)),
    f"default: alpha {som_online.Args.alpha:g}, linear": (1000, 1e-3, dict()),
    "default, 3,000 steps": (3000, 1e-3, dict()),
    "default, 3,000 steps from 3e-4": (3000, 3e-4, dict()),
    "alpha 5": (1000, 1e-3, dict(alpha=5.0)),
    "adaptive power 1": (1000, 1e-3, dict(adaptive_power=1.0)),
}


def q(observations, actions):
    """Four bumps of height 1; a uniform action has 0.34 on average. (2, ...), both critics equal."""
    distance = (actions.unsqueeze(-2) - CENTRES).square().sum(-1)
    return torch.exp(-distance / (2 * 0.25**2)).amax(-1).expand(2, *actions.shape[:-1])


def train(steps, learning_rate, flags, batch_size=256):
    """Policy 128 x 3 after `steps` of L_actor with K = 16, on actions from the whole box; cosine decay to 0."""
    torch.manual_seed(0)
    args = som_online.Args(num_proposals=16, **flags)
    policy = som_online.Policy(1, 2, 128, 3)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = dict(observations=torch.zeros(batch_size, 1), actions=2 * torch.rand(batch_size, 2) - 1)
        draws = som_online.actor_draws(batch_size, 2, args, "cpu")
        loss = som_online.actor_loss(policy, q, batch, draws, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def main():
    torch.set_num_threads(1)
    print("| target | N = 1 | N = 32 | share near each of the four |\n|---|---|---|---|")
    for name, (steps, learning_rate, flags) in SETTINGS.items():
        policy = train(steps, learning_rate, flags)
        with torch.no_grad():
            actions = som_online.one_step_action(policy, torch.zeros(2000, 32, 1), torch.randn(2000, 32, 2))
        values, first = q(None, actions)[0], actions[:, 0]
        near = [(first - centre).norm(dim=1).lt(0.35).float().mean().item() for centre in CENTRES]
        print(f"| {name} | {values[:, 0].mean():.2f} | {values.amax(1).mean():.2f} | "
              f"{', '.join(f'{share:.2f}' for share in near)} |", flush=True)


if __name__ == "__main__":
    main()
