"""The penalties of saq_cql.py's --penalty, and the sign of the one that safety critics need."""

import dataclasses

import pytest
import torch
from test_closed_forms import random_batch

from saq_cql import Args, DiscreteCQL
from vqvae import ActionVQVAE


def agent(**fields):
    cql = DiscreteCQL(3, ActionVQVAE(3, 2, 8, hidden=(8,)), dataclasses.replace(Args(), **fields))
    for network in (cql.qf, cql.vqvae.prior):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    return cql


@pytest.mark.parametrize("kind", ["cql_h", "cql_rho", "v1"])
def test_penalty_by_hand(kind):
    cql, batch = agent(penalty=kind), random_batch(size=16)
    q, p = cql.qf(batch.obs), cql.vqvae.prior(batch.obs).softmax(1)
    expected = 0.0
    for i in range(16):
        weights = p[i] if kind == "cql_rho" else torch.ones(8)
        expected += (weights * q[i].exp()).sum().log() - (0.0 if kind == "v1" else q[i, batch.codes[i]])
    torch.testing.assert_close(cql.loss(batch)[1]["penalty"], (expected / 16).detach())


def test_cql_rho_does_not_mind_a_q_that_is_the_same_for_all_codes():
    """Its penalty is 0 there, and its gradient too where data follow the prior: nothing but Q is to be learned."""
    cql, batch = agent(penalty="cql_rho", alpha=1.0), random_batch(size=20_000)
    cql.qf[-1].weight.data.zero_()
    cql.qf[-1].bias.data.fill_(3.7)
    codes = cql.vqvae.prior(batch.obs).softmax(1).multinomial(1)[:, 0]
    batch = batch._replace(codes=codes)
    assert cql.loss(batch)[1]["penalty"].abs() < 1e-5
    cql.qf_target.load_state_dict(cql.qf.state_dict())
    loss, info = cql.loss(batch._replace(rewards=3.7 - 0.99 * 3.7 * torch.ones(20_000)))  # no TD error
    assert info["td_loss"] < 1e-6
    (gradient,) = torch.autograd.grad(loss, cql.qf[-1].bias)
    assert gradient.abs().max() < 0.01


def test_cql_rho_acts_by_the_prior_where_q_is_the_same_for_all_codes():
    cql, obs = agent(penalty="cql_rho", act="mean", support=0.0, average=0.0), torch.randn(5, 3)
    cql.qf[-1].weight.data.zero_()
    p, candidates = cql.vqvae.prior_logits(obs).softmax(1), cql.vqvae.candidates(obs)
    torch.testing.assert_close(cql.act(obs), (p[..., None] * candidates).sum(1).detach())


@pytest.mark.parametrize("kind", ["cql_h", "cql_rho", "v1"])
def test_the_penalty_passes_nothing_to_the_quantizer(kind):
    cql, batch = agent(penalty=kind), random_batch()
    before = {name: tensor.clone() for name, tensor in cql.vqvae.state_dict().items()}
    cql.update(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cql.vqvae.state_dict().items())


def test_without_a_penalty_it_is_q_learning():
    """alpha = 0, QT-Opt over codes: the loss is the TD error alone."""
    info = agent(alpha=0.0).loss(random_batch())[1]
    assert info["loss"] == info["td_loss"]


def safety_penalty(q, data):
    """Conservative safety critics (Bharadhwaj et al., ICLR 2021), exact over codes: Q is the chance of an accident, and
    it must not be underestimated where there are no data."""
    return (-q).logsumexp(-1).mean() + q[data].mean()


def test_a_safety_critic_needs_the_other_sign():
    """A gradient step of its penalty raises Q of codes without data and lowers that of the data's; CQL's own does the
    reverse, and would call unknown codes safe."""
    q = torch.zeros(8, requires_grad=True)
    (safety,) = torch.autograd.grad(safety_penalty(q, [2]), q)
    cql, batch = agent(alpha=1.0), random_batch()
    cql.qf[-1].weight.data.zero_()  # Q is its last bias, 0 for every code; rewards of 0: there is no TD error
    batch = batch._replace(codes=torch.full((64,), 2), rewards=torch.zeros(64))
    (ours,) = torch.autograd.grad(cql.loss(batch)[0], cql.qf[-1].bias)
    for sign, gradient in ((1, safety), (-1, ours)):
        moved = -gradient * sign
        assert (moved[[0, 1, 3, 4, 5, 6, 7]] > 0).all()
        assert moved[2] < 0
