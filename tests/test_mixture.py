"""The mixture quantizer: its likelihood, its limits, its interface."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import saq_bc
import saq_brac
import saq_cql
import saq_iql
from baselines import awac, bear, spot
from vqvae import QUANTIZERS, Aquadem, Mixture, fit, plot_codes


@pytest.mark.parametrize("num_codes", [1, 2, 7])
def test_likelihood_is_that_of_a_mixture(num_codes):
    mixture = Mixture(3, 2, num_codes)
    torch.nn.init.normal_(mixture.net[-1].weight, std=0.1)
    mixture.variance.fill_(0.07)
    obs, actions = torch.randn(50, 3), torch.rand(50, 2) * 2 - 1
    u, log_prior = mixture.outputs(obs)
    normals = Independent(Normal(u, mixture.variance.sqrt()), 1)
    expected = MixtureSameFamily(Categorical(logits=log_prior), normals).log_prob(actions)
    loss, _ = mixture(obs, actions)
    torch.testing.assert_close(loss, -expected.mean())
    torch.testing.assert_close(mixture.log_joint(obs, actions)[0].logsumexp(1), expected)
    best = torch.stack(
        [log_prior[:, k] + Normal(u[:, k], mixture.variance.sqrt()).log_prob(actions).sum(1) for k in range(num_codes)],
        1,
    )
    assert torch.equal(mixture.encode(obs, actions), best.argmax(1))


def test_one_code_is_regression():
    """Its candidate is the mean of the actions, its sigma their deviation from it."""
    torch.manual_seed(0)
    obs = torch.randint(2, (4000, 1)).float()
    actions = torch.cat([0.5 * obs - 0.2, 0.1 - 0.4 * obs], 1) + 0.2 * torch.randn(4000, 2)
    mixture = Mixture(1, 2, num_codes=1, hidden=(32,), lr=1e-2)
    for _ in fit(mixture, obs, actions, steps=600):
        pass
    for state in (0.0, 1.0):
        mean = actions[obs[:, 0] == state].mean(0)
        torch.testing.assert_close(mixture.candidates(torch.tensor([[state]]))[0, 0], mean, atol=0.02, rtol=0)
    assert mixture.variance.sqrt() == pytest.approx(0.2, rel=0.05)
    assert (mixture.encode_dataset(obs, actions) == 0).all()


def test_where_candidates_are_far_apart_an_action_has_one():
    """The loss is then the likelihood of that one alone, the residual its distance, the code its number."""
    mixture = Mixture(3, 2, 3)
    with torch.no_grad():
        mixture.net[-1].weight.zero_()
        mixture.net[-1].bias.copy_(torch.tensor([0.3, 0.0, -1.0, -0.9, -0.9, 0.0, 0.0, 0.9, 0.9]))
    mixture.variance.fill_(0.01)
    obs = torch.randn(90, 3)
    actions = mixture.candidates(obs)[range(90), torch.arange(90) % 3] + 0.1 * torch.randn(90, 2)
    (loss, info), (log_joint, distance) = mixture(obs, actions), mixture.log_joint(obs, actions)
    torch.testing.assert_close(loss, -log_joint.amax(1).mean())
    torch.testing.assert_close(info["residual"], distance.amin(1).mean() / 2)
    assert torch.equal(mixture.encode(obs, actions), torch.arange(90) % 3)


def test_two_modes_get_two_candidates():
    """Actions -0.7 and 0.7, three times as often: the prior knows how often, sigma how exactly."""
    torch.manual_seed(0)
    obs = torch.randn(4000, 2)
    right = torch.rand(4000) < 0.75
    actions = torch.where(right, 0.7, -0.7)[:, None] + 0.05 * torch.randn(4000, 1)
    mixture = Mixture(2, 1, num_codes=8, hidden=(32,), lr=3e-3)
    for _ in fit(mixture, obs, actions, steps=1500):
        pass
    codes = mixture.encode_dataset(obs, actions)
    assert (mixture.decode(obs, codes) - actions).abs().mean() < 0.1
    prior, u = mixture.prior_logits(obs).softmax(1), mixture.candidates(obs)[..., 0]
    torch.testing.assert_close((prior * (u > 0)).sum(1).mean(), torch.tensor(0.75), atol=0.03, rtol=0)
    torch.testing.assert_close((prior * u).sum(1).mean(), actions.mean(), atol=0.05, rtol=0)


def test_codes_decode_to_their_candidates():
    mixture, obs = Mixture(3, 2, 5), torch.randn(10, 3)
    u = mixture.candidates(obs)
    for k in range(5):
        assert torch.equal(mixture.decode(obs, torch.full((10,), k)), u[:, k])
    hidden = Mixture(3, 2, 5, action_only=True)
    assert torch.equal(hidden.candidates(obs)[:1].expand(10, -1, -1), hidden.candidates(obs))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_code_has_a_picture(kind):
    figure = plot_codes(QUANTIZERS[kind](3, 2, 1), torch.randn(9, 3), torch.rand(9, 2))
    assert len(figure.axes) == 6


def test_aquadem_is_a_mixture_with_a_fixed_sigma_and_a_uniform_prior():
    aquadem, obs, actions = Aquadem(3, 2, 5, temperature=0.3), torch.randn(40, 3), torch.rand(40, 2)
    aquadem.outputs = lambda obs, dropout=0: Aquadem.outputs(aquadem, obs)  # without dropout
    mixture_loss, _ = Mixture.forward(aquadem, obs, actions)
    constant = 0.3 * math.log(2 * math.pi * 0.15)  # of two dimensions
    torch.testing.assert_close(aquadem(obs, actions)[1]["loss"], 0.3 * mixture_loss - constant)
    u = aquadem.candidates(obs)
    expected = -0.3 * (-(actions[:, None] - u).square().sum(-1) / 0.3).exp().mean(1).log().mean()
    torch.testing.assert_close(aquadem(obs, actions)[1]["loss"], expected)
    assert torch.equal(aquadem.encode(obs, actions), (actions[:, None] - u).norm(dim=-1).argmin(1))


def test_aquadem_learns_its_prior_beside_and_drops_units_out():
    aquadem, obs, actions = Aquadem(3, 2, 5), torch.randn(40, 3), torch.rand(40, 2)
    loss, info = aquadem(obs, actions)
    torch.testing.assert_close(loss, info["loss"] + info["prior_loss"])
    assert aquadem(obs, actions)[1]["loss"] != info["loss"]
    assert torch.equal(aquadem.candidates(obs), aquadem.candidates(obs))  # in the fit alone


# --- Acting ---


def test_the_mean_is_linear_in_the_policy_and_greedy_at_one_hot_policies():
    mixture, obs = Mixture(3, 2, 5), torch.randn(20, 3)
    torch.nn.init.normal_(mixture.net[-1].weight, std=0.005)
    mixture.net[-1].bias.data[5:] *= 0.3  # candidates inside the box, where nothing is clipped
    p, q = torch.rand(2, 20, 5).softmax(-1)
    mean = [mixture.act(obs, policy.log(), "mean") for policy in (p, q, 0.3 * p + 0.7 * q)]
    torch.testing.assert_close(mean[2], 0.3 * mean[0] + 0.7 * mean[1])
    one_hot = 1e4 * torch.eye(5)[torch.randint(5, (20,))]
    torch.testing.assert_close(mixture.act(obs, one_hot, "mean"), mixture.act(obs, one_hot, "greedy"))
    sampled = torch.stack([mixture.act(obs, p.log(), "sample") for _ in range(4000)]).mean(0)
    torch.testing.assert_close(sampled, mean[0], atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_support_leaves_out_what_the_data_hardly_do(kind):
    """Whatever the policy thinks of such codes. At 0 nothing is left out, at 1 only the prior's likeliest is left."""
    quantizer, obs = QUANTIZERS[kind](3, 2, 4), torch.randn(300, 3)
    prior = torch.tensor([0.5, 0.3, 0.16, 0.04])
    quantizer.prior_logits = lambda obs: prior.log().expand(len(obs), 4) - 3.0
    quantizer.decode = lambda obs, codes: codes[:, None].expand(-1, 2) / 10.0
    quantizer.candidates = lambda obs: torch.arange(4.0)[None, :, None].expand(len(obs), 4, 2) / 10.0
    high = torch.tensor([0.0, 0.0, 0.0, 1e6]).expand(300, 4)  # the policy wants what the data do not
    flat = torch.zeros(300, 4)
    left = []
    for support in (0.0, 0.05, 0.1, 0.4, 0.7, 1.0):
        left.append((10 * quantizer.act(obs, flat, "sample", support)[:, 0]).round().unique().tolist())
        mean = quantizer.act(obs, flat, "mean", support)[0, 0].item()
        assert mean == pytest.approx(sum(left[-1]) / len(left[-1]) / 10, abs=1e-6)
        greedy = 10 * quantizer.act(obs, high, "greedy", support)[:, 0]
        assert (greedy.round() == (3 if 3 in left[-1] else left[-1][0])).all()
    assert left == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2], [0, 1], [0], [0]]


