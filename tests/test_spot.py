"""baselines/spot.py against the formulas of its paper, written again, against limits that are known, and its online
phase: what is stored, what is learned from it, and that a run which was stopped in it ends as if it had not been."""

import copy
import dataclasses
import json
import math
import shutil
import signal
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import ROOT, assert_same_run, checkpoint, dataset, one_sentence, only_run, run_forked, succeeded, write
from forked import Forked
from test_closed_forms import random_batch

from baselines import spot
from baselines.spot import Args, ContinuousSPOT, DensityModel, DiscreteSPOT, defaults, fine_tune
from vqvae import ActionVQVAE, Memory, Task, Transitions, UserError, copy_learner, minimize, play


def discrete(num_codes=8, **fields):
    """SAQ-SPOT with random Q networks and a random prior."""
    spot = DiscreteSPOT(3, ActionVQVAE(3, 2, num_codes, hidden=(8,)), dataclasses.replace(Args(), **fields))
    for network in (*spot.qf, *spot.qf_target, spot.vqvae.prior):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.1
    return spot


def continuous(**fields):
    spot = ContinuousSPOT(3, 2, dataclasses.replace(Args(), **fields))
    for parameter in spot.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return spot


def lower_q(networks, obs):
    return torch.minimum(*(network(obs) for network in networks))


def same_gradients(ours, expected, network, atol=1e-6):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for loss in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# --- Over codes ---


def test_scores_and_loss_by_hand():
    spot, batch = discrete(code_weight=0.2, discount=0.5), random_batch(size=16)
    batch = batch._replace(terminals=torch.arange(16).float() % 2)
    spot.caution.fill_(0.5)
    size = torch.stack([qf(batch.obs) for qf in spot.qf]).abs().mean()
    log_p = spot.vqvae.prior(batch.next_obs).log_softmax(1)
    best = (lower_q(spot.qf, batch.next_obs) / size + 0.5 * 0.2 * log_p).argmax(1)  # the online networks choose
    y = lower_q(spot.qf_target, batch.next_obs)[range(16), best]  # the targets rate
    y = (batch.rewards + 0.5 * (1 - batch.terminals) * y).detach()
    expected = sum((qf(batch.obs)[range(16), batch.codes] - y).square().mean() for qf in spot.qf)
    same_gradients(spot.qf_loss(batch)[0], expected, spot.qf)
    assert spot.q_size.item() == pytest.approx(size.item())
    assert not spot.q_size.requires_grad


def test_limits_of_lambda():
    """Large: the likeliest code. 0: greedy Q. In between, the mode of p exp(Q / (lambda mean |Q|)), AWAC's policy."""
    obs = torch.randn(64, 3)
    for weight, of in ((1e6, lambda spot: spot.vqvae.prior_logits(obs)), (0.0, lambda spot: lower_q(spot.qf, obs))):
        spot = discrete(code_weight=weight)
        assert torch.equal(spot.scores(obs).argmax(1), of(spot).argmax(1))
        assert torch.equal(spot.policy_logits(obs).argmax(1), of(spot).argmax(1))
    spot = discrete(code_weight=0.3)
    spot.q_size.fill_(0.7)
    policy = spot.vqvae.prior_logits(obs).softmax(1) * (lower_q(spot.qf, obs) / (0.3 * 0.7)).exp()
    torch.testing.assert_close(spot.policy_logits(obs).softmax(1), policy / policy.sum(1, keepdim=True))
    assert torch.equal(policy.argmax(1), spot.scores(obs).argmax(1))


def test_the_hard_support():
    """epsilon 0 leaves every code (DQN), 1 the likeliest alone; what lies outside has no effect."""
    obs = torch.randn(64, 3)
    free, bound = discrete(hard=0.0), discrete(hard=1.0)
    assert torch.equal(free.scores(obs).argmax(1), lower_q(free.qf, obs).argmax(1))
    assert torch.equal(bound.scores(obs).argmax(1), bound.vqvae.prior_logits(obs).argmax(1))
    spot = discrete(hard=0.1)
    p = spot.vqvae.prior_logits(obs).softmax(1)
    assert torch.equal(spot.scores(obs).isfinite(), (p > 0.1) | (p == p.amax(1, keepdim=True)))
    spot.caution.fill_(0.2)  # online, codes come back
    assert torch.equal(spot.scores(obs).isfinite(), (p > 0.02) | (p == p.amax(1, keepdim=True)))
    actions, codes = spot.explore(obs)
    assert (p[range(64), codes] > 0.02).all()


