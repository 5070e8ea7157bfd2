"""How each discrete agent turns its policy into actions, and the continuous twins' losses by hand."""

import dataclasses

import pytest
import torch
from test_closed_forms import random_batch
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

import saq_bc
import saq_brac
import saq_iql
from saq_bc import DiscreteBC, GaussianBC
from saq_brac import ContinuousBRAC, DiscreteBRAC
from saq_iql import ContinuousIQL, DiscreteIQL
from vqvae import ActionVQVAE, minimize

POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4])  # what the agents below make of their networks
ACTIONS = torch.tensor([[-3.0], [0.0], [0.5], [0.9]])  # what the codes stand for


class FourCodes(ActionVQVAE):
    def __init__(self):
        super().__init__(3, 1, 4)

    def decode(self, obs, codes):
        return ACTIONS[codes]


def constant(network, value):
    """Makes a network return `value`, a number or one for each output, for every input."""
    network[-1].weight.data.zero_()
    network[-1].bias.data[:] = torch.as_tensor(value)


def agents(act):
    """Each discrete agent with networks from which POLICY follows, half from Q and half from the prior where it can."""
    iql = DiscreteIQL(3, FourCodes(), dataclasses.replace(saq_iql.Args(), act=act, temperature=2.0))
    constant(iql.qf, 2.0 * POLICY.log() / 2)
    constant(iql.vqvae.prior, POLICY.log() / 2)
    free = dataclasses.replace(saq_brac.Args(), act=act, actor_free=True, alpha=2.0, beta=2.0)
    brac_free = DiscreteBRAC(3, FourCodes(), free)
    for qf, more in zip(brac_free.qf, (0.0, 5.0), strict=True):  # the lower of the two counts
        constant(qf, 2.0 * POLICY.log() / 2 + more)
    constant(brac_free.vqvae.prior, POLICY.log() / 2)
    brac = DiscreteBRAC(3, FourCodes(), dataclasses.replace(saq_brac.Args(), act=act))
    constant(brac.actor, POLICY.log())
    bc = DiscreteBC(3, FourCodes(), dataclasses.replace(saq_bc.Args(), act=act))
    constant(bc.actor, POLICY.log())
    return {"iql": iql, "brac, actor-free": brac_free, "brac": brac, "bc": bc}


@pytest.mark.parametrize("name", agents("greedy"))
def test_greedy_and_sampled_actions(name):
    obs = torch.randn(40_000, 3)
    assert (agents("greedy")[name].act(obs) == 0.9).all()
    sampled = agents("sample")[name].act(obs)[:, 0]
    values = torch.tensor([-1.0, 0.0, 0.5, 0.9])  # code 0 is decoded to -3, outside the box
    frequencies = (sampled[:, None] == values).float().mean(0)
    torch.testing.assert_close(frequencies, POLICY, atol=0.015, rtol=0)


def batch_of_ends():
    """Rewards of 1; every second transition ends its episode."""
    return random_batch()._replace(rewards=torch.ones(64), terminals=torch.arange(64).float() % 2)


def two_critics(qf, target):
    """Constant critics: online 1 and 0, targets 4 and 3."""
    for low, (online, slow) in enumerate(zip(qf, target, strict=True)):
        constant(online, 1.0 - low)
        constant(slow, 4.0 - low)


def test_brac_twin_by_hand():
    args = dataclasses.replace(saq_brac.Args(), beta=3.0, discount=0.5, lr=0.0, steps=10, warm_up=0.2)
    brac = ContinuousBRAC(3, 2, args)
    two_critics([qf.net for qf in brac.qf], [qf.net for qf in brac.qf_target])
    brac.sample = lambda obs: (torch.zeros(len(obs), 2), torch.full((len(obs),), 0.5))  # a KL of 1/2
    goes_on, ends = 1 + 0.5 * (3 - 3 * 0.5), 1.0
    expected = sum(((q - goes_on) ** 2 + (q - ends) ** 2) / 2 for q in (1.0, 0.0))
    assert brac.qf_loss(batch_of_ends())[0].item() == pytest.approx(expected)
    assert brac.actor_loss(batch_of_ends())[0].item() == pytest.approx(3 * 0.5 - 0)
    del brac.sample
    brac.update(batch_of_ends())  # at a learning rate of 0 only the targets move
    targets = [qf.net[-1].bias.item() for qf in brac.qf_target]
    assert targets == pytest.approx([4 - 0.005 * 3, 3 - 0.005 * 3])
    constant(brac.actor.net, [0.5, -1.0, 0.0, 0.0])
    torch.testing.assert_close(brac.act(torch.randn(2, 3)), torch.tensor([0.5, -1.0]).tanh().expand(2, 2))


