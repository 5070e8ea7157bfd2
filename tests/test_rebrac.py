"""baselines/rebrac.py against the formulas of its papers, written again, and against answers that are known."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_closed_forms import random_batch

from baselines.rebrac import Args, ReBRAC, Sarsa, defaults, make_agents, network, with_next_actions
from vqvae import Linear, Transitions, UserError, adamw, minimize


def steps(size=64):
    """Random transitions; every third is terminal."""
    batch = random_batch(size=size)
    return Sarsa(*batch[:4], (torch.arange(size) % 3 == 0).float(), torch.rand(size, 2) * 2 - 1)


def agents(**fields):
    return make_agents(3, 2, dataclasses.replace(Args(), **fields))


def forward(network, x, layer_norm):
    """A network's output by hand: Dense -> ReLU -> LayerNorm, and a last Dense."""
    layers = [layer for layer in network if hasattr(layer, "weight")]
    dense = [layer for layer in layers if layer.weight.ndim == 2]
    norms = [layer for layer in layers if layer.weight.ndim == 1]
    assert len(norms) == (len(dense) - 1 if layer_norm else 0)
    for i, layer in enumerate(dense[:-1]):
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
        if layer_norm:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x * norms[i].weight + norms[i].bias
    return x @ dense[-1].weight.T + dense[-1].bias


@pytest.mark.parametrize("name", ["rebrac", "td3_bc"])
def test_losses_and_gradients_are_those_of_the_papers(name):
    agent = agents(actor_beta=0.3, critic_beta=0.2, alpha=2.5)[name].double()
    for parameter in agent.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = Sarsa(*(column.double() for column in steps()))
    rebrac = name == "rebrac"
    beta_1, beta_2 = (0.3, 0.2) if rebrac else (1 / (2.5 * 2), 0.0)
    noise = 0.1 * torch.randn(64, 2).double()

    def q(critic, obs, actions):
        return forward(critic, torch.cat([obs, actions], 1), rebrac)[:, 0]

    with torch.no_grad():
        next_actions = (forward(agent.actor_target, batch.next_obs, False).tanh() + noise).clamp(-1, 1)
        next_q = torch.minimum(*(q(critic, batch.next_obs, next_actions) for critic in agent.qf_target))
        next_q = next_q - beta_2 * ((next_actions - batch.next_actions) ** 2).sum(1)
        y = batch.rewards + 0.99 * (1 - batch.terminals) * next_q
    torch.testing.assert_close(agent.td_target(batch, noise), y)

    agent.td_target = lambda batch, noise: y
    expected = sum(((q(critic, batch.obs, batch.actions) - y) ** 2).mean() for critic in agent.qf)
    compare(agent.qf_loss(batch)[0], expected, agent.qf)

    actions = forward(agent.actor, batch.obs, False).tanh()
    values = torch.stack([q(critic, batch.obs, actions) for critic in agent.qf])
    guide = values.amin(0) if rebrac else values[0]
    if rebrac:  # a sum over the action's dimensions
        expected = (0.3 * ((actions - batch.actions) ** 2).sum(1) - guide / guide.abs().mean().detach()).mean()
    else:  # the official form: alpha / mean|Q| before Q, and the mean over batch and dimensions
        expected = -2.5 / guide.abs().mean().detach() * guide.mean() + F.mse_loss(actions, batch.actions)
        expected = expected / 2.5
    compare(agent.actor_loss(batch)[0], expected, agent.actor)
    assert agent.beta_1 == pytest.approx(beta_1)


