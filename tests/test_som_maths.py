"""SOM's networks, losses, first gradient step and acting, by hand: what the bandits of test_som_bandits.py are too
coarse to see."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import som_online as m

OBS, ACT, BATCH = 3, 2, 16
SMALL = dict(policy_width=16, policy_depth=2, critic_width=16, critic_depth=2, num_proposals=8)


def batch(rows=BATCH):
    torch.manual_seed(7)
    return dict(observations=torch.randn(rows, OBS), actions=2 * torch.rand(rows, ACT) - 1, rewards=torch.randn(rows),
                masks=(torch.arange(rows) % 3 > 0).float(), next_observations=torch.randn(rows, OBS))


def perturb(module, scale=0.2, seed=0):
    """Moves every parameter, those that start at 0 or 1 as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def make_agent(**flags):
    """An agent whose target critic is not its critic: both rank candidates differently."""
    torch.manual_seed(0)
    agent = m.Agent(OBS, ACT, m.Args(**{**SMALL, **flags}), torch.device("cpu"))
    perturb(agent.policy), perturb(agent.critic, 0.5, 1), perturb(agent.target_critic, 0.5, 2)
    return agent


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def close(ours, expected, tolerance=1e-6):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def recording(agent):
    """Lists that fill with the inputs of the two losses."""
    critic, actor = [], []
    agent.critic_loss = lambda *inputs: critic.append(inputs) or m.critic_loss(*inputs)
    agent.actor_loss = lambda *inputs: actor.append(inputs) or m.actor_loss(*inputs)
    return critic, actor


# ---------------------------------------------------------------- times
@pytest.mark.parametrize("ratio, rows, plain", [(0.25, 256, 64), (0.25, 10, 2), (0.0, 64, 0), (1.0, 64, 64)])
def test_exactly_the_flow_ratio_of_the_rows_has_equal_times(ratio, rows, plain):
    for seed in range(3):
        torch.manual_seed(seed)
        t, r = m.sample_times(rows, m.Args(flow_ratio=ratio), "cpu")
        assert t.shape == r.shape == (rows, 1)
        assert (r == t).sum() == plain == int(ratio * rows) and (r <= t).all()


def test_times_are_two_sorted_uniform_numbers():
    """Means 2/3 and 1/3, variance 1/18; from 0.001 to 0.999, both of which occur, since 1 / t and 1 / (1 - t) do."""
    torch.manual_seed(0)
    t, r = m.sample_times(200_000, m.Args(flow_ratio=0.0), "cpu")
    assert (t.max() - 0.999).abs() < 1e-6 and (r.min() - 0.001).abs() < 1e-6
    for x, mean in ((t, 2 / 3), (r, 1 / 3)):
        assert x.mean().item() == pytest.approx(mean, abs=0.003) and x.var().item() == pytest.approx(1 / 18, rel=0.02)
    t, _ = m.sample_times(200_000, m.Args(flow_ratio=1.0), "cpu")
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.003)  # the later one is kept


# ---------------------------------------------------------------- networks
@pytest.mark.parametrize("depth", [1, 3])
def test_policy_written_out(depth):
    """(Linear, LayerNorm, Mish) on action, r, t and observation; r and t are told apart."""
    torch.manual_seed(0)
    policy = perturb(m.Policy(OBS, ACT, 32, depth).double())
    observations, a, r, t = (torch.randn(BATCH, n).double() for n in (OBS, ACT, 1, 1))
    x = torch.cat([a, r, t, observations], 1)
    for layer, norm in zip(policy.hidden, policy.norms, strict=True):
        x = F.mish(F.layer_norm(layer(x), (32,), norm.weight, norm.bias))
    close(policy(observations, a, r, t), policy.final(x), 1e-12)
    assert len(policy.hidden) == depth and (policy(observations, a, t, r) - policy.final(x)).abs().max() > 0.01


def test_twin_critic_is_two_separate_networks():
    torch.manual_seed(0)
    critic = perturb(m.TwinCritic(OBS, ACT, 24, 2).double())
    observations, actions = torch.randn(BATCH, 4, OBS).double(), torch.randn(BATCH, 4, ACT).double()
    for k in range(2):
        x = torch.cat([observations, actions], -1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x if i == 0 else F.mish(x), weight[k].T, bias[k, 0])
        close(critic(observations, actions)[k], x.squeeze(-1), 1e-12)
    assert len(critic.weights) == 3