OVER_CODES = [saq_cql, saq_iql, saq_brac, saq_bc, awac, bear, spot]


@pytest.mark.parametrize("script", OVER_CODES)
def test_agents_pass_their_support_on(script):
    asked = []
    args = dataclasses.replace(script.Args(), act="mean", support=0.37, compare=False)
    quantizer = Mixture(3, 2, 4)
    quantizer.act = lambda obs, logits, how, support: asked.append((logits.shape, how, support))
    (agent,) = script.make_agents(3, 2, quantizer, args).values()
    agent.act(torch.randn(7, 3))
    assert asked == [((7, 4), "mean", 0.37)]


@pytest.mark.parametrize("data", ["random", "medium", "medium-replay", "medium-expert", "expert", "full-replay"])
@pytest.mark.parametrize("robot", ["hopper", "halfcheetah", "walker2d"])
def test_locomotion_acts_alike_in_every_script(robot, data):
    """By the mean; over all codes where one noisy policy made the data, over the usual ones elsewhere."""
    for script in OVER_CODES:
        args = script.defaults(f"{robot}-{data}-v2", quantizer="mixture")
        usual = 0.1 if (script, robot, data) == (saq_cql, "hopper", "expert") else 0.2
        assert (args.act, args.support) == ("mean", 0.0 if data == "medium" else usual), script.__name__
