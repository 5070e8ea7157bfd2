"""saq_bc.py against answers that are known."""

import dataclasses

import pytest
import torch
from test_closed_forms import random_batch

from saq_bc import Args, DeterministicBC, DiscreteBC, GaussianBC, learn
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


def test_using_the_prior_trains_no_second_network():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    assert not any(name.startswith("logits") for name in DiscreteBC(3, vqvae, Args()).state_dict())  # stored once
    agent = DiscreteBC(3, vqvae, dataclasses.replace(Args(), use_prior=True))
    assert agent.actor is vqvae.prior
    before = [p.clone() for p in (*vqvae.encoder.parameters(), *vqvae.decoder.parameters(), vqvae.codebook)]
    agent.update(random_batch())
    after = (*vqvae.encoder.parameters(), *vqvae.decoder.parameters(), vqvae.codebook)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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
