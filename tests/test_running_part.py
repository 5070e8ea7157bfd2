"""What every script shares, once the agents are there: evaluation, seeds, learning rates, seconds, rewards."""

import dataclasses
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, dataset, only_run, run_forked, succeeded, write
from test_closed_forms import random_batch

import saq_cql
from saq_cql import Args, ContinuousCQL, evaluate, learn, make_eval_envs
from vqvae import ActionVQVAE, load_task


class Uneven(gym.Env):
    """Ends after 2, 3 or 4 steps, by its seed, and pays the action, which may be from -2 to 2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 2 + (seed or 0) % 3
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(3, np.float32), float(action[0]), self.left == 0, False, {}


gym.register("Uneven-v0", Uneven, max_episode_steps=10)


def test_an_episode_counts_until_it_ends_and_in_the_environments_own_actions():
    """Four environments side by side, which go on when theirs is over; half of the box is an action of 1."""
    half = SimpleNamespace(act=lambda obs: torch.full((len(obs), 1), 0.5))
    returns = evaluate(half, ActionVQVAE(3, 1, 4), make_eval_envs(gym.spec("Uneven-v0"), 4), 4)
    assert returns.tolist() == [3, 4, 2, 3]  # seeds 1000 to 1003


@pytest.mark.parametrize("decay", [True, False])
def test_the_learning_rates_of_an_agent(decay):
    args = dataclasses.replace(Args(), steps=4, batch_size=8, decay=decay, compile="off")
    agent = ContinuousCQL(3, 2, args)
    optimizers = (agent.actor_optimizer, agent.qf_optimizer)
    rates = [[o.param_groups[0]["lr"].item() for o in optimizers] for _ in learn(agent, random_batch(), args, 0)]
    assert rates[1] == pytest.approx([args.lr * (0.5 if decay else 1)] * 2)
    assert rates[3] == pytest.approx([0.0 if decay else args.lr] * 2, abs=1e-10)


def test_a_seed_is_that_of_networks_and_batches(tmp_path):
    """With a rate of 0 the weights stay as they began."""
    data = write(tmp_path / "data.npz", dataset(n=60, episode=5))
    words = ["--env", "none", "--dataset-path", data, "--no-compare", "--lr", 0, "--num-codes", 2, "--batch-size", 16]
    words += ["--vq-steps", 4, "--steps", 4, "--eval-every", 4]
    for seed in (0, 1):
        succeeded(run_forked(*words, "--seed", seed, "--out", tmp_path / str(seed)))
    one, other = (checkpoint(only_run(tmp_path / seed)) for seed in "01")
    for part, name in (("saq_cql", "qf.0.weight"), ("quantizer", "encoder.0.weight")):
        assert not torch.equal(one["parts"][part][name], other["parts"][part][name])
    assert not any(torch.equal(one["rng"][stream], other["rng"][stream]) for stream in one["rng"])


def test_seconds_are_those_of_updates_alone(monkeypatch):
    """A step takes a second, an evaluation a hundred. The first step of a process, which compiles, does not count."""
    clock = [0.0]
    monkeypatch.setattr(saq_cql.time, "process_time", lambda: clock[0])

    def updates(first, last):
        for step in range(first, last + 1):
            clock[0] += 1
            yield step, {}

    def evaluation():
        clock[0] += 100
        return {}

    state = {"done": {}, "rng": {}, "due": "", "seconds": {}}
    for first, last, seconds in ((1, 6, 5.0), (7, 9, 7.0)):  # the second goes on where the first one stopped
        run = SimpleNamespace(args=Args(device="cpu", eval_every=3, log_every=1), state=state, save=lambda: None)
        run.updating, run.stopping, run.log = False, False, lambda *logged: None
        saq_cql.Run.train(run, "agent", updates(first, last), last, evaluation)
        assert state["seconds"]["agent"] == seconds


def test_rewards_are_scaled_for_learning_and_scores_are_not(tmp_path):
    arrays = dataset(n=20, episode=10)
    kept = [row for row in range(20) if row not in (9, 19)]  # where a time limit cut, what followed is unknown
    task, data = load_task("none", write(tmp_path / "data.npz", arrays), torch.device("cpu"), 2.0, -1.0)
    np.testing.assert_allclose(data.rewards, 2 * arrays["rewards"][kept] - 1, rtol=1e-6)
    assert task.data_score == pytest.approx(arrays["rewards"].sum() / 2, rel=1e-5)
    assert task.reward(3.0) == 5.0
