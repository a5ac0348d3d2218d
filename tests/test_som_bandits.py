"""The mathematics of `som_online.py` on bandits: one state, a known Q, so that the right answer is known.

Level (a) of the fact sheet: integrating the target velocity field itself, without any network.
"""
import math

import pytest
import torch

import som_online as m

CENTRES = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.6, -0.6], [-0.6, -0.6]])


def modes4(observations, actions):
    """Four bumps of height 1; a uniform action has 0.34 on average. (2, ...), both critics equal."""
    distance = (actions.unsqueeze(-2) - CENTRES).square().sum(-1)
    return torch.exp(-distance / (2 * 0.25**2)).amax(-1).expand(2, *actions.shape[:-1])


def quad(observations, actions):
    """-|a - a*|^2 with a* from -0.5 to 0.5; a uniform action has -1.17 in 2 and -2.70 in 6 dimensions."""
    best = torch.linspace(-0.5, 0.5, actions.shape[-1])
    return -(actions - best).square().sum(-1).expand(2, *actions.shape[:-1])


def integrate(q, dim, steps=150, count=300, **flags):
    """Actions at t = 0 of the probability-flow ODE that starts at Gaussian noise, by Euler steps."""
    args = m.Args(**flags)
    torch.manual_seed(0)
    a_t, observations = torch.randn(count, dim), torch.zeros(count, 1)
    times = torch.linspace(1 - 1e-3, 1e-3, steps + 1)
    for t, t_next in zip(times, times[1:]):
        a_t = a_t - (t - t_next) * m.velocity(q, observations, a_t, t.expand(count, 1), args)
    return a_t.clamp(-1, 1)


def shares(actions):
    """The share of actions within 0.35 of each of the four bumps."""
    return [(actions - centre).norm(dim=1).lt(0.35).float().mean().item() for centre in CENTRES]


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_default_field_keeps_all_modes(path):
    """Mean Q above 0.95 and no mode under a tenth: the target policy is sampled, not one of its modes."""
    actions = integrate(modes4, 2, path=path)
    assert modes4(None, actions).mean() > 0.95 and min(shares(actions)) > 0.1


def test_score_of_fixed_length_keeps_all_modes():
    """The paper's w = 25 at alpha = 1, with proposals inside the box."""
    actions = integrate(modes4, 2, path="vp", score_scale=25.0, alpha=1.0)
    assert modes4(None, actions).mean() > 0.95 and min(shares(actions)) > 0.1


@pytest.mark.parametrize("dim", [2, 6])
def test_fixed_length_finds_the_maximum_of_a_quadratic(dim):
    """w = 25: mean Q within 0.05 of the best. The unscaled default is a soft policy: near it, not on it."""
    assert quad(None, integrate(quad, dim, path="vp", score_scale=25.0, alpha=1.0)).mean() > -0.05
    assert quad(None, integrate(quad, dim)).mean() > {2: -0.05, 6: -0.3}[dim]


def test_literal_reading_fails():
    """--score gradient with the paper's values: worse than uniform actions on both bandits, no mode is found."""
    literal = dict(path="vp", score="gradient", score_scale=25.0, alpha=1.0, q_normalization="batch")
    actions = integrate(modes4, 2, **literal)
    assert modes4(None, actions).mean() < 0.2 and max(shares(actions)) < 0.05
    assert quad(None, integrate(quad, 2, **literal)).mean() < -1.5


@pytest.mark.parametrize("path", ["vp", "linear"])
@pytest.mark.parametrize("score, alpha", [("posterior", 400.0), ("gradient", 4.0)])
def test_score_against_the_closed_form(path, score, alpha):
    """Q = -|a|^2 / 2 gives p_0 = N(0, 1 / alpha), which the box leaves alone at 400, and p_t is Gaussian too."""
    args = m.Args(path=path, score=score, alpha=alpha, num_proposals=100_000, q_normalization="none")
    t, a_t = torch.full((8, 1), 0.3), torch.linspace(-0.4, 0.4, 16).reshape(8, 2)
    mu, sigma = m.mu_sigma(t, args)

    def q(_, actions):
        return -0.5 * actions.square().sum(-1).expand(2, *actions.shape[:-1])

    torch.manual_seed(0)
    expected = -a_t / (mu.square() / alpha + sigma.square())
    torch.testing.assert_close(m.score(q, torch.zeros(8, 1), a_t, t, args), expected, rtol=0.1, atol=0.06)


def test_path_of_the_fact_sheet():
    """mu_1 = 0.0066 and sigma_1 / mu_1 = 152 for beta from 0.1 to 20; sigma is 0.28 at t = 0.085."""
    mu, sigma = m.mu_sigma(torch.tensor([1.0, 0.085]), m.Args(path="vp"))
    assert mu[0] == pytest.approx(math.exp(-5.025), rel=1e-4) and sigma[0] / mu[0] == pytest.approx(152, rel=0.01)
    assert sigma[1] == pytest.approx(0.28, abs=0.005)
    torch.testing.assert_close(mu.square() + sigma.square(), torch.ones(2))


def test_truncated_normal_is_finite_everywhere_and_right_where_it_is_known():
    """Means far outside the box and tiny or huge deviations; mean and deviation of a half-truncated normal."""
    torch.manual_seed(0)
    for std in (1e-3, 0.1, 1.0, 152.0):
        draws = m.truncated_normal(torch.linspace(-300, 300, 61).reshape(61, 1), torch.full((61, 1), std), 50)
        assert draws.isfinite().all() and draws.abs().max() <= 1
        assert (draws[:, :10] == -1).float().mean() > (0.9 if std < 1 else -1)
    draws = m.truncated_normal(torch.tensor([[1.0]]), torch.tensor([[0.3]]), 100_000)
    assert draws.mean() == pytest.approx(1 - 0.3 * math.sqrt(2 / math.pi), abs=0.005)
    assert draws.std() == pytest.approx(0.3 * math.sqrt(1 - 2 / math.pi), abs=0.005)


