"""baselines/fql.py against the formulas of its paper, written again, and against answers that are known."""

import copy
import dataclasses

import pytest
import torch
from test_closed_forms import random_batch

from baselines.fql import FQL, IFQL, Args, Flow, defaults, make_agents


def arguments(**fields):
    return dataclasses.replace(Args(), **{"width": 16} | fields)


def random_terminals(size=64):
    return random_batch(size=size)._replace(terminals=(torch.arange(size) % 3 == 0).float())


def by_hand(network, x):
    """Dense -> GELU -> LayerNorm (where there is one), and a last Dense."""
    for layer in network:
        if isinstance(layer, torch.nn.GELU):
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        elif layer.weight.ndim == 1:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x * layer.weight + layer.bias
        else:
            x = x @ layer.weight.T + layer.bias
    return x


def compare(ours, expected, network):
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, list(network.parameters())) for loss in (ours, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("normalize_q", [False, True])
@pytest.mark.parametrize("pessimistic", [False, True])
def test_losses_and_gradients_are_those_of_the_paper(normalize_q, pessimistic, monkeypatch):
    fields = dict(alpha=7.0, normalize_q=normalize_q, pessimistic=pessimistic, flow_steps=10)
    agent = FQL(3, 2, arguments(**fields)).double()
    batch = type(random_batch())(
        *(column.double() if column.is_floating_point() else column for column in random_terminals())
    )
    z, noise, t = torch.randn(64, 2).double(), torch.randn(64, 2).double(), torch.rand(64, 1).double()
    agent.noise = lambda obs: z
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: t)

    def q(critics, obs, actions):
        return torch.stack([by_hand(net, torch.cat([obs, actions], 1))[:, 0] for net in critics.nets])

    def mu(obs):
        return by_hand(agent.actor, torch.cat([obs, z], 1))

    with torch.no_grad():
        next_q = q(agent.qf_target, batch.next_obs, mu(batch.next_obs).clamp(-1, 1))
        y = batch.rewards + 0.99 * (1 - batch.terminals) * (next_q.amin(0) if pessimistic else next_q.mean(0))
    expected = ((q(agent.qf, batch.obs, batch.actions) - y) ** 2).mean()
    compare(agent.qf_loss(batch)[0], expected, agent.qf)

    x = z
    with torch.no_grad():
        for i in range(10):
            at = torch.full((64, 1), i / 10).double()
            x = x + by_hand(agent.flow.net, torch.cat([batch.obs, x, at], 1)) / 10
    x_t = (1 - t) * noise + t * batch.actions
    velocity = by_hand(agent.flow.net, torch.cat([batch.obs, x_t, t], 1))
    expected = ((velocity - (batch.actions - noise)) ** 2).mean()
    expected = expected + 7 * ((mu(batch.obs) - x.clamp(-1, 1)) ** 2).mean()
    values = q(agent.qf, batch.obs, mu(batch.obs).clamp(-1, 1)).mean(0)
    expected = expected - values.mean() / (values.abs().mean().detach() if normalize_q else 1)
    compare(agent.actor_loss(batch)[0], expected, torch.nn.ModuleList([agent.flow, agent.actor]))


def test_an_update_moves_every_network():
    agent, batch = FQL(3, 2, arguments()), random_terminals()
    before = copy.deepcopy(agent)
    agent.update(batch)
    for name, parameter in agent.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2 and "target" not in name:
            assert not torch.equal(parameter, dict(before.named_parameters())[name]), name


@pytest.mark.parametrize("name", ["fql", "ifql"])
def test_every_gradient_is_of_networks_before_the_step(name):
    """At a learning rate at which it matters: fused Adam changes weights that a graph still needs, and says nothing."""
    agent, batch = make_agents(3, 2, arguments(lr=0.1))[name], random_terminals()
    torch.manual_seed(0)
    if name == "fql":
        losses = [(agent.qf_loss(batch)[0], agent.qf), (agent.actor_loss(batch)[0], agent.actor)]
    else:
        losses = [(agent.flow.loss(batch.obs, batch.actions), agent.flow), (agent.v_loss(batch)[0], agent.vf)]
        losses += [(agent.qf_loss(batch)[0], agent.qf)]
    expected = {}
    for loss, network in losses:
        parameters = list(network.parameters())
        expected |= zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True)
    torch.manual_seed(0)
    agent.update(batch)
    states = [part.state for part in vars(agent).values() if isinstance(part, torch.optim.Optimizer)]
    for parameter, gradient in expected.items():
        (state,) = (state[parameter] for state in states if parameter in state)
        torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, atol=1e-7, rtol=1e-4)  # Adam's first average


