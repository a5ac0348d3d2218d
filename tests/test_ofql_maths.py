"""OFQL's equations from first principles: times, networks, losses, gradients, schedules, one step, and acting."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import jvp

import ofql_offline as m

OBS, ACT, BATCH = 3, 2, 16


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def perturb(module, scale=0.1, seed=0):
    """Moves every parameter, those that start at 0 or 1 as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def make_policy(width=32, depth=2, scale=0.2):
    torch.manual_seed(0)
    return perturb(m.Policy(OBS, ACT, width, depth).double(), scale)


def make_critic(width=24, depth=2, seed=0, form="layer_norm"):
    torch.manual_seed(seed)
    return perturb(m.TwinCritic(OBS, ACT, width, depth, form).double(), seed=seed)


def path_inputs(batch=BATCH):
    """(observations, actions, noise, t, r) of a cloning batch; some checks divide by t - r, which is at least 0.05."""
    t = torch.linspace(0.1, 1, batch, dtype=torch.float64).unsqueeze(1)
    r = (t - 0.05) * torch.rand(batch, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return double(batch, OBS, seed=1), double(batch, ACT, seed=2).clamp(-1, 1), double(batch, ACT, seed=3), t, r


def transitions(batch=BATCH):
    return dict(observations=double(batch, OBS, seed=4), actions=double(batch, ACT, seed=5).clamp(-1, 1),
                rewards=double(batch, seed=6), masks=(torch.arange(batch) % 3 > 0).double(),
                next_observations=double(batch, OBS, seed=7))


def actor_draws(swap=False, batch=BATCH):
    """Noise and times of the cloning loss, noise of the Q term, and whether Q_2 is the critic i."""
    _, _, noise, t, r = path_inputs(batch)
    return noise, (t, r), double(batch, ACT, seed=8), torch.tensor(swap)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def close(ours, expected, tolerance=1e-10):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def differ(a, b, gap=1e-3):
    return (a - b).abs().max().item() > gap


# ---------------------------------------------------------------- times
ROWS = 2_000_000


def times(seed=0, batch_size=ROWS, **flags):
    torch.manual_seed(seed)
    t, r = m.sample_times(batch_size, m.Args(**flags), "cpu")
    assert t.shape == r.shape == (batch_size, 1)
    return t.double(), r.double()


def assert_mean(values, expected, sigmas=5):
    """The mean of independent values, within so many standard errors."""
    values = values.double().flatten()
    error = (values.std() / len(values) ** 0.5).item()
    assert abs(values.mean().item() - expected) < sigmas * error, (values.mean().item(), expected, error)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / 2**0.5))


def logit_normal_maximum(mean=-0.4, std=1.0):
    """Mean of the larger of two sigmoid(N(mean, std)), by a fine sum over the density 2 p(x) P(x)."""
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    p = torch.exp(-x**2 / 2) / (2 * math.pi) ** 0.5
    larger = 2 * p * (0.5 + 0.5 * torch.erf(x / 2**0.5))
    return torch.trapezoid(torch.sigmoid(mean + std * x) * larger, x).item()


def test_logit_normal_times_have_the_moments_of_eq_5():
    """Means and the mass near (t, r) = (1, 0), computed here without sampling and measured on two million rows."""
    mean_t = logit_normal_maximum()
    mean_r = 1 - logit_normal_maximum(mean=0.4)  # by symmetry: the smaller is one minus the larger of the mirrored
    assert mean_t == pytest.approx(0.535, abs=5e-4) and mean_r == pytest.approx(0.301, abs=5e-4)
    t, r = times(flow_ratio=0.0)
    assert (r <= t).all() and r.min() >= 0 and t.max() <= 1
    assert_mean(t, mean_t)
    assert_mean(r, mean_r)
    for edge, known in ((0.9, 3.4e-4), (0.95, 4.5e-6)):
        x = math.log(edge / (1 - edge))  # one draw above the edge, the other below its mirror image
        corner = 2 * (1 - normal_cdf(x + 0.4)) * normal_cdf(-x + 0.4)
        assert corner == pytest.approx(known, rel=0.02)
        count = ((t > edge) & (r < 1 - edge)).sum().item()
        assert abs(count - corner * ROWS) < 5 * (corner * ROWS) ** 0.5
    t, r = times(seed=1)  # flow ratio 0.5: half the mass, and t keeps its distribution on all rows
    assert_mean(t, mean_t)
    assert_mean(t[r == t], mean_t)
    count = ((t > 0.9) & (r < 0.1)).sum().item()
    assert abs(count - 1.7e-4 * ROWS) < 5 * (1.7e-4 * ROWS) ** 0.5


def test_uniform_times():
    """Larger and smaller of two uniform numbers: means 2/3 and 1/3, variance 1/18; far more mass near (1, 0)."""
    t, r = times(flow_ratio=0.0, time_sampling="uniform")
    assert (r <= t).all() and r.min() >= 0 and t.max() <= 1
    assert_mean(t, 2 / 3)
    assert_mean(r, 1 / 3)
    assert_mean((t - 2 / 3) ** 2, 1 / 18)
    assert_mean((r - 1 / 3) ** 2, 1 / 18)
    assert_mean((t > 0.9) & (r < 0.1), 2.0e-2)
    assert_mean((t > 0.95) & (r < 0.05), 5.0e-3)


def test_logits_of_the_times():
    """Two normal numbers N(-0.4, 1): the pair's mean has variance 1 / 2, and the gap's mean is 2 / sqrt(pi)."""
    t, r = times(batch_size=200_000, flow_ratio=0.0)
    t, r = t.logit(), r.logit()
    assert_mean((t + r) / 2, -0.4)
    assert_mean(((t + r) / 2 + 0.4) ** 2, 1 / 2)
    assert_mean(t - r, 2 / math.pi**0.5)


@pytest.mark.parametrize("time_sampling", ["logit-normal", "uniform"])
@pytest.mark.parametrize("ratio, batch_size, plain", [
    (0.5, 256, 128), (0.5, 7, 3), (0.25, 256, 64), (0.75, 10, 7), (0.0, 64, 0), (1.0, 64, 64), (0.3, 1, 0),
])
def test_exactly_the_flow_ratio_of_the_rows_is_plain_flow_matching(ratio, batch_size, plain, time_sampling):
    for seed in range(5):
        t, r = times(seed, batch_size, flow_ratio=ratio, time_sampling=time_sampling)
        assert (r == t).sum().item() == plain == int(ratio * batch_size)
        assert (r <= t).all()