def test_networks_at_initialisation():
    """Every weight and bias as nn.Linear's, uniform within 1 / sqrt(inputs); two different critics."""
    torch.manual_seed(0)
    critic, policy = m.TwinCritic(11, 3, 256, 3), m.Policy(11, 3, 256, 3)
    linear = [(layer.weight.T, layer.bias) for layer in policy.modules() if isinstance(layer, nn.Linear)]
    twins = [(weight[k], bias[k, 0]) for weight, bias in zip(critic.weights, critic.biases) for k in range(2)]
    for weight, bias in linear + twins:
        limit = weight.shape[0] ** -0.5
        assert 0.97 * limit < weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=5 / weight.numel() ** 0.5)
        assert bias.abs().max() <= limit and bias.abs().max() > (0.9 * limit if len(bias) > 9 else 0)
    assert all((weight[0] != weight[1]).any() for weight in critic.weights)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.6, 0.5), (-1.5, 0.4), (3.0, 2.0), (0.0, 152.0), (150.0, 152.0),
                                       (1.5, 0.1), (-1.5, 0.1), (2.2, 0.1), (-2.2, 0.1)])  # 5 to 32 deviations outside
def test_truncated_normal_has_the_distribution_between_both_ends(mean, std):
    """Of a grid of uniform numbers, against the distribution function in the tail that float64 resolves."""
    grid, side = (torch.arange(20_000) + 0.5) / 20_000, -1 if mean < 0 else 1
    draws = m.truncated_normal(torch.tensor([[mean]]), torch.tensor([[std]]), grid.view(-1, 1, 1)).flatten()
    assert draws.dtype == torch.float32
    low, high, found = (0.5 * torch.erfc((abs(mean) - x) / (std * 2**0.5))
                        for x in (torch.tensor(-1.0).double(), torch.tensor(1.0).double(), side * draws.double()))
    assert ((found - low) / (high - low) - grid.double()).abs().max() < 1e-4


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.1, 1.0, 152.0])
def test_truncated_normal_is_finite_in_the_box_and_nowhere_improbable(std):
    """Also of the uniform number 0, and hundreds of deviations outside, where all of it lies at the wall."""
    mean = torch.cat([torch.linspace(-300, 300, 61), torch.linspace(-1.2, 1.2, 13)]).unsqueeze(1)
    uniform = torch.tensor([0.0, 2**-24, 0.3, 1 - 2**-24]).view(4, 1, 1).expand(4, 74, 1)
    draws = m.truncated_normal(mean, torch.full((74, 1), std), uniform)
    assert draws.isfinite().all() and draws.abs().max() <= 1 and draws.shape == uniform.shape
    nearest = mean.clamp(-1, 1)
    assert ((draws - nearest).abs() < 6 * std).all()  # of 2**-24 and above: 5.3 at most
    if std < 1:
        assert (draws == nearest)[:, mean.abs() > 15 * std + 1].all()


# ---------------------------------------------------------------- the score, the velocity and the actor's loss
def table_q(values):
    """Critics with these values (2, K, B), whatever they are asked."""
    return lambda observations, actions: values


def test_posterior_score_by_hand(monkeypatch):
    """Three proposals for two rows; the smaller critic counts, and its softmax at alpha."""
    proposals = torch.tensor([[[0.5], [-1.0]], [[0.0], [0.0]], [[-0.5], [1.0]]])  # (K, B, 1)
    q = torch.tensor([[[3.0, 1.0], [1.0, 5.0], [0.0, 2.0]], [[9.0, 0.0], [0.0, 9.0], [5.0, 1.0]]])  # (2, K, B)
    seen = []
    monkeypatch.setattr(m, "truncated_normal", lambda *inputs: seen.append(inputs) or proposals)
    args, a_t, t = m.Args(alpha=0.7, q_normalization="none", num_proposals=3), torch.tensor([[0.3], [2.0]]), 0.4
    draws = dict(proposals=torch.rand(3, 2, 1), pair=None)
    s = m.score(table_q(q), torch.zeros(2, OBS), a_t, torch.full((2, 1), t), draws, args)
    for row, low in enumerate(([3.0, 0.0, 0.0], [0.0, 5.0, 1.0])):
        weights = [math.exp(0.7 * value) for value in low]
        mean = sum(w * a for w, a in zip(weights, proposals[:, row, 0].tolist())) / sum(weights)
        assert s[row].item() == pytest.approx((0.6 * mean - a_t[row].item()) / 0.16, rel=1e-5)
        v = m.velocity(table_q(q), torch.zeros(2, OBS), a_t, torch.full((2, 1), t), draws, args)[row].item()
        assert v == pytest.approx((a_t[row].item() - mean) / t, rel=1e-4)
    mean, std, uniform = seen[0]
    close(mean, a_t / 0.6)
    close(std, torch.full((2, 1), 0.4 / 0.6))
    assert uniform is draws["proposals"]


