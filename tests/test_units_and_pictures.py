"""Units of observations, the figure of the codes, films."""

import io
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import dataset, only_run, run_forked, succeeded, write

from saq_cql import evaluate, make_eval_envs
from vqvae import ActionVQVAE, plot_codes

SHORT_RUN = ["--steps", 4, "--eval-every", 2, "--eval-episodes", 1, "--final-episodes", 1, "--batch-size", 16]
SHORT = ["--vq-steps", 4, "--num-codes", 2, *SHORT_RUN]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "tiny.npz", dataset(n=60, episode=5))


# --- Units ---


def test_units_are_mean_and_standard_deviation():
    """Also of millions beside thousandths; constant columns, zero or not, keep their scale."""
    obs = torch.randn(2000, 5) * torch.tensor([1e-3, 1e6, 1.0, 0.0, 0.0]) + torch.tensor([5.0, -2e7, 0.0, 3.0, 0.0])
    vqvae = ActionVQVAE(5, 2, 4, hidden=(8,))
    assert torch.equal(vqvae.normalize(obs), obs)
    vqvae.set_units(obs)
    seen = vqvae.normalize(obs)
    torch.testing.assert_close(seen[:, :3].mean(0), torch.zeros(3), atol=5e-3, rtol=0)
    torch.testing.assert_close(seen[:, :3].std(0, correction=0), torch.ones(3), atol=5e-3, rtol=0)
    assert (seen[:, 3:] == 0).all()
    torch.testing.assert_close(vqvae.normalize(obs[:1] + 1)[0, 3:], torch.ones(2))
    assert seen.dtype == torch.float32


def test_units_of_one_row_and_of_nearly_equal_ones():
    """A constant that float32 rounds differently from row to row is one still."""
    vqvae = ActionVQVAE(2, 1, 4, hidden=(8,))
    vqvae.set_units(torch.tensor([[3.0, -1.0]]))
    assert vqvae.normalize(torch.tensor([[4.0, -1.0]])).tolist() == [[1.0, 0.0]]
    vqvae.set_units(torch.tensor([[1000.0, 0.0], [1000.0001, 1.0]]))
    assert vqvae.normalize(torch.tensor([[1001.0, 0.5]]))[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-3)


def test_units_are_saved_and_loaded():
    obs = 3 * torch.randn(100, 3) + 7
    vqvae, fresh = ActionVQVAE(3, 1, 4, hidden=(8,)), ActionVQVAE(3, 1, 4, hidden=(8,))
    vqvae.set_units(obs)
    fresh.load_state_dict(vqvae.state_dict())
    assert torch.equal(fresh.normalize(obs), vqvae.normalize(obs))
    assert not vqvae.obs_mean.requires_grad


class Recorder(torch.nn.Module):
    """A policy that stands still and remembers what it saw."""

    def act(self, obs):
        self.seen = obs
        return torch.zeros(len(obs), 1)


def test_policies_see_the_environment_in_the_datas_units():
    vqvae, agent = ActionVQVAE(3, 1, 4, hidden=(8,)), Recorder()
    vqvae.obs_mean.fill_(2.0)
    vqvae.obs_std.fill_(4.0)
    envs = make_eval_envs(gym.make("tiny_envs:Tiny-v0").spec, 2)
    evaluate(agent, vqvae, envs, 2)
    place = np.stack([env.unwrapped.place for env in envs.envs])  # standing still, where it began
    np.testing.assert_allclose(agent.seen[:2].numpy(), (place - 2) / 4, rtol=1e-5)
    assert agent.seen.shape == (10, 3)


@pytest.mark.parametrize("script", ["saq_cql", "baselines/rebrac", "baselines/fql", "baselines/spot"])
def test_a_unit_of_ones_own_changes_nothing(tmp_path, data, script):
    """With --normalize-obs the same observations in other units train the same policy up to rounding; a user's own
    data are measured so by default, and --no-normalize-obs leaves them as they are."""
    arrays = dataset(n=60, episode=5)
    arrays["observations"] = arrays["observations"] * np.float32([1e3, 1e-2, 1]) + np.float32([5, 0, -1])
    other = write(tmp_path / "other.npz", arrays)
    losses = []
    for path, flags in [(data, []), (other, []), (data, ["--no-normalize-obs"]), (other, ["--no-normalize-obs"])]:
        out = tmp_path / str(len(losses))
        command = ["--env", "none", "--dataset-path", path, "--out", out, "--no-compare", "--log-every", 1]
        command += SHORT_RUN if script in ("baselines/rebrac", "baselines/fql") else SHORT  # they have no quantizer
        command += ["--vae-steps", 4] if script == "baselines/spot" else []
        succeeded(run_forked(*command, *flags, script=f"{script}.py"))
        lines = (only_run(out) / "metrics.csv").read_text().splitlines()
        losses.append([float(line.split(",")[2]) for line in lines if re.search(r"/(qf_)?loss,", line)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[3] != pytest.approx(losses[2], rel=1e-2)


# --- Figures ---


@pytest.mark.parametrize("action_dim", [1, 2, 5])
def test_codes_are_drawn_in_six_states(action_dim):
    """As arrows in two dimensions, otherwise a mark for the value of each; black is the data's own action."""
    vqvae = ActionVQVAE(3, action_dim, 4, hidden=(8,))
    obs, actions = torch.randn(50, 3), torch.rand(50, action_dim) * 2 - 1
    figure = plot_codes(vqvae, obs, actions)
    assert len(figure.axes) == 6
    for axes, row in zip(figure.axes, torch.linspace(0, 49, 6).long(), strict=True):
        *codes, own = axes.lines
        arrows = [text for text in axes.texts if text.arrow_patch is not None]
        assert (len(codes), len(arrows)) == ((0, 4) if action_dim == 2 else (4, 0))
        drawn = own.get_xydata().flatten() if action_dim == 2 else own.get_ydata()
        np.testing.assert_allclose(drawn, actions[row], rtol=1e-6)
    file = io.BytesIO()
    figure.savefig(file)
    assert file.getvalue()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(plot_codes(vqvae, obs, actions, states=3).axes) == 3


# --- Films ---


def test_films_of_every_agent(tmp_path, data):
    command = ["--env", "tiny_envs:Tiny-v0", "--dataset-path", data, "--out", tmp_path, *SHORT, "--video", 2]
    process = succeeded(run_forked(*command))
    films = sorted(file.name for file in only_run(tmp_path).glob("*.mp4"))
    assert films == [f"{agent}-episode-{i}.mp4" for agent in ("cql", "saq_cql") for i in (0, 1)]
    assert all((only_run(tmp_path) / film).stat().st_size > 0 for film in films)
    assert "warning" not in process.stdout.replace("WARNING: MOST CODES", "")
    succeeded(run_forked("--eval-only", only_run(tmp_path), "--video", 1))


def test_an_environment_that_cannot_be_filmed(tmp_path, data):
    """One warning; the results are there."""
    command = ["--env", "tiny_envs:Dark-v0", "--dataset-path", data, "--out", tmp_path, *SHORT, "--video", 1]
    process = succeeded(run_forked(*command))
    assert process.stdout.count("warning: no video: ") == 1
    (line,) = [line for line in process.stdout.splitlines() if "no video" in line]
    assert "no screen here" in line
    assert (only_run(tmp_path) / "result.json").exists()