# ---------------------------------------------------------------- the MeanFlow identity
@pytest.mark.parametrize("seed", [0, 1])
def test_flow_ratio_one_is_conditional_flow_matching(seed):
    """With r = t the target is v itself, and loss and gradients are those of plain regression."""
    policy, (observations, actions, noise, _, _) = make_policy(), path_inputs()
    t, r = times(seed, BATCH, flow_ratio=1.0)
    assert torch.equal(t, r)
    v = noise - actions
    assert torch.equal(m.mean_flow_output_and_target(policy, observations, actions, noise, t, r)[1], v)
    loss = m.mean_flow_loss(policy, observations, actions, noise, t, r)
    plain = F.mse_loss(policy(observations, (1 - t) * actions + t * noise, t, t), v)
    close(loss, plain, 1e-14)
    close(gradients(loss, policy), gradients(plain, policy), 1e-14)


def test_jvp_equals_finite_differences():
    """du/dt runs along the path of a_t and t together while r stays where it is."""
    policy, (observations, actions, noise, t, r) = make_policy(), path_inputs()
    a_t, v, h = (1 - t) * actions + t * noise, noise - actions, 1e-5
    u, u_tgt = m.mean_flow_output_and_target(policy, observations, actions, noise, t, r)
    difference = (policy(observations, a_t + h * v, r, t + h) - policy(observations, a_t - h * v, r, t - h)) / (2 * h)
    assert difference.abs().mean() > 0.1, "a derivative this small would prove nothing"
    close(u, policy(observations, a_t, r, t))
    close((v - u_tgt) / (t - r), difference, 1e-7)


def test_jvp_has_a_part_from_the_path_and_one_from_the_time():
    """The same derivative from reverse mode, in two parts that are both needed."""
    policy, (observations, actions, noise, t, r) = make_policy(), path_inputs()
    a, time = ((1 - t) * actions + t * noise).requires_grad_(), t.clone().requires_grad_()
    u = policy(observations, a, r, time)
    columns = [torch.autograd.grad(u[:, i].sum(), (a, time), retain_graph=True) for i in range(ACT)]
    along_path = torch.stack([((noise - actions) * da).sum(1) for da, _ in columns], 1)
    along_time = torch.stack([dt.squeeze(1) for _, dt in columns], 1)
    assert min(along_path.abs().mean(), along_time.abs().mean()) > 0.05
    u_tgt = m.mean_flow_output_and_target(policy, observations, actions, noise, t, r)[1]
    close(u_tgt, noise - actions - (t - r) * (along_path + along_time))


MEAN, STD = torch.tensor([0.4, -0.2], dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)


def gaussian_velocity(a, t):
    """Marginal velocity of the flow to Gaussian data."""
    sigma_t = (((1 - t) * STD) ** 2 + t**2).sqrt()
    growth = (t - (1 - t) * STD**2) / sigma_t**2  # d log(sigma_t) / dt
    return growth * (a - (1 - t) * MEAN) - MEAN


def gaussian_average_velocity(a, r, t):
    """u(a, r, t): the flow keeps the standardised position, so where it was at time r is known."""
    sigma_t, sigma_r = ((((1 - x) * STD) ** 2 + x**2).sqrt() for x in (t, r))
    at_r = (1 - r) * MEAN + sigma_r / sigma_t * (a - (1 - t) * MEAN)
    return (a - at_r) / (t - r)


def point_velocity(a, t):
    """Data that are one point: all paths lead straight there."""
    return (a - MEAN) / t


@pytest.mark.parametrize("velocity, average", [
    (gaussian_velocity, gaussian_average_velocity), (point_velocity, lambda a, r, t: (a - MEAN) / t),
])
def test_a_known_average_velocity_is_its_own_target(velocity, average):
    """The identity holds along the marginal velocity: (a, e) are chosen so that a_t = x and e - a = v(x, t)."""
    (_, _, _, t, r), x = path_inputs(), double(BATCH, ACT, seed=8)
    v = velocity(x, t)
    inputs = None, x - t * v, x + (1 - t) * v, t, r
    u, u_tgt = m.mean_flow_output_and_target(lambda o, a, r, t: average(a, r, t), *inputs)
    close(u, average(x, r, t))
    close(u_tgt, u)
    close(m.mean_flow_loss(lambda o, a, r, t: average(a, r, t), *inputs).item(), 0.0)
    if velocity is gaussian_velocity:  # the velocity at one instant in place of the average
        u, u_tgt = m.mean_flow_output_and_target(lambda o, a, r, t: velocity(a, t), *inputs)
        assert (u - u_tgt).abs().mean() > 0.05


def test_one_step_from_noise_lands_on_the_data():
    """Eq. (4) with the exact average velocity of Gaussian data is the flow map e -> mean + std e, clipped."""
    noise = 2 * double(BATCH, ACT, seed=8)
    actions = m.one_step_action(lambda o, a, r, t: gaussian_average_velocity(a, r, t), None, noise)
    close(actions, (MEAN + STD * noise).clamp(-1, 1))
    assert (actions.abs() == 1).any() and (actions.abs() < 1).any()


def test_cloning_loss_is_the_mean_over_batch_and_dimensions():
    """By hand: the network is a table of outputs, which does not move with its inputs, so the target is e - a."""
    actions = torch.tensor([[0.5, -0.5], [0.0, 1.0], [1.0, 0.0]])
    noise = torch.tensor([[1.5, 0.5], [2.0, 1.0], [1.0, -1.0]])  # v = [1, 1], [2, 0], [0, -1]
    table = torch.tensor([[1.0, 3.0], [-1.0, 0.0], [0.5, -1.0]], requires_grad=True)
    errors = torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.5, 0.0]])  # u - v
    t, r = torch.tensor([[0.3], [0.9], [0.6]]), torch.tensor([[0.1], [0.9], [0.0]])
    loss = m.mean_flow_loss(lambda o, a, r, t: table, None, actions, noise, t, r)
    assert loss.shape == () and loss.item() == pytest.approx((4 + 9 + 0.25) / 6)
    gradient = torch.autograd.grad(loss, table)[0]
    close(gradient, 2 * errors / 6, 1e-6)