def test_score_of_fixed_length_and_the_velocity_of_vp(monkeypatch):
    """Every row's own score has the length w; v = -(b_t / 2) (a_t + w S / |S|) with b_0.25 = 5.075."""
    s = torch.tensor([[3.0, 4.0], [0.0, -0.1]])
    monkeypatch.setattr(m, "score", lambda *_: s)
    a_t, t = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), torch.full((2, 1), 0.25)
    for scale, used in ((10.0, [[6.0, 8.0], [0.0, -10.0]]), (None, s.tolist())):
        v = m.velocity(None, None, a_t, t, None, m.Args(path="vp", score_scale=scale))
        close(v, -0.5 * 5.075 * (a_t + torch.tensor(used)), 1e-4)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_actor_loss_by_hand(monkeypatch, power):
    """Rows whose errors differ much: the mean over the action's numbers, weighted by (d + 1e-3)^-p, a constant."""
    u = torch.tensor([[0.01, 0.0], [2.0, -1.0], [0.0, 30.0]], requires_grad=True)
    monkeypatch.setattr(m, "mean_flow_output_and_target", lambda *_: (u, torch.zeros(3, 2)))
    data, args = dict(actions=torch.zeros(3, 2), observations=torch.zeros(3, 1)), m.Args(adaptive_power=power)
    loss = m.actor_loss(None, None, data, None, args)
    d = [0.01**2 / 2, 5 / 2, 900 / 2]
    weights = [(x + 1e-3) ** -power for x in d]
    assert loss.item() == pytest.approx(sum(w * x for w, x in zip(weights, d)) / 3, rel=1e-5)
    close(torch.autograd.grad(loss, u)[0], u.detach() * torch.tensor(weights).unsqueeze(1) / 3, 1e-5)


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_the_velocity_is_asked_for_at_a_t_and_t(monkeypatch, path):
    """Eq. (1), and t rather than r."""
    seen, agent, data, args = [], make_agent(), batch(), m.Args(path=path)
    monkeypatch.setattr(m, "velocity", lambda *inputs: seen.append(inputs) or torch.ones_like(inputs[2]))
    noise, t, r = torch.randn(BATCH, ACT), torch.full((BATCH, 1), 0.7), torch.full((BATCH, 1), 0.2)
    draws = dict(noise=noise, times=(t, r))
    m.mean_flow_output_and_target(agent.policy, agent.critic, data["observations"], data["actions"], draws, args)
    critic, observations, a_t, time, given, _ = seen[0]
    mu = 0.3 if path == "linear" else math.exp(-0.5 * (0.1 * 0.7 + 19.9 * 0.49 / 2))
    sigma = 0.7 if path == "linear" else (1 - mu**2) ** 0.5
    close(a_t, mu * data["actions"] + sigma * noise, 1e-5)
    assert critic is agent.critic and torch.equal(observations, data["observations"]) and torch.equal(time, t)
    assert given is draws


# ---------------------------------------------------------------- best of N
def test_critics_that_disagree():
    """Fixed numbers: by the mean the risky candidate would win, by the smaller value the safe one does."""
    noise, q = torch.tensor([[[-2.0], [0.5]]]), torch.tensor([[[10.0, 3.0]], [[0.0, 2.0]]])  # (critic, row, candidate)
    found = m.best_of_n(lambda o, a, r, t: torch.zeros_like(a), table_q(q), torch.zeros(1, 1), noise)
    assert found.tolist() == [[0.5]]


@pytest.mark.parametrize("count", [1, 6])
def test_act_takes_what_the_online_critic_likes_best(count):
    agent, observations = make_agent(), torch.randn(32, OBS)
    before = torch.get_rng_state()
    actions = agent.act(observations, count, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before) and not actions.requires_grad
    noise = torch.randn(32, count, ACT, generator=torch.Generator().manual_seed(5))
    rows = observations.repeat_interleave(count, 0)
    zero, one = torch.zeros(len(rows), 1), torch.ones(len(rows), 1)
    candidates = (noise.flatten(0, 1) - agent.policy(rows, noise.flatten(0, 1), zero, one)).clamp(-1, 1)
    best = {}
    for name, critic in (("online", agent.critic), ("target", agent.target_critic)):
        index = critic(rows, candidates).amin(0).view(32, count).argmax(1)
        best[name] = candidates.view(32, count, ACT)[torch.arange(32), index].detach()
    close(actions, best["online"])
    assert count == 1 or (best["online"] - best["target"]).abs().max() > 0.1