@pytest.mark.parametrize("fields", [{"code_weight": 0.1}, {"hard": 0.05}])
def test_units_of_rewards_change_nothing(fields):
    """Q times 1000, and what is done stays: lambda is a price in units of mean |Q|, as in the paper."""
    spot, batch = discrete(**fields), random_batch()
    spot.qf_loss(batch)
    before = spot.scores(batch.obs)
    for network in spot.qf:
        network[-1].weight.data *= 1000
    spot.qf_loss(batch)
    torch.testing.assert_close(spot.scores(batch.obs), before, rtol=1e-4, atol=1e-4)


def test_a_state_is_acted_upon_the_same_in_any_company():
    """mean |Q| is the last batch's of training, not that of the states which act together."""
    spot, obs = discrete(act="greedy"), torch.randn(10, 3)
    spot.update(random_batch())
    torch.testing.assert_close(spot.act(obs)[:1], spot.act(torch.cat([obs[:1], 100 * obs[1:]]))[:1])


# --- Over continuous actions ---


def elbo_by_hand(model, obs, actions, noise):
    """The negative bound of a Gaussian decoder of variance beta / 4, times beta / (2 A), less its constant."""
    beta, size = 0.5, actions.shape[1]
    mean, log_std = model.encoder(torch.cat([obs, actions], 1)).split(2 * size, 1)
    latent = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum(1)
    decoded = model.decoder(torch.cat([obs, mean + noise * log_std.exp()], 1)).tanh()
    likelihood = torch.distributions.Normal(decoded, (beta / 4) ** 0.5)
    constant = size * 0.5 * math.log(2 * math.pi * beta / 4)
    return beta / (2 * size) * (kl - likelihood.log_prob(actions).sum(1) - constant)


def test_the_bound_is_the_authors(monkeypatch):
    """Sums and means as they take them: the squared error over A, the divergence over 2 A; of each row."""
    model, batch, noise = DensityModel(3, 2, hidden=(16, 16)), random_batch(size=8), torch.randn(8, 4)
    for network in (model.encoder, model.decoder):
        network[-1].weight.data = torch.randn_like(network[-1].weight) * 0.3
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    actions = batch.actions.requires_grad_()
    ours, expected = model.elbo_loss(batch.obs, actions), elbo_by_hand(model, batch.obs, actions, noise)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    same_gradients(ours.mean(), expected.mean(), model)
    gradients = [torch.autograd.grad(loss.sum(), actions)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)  # both ways: through the encoder and the error
    assert model.optimizer.defaults["initial_lr"] == 1e-3


def test_critics_by_hand(monkeypatch):
    spot, batch, noise = continuous(discount=0.5), random_batch(), 3 * torch.randn(64, 2)
    batch = batch._replace(terminals=torch.arange(64).float() % 2)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)

    def q(critics, obs, actions):
        return [critic(torch.cat([obs, actions], 1))[:, 0] for critic in critics]

    actions = (spot.actor_target(batch.next_obs).tanh() + (0.2 * noise).clip(-0.5, 0.5)).clip(-1, 1)
    y = batch.rewards + 0.5 * (1 - batch.terminals) * torch.minimum(*q(spot.qf_target, batch.next_obs, actions))
    expected = sum((value - y.detach()).square().mean() for value in q(spot.qf, batch.obs, batch.actions))
    same_gradients(spot.qf_loss(batch)[0], expected, spot.qf)