def test_a_constant_velocity_carries_noise_along_a_straight_line():
    flow = Flow(3, 2, arguments(flow_steps=7))
    flow.velocity = lambda obs, x, t: torch.tensor([0.4, -3.0]).expand(len(obs), 2)
    z = 0.3 * torch.rand(20, 2)
    expected = (z + torch.tensor([0.4, -3.0])).clamp(-1, 1)
    torch.testing.assert_close(flow.follow(torch.zeros(20, 3), z), expected)


def two_modes(agent, steps=1500):
    obs, actions = torch.zeros(256, 1), torch.where(torch.arange(256) % 4 == 0, -0.8, 0.8)[:, None]
    batch = random_batch(size=256)._replace(
        obs=obs, next_obs=obs, actions=actions, rewards=torch.ones(256), terminals=torch.ones(256)
    )
    for _ in range(steps):
        agent.update(batch)
    return agent.act(torch.zeros(2000, 1))[:, 0]


@pytest.mark.parametrize("name", ["fql", "ifql"])
def test_two_modes_stay_two_modes(name):
    """A quarter of the data at -0.8, the rest at 0.8, all paid alike: nothing acts in the middle."""
    args = arguments(width=64, lr=2e-3, alpha=30.0, candidates=1)
    acted = two_modes(make_agents(1, 1, args)[name])
    assert (acted.abs() > 0.5).float().mean() > 0.9
    assert (acted > 0).float().mean().item() == pytest.approx(0.75, abs=0.12)


def test_the_best_of_many_candidates_acts():
    agent = IFQL(1, 1, arguments(candidates=500))
    agent.flow.follow = lambda obs, z: z.clamp(-1, 1)
    agent.qf.forward = lambda obs, actions: -((actions - 0.37) ** 2).sum(1).expand(2, -1)
    torch.testing.assert_close(agent.act(torch.zeros(8, 1)), torch.full((8, 1), 0.37), atol=0.05, rtol=0)


def test_critics_of_ifql_by_hand():
    agent, batch = IFQL(3, 2, arguments(discount=0.5)), random_terminals()
    y = (batch.rewards + 0.5 * (1 - batch.terminals) * agent.vf(batch.next_obs)[:, 0]).detach()
    compare(agent.qf_loss(batch)[0], (agent.qf(batch.obs, batch.actions) - y).square().mean(), agent.qf)


def test_v_is_the_expectile_of_q_over_the_data():
    """One state, whose actions have Q of 0 and 1 alike often: V solves tau (1 - V) = (1 - tau) V."""
    agent = IFQL(1, 1, arguments(expectile=0.8, lr=1e-2))
    batch = random_batch(size=64)._replace(obs=torch.zeros(64, 1), actions=(torch.arange(64.0) % 2)[:, None])
    agent.qf_target.forward = lambda obs, actions: torch.stack([actions[:, 0], actions[:, 0] + 1])
    for _ in range(300):
        agent.v_loss(batch)[0].backward()
        agent.vf_optimizer.step()
        agent.vf_optimizer.zero_grad()
    assert agent.vf(torch.zeros(1, 1)).item() == pytest.approx(0.8, abs=0.02)


ALPHAS = {  # the authors'
    "antmaze-medium-play-v2": 10,
    "antmaze-large-diverse-v2": 3,
    "pen-human-v1": 10_000,
    "pen-cloned-v1": 10_000,
    "pen-expert-v1": 3_000,
    "door-human-v0": 30_000,
    "door-expert-v1": 30_000,
    "hammer-human-v1": 30_000,
    "hammer-cloned-v1": 10_000,
    "hammer-expert-v1": 30_000,
    "relocate-human-v1": 10_000,
    "relocate-cloned-v1": 30_000,
    "relocate-expert-v1": 30_000,
}


@pytest.mark.parametrize("task", ALPHAS)
def test_weights_by_task(task):
    """The lower critic in adroit alone; Q as it is in both suites."""
    args = defaults(task)
    assert (args.alpha, args.normalize_q, args.pessimistic) == (ALPHAS[task], False, "antmaze" not in task)
    assert args.reward_shift == (-1 if "antmaze" in task else 0)