def test_no_gradient_through_the_mean_flow_target():
    """The gradient of the cloning loss is that of a regression on fixed numbers."""
    policy, inputs = make_policy(), path_inputs()
    observations, actions, noise, t, r = inputs
    u, u_tgt = m.mean_flow_output_and_target(policy, *inputs)
    assert u.requires_grad and not u_tgt.requires_grad
    plain = F.mse_loss(policy(observations, (1 - t) * actions + t * noise, r, t), u_tgt)
    close(gradients(m.mean_flow_loss(policy, *inputs), policy), gradients(plain, policy))


# ---------------------------------------------------------------- one-step actions
def test_one_step_action_is_the_clipped_difference():
    policy = make_policy(scale=0.1)
    observations, noise = double(BATCH, 4, OBS), double(BATCH, 4, ACT, seed=1)
    zero, one = torch.zeros(BATCH, 4, 1, dtype=torch.float64), torch.ones(BATCH, 4, 1, dtype=torch.float64)
    raw = noise - policy(observations, noise, zero, one)
    assert (raw > 1).any() and (raw < -1).any() and (raw.abs() < 1).any()
    close(m.one_step_action(policy, observations, noise), raw.clamp(-1, 1))
    close(m.one_step_action(policy, observations[:, 0], noise[:, 0]), raw[:, 0].clamp(-1, 1))


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 4)])
def test_times_embedded_once_equal_one_time_per_row(shape):
    policy, observations, noise = make_policy(), double(*shape, OBS), double(*shape, ACT, seed=1)
    r, t = (torch.full((1, 1), x, dtype=torch.float64) for x in (0.2, 0.7))
    close(policy(observations, noise, r, t), policy(observations, noise, r.expand(*shape, 1), t.expand(*shape, 1)))
    assert differ(policy(observations, noise, r, t), policy(observations, noise, t, r))
    seen = []
    m.one_step_action(lambda o, a, r, t: seen.extend([r, t]) or policy(o, a, r, t), observations, noise)
    assert [time.numel() for time in seen] == [1, 1] and [time.item() for time in seen] == [0.0, 1.0]


def test_saturated_actions_pass_no_gradient():
    """The policy is a table u; e = 0, so that the action is -u, clipped."""
    table = torch.tensor([[0.5, 3.0], [-1.5, -0.2]], dtype=torch.float64, requires_grad=True)
    actions = m.one_step_action(lambda o, a, r, t: table, None, torch.zeros_like(table))
    close(actions, torch.tensor([[-0.5, -1.0], [1.0, 0.2]], dtype=torch.float64))
    gradient = torch.autograd.grad(make_critic()(double(2, OBS), actions).sum(), table)[0]
    outside = table.detach().abs() > 1
    assert (gradient[outside] == 0).all() and (gradient[~outside] != 0).all()


