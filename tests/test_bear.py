"""baselines/bear.py: the exact discrepancy against draws, the sampled one against the formula of the official code."""

import copy
import dataclasses
import math

import pytest
import torch
from test_closed_forms import random_batch

from baselines.bear import CVAE, Actor, Args, ContinuousBEAR, DiscreteBEAR, Price, exact_mmd, kernel, sampled_mmd
from vqvae import ActionVQVAE, minimize


def policies(batch=4, num_codes=6, dim=2):
    """Two policies over codes, and what the codes stand for."""
    pi, p = torch.randn(2, batch, num_codes).softmax(-1)
    return pi, p, torch.rand(batch, num_codes, dim) * 2 - 1


# --- The discrepancy ---


def test_limits_of_the_exact_discrepancy():
    """0 of a policy from itself; 2 - 2 k(u_j, u_k) of two certain ones; no matter how codes are numbered."""
    pi, p, actions = policies()
    assert exact_mmd(p, p, actions, 0.5).abs().max() < 1e-6
    assert exact_mmd(pi, p, actions, 0.5).min() > 0
    j, k = torch.eye(6)[[1] * 4], torch.eye(6)[[4] * 4]
    expected = 2 - 2 * kernel(actions, actions, 0.5)[:, 1, 4]
    torch.testing.assert_close(exact_mmd(j, k, actions, 0.5), expected)
    order = torch.randperm(6)
    permuted = exact_mmd(pi[:, order], p[:, order], actions[:, order], 0.5)
    torch.testing.assert_close(permuted, exact_mmd(pi, p, actions, 0.5), atol=1e-6, rtol=0)


def test_sampled_discrepancy_by_hand():
    x, y = torch.randn(3, 4, 2), torch.randn(3, 5, 2)

    def k(a, b):
        return math.exp(-((a - b) ** 2).sum().item() / (2 * 20.0))

    for i in range(3):
        value = sum(k(a, b) for a in x[i] for b in x[i]) / 16
        value += sum(k(a, b) for a in y[i] for b in y[i]) / 25
        value -= 2 * sum(k(a, b) for a in x[i] for b in y[i]) / 20
        assert sampled_mmd(x, y, 20.0)[i].item() == pytest.approx(value, abs=1e-6)


def test_bias_of_the_sampled_discrepancy():
    """(2 / n) (1 - E k(b, b')) where both policies are the same. Without a draw's meeting with itself there is none."""
    _, p, actions = policies(batch=1)
    sigma, n, draws = 0.3, 4, 40_000
    inner = torch.einsum("bj,bjk,bk->", p, kernel(actions, actions, sigma), p).item()
    codes = p.multinomial(2 * n * draws, True).view(2, draws, n)
    x, y = actions[0][codes]
    assert sampled_mmd(x, y, sigma).mean().item() == pytest.approx(2 / n * (1 - inner), abs=0.01)
    unbiased = [kernel(z, z, sigma).sum((1, 2)).sub(n).div(n * (n - 1)) for z in (x, y)]
    estimate = (sum(unbiased) - 2 * kernel(x, y, sigma).mean((1, 2))).mean().item()
    assert estimate == pytest.approx(0, abs=0.01)


def test_at_the_published_bandwidth_only_means_are_matched():
    """Data at -1 and 1 alike often, a policy at 0: allowed by epsilon = 0.05 at sigma = 20, far from it at 0.1."""
    actions = torch.tensor([[[-1.0], [0.0], [1.0]]])
    data, middle = torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert exact_mmd(middle, data, actions, 20.0).item() < 0.05**2
    assert exact_mmd(middle, data, actions, 0.1).item() > 1
    pi, p, actions = policies()
    means = ((pi - p)[..., None] * actions).sum(1).square().sum(1)
    torch.testing.assert_close(exact_mmd(pi, p, actions, 2000.0) * 2000.0, means, rtol=0.02, atol=1e-4)


# --- Learning ---


