"""baselines/awac.py against the closed form, and the sampled form against the formulas of its paper."""

import copy
import dataclasses
import math

import pytest
import torch
from test_closed_forms import random_batch

import saq_brac
from baselines.awac import Args, ContinuousAWAC, DiscreteAWAC
from vqvae import ActionVQVAE, minimize


def agent(num_codes=8, **fields):
    awac = DiscreteAWAC(3, ActionVQVAE(3, 2, num_codes, hidden=(8,)), dataclasses.replace(Args(), **fields))
    for network in (*awac.qf, *awac.qf_target, awac.vqvae.prior):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    return awac


# --- Over codes ---


def test_the_policy_does_not_mind_what_is_the_same_for_all_codes():
    awac, obs, q = agent(), torch.randn(16, 3), torch.randn(16, 8)
    shifted = q + torch.randn(16, 1)
    torch.testing.assert_close(awac.policy_logits(obs, q).softmax(1), awac.policy_logits(obs, shifted).softmax(1))


def test_limits_of_lambda():
    """Large: the prior. Small: the code of the highest Q."""
    obs, q = torch.randn(16, 3), torch.randn(16, 8)
    loose, greedy = agent(temperature=1e6), agent(temperature=1e-5)
    prior = loose.vqvae.prior_logits(obs).softmax(1)
    torch.testing.assert_close(loose.policy_logits(obs, q).softmax(1), prior, atol=1e-5, rtol=0)
    torch.testing.assert_close(greedy.policy_logits(obs, q).softmax(1), torch.eye(8)[q.argmax(1)])


def test_value_and_loss_by_hand():
    awac, batch = agent(temperature=0.7, discount=0.5), random_batch(size=16)
    batch = batch._replace(terminals=torch.arange(16).float() % 2)
    q = torch.stack([qf(batch.next_obs) for qf in awac.qf_target]).amin(0)
    policy = (awac.vqvae.prior(batch.next_obs).log_softmax(1) + q / 0.7).exp()
    value = (policy * q).sum(1) / policy.sum(1)
    torch.testing.assert_close(awac.value(batch.next_obs), value)
    y = (batch.rewards + 0.5 * (1 - batch.terminals) * value).detach()
    expected = sum((qf(batch.obs)[range(16), batch.codes] - y).square().mean() for qf in awac.qf)
    torch.testing.assert_close(awac.qf_loss(batch)[0], expected)


def test_weighted_likelihood_over_codes_ends_at_the_closed_form():
    """The optimum of AWAC's own regression, where codes follow the prior: pi(k) ~ p(k) exp(Q(k) / lambda)."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), torch.tensor([0.1, -0.4, 0.8, 1.5]).double()
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = -(p * (q / 0.6).exp() * logits.log_softmax(0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    awac = agent(num_codes=4, temperature=0.6)
    awac.vqvae.prior_logits = lambda obs: p.log().expand(len(obs), 4)
    closed = awac.policy_logits(torch.zeros(1, 3), q[None]).softmax(1)[0]
    torch.testing.assert_close(logits.softmax(0), closed, atol=1e-4, rtol=0)


def test_it_is_saq_brac_without_a_policy_network():
    """With --actor-free --no-value-penalty --prior-floor -1000 --weight-decay 0, alpha = beta = lambda."""
    awac, batch = agent(temperature=0.7), random_batch()
    fields = dict(actor_free=True, value_penalty=False, prior_floor=-1000.0, weight_decay=0.0, alpha=0.7, beta=0.7)
    brac = saq_brac.DiscreteBRAC(3, awac.vqvae, dataclasses.replace(saq_brac.Args(), **fields))
    brac.qf.load_state_dict(awac.qf.state_dict())
    brac.qf_target.load_state_dict(awac.qf_target.state_dict())
    for _ in range(20):
        awac.update(batch)
        brac.update(batch)
    for ours, theirs in zip(awac.qf.parameters(), brac.qf.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- Over continuous actions ---


def test_draws_are_of_the_policy():
    """Around its mode, with its deviations, inside the box."""
    awac = ContinuousAWAC(3, 2, Args())
    with torch.no_grad():
        awac.actor.logit.copy_(torch.tensor([1.0, -1.0]))
    obs = torch.zeros(20_000, 3)
    mode, std = awac.actor.mode(obs[:1])[0], (6 / (1 + (-awac.actor.logit).exp()) - 6).exp()
    actions = awac.actor.sample(obs)
    assert actions.abs().max() <= 1
    expected = (mode + std * torch.randn(20_000, 2)).clamp(-1, 1)
    torch.testing.assert_close(actions.mean(0), expected.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(actions.std(0), expected.std(0), atol=0.02, rtol=0)
    assert std[0] > 1.5 * std[1]


def test_the_policy_learns_from_critics_of_before_the_step():
    awac, batch = ContinuousAWAC(3, 2, dataclasses.replace(Args(), lr=0.1)), random_batch()
    before = copy.deepcopy(awac)
    torch.manual_seed(0)
    awac.update(batch)
    torch.manual_seed(0)
    minimize(*before.actor_loss(batch, before.advantage(batch).detach()), before.actor_optimizer)
    for ours, theirs in zip(awac.actor.parameters(), before.actor.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_weights_are_exponentials_over_their_mean():
    awac, batch, adv = (
        ContinuousAWAC(3, 2, dataclasses.replace(Args(), temperature=0.4)),
        random_batch(),
        torch.randn(64),
    )
    weight = (adv / 0.4).exp()
    weight = weight / weight.mean()
    mean, std = awac.actor.mode(batch.obs), (6 / (1 + (-awac.actor.logit).exp()) - 6).exp()
    log_prob = -0.5 * (((batch.actions - mean) / std) ** 2 + 2 * std.log() + math.log(2 * math.pi)).sum(1)
    expected = -(weight * log_prob).mean()
    loss = awac.actor_loss(batch, adv)[0]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(awac.actor.parameters())) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert awac.actor_loss(batch, adv + 7.0)[0].item() == pytest.approx(loss.item(), rel=1e-4)


def test_critics_by_hand():
    awac = ContinuousAWAC(3, 2, dataclasses.replace(Args(), discount=0.5))
    batch = random_batch()._replace(terminals=torch.arange(64).float() % 2)
    actions = torch.rand(64, 2) * 2 - 1
    awac.actor.sample = lambda obs: actions

    def q(critics, obs, actions):
        return [critic(torch.cat([obs, actions], 1))[:, 0] for critic in critics]

    y = batch.rewards + 0.5 * (1 - batch.terminals) * torch.minimum(*q(awac.qf_target, batch.next_obs, actions))
    expected = sum((value - y.detach()).square().mean() for value in q(awac.qf, batch.obs, batch.actions))
    loss = awac.qf_loss(batch)[0]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(awac.qf.parameters())) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    expected = torch.minimum(*q(awac.qf, batch.obs, batch.actions)) - torch.minimum(*q(awac.qf, batch.obs, actions))
    torch.testing.assert_close(awac.advantage(batch), expected)


def test_effective_share():
    """All of a batch counts where advantages are equal, one transition where one is far better."""
    awac, batch = ContinuousAWAC(3, 2, Args()), random_batch()
    awac.advantage = lambda batch: torch.zeros(64)
    assert awac.diagnose(batch)["effective_share"].item() == pytest.approx(1)
    awac.advantage = lambda batch: 100.0 * (torch.arange(64) == 3)
    assert awac.diagnose(batch)["effective_share"].item() == pytest.approx(1 / 64)