# ---------------------------------------------------------------- networks
EXTREMES = [-1000.0, -100.0, -30.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 19.99, 20.01, 30.0, 100.0, 1000.0]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mish_and_its_gradients_equal_torchs(monkeypatch, dtype, tolerance, compiling):
    """Both forms, in reverse mode, in forward mode and, for the compiled form, twice, far out as well; torch's in
    float64 is the reference (its own second derivative is not finite far out, and is not used)."""
    x = torch.cat([torch.linspace(-25, 25, 1001, dtype=torch.float64), torch.tensor(EXTREMES, dtype=torch.float64)])
    x = x.to(dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    values, slopes = [], []
    for function, y in ((m.mish, x.clone()), (F.mish, x.double())):
        y.requires_grad_()
        values.append(function(y))
        slopes.append(torch.autograd.grad(values[-1].sum(), y)[0])
    forward = jvp(m.mish, (x,), (torch.ones_like(x),))[1]
    curvature = jvp(lambda y: torch.func.grad(lambda z: m.mish(z).sum())(y), (x,), (torch.ones_like(x),))[1]
    for ours in (values[0], slopes[0], forward, *([curvature] if compiling else [])):
        assert ours.dtype == dtype and ours.isfinite().all()
    close(values[0].double(), values[1], tolerance)
    close(slopes[0].double(), slopes[1], tolerance)
    close(forward.double(), slopes[1], tolerance)


@pytest.mark.parametrize("obs_dim, act_dim", [(11, 3), (17, 6), (29, 8)])
def test_parameter_counts(obs_dim, act_dim):
    """Sizes that follow from the paper's description: three layers of 256 and two time embeddings of 64."""
    count = lambda network: sum(parameter.numel() for parameter in network.parameters())
    assert count(m.Policy(obs_dim, act_dim, 256, 3)) == 197_760 + 256 * obs_dim + 513 * act_dim
    for form, size in (("plain", 132_097), ("layer_norm", 133_633)):
        assert count(m.TwinCritic(obs_dim, act_dim, 256, 3, form)) == 2 * (size + 256 * (obs_dim + act_dim))


def test_sizes_on_hopper_with_the_default_flags():
    agent = m.Agent(11, 3, m.Args(), torch.device("cpu"))
    for policy in (agent.policy, agent.ema_policy):
        assert sum(parameter.numel() for parameter in policy.parameters()) == 202_115
    for critic in (agent.critic, agent.target_critic):
        assert sum(parameter.numel() for parameter in critic.parameters()) == 2 * (133_633 + 256 * 14)


def reference_policy(policy, observations, a, r, t):
    """The network written out: 64 features of each time, its own two layers, and three kinds of input in a row."""
    def embed(layers, time):
        angles = [time * 10_000 ** (-i / 32) for i in range(32)]
        features = torch.cat([torch.cos(x) for x in angles] + [torch.sin(x) for x in angles], 1)
        return layers[1](F.mish(layers[0](features)))

    x = torch.cat([a, embed(policy.embed_t, t), embed(policy.embed_r, r), observations], 1)
    for layer in policy.hidden:
        x = F.mish(layer(x))
    return policy.final(x)


@pytest.mark.parametrize("depth", [1, 3])
def test_policy_is_the_network_of_the_paper(depth):
    policy, (observations, _, noise, t, r) = make_policy(depth=depth), path_inputs()
    assert [tuple(layer.weight.shape) for layer in policy.embed_r] == [(128, 64), (64, 128)]
    assert [layer.out_features for layer in policy.hidden] == [32] * depth
    close(policy(observations, noise, r, t), reference_policy(policy, observations, noise, r, t), 1e-6)
    assert differ(policy(observations, noise, r, t), policy(observations, noise, t, r)), "r and t are not one time"


def separate_critics(critic, form):
    """Two stacks of torch's own layers that hold the same numbers."""
    stacks = []
    for k in range(2):
        layers = []
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
            linear = nn.Linear(*weight.shape[1:]).double()
            linear.load_state_dict(dict(weight=weight[k].T, bias=bias[k, 0]))
            layers.append(linear)
            if i == len(critic.weights) - 1:
                break
            if form == "layer_norm":
                norm = nn.LayerNorm(weight.shape[2]).double()
                norm.load_state_dict(dict(weight=critic.norm_gains[i][k, 0], bias=critic.norm_biases[i][k, 0]))
                layers.append(norm)
            layers.append(nn.Tanh() if form == "layer_norm" and i == 0 else nn.Mish())
        stacks.append(nn.Sequential(*layers))
    return stacks


@pytest.mark.parametrize("form, depth", list(itertools.product(["plain", "layer_norm"], [1, 3])))
def test_twin_critic_is_two_separate_networks(form, depth):
    """Linear and Mish in the plain form; Linear, LayerNorm and Mish, the first time Tanh, in the other."""
    critic, observations, actions = make_critic(form=form, depth=depth), double(BATCH, 4, OBS), double(BATCH, 4, ACT)
    assert len(critic.weights) == depth + 1 and len(critic.norm_gains) == (depth if form == "layer_norm" else 0)
    values = critic(observations, actions)
    assert values.shape == (2, BATCH, 4)
    for k, network in enumerate(separate_critics(critic, form)):
        close(values[k], network(torch.cat([observations, actions], -1)).squeeze(-1))
    close(critic(observations[:, 0], actions[:, 0]), values[:, :, 0])


@pytest.mark.parametrize("form", ["plain", "layer_norm"])
def test_twin_critic_at_initialisation(form):
    """Every weight and bias uniform within 1 / sqrt(inputs) as in nn.Linear; gains 1; and two different critics."""
    torch.manual_seed(0)
    critic = m.TwinCritic(11, 3, 256, 3, form)
    for weight, bias in zip(critic.weights, critic.biases):
        limit = weight.shape[1] ** -0.5
        for x in (*weight, *bias):
            assert x.abs().max() <= limit
            if x.numel() > 1:
                assert x.abs().max() > 0.97 * limit
                assert x.std().item() == pytest.approx(limit / 3**0.5, rel=5 / x.numel() ** 0.5)
        assert (weight[0] != weight[1]).any() and (bias[0] != bias[1]).any()
    assert all((gain == 1).all() for gain in critic.norm_gains)
    assert all((bias == 0).all() for bias in critic.norm_biases)


# ---------------------------------------------------------------- the critic's loss
HAND = dict(observations=torch.zeros(3, 1), next_observations=torch.zeros(3, 1), actions=torch.zeros(3, 1),
            rewards=torch.tensor([1.0, 2.0, 3.0]), masks=torch.tensor([1.0, 0.0, 1.0]))
HAND_Q = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


def hand_critic_loss(q_next, **flags):
    """The loss of HAND_Q on HAND where the target critics give q_next, (2, 3, M)."""
    q_next = torch.tensor(q_next)
    return m.critic_loss(lambda o, a, r, t: a, lambda o, a: HAND_Q, lambda o, a: q_next, HAND,
                         torch.zeros(3, q_next.shape[2], 1), m.Args(**flags)).item()


def squares(y):
    """Mean over the batch for each critic, then the sum over the two."""
    return sum(sum((q - target) ** 2 for q, target in zip(row, y)) / len(y) for row in HAND_Q.tolist())


def test_critic_loss_by_hand():
    """The smaller critic row by row; a terminated transition (mask 0) does not look ahead."""
    q_next = [[[10.0], [20.0], [40.0]], [[30.0], [5.0], [30.0]]]
    assert hand_critic_loss(q_next, gamma=0.9) == pytest.approx(squares([1 + 9, 2, 3 + 27]))
    assert hand_critic_loss(q_next, gamma=0.5) == pytest.approx(squares([1 + 5, 2, 3 + 15]))
    assert hand_critic_loss(q_next) == pytest.approx(squares([1 + 9.9, 2, 3 + 29.7]))


def test_max_q_backup_takes_each_critics_best_action_before_the_smaller_critic():
    """Row 1: best values 5 and 3 of different actions, so 3; the best of the smaller values would be 0."""
    q_next = [[[5.0, 0.0], [1.0, 1.0], [-2.0, -8.0]], [[0.0, 3.0], [1.0, 1.0], [-4.0, -1.0]]]
    loss = hand_critic_loss(q_next, max_q_backup=True, gamma=1.0)
    assert loss == pytest.approx(squares([1 + 3, 2, 3 - 2]))
    assert loss != pytest.approx(squares([1 + 0, 2, 3 - 4]))


@pytest.mark.parametrize("candidates", [1, 10])
def test_bellman_target_with_networks(candidates):
    """Row by row and action by action: one-step actions at s', clipped, as the target critics see them."""
    policy, critic, target, batch = make_policy(scale=0.1), make_critic(), make_critic(seed=1), transitions()
    noise, y, best = double(BATCH, candidates, ACT, seed=9), [], set()
    for i in range(BATCH):
        s, zero, one = batch["next_observations"][i : i + 1], noise.new_zeros(1, 1), noise.new_ones(1, 1)
        q = torch.stack([target(s, (e - policy(s, e, zero, one)).clamp(-1, 1)) for e in noise[i].unsqueeze(1)], 2)
        y.append(batch["rewards"][i] + 0.9 * batch["masks"][i] * min(q[0].max(), q[1].max()))
        best.add((q[0].argmax().item(), q[1].argmax().item()))
    assert candidates == 1 or len(best) > 5 and any(j != k for j, k in best), "the choice of the action matters"
    q1, q2 = critic(batch["observations"], batch["actions"])
    y = torch.stack(y).detach()
    loss = m.critic_loss(policy, critic, target, batch, noise, m.Args(gamma=0.9))
    close(loss, F.mse_loss(q1, y) + F.mse_loss(q2, y))


def test_no_gradient_through_the_bellman_target():
    """Even with one critic in both roles, the gradient is that of a regression to fixed numbers."""
    policy, critic, batch, noise = make_policy(), make_critic(), transitions(), double(BATCH, 1, ACT, seed=9)
    next_actions = m.one_step_action(policy, batch["next_observations"], noise[:, 0])
    y = batch["rewards"] + 0.9 * batch["masks"] * critic(batch["next_observations"], next_actions).amin(0)
    q1, q2 = critic(batch["observations"], batch["actions"])
    expected = gradients(F.mse_loss(q1, y.detach()) + F.mse_loss(q2, y.detach()), critic)
    loss = m.critic_loss(policy, critic, critic, batch, noise, m.Args(gamma=0.9))
    close(gradients(loss, critic), expected)
    target = make_critic(seed=1)
    m.critic_loss(policy, critic, target, batch, noise, m.Args()).backward()
    assert all(parameter.grad is None for parameter in (*policy.parameters(), *target.parameters()))
    assert all(parameter.grad is not None for parameter in critic.parameters())


# ---------------------------------------------------------------- the actor's loss
@pytest.mark.parametrize("swap", [False, True])
def test_actor_loss_written_out(swap):
    """Swap says which critic is i and which is j; the noise of the Q term is its own, and its actions are clipped."""
    policy, critic, batch, draws = make_policy(scale=0.1), make_critic(), transitions(), actor_draws(swap)
    observations, one = batch["observations"], torch.ones(BATCH, 1, dtype=torch.float64)
    actions = (draws[2] - policy(observations, draws[2], 0 * one, one)).clamp(-1, 1)
    assert (actions.abs() == 1).any() and (actions.abs() < 1).any()
    q = critic(observations, actions).detach()
    i, j = (1, 0) if swap else (0, 1)
    l_q = -q[i].mean() / q[j].abs().mean()
    assert differ(l_q, -q[j].mean() / q[i].abs().mean())
    assert (q[j] > 0).any() and (q[j] < 0).any(), "where all signs are equal, |mean| and mean || are the same"
    l_fbc = m.mean_flow_loss(policy, observations, batch["actions"], draws[0], *draws[1])
    loss, parts = m.actor_loss(policy, critic, batch, draws, m.Args(eta=0.7))
    close(loss, l_fbc + 0.7 * l_q)
    close([parts[key] for key in ("mean_flow", "q", "q_mean")], [l_fbc.detach(), l_q, q.mean()])
    assert not any(value.requires_grad for value in parts.values())


def test_swap_is_an_exchange_of_the_critics():
    """Loss and gradient with swap are those of the same pair in the other order."""
    policy, critic, batch = make_policy(), make_critic(), transitions()
    exchanged = copy.deepcopy(critic)
    with torch.no_grad():
        for parameter in exchanged.parameters():
            parameter.copy_(parameter.flip(0))
    args = m.Args(eta=1.0)
    a, b, c = (m.actor_loss(policy, network, batch, actor_draws(swap), args)[0]
               for network, swap in ((critic, True), (exchanged, False), (critic, False)))
    close(a, b)
    close(gradients(a, policy), gradients(b, policy))
    assert differ(a, c)


def test_actor_loss_does_not_feel_the_scale_of_both_critics():
    """Loss and gradient stay as they are with both values times 1000, but not with one of the two."""
    policy, critic, batch, draws, args = make_policy(), make_critic(), transitions(), actor_draws(), m.Args(eta=1.0)
    both, one = copy.deepcopy(critic), copy.deepcopy(critic)
    with torch.no_grad():
        for x, y in ((both.weights[-1], one.weights[-1]), (both.biases[-1], one.biases[-1])):
            x.mul_(1000)
            y[0].mul_(1000)
    loss, scaled, lopsided = (m.actor_loss(policy, network, batch, draws, args)[0] for network in (critic, both, one))
    close(scaled, loss)
    close(gradients(scaled, policy), gradients(loss, policy))
    assert differ(lopsided, loss, 0.1)


def test_the_divisor_of_the_q_term_is_a_constant():
    """Even where both critics are equal: the gradient is that of -mean Q divided by a number."""
    policy, critic, batch, draws = make_policy(), make_critic(), transitions(), actor_draws()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter[1] = parameter[0]
    q = critic(batch["observations"], m.one_step_action(policy, batch["observations"], draws[2]))[0]
    l_fbc = m.mean_flow_loss(policy, batch["observations"], batch["actions"], draws[0], *draws[1])
    expected = l_fbc - 0.7 * q.mean() / q.abs().mean().item()
    loss = m.actor_loss(policy, critic, batch, draws, m.Args(eta=0.7))[0]
    close(gradients(loss, policy), gradients(expected, policy))


def test_eta_weighs_the_q_term():
    """Eta 0 leaves cloning alone, and the rest of loss and gradient is proportional to eta."""
    policy, critic, batch, draws = make_policy(), make_critic(), transitions(), actor_draws()
    losses = {eta: m.actor_loss(policy, critic, batch, draws, m.Args(eta=eta))[0] for eta in (0.0, 0.1, 0.3)}
    cloning = m.mean_flow_loss(policy, batch["observations"], batch["actions"], draws[0], *draws[1])
    slopes = {eta: gradients(loss, policy) for eta, loss in losses.items()}
    close(losses[0.0], cloning)
    close(slopes[0.0], gradients(cloning, policy))
    close(losses[0.3] - cloning, 3 * (losses[0.1] - cloning))
    for none, some, more in zip(slopes[0.0], slopes[0.1], slopes[0.3]):
        close(more - none, 3 * (some - none))
    assert any(differ(none, more) for none, more in zip(slopes[0.0], slopes[0.3]))


def test_the_actor_loss_raises_q_and_moves_nothing_but_the_policy():
    policy, critic, batch, draws = make_policy(), make_critic(), transitions(), actor_draws()
    loss = m.actor_loss(policy, critic, batch, draws, m.Args(eta=0.3))[0]
    loss.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())
    q = lambda: critic(batch["observations"], m.one_step_action(policy, batch["observations"], draws[2]))[0].mean()
    before, greedy = q().item(), m.actor_loss(policy, critic, batch, draws, m.Args(eta=1e6))[0]
    with torch.no_grad():
        for parameter, gradient in zip(policy.parameters(), gradients(greedy, policy)):
            parameter -= 1e-9 * gradient
    assert q().item() > before


