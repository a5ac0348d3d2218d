"""MFQL's equations from first principles: networks, losses, gradients, schedules, and one gradient step."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mfql_offline as m

OBS, ACT, BATCH = 3, 2, 16


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def perturb(module, scale=0.1, seed=0):
    """Moves every parameter: the policy is zero at initialisation, where most mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def make_policy(width=32, depth=2):
    torch.manual_seed(0)
    return perturb(m.Policy(OBS, ACT, width, depth).double())


def make_critic(width=24, depth=2, seed=0):
    torch.manual_seed(seed)
    return perturb(m.TwinCritic(OBS, ACT, width, depth).double(), seed=seed)


def path_inputs(batch=BATCH):
    """(observations, actions, noise, t) of a cloning batch; t keeps away from 0 because some checks divide by it."""
    t = torch.linspace(0.05, 1, batch, dtype=torch.float64).unsqueeze(1)
    return double(batch, OBS, seed=1), double(batch, ACT, seed=2).clamp(-1, 1), double(batch, ACT, seed=3), t


def transitions(batch=BATCH):
    return dict(observations=double(batch, OBS, seed=4), actions=double(batch, ACT, seed=5).clamp(-1, 1),
                rewards=double(batch, seed=6), masks=(torch.arange(batch) % 3 > 0).double(),
                next_observations=double(batch, OBS, seed=7))


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def close(ours, expected, tolerance=1e-10):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the MeanFlow identity
def assert_target(g_tgt, expected):
    """g_tgt is what is expected, clipped to +-5, which only some of it needs."""
    assert (expected.abs() < 5).double().mean() > 0.7
    close(g_tgt, expected.clamp(-5, 5), 1e-7)


def test_jvp_equals_finite_differences():
    """dg/dt runs along the path of z_t and t together."""
    policy, (observations, actions, noise, t) = make_policy(), path_inputs()
    z_t, v, h = (1 - t) * actions + t * noise, noise - actions, 1e-5
    g, g_tgt = m.mean_flow_output_and_target(policy, observations, actions, noise, t)
    ahead = policy(observations, z_t + h * v, t + h)
    behind = policy(observations, z_t - h * v, t - h)
    difference = (ahead - behind) / (2 * h)
    assert (t * difference).abs().mean() > 0.1, "a derivative this small would prove nothing"
    close(g, policy(observations, z_t, t))
    assert_target(g_tgt, z_t + (t - 1) * v - t * difference)


def test_target_written_with_data_and_noise():
    """With z_t and v put in, g_tgt = 2 (1 - t) a + (2 t - 1) e - t dg/dt; here dg/dt comes from reverse mode."""
    policy, (observations, actions, noise, t) = make_policy(), path_inputs()
    z = ((1 - t) * actions + t * noise).requires_grad_()
    time = t.clone().requires_grad_()
    g = policy(observations, z, time)
    columns = [torch.autograd.grad(g[:, i].sum(), (z, time), retain_graph=True) for i in range(ACT)]
    dg_dt = torch.stack([((noise - actions) * dz).sum(1) + dt.squeeze(1) for dz, dt in columns], 1)
    g_tgt = m.mean_flow_output_and_target(policy, observations, actions, noise, t)[1]
    assert_target(g_tgt, 2 * (1 - t) * actions + (2 * t - 1) * noise - t * dg_dt)


def point_field(z, t):
    """Marginal velocity and average velocity u(z, 0, t) of data that are one point: all paths lead straight there."""
    point = torch.tensor([0.3, -0.6], dtype=torch.float64)
    return (z - point) / t, (z - point) / t


MEAN, STD = torch.tensor([0.4, -0.2], dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)


def gaussian_field(z, t):
    """The same for Gaussian data: z_t is Gaussian at every t, and the flow keeps the standardised position."""
    sigma_t = (((1 - t) * STD) ** 2 + t**2).sqrt()
    growth = (t - (1 - t) * STD**2) / sigma_t**2  # d log(sigma_t) / dt
    centred = z - (1 - t) * MEAN
    data = MEAN + STD / sigma_t * centred  # where the flow from (z, t) arrives at time 0
    return growth * centred - MEAN, (z - data) / t


