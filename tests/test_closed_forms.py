"""Losses, estimators and the quantizer against answers that are known in closed form."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import vqvae as vqvae_module
from saq_cql import Actor, Args, ContinuousCQL, DiscreteCQL, exact_log_z, learn
from vqvae import (
    ActionVQVAE,
    Aquadem,
    Mixture,
    Transitions,
    adamw,
    codebook_health,
    describe_health,
    fit,
    make_transitions,
    mlp,
    polyak_update,
    revive_dead_codes,
)

CPU = torch.device("cpu")


def random_batch(size=64, obs_dim=3, action_dim=2, num_codes=8):
    obs, next_obs = torch.randn(2, size, obs_dim)
    actions = torch.rand(size, action_dim) * 2 - 1
    return Transitions(obs, actions, torch.randn(size), next_obs, torch.zeros(size), torch.randint(num_codes, (size,)))


# --- SAQ-CQL ---


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.floats(0.1, 30))
def test_penalty_is_the_cross_entropy_of_softmax_q(num_codes, scale):
    """Eq. 12 of the paper."""
    batch = random_batch(num_codes=num_codes)
    agent = DiscreteCQL(3, ActionVQVAE(3, 2, num_codes, hidden=(8,)), Args())
    agent.qf[-1].weight.data *= scale
    expected = F.cross_entropy(agent.qf(batch.obs), batch.codes)
    torch.testing.assert_close(agent.loss(batch)[1]["penalty"], expected)


def test_td_loss_by_hand():
    """Double DQN, one transition at a time: the network chooses, the target rates, terminals do not bootstrap."""
    batch = random_batch()._replace(terminals=(torch.rand(64) < 0.5).float())
    agent = DiscreteCQL(3, ActionVQVAE(3, 2, 8, hidden=(8,)), Args())
    agent.qf_target = mlp(3, 8)
    errors = []
    for i in range(64):
        chosen = agent.qf(batch.next_obs[i]).argmax()
        bootstrap = agent.qf_target(batch.next_obs[i])[chosen] if batch.terminals[i] == 0 else 0.0
        errors.append(agent.qf(batch.obs[i])[batch.codes[i]] - batch.rewards[i] - 0.99 * bootstrap)
    torch.testing.assert_close(
        agent.loss(batch)[1]["td_loss"], torch.stack(errors).square().mean(), rtol=1e-4, atol=1e-5
    )


def test_chain_mdp():
    """Five states in a row, codes 0 = left and 1 = right, reward 1 for stepping right in the last state, which ends
    the episode. With alpha = 0, Q is value iteration's, 0.9^(steps to go), and acting on it greedily is optimal."""
    states, discount = 5, 0.9
    s, a = (x.flatten() for x in torch.meshgrid(torch.arange(states), torch.arange(2), indexing="ij"))
    next_s = (s + 2 * a - 1).clamp(0, states - 1)
    done = ((s == states - 1) & (a == 1)).float()
    one_hot = torch.eye(states)
    data = Transitions(one_hot[s], torch.zeros(len(s), 1), done, one_hot[next_s], done, a)
    args = dataclasses.replace(Args(), alpha=0.0, discount=discount, steps=3000, lr=1e-3, average=0.0, compile="off")
    args.batch_size, args.target_every = 32, 20
    agent = DiscreteCQL(states, ActionVQVAE(states, 1, 2, hidden=(8,)), args)
    agent.qf, agent.qf_target = mlp(states, 2, (64,)), mlp(states, 2, (64,))
    agent.optimizer = adamw(agent.qf.parameters(), 1e-3)
    for _ in learn(agent, data, args, 0):
        pass
    optimal = torch.zeros(states, 2)
    for _ in range(200):
        bootstrap = optimal.max(1).values[next_s]
        optimal = (done + discount * (1 - done) * bootstrap).reshape(states, 2)
    torch.testing.assert_close(optimal[0, 1].item(), discount**4, rtol=1e-5, atol=0)
    assert (agent.qf(one_hot) - optimal).abs().max() < 0.03
    state, steps = 0, 0
    while state < states and steps < 10:
        state, steps = state + (1 if agent.qf(one_hot[state]).argmax() == 1 else -1), steps + 1
    assert (state, steps) == (states, 5)


