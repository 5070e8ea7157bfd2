"""benchmarks/held_out.py: its score against drawing, its episodes, its table."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, dataset, one_sentence, run_forked, succeeded, write

sys.path.insert(0, str(ROOT / "benchmarks"))
from held_out import COLUMNS, energy_score, episodes, imitation

from vqvae import Mixture, load_task

SCRIPT = "benchmarks/held_out.py"


def test_the_energy_score_against_drawing():
    p, u, actions = torch.randn(3, 5).softmax(1), torch.randn(3, 5, 2), torch.randn(3, 2)
    one, other = (u[torch.arange(3)[:, None], p.multinomial(200_000, replacement=True)] for _ in range(2))  # (3, n, 2)
    away, apart = (one - actions[:, None]).norm(dim=-1).mean(1), (one - other).norm(dim=-1).mean(1)
    torch.testing.assert_close(energy_score(p, u, actions), away - apart / 2, atol=0.02, rtol=0)


def test_no_policy_scores_better_than_the_one_that_made_the_data():
    u = torch.tensor([[-0.8], [0.0], [0.8]])
    truth = torch.tensor([0.3, 0.1, 0.6])
    scores = {}
    for p in (truth, torch.tensor([0.1, 0.1, 0.8]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]) / 3):
        scores[p] = (truth * energy_score(p.expand(3, -1), u.expand(3, -1, -1), u)).sum().item()
    assert min(scores, key=scores.get) is truth


def test_what_a_perfect_code_scores():
    """One code in use, and it is what the data did."""
    mixture, obs = Mixture(3, 2, 4), torch.randn(20, 3)
    mixture.net[-1].bias.data[0] = 50.0
    energy, greedy, mean, nearest, per_state = imitation(mixture, obs, mixture.candidates(obs)[:, 0].clamp(-1, 1))
    assert (energy, greedy, mean, nearest) == pytest.approx((0, 0, 0, 0), abs=1e-6)
    assert per_state == pytest.approx(1)


def test_episodes_are_told_apart(tmp_path):
    """By time limits, whose last row is left out, and by a terminal, behind which the next observation goes on."""
    arrays = dataset(n=20, episode=5)
    arrays["timeouts"][9] = False
    arrays["terminals"][9] = True
    _, data = load_task("none", write(tmp_path / "data.npz", arrays), torch.device("cpu"), 1.0, 0.0)
    assert np.bincount(episodes(data)).tolist() == [4, 5, 4, 4]


def test_the_table(tmp_path):
    path = write(tmp_path / "data.npz", dataset(n=60, episode=5))
    words = ["--env", "none", "--dataset-path", path, "--vq-steps", 3, "--seeds", 2]
    process = succeeded(run_forked(*words, "--quantizers", "mixture", "aquadem", script=SCRIPT))
    head, *lines = process.stdout.splitlines()[-9:]
    assert head.split() == ["quantizer", "seed", "rows", *COLUMNS]
    kinds = [(kind, seed, rows) for seed in "01" for kind in ("mixture", "aquadem") for rows in ("aside", "seen")]
    assert [tuple(line.split()[:3]) for line in lines] == kinds
    assert all(float(value) > 0 for line in lines for value in line.split()[3:])


@pytest.mark.parametrize("words", [["--seeds", 0], ["--num-codes", 0], ["--dataset-path", "nowhere.npz"]])
def test_bad_input_is_one_sentence(words):
    one_sentence(run_forked("--env", "none", *words, script=SCRIPT))


def test_one_episode_cannot_be_kept_aside(tmp_path):
    path = write(tmp_path / "data.npz", dataset(n=60, episode=60))
    assert "is one episode" in one_sentence(run_forked("--env", "none", "--dataset-path", path, script=SCRIPT))
