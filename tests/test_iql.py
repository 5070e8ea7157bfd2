"""saq_iql.py against the authors' numbers and against answers that are known."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_closed_forms import random_batch
from test_parity import assert_same, batch, load_mlp, official

from saq_iql import FREE_TO_EVALUATE, Args, ContinuousIQL, DiscreteIQL, best_of, expectile, expectile_loss, learn
from vqvae import ActionVQVAE, Transitions, UserError, adamw, minimize, mlp

CRITIC = "VmapStateActionValue_0/MLP_0"


def agent(num_codes=8, **fields):
    return DiscreteIQL(3, ActionVQVAE(3, 2, num_codes, hidden=(8,)), dataclasses.replace(Args(), **fields))


# --- The authors' numbers ---


@pytest.fixture
def official_agent():
    args = dataclasses.replace(
        Args(), expectile=float(official("iql_out/expectile")), discount=float(official("iql_out/discount"))
    )
    agent = DiscreteIQL(5, ActionVQVAE(5, 3, 8, hidden=(8,)), args)
    agent.qf, agent.qf_target, agent.vf = mlp(5, 8, (24, 24)), mlp(5, 8, (24, 24)), mlp(5, 1, (24, 24))
    load_mlp(agent.vf, "iql_v/MLP_0")
    for network, name in [(agent.qf, "iql_q"), (agent.qf_target, "iql_q_target")]:
        with torch.no_grad():
            for i, layer in enumerate(network[::2]):
                layer.weight.copy_(official(f"{name}/{CRITIC}/Dense_{i}/kernel")[0].T)
                layer.bias.copy_(official(f"{name}/{CRITIC}/Dense_{i}/bias")[0])
    return agent


def test_v_loss_and_its_gradient(official_agent):
    loss, info = official_agent.v_loss(batch())
    loss.backward()
    assert_same(info["v_loss"], official("iql_out/value_loss"))
    for i, layer in enumerate(official_agent.vf[::2]):
        assert_same(layer.weight.grad, official(f"iql_v_grad/MLP_0/Dense_{i}/kernel").T)
        assert_same(layer.bias.grad, official(f"iql_v_grad/MLP_0/Dense_{i}/bias"))


def test_qf_loss_and_its_gradient(official_agent):
    loss, info = official_agent.qf_loss(batch())
    loss.backward()
    assert_same(info["qf_loss"], official("iql_out/critic_loss"))
    assert_same(info["q_data"], official("iql_out/q"))
    for i, layer in enumerate(official_agent.qf[::2]):
        assert_same(layer.weight.grad, official(f"iql_q_grad/{CRITIC}/Dense_{i}/kernel")[0].T)
        assert_same(layer.bias.grad, official(f"iql_q_grad/{CRITIC}/Dense_{i}/bias")[0])


# --- The expectile ---


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_exact_expectile_against_bisection(num_codes, tau, seed):
    """The v at which tau E[(q - v)+] = (1 - tau) E[(v - q)+]."""
    rng = np.random.default_rng(seed)
    q, p = rng.normal(0, 10, num_codes), rng.dirichlet(np.ones(num_codes))
    low, high = q.min(), q.max()
    for _ in range(100):
        v = (low + high) / 2
        too_low = tau * p @ np.maximum(q - v, 0) > (1 - tau) * p @ np.maximum(v - q, 0)
        low, high = (v, high) if too_low else (low, v)
    ours = expectile(torch.as_tensor(q)[None], torch.as_tensor(p)[None], tau).item()
    assert ours == pytest.approx(low, abs=1e-8)


def test_regression_finds_the_exact_expectile():
    """V, trained on samples of one state, ends where `expectile` says, for each tau."""
    q, p = torch.tensor([-1.0, 0.0, 2.0, 5.0]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    for tau in (0.3, 0.5, 0.7, 0.9):
        v = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-12)

        def closure(tau=tau, v=v, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p * torch.stack([expectile_loss(x - v, tau) for x in q])).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert v.item() == pytest.approx(expectile(q[None], p[None], tau).item(), abs=1e-4)


# --- EMaQ ---


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(0, 10_000))
@example(42, 114)  # where powers of equal numbers differ in their last bit, by their places in a row
def test_the_best_of_n_draws(num_codes, seed):
    """A distribution; of one draw, p itself; its mean of q rises with n, to the largest q that p allows."""
    rng = np.random.default_rng(seed)
    q = torch.as_tensor(rng.integers(-4, 5, (3, num_codes)))  # with ties
    p = torch.as_tensor(rng.dirichlet(np.ones(num_codes), 3)) * (torch.as_tensor(rng.random((3, num_codes))) < 0.7)
    p[:, 0] += 0.01
    p = p / p.sum(1, keepdim=True)
    means = [(best_of(q, p, n) * q).sum(1) for n in (1, 2, 3, 10, 100, 100_000)]
    torch.testing.assert_close(best_of(q, p, 1), p)
    for n in (1, 2, 10):
        torch.testing.assert_close(best_of(q, p, n).sum(1), torch.ones(3, dtype=torch.float64))
        assert (best_of(q, p, n)[p == 0] == 0).all()
    assert all((after - before).min() > -1e-9 for before, after in itertools.pairwise(means))
    largest = q.masked_fill(p < 1e-3, -99).amax(1)
    assert (means[-1] >= largest - 1e-6).all()


def test_rounding_makes_no_chance_negative():
    """Whose logarithm would be no number: powers of two sums that are equal may differ in their last bit."""
    torch.manual_seed(774)
    q, p = torch.randn(10, 7), (10 * torch.randn(10, 7)).softmax(1)
    assert (best_of(q, p, 10) >= 0).all()


def test_the_best_of_n_draws_against_drawing():
    torch.manual_seed(0)
    q, p = torch.randn(1, 6), torch.rand(1, 6).softmax(1)
    drawn = p.expand(200_000, 6).multinomial(4, replacement=True)
    best = drawn.gather(1, q[0][drawn].argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(best_of(q, p, 4)[0], best.bincount(minlength=6) / 200_000, atol=5e-3, rtol=0)


def test_emaq_in_value_and_policy():
    """The value draws from the prior, the policy from its support, whatever Q says of other codes; V is not trained."""
    iql = agent(best_of=5, support=0.5)
    obs = torch.randn(4, 3)
    iql.vqvae.prior[-1].bias.data[0] -= 100.0
    iql.qf[-1].bias.data[0] = iql.qf_target[-1].bias.data[0] = 1e6
    p = iql.vqvae.supported(obs, iql.vqvae.prior_logits(obs), 0.5).softmax(1)
    assert (p[:, 0] == 0).all()
    torch.testing.assert_close(iql.policy_logits(obs).softmax(1), best_of(iql.qf(obs), p, 5))
    prior, q = iql.vqvae.prior_logits(obs).softmax(1), iql.qf_target(obs)
    torch.testing.assert_close(iql.value(obs), (best_of(q, prior, 5) * q).sum(1))
    iql.vqvae.prior[-1].bias.data[1] -= 5.0  # a code with too little of the prior to act, which the value may draw
    iql.qf_target[-1].bias.data[1] += 1e3
    assert (iql.policy_logits(obs)[:, 1] == -torch.inf).all()
    assert (iql.value(obs) - (best_of(q, prior, 5) * q).sum(1)).min() > 1
    assert iql.value(obs).max() < 1e5
    before = copy.deepcopy(iql.vf.state_dict())
    assert "v_loss" not in iql.update(random_batch(16, 3, 2, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in iql.vf.state_dict().items())


def test_one_value_at_a_time():
    with pytest.raises(UserError, match="exclude each other"):
        agent(best_of=5, exact_expectile=True)


# --- The policy of Eq. 14 ---


@pytest.mark.parametrize("seed", range(5))
def test_policy_solves_the_constrained_problem(seed):
    """max_pi E_pi[A] - lambda KL(pi || p) over the distributions on 5 codes, solved by gradient ascent on logits."""
    torch.manual_seed(seed)
    iql = agent(num_codes=5, temperature=0.5, prior_floor=-100.0).double()
    iql.qf[-1].weight.data *= 5
    iql.vqvae.prior[-1].weight.data *= 5
    obs = torch.randn(1, 3).double()
    q, log_p = iql.qf(obs)[0].detach(), iql.vqvae.prior(obs).log_softmax(1)[0].detach()
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        log_pi = logits.log_softmax(0)
        loss = -(log_pi.exp() * (q - 0.5 * (log_pi - log_p))).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close(iql.policy_logits(obs).softmax(1)[0], logits.softmax(0), atol=1e-4, rtol=0)


def test_exact_expectile_gives_unseen_codes_no_weight():
    """The floor is for acting. In the value, a code the data never take must not count, whatever Q says of it."""
    iql = agent(num_codes=64, exact_expectile=True, expectile=0.9)
    iql.vqvae.prior[-1].bias.data[0] = 100.0
    iql.qf_target[-1].weight.data.zero_()
    iql.qf_target[-1].bias.data.fill_(20.0)
    iql.qf_target[-1].bias.data[0] = 10.0
    torch.testing.assert_close(iql.value(torch.randn(4, 3)), torch.full((4,), 10.0))


def test_prior_floor():
    iql = agent(prior_floor=-2.0)
    iql.vqvae.prior[-1].bias.data[0] = 50.0
    assert iql.log_prior(torch.randn(4, 3)).min() == -2.0


# --- Learning ---


@pytest.mark.parametrize("exact", [False, True])
def test_probe_environment(exact):
    """Two states: in the first, code 1 of the two codes (taken alike often) leads to the second, which pays 1 and ends;
    code 0 ends with 0.2. At a high expectile V(first) is about 0.9 and the policy takes code 1."""
    obs = torch.eye(2)[[0, 0, 1, 1]]
    data = Transitions(
        obs,
        torch.zeros(4, 1),
        torch.tensor([0.2, 0.0, 1.0, 1.0]),
        torch.eye(2)[[0, 1, 1, 1]],
        torch.tensor([1.0, 0.0, 1.0, 1.0]),
        torch.tensor([0, 1, 0, 1]),
    )
    args = dataclasses.replace(Args(), expectile=0.95, discount=0.9, steps=3000, batch_size=32, compile="off")
    args.temperature, args.polyak, args.exact_expectile, args.lr = 0.02, 0.05, exact, 1e-3
    iql = DiscreteIQL(2, ActionVQVAE(2, 1, 2, hidden=(8,)), args)
    iql.vf, iql.qf, iql.qf_target = mlp(2, 1, (32,)), mlp(2, 2, (32,)), mlp(2, 2, (32,))
    iql.vf_optimizer, iql.qf_optimizer = adamw(iql.vf.parameters(), args.lr), adamw(iql.qf.parameters(), args.lr)
    for _ in learn(iql, data, args, 0):
        pass
    torch.testing.assert_close(iql.qf(obs[:1])[0], torch.tensor([0.2, 0.9]), atol=0.05, rtol=0)
    expected = expectile(torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.5]]), 0.95).item()
    assert iql.value(obs[:1]).item() == pytest.approx(expected, abs=0.05)
    assert iql.policy_logits(obs[:1]).argmax(1).item() == 1


def test_v_moves_before_q():
    """The authors' order: Q's target in a step is already the new V."""
    iql, data = agent(), random_batch()
    old_v = iql.qf_loss(data)[1]["qf_loss"]
    new_v = copy.deepcopy(iql)
    minimize(*new_v.v_loss(data), new_v.vf_optimizer)
    info = iql.update(data)
    torch.testing.assert_close(info["qf_loss"], new_v.qf_loss(data)[1]["qf_loss"])
    assert info["qf_loss"] != old_v


def test_twin_weights_the_better_actions_more_and_clips():
    iql = ContinuousIQL(3, 2, dataclasses.replace(Args(), beta=1e6))
    batch = random_batch()
    adv = torch.tensor([-1.0, 1.0]).repeat(len(batch.obs) // 2)
    assert iql.actor_loss(batch, adv)[1]["weight"] == 50  # exp(beta A) is 0 for half of them, 100 for the others
    iql.args.beta = 0.0
    assert iql.actor_loss(batch, adv)[1]["weight"] == 1.0


def test_twin_updates_each_network_by_its_own_loss():
    """One joint step of policy and critics is what two separate ones would be."""
    iql, batch = ContinuousIQL(3, 2, Args()), random_batch()
    other = copy.deepcopy(iql)
    for optimizer, network in [("vf", other.vf), ("qf", other.qf), ("actor", other.actor)]:
        setattr(other, f"{optimizer}_optimizer", adamw(network.parameters(), 3e-4))
    iql.update(batch)
    q = other.q_target(batch)
    minimize(*other.v_loss(batch, q), other.vf_optimizer)
    with torch.no_grad():
        v, next_v = other.vf(batch.obs)[:, 0], other.vf(batch.next_obs)[:, 0]
    minimize(*other.actor_loss(batch, q - v), other.actor_optimizer)
    minimize(*other.qf_loss(batch, next_v), other.qf_optimizer)
    for ours, theirs in zip(iql.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_actor_density_integrates_to_one():
    iql = ContinuousIQL(3, 1, Args())
    grid = torch.linspace(-12, 12, 20_001)[:, None]
    density = iql.actor.log_prob(torch.zeros(len(grid), 3), grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_learning_rate_of_the_twins_policy_falls_along_a_cosine():
    """From the whole of it in the first step; after the last one it is 0, and stays."""
    iql = ContinuousIQL(3, 2, dataclasses.replace(Args(), steps=10))
    rates = []
    for _ in range(16):
        iql.update(random_batch())
        rates.append(iql.actor_optimizer.param_groups[0]["lr"].item())
    assert rates[0] == pytest.approx(3e-4)
    assert rates[5] == pytest.approx(1.5e-4)
    assert rates[10:] == pytest.approx([0] * 6, abs=1e-10)


def test_lambda_and_the_floor_are_about_acting_alone():
    """So a trained run may be asked for others; each of them does change what is done."""
    assert {"temperature", "prior_floor"} <= FREE_TO_EVALUATE
    agents, obs = [], torch.randn(9, 3)
    for fields in ({}, {"temperature": 50.0}, {"prior_floor": -0.5}):
        torch.manual_seed(0)
        agents.append(agent(**fields))
        for _ in range(3):
            agents[-1].update(random_batch())
    for other in agents[1:]:
        assert all(torch.equal(a, b) for a, b in zip(agents[0].parameters(), other.parameters(), strict=True))
        assert not torch.equal(other.policy_logits(obs), agents[0].policy_logits(obs))