# ---------------------------------------------------------------- one gradient step
SMALL = dict(policy_width=16, policy_depth=1, critic_width=16, critic_depth=2, offline_steps=100)


def make_agent(**flags):
    torch.manual_seed(0)
    agent = m.Agent(OBS, ACT, m.Args(**{**SMALL, **flags}), torch.device("cpu"))
    torch.manual_seed(1)
    return agent


def float_batch(reward_scale=1.0):
    batch = {key: value.float() for key, value in transitions().items()}
    return dict(batch, rewards=reward_scale * batch["rewards"])


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(tensors, module):
    return all(torch.equal(x, y) for x, y in zip(tensors, module.parameters()))


def recording(agent):
    """Lists that fill with the inputs of the two losses."""
    critic, actor = [], []
    agent.critic_loss = lambda *inputs: critic.append(inputs) or m.critic_loss(*inputs)
    agent.actor_loss = lambda *inputs: actor.append(inputs) or m.actor_loss(*inputs)
    return critic, actor


def learning_rates(agent):
    return [float(optimizer.param_groups[0]["lr"]) for optimizer in (agent.actor_optimizer, agent.critic_optimizer)]


def test_target_and_average_begin_as_copies():
    agent = make_agent()
    assert same(copies(agent.critic), agent.target_critic) and same(copies(agent.policy), agent.ema_policy)
    for frozen in (agent.target_critic, agent.ema_policy):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for network, frozen in ((agent.critic, agent.target_critic), (agent.policy, agent.ema_policy)):
        assert not {x.data_ptr() for x in network.parameters()} & {x.data_ptr() for x in frozen.parameters()}