def test_equal_times_reduce_to_the_velocity():
    """With r = t the target is v itself; else it differs by (t - r) du/dt, which a finite difference confirms."""
    torch.manual_seed(0)
    args, policy = m.Args(), m.Policy(3, 2, 32, 2).double()
    observations, actions = torch.randn(16, 3).double(), torch.rand(16, 2).double() * 2 - 1
    noise, t = torch.randn(16, 2).double(), torch.rand(16, 1).double() * 0.8 + 0.1
    field = torch.randn(16, 2).double()
    original, m.velocity = m.velocity, lambda *_: field
    try:
        u, target = m.mean_flow_output_and_target(policy, None, observations, actions, noise, t, t, args)
        torch.testing.assert_close(target, field)
        r = t / 3
        u, target = m.mean_flow_output_and_target(policy, None, observations, actions, noise, t, r, args)
    finally:
        m.velocity = original
    mu, sigma = m.mu_sigma(t, args)
    a_t, h = mu * actions + sigma * noise, 1e-6
    with torch.no_grad():
        after, before = (policy(observations, a_t + d * field, r, t + d) for d in (h, -h))
        du_dt = (after - before) / (2 * h)
    torch.testing.assert_close(target, field - (t - r) * du_dt, rtol=1e-5, atol=1e-6)
    assert not target.requires_grad and u.requires_grad


@pytest.mark.parametrize("normalization, dims", [("state", 0), ("batch", (0, 1)), ("none", None)])
def test_q_normalization(normalization, dims):
    """Standardised over the proposals of each state, over everything, or not at all; times alpha."""
    q = torch.randn(2, 50, 4) + torch.arange(4) * 10
    logits = m.proposal_logits(lambda o, a: q, torch.zeros(4, 1), torch.zeros(50, 4, 2),
                               m.Args(alpha=3.0, q_normalization=normalization))
    low = q.amin(0)
    expected = low if dims is None else (low - low.mean(dims, keepdim=True)) / low.std(dims, keepdim=True)
    torch.testing.assert_close(logits, 3 * expected, rtol=1e-4, atol=1e-4)


def test_best_of_n_and_bellman_target():
    """The online critic chooses, the target critics' minimum values; terminations do not bootstrap."""
    torch.manual_seed(0)
    policy, next_noise = m.Policy(3, 2, 16, 2), torch.randn(5, 7, 2)
    batch = dict(observations=torch.randn(5, 3), next_observations=torch.randn(5, 3), actions=torch.zeros(5, 2),
                 rewards=torch.randn(5), masks=torch.tensor([1.0, 0, 1, 0, 1]))
    def critic(o, a):
        return torch.stack([a.sum(-1), 2 * a.sum(-1)])
    def target(o, a):
        return torch.stack([a.prod(-1), a.prod(-1) - 1])
    candidates = m.one_step_action(policy, batch["next_observations"].unsqueeze(1).expand(-1, 7, -1), next_noise)
    best = candidates[torch.arange(5), critic(None, candidates).amin(0).argmax(1)]
    args = m.Args(gamma=0.9, reward_scale=0.5)
    y = 0.5 * batch["rewards"] + 0.9 * batch["masks"] * (best.prod(-1) - 1)
    loss = m.critic_loss(policy, critic, target, batch, next_noise, args)
    assert loss.item() == pytest.approx(2 * y.square().mean().item(), rel=1e-5)  # critic of a zero action is 0


# ---------------------------------------------------------------- level (b): a one-step actor, trained
def train(q, dim, steps=1000, **flags):
    """A small policy trained with L_actor alone, on actions drawn from the whole box."""
    torch.manual_seed(0)
    args = m.Args(num_proposals=16, learning_rate=2e-3, **flags)
    policy = m.Policy(1, dim, 64, 3)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / steps)
        batch = dict(observations=torch.zeros(256, 1), actions=2 * torch.rand(256, dim) - 1)
        draws = torch.randn(256, dim), m.sample_times(256, args, "cpu"), torch.randn(256, dim)
        loss = m.actor_loss(policy, q, batch, draws, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@torch.no_grad()
def one_step_actions(policy, dim, num_candidates=1):
    torch.manual_seed(1)
    return m.one_step_action(policy, torch.zeros(1000, num_candidates, 1), torch.randn(1000, num_candidates, dim))


def test_one_step_actor_keeps_all_modes():
    """The default, in one evaluation and without choosing: mean Q above 0.5 (uniform 0.34) on all four bumps."""
    policy = train(modes4, 2)
    actions = one_step_actions(policy, 2)[:, 0]
    assert modes4(None, actions)[0].mean() > 0.5 and min(shares(actions)) > 0.1
    assert modes4(None, one_step_actions(policy, 2, 32))[0].amax(1).mean() > 0.95


def test_one_step_actor_climbs_a_quadratic():
    """Six dimensions, uniform -2.70: the soft policy at alpha = 10 has about -0.3."""
    assert quad(None, one_step_actions(train(quad, 6, steps=400), 6))[0].mean() > -0.8


def test_one_step_actor_does_not_learn_scores_of_fixed_length():
    """Why w = 25 is not the default, though integrating its field is right."""
    actions = one_step_actions(train(modes4, 2, steps=500, path="vp", alpha=1.0, score_scale=25.0), 2)
    assert modes4(None, actions)[0].mean() < 0.34