def compare(ours, theirs, network):
    """Two losses, and their gradients of the network's parameters."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    parameters = list(network.parameters())
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (ours, theirs)]
    assert any(gradient is not None for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)  # the root near 0 is steep


def test_the_policy_in_closed_form():
    """With fixed Q and price, and MMD^2 itself to be paid: pi = p + M^-1 (Q - nu 1) / (2 alpha), as long as pi > 0."""
    p, actions, alpha = torch.full((6,), 1 / 6).double(), torch.rand(6, 2).double() * 2 - 1, 2.0
    inverse, q = kernel(actions, actions, 0.5).inverse(), torch.randn(6).double()
    nu = (inverse @ q).sum() / inverse.sum()
    step = inverse @ (q - nu) / (2 * alpha)
    scale = 0.1 / step.abs().max()  # the closed form is linear in Q
    q, best = scale * q, p + scale * step

    def objective(pi):
        return pi @ q - alpha * exact_mmd(pi[None], p[None], actions[None], 0.5)[0]

    for _ in range(100):
        assert objective(best) > objective(0.99 * best + 0.01 * torch.randn(6).double().softmax(0))


def agent(**fields):
    bear = DiscreteBEAR(3, ActionVQVAE(3, 2, 8, hidden=(8,)), dataclasses.replace(Args(), **fields))
    for network in (*bear.qf, *bear.qf_target, bear.actor, bear.vqvae.prior):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    return bear


def test_losses_over_codes_by_hand():
    bear, batch = agent(sigma=0.5, discount=0.5, steps=10, warm_up=0.2), random_batch(size=16)
    batch = batch._replace(terminals=torch.arange(16).float() % 2)
    q = torch.stack([qf(batch.next_obs) for qf in bear.qf_target]).amin(0)
    y = batch.rewards + 0.5 * (1 - batch.terminals) * (bear.actor(batch.next_obs).softmax(1) * q).sum(1)
    expected = sum((qf(batch.obs)[range(16), batch.codes] - y.detach()).square().mean() for qf in bear.qf)
    torch.testing.assert_close(bear.qf_loss(batch)[0], expected)
    pi, p = bear.actor(batch.obs).softmax(1), bear.vqvae.prior(batch.obs).softmax(1)
    u = bear.vqvae.candidates(batch.obs)
    mmd = sum(
        (pi[:, j] - p[:, j]) * (pi[:, k] - p[:, k]) * (-((u[:, j] - u[:, k]) ** 2).sum(1) / (2 * 0.5)).exp()
        for j in range(8)
        for k in range(8)
    )
    excess = (mmd.clamp(min=0) + 1e-6).sqrt().mean() - 0.05
    bear.price.log_alpha.data.fill_(0.7)
    q = torch.minimum(*(qf(batch.obs) for qf in bear.qf)).detach()
    for step in (2, 3):  # Q counts after the first two of ten steps
        bear.step.fill_(step)
        compare(bear.actor_loss(batch)[0], math.exp(0.7) * excess - (step > 2) * (pi * q).sum(1).mean(), bear.actor)


def test_the_price_rises_while_the_constraint_is_violated():
    for excess in (0.3, -0.1):
        price = Price(Args())
        for _ in range(5):
            before = price.log_alpha.item()
            price.update(torch.tensor(excess))
            assert (price.log_alpha.item() > before) == (excess > 0)
    price = Price(Args(price_lr=0.02))
    price.update(torch.tensor(1.0))
    assert price.log_alpha.item() == pytest.approx(0.02)  # Adam's first step is of the rate's size
    price.log_alpha.data.fill_(50.0)
    price.update(torch.tensor(1.0))
    assert price.log_alpha.item() == 10
    assert price.excess(torch.zeros(4)).item() == pytest.approx(1e-3 - 0.05)


def test_a_high_price_holds_the_policy_at_the_data():
    """Whatever Q says: with a small bandwidth the policy ends at the prior."""
    bear, batch = agent(sigma=0.05, lr=3e-3), random_batch(size=32)
    bear.price.log_alpha.data.fill_(9.0)
    for _ in range(400):
        bear.actor_optimizer.zero_grad()
        bear.step.fill_(1e9)
        bear.actor_loss(batch)[0].backward(inputs=list(bear.actor.parameters()))
        bear.actor_optimizer.step()
    assert bear.mmd(batch.obs).mean().item() < 0.05**2


def test_losses_over_actions_by_hand(monkeypatch):
    args = dataclasses.replace(Args(), discount=0.5, samples=4, backup_samples=10, steps=10, warm_up=0.0)
    bear, batch = ContinuousBEAR(3, 2, args), random_batch(size=16)
    batch = batch._replace(terminals=torch.arange(16).float() % 2)
    shift = torch.nn.Parameter(torch.zeros(2))  # stands for the policy's weights
    noise, y = {4: torch.randn(16, 4, 2), 10: torch.randn(16, 10, 2)}, torch.randn(16, 4, 2)
    x = {n: z + shift for n, z in noise.items()}
    bear.actor.sample = lambda obs, n: x[n]
    bear.model.sample = lambda obs, n: y

    def q(critic, obs, actions):
        return torch.stack([critic(torch.cat([obs, actions[:, i]], 1))[:, 0] for i in range(actions.shape[1])], 1)

    both = torch.stack([q(critic, batch.next_obs, x[10].tanh()) for critic in bear.qf_target])
    target = (0.75 * both.amin(0) + 0.25 * both.amax(0)).amax(1)
    target = (batch.rewards + 0.5 * (1 - batch.terminals) * target).detach()
    expected = sum((q(critic, batch.obs, batch.actions[:, None])[:, 0] - target).square().mean() for critic in bear.qf)
    compare(bear.qf_loss(batch)[0], expected, bear.qf)

    excess = (sampled_mmd(x[4], y, 20.0) + 1e-6).sqrt().mean() - 0.05
    guide = torch.minimum(*(q(critic, batch.obs, x[4].tanh()) for critic in bear.qf)).mean()
    bear.step.fill_(1)
    bear.actor.register_parameter("shift", shift)
    compare(bear.actor_loss(batch)[0], excess - guide, bear.actor)


def test_the_generative_model_by_hand(monkeypatch):
    """Reconstruction plus half of the KL divergence from the standard Gaussian, both averaged, against torch's."""
    model, batch = CVAE(3, 2, hidden=(16,)), random_batch(size=8)
    for network in (model.encoder, model.decoder):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    noise = torch.randn(8, 4)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    mean, log_std = model.encoder(torch.cat([batch.obs, batch.actions], 1)).chunk(2, 1)
    latent = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).mean()
    decoded = model.decoder(torch.cat([batch.obs, mean + log_std.exp() * noise], 1)).tanh()
    expected = (decoded - batch.actions).square().mean() + 0.5 * kl
    loss = model.loss(batch.obs, batch.actions)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


