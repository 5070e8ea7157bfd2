"""The same numbers as the authors' JAX code (github.com/jianlanluo/SAQ, commit 35caacc) on fixed inputs and weights.

official_numbers.npz was written by that code: O=5, A=3, K=8, D=16, hidden layers 24-24, batch 32, float32 on a CPU.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from saq_cql import Args, DiscreteCQL
from vqvae import ActionVQVAE, Transitions, mlp

NUMBERS = np.load(Path(__file__).parent / "official_numbers.npz")


def official(name):
    return torch.as_tensor(NUMBERS[name])


def load_mlp(network, prefix):
    """Flax stores kernels (in, out), PyTorch weights (out, in)."""
    with torch.no_grad():
        for i, layer in enumerate(network[::2]):
            layer.weight.copy_(official(f"{prefix}/Dense_{i}/kernel").T)
            layer.bias.copy_(official(f"{prefix}/Dense_{i}/bias"))


def assert_same(ours, theirs):
    """Relative error at most 1e-5 of the whole tensor."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.fixture
def vqvae():
    vqvae = ActionVQVAE(5, 3, num_codes=8, code_dim=16, hidden=(24, 24))
    for ours, theirs in [("encoder", "encoder"), ("decoder", "decoder"), ("prior", "action_prior")]:
        load_mlp(getattr(vqvae, ours), f"vqvae/{theirs}")
    vqvae.codebook.data.copy_(official("vqvae/vq/codebook"))
    return vqvae


@pytest.fixture
def agent(vqvae):
    args = dataclasses.replace(
        Args(), alpha=float(official("cql_out/alpha")), discount=float(official("cql_out/discount"))
    )
    agent = DiscreteCQL(5, vqvae, args)
    agent.qf, agent.qf_target = mlp(5, 8, (24, 24)), mlp(5, 8, (24, 24))
    load_mlp(agent.qf, "qf")
    load_mlp(agent.qf_target, "qf_target")
    return agent


def batch():
    codes = official("vqvae_out/codes").long()
    return Transitions(*(official(key) for key in ("obs", "actions", "rewards", "next_obs", "dones")), codes)


def test_codes_are_exactly_the_same(vqvae):
    assert vqvae.encode(official("obs"), official("actions")).tolist() == official("vqvae_out/codes").tolist()
    assert_same(vqvae.embed(official("obs"), official("actions")), official("vqvae_out/encoded"))


def test_every_code_decodes_to_the_same_action(vqvae):
    obs = official("obs")
    decoded = torch.stack([vqvae.decode(obs, torch.full((32,), code)) for code in range(8)], 1)
    assert_same(decoded, official("vqvae_out/decoded_all_codes"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("loss", "loss"),
        ("reconstruction_loss", "reconstruction_loss"),
        ("commitment_loss", "e_latent_loss"),
        ("codebook_loss", "q_latent_loss"),
        ("prior_loss", "action_prior_loss"),
    ],
)
def test_quantizer_loss(vqvae, ours, theirs):
    _, info = vqvae(official("obs"), official("actions"))
    assert_same(info[ours], official(f"vqvae_out/{theirs}"))


def test_quantizer_gradients(vqvae):
    vqvae(official("obs"), official("actions"))[0].backward()
    assert_same(vqvae.codebook.grad, official("vqvae_grad/vq/codebook"))
    for ours, theirs in [("encoder", "encoder"), ("decoder", "decoder"), ("prior", "action_prior")]:
        for i, layer in enumerate(getattr(vqvae, ours)[::2]):
            assert_same(layer.weight.grad, official(f"vqvae_grad/{theirs}/Dense_{i}/kernel").T)
            assert_same(layer.bias.grad, official(f"vqvae_grad/{theirs}/Dense_{i}/bias"))


def test_q_values(agent):
    assert_same(agent.qf(official("obs")), official("cql_out/q_values"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("loss", "loss"), ("td_loss", "td_loss"), ("penalty", "cql_min_q_loss"), ("penalty", "bc_loss")],
)
def test_discrete_cql_loss(agent, ours, theirs):
    assert_same(agent.loss(batch())[1][ours], official(f"cql_out/{theirs}"))