def test_brac_twin_follows_the_model_of_the_data_at_first():
    """For two of ten steps its policy is the model; then it goes its own way, at a tenth of the rate."""
    brac, batch = ContinuousBRAC(3, 2, dataclasses.replace(saq_brac.Args(), steps=10, warm_up=0.2)), random_batch()
    for step in range(1, 5):
        brac.update(batch)
        pairs = zip(brac.actor.parameters(), brac.behaviour.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (step <= 2)
    assert brac.actor_optimizer.defaults["initial_lr"] == pytest.approx(0.1 * brac.qf_optimizer.defaults["initial_lr"])


def test_a_warm_up_that_is_over_stays_over():
    """In a run that goes on with ten times the steps, too."""
    batch, args = random_batch(), dataclasses.replace(saq_brac.Args(), steps=10, warm_up=0.2)
    brac, longer = ContinuousBRAC(3, 2, args), ContinuousBRAC(3, 2, dataclasses.replace(args, steps=100))
    for _ in range(5):
        brac.update(batch)
    longer.load_state_dict(brac.state_dict())
    longer.update(batch)
    pairs = zip(longer.actor.parameters(), longer.behaviour.parameters(), strict=True)
    assert not any(torch.equal(policy, model) for policy, model in pairs)


def test_brac_twin_estimates_the_divergence_of_two_gaussians():
    """Of the squashed ones, which is that of the Gaussians before tanh: known in closed form."""
    brac = ContinuousBRAC(3, 2, saq_brac.Args())
    constant(brac.actor.net, [0.5, -1.0, 0.3, 0.8])
    constant(brac.behaviour.net, [0.2, -0.7, 1.0, 0.5])
    policy = Normal(torch.tensor([0.5, -1.0]), torch.tensor([0.3 - 1, 0.8 - 1]).exp())
    model = Normal(torch.tensor([0.2, -0.7]), torch.tensor([1.0 - 1, 0.5 - 1]).exp())
    squashed = [TransformedDistribution(gaussian, TanhTransform(cache_size=1)) for gaussian in (policy, model)]
    actions = squashed[0].sample((20_000,))
    by_density = (squashed[0].log_prob(actions) - squashed[1].log_prob(actions)).sum(-1).mean()
    expected = kl_divergence(policy, model).sum().item()
    assert by_density.item() == pytest.approx(expected, abs=0.03)
    actions, kl = brac.sample(torch.randn(4, 3), 20_000)
    assert actions.shape == (4, 2)
    assert kl.tolist() == pytest.approx([expected] * 4, abs=0.03)
    edge = random_batch()._replace(actions=torch.ones(64, 2))
    assert brac.behaviour_loss(edge)[0].isfinite()


def test_iql_twin_by_hand():
    iql = ContinuousIQL(3, 2, dataclasses.replace(saq_iql.Args(), discount=0.5, expectile=0.9, lr=0.0))
    two_critics(iql.qf, iql.qf_target)
    constant(iql.vf, 1.0)
    batch = batch_of_ends()
    q = iql.q_target(batch)
    assert (q == 3).all()
    assert iql.v_loss(batch, q)[0].item() == pytest.approx(0.9 * 2**2)  # Q is above V
    assert iql.v_loss(batch, q - 4)[0].item() == pytest.approx(0.1 * 2**2)  # below
    goes_on, ends = 1 + 0.5 * 2, 1.0
    expected = sum(((q - goes_on) ** 2 + (q - ends) ** 2) / 2 for q in (1.0, 0.0))
    assert iql.qf_loss(batch, torch.full((64,), 2.0))[0].item() == pytest.approx(expected)
    iql.update(batch)  # at a learning rate of 0 only the targets move
    assert iql.q_target(batch).mean().item() == pytest.approx(3 - 0.005 * 3)
    constant(iql.actor.net, [0.5, -1.0])
    torch.testing.assert_close(iql.act(torch.randn(2, 3)), torch.tensor([0.5, -1.0]).tanh().expand(2, 2))


def test_iql_twin_learns_the_weighted_mean():
    """Where half of the data have an advantage, the policy's mode moves to their action."""
    iql = ContinuousIQL(3, 1, dataclasses.replace(saq_iql.Args(), beta=2.0, lr=1e-2))
    better = torch.arange(64) % 2 == 0
    batch = random_batch()._replace(obs=torch.zeros(64, 3), actions=torch.where(better, 0.5, -0.5)[:, None])
    for _ in range(300):
        minimize(*iql.actor_loss(batch, better.float()), iql.actor_optimizer)
    weights = torch.tensor([2.0, 0.0]).exp()
    expected = 0.5 * (weights[0] - weights[1]) / weights.sum()
    assert iql.act(torch.zeros(1, 3)).item() == pytest.approx(expected.item(), abs=0.01)


def test_gaussian_twin_acts_by_its_mode():
    gaussian = GaussianBC(3, 2, dataclasses.replace(saq_bc.Args(), act="greedy"))
    constant(gaussian.actor, [0.5, -1.0, 0.0, -1.0])
    _, log_std = gaussian.distribution(torch.randn(2, 3))
    torch.testing.assert_close(log_std[0], torch.tensor([-1.0, -2.0]))
    torch.testing.assert_close(gaussian.act(torch.randn(2, 3)), torch.tensor([0.5, -1.0]).tanh().expand(2, 2))