def test_reversed_polyak_target_moves_every_fifth_step():
    """CleanDiffuser's form: after five steps .995 of the critic as it then is and .005 of the old target."""
    agent = make_agent(tau=0.995, target_interval=5)
    old = copies(agent.target_critic)
    for turn in range(2):
        for _ in range(4):
            agent.update(float_batch())
            assert same(old, agent.target_critic), turn
        agent.update(float_batch())
        for ours, online, before in zip(agent.target_critic.parameters(), agent.critic.parameters(), old):
            close(ours, 0.995 * online + 0.005 * before, 1e-6)
            assert (ours - before).abs().max() > 1e-4
        old = copies(agent.target_critic)


def test_target_moves_every_step_with_interval_one():
    agent = make_agent(tau=0.1)
    for _ in range(3):
        old = copies(agent.target_critic)
        agent.update(float_batch())
        for ours, online, before in zip(agent.target_critic.parameters(), agent.critic.parameters(), old):
            close(ours, 0.1 * online + 0.9 * before, 1e-6)
            assert (ours != before).any()


def test_nothing_but_polyak_averaging_moves_target_and_average():
    agent = make_agent(tau=0.0, ema_rate=0.0, ema_start=0, target_policy="ema")
    target, ema = copies(agent.target_critic), copies(agent.ema_policy)
    for _ in range(5):
        agent.update(float_batch())
    assert same(target, agent.target_critic) and same(ema, agent.ema_policy)


@pytest.mark.parametrize("start, first", [(10, 10), (7, 10), (0, 5), (11, 15)])
def test_moving_average_of_the_policy(start, first):
    """Still before --ema-start, then --ema-rate of the way every fifth step."""
    agent = make_agent(ema_start=start, ema_rate=0.3, learning_rate=0.01)
    old = copies(agent.ema_policy)
    for step in range(1, 22):
        agent.update(float_batch())
        if step % 5 == 0 and step >= first:
            for ours, online, before in zip(agent.ema_policy.parameters(), agent.policy.parameters(), old):
                close(ours, 0.3 * online + 0.7 * before, 1e-6)
                assert (ours != before).any()
            old = copies(agent.ema_policy)
        else:
            assert same(old, agent.ema_policy), step


@pytest.mark.parametrize("schedule, shape", [
    ("cosine", {0: 1.0, 25: (2 + 2**0.5) / 4, 50: 0.5, 75: (2 - 2**0.5) / 4, 99: 2.467e-4, 100: 0.0, 150: 0.0}),
    ("constant", {0: 1.0, 25: 1.0, 50: 1.0, 99: 1.0, 100: 1.0}),
])
def test_learning_rate(schedule, shape):
    """Of a run of 100 steps: the full rate at step 0, and with cosine next to nothing at the last step, 99."""
    agent = make_agent(learning_rate_schedule=schedule, learning_rate=0.002)
    for step, factor in shape.items():
        agent.updates.fill_(step)
        agent.update(float_batch())
        assert learning_rates(agent) == pytest.approx([0.002 * factor] * 2, rel=1e-3, abs=1e-12), step
        assert agent.charts()["charts/learning_rate"] == pytest.approx(0.002 * factor, rel=1e-3, abs=1e-12)


def test_the_learning_rate_is_what_the_parameters_feel():
    """Adam's first step is the rate times the gradient's sign, in both networks, and 0 at the end of a cosine."""
    agent = make_agent(learning_rate=0.002, learning_rate_schedule="cosine")
    before = copies(agent.policy), copies(agent.critic)
    agent.update(float_batch())
    for old, network in zip(before, (agent.policy, agent.critic)):
        for was, parameter in zip(old, network.parameters()):
            assert (parameter - was).abs().max().item() == pytest.approx(0.002, rel=0.01)
    agent.updates.fill_(100)
    before = copies(agent.policy), copies(agent.critic)
    agent.update(float_batch())
    assert same(before[0], agent.policy) and same(before[1], agent.critic)


def test_weight_decay_pulls_the_policy_alone():
    """Decoupled: beside Adam's step the parameters shrink by rate x decay; the critic does not."""
    agents = [make_agent(weight_decay=decay, learning_rate=0.01) for decay in (0.0, 0.5)]
    start = copies(agents[0].policy)
    for agent in agents:
        torch.manual_seed(2)
        agent.update(float_batch())
    for was, plain, decayed in zip(start, agents[0].policy.parameters(), agents[1].policy.parameters()):
        close(decayed - plain, -0.01 * 0.5 * was, 1e-6)
        assert differ(decayed, plain, 1e-4)
    assert same(copies(agents[0].critic), agents[1].critic)