# ---------------------------------------------------------------- one gradient step
def test_first_update():
    """The target critic begins as the critic, gives y with N candidates of its own flag and follows by tau; Adam's
    first step is its rate; the actor's loss asks the critic as it is after its step."""
    torch.manual_seed(0)
    agent = m.Agent(OBS, ACT, m.Args(**SMALL, num_candidates_target=5, tau=0.3, learning_rate=0.002),
                    torch.device("cpu"))
    before, policy = copies(agent.critic), copies(agent.policy)
    assert all(torch.equal(c, t) for c, t in zip(before, agent.target_critic.parameters()))
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
    critic_inputs, actor_inputs = recording(agent)
    agent.update(batch())
    assert critic_inputs[0][4].shape == (BATCH, 5, ACT)
    for old, new, target in zip(before, agent.critic.parameters(), agent.target_critic.parameters()):
        assert (new - old).abs().max().item() == pytest.approx(0.002, rel=0.01)
        close(target, 0.7 * old + 0.3 * new)
    for old, new in zip(policy, agent.policy.parameters()):
        assert (new - old).abs().max().item() == pytest.approx(0.002, rel=0.01)
    assert actor_inputs[0][1] is agent.critic and critic_inputs[0][0] is agent.policy
    draws = actor_inputs[0][3]
    t, r = draws["times"]
    assert draws["noise"].shape == (BATCH, ACT) and (r == t).sum() == BATCH // 4
    assert draws["proposals"].shape == (8, BATCH, ACT) and draws["pair"].shape == (2, BATCH, ACT)


def test_gradients_of_an_earlier_step_are_forgotten():
    states = []
    for stale in (None, 1e6):
        agent = make_agent()
        for parameter in (*agent.policy.parameters(), *agent.critic.parameters()):
            parameter.grad = None if stale is None else torch.full_like(parameter, stale)
        torch.manual_seed(1)
        agent.update(batch())
        states.append(agent.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_bellman_target_with_networks():
    """Row by row: the critic's choice among N actions at s', valued by the smaller target critic, reward scaled."""
    agent, data, y = make_agent(reward_scale=0.5, gamma=0.9), batch(), []
    noise, other = torch.randn(BATCH, 4, ACT), 0
    for i in range(BATCH):
        rows, zero, one = data["next_observations"][i].expand(4, -1), torch.zeros(4, 1), torch.ones(4, 1)
        actions = (noise[i] - agent.policy(rows, noise[i], zero, one)).clamp(-1, 1)
        target = agent.target_critic(rows, actions).amin(0)
        chosen = agent.critic(rows, actions).amin(0).argmax()
        other += chosen != target.argmax()
        y.append(0.5 * data["rewards"][i] + 0.9 * data["masks"][i] * target[chosen])
    assert other > 2, "else it does not matter who chooses"
    q, y = agent.critic(data["observations"], data["actions"]), torch.stack(y).detach()
    loss = m.critic_loss(agent.policy, agent.critic, agent.target_critic, data, noise, agent.args)
    close(loss, F.mse_loss(q[0], y) + F.mse_loss(q[1], y), 1e-5)


def test_each_loss_moves_its_own_network():
    """No gradient through y, into the target critic, or from the actor's loss into the critic."""
    agent, data = make_agent(), batch()
    m.critic_loss(agent.policy, agent.critic, agent.target_critic, data, torch.randn(BATCH, 3, ACT),
                  agent.args).backward()
    assert all(p.grad is None for p in (*agent.policy.parameters(), *agent.target_critic.parameters()))
    agent.critic.zero_grad()
    for score in ("posterior", "gradient"):
        agent.args.score = score
        draws, before = m.actor_draws(BATCH, ACT, agent.args, "cpu"), torch.get_rng_state()
        m.actor_loss(agent.policy, agent.critic, data, draws, agent.args).backward()
        assert torch.equal(torch.get_rng_state(), before)  # all that is random is in draws
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad.abs().max() > 0 for p in agent.policy.parameters())