@pytest.mark.parametrize("field", [point_field, gaussian_field])
def test_a_known_average_velocity_is_its_own_target(field):
    """The identity holds along the marginal velocity: (a, e) are chosen so that z_t = z and e - a = v(z, t)."""
    t, z = path_inputs()[3], double(BATCH, ACT, seed=8)
    v, u = field(z, t)
    inputs = None, z - t * v, z + (1 - t) * v, t
    g, g_tgt = m.mean_flow_output_and_target(lambda o, z, t: z - field(z, t)[1], *inputs)
    close(g, z - u)
    assert_target(g_tgt, g)
    if field is gaussian_field:  # the velocity at one instant in place of the average
        g, g_tgt = m.mean_flow_output_and_target(lambda o, z, t: z - field(z, t)[0], *inputs)
        assert (g.clamp(-5, 5) - g_tgt).abs().mean() > 0.05


def test_one_step_from_noise_lands_on_the_data():
    """Eq. (4) with the exact average velocity of Gaussian data is the flow map e -> mean + std e."""
    noise = double(BATCH, ACT, seed=8)
    close(m.one_step_action(lambda o, z, t: z - gaussian_field(z, t)[1], None, noise), MEAN + STD * noise)


def test_residual_form_is_the_meanflow_form_rewritten():
    """With g = z - u, output, target and action are those of MeanFlow's own form, for any network u: there the target
    is u_tgt = v - t du/dt, and the action e - u(e, 1)."""
    policy, inputs = make_policy(), path_inputs()
    observations, actions, noise, t = inputs
    z_t, v = (1 - t) * actions + t * noise, noise - actions
    u, du_dt = torch.func.jvp(lambda z, t: policy(observations, z, t), (z_t, t), (v, torch.ones_like(t)))

    def residual(o, z, t):
        return z - policy(o, z, t)

    g, g_tgt = m.mean_flow_output_and_target(residual, *inputs)
    close(g, z_t - u)
    assert_target(g_tgt, z_t - (v - t * du_dt))
    close(m.one_step_action(residual, observations, noise), noise - policy(observations, noise, torch.ones_like(t)))


def test_target_is_clipped():
    """To +-5, with a table in place of the network: it does not move with z and t, so that the target is known."""
    _, actions, noise, t = path_inputs()
    noise = 8 * noise
    free = 2 * (1 - t) * actions + (2 * t - 1) * noise
    clipped = m.mean_flow_output_and_target(lambda o, z, t: actions, None, actions, noise, t)[1]
    assert (free > 5).any() and (free < -5).any() and (free.abs() < 5).any()
    close(clipped, free.clamp(-5, 5))


# ---------------------------------------------------------------- where gradients may flow
def test_no_gradient_through_the_mean_flow_target_and_weight():
    """The gradient of L_MFI is that of w |g - const|^2 with w a constant too."""
    policy, inputs = make_policy(), path_inputs()
    g, g_tgt = m.mean_flow_output_and_target(policy, *inputs)
    assert g.requires_grad and not g_tgt.requires_grad
    observations, actions, noise, t = inputs
    d = (policy(observations, (1 - t) * actions + t * noise, t) - g_tgt).square().mean(1)
    expected = gradients(((d.detach() + 1e-4) ** -0.2 * d).mean(), policy)
    close(gradients(m.mean_flow_loss(policy, *inputs), policy), expected)


def test_no_gradient_through_the_bellman_target():
    """Even with one critic in both roles, the gradient is that of a regression to fixed numbers."""
    policy, critic, batch = make_policy(), make_critic(), transitions()
    args, noise = m.Args(gamma=0.9), double(BATCH, 4, ACT, seed=9)
    q_next = m.best_of_n(policy, critic, batch["next_observations"], noise, args)[1].detach()
    y = batch["rewards"] + 0.9 * batch["masks"] * q_next
    expected = gradients(((critic(batch["observations"], batch["actions"]) - y) ** 2).mean(), critic)
    loss = m.critic_loss(policy, critic, critic, batch, noise, args)
    close(gradients(loss, critic), expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_no_gradient_of_the_actor_loss_in_the_critic():
    policy, critic = make_policy(), make_critic()
    l_q, l_bound, q = m.actor_loss(policy, critic, double(BATCH, OBS), double(BATCH, ACT, seed=1), m.Args())
    (l_q + l_bound).backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())
    assert not q.requires_grad


