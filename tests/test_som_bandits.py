"""The mathematics of `som_online.py` on bandits: one state, a known Q, so that the right answer is known.

Level (a) of the fact sheet: integrating the target velocity field itself, without any network.
"""
import math
import pathlib

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
        draws = m.actor_draws(count, dim, args, "cpu")
        a_t = a_t - (t - t_next) * m.velocity(q, observations, a_t, t.expand(count, 1), draws, args)
    return a_t.clamp(-1, 1)


def shares(actions):
    """The share of actions within 0.35 of each of the four bumps."""
    return [(actions - centre).norm(dim=1).lt(0.35).float().mean().item() for centre in CENTRES]


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_unscaled_field_keeps_all_modes(path):
    """Mean Q above 0.95 and no mode under a tenth: the target policy is sampled, not one of its modes."""
    actions = integrate(modes4, 2, path=path, alpha=10.0)
    assert modes4(None, actions).mean() > 0.95 and min(shares(actions)) > 0.1


def test_score_of_fixed_length_keeps_all_modes():
    """The paper's w = 25 at alpha = 1, with proposals inside the box."""
    actions = integrate(modes4, 2, path="vp", score_scale=25.0, alpha=1.0)
    assert modes4(None, actions).mean() > 0.95 and min(shares(actions)) > 0.1


@pytest.mark.parametrize("dim", [2, 6])
def test_fixed_length_finds_the_maximum_of_a_quadratic(dim):
    """w = 25: mean Q within 0.1 of the best. Unscaled, a soft policy: near it, not on it."""
    assert quad(None, integrate(quad, dim, path="vp", score_scale=25.0, alpha=1.0)).mean() > -0.1
    assert quad(None, integrate(quad, dim, alpha=10.0)).mean() > {2: -0.15, 6: -0.6}[dim]
    assert quad(None, integrate(quad, dim, alpha=100.0)).mean() > {2: -0.03, 6: -0.3}[dim]


@pytest.mark.parametrize("alpha", [10.0, 30.0])
def test_alpha_counts_deviations_of_q_between_uniform_actions(alpha):
    """Q = -(a - 0.2)^2: mean and deviation of p(a) ~ exp(alpha Q / std Q), the deviation (0.137, 0.079) to 15 %."""
    def q(observations, actions):
        return -(actions[..., 0] - 0.2).square().expand(2, *actions.shape[:-1])

    grid = torch.linspace(-1, 1, 10_001).double().unsqueeze(1)
    p = torch.softmax(alpha * q(None, grid)[0] / q(None, grid)[0].std(), 0)
    actions = integrate(q, 1, steps=100, count=1000, alpha=alpha)
    assert actions.mean().item() == pytest.approx(0.2, abs=0.02)
    assert actions.std().item() == pytest.approx((p @ (grid - 0.2).square()).sqrt().item(), rel=0.15)


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
    draws = m.actor_draws(8, 2, args, "cpu")
    torch.testing.assert_close(m.score(q, torch.zeros(8, 1), a_t, t, draws, args), expected, rtol=0.1, atol=0.06)


def test_path_of_the_fact_sheet():
    """mu_1 = 0.0066 and sigma_1 / mu_1 = 152 for beta from 0.1 to 20; sigma is 0.28 at t = 0.085."""
    mu, sigma = m.mu_sigma(torch.tensor([1.0, 0.085]), m.Args(path="vp"))
    assert mu[0] == pytest.approx(math.exp(-5.025), rel=1e-4) and sigma[0] / mu[0] == pytest.approx(152, rel=0.01)
    assert sigma[1] == pytest.approx(0.28, abs=0.005)
    torch.testing.assert_close(mu.square() + sigma.square(), torch.ones(2))