def test_acting_decodes_the_best_code_and_clips():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    vqvae.decoder[-1].bias.data += torch.tensor([3.0, -3.0])
    agent = DiscreteCQL(3, vqvae, dataclasses.replace(Args(), average=0.0))
    obs = torch.randn(16, 3)
    torch.testing.assert_close(agent.act(obs), vqvae.decode(obs, agent.qf(obs).argmax(1)).clamp(-1, 1))
    assert agent.act(obs).abs().max() == 1


def test_the_average_of_the_network_acts():
    agent = DiscreteCQL(3, ActionVQVAE(3, 2, 8, hidden=(8,)), dataclasses.replace(Args(), support=0.0, act="greedy"))
    agent.qf[-1].bias.data[3] = agent.qf_average[-1].bias.data[5] = 9.0
    obs = torch.randn(4, 3)
    assert torch.equal(agent.act(obs), agent.vqvae.decode(obs, torch.full((4,), 5)).clamp(-1, 1))


def test_acting_by_sampling_follows_softmax_q():
    vqvae = ActionVQVAE(3, 1, 4, hidden=(8,))
    vqvae.decode = lambda obs, codes: codes[:, None] / 10
    agent = DiscreteCQL(3, vqvae, dataclasses.replace(Args(), average=0.0, act="sample"))
    agent.qf[-1].bias.data.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
    obs = torch.randn(1, 3).expand(20_000, 3)
    frequencies = torch.bincount((agent.act(obs)[:, 0] * 10).round().long(), minlength=4) / 20_000
    torch.testing.assert_close(frequencies, agent.qf(obs[0]).softmax(0), atol=0.02, rtol=0)


def test_acting_by_the_mean():
    """The expected action: a sum over codes one by one, linear in the policy, greedy where the policy is certain."""
    vqvae, obs = ActionVQVAE(3, 2, 8, hidden=(8,)), torch.randn(16, 3)
    torch.nn.init.normal_(vqvae.decoder[-1].weight, std=0.3)
    decoded = [vqvae.decode(obs, torch.full((16,), k)) for k in range(8)]
    torch.testing.assert_close(vqvae.candidates(obs), torch.stack(decoded, 1))
    one, other = torch.rand(2, 16, 8).softmax(-1)
    policies = {"one": one, "other": other, "half": (one + other) / 2}
    mean = {name: vqvae.act(obs, policy.log(), "mean") for name, policy in policies.items()}
    torch.testing.assert_close(mean["one"], sum(one[:, k, None] * decoded[k] for k in range(8)))
    torch.testing.assert_close(mean["half"], (mean["one"] + mean["other"]) / 2)
    certain = 100 * torch.nn.functional.one_hot(torch.randint(8, (16,)), 8).float()
    torch.testing.assert_close(vqvae.act(obs, certain, "mean"), vqvae.act(obs, certain, "greedy"))
    vqvae.decoder[-1].bias.data += 9
    assert vqvae.act(obs, certain, "mean").eq(1).all()