def test_one_backward_pass_gives_each_network_its_own_loss():
    """Eq. (6) + Eq. (7) in one sum: the critic sees only L_critic, the policy only L_actor with its two weights."""
    policy, critic, target, batch = make_policy(), make_critic(), make_critic(seed=1), transitions()
    args, alpha = m.Args(bound_weight=0.7), torch.tensor(3.0)
    inputs = path_inputs()
    draws = inputs[2], inputs[3], 3 * double(BATCH, ACT, seed=10), double(BATCH, 5, ACT, seed=11)
    total, parts = m.losses(policy, critic, target, batch, draws, alpha, args)
    l_q, l_bound, _ = m.actor_loss(policy, critic, batch["observations"], draws[2], args)
    l_mfi = m.mean_flow_loss(policy, batch["observations"], batch["actions"], draws[0], draws[1])
    l_critic = m.critic_loss(policy, critic, target, batch, draws[3], args)
    assert l_bound > 0
    close(gradients(total, policy), gradients(l_q + 0.7 * l_bound + 3.0 * l_mfi, policy))
    close(gradients(total, critic), gradients(l_critic, critic))
    total.backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    close(torch.stack([parts[key] for key in ("critic", "q", "bound", "mean_flow")]),
          torch.stack([l_critic, l_q, l_bound, l_mfi]).detach())
    assert not any(value.requires_grad for value in parts.values())


# ---------------------------------------------------------------- adaptive weight
def test_adaptive_weight():
    """By a network that is a table of outputs; its rows' errors span six orders of magnitude."""
    _, actions, noise, t = path_inputs()
    g_tgt = 2 * (1 - t) * actions + (2 * t - 1) * noise  # a table does not move with z and t
    assert g_tgt.abs().max() < 5
    error = double(BATCH, ACT, seed=12) * torch.logspace(-3, 0, BATCH, dtype=torch.float64).unsqueeze(1)
    table = (g_tgt + error).requires_grad_()
    loss = m.mean_flow_loss(lambda o, z, t: table, None, actions, noise, t)
    d = error.square().mean(1, keepdim=True)
    close(loss, (d / (d + 1e-4) ** 0.2).mean())
    close(torch.autograd.grad(loss, table)[0], 2 * error / ACT / (d + 1e-4) ** 0.2 / BATCH)


# ---------------------------------------------------------------- networks
def test_policy_is_zero_everywhere_at_initialisation():
    torch.manual_seed(0)
    policy = m.Policy(OBS, ACT, 32, 3)
    observations, z, t = 10 * torch.randn(64, OBS), 10 * torch.randn(64, ACT), torch.rand(64, 1)
    assert (policy(observations, z, t) == 0).all()
    moved = perturb(m.Policy(OBS, ACT, 32, 3))
    assert (moved(observations, z, t) != 0).all()


def test_policy_parameters_at_initialisation():
    """Truncated normal with realised std sqrt(0.01 / fan_in); zero weights in the modulations and the output."""
    torch.manual_seed(0)
    policy = m.Policy(29, 8, 256, 3)
    for name, layer in policy.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        assert (layer.bias == 0).all(), name
        if name == "final" or name.endswith("modulation"):
            assert (layer.weight == 0).all(), name
            continue
        std = (0.01 / layer.in_features) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05), name
        assert layer.weight.abs().max().item() == pytest.approx(2 * std / 0.87962566, rel=0.01), name
    assert policy.position.std().item() == pytest.approx(0.005, rel=0.2)
    assert all((norm.gain == 1).all() for norm in policy.modules() if isinstance(norm, m.RMSNorm))


@pytest.mark.parametrize("obs_dim, act_dim", [(29, 8), (11, 3), (69, 21)])
def test_parameter_counts(obs_dim, act_dim):
    """The authors' sizes; theirs minus the 395,520 parameters of q and k, which one token cannot feel."""
    policy = m.Policy(obs_dim, act_dim, 256, 3)
    count = sum(parameter.numel() for parameter in policy.parameters())
    assert count == 3_816_704 - 395_520 + 256 * obs_dim + 513 * act_dim
    if (obs_dim, act_dim) == (29, 8):
        assert sum(parameter.numel() for parameter in m.TwinCritic(29, 8, 512, 4).parameters()) == 1_624_066


@pytest.mark.parametrize("dim", [32, 256])
def test_rms_norm_output_has_rms_sqrt_dim(dim):
    x = torch.randn(100, dim) * torch.logspace(0, 2, 100).unsqueeze(1)
    rms = m.RMSNorm(dim)(x).square().mean(1).sqrt()
    close(rms, torch.full((100,), dim**0.5), 1e-4)


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    close(m.gelu(x), F.gelu(x, approximate="tanh"), 1e-12)