@pytest.mark.parametrize("limit", [None, 0.01, 3.0])
def test_gradients_are_clipped_per_network(limit):
    """A huge gradient of the critic is cut to the limit and leaves the policy's alone; old gradients are forgotten."""
    agent = make_agent(max_grad_norm=limit, learning_rate=0.0)
    critic_inputs, actor_inputs = recording(agent)
    for parameter in (*agent.policy.parameters(), *agent.critic.parameters()):
        parameter.grad = torch.full_like(parameter, 1e6)
    agent.update(float_batch(reward_scale=100))
    raw_critic = gradients(m.critic_loss(*critic_inputs[0]), agent.critic)
    raw_policy = gradients(m.actor_loss(*actor_inputs[0])[0], agent.policy)
    norm = lambda tensors: torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
    assert norm(raw_critic) > 10 and 0.1 < norm(raw_policy) < 3, "the case that this test is about"
    for network, raw in ((agent.policy, raw_policy), (agent.critic, raw_critic)):
        factor = 1.0 if limit is None else min(limit / norm(raw), 1.0)
        close([parameter.grad for parameter in network.parameters()], [factor * gradient for gradient in raw], 1e-4)


@pytest.mark.parametrize("target_policy", ["ema", "online"])
def test_target_policy_says_who_proposes_the_next_action(target_policy):
    agent = make_agent(target_policy=target_policy, learning_rate=0.0, tau=0.0)
    perturb(agent.ema_policy, 1.0), perturb(agent.target_critic)
    critic_inputs, _ = recording(agent)
    loss = agent.update(float_batch())["critic"]
    losses = {name: m.critic_loss(policy, agent.critic, agent.target_critic, float_batch(), critic_inputs[0][4],
                                  agent.args).detach()
              for name, policy in (("ema", agent.ema_policy), ("online", agent.policy))}
    close(loss, losses[target_policy], 1e-6)
    assert differ(losses["ema"], losses["online"])


def test_target_critic_gives_the_bellman_target_and_the_new_critic_the_q_term():
    """The critic steps first: the actor's Q term is of the online critic after its step, y of the target critic."""
    agent = make_agent(learning_rate=0.1)
    perturb(agent.target_critic)
    policy, critic, target = (copy.deepcopy(x) for x in (agent.policy, agent.critic, agent.target_critic))
    critic_inputs, actor_inputs = recording(agent)
    losses = agent.update(float_batch())
    close(losses["critic"],
          m.critic_loss(policy, critic, target, float_batch(), critic_inputs[0][4], agent.args).detach(), 1e-6)
    q = {name: m.actor_loss(policy, network, float_batch(), actor_inputs[0][3], agent.args)[1]["q_mean"]
         for name, network in (("new", agent.critic), ("old", critic), ("target", agent.target_critic))}
    close(losses["q_mean"], q["new"], 1e-6)
    assert differ(q["new"], q["old"]) and differ(q["new"], q["target"])


@pytest.mark.parametrize("flags, candidates", [(dict(), 1), (dict(max_q_backup=True), 10)])
def test_draws_of_an_update(flags, candidates):
    """Fresh normal noise for each purpose and step, times as flagged, and one next action or ten."""
    agent, rows = make_agent(flow_ratio=0.25, **flags), 2000
    critic_inputs, actor_inputs = recording(agent)
    for _ in range(2):
        agent.update({key: value.float() for key, value in transitions(rows).items()})
    noises = []
    for i in range(2):
        next_noise, (noise, (t, r), actor_noise, swap) = critic_inputs[i][4], actor_inputs[i][3]
        assert next_noise.shape == (rows, candidates, ACT) and noise.shape == actor_noise.shape == (rows, ACT)
        assert t.shape == r.shape == (rows, 1) and (t == r).sum() == rows // 4
        assert swap.shape == () and swap.dtype == torch.bool
        noises += [*next_noise.unbind(1), noise, actor_noise]
    for noise in noises:
        assert_mean(noise, 0.0)
        assert_mean(noise**2, 1.0)
    for one, two in itertools.combinations(noises, 2):
        assert_mean(one * two, 0.0)


def test_the_critics_of_the_q_term_change_roles_by_a_fair_coin():
    agent, swaps, zero = make_agent(), [], torch.zeros((), requires_grad=True)
    agent.critic_loss = lambda *inputs: zero * 1
    agent.actor_loss = lambda policy, critic, batch, draws, args: swaps.append(draws[3]) or (zero * 1, {})
    for _ in range(400):
        agent.update(float_batch())
    swaps = torch.stack(swaps)
    assert_mean(swaps, 0.5)
    assert_mean(swaps[1:] == swaps[:-1], 0.5)


def test_training_state_continues_the_run_exactly():
    """Optimisers and learning rate too: a second agent with the first one's state makes the same next steps."""
    flags = dict(learning_rate_schedule="cosine", weight_decay=0.1)
    agent, other = make_agent(**flags), make_agent(**flags)
    for _ in range(3):
        agent.update(float_batch())
    other.load_state_dict(agent.state_dict())
    for name in ("actor_optimizer", "critic_optimizer"):
        getattr(other, name).load_state_dict(copy.deepcopy(getattr(agent, name).state_dict()))
    for x in (agent, other):
        x.updates.fill_(50)  # so that a rate that stays what it was would be seen
        torch.manual_seed(3)
        for _ in range(2):
            x.update(float_batch())
    assert same(copies(agent), other) and learning_rates(agent) == learning_rates(other)
    assert learning_rates(other) == pytest.approx([3e-4 * 0.5 * (1 + math.cos(math.pi * 0.51))] * 2)


# ---------------------------------------------------------------- acting
def acting_agent(**flags):
    """An agent whose four networks are all different, and whose actions fill the box."""
    agent = make_agent(**flags)
    for i, network in enumerate((agent.policy, agent.ema_policy, agent.critic, agent.target_critic)):
        perturb(network, 0.2 if i < 2 else 0.5, seed=i)
    return agent


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def one_candidate(policy, observations, noise):
    """clip(e - u(e, 0, 1)) for rows of noise, with one time per row."""
    one = torch.ones(len(noise), 1)
    return (noise - policy(observations, noise, 0 * one, one)).clamp(-1, 1).detach()