def test_the_policys_loss_by_hand(monkeypatch):
    """-mean Q1 / mean |Q1|, the divisor without gradient, plus lambda times the bound; lambda is the online phase's."""
    spot, batch, noise = continuous(density_weight=0.3), random_batch(), torch.randn(64, 4)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    spot.caution.fill_(0.4)
    actions = spot.actor(batch.obs).tanh()
    q = spot.qf[0](torch.cat([batch.obs, actions], 1))[:, 0]
    expected = -q.mean() / q.abs().mean().item()
    expected = expected + 0.4 * 0.3 * elbo_by_hand(spot.vae, batch.obs, actions, noise).mean()
    same_gradients(spot.actor_loss(batch)[0], expected, spot.actor)


def test_every_second_step_moves_the_policy_and_all_targets():
    """All of them after both losses, toward what these have made; the model of the data stays as it is."""
    spot, batch = continuous(), random_batch()
    before = copy.deepcopy(spot)
    spot.update(batch)
    for name in ("actor", "actor_target", "qf_target", "vae"):
        ours, theirs = getattr(spot, name).state_dict(), getattr(before, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    spot.update(batch)
    for target, network in (("actor_target", "actor"), ("qf_target", "qf")):
        names = (getattr(spot, target), getattr(before, target), getattr(spot, network))
        for new, old, fast in zip(*(module.parameters() for module in names), strict=True):
            assert not torch.equal(new, old)
            torch.testing.assert_close(new, old + 0.005 * (fast - old))
    assert all(torch.equal(a, b) for a, b in zip(spot.vae.parameters(), before.vae.parameters(), strict=True))
    assert {state["step"].item() for state in spot.actor_optimizer.state_dict()["state"].values()} == {1}


# --- A bandit: one state, two good actions, -1 and 1 ---


def bandit():
    obs = torch.ones(64, 1)
    actions = torch.where(torch.arange(64) % 2 == 0, -1.0, 1.0)[:, None]
    return Transitions(obs, actions, torch.ones(64), obs, torch.ones(64), (actions[:, 0] > 0).long())


def test_between_two_good_actions_the_policy_ends_at_one():
    """Where a squared distance from the data ends at 0 (tests/test_rebrac.py), no density stands. Critics that like 0 a
    little better than what is in the data change nothing, as long as lambda asks for the data."""
    batch, ends, model = bandit(), {}, DensityModel(1, 1, hidden=(64, 64))
    for _ in range(200):
        model.update(batch)
    for weight in (1.0, 0.0):
        spot = ContinuousSPOT(1, 1, dataclasses.replace(Args(), density_weight=weight, lr=3e-3))
        spot.vae, spot.q_values = model, lambda qf, obs, actions: (1 - 0.1 * actions.square()).T.expand(2, -1)
        for _ in range(100):
            minimize(*spot.actor_loss(batch), spot.actor_optimizer)
        ends[weight] = spot.act(batch.obs[:1]).abs().item()
    assert ends[1.0] > 0.9
    assert ends[0.0] < 0.1


@pytest.mark.parametrize("fields", [{"code_weight": 0.1}, {"hard": 0.02}])
def test_over_codes_too(fields):
    """Of codes at -1, 1 and 0, no data use the last, and Q, which nothing contradicts there, likes it best."""
    batch, vqvae = bandit(), ActionVQVAE(1, 1, 3, hidden=(8,))
    vqvae.decode = lambda obs, codes: torch.tensor([-1.0, 1.0, 0.0])[codes][:, None]
    vqvae.prior_logits = lambda obs: torch.tensor([0.499, 0.499, 0.002]).log().expand(len(obs), -1)
    spot = DiscreteSPOT(1, vqvae, dataclasses.replace(Args(), lr=1e-3, **fields))
    for _ in range(40):
        spot.update(batch)
    size = spot.q_size.item()
    for network in spot.qf:
        network[-1].bias.data[2] += network(batch.obs)[0].amax().item() - network(batch.obs)[0, 2].item() + 0.3 * size
    assert lower_q(spot.qf, batch.obs)[0].argmax() == 2
    assert spot.act(batch.obs[:1]).abs().item() == 1
    assert spot.diagnose(batch)["log_density"].item() == pytest.approx(math.log(0.499))


# --- What the online phase stores and learns ---


def tiny_task(limit=5):
    return Task(
        gym.make(f"{tiny_envs.__name__}:Tiny-v0", max_episode_steps=limit),
        float,
        0.0,
        "",
        lambda reward: 2 * reward - 1,
    )


def memory_of(rows=6, room=20):
    data = Transitions(*(column[:rows] for column in random_batch()))
    memory = Memory(data, room)
    memory.fill(data)
    return data, memory


def test_rows_are_written_behind_the_datasets_and_drawn_alike():
    data, memory = memory_of(room=4)
    assert set(memory.sample(1000).obs[:, 0].tolist()) == set(data.obs[:, 0].tolist())  # the room is not drawn from
    assert memory.sample(5_000, 100.0).obs.std().item() == pytest.approx(100.0, rel=0.05)  # noise, of --obs-noise
    columns = [column.data_ptr() for column in memory.columns]
    for i in range(2):
        memory.add(Transitions(torch.full((3,), 9.0 + i), torch.zeros(2), i, torch.ones(3), 0.0, i), i == 1)
    assert [column.data_ptr() for column in memory.columns] == columns
    assert memory.new().codes.tolist() == [0, 1]
    shares = [(memory.sample(40_000).obs[:, 0] == value).float().mean().item() for value in (9.0, 10.0)]
    assert shares == pytest.approx([1 / 8, 1 / 8], abs=0.01)
    fresh = memory_of(room=4)[1]
    fresh.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert torch.equal(fresh.new().obs, memory.new().obs)
    assert (int(fresh.count), fresh.began) == (8, 2)
    assert len(memory.state_dict()["obs"]) == 2  # of the dataset, nothing is saved


def test_transitions_are_the_environments_in_the_datas_units():
    vqvae, (_, memory) = ActionVQVAE(3, 2, 4, hidden=(8,)), memory_of()
    vqvae.set_units(5 * torch.randn(100, 3) + 2)
    action = torch.tensor([[0.5, -0.5]])
    steps = play(lambda obs: (action[:, :1], torch.tensor([3])), memory, vqvae, tiny_task(), seed=0)
    memory.columns = memory.columns._replace(actions=memory.columns.actions[:, :1].contiguous())
    for _ in range(7):
        next(steps)
    new, std = memory.new(), vqvae.obs_std
    torch.testing.assert_close(new.next_obs[:4], new.obs[1:5])  # an episode of five, whose end is a time limit
    torch.testing.assert_close((new.next_obs - new.obs) * std, torch.full((7, 3), 0.05), atol=1e-5, rtol=0)
    place = new.next_obs * std + vqvae.obs_mean
    torch.testing.assert_close(new.rewards, -2 * place.abs().sum(1) - 1)
    assert new.terminals.tolist() == [0] * 7
    assert new.codes.tolist() == [3] * 7
    assert memory.began == 5


class Goal(gym.Wrapper):
    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        return obs, reward, truncated, truncated, info  # reached in the last step allowed


def test_a_goal_in_the_last_step_allowed_is_a_terminal():
    gym.register("Goal-v0", lambda: Goal(gym.make("Tiny-v0")))
    data, memory = memory_of()
    task = tiny_task()._replace(env=gym.make("Goal-v0"))
    vqvae = ActionVQVAE(3, 1, 4, hidden=(8,))
    memory.columns = memory.columns._replace(actions=torch.zeros(26, 1))
    steps = play(lambda obs: (torch.zeros(1, 1), torch.zeros(1)), memory, vqvae, task, seed=0)
    for _ in range(6):
        next(steps)
    assert memory.new().terminals.tolist() == [0, 0, 0, 0, 1, 0]


def test_an_episode_goes_on_where_a_memory_was_saved_in_it():
    """Its actions are played again from its seed: the transitions that follow are the same."""

    def actions(obs):
        return obs[:, :1].tanh(), torch.zeros(1)

    vqvae, memories = ActionVQVAE(3, 1, 4, hidden=(8,)), []
    for stops in ((13,), (8, 5), (5, 4, 4)):
        data = random_batch(action_dim=1)
        state = Memory(data, 13).state_dict()
        for steps in stops:
            memory = Memory(data, 13)
            memory.load_state_dict(state)
            played = play(actions, memory, vqvae, tiny_task(), seed=3)
            for _ in range(steps):
                next(played)
            state = memory.state_dict()
        memories.append(memory.new())
    for other in memories[1:]:
        assert all(torch.equal(a, b) for a, b in zip(memories[0], other, strict=True))
    starts = memories[0].obs[[0, 5, 10], 0].tolist()
    assert len(set(starts)) == 3  # each episode has a seed of its own


@pytest.mark.parametrize("agent", ["discrete", "continuous"])
def test_lambda_falls_and_the_rate_stays(agent):
    """To a fifth, linearly; an update a step; without updates nothing moves, lambda included."""
    args = dataclasses.replace(Args(), online_steps=10, batch_size=8, lr=1e-3, steps=100)
    vqvae, data = ActionVQVAE(3, 1, 4, hidden=(8,)), random_batch(action_dim=1, num_codes=4)
    learner = DiscreteSPOT(3, vqvae, args) if agent == "discrete" else ContinuousSPOT(3, 1, args)
    for updates in (True, False):
        memory, before, falls = Memory(data, 10), copy.deepcopy(learner.state_dict()), []
        memory.fill(data)
        args = dataclasses.replace(args, online_updates=updates)
        for step, info in fine_tune(learner, memory, vqvae, tiny_task(), args, 100, 110):
            falls.append(learner.caution.item())
            assert step == 100 + len(falls)
            assert bool(info) == updates
        assert len(memory.new().obs) == 10
        if updates:
            assert falls == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2])
            assert learner.qf_optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-3)
        unmoved = [torch.equal(value, before[name]) for name, value in learner.state_dict().items() if "qf" in name]
        assert all(unmoved) != updates