def test_targets_are_copied_and_averaged():
    """Inside `update`: the target every third step, the average at a rate of 1 / step that falls to 0.25."""
    args = dataclasses.replace(Args(), target_every=3, average=0.25)
    agent = DiscreteCQL(3, ActionVQVAE(3, 2, 8, hidden=(8,)), args)
    first, steps = agent.qf[0].weight.clone(), []
    for step in range(1, 7):
        before = agent.qf_average[0].weight.clone()
        agent.update(random_batch())
        steps.append(agent.qf[0].weight.clone())
        mean = torch.stack(steps).mean(0) if step <= 4 else 0.75 * before + 0.25 * steps[-1]
        torch.testing.assert_close(agent.qf_average[0].weight, mean)
        assert torch.equal(agent.qf_target[0].weight, [first, *steps][step // 3 * 3])
    assert (agent.step.item(), agent.step.dtype) == (6, torch.float64)


def test_polyak_update():
    slow, fast = mlp(2, 2, (4,)), mlp(2, 2, (4,))
    expected = [0.9 * s + 0.1 * f for s, f in zip(slow.parameters(), fast.parameters(), strict=True)]
    polyak_update(slow, fast, 0.1)
    for got, want in zip(slow.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)


# --- Continuous CQL ---


@pytest.mark.parametrize(
    ("q", "log_z"),
    [
        (lambda a: 0 * a[..., 0], 1.3863),
        (lambda a: -2 * a.square().sum(-1), 0.3585),
        (lambda a: 5 * torch.exp(-(a - 0.5).square().sum(-1) / 0.02), 1.8543),
        (lambda a: 20 * a[..., 0], 17.6964),
    ],
)
def test_quadrature(q, log_z):
    """Integrals over the square that are known: a constant, a Gaussian, a narrow peak, a steep ramp."""
    grid = 256 if log_z > 10 else 64
    got = exact_log_z(lambda obs, actions: q(actions).expand(len(actions), len(obs)), torch.zeros(3, 1), grid)
    assert got.shape == (3,)
    assert got[0].item() == pytest.approx(log_z, abs=2e-3)


def test_sampled_penalty_converges_where_the_policy_covers_the_box():
    """With a policy close to uniform, the importance-weighted estimate tends to the integral as samples grow."""
    args = dataclasses.replace(Args(), cql_samples=4000)
    agent = ContinuousCQL(3, 2, args)
    agent.actor.net[-1].bias.data[2:] = 0.6  # log_std of about -0.4: broad after the tanh
    for qf in agent.qf:
        qf.net[-1].weight.data *= 20
    info = agent.diagnose(random_batch(size=8))
    assert info["penalty_sampled"].item() == pytest.approx(info["penalty_exact"].item(), abs=0.02)


def test_sampled_penalty_is_too_low_for_a_narrow_policy():
    """The mixture then spends two thirds of its samples on a point, and the estimate falls by about log 3."""
    agent = ContinuousCQL(3, 2, dataclasses.replace(Args(), cql_samples=4000))
    agent.actor.net[-1].bias.data[2:] = -7.0
    info = agent.diagnose(random_batch(size=8))
    assert info["penalty_sampled"].item() - info["penalty_exact"].item() == pytest.approx(-math.log(3), abs=0.1)


def test_actor_density_integrates_to_one():
    actor = Actor(3, 1)
    actor.net[-1].bias.data.copy_(torch.tensor([0.3, 0.5]))
    obs = torch.randn(1, 3)
    actions, log_prob = actor.sample(obs, 200_000)
    # E[1 / density] over the policy's own samples is the volume of the box.
    inside = actions[:, 0, 0].abs() < 0.9
    volume = (torch.exp(-log_prob[:, 0]) * inside).mean().item()
    assert volume == pytest.approx(1.8, rel=0.02)


def test_continuous_td_target_uses_the_lower_target_critic():
    agent = ContinuousCQL(3, 2, dataclasses.replace(Args(), cql_alpha=0.0, discount=0.5))
    for low, qf in enumerate(agent.qf_target):
        qf.net[-1].weight.data.zero_()
        qf.net[-1].bias.data.fill_(4.0 - 2 * low)
    for qf in agent.qf:
        qf.net[-1].weight.data.zero_()
    batch = random_batch()._replace(rewards=torch.ones(64), terminals=torch.arange(64).float() % 2)
    # Targets are 1 + 0.5 * min(4, 2) = 2 where the episode goes on and 1 where it ends; both critics say 0.
    loss, _ = agent.qf_loss(batch)
    assert loss.item() == pytest.approx(2 * (4 + 1) / 2, rel=1e-5)


def test_continuous_losses_by_hand():
    """The critics' penalty on fixed samples; the policy's loss, and what its temperature is moved by."""
    agent, batch = ContinuousCQL(3, 2, dataclasses.replace(Args(), cql_alpha=2.0)), random_batch()
    for parameter in agent.qf.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    samples, log_prob = agent.penalty_samples(batch)
    agent.penalty_samples = lambda batch: (samples, log_prob)
    expected = 0.0
    for qf in agent.qf:
        weighted = [(qf(batch.obs, x[None])[0] - log_p).exp() for x, log_p in zip(samples, log_prob, strict=True)]
        expected += (torch.stack(weighted).sum(0).log() - qf(batch.obs, batch.actions[None])[0]).mean()
    loss, info = agent.qf_loss(batch)
    torch.testing.assert_close(info["penalty"], expected.detach())
    torch.testing.assert_close(loss, info["td_loss"] + 2 * expected)
    actions, log_prob = agent.actor.sample(batch.obs, 1)
    agent.actor.sample = lambda obs, n: (actions, log_prob)
    agent.log_temperature.data.fill_(0.7)
    q = torch.minimum(*(qf(batch.obs, actions) for qf in agent.qf))
    loss = agent.actor_loss(batch)[0]
    torch.testing.assert_close(loss, (math.exp(0.7) * log_prob - q).mean() - 0.7 * (log_prob.mean() - 2))
    (gradient,) = torch.autograd.grad(loss, agent.log_temperature)
    torch.testing.assert_close(gradient, 2 - log_prob.mean().detach())


def test_actor_loss_leaves_the_critics_alone():
    agent, batch = ContinuousCQL(3, 2, Args()), random_batch()
    agent.update(batch)
    assert all(parameter.grad is None for parameter in agent.parameters())


# --- The quantizer ---


def test_initialisation():
    network = mlp(400, 64)
    assert network[0].weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert network[0].weight.abs().max() <= 2 * 400**-0.5 / 0.8796
    assert network[-1].weight.abs().max().item() == pytest.approx((0.03 / 512) ** 0.5, rel=0.01)
    assert all((layer.bias == 0).all() for layer in network[::2])
    for num_codes in (4, 64):
        assert ActionVQVAE(3, 2, num_codes).codebook.abs().max().item() == pytest.approx(
            (3 / num_codes) ** 0.5, rel=0.02
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 100))
def test_nearest_code_by_brute_force(num_codes, code_dim, size):
    vqvae = ActionVQVAE(3, 2, num_codes, code_dim=code_dim, hidden=(8,))
    z = torch.randn(size, code_dim)
    distances = torch.cdist(z.double(), vqvae.codebook.double())
    chosen = distances.gather(1, vqvae.nearest(z)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-4, atol=1e-4)


def test_action_only_ignores_the_state_everywhere():
    vqvae = ActionVQVAE(3, 2, 8, action_only=True)
    obs, other, actions = torch.randn(32, 3), torch.randn(32, 3), torch.rand(32, 2)
    assert torch.equal(vqvae.encode(obs, actions), vqvae.encode(other, actions))
    codes = vqvae.encode(obs, actions)
    assert torch.equal(vqvae.decode(obs, codes), vqvae.decode(other, codes))
    assert torch.equal(vqvae.prior_logits(obs), vqvae.prior_logits(other))
    assert not torch.equal(ActionVQVAE(3, 2, 8).prior_logits(obs), ActionVQVAE(3, 2, 8).prior_logits(other))


def test_dead_codes_are_revived_and_living_ones_stay():
    vqvae = ActionVQVAE(3, 2, 8)
    obs, actions = torch.randn(512, 3), torch.rand(512, 2)
    z = vqvae.embed(obs, actions)
    vqvae.codebook.data[:2] = z[:2].detach()
    vqvae.codebook.data[2:] = 1e3
    before = vqvae.codebook.detach().clone()
    assert revive_dead_codes(vqvae, obs, actions) == 6
    assert torch.equal(vqvae.codebook[:2], before[:2])
    assert (torch.cdist(vqvae.codebook[2:], z).min(1).values < 1e-3).all()


def test_when_codes_are_revived(monkeypatch):
    """Every so many steps, of the first 90%; 0: never; of a VQ-VAE alone."""
    obs, actions, seen = torch.randn(64, 3), torch.rand(64, 2), []
    monkeypatch.setattr(vqvae_module, "revive_dead_codes", lambda *_: seen.append(len(done) + 1))
    for quantizer, every, expected in [
        (ActionVQVAE(3, 2, 4, hidden=(8,)), 4, [4, 8, 12, 16]),
        (ActionVQVAE(3, 2, 4, hidden=(8,)), 5, [5, 10, 15]),
        (ActionVQVAE(3, 2, 4, hidden=(8,)), 0, []),
        (Mixture(3, 2, 4), 4, []),
    ]:
        done, seen[:] = [], []
        for info in fit(quantizer, obs, actions, steps=20, batch_size=8, revive_every=every):
            done.append(info)
        assert seen == expected


@pytest.mark.parametrize("kind", [ActionVQVAE, Mixture, Aquadem])
def test_a_dataset_is_encoded_row_by_row(kind):
    quantizer, obs, actions = kind(3, 2, 8), torch.randn(50, 3), torch.rand(50, 2)
    codes = quantizer.encode(obs, actions)
    assert len(codes.unique()) > 1
    assert torch.equal(quantizer.encode_dataset(obs, actions, chunk=7), codes)


def test_noise_is_on_observations_alone_and_drawn_anew(monkeypatch):
    n, seen = 5_000, []
    data = Transitions(torch.zeros(n, 3), torch.zeros(n, 2), *torch.zeros(1, n), torch.zeros(n, 3), *torch.zeros(2, n))
    vqvae = ActionVQVAE(3, 2, 4, hidden=(8,))
    monkeypatch.setattr(vqvae, "update", lambda *batch: seen.append(batch))
    list(fit(vqvae, data.obs, data.actions, steps=2, batch_size=n, revive_every=0, noise=0.5))
    batch = data.sample(n, 0.5)
    drawn = [seen[0][0], seen[1][0], batch.obs, batch.next_obs]
    for i, noise in enumerate(drawn):
        assert noise.std().item() == pytest.approx(0.5, rel=0.02)
        assert all(abs((noise * other).mean()) < 0.02 for other in drawn[:i])
    assert not any(column.any() for column in (seen[0][1], batch.actions, batch.rewards, batch.terminals, batch.codes))
    assert not data.sample(n).obs.any()
    agent, args = SimpleNamespace(update=seen.append), dataclasses.replace(Args(), batch_size=n, obs_noise=0.5)
    next(learn(agent, data, dataclasses.replace(args, compile="off", decay=False), 0))  # what trains an agent
    assert seen[-1].obs.std().item() == pytest.approx(0.5, rel=0.02)


def test_fit_separates_two_modes_of_action():
    """Two actions, chosen by a coin in every state: two codes are enough to reconstruct them, one code is not."""
    obs = torch.randn(2000, 2)
    signs = torch.randint(2, (2000, 1)) * 2.0 - 1
    actions = signs * 0.8 * obs[:, :1].sign()
    errors = []
    for num_codes in (1, 2):
        vqvae = ActionVQVAE(2, 1, num_codes, hidden=(64, 64))
        for _ in fit(vqvae, obs, actions, steps=600):
            pass
        errors.append(codebook_health(vqvae, obs, actions)["reconstruction_error"])
    assert errors[0] > 0.5
    assert errors[1] < 0.05


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate_of_the_fit(decay):
    vqvae, obs = ActionVQVAE(3, 2, 4, hidden=(8,), lr=1e-3), torch.randn(64, 3)
    rates = []
    for _ in fit(vqvae, obs, obs[:, :2].tanh(), steps=10, decay=decay):
        rates.append(vqvae.optimizer.param_groups[0]["lr"].item())
    assert rates[4] == pytest.approx(5e-4 if decay else 1e-3)
    assert rates[-1] == pytest.approx(0 if decay else 1e-3, abs=1e-10)


def test_codebook_health_of_known_codes():
    vqvae = ActionVQVAE(1, 2, 4)
    vqvae.encode = lambda obs, actions: (torch.arange(len(obs)) % 2).long()
    vqvae.decode = lambda obs, codes: torch.zeros(*codes.shape, 2)
    prior = torch.tensor([0.5, 0.3, 0.2, 1e-9])
    vqvae.prior_logits = lambda obs: prior.log().expand(len(obs), 4)
    health = codebook_health(vqvae, torch.zeros(6000, 1), torch.tensor([[1.0, 0.5]]).expand(6000, 2))
    assert health["used"] == 0.5
    assert health["perplexity"] == pytest.approx(2)
    assert health["per_state"] == pytest.approx(math.exp(-(prior * prior.log()).sum()), rel=1e-4)
    assert health["persistence"] == pytest.approx(1)  # all actions differ from the mean, 0, in the same way
    assert health["reconstruction_error"] == pytest.approx((1 + 0.25) / 2, rel=1e-4)
    assert health["reconstruction_error_a1"] == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_persistence_is_the_correlation_of_neighbours(rate):
    """Of an autoregressive process of that rate around the codes' mean."""
    noise, rows = torch.randn(20_000, 2), [torch.zeros(2)]
    for row in noise[1:]:
        rows.append(rate * rows[-1] + (1 - rate**2) ** 0.5 * row)
    vqvae = ActionVQVAE(1, 2, 4)
    vqvae.decode = lambda obs, codes: torch.full((*codes.shape, 2), 0.3)
    health = codebook_health(vqvae, torch.zeros(20_000, 1), 0.3 + torch.stack(rows))
    assert health["persistence"] == pytest.approx(rate, abs=0.1)


def test_codebooks_in_trouble_are_announced():
    health = {"used": 0.4, "perplexity": 3.0, "per_state": 2.0, "persistence": 0.0}
    health |= {"reconstruction_error": 0.1, "reconstruction_error_a0": 0.1}
    assert "WARNING: MOST CODES ARE DEAD" in describe_health(health)
    assert "warning" not in describe_health(health | {"used": 0.6}).lower()
    assert "depends on the state much more" in describe_health(health | {"used": 0.6, "perplexity": 21.0})


# --- Transitions ---


def test_timeouts_and_terminals_of_three_episodes():
    """Episode 1 ends in a terminal, 2 by time limit, 3 with the file. Of the three last rows only the first is kept."""
    arrays = {
        "observations": np.arange(6, dtype=np.float32)[:, None],
        "actions": np.zeros((6, 1), np.float32),
        "rewards": np.array([1, 2, 3, 4, 5, 6], np.float32),
        "terminals": np.array([0, 1, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 1, 0, 0], bool),
    }
    data, returns = make_transitions(dict(arrays), None, CPU)
    assert returns.tolist() == [3, 7, 11]
    assert data.obs[:, 0].tolist() == [0, 1, 2, 4]
    assert data.terminals.tolist() == [0, 1, 0, 0]
    assert data.next_obs[[0, 2, 3], 0].tolist() == [1, 3, 5]
    arrays["next_observations"] = arrays["observations"] + 0.5
    data, _ = make_transitions(arrays, None, CPU)
    assert data.next_obs[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_files_without_timeouts_are_cut_at_the_time_limit():
    import gymnasium as gym

    env = gym.make("Pendulum-v1")  # 200 steps
    arrays = dataset(n=500, obs_dim=3, action_dim=1)
    del arrays["timeouts"]
    arrays["terminals"][49] = True
    data, returns = make_transitions(arrays, env, CPU)
    assert len(returns) == 4  # 50 + 200 + 200 + 50
    assert len(data.obs) == 500 - 3
