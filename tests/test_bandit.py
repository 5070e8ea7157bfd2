"""One state, two good actions: over codes every agent does one of them, and the mean of its policy is between them."""

import importlib

import pytest
import torch
from conftest import ROOT
from test_closed_forms import random_batch

from vqvae import ActionVQVAE, Mixture

AGENTS = {"saq_cql": "saq_cql", "saq_iql": "saq_iql", "saq_brac": "saq_brac", "saq_bc": "saq_bc"}
AGENTS |= {"awac": "saq_awac", "bear": "saq_bear", "spot": "saq_spot"}


@pytest.fixture(scope="module")
def batch():
    """A quarter of the data at -0.8, the rest at 0.8, all paid alike."""
    torch.manual_seed(0)
    obs, actions = torch.ones(256, 1), torch.where(torch.arange(256) % 4 == 0, -0.8, 0.8)[:, None]
    ones = torch.ones(256)
    return random_batch(256)._replace(obs=obs, next_obs=obs, actions=actions, rewards=ones, terminals=ones)


@pytest.fixture(scope="module", params=["vqvae", "mixture"])
def quantizer(request, batch):
    torch.manual_seed(0)
    options = dict(num_codes=4, hidden=(32,), lr=3e-3)
    found = ActionVQVAE(1, 1, **options) if request.param == "vqvae" else Mixture(1, 1, **options)
    for _ in range(400):
        found.update(batch.obs, batch.actions)
    return found.requires_grad_(False)


@pytest.mark.parametrize("script", AGENTS)
def test_every_agent_does_one_of_two_good_actions(script, quantizer, batch, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "baselines")
    module = importlib.import_module(script)
    args = module.Args(compare=False, lr=1e-3, steps=100)
    agent = module.make_agents(1, 1, quantizer, args)[AGENTS[script]]
    coded = batch._replace(codes=quantizer.encode(batch.obs, batch.actions))
    for _ in range(100):
        agent.update(coded)
    acted = {}
    for args.act in ("greedy", "sample", "mean"):
        acted[args.act] = agent.act(torch.ones(500, 1))[:, 0]
    for how in ("greedy", "sample"):
        assert ((acted[how].abs() - 0.8).abs() < 0.1).float().mean() > 0.95, how
    assert acted["greedy"].std() < 1e-3
    if script != "bear":  # whose MMD lets it put nearly all on one of two equal actions
        assert acted["mean"].abs().max() < 0.65