def test_equal_times_reduce_to_the_velocity():
    """With r = t the target is v itself; else it differs by (t - r) du/dt, which a finite difference confirms."""
    torch.manual_seed(0)
    args, policy = m.Args(), m.Policy(3, 2, 32, 2).double()
    observations, actions = torch.randn(16, 3).double(), torch.rand(16, 2).double() * 2 - 1
    noise, t = torch.randn(16, 2).double(), torch.rand(16, 1).double() * 0.8 + 0.1
    field = torch.randn(16, 2).double()
    original, m.velocity = m.velocity, lambda *_: field
    try:
        draws = dict(noise=noise, times=(t, t))
        u, target = m.mean_flow_output_and_target(policy, None, observations, actions, draws, args)
        torch.testing.assert_close(target, field)
        r = t / 3
        draws = dict(noise=noise, times=(t, r))
        u, target = m.mean_flow_output_and_target(policy, None, observations, actions, draws, args)
    finally:
        m.velocity = original
    mu, sigma = m.mu_sigma(t, args)
    a_t, h = mu * actions + sigma * noise, 1e-6
    with torch.no_grad():
        after, before = (policy(observations, a_t + d * field, r, t + d) for d in (h, -h))
        du_dt = (after - before) / (2 * h)
    torch.testing.assert_close(target, field - (t - r) * du_dt, rtol=1e-5, atol=1e-6)
    assert not target.requires_grad and u.requires_grad


@pytest.mark.parametrize("normalization", ["spread", "batch", "none"])
def test_q_normalization(normalization):
    """Over what two actions of one state differ by, standardised over everything, or as it is; times alpha. The
    smaller critic's pairs are 6 and 9, 2 and 3: variances 9 / 2 and 1 / 2, on average 2.5."""
    q = torch.randn(2, 50, 2) + torch.arange(2) * 10
    pairs = torch.tensor([[[6.0, 7.0], [9.0, 3.0]], [[8.0, 2.0], [11.0, 4.0]]])  # (critic, action, state)
    numbers = torch.arange(50.0).view(50, 1, 1).expand(50, 2, 1)  # each action is its number, in the pairs -1
    logits = m.proposal_logits(lambda o, a: pairs if a[0, 0, 0] == -1 else q[:, a[:, 0, 0].long()], torch.zeros(2, 1),
                               numbers, -torch.ones(2, 2, 1), m.Args(alpha=3.0, q_normalization=normalization))
    low = q.amin(0)
    expected = {"spread": low / 2.5**0.5, "batch": (low - low.mean()) / low.std(), "none": low}[normalization]
    torch.testing.assert_close(logits, 3 * expected, rtol=1e-4, atol=1e-4)


def test_what_the_spread_does_not_feel():
    """The scale of Q, and whatever is added to it that only the state decides; nor a state's place in the batch."""
    torch.manual_seed(0)
    observations, proposals, pair = torch.randn(8, 3), torch.rand(20, 8, 2) * 2 - 1, torch.rand(2, 8, 2) * 2 - 1
    critic = m.TwinCritic(3, 2, 16, 2)

    def weights(q, rows=slice(None)):
        logits = m.proposal_logits(q, observations[rows], proposals[:, rows], pair[:, rows], m.Args(alpha=3.0))
        return logits.softmax(0)

    found, order = weights(critic), torch.randperm(8)
    assert (found.amax(0) / found.amin(0)).median() > 5
    for q in (lambda o, a: 100 * critic(o, a) - 7, lambda o, a: critic(o, a) + 5 * o.prod(-1)):
        torch.testing.assert_close(weights(q), found, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights(critic, order), found[:, order])


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
        loss = m.actor_loss(policy, q, batch, m.actor_draws(256, dim, args, "cpu"), args)
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
    policy = train(modes4, 2, alpha=10.0)
    actions = one_step_actions(policy, 2)[:, 0]
    assert modes4(None, actions)[0].mean() > 0.5 and min(shares(actions)) > 0.1
    assert modes4(None, one_step_actions(policy, 2, 32))[0].amax(1).mean() > 0.95


def test_one_step_actor_climbs_a_quadratic():
    """Six dimensions, uniform -2.70: the field of 16 proposals at alpha = 10 has about -0.7."""
    assert quad(None, one_step_actions(train(quad, 6, steps=400, alpha=10.0), 6))[0].mean() > -0.8


def test_one_step_actor_does_not_learn_scores_of_fixed_length():
    """Why w = 25 is not the default, though integrating its field is right."""
    actions = one_step_actions(train(modes4, 2, steps=500, path="vp", alpha=1.0, score_scale=25.0), 2)
    assert modes4(None, actions)[0].mean() < 0.34


def test_the_tables_of_the_page_are_the_printed_ones():
    """`python benchmark/bandit.py > benchmark/results/bandit.md`"""
    root = pathlib.Path(__file__).resolve().parents[1]
    printed = (root / "benchmark/results/bandit.md").read_text().strip().split("\n\n")
    assert len(printed) == 2 and all(table in (root / "docs/algorithms.md").read_text() for table in printed)