def test_exploration_stays_near_the_policy():
    """Over codes: what the stored code stands for, exactly. Else noise of 0.1, clipped."""
    obs = torch.randn(1, 3).expand(4000, -1)
    spot = discrete(code_weight=0.3)
    actions, codes = spot.explore(obs)
    torch.testing.assert_close(actions, spot.vqvae.decode(obs, codes).clamp(-1, 1))
    shares = torch.bincount(codes, minlength=8) / 4000
    torch.testing.assert_close(shares, spot.policy_logits(obs[:1]).softmax(1)[0], atol=0.04, rtol=0)
    spot = continuous()
    with torch.no_grad():
        spot.actor[-1].bias.copy_(torch.tensor([0.0, 5.0]))
    noise = spot.explore(obs)[0] - spot.act(obs)
    assert noise[:, 0].std().item() == pytest.approx(0.1, abs=0.01)
    assert spot.explore(obs)[0].abs().max() <= 1


def test_the_twin_begins_where_the_agent_has_ended():
    """Weights, targets and Adam's averages are copies; the learning rate that had fallen to 0 is not taken."""
    args, batch = dataclasses.replace(Args(), lr=1e-3), random_batch(action_dim=1)
    agent, twin = (ContinuousSPOT(3, 1, args) for _ in range(2))
    for _ in range(2):
        agent.update(batch)
    agent.qf_optimizer.param_groups[0]["lr"].zero_()
    copy_learner(agent, twin)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), twin.state_dict().values(), strict=True))
    assert twin.qf_optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-3)
    before = copy.deepcopy((agent.state_dict(), agent.qf_optimizer.state_dict()))
    moments = [optimizer.state_dict()["state"][0]["exp_avg"] for optimizer in (agent.qf_optimizer, twin.qf_optimizer)]
    assert torch.equal(*moments)
    twin.update(batch)
    after = agent.state_dict(), agent.qf_optimizer.state_dict()
    assert all(torch.equal(before[0][key], after[0][key]) for key in after[0])
    assert torch.equal(before[1]["state"][0]["exp_avg"], after[1]["state"][0]["exp_avg"])


