"""saq_brac.py against answers that are known."""

import dataclasses
import math

import pytest
import torch
from test_closed_forms import random_batch

from saq_brac import Args, ContinuousBRAC, DiscreteBRAC
from vqvae import ActionVQVAE, minimize


def agent(num_codes=8, **fields):
    brac = DiscreteBRAC(3, ActionVQVAE(3, 2, num_codes, hidden=(8,)), dataclasses.replace(Args(), **fields))
    for network in (*brac.qf, *brac.qf_target, brac.vqvae.prior, brac.actor):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    return brac


# --- The exact sums ---


def test_value_by_hand():
    """Eq. 3, one state and one code at a time: sum_k pi_k (min Q_k - beta (log pi_k - log p_k)); literally, without
    the policy's own entropy."""
    for literal in (False, True):
        brac, obs = agent(beta=0.7, literal=literal), torch.randn(4, 3)
        values = brac.value(obs)
        for i in range(4):
            pi, p = brac.actor(obs[i]).softmax(0).tolist(), brac.vqvae.prior(obs[i]).softmax(0).tolist()
            value = 0.0
            for k in range(8):
                q = min(qf(obs[i])[k].item() for qf in brac.qf_target)
                divergence = -math.log(p[k]) if literal else math.log(pi[k]) - math.log(p[k])
                value += pi[k] * (q - 0.7 * divergence)
            assert values[i].item() == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_prior_floor():
    brac = agent(prior_floor=-2.0)
    brac.vqvae.prior[-1].bias.data[0] = 50.0
    assert brac.log_prior(torch.randn(4, 3)).min() == -2.0


def test_kl_against_sampling():
    """The exact divergence is the mean of log pi - log p over the policy's own codes."""
    brac, batch = agent(), random_batch(size=4)
    log_pi, log_p = brac.actor(batch.obs).log_softmax(1), brac.vqvae.prior(batch.obs).log_softmax(1)
    codes = log_pi.exp().multinomial(100_000, replacement=True)  # (4, n)
    sampled = (log_pi - log_p).gather(1, codes).mean()
    assert brac.diagnose(batch)["kl_exact"].item() == pytest.approx(sampled.item(), abs=0.01)


def test_without_an_actor_the_value_is_the_soft_value():
    """At alpha = beta: alpha log sum_k p(k | s) exp(Q(s, k) / alpha)."""
    brac, obs = agent(alpha=0.5, beta=0.5, actor_free=True), torch.randn(16, 3)
    q = torch.min(*(qf(obs) for qf in brac.qf_target))
    expected = 0.5 * (brac.vqvae.prior(obs).log_softmax(1) + q / 0.5).logsumexp(1)
    torch.testing.assert_close(brac.value(obs), expected)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
def test_the_learned_actor_reaches_the_closed_form(alpha, beta):
    """On a fixed Q, training by Eq. 6 ends at softmax((Q + beta log p) / alpha)."""
    brac, batch = agent(alpha=alpha, beta=beta), random_batch(size=8)
    for _ in range(400):
        minimize(*brac.actor_loss(batch), brac.actor_optimizer)
    learned = brac.actor(batch.obs).softmax(1)
    brac.args.actor_free = True
    closed = brac.log_policy(batch.obs, torch.min(*(qf(batch.obs) for qf in brac.qf))).exp()
    torch.testing.assert_close(learned, closed, atol=5e-3, rtol=0)


def test_td_target_by_hand():
    """Terminals do not bootstrap, both critics are drawn to the same target."""
    brac = agent(discount=0.9)
    batch = random_batch()._replace(terminals=(torch.arange(64) % 2).float())
    target = batch.rewards + 0.9 * (1 - batch.terminals) * brac.value(batch.next_obs)
    expected = 0.0
    for qf in brac.qf:
        expected += (qf(batch.obs)[torch.arange(64), batch.codes] - target).square().mean()
    torch.testing.assert_close(brac.qf_loss(batch)[0], expected)


def test_each_loss_moves_its_own_networks():
    brac, batch = agent(), random_batch()
    before = {name: parameter.clone() for name, parameter in brac.named_parameters()}
    minimize(*brac.actor_loss(batch), brac.actor_optimizer)
    moved = {name for name, parameter in brac.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[0] for name in moved} == {"actor"}
    brac.args.actor_free = True
    info = brac.update(batch)
    assert "actor_loss" not in info


# --- The continuous twin ---


def test_density_integrates_to_one():
    brac = ContinuousBRAC(3, 1, Args())
    grid = torch.linspace(-12, 12, 20_001)[:, None]
    density = brac.behaviour.log_prob(torch.zeros(len(grid), 3), grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_behaviour_learns_the_datas_gaussian():
    """That of the actions before tanh."""
    brac = ContinuousBRAC(3, 2, Args())
    batch = random_batch(size=128)
    x = torch.tensor([0.3, -0.5]) + 0.1 * torch.randn(128, 2)
    batch = batch._replace(obs=torch.ones(128, 3), actions=x.tanh())
    for _ in range(500):
        info = brac.update(batch)
    entropy = (x.std(0).log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    assert info["behaviour_loss"].item() == pytest.approx(entropy.item(), abs=0.05)
    mean, log_std = brac.behaviour.distribution(torch.ones(1, 3))
    torch.testing.assert_close(mean[0], x.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(log_std[0].exp(), x.std(0), atol=0.02, rtol=0)


def test_without_the_value_penalty_the_value_is_the_policys_q():
    """BRAC-p, of the agent and of its twin; the closed-form policy stays softmax(log p + Q / alpha): AWAC's."""
    brac, obs = agent(alpha=0.5, beta=0.5, actor_free=True, value_penalty=False), torch.randn(16, 3)
    q = torch.min(*(qf(obs) for qf in brac.qf_target))
    policy = (brac.log_prior(obs) + q / 0.5).softmax(1)
    torch.testing.assert_close(brac.value(obs), (policy * q).sum(1))
    torch.testing.assert_close(brac.log_policy(obs, q + 3.0), policy.log())  # V(s) cancels
    loose = agent(alpha=1e6, beta=1e6, actor_free=True, prior_floor=-1000.0)
    torch.testing.assert_close(
        loose.log_policy(obs, q).exp(), loose.vqvae.prior_logits(obs).softmax(1), atol=1e-4, rtol=0
    )
    batch, losses = random_batch(), []
    for value_penalty in (True, False):
        twin = ContinuousBRAC(3, 2, dataclasses.replace(Args(), value_penalty=value_penalty, beta=3.0))
        twin.sample = lambda obs: (torch.zeros(len(obs), 2), torch.ones(len(obs)))
        for qf, value in zip((*twin.qf, *twin.qf_target), (0.0, 0.0, 5.0, 5.0), strict=True):
            qf.net[-1].weight.data.zero_()
            qf.net[-1].bias.data.fill_(value)
        losses.append(twin.qf_loss(batch._replace(rewards=torch.zeros(64), terminals=torch.zeros(64)))[0].item())
    assert losses == pytest.approx([2 * (0.99 * (5 - 3)) ** 2, 2 * (0.99 * 5) ** 2])
