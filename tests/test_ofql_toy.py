"""Cloning alone on 2-D toys: one-step samples cover every mode at flow ratio 0.5, and do not at flow ratio 1.

The claim of the paper's figure 4, on toys coarse enough for a minute on one core: a 3x3 checkerboard with five dark
squares, and two spirals of half a turn, cut into four segments each. A sample counts where it lies in a dark square or
near a spiral, and each square's or segment's fair share of those is one over their number. To pass, samples must be
more precise than a Gaussian of the data's mean and covariance, and leave out no square or segment.

At flow ratio 1 the network learns nothing but the velocity at r = t. One Euler step of it, e - v(e, 1), is the mean of
the data for every e; the one-step action asks for u(e, 0, 1), where it was never trained.
"""
import math

import pytest
import torch

import ofql_offline as m

SQUARES = torch.tensor([[0.0, 0.0], [-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]])
RADIUS = torch.linspace(0.2**2, 0.85**2, 200).sqrt()  # so that the points of an arm lie about equally far apart
ANGLE = math.pi * (RADIUS - 0.2) / 0.65
ARM = RADIUS[:, None] * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)
TOYS = {  # anchors, how many of them make a mode, norm and distance within which a sample counts
    "board": (SQUARES, 1, math.inf, 0.3),
    "spirals": (torch.cat([ARM, -ARM]), 50, 2, 0.1),
}
LEAST_NEAR = {"board": 0.53, "spirals": 0.43}


def draw(toy, count):
    anchors = TOYS[toy][0]
    spread = 0.6 * torch.rand(count, 2) - 0.3 if toy == "board" else 0.03 * torch.randn(count, 2)
    return anchors[torch.randint(len(anchors), (count,))] + spread


def coverage(toy, samples):
    """(share of the samples that count, least mode's part of its fair share of those)."""
    anchors, group, norm, distance = TOYS[toy]
    nearest, index = torch.cdist(samples, anchors, p=norm).min(1)
    near = nearest < distance
    modes = len(anchors) // group
    shares = torch.bincount(index[near] // group, minlength=modes) / near.sum().clamp(min=1)
    return near.float().mean().item(), modes * shares.min().item()


def passes(toy, samples):
    near, least = coverage(toy, samples)
    return near > LEAST_NEAR[toy] and least > 0.2


def train(toy, flow_ratio, steps=1500, seed=0):
    """A small policy after `steps` updates of the cloning loss alone."""
    torch.manual_seed(seed)
    args = m.Args(flow_ratio=flow_ratio)
    policy, observations = m.Policy(1, 2, 64, 3), torch.ones(512, 1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        t, r = m.sample_times(512, args, "cpu")
        loss = m.mean_flow_loss(policy, observations, draw(toy, 512), torch.randn(512, 2), t, r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def noise():
    return torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def one_step_samples(policy):
    return m.one_step_action(policy, torch.ones(4000, 1), noise())


@torch.no_grad()
def euler_samples(policy, steps):
    """Plain flow matching: from noise at t = 1 to t = 0 in equal steps along the velocity u(a_t, t, t)."""
    samples = noise()
    for t in torch.arange(steps, 0, -1).view(-1, 1, 1) / steps:
        samples = samples - policy(torch.ones(4000, 1), samples, t, t) / steps
    return samples


@pytest.mark.parametrize("toy", TOYS)
def test_the_data_pass_the_check_and_a_gaussian_like_them_does_not(toy):
    torch.manual_seed(0)
    data = draw(toy, 4000)
    near, least = coverage(toy, data)
    assert near > 0.98 and least > 0.8 and passes(toy, data) and data.abs().max() < 1
    gaussian = data.mean(0) + noise() @ torch.linalg.cholesky(data.T.cov()).T
    assert coverage(toy, gaussian)[0] < LEAST_NEAR[toy] - 0.08


@pytest.mark.parametrize("toy", TOYS)
def test_one_step_covers_every_mode_at_flow_ratio_one_half(toy):
    assert passes(toy, one_step_samples(train(toy, 0.5)))


@pytest.mark.parametrize("toy", TOYS)
def test_one_step_does_not_at_flow_ratio_one(toy):
    """That flow needs many steps: forty of the same network pass, and one Euler step gives the mean."""
    policy = train(toy, 1.0)
    assert not passes(toy, one_step_samples(policy))
    assert passes(toy, euler_samples(policy, 40))
    mean = euler_samples(policy, 1)
    assert mean.std(0).max() < 0.25 and coverage(toy, mean)[1] < 0.05