def reference_policy(policy, observations, z, t, heads=2):
    """The authors' network written out, with softmax attention: random q and k, the policy's v."""
    def rms(x, norm):
        dim = x.shape[-1]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * dim**0.5 * norm.gain

    def attention(x, block):
        rows, width = x.shape
        q, k = (F.linear(x, double(width, width, seed=s), double(width, seed=s)) for s in (20, 21))
        q, k, v = (y.view(rows, 1, heads, width // heads).transpose(1, 2) for y in (q, k, block.value(x)))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        return block.attention_out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, width))

    frequencies = [math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    angles = torch.cat([t * f for f in frequencies], 1)
    c = policy.time_out(F.silu(policy.time_in(torch.cat([angles.cos(), angles.sin()], 1))))
    x = policy.embed(torch.cat([observations, z], 1)) + policy.position
    for block in policy.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(c)).split(x.shape[1], 1)
        y = x + gate1 * attention(rms(x, block.norm1) * (1 + scale1) + shift1, block)
        hidden = F.gelu(block.mlp_in(rms(y, block.norm2) * (1 + scale2) + shift2), approximate="tanh")
        x = x + 0.1 * (y + gate2 * block.mlp_out(hidden) - x)
    shift, scale = policy.final_modulation(F.silu(c)).split(x.shape[1], 1)
    return policy.final(rms(x, policy.final_norm) * (1 + scale) + shift)


def test_policy_is_the_authors_network_with_softmax_attention():
    """Over one token the softmax is 1, so attention is two linear maps and q and k change nothing."""
    policy, (observations, _, noise, t) = make_policy(), path_inputs()
    close(policy(observations, noise, t), reference_policy(policy, observations, noise, t), 1e-6)


def test_shared_time_equals_one_time_per_row():
    policy, noise = make_policy(), double(BATCH, 4, ACT)
    observations = double(BATCH, 1, OBS).expand(-1, 4, -1)
    one = noise.new_ones(1, 1)
    close(policy(observations, noise, one), policy(observations, noise, one.expand(BATCH, 4, 1)))
    close(policy(observations[:, 0], noise[:, 0], one), policy(observations[:, 0], noise[:, 0], one.expand(BATCH, 1)))


def test_twin_critic_is_two_separate_networks():
    critic, observations, actions = make_critic(), double(BATCH, 4, OBS), double(BATCH, 4, ACT, seed=1)
    for k in range(2):
        x = torch.cat([observations, actions], -1)
        for i in range(2):
            x = F.gelu(F.linear(x, critic.weights[i][k].T, critic.biases[i][k, 0]), approximate="tanh")
            x = F.layer_norm(x, (24,), critic.norm_gains[i][k, 0], critic.norm_biases[i][k, 0], eps=1e-6)
        q = F.linear(x, critic.weights[2][k].T, critic.biases[2][k, 0]).squeeze(-1)
        close(critic(observations, actions)[k], q)
    close(critic(observations[:, 0], actions[:, 0]), critic(observations, actions)[:, :, 0])


def test_twin_critic_at_initialisation():
    """Xavier-uniform per network, not over the pair; zero biases, and two different critics."""
    torch.manual_seed(0)
    critic = m.TwinCritic(29, 8, 512, 4)
    for weight in critic.weights:
        _, fan_in, fan_out = weight.shape
        limit = (6 / (fan_in + fan_out)) ** 0.5
        for w in weight:
            assert 0.98 * limit < w.abs().max() <= limit
        assert (weight[0] != weight[1]).any()
    assert all((bias == 0).all() for bias in [*critic.biases, *critic.norm_biases])
    assert all((gain == 1).all() for gain in critic.norm_gains)


# ---------------------------------------------------------------- best of N and the losses with Q
@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("batch, candidates", [(BATCH, 5), (BATCH, 2), (1, 5), (2, 1), (1, 2), (1, 1)])
def test_best_of_n_picks_the_best_row_by_row(aggregation, batch, candidates):
    """One row and one candidate at a time; the authors' code goes wrong where N * B == 2."""
    policy, critic, args = perturb(make_policy(), 0.2), make_critic(), m.Args(q_aggregation=aggregation)
    observations, noise = double(batch, OBS, seed=1), double(batch, candidates, ACT, seed=2)
    actions, values = m.best_of_n(policy, critic, observations, noise, args)
    assert actions.shape == (batch, ACT) and values.shape == (batch,)
    for i in range(batch):
        options = []
        for j in range(candidates):
            t = noise.new_ones(1, 1)
            action = policy(observations[i : i + 1], noise[i : i + 1, j], t).clamp(-1, 1)
            q1, q2 = critic(observations[i : i + 1], action)
            value = (q1 + q2) / 2 if aggregation == "mean" else min(q1, q2)
            options.append(((q1 + q2).item(), value.item(), action))
        _, value, action = max(options, key=lambda option: option[0])
        close(values[i].item(), value)
        close(actions[i : i + 1], action)


def test_the_mean_picks_whatever_the_target_takes():
    """Fixed numbers: the minimum would pick the second candidate, whose minimum is 2; actions stay in the box."""
    noise = torch.tensor([[[-2.0], [0.5]]])
    q = torch.tensor([[[10.0, 3.0]], [[0.0, 2.0]]])  # (critic, row, candidate)
    pick = lambda aggregation: m.best_of_n(lambda o, z, t: z, lambda o, a: q, torch.zeros(1, 1), noise,
                                           m.Args(q_aggregation=aggregation))
    assert [x.item() for x in pick("mean")] == [-1.0, 5.0]
    assert [x.item() for x in pick("min")] == [-1.0, 0.0]


@pytest.mark.parametrize("aggregation, q_next", [("mean", 20.0), ("min", 10.0)])
def test_critic_loss_by_hand(aggregation, q_next):
    """A terminated transition (mask 0) does not look ahead; a truncated one (mask 1) does, like any other."""
    batch = dict(observations=torch.zeros(3, 1), next_observations=torch.zeros(3, 1), actions=torch.zeros(3, 1),
                 rewards=torch.tensor([1.0, 2.0, 3.0]), masks=torch.tensor([1.0, 0.0, 1.0]))
    q = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    target_critic = lambda o, a: torch.stack([torch.full(a.shape[:-1], 10.0), torch.full(a.shape[:-1], 30.0)])
    loss = m.critic_loss(lambda o, z, t: z, lambda o, a: q, target_critic, batch, torch.randn(3, 4, 1),
                         m.Args(gamma=0.9, q_aggregation=aggregation))
    y = [1 + 0.9 * q_next, 2.0, 3 + 0.9 * q_next]
    assert loss.item() == pytest.approx(sum((q[k][i].item() - y[i]) ** 2 for k in range(2) for i in range(3)) / 6)


def table_actor_loss(table, args, critic=None):
    """(l_q, l_bound, gradient of each in the actions) for a policy that is a table of actions."""
    table = table.clone().requires_grad_()
    critic = critic or make_critic()
    l_q, l_bound, _ = m.actor_loss(lambda o, z, t: table, critic, double(len(table), OBS), table.detach(), args)
    return l_q, l_bound, torch.autograd.grad(l_q, table)[0], torch.autograd.grad(l_bound, table)[0]


def test_bound_loss_and_no_q_gradient_outside_the_box():
    table = torch.tensor([[0.5, 3.0], [-1.5, -0.2]], dtype=torch.float64)
    _, l_bound, q_gradient, bound_gradient = table_actor_loss(table, m.Args())
    close(l_bound.item(), (2.0 + 0.5) / 4)
    close(bound_gradient, torch.tensor([[0.0, 0.25], [-0.25, 0.0]], dtype=torch.float64))
    outside = table.abs() > 1
    assert (q_gradient[outside] == 0).all() and (q_gradient[~outside] != 0).all()


def test_actor_loss_is_the_mean_over_both_online_critics():
    """Whatever the target critics' aggregation is, and of the clipped actions."""
    table, critic = 2 * double(BATCH, ACT, seed=13), make_critic()
    l_q = table_actor_loss(table, m.Args(normalize_q_loss=False, q_aggregation="min"), critic)[0]
    close(l_q, -critic(double(BATCH, OBS), table.clamp(-1, 1)).mean())


@pytest.mark.parametrize("normalize, factor", [(True, 1.0), (False, 1000.0)])
def test_normalized_q_loss_does_not_feel_the_scale_of_q(normalize, factor):
    args, critic, table = m.Args(normalize_q_loss=normalize), make_critic(), double(BATCH, ACT, seed=13)
    l_q, _, gradient, _ = table_actor_loss(table, args, critic)
    with torch.no_grad():
        critic.weights[-1].mul_(1000)
        critic.biases[-1].mul_(1000)
    l_q_scaled, _, gradient_scaled, _ = table_actor_loss(table, args, critic)
    close(l_q_scaled, factor * l_q)
    close(gradient_scaled, factor * gradient)


def test_normalized_q_loss_divides_by_the_size_of_its_gradient():
    """The divisor is a constant, the root mean square of dQ/da, times the number of entries that L_MFI averages over:
    so the gradient of the Q term has the root mean square 1 / (entries of the batch)."""
    critic, table = make_critic(), double(BATCH, ACT, seed=13).clamp(-0.9, 0.9)
    l_q, _, gradient, _ = table_actor_loss(table, m.Args(normalize_q_loss=True), critic)
    plain, _, plain_gradient, _ = table_actor_loss(table, m.Args(normalize_q_loss=False), critic)
    actions = table.clone().requires_grad_()
    dq_da, = torch.autograd.grad(critic(double(BATCH, OBS), actions).mean(0).sum(), actions)
    close(plain_gradient, -dq_da / BATCH)
    size = ACT * dq_da.square().mean().sqrt()
    close(l_q, plain / size)
    close(gradient, plain_gradient / size)
    close(gradient.square().mean().sqrt().item(), 1 / (BATCH * ACT))


def test_the_q_term_does_not_feel_the_level_of_q():
    """As dividing by mean |Q| does: there the Q term faded while the values grew."""
    critic, table = make_critic(), double(BATCH, ACT, seed=13)
    before = table_actor_loss(table, m.Args(), critic)[2]
    with torch.no_grad():
        critic.biases[-1].add_(1000)
    close(table_actor_loss(table, m.Args(), critic)[2], before)


# ---------------------------------------------------------------- draws and schedules
def test_sample_time_discrete_and_continuous():
    """T up to 1000 gives multiples of 1/T without 0 and with 1, above it t is uniform on [0, 1)."""
    torch.manual_seed(0)
    t = m.sample_time(20_000, 50, "cpu")
    assert t.shape == (20_000, 1)
    counts = torch.bincount((t * 50).round().long().squeeze(1), minlength=51)
    close(t * 50, (t * 50).round(), 1e-5)
    assert counts[0] == 0 and counts[1:].min() > 300 and counts[1:].max() < 500  # 400 each, standard deviation 20
    assert len(counts) == 51
    t = m.sample_time(20_000, 10_000, "cpu")
    assert t.shape == (20_000, 1) and t.min() >= 0 and t.max() < 1
    assert len(t.unique()) > 19_900  # a grid of 10,000 would hold fewer than 10,001 values
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert (t.squeeze(1).sort()[0] - uniform).abs().max() < 0.015


def test_a_thousand_time_steps_are_still_discrete():
    torch.manual_seed(0)
    for time_steps, discrete in ((100, True), (1000, True), (1001, False)):
        steps = time_steps * m.sample_time(500, time_steps, "cpu").double()
        assert ((steps - steps.round()).abs() < 1e-3).all() == discrete


@pytest.mark.parametrize("step, rate", [(0, 0.0), (25_000, 5e-5), (50_000, 1e-4), (100_000, 9.9386e-5),
                                        (525_000, 5.5e-5), (1_000_000, 1e-5), (1_500_000, 1e-5)])
def test_actor_learning_rate_table(step, rate):
    """The authors' schedule, measured in their code."""
    args = m.Args(actor_learning_rate=1e-4, offline_steps=1_000_000)
    assert m.actor_learning_rate(torch.tensor(step), args).item() == pytest.approx(rate, rel=1e-4, abs=1e-12)


def test_actor_learning_rate_of_a_very_short_run():
    """No division by zero where 5 % of the run are less than one step."""
    args = m.Args(actor_learning_rate=1e-4, offline_steps=1)
    rates = [m.actor_learning_rate(torch.tensor(step), args).item() for step in (0, 1)]
    assert rates == pytest.approx([1e-4, 1e-5])


def window(*values):
    """The window of the last 20 losses, as the agent keeps it."""
    return torch.tensor([-1.0] * (20 - len(values)) + list(values))


def next_alpha(history, loss, step, args):
    """alpha after a step at which it was --alpha, as a number."""
    return args.alpha * m.next_alpha_factor(torch.tensor(1.0), window(*history), torch.tensor(loss),
                                            torch.tensor(step), args)[0].item()


def adaptive_alpha(losses, args):
    """alpha after each of the checks at 2000, 4000, ... that see these losses; and the window's values."""
    alphas, factor, history = [], torch.tensor(1.0), window()
    for i, loss in enumerate(losses):
        factor, history = m.next_alpha_factor(factor, history, torch.tensor(loss), torch.tensor(2000 * (i + 1)), args)
        alphas.append(args.alpha * factor.item())
    return alphas, history[history >= 0].tolist()


def test_alpha_rises_and_falls_at_a_factor_of_five():
    args = m.Args(alpha=10.0, offline_steps=2000)
    alpha = lambda loss: next_alpha([1.0, 1.0], loss, 4000, args)
    assert alpha(5.01) == pytest.approx(12.0) and alpha(4.99) == 10.0
    assert alpha(0.199) == pytest.approx(8.0) and alpha(0.201) == 10.0


def test_alpha_stays_within_a_tenth_and_ten_times_its_start():
    args = m.Args(alpha=10.0, offline_steps=2000)
    up = adaptive_alpha([6.0**i for i in range(40)], args)[0]
    down = adaptive_alpha([7.0**-i for i in range(40)], args)[0]
    assert up[:2] == down[:2] == [10.0, 10.0], "one value in the window is not enough"
    assert (up[2], down[2]) == pytest.approx((12.0, 8.0))  # 36 is above five times 3.5, 1/49 below a fifth of 4/7
    assert up[-1] == 100.0 and max(up) == 100.0
    assert down[-1] == min(down) == pytest.approx(1.0)


def test_alpha_changes_only_every_2000_steps_and_after_a_tenth_of_the_run():
    args = m.Args(alpha=10.0, offline_steps=1_000_000)
    for step in (98_000, 100_001, 101_000, 101_999):
        assert next_alpha([1.0, 1.0, 1.0], 99.0, step, args) == 10.0, step
    for step in (100_000, 102_000, 1_500_000):
        assert next_alpha([1.0, 1.0, 1.0], 99.0, step, args) == pytest.approx(12.0), step
    factor, history = torch.tensor(1.0), window()
    for step in range(1, 10_001):
        factor, history = m.next_alpha_factor(factor, history, torch.tensor(float(step)), torch.tensor(step), args)
    assert (history == window(2000, 4000, 6000, 8000, 10_000)).all(), "the warm-up fills the window too"


def test_alpha_averages_the_stored_values_only():
    """After 3 values the average is of 3; dividing by 20 slots, as the authors do, would raise alpha here."""
    args = m.Args(alpha=10.0, offline_steps=2000)
    alphas, history = adaptive_alpha([1.0, 2.0, 3.0, 9.9], args)
    assert alphas == [10.0] * 4 and history == pytest.approx([1.0, 2.0, 3.0, 9.9])
    assert adaptive_alpha([1.0, 2.0, 3.0, 10.1], args)[0][-1] == pytest.approx(12.0)
    assert adaptive_alpha([1.0, 2.0, 3.0, 0.39], args)[0][-1] == pytest.approx(8.0)


def test_alpha_window_holds_the_last_20_values():
    args = m.Args(alpha=10.0, offline_steps=2000)
    history = adaptive_alpha([float(i) for i in range(1, 31)], args)[1]
    assert history == [float(i) for i in range(11, 31)]
    old_large = [1000.0] * 5 + [1.0] * 20
    before = adaptive_alpha(old_large, args)[0][-1]
    assert adaptive_alpha(old_large + [5.5], args)[0][-1] == pytest.approx(1.2 * before)


def test_alpha_constant_and_cosine():
    constant = m.Args(alpha=10.0, offline_steps=2000, alpha_schedule="constant")
    assert next_alpha([1.0, 1.0], 99.0, 4000, constant) == 10.0
    cosine = m.Args(alpha=10.0, offline_steps=1000, alpha_schedule="cosine")
    values = [next_alpha([], 0.0, step, cosine) for step in (0, 250, 500, 1000, 1500)]
    assert values == pytest.approx([10.0, 1 + 9 * (1 + 0.5**0.5) / 2, 5.5, 1.0, 1.0])


# ---------------------------------------------------------------- the agent
SMALL = dict(policy_width=16, policy_depth=1, critic_width=16, critic_depth=1, offline_steps=1000, num_candidates=3)


def make_agent(**flags):
    torch.manual_seed(0)
    return m.Agent(OBS, ACT, m.Args(**{**SMALL, **flags}), torch.device("cpu"))


def float_batch(reward_scale=1.0):
    batch = {key: value.float() for key, value in transitions().items()}
    return dict(batch, rewards=reward_scale * batch["rewards"])


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_first_update_moves_the_critics_but_not_the_policy():
    """The actor's first learning rate is 0; the target critic follows the critic as it is after the step."""
    agent = make_agent(tau=0.1)
    policy, critic, target = copies(agent.policy), copies(agent.critic), copies(agent.target_critic)
    assert all((c == t).all() for c, t in zip(critic, target))
    agent.update(float_batch())
    assert agent.updates == 1
    assert all((old == new).all() for old, new in zip(policy, agent.policy.parameters()))
    assert all((old != new).any() for old, new in zip(critic, agent.critic.parameters()))
    for old, new, ours in zip(target, agent.critic.parameters(), agent.target_critic.parameters()):
        close(ours, 0.9 * old + 0.1 * new, 1e-6)
        assert (ours != old).any()
    agent.update(float_batch())
    assert any((old != new).any() for old, new in zip(policy, agent.policy.parameters()))
    assert float(agent.actor_optimizer.param_groups[0]["lr"]) == pytest.approx(agent.args.actor_learning_rate / 50)


def test_nothing_but_polyak_averaging_moves_the_target_critic():
    agent = make_agent(tau=0.0)
    target = copies(agent.target_critic)
    assert not any(parameter.requires_grad for parameter in agent.target_critic.parameters())
    for _ in range(3):
        agent.update(float_batch())
    assert all((old == new).all() for old, new in zip(target, agent.target_critic.parameters()))


@pytest.mark.parametrize("slope, least, most", [(1.0, 2, 50), (0.1, 0.1, 0.9)])
def test_gradients_are_clipped_per_network(slope, least, most):
    """A huge critic gradient is cut to norm 1 and leaves the actor's alone, which is cut only where it needs it."""
    agent = make_agent(alpha=1e-3, bound_weight=1e-3, normalize_q_loss=False)
    perturb(agent.policy), perturb(agent.critic, 0.03)
    agent.critic.weights[-1].data.mul_(slope)  # of Q in the action
    batch, shape = float_batch(reward_scale=1e4), (BATCH, ACT)
    torch.manual_seed(1)
    draws = (torch.randn(shape), m.sample_time(BATCH, 50, "cpu"), torch.randn(shape), torch.randn(BATCH, 3, ACT))
    total, _ = m.losses(agent.policy, agent.critic, agent.target_critic, batch, draws, 1e-3, agent.args)
    raw_actor, raw_critic = gradients(total, agent.policy), gradients(total, agent.critic)
    norm = lambda tensors: torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
    assert norm(raw_critic) > 10 and least < norm(raw_actor) < most, "the case that this test is about"
    for parameter in (*agent.policy.parameters(), *agent.critic.parameters()):
        parameter.grad = torch.full_like(parameter, 1e6)  # of an earlier step, to be forgotten
    torch.manual_seed(1)
    agent.update(batch)
    for network, raw in ((agent.policy, raw_actor), (agent.critic, raw_critic)):
        factor = min(1 / norm(raw), 1)
        close([parameter.grad for parameter in network.parameters()], [factor * gradient for gradient in raw], 1e-4)


def test_update_uses_the_number_of_candidates_of_the_target_flag():
    """--num-candidates-target is the N of the Bellman target alone; without it --num-candidates holds."""
    for flags, expected in ((dict(), 3), (dict(num_candidates_target=7), 7)):
        agent, seen = make_agent(**flags), []
        agent.losses = lambda *inputs, seen=seen: seen.append(inputs[4]) or m.losses(*inputs)
        agent.update(float_batch())
        assert seen[0][3].shape == (BATCH, expected, ACT)


def test_update_applies_alphas_rule_to_the_loss_of_the_step():
    agent = make_agent(alpha_schedule="adaptive", alpha=10.0)
    agent.updates.fill_(1998)
    agent.alpha_history.copy_(window(1e-9, 1e-9))
    agent.update(float_batch())
    assert agent.alpha_factor.item() == 1.0
    parts = agent.update(float_batch())
    assert agent.alpha_factor.item() == pytest.approx(1.2) and agent.charts()["charts/alpha"] == pytest.approx(12.0)
    assert (agent.alpha_history == window(1e-9, 1e-9, parts["mean_flow"].item())).all()


@pytest.mark.parametrize("count", [1, 4])
def test_act_normalises_observations_and_draws_from_its_own_generator(count):
    agent = make_agent()
    perturb(agent.policy), perturb(agent.target_critic)
    agent.obs_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    agent.obs_std.copy_(torch.tensor([1.0, 0.5, 2.0]))
    raw, before = torch.randn(6, OBS), torch.get_rng_state()
    actions = agent.act(raw, count, torch.Generator().manual_seed(5))
    assert (torch.get_rng_state() == before).all()
    noise = torch.randn(6, count, ACT, generator=torch.Generator().manual_seed(5))
    normalised = (raw - agent.obs_mean) / agent.obs_std
    expected = m.best_of_n(agent.policy, agent.target_critic, normalised, noise, agent.args)[0]
    close(actions, expected, 1e-6)
    assert not actions.requires_grad and actions.abs().max() <= 1
