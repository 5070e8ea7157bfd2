"""The scripts in baselines/ as programs: runs, copies, resuming, bad input; and their agents in a loop of one's own."""

import copy
import inspect
import json
import re
import shutil
import signal

import pytest
import torch
from conftest import ROOT, assert_same_run, checkpoint, dataset, one_sentence, only_run, run_forked, succeeded, write
from forked import Forked

from baselines import awac, bear, fql, rebrac, spot
from vqvae import ActionVQVAE, Transitions

MODULES = {"rebrac": rebrac, "fql": fql, "awac": awac, "bear": bear, "spot": spot}
AGENTS = {"rebrac": ["rebrac", "td3_bc"], "fql": ["fql", "ifql"], "awac": ["saq_awac", "awac"]}
AGENTS |= {"bear": ["saq_bear", "bear"], "spot": ["saq_spot", "spot"]}
SHORT = ["--env", "tiny_envs:Tiny-v0", "--eval-episodes", 1, "--final-episodes", 2, "--batch-size", 16]
SHORT += ["--steps", 40, "--eval-every", 20, "--log-every", 10]
FLAGS = {script: ["--vq-steps", 20, "--num-codes", 4] for script in ("awac", "bear", "spot")}  # with a quantizer
FLAGS["spot"] += ["--vae-steps", 20]  # its online phase: test_spot.py
NAMES = [(script, name) for script in AGENTS for name in AGENTS[script]]