@pytest.mark.parametrize("acting_policy, temperature", [("ema", 0.5), ("ema", 1.0), ("online", 1.0)])
def test_act_with_one_candidate(acting_policy, temperature):
    """The flagged policy's one-step action from scaled noise at the normalised state; no critic is asked."""
    agent = acting_agent(acting_policy=acting_policy, noise_temperature=temperature)
    agent.target_critic = agent.critic = None
    agent.obs_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    agent.obs_std.copy_(torch.tensor([1.0, 0.5, 2.0]))
    raw, before = torch.randn(64, OBS), torch.get_rng_state()
    actions = agent.act(raw, 1, generator())
    assert (torch.get_rng_state() == before).all()
    noise = temperature * torch.randn(64, ACT, generator=generator())
    normalised = (raw - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([1.0, 0.5, 2.0])
    by_policy = {name: one_candidate(policy, normalised, noise)
                 for name, policy in (("ema", agent.ema_policy), ("online", agent.policy))}
    close(actions, by_policy[acting_policy], 1e-5)
    assert differ(by_policy["ema"], by_policy["online"], 0.1)
    assert not actions.requires_grad


def candidates_and_values(agent, observations, number, seed=5):
    """Candidates (B, N, A) of `act` with that generator and the values of both target critics, (2, B, N)."""
    noise = agent.args.noise_temperature * torch.randn(len(observations), number, ACT, generator=generator(seed))
    rows = observations.repeat_interleave(number, 0)
    candidates = one_candidate(agent.ema_policy, rows, noise.flatten(0, 1))
    return candidates.view(-1, number, ACT), agent.target_critic(rows, candidates).detach().view(2, -1, number)


def chosen(actions, candidates):
    """Index of the candidate that each action is."""
    distance = (actions.unsqueeze(1) - candidates).abs().amax(2)
    assert distance.amin(1).max() < 1e-5, "an action that is none of the candidates"
    return distance.argmin(1)


def test_act_with_a_huge_inverse_temperature_takes_the_best():
    """By the smaller of the two target values; mean, larger value or the online critics would choose otherwise."""
    agent, observations = acting_agent(inverse_temperature=1e9, noise_temperature=1.0), torch.randn(64, OBS)
    candidates, q = candidates_and_values(agent, observations, 6)
    values = q.amin(0)
    top = values.topk(2, 1).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # two saturated actions have one value
    assert clear.sum() > 50
    index = chosen(agent.act(observations, 6, generator()), candidates)
    assert torch.equal(index[clear], values.argmax(1)[clear])
    online = agent.critic(observations.unsqueeze(1).expand(-1, 6, -1), candidates).amin(0)
    for other in (q.mean(0), q.amax(0), online, -values):
        assert (other.argmax(1) != index)[clear].any()


class Values(nn.Module):
    """Critics whose values are twice and five times what a function of the action says."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, observations, actions):
        value = self.function(actions)
        return torch.stack([2 * value, 5 * value])


@pytest.mark.parametrize("inverse_temperature", [0.0, 0.7, 2.0])
def test_act_draws_with_softmax_probabilities(inverse_temperature):
    """Candidates above 0 have the value 2, the others 0: the odds are exp(2 w), and even without w."""
    agent = make_agent(inverse_temperature=inverse_temperature, noise_temperature=1.0)
    agent.target_critic = Values(lambda actions: (actions[..., 0] > 0).float())
    observations = torch.zeros(20_000, OBS)
    candidates, _ = candidates_and_values(agent, observations, 3)
    index = chosen(agent.act(observations, 3, generator()), candidates)
    positive = candidates[..., 0] > 0
    weight = 1 + (math.exp(2 * inverse_temperature) - 1) * positive.double()
    probability = weight / weight.sum(1, keepdim=True)
    distinct = (candidates.abs() < 1).any(2).all(1)  # an action in a corner of the box can be two candidates
    assert distinct.double().mean() > 0.5
    for k in range(3):
        excess = (index == k).double() - probability[:, k]
        assert_mean(excess[distinct], 0.0)
        assert_mean(excess[distinct & positive[:, k]], 0.0)


def test_act_with_inverse_temperature_zero_is_uniform():
    """One state, twenty thousand times; the critics' opinion is strong and without effect."""
    agent = acting_agent(inverse_temperature=0.0, noise_temperature=0.1)
    with torch.no_grad():
        agent.target_critic.weights[-1].mul_(100)
    candidates, q = candidates_and_values(agent, torch.ones(20_000, OBS), 4)
    assert q.std() > 1
    index = chosen(agent.act(torch.ones(20_000, OBS), 4, generator()), candidates)
    counts = torch.bincount(index, minlength=4)
    assert len(counts) == 4 and (counts - 5000).abs().max() < 5 * (20_000 * 0.25 * 0.75) ** 0.5
    best = (index == q.amin(0).argmax(1)).double()
    assert_mean(best, 0.25)


@pytest.mark.parametrize("candidates", [1, 5])
def test_noise_temperature_zero_is_the_deterministic_action(candidates):
    """Whatever the generator: the action of e = 0."""
    agent, observations = acting_agent(noise_temperature=0.0), torch.randn(16, OBS)
    expected = one_candidate(agent.ema_policy, observations, torch.zeros(16, ACT))
    for seed in (0, 1):
        close(agent.act(observations, candidates, generator(seed)), expected, 1e-5)


def test_equal_generator_states_give_equal_actions():
    agent, observations = acting_agent(), torch.randn(16, OBS)
    first = generator()
    one, two = agent.act(observations, 5, first), agent.act(observations, 5, first)
    torch.manual_seed(99)
    assert torch.equal(agent.act(observations, 5, generator()), one)
    assert not torch.equal(one, two) and not torch.equal(agent.act(observations, 5, generator(6)), one)


@pytest.mark.parametrize("acting_policy, candidates", list(itertools.product(["ema", "online"], [1, 7])))
def test_actions_stay_in_the_box(acting_policy, candidates):
    agent = acting_agent(acting_policy=acting_policy, noise_temperature=3.0)
    actions = agent.act(10 * torch.randn(500, OBS), candidates, generator())
    assert actions.shape == (500, ACT) and actions.isfinite().all()
    assert actions.abs().max() == 1


def test_reward_normalization():
    """return_range and standardize, on top of the flags for scale and shift."""
    rewards, about = np.array([1.0, 2, 6, 7], dtype=np.float32), dict(best=13.0, worst=3.0)
    for how, scale, shift in (("none", 2, -1), ("return_range", 2 * 1000 / 10, -1),
                              ("standardize", 2 / rewards.std(), -1 - 2 * 4 / rewards.std())):
        args = m.Args(reward_normalization=how, reward_scale=2.0, reward_shift=-1.0)
        assert m.reward_scale_and_shift(args, rewards, about) == pytest.approx((scale, shift))