# --- Draws, and the order of an update ---


def test_draws_before_tanh():
    """The policy's: Gaussian, of deviation exp(log_std - 1). The model's: what the decoder makes of clipped latents."""
    actor = Actor(3, 2)
    actor.net[-1].weight.data.zero_()
    actor.net[-1].bias.data.copy_(torch.tensor([0.3, -2.0, 0.0, -1.0]))
    draws = actor.sample(torch.zeros(10, 3), 4_000)  # (10, 4000, 2)
    torch.testing.assert_close(draws.mean((0, 1)), torch.tensor([0.3, -2.0]), atol=0.02, rtol=0)
    expected = torch.tensor([math.exp(-1), math.exp(-2)])
    torch.testing.assert_close(draws.flatten(0, 1).std(0), expected, atol=0.01, rtol=0)
    actor.net[-1].bias.data[2:] = 50.0  # no wider than e^2
    assert actor.sample(torch.zeros(10, 3), 4_000).std().item() == pytest.approx(math.exp(2), rel=0.2)
    model = CVAE(3, 2)
    model.decoder = torch.nn.Identity()
    obs_and_latents = model.sample(torch.full((10, 3), 7.0), 500)
    assert (obs_and_latents[..., :3] == 7).all()
    latents = obs_and_latents[..., 3:]
    assert latents.shape == (10, 500, 4)
    assert (latents.min(), latents.max()) == (-0.5, 0.5)
    assert (latents.abs() == 0.5).float().mean().item() == pytest.approx(0.617, abs=0.02)  # of a Gaussian, beyond 0.5


@pytest.mark.parametrize("name", ["saq_bear", "bear"])
def test_the_policy_steps_on_critics_that_have_stepped(name):
    args, batch = dataclasses.replace(Args(), warm_up=0.0, lr=0.01), random_batch()
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    agent = DiscreteBEAR(3, vqvae, args) if name == "saq_bear" else ContinuousBEAR(3, 2, args)
    other = copy.deepcopy(agent)
    torch.manual_seed(0)
    agent.update(batch)
    torch.manual_seed(0)
    other.step += 1
    if name == "bear":
        minimize(other.model.loss(batch.obs, batch.actions), {}, other.model_optimizer)
    minimize(*other.qf_loss(batch), other.qf_optimizer)
    gradients = torch.autograd.grad(other.actor_loss(batch)[0], list(other.actor.parameters()))
    for parameter, gradient in zip(agent.actor.parameters(), gradients, strict=True):
        moment = agent.actor_optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * gradient, atol=1e-8, rtol=1e-3)
