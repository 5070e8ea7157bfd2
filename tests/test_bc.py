"""saq_bc.py against answers that are known."""

import dataclasses

import pytest
import torch
from test_closed_forms import random_batch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from saq_bc import Args, DeterministicBC, DiscreteBC, GaussianBC, MixtureBC, learn
from vqvae import ActionVQVAE, Transitions, fit


def test_optimum_is_the_frequency_of_codes_in_each_state():
    """Four states, three codes, unequal counts: cross-entropy ends at the empirical conditional frequencies."""
    counts = torch.tensor([[1, 2, 5], [4, 4, 0], [0, 1, 0], [3, 3, 3]])
    rows = [(s, k) for s in range(4) for k in range(3) for _ in range(counts[s, k])]
    s, k = torch.tensor(rows).T
    obs, zeros = torch.eye(4)[s], torch.zeros(len(s))
    data = Transitions(obs, zeros[:, None], zeros, obs, zeros, k)
    agent = DiscreteBC(4, ActionVQVAE(4, 1, 3, hidden=(8,)), Args())
    for _ in range(600):
        agent.update(data)
    frequencies = counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(agent.actor(torch.eye(4)).softmax(1), frequencies, atol=0.02, rtol=0)


def test_using_the_prior_of_an_action_only_quantizer_hides_the_state():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,), action_only=True)
    agent = DiscreteBC(3, vqvae, dataclasses.replace(Args(), use_prior=True))
    assert agent.logits(torch.randn(4, 3)).std(0).max() < 1e-6


def test_two_modes_stay_two_modes():
    """Half of the actions are -0.8, half 0.8. Regression clones their mean, which nobody ever did; codes do not."""
    obs = torch.zeros(512, 2)
    actions = torch.where(torch.rand(512, 1) < 0.5, -0.8, 0.8)
    vqvae = ActionVQVAE(2, 1, 2, hidden=(32,), lr=3e-3)
    for _ in fit(vqvae, obs, actions, steps=400):
        pass
    zeros = torch.zeros(512)
    data = Transitions(obs, actions, zeros, obs, zeros, vqvae.encode(obs, actions))
    args = dataclasses.replace(Args(), steps=200, compile="off", act="sample", lr=1e-3)
    codes, regression = DiscreteBC(2, vqvae, args), DeterministicBC(2, 1, args)
    for agent in (codes, regression):
        for _ in learn(agent, data, args, 0):
            pass
    acted = codes.act(obs)
    assert (acted.abs() - 0.8).abs().max() < 0.05
    assert 0.4 < (acted > 0).float().mean() < 0.6
    assert regression.act(obs).abs().max() < 0.2


def test_regression_finds_the_mean():
    obs, actions = torch.ones(64, 2), torch.where(torch.arange(64) % 4 == 0, -0.8, 0.8)[:, None]
    batch = random_batch()._replace(obs=obs, actions=actions)
    regression = DeterministicBC(2, 1, dataclasses.replace(Args(), lr=1e-2))
    for _ in range(100):
        regression.update(batch)
    assert regression.act(obs[:1]).item() == pytest.approx(0.4, abs=0.02)


def test_using_the_prior_learns_nothing_more():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    agent = DiscreteBC(3, vqvae, dataclasses.replace(Args(), use_prior=True))
    before = [parameter.clone() for parameter in agent.parameters()]
    batch = random_batch()
    info = agent.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))
    expected = torch.nn.functional.cross_entropy(vqvae.prior_logits(batch.obs), batch.codes)
    torch.testing.assert_close(info["loss"], expected)


def test_gaussian_loss_is_the_density_of_the_squashed_action():
    """exp(-loss) integrates to one over [-1, 1], but for the ends that are clipped."""
    agent = GaussianBC(3, 1, Args())
    agent.actor[-1].bias.data.copy_(torch.tensor([0.3, 0.2]))
    grid = torch.linspace(-0.999, 0.999, 2001)[:, None]
    zeros = torch.zeros(1)
    density = []
    for action in grid:
        batch = Transitions(torch.zeros(1, 3), action[None], zeros, torch.zeros(1, 3), zeros, zeros.long())
        density.append(torch.exp(-agent.loss(batch)[0]).item())
    assert torch.trapezoid(torch.tensor(density), grid[:, 0]).item() == pytest.approx(1, abs=2e-3)


def test_gaussian_samples_only_when_asked():
    agent, obs = GaussianBC(3, 2, Args()), torch.randn(8, 3)
    assert torch.equal(agent.act(obs), agent.act(obs))
    agent.args = dataclasses.replace(agent.args, act="sample")
    assert not torch.equal(agent.act(obs), agent.act(obs))


def test_mixture_twin_against_torch():
    """Its loss is minus the log density of torch's mixture of independent Gaussians; it acts in three ways."""
    agent, batch = MixtureBC(3, 2, Args()), random_batch()
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.1)
    log_weight, mean, std = agent.distribution(batch.obs)
    assert mean.abs().max() <= 1
    assert std.min() >= 1e-4
    mixture = MixtureSameFamily(Categorical(logits=log_weight), Independent(Normal(mean, std), 1))
    torch.testing.assert_close(agent.loss(batch)[0], -mixture.log_prob(batch.actions).mean())
    best = torch.stack([mean[i, log_weight[i].argmax()] for i in range(len(mean))])
    assert torch.equal(agent.act(batch.obs), best)
    agent.args = dataclasses.replace(agent.args, act="mean", support=0.0)
    torch.testing.assert_close(agent.act(batch.obs), mixture.mean)
    agent.args.support = 1.0  # nothing but the likeliest is left
    torch.testing.assert_close(agent.act(batch.obs), best)
    agent.args.support = 0.0
    agent.args = dataclasses.replace(agent.args, act="sample")
    same = (agent.act(batch.obs)[:, None] == mean).all(-1)
    assert same.any(1).all()  # always the mean of one of the Gaussians, and not always of the same
    assert same.float().mean(0).max() < 1


def test_mixture_twin_finds_both_modes():
    obs, actions = torch.zeros(512, 2), torch.where(torch.rand(512, 1) < 0.5, -0.8, 0.8)
    zeros = torch.zeros(512)
    agent = MixtureBC(2, 1, dataclasses.replace(Args(), act="sample", lr=3e-3))
    data = Transitions(obs, actions, zeros, obs, zeros, zeros.long())
    for _ in range(400):
        agent.update(data)
    acted = agent.act(obs)
    assert (acted.abs() - 0.8).abs().max() < 0.05
    assert 0.3 < (acted > 0).float().mean() < 0.7