def flags(out, data, script):
    return ["--out", out, "--dataset-path", data, *SHORT, *FLAGS.get(script, [])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(script): the folder of a short run with both agents, and its process."""
    folder = tmp_path_factory.mktemp("baselines")
    data = write(folder / "tiny.npz", dataset(n=60, episode=5))
    made = {}

    def run(script):
        if script not in made:
            process = succeeded(run_forked(*flags(folder / script, data, script), script=f"baselines/{script}.py"))
            made[script] = (only_run(folder / script), process)
        return made[script]

    run.data = data
    return run


@pytest.mark.parametrize("script", AGENTS)
def test_a_run_ends_in_a_table_and_a_picture(finished, script):
    folder, process = finished(script)
    result = json.loads((folder / "result.json").read_text())
    table = process.stdout.split("return\n")[1].splitlines()[:2]
    assert [line.split()[0] for line in table] == AGENTS[script]
    assert all(len(result[agent]["last_5_scores"]) == 2 for agent in AGENTS[script])
    assert (folder / "comparison.png").exists()
    assert (folder / f"{script}.py").read_text() == (ROOT / "baselines" / f"{script}.py").read_text()
    assert (folder / "codes.png").exists() == (script in FLAGS)


@pytest.mark.parametrize(
    ("script", "update"),
    [
        ("rebrac", 75),
        ("rebrac", 150),
        ("fql", 70),
        ("fql", 190),
        ("awac", 45),
        ("awac", 130),
        ("bear", 90),
        ("bear", 250),
        ("spot", 30),
        ("spot", 65),
        ("spot", 130),
    ],
)
def test_killed_and_resumed_is_bit_for_bit_the_same(finished, script, update, tmp_path):
    """In the training of the first agent, and of the second; every gradient step of an optimizer counts."""
    whole, _ = finished(script)
    process = Forked(
        *flags(tmp_path, finished.data, script),
        script=f"baselines/{script}.py",
        before=("signal_in_update", signal.SIGKILL, update),
        path=[ROOT],
    )
    assert process.wait().returncode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert checkpoint(folder)["done"] != checkpoint(whole)["done"]
    succeeded(run_forked("--resume", folder, script=f"baselines/{script}.py"))
    assert_same_run(whole, folder)


@pytest.mark.parametrize("script", AGENTS)
def test_evaluation_of_a_finished_run(finished, script):
    folder, _ = finished(script)
    otherwise = ["--candidates", 1] if script == "fql" else []  # what is about acting may change
    words = ["--eval-only", folder, "--eval-episodes", 2, *otherwise]
    process = succeeded(run_forked(*words, script=f"baselines/{script}.py"))
    assert all(f"\n{agent} " in process.stdout for agent in AGENTS[script])
    one_sentence(run_forked("--eval-only", folder, "--lr", 1, script=f"baselines/{script}.py"))


@pytest.mark.parametrize("script", AGENTS)
def test_a_copy_beside_vqvae_trains_on_a_users_own_data(script, tmp_path):
    for file in (ROOT / "baselines" / f"{script}.py", ROOT / "vqvae.py"):
        shutil.copy(file, tmp_path)
    arrays = dataset()
    arrays["actions"] *= 2  # Pendulum's torque lies in [-2, 2]
    write(tmp_path / "mine.npz", arrays)
    words = ["--env", "Pendulum-v1", "--dataset-path", "mine.npz", "--no-compare", *SHORT[2:], *FLAGS.get(script, [])]
    process = succeeded(run_forked(*words, cwd=tmp_path, script=f"{script}.py", figures=True))
    assert (only_run(tmp_path / "runs") / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "396 transitions, 4 episodes" in process.stdout
    result = json.loads((only_run(tmp_path / "runs") / "result.json").read_text())
    assert set(AGENTS[script]) & set(result) == {AGENTS[script][0]}


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("rebrac", ["--dataset-path", "nowhere.npz"]),
        ("rebrac", ["--actor-beta", -1]),
        ("rebrac", ["--layers", 0]),
        ("fql", ["--candidates", 0]),
        ("fql", ["--flow-steps", 0]),
        ("fql", ["--expectile", 1]),
        ("awac", ["--temperature", 0]),
        ("bear", ["--sigma", 0]),
        ("bear", ["--samples", 0]),
        ("spot", ["--density-weight", -1]),
    ],
)
def test_bad_input_is_one_sentence(finished, script, wrong, tmp_path):
    words = [*flags(tmp_path / "out", finished.data, script), *wrong]
    one_sentence(run_forked(*words, script=f"baselines/{script}.py"))
    assert not (tmp_path / "out").exists()


def first_batch(script, obs):
    """A batch of obs (B, 3) in the form that a script's agents take."""
    n = len(obs)
    columns = [obs, torch.rand(n, 2) * 2 - 1, torch.rand(n), obs + 1, torch.zeros(n), torch.arange(n) % 4]
    return rebrac.Sarsa(*columns[:5], columns[1]) if script == "rebrac" else Transitions(*columns)


def new_agent(script, name):
    quantizer = [ActionVQVAE(3, 2, 4, hidden=(8,))] if script in FLAGS else []
    return MODULES[script].make_agents(3, 2, *quantizer, MODULES[script].Args())[name]


@pytest.mark.parametrize(("script", "name"), NAMES)
def test_what_targets_follow_and_when(script, name):
    """Flows: the critics of before the step. Those of TD3's family: in every second update, after the step; ReBRAC's
    policy's: of before its own. All others: in every update, after the step."""
    agent, batch = new_agent(script, name), first_batch(script, torch.randn(32, 3))
    delayed = name in ("rebrac", "td3_bc", "spot")
    for update in range(1, 5):
        before = copy.deepcopy(agent)
        agent.update(batch)
        rate = 0.005 if not delayed or update % 2 == 0 else 0.0
        pairs = [(agent.qf_target, before.qf_target, before.qf if script == "fql" else agent.qf)]
        if delayed:
            pairs.append((agent.actor_target, before.actor_target, (agent if name == "spot" else before).actor))
        for target, old, followed in pairs:
            for ours, was, new in zip(target.parameters(), old.parameters(), followed.parameters(), strict=True):
                torch.testing.assert_close(ours, was + rate * (new - was), atol=1e-9, rtol=1e-6)
                assert rate or torch.equal(ours, was)


@pytest.mark.parametrize(("script", "name"), NAMES)
def test_agents_in_a_loop_of_ones_own(script, name):
    """Update and act are all there is; infos hold no graph; docstrings name what is read of the arguments."""
    agent, obs = new_agent(script, name), torch.randn(32, 3)
    batch = first_batch(script, obs)
    before = copy.deepcopy(agent.state_dict())
    for _ in range(4):  # ReBRAC's policy moves in the second, its target first in the fourth
        info = agent.update(batch)
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in info.values())
    still = {key.split(".")[0] for key, value in agent.state_dict().items() if torch.equal(value, before[key])}
    assert still <= {"vqvae", "vae", "caution", "warm_up"}  # all that learns has moved: targets and prices, too
    actions = agent.act(obs)
    assert actions.shape == (32, 2)
    assert actions.abs().max() <= 1
    found = agent.diagnose(batch)
    assert not any(value.requires_grad for value in found.values())
    assert info.keys().isdisjoint(found)  # in metrics.csv one name is one number
    source = inspect.getsource(type(agent))
    if script == "fql":  # its networks and its flow read them
        source += inspect.getsource(fql.network) + inspect.getsource(fql.Flow)
    if script == "bear":  # its constraint does
        source += inspect.getsource(bear.Price)
    (named,) = re.findall(r"Read of `args`: ([^.]*)\.", type(agent).__doc__)
    assert set(re.split(r",\s+", named)) == set(re.findall(r"\bargs\.(\w+)", source))