def compare(ours, expected, network):
    """The same loss, and the same gradient for each weight of a network."""
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, list(network.parameters())) for loss in (ours, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_policy_and_targets_move_in_every_second_update():
    """The policy's target moves toward the policy of before the update; the critics' toward those of after it."""
    agent, batch = agents()["rebrac"], steps()
    for parameter in (*agent.actor_target.parameters(), *agent.qf_target.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    for step in range(1, 5):
        before = copy.deepcopy(agent)
        agent.update(batch)
        moved = {
            name.split(".")[0]
            for name, parameter in agent.named_parameters()
            if not torch.equal(parameter, dict(before.named_parameters())[name])
        }
        assert moved == ({"qf", "actor", "actor_target", "qf_target"} if step % 2 == 0 else {"qf"})
        if step % 2 == 0:
            for target, old, policy in zip(
                agent.actor_target.parameters(),
                before.actor_target.parameters(),
                before.actor.parameters(),
                strict=True,
            ):
                torch.testing.assert_close(target, old + 0.005 * (policy - old))
            for target, old, critic in zip(
                agent.qf_target.parameters(), before.qf_target.parameters(), agent.qf.parameters(), strict=True
            ):
                torch.testing.assert_close(target, old + 0.005 * (critic - old))


def test_skipped_updates_leave_no_trace_in_adam():
    """Two updates are for the policy what one would be, on the critics of the second."""
    agent, batch = agents()["rebrac"], steps()
    agent.update(batch)
    other = copy.deepcopy(agent)
    torch.manual_seed(0)
    agent.update(batch)
    torch.manual_seed(0)
    minimize(*other.qf_loss(batch), other.qf_optimizer)
    other.actor_optimizer = adamw(other.actor.parameters(), other.args.lr)  # one that knows of no update
    minimize(*other.actor_loss(batch), other.actor_optimizer)
    for ours, expected in zip(agent.actor.parameters(), other.actor.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    state = agent.actor_optimizer.state_dict()["state"]
    assert {value["step"].item() for value in state.values()} == {1}


def test_td3_bc_cannot_divide_by_nothing():
    with pytest.raises(UserError, match="divides by alpha"):
        agents(alpha=0.0)
    assert list(agents(alpha=0.0, compare=False)) == ["rebrac"]


@pytest.mark.parametrize(("drawn", "noise"), [(1.0, 0.2), (10.0, 0.5)])
def test_the_noise_of_the_target_is_scaled_and_clipped(drawn, noise, monkeypatch):
    agent, seen = agents()["rebrac"], []
    agent.td_target = lambda batch, noise: seen.append(noise) or batch.rewards
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, drawn))
    agent.qf_loss(steps())
    torch.testing.assert_close(seen[0], torch.full((64, 2), noise))


def test_next_actions_are_the_datasets():
    """Episodes of rows 0-2 (a terminal), 3-4 (a time limit, its last row left out by the loader) and 6-7."""
    obs = torch.arange(8.0)[:, None]
    next_obs = obs + 1
    terminals = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 1])
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    actions = torch.arange(8.0)[:, None] / 10
    columns = (obs, actions, torch.zeros(8), next_obs, terminals, torch.zeros(8).long())
    data = with_next_actions(Transitions(*(column[rows] for column in columns)))
    backwards = [3, 1]  # where nothing follows and nothing ends
    with pytest.raises(UserError, match="rows must stand in the order in which they happened"):
        with_next_actions(Transitions(*(column[backwards] for column in columns)))
    shuffled = torch.randperm(400)  # of these one in twenty is terminal: its next action does not matter
    long = torch.arange(400.0)[:, None]
    columns = (long, long, torch.zeros(400), long + 1, (torch.arange(400) % 20 == 19).float(), torch.zeros(400).long())
    assert len(with_next_actions(Transitions(*columns)).obs) == 400
    with pytest.raises(UserError, match="most next actions are unknown"):
        with_next_actions(Transitions(*(column[shuffled] for column in columns)))
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3, 6, 7]  # 4 led to 5, whose action is unknown
    assert data.next_actions[[0, 1, 3, 4], 0].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.7])
    sample = data.sample(100)
    assert isinstance(sample, Sarsa)
    noisy = data.sample(5_000, 100.0)  # far more than observations differ by
    assert [noisy.obs.std().item(), noisy.next_obs.std().item()] == pytest.approx([100.0, 100.0], rel=0.05)
    assert noisy.next_actions.unique().tolist() == data.next_actions.unique().tolist()
    known = sample.terminals == 0
    torch.testing.assert_close(sample.next_actions[known, 0], sample.obs[known, 0] / 10 + 0.1)