def test_online_facts_by_hand(capsys):
    """Codes by the sign of an action: of four new ones three are stored as that; errors of an all-zero decoder."""
    old, new = torch.tensor([[0.5], [-0.5]]), torch.tensor([[0.2], [-0.2], [0.4], [-0.4]])
    transitions = [Transitions(torch.zeros(len(a), 3), a, *[torch.zeros(len(a))] * 4) for a in (old, new)]
    data, fresh = (rows._replace(codes=(rows.actions[:, 0] > 0).long()) for rows in transitions)
    fresh.codes[3] = 1
    memory = SimpleNamespace(new=lambda: fresh)
    vqvae = SimpleNamespace(encode_dataset=lambda obs, actions: (actions[:, 0] > 0).long())
    history = {"saq_online/score": ([1, 2], [10.0, 30.0]), "spot_online/score": ([1], [40.0])}
    run = SimpleNamespace(history=history.get, args=SimpleNamespace(reference=50.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spot, "codebook_health", lambda _, obs, a: {"reconstruction_error": a.square().mean().item()})
        facts = spot.online_facts(run, "saq_online", memory, vqvae, data)
        twin = spot.online_facts(run, "spot_online", memory, vqvae, data)
    assert (facts["same_code"], facts["regret"], facts["reference"]) == pytest.approx((0.75, 1 - 20 / 50, 50))
    assert (facts["error_offline"], facts["error_online"]) == pytest.approx((0.25, 0.1))
    assert "same_code" not in twin
    assert twin["regret"] == pytest.approx(1 - 40 / 50)
    assert capsys.readouterr().out.startswith("saq_online: regret 0.6, reference 50, same_code 0.75")


class Moody(gym.Env):
    """Episodes of five steps. `says`: what it returns in a step, by its number since the beginning of all."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    steps = 0

    def __init__(self, says=None, resets=None):
        self.says, self.resets = says or {}, resets

    def observe(self):
        return np.full(3, self.time / 10 + (self.resets.count(self.seed) - 1 if self.resets is not None else 0))

    def reset(self, *, seed=None, options=None):
        self.seed, self.time = seed, 0
        if self.resets is not None:
            self.resets.append(seed)
        return self.observe().astype(np.float32), {}

    def step(self, action):
        Moody.steps, self.time = Moody.steps + 1, self.time + 1
        obs, reward, info = self.observe().astype(np.float32), 1.0, {}
        for what, value in self.says.get(Moody.steps, {}).items():
            obs, reward = (obs * value, reward) if what == "obs" else (obs, value if what == "reward" else reward)
            info = {what: value} if what == "data_reward" else info
        return obs, reward, False, self.time == 5, info


def steps_in(env, count, memory=None):
    """A memory after so many steps of no consequence."""
    Moody.steps = 0
    data = random_batch(action_dim=1, num_codes=4)
    memory = memory or Memory(data, 20)
    vqvae = ActionVQVAE(3, 1, 4, hidden=(8,))
    task = Task(env, None, 0.0, "", lambda reward: 2 * reward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make", lambda spec: env)
        generator = play(lambda obs: (torch.zeros(1, 1), torch.zeros(1).long()), memory, vqvae, task, 0)
        for _ in range(count):
            next(generator)
    return memory


def test_rewards_are_what_the_data_would_pay():
    """Where that differs, the environment says so; then as the data's are scaled."""
    memory = steps_in(Moody({2: {"data_reward": -3.0}}), 3)
    assert memory.new().rewards.tolist() == [2, -6, 2]


@pytest.mark.parametrize("what", ["obs", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_end_the_phase_in_a_sentence(what, value):
    with pytest.raises(UserError, match="in online step 3 the environment gives NaN or infinity"):
        steps_in(Moody({3: {what: value}}), 4)


def test_an_environment_that_cannot_repeat_an_episode_begins_another(capsys):
    """After seven steps the second episode has two; where its seed leads elsewhere, a third begins."""
    memory = steps_in(Moody(), 7)
    assert memory.began == 5
    steps_in(Moody(), 1, memory)  # the same from the same seed
    assert (memory.began, len(memory.new().obs), capsys.readouterr().out) == (5, 8, "")
    resets = [1_000_005]  # as if this seed had been played already
    steps_in(Moody(resets=resets), 1, memory)
    assert "does not do the same from the same seed" in capsys.readouterr().out
    assert resets == [1_000_005, 1_000_005, 1_000_008]
    assert (memory.began, len(memory.new().obs)) == (8, 9)


def test_the_policy_steps_on_critics_that_have_stepped():
    """In the second update; the first leaves it, and Adam knows nothing of it."""
    agent, batch = continuous(), random_batch()
    agent.update(batch)
    other = copy.deepcopy(agent)
    torch.manual_seed(0)
    agent.update(batch)
    torch.manual_seed(0)
    minimize(*other.qf_loss(batch), other.qf_optimizer)
    gradients = torch.autograd.grad(other.actor_loss(batch)[0], list(other.actor.parameters()))
    for parameter, gradient in zip(agent.actor.parameters(), gradients, strict=True):
        moment = agent.actor_optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * gradient, atol=1e-9, rtol=1e-4)


# --- Runs ---


SHORT = ["--env", "tiny_envs:Tiny-v0", "--eval-episodes", 1, "--final-episodes", 1, "--batch-size", 16]
SHORT += ["--steps", 10, "--vae-steps", 10, "--vq-steps", 10, "--eval-every", 10, "--log-every", 5, "--num-codes", 4]
SCRIPT = "baselines/spot.py"


def start(out, data, *words, **kwargs):
    return Forked("--out", out, "--dataset-path", data, *SHORT, *words, script=SCRIPT, path=[ROOT], **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("spot") / "tiny.npz", dataset(n=60, episode=5))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run with 22 online steps of each agent, and its process."""
    out = tmp_path_factory.mktemp("whole")
    process = succeeded(start(out, tiny, "--online-steps", 22, "--reward-scale", 0, "--reward-shift", 1).wait())
    return only_run(out), process


def test_an_online_run_says_what_came_of_it(whole):
    folder, process = whole
    result = json.loads((folder / "result.json").read_text())
    for agent, name in (("saq_spot", "saq_online"), ("spot", "spot_online")):
        assert result[agent]["returns"] != result[name]["returns"]
        facts = result["online"][name]
        assert facts["regret"] == pytest.approx(1 - sum(facts["scores"]) / 3 / 100)  # after steps 10, 20 and 22
        assert f"{name}: regret {facts['regret']:.4g}" in process.stdout
        assert facts["error_offline"] > 0
        memory = checkpoint(folder)["parts"][f"{name}_memory"]
        assert len(memory["obs"]) == 22
    steps = [
        float(line.split(",")[0])
        for line in (folder / "metrics.csv").read_text().splitlines()[1:]
        if "saq_online/score" in line
    ]
    assert steps == [20, 30, 32]  # counted on from the offline ones


@pytest.mark.parametrize(("update", "number"), [(57, signal.SIGTERM), (98, signal.SIGKILL), (112, signal.SIGTERM)])
def test_stopped_online_and_resumed_is_bit_for_bit_the_same(whole, tiny, update, number, tmp_path):
    """In the middle of an episode: where SIGTERM stops it, there; where it is killed, back at the last checkpoint."""
    words = ["--online-steps", 22, "--reward-scale", 0, "--reward-shift", 1]
    process = start(tmp_path, tiny, *words, before=("signal_in_update", number, update)).wait()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    folder = only_run(tmp_path)
    done, memories = checkpoint(folder)["done"], checkpoint(folder)["parts"]
    assert ("spot_online" if update > 80 else "saq_online") in process.stderr
    if number == signal.SIGTERM:
        name = "spot_online" if update > 80 else "saq_online"
        rows = done[name] - 10
        assert len(memories[f"{name}_memory"]["obs"]) == rows
    succeeded(run_forked("--resume", folder, script=SCRIPT, path=[ROOT]))
    assert_same_run(whole[0], folder)


def test_an_offline_run_goes_on_online_and_then_further(whole, tiny, tmp_path):
    """The offline agents are those of a run that had an online phase from the beginning; the phase can be lengthened,
    not shortened; without updates every evaluation is the offline agent's."""
    words = ["--reward-scale", 0, "--reward-shift", 1, "--no-online-updates"]
    succeeded(start(tmp_path, tiny, *words).wait())
    folder = only_run(tmp_path)
    assert json.loads((folder / "result.json").read_text())["online"] == {}
    succeeded(run_forked("--resume", folder, "--online-steps", 12, script=SCRIPT, path=[ROOT]))
    succeeded(run_forked("--resume", folder, "--online-steps", 17, script=SCRIPT, path=[ROOT]))
    ours, theirs = (json.loads((run / "result.json").read_text()) for run in (folder, whole[0]))
    for agent, name in (("saq_spot", "saq_online"), ("spot", "spot_online")):
        assert ours[agent] == theirs[agent]
        assert len(ours["online"][name]["scores"]) == 3
        assert set(ours["online"][name]["scores"]) == set(ours[agent]["last_5_scores"])
        assert ours[name]["returns"] == ours[agent]["returns"]
    before = ours["online"]["spot_online"]
    succeeded(run_forked("--resume", folder, "--reference", 50, script=SCRIPT, path=[ROOT]))  # a divisor, no more
    facts = json.loads((folder / "result.json").read_text())["online"]["spot_online"]
    assert (facts["scores"], facts["regret"]) == (before["scores"], pytest.approx(2 * before["regret"] - 1))
    line = one_sentence(run_forked("--resume", folder, "--online-steps", 9, script=SCRIPT, path=[ROOT]))
    assert "17 online steps are done" in line
    line = one_sentence(run_forked("--resume", folder, "--steps", 20, script=SCRIPT, path=[ROOT]))
    assert "the online phase has begun where the offline one ended: leave steps out" in line


def test_evaluating_again_finds_all_four(whole):
    process = succeeded(run_forked("--eval-only", whole[0], "--eval-episodes", 1, script=SCRIPT, path=[ROOT]))
    assert [line.split()[0] for line in process.stdout.split("return\n")[1].splitlines()[:4]] == [
        "saq_spot",
        "spot",
        "saq_online",
        "spot_online",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--online-steps", -1],
        ["--online-weight", 2],
        ["--reference", 0],
        ["--hard", 2],
        ["--code-weight", -1],
        ["--vae-steps", 0],
        ["--env", "none", "--online-steps", 5],
    ],
)
def test_bad_input_is_one_sentence(tiny, words, tmp_path):
    one_sentence(start(tmp_path / "out", tiny, *words).wait())
    assert not (tmp_path / "out").exists()


def test_a_copy_beside_vqvae_goes_online_without_its_twin(tmp_path):
    for file in (ROOT / SCRIPT, ROOT / "vqvae.py"):
        shutil.copy(file, tmp_path)
    arrays = dataset()
    arrays["actions"] *= 2  # Pendulum's torque lies in [-2, 2]
    write(tmp_path / "mine.npz", arrays)
    words = ["--env", "Pendulum-v1", "--dataset-path", "mine.npz", "--no-compare", *SHORT[2:], "--online-steps", 1]
    succeeded(run_forked(*words, cwd=tmp_path, script="spot.py"))
    result = json.loads((only_run(tmp_path / "runs") / "result.json").read_text())
    assert set(result) - {"provenance", "data_score", "episodes", "online"} == {"saq_spot", "saq_online"}
    assert len(result["online"]["saq_online"]["scores"]) == 1


def test_weights_of_the_density_by_task():
    """The authors' table; the longest name counts."""
    weights = {"hopper-medium-v2": 0.1, "hopper-medium-expert-v2": 0.2, "halfcheetah-medium-replay-v2": 0.05}
    weights |= {"halfcheetah-medium-expert-v2": 1.0, "walker2d-medium-v2": 0.2, "walker2d-medium-expert-v2": 0.5}
    weights |= {"antmaze-umaze-v2": 0.25, "antmaze-umaze-diverse-v2": 0.25, "antmaze-medium-play-v2": 0.05}
    weights |= {"antmaze-medium-diverse-v2": 0.025, "antmaze-large-play-v2": 0.025, "antmaze-large-diverse-v2": 0.025}
    assert {task: defaults(task).density_weight for task in weights} == weights
    assert all(defaults(task).reward_shift == -1 for task in weights if task.startswith("antmaze"))  # 0 at the goal
