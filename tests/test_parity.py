"""MFQL's networks, losses and gradients against numbers from the authors' JAX code.

The numbers lie in ../shared/parity, which only development machines have. Where it is absent, these tests are skipped
and `test_mfql_maths.py` covers the same functions from first principles.
"""
import pathlib

import numpy as np
import pytest
import torch

import mfql_offline as m

FILE = pathlib.Path(__file__).parents[2] / "shared" / "parity" / "mfql_authors_code.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the authors' numbers are not on this machine")
WIDTH, DEPTH = 32, 2


@pytest.fixture(scope="module")
def numbers():
    return {key: torch.tensor(value) for key, value in np.load(FILE).items()}


def actor_names():
    """Our parameter name: (flax name, how to bring flax's array into our layout)."""
    def linear(ours, theirs):
        return {f"{ours}.weight": (f"{theirs}/kernel", lambda k: k.T), f"{ours}.bias": (f"{theirs}/bias", lambda b: b)}

    def gain(ours, theirs):
        return {f"{ours}.gain": (f"{theirs}/g", lambda g: g.flatten())}

    names = {"position": ("pos_embed", lambda p: p.flatten()), **linear("embed", "FeatureEmbed_0/Dense_0"),
             **linear("time_in", "t_embedder/Dense_0"), **linear("time_out", "t_embedder/Dense_1"),
             **gain("final_norm", "FinalLayer_0/RMSNorm_0"), **linear("final_modulation", "FinalLayer_0/Dense_0"),
             **linear("final", "FinalLayer_0/Dense_1")}
    for i in range(DEPTH):
        block = f"blocks_{i}"
        names |= linear(f"blocks.{i}.attention_out", f"{block}/Attention_0/Dense_0")
        names |= linear(f"blocks.{i}.mlp_in", f"{block}/MlpBlock_0/Dense_0")
        names |= linear(f"blocks.{i}.mlp_out", f"{block}/MlpBlock_0/Dense_1")
        names |= linear(f"blocks.{i}.modulation", f"{block}/Dense_0")
        names |= gain(f"blocks.{i}.norm1", f"{block}/RMSNorm_0") | gain(f"blocks.{i}.norm2", f"{block}/RMSNorm_1")
        # of q, k, v side by side only v matters with one token
        names[f"blocks.{i}.value.weight"] = (f"{block}/Attention_0/qkv/kernel", lambda k: k[:, 2 * WIDTH:].T)
        names[f"blocks.{i}.value.bias"] = (f"{block}/Attention_0/qkv/bias", lambda b: b[2 * WIDTH:])
    return names


def actor_arrays(numbers, prefix):
    return {ours: change(numbers[f"{prefix}/modules_actor_bc_flow/{theirs}"])
            for ours, (theirs, change) in actor_names().items()}


@pytest.fixture
def policy(numbers):
    policy = m.Policy(11, 3, WIDTH, DEPTH)
    policy.load_state_dict(actor_arrays(numbers, "param"))
    return policy


@pytest.fixture
def critic(numbers):
    critic = m.TwinCritic(11, 3, 32, 2)
    value = {key.split("value_net/")[1]: array for key, array in numbers.items() if "param/modules_critic" in key}
    state = {}
    for i in range(3):
        state |= {f"weights.{i}": value[f"Dense_{i}/kernel"], f"biases.{i}": value[f"Dense_{i}/bias"].unsqueeze(1)}
    for i in range(2):
        state |= {f"norm_gains.{i}": value[f"LayerNorm_{i}/scale"].unsqueeze(1),
                  f"norm_biases.{i}": value[f"LayerNorm_{i}/bias"].unsqueeze(1)}
    critic.load_state_dict(state)
    return critic


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_policy_output_and_its_derivative(numbers, policy):
    g, dg_dt = torch.func.jvp(lambda z, t: policy(numbers["obs"], z, t), (numbers["z"], numbers["t"]),
                              (numbers["v"], torch.ones_like(numbers["t"])))
    close(g, numbers["g"])
    close(dg_dt, numbers["dgdt"])


def test_mean_flow_target_loss_and_gradients(numbers, policy):
    batch = numbers["obs"], numbers["act"], numbers["e"], numbers["t"]
    g, g_tgt = m.mean_flow_output_and_target(policy, *batch)
    close(g, numbers["g"])
    close(g_tgt, numbers["g_tgt"])
    loss = m.mean_flow_loss(policy, *batch)
    close(loss, numbers["bc_loss"])
    loss.backward()
    theirs = actor_arrays(numbers, "grad_bc")
    for name, parameter in policy.named_parameters():
        close(parameter.grad, theirs[name])


def test_one_step_action_and_twin_values(numbers, policy, critic):
    close(m.one_step_action(policy, numbers["obs"], numbers["e"]), numbers["one_step_action"])
    close(critic(numbers["obs"], numbers["act"]), numbers["q"])


def test_actor_loss_and_gradients(numbers, policy, critic):
    args = m.Args(normalize_q_loss=False)
    l_q, l_bound, _ = m.actor_loss(policy, critic, numbers["obs"], numbers["e"], args)
    close(l_q + l_bound, numbers["actor_loss"])
    (l_q + l_bound).backward()
    theirs = actor_arrays(numbers, "grad_actor")
    for name, parameter in policy.named_parameters():
        close(parameter.grad, theirs[name])
    assert all(parameter.grad is None for parameter in critic.parameters()), "the actor loss must not move the critic"