@pytest.mark.parametrize("name", ["rebrac", "td3_bc"])
def test_between_two_good_actions_a_strong_penalty_ends_in_the_middle(name):
    """That is what a squared distance says: 0 is the nearest to half of the data at -1 and half at 1."""
    obs = torch.zeros(256, 1)
    actions = torch.where(torch.arange(256) % 2 == 0, -1.0, 1.0)[:, None]
    batch = Sarsa(obs, actions, torch.ones(256), obs, torch.ones(256), actions)
    args = dataclasses.replace(Args(), actor_beta=10.0, alpha=0.1, lr=1e-3)
    agent = make_agents(1, 1, args)[name]
    agent.actor[-1].bias.data.fill_(1.0)
    assert agent.act(obs[:1]).item() > 0.7
    for _ in range(400):
        agent.update(batch)
    assert agent.act(obs[:1]).abs().item() < 0.1
    assert agent.diagnose(batch)["distance"].item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("in_dim", [3, 256])
def test_observations_are_not_multiplied_in_bfloat16(in_dim):
    """Nor in a first layer whose input is as wide as the hidden ones are."""
    layers = [module for module in network(in_dim, 1, 3, True, 1e-3) if isinstance(module, Linear)]
    assert [layer.between for layer in layers] == [False, True, True, False]


def test_the_policy_leaves_the_data_where_q_is_higher():
    """A bandit that pays a: data in [-0.5, 0.5], a policy that is hardly held ends above them."""
    obs = torch.zeros(64, 1)
    actions = torch.linspace(-0.5, 0.5, 64)[:, None]
    batch = Sarsa(obs, actions, actions[:, 0] + 2, obs, torch.ones(64), actions)
    ends = {}
    for beta in (0.01, 100.0):
        agent = ReBRAC(1, 1, dataclasses.replace(Args(), lr=1e-3), beta, 0.0, 2, False, True)
        for _ in range(200):  # critics first: a policy that follows untrained ones saturates
            minimize(*agent.qf_loss(batch), agent.qf_optimizer)
        for _ in range(400):
            agent.update(batch)
        ends[beta] = agent.act(obs[:1]).item()
    assert ends[0.01] > 0.7
    assert abs(ends[100.0]) < 0.1


ROWS = {  # the authors' weights of the distance, in the policy and in the target
    "halfcheetah-medium-v2": (0.001, 0.01),
    "halfcheetah-medium-replay-v2": (0.01, 0.001),
    "halfcheetah-medium-expert-v2": (0.01, 0.1),
    "halfcheetah-expert-v2": (0.01, 0.01),
    "hopper-medium-v2": (0.01, 0.01),
    "hopper-medium-replay-v2": (0.05, 0.5),
    "hopper-medium-expert-v2": (0.1, 0.01),
    "hopper-expert-v2": (0.1, 0.1),
    "walker2d-medium-v2": (0.05, 0.1),
    "walker2d-medium-replay-v2": (0.05, 0.01),
    "walker2d-medium-expert-v2": (0.01, 0.01),
    "walker2d-expert-v2": (0.01, 0.5),
    "maze2d-large-v1": (0.003, 0.001),
    "antmaze-umaze-v2": (0.003, 0.002),
    "antmaze-umaze-diverse-v2": (0.003, 0.001),
    "antmaze-medium-play-v2": (0.001, 0.0005),
    "antmaze-medium-diverse-v2": (0.001, 0.0),
    "antmaze-large-play-v2": (0.002, 0.001),
    "antmaze-large-diverse-v2": (0.002, 0.002),
    "pen-human-v1": (0.1, 0.5),
    "pen-cloned-v1": (0.05, 0.5),
    "pen-expert-v1": (0.01, 0.01),
    "door-human-v1": (0.1, 0.1),
    "door-cloned-v1": (0.01, 0.1),
    "door-expert-v1": (0.05, 0.01),
    "hammer-human-v1": (0.01, 0.5),
    "hammer-cloned-v1": (0.1, 0.5),
    "hammer-expert-v1": (0.01, 0.01),
    "relocate-human-v1": (0.1, 0.01),
    "relocate-cloned-v1": (0.1, 0.01),
    "relocate-expert-v1": (0.05, 0.01),
}


@pytest.mark.parametrize("task", ROWS)
def test_weights_by_task(task):
    args = defaults(task)
    assert (args.actor_beta, args.critic_beta) == ROWS[task]
    assert (args.discount, args.reward_scale) == ((0.999, 100.0) if "antmaze" in task else (0.99, 1.0))


def test_any_antmaze_is_one():
    args = defaults("antmaze-eval-umaze-v0")
    assert (args.discount, args.reward_scale, args.eval_episodes) == (0.999, 100.0, 100)
