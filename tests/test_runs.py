"""Whole runs in processes of their own: files, resuming, evaluation, interruption, a user's own data."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED_DATA, dataset, run_script

SHORT = ["--vq-steps", 200, "--steps", 200, "--eval-every", 100, "--log-every", 50, "--eval-episodes", 1]
SHORT += ["--final-episodes", 2, "--num-codes", 4]


def only_run(out):
    (folder,) = Path(out).iterdir()
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(state, prefix=""):
    """All tensors in a checkpoint, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{prefix}/{key}").items()}


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """finish(script): the folder and the process of one short run of the embedded task with its twins."""
    runs = {}

    def finish(script):
        if script not in runs:
            out = tmp_path_factory.mktemp(script)
            process = run_script("--out", out, *SHORT, script=f"{script}.py")
            assert process.returncode == 0, process.stderr
            runs[script] = (only_run(out), process)
        return runs[script]

    return finish


@pytest.fixture
def finished(finish):
    return finish("saq_cql")


def test_a_run_writes_its_files(finished):
    folder, process = finished
    assert {file.name for file in folder.iterdir()} == {
        "args.json",
        "metrics.csv",
        "checkpoint.pt",
        "result.json",
        "comparison.png",
    }
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["steps"] == 200
    assert about["versions"]["torch"] == torch.__version__
    assert (folder / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with open(folder / "metrics.csv") as file:
        rows = [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]
    names = {name for _, name, _ in rows}
    assert {"quantizer/reconstruction_loss", "quantizer/perplexity", "quantizer/reconstruction_error_a1"} <= names
    assert {
        "saq_cql/td_loss",
        "saq_cql/penalty_exact",
        "saq_cql/score",
        "cql/penalty_sampled",
        "cql/penalty_exact",
    } <= names
    assert [step for step, name, _ in rows if name == "cql/score"] == [100, 200]
    result = json.loads((folder / "result.json").read_text())
    assert result["saq_cql"]["score"] == pytest.approx(100 * (result["saq_cql"]["return"] - 6.7) / (273.99 - 6.7))
    assert "not D4RL's" in result["provenance"]
    assert re.search(r"codebook: \d+% of the codes used, perplexity \d", process.stdout)
    table = process.stdout.splitlines()
    assert [line.split()[0] for line in table if line.startswith(("SAQ-CQL", "CQL"))] == ["SAQ-CQL", "CQL"]
    assert "2397 transitions, 3 episodes" in process.stdout


@pytest.mark.parametrize(
    ("script", "agents", "logged"),
    [
        ("saq_iql", ["saq_iql", "iql"], {"saq_iql/prior_loss", "saq_iql/v_loss", "saq_iql/value", "iql/weight"}),
        ("saq_brac", ["saq_brac", "brac"], {"saq_brac/actor_loss", "saq_brac/kl_exact", "brac/kl_sampled"}),
        ("saq_bc", ["saq_bc", "bc", "gaussian_bc"], {"saq_bc/loss", "bc/action_error", "gaussian_bc/action_error"}),
    ],
)
def test_the_other_scripts(finish, script, agents, logged):
    folder, process = finish(script)
    assert checkpoint(folder)["done"] == dict.fromkeys(["quantizer", *agents], 200)
    result = json.loads((folder / "result.json").read_text())
    labels = [agent.upper().replace("_", "-") for agent in agents]
    assert [line.split()[0] for line in process.stdout.splitlines() if line.startswith(tuple(labels))] == labels
    assert all(len(result[agent]["last_5_scores"]) == 2 for agent in agents)
    with open(folder / "metrics.csv") as file:
        assert logged <= {row["name"] for row in csv.DictReader(file)}
    assert (folder / "comparison.png").exists()


@pytest.mark.parametrize(
    ("script", "phase"),
    [("saq_cql", "quantizer"), ("saq_cql", "saq_cql"), ("saq_cql", "cql"), ("saq_iql", "iql")],
)
def test_killed_and_resumed_is_bit_for_bit_the_same(finish, tmp_path, script, phase):
    """kill -9 some time after the first checkpoint of a phase, --resume, and nothing differs at the end."""
    finished, _ = finish(script)
    command = [sys.executable, f"{script}.py", "--out", str(tmp_path), *map(str, SHORT)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        file = next(tmp_path.glob("*/checkpoint.pt"), None)
        if file and phase in checkpoint(file.parent)["done"]:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    folder = only_run(tmp_path)
    assert checkpoint(folder)["done"] != checkpoint(finished)["done"]
    resumed = run_script("--resume", folder, script=f"{script}.py")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = tensors(checkpoint(folder)), tensors(checkpoint(finished))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (folder / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_a_saved_policy_scores_the_same_in_a_fresh_process(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    before = json.loads((folder / "result.json").read_text())
    process = run_script("--eval-only", folder, "--eval-episodes", 2)
    assert process.returncode == 0, process.stderr
    assert json.loads((folder / "result.json").read_text()) == before
    assert (folder / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_without_its_twin_saq_learns_the_same(finished, tmp_path):
    process = run_script("--out", tmp_path, "--no-compare", *SHORT)
    assert process.returncode == 0, process.stderr
    ours, theirs = (tensors(checkpoint(folder)["parts"]) for folder in (only_run(tmp_path), finished[0]))
    assert {name.split("/")[1] for name in theirs} - {name.split("/")[1] for name in ours} == {
        "cql",
        "cql.actor_optimizer",
        "cql.qf_optimizer",
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = ["--no-compare", "--compile", "off", "--eval-every", "100"]
    command = [sys.executable, "saq_cql.py", "--out", str(tmp_path), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("*/checkpoint.pt")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {only_run(tmp_path)}" in output
    assert "Traceback" not in errors
    done = checkpoint(only_run(tmp_path))["done"]
    assert f"stopped in step {list(done.values())[-1]} of" in output


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """A learning rate of 1e18 makes one."""
    process = run_script("--out", tmp_path, "--lr", "1e18", *SHORT)
    assert process.returncode == 2
    assert "error: quantizer/" in process.stderr
    assert "in step 50" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_two_files_in_an_empty_folder_train_on_a_users_own_data(tmp_path, suffix):
    for file in ("saq_cql.py", "vqvae.py"):
        shutil.copy(ROOT / file, tmp_path)
    arrays = dataset()
    arrays["actions"] *= 2  # Pendulum's torque lies in [-2, 2]
    write(tmp_path / f"mine{suffix}", arrays)
    command = ["--env", "Pendulum-v1", "--dataset-path", f"mine{suffix}", *SHORT]
    process = run_script(*command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "400 transitions" not in process.stdout
    assert "396 transitions, 4 episodes" in process.stdout
    assert "The score is the return itself." in process.stdout
    assert "leave [-1, 1]" not in process.stdout


def test_without_an_environment_training_runs_and_says_so(tmp_path):
    write(tmp_path / "mine.npz", dataset(obs_dim=5, action_dim=3))
    process = run_script("--env", "none", "--dataset-path", tmp_path / "mine.npz", "--out", tmp_path / "runs", *SHORT)
    assert process.returncode == 0, process.stderr
    assert "evaluation is skipped" in process.stdout
    assert checkpoint(only_run(tmp_path / "runs"))["done"] == {"quantizer": 200, "saq_cql": 200, "cql": 200}


@pytest.mark.skipif(not (SHARED_DATA / "door-human-v0.hdf5").exists(), reason="the human demonstrations are not here")
def test_door(tmp_path):
    path = SHARED_DATA / "door-human-v0.hdf5"
    process = run_script("--env", "door-human-v0", "--dataset-path", path, "--out", tmp_path, "--no-compare", *SHORT)
    assert process.returncode == 0, process.stderr
    assert "6704 transitions, 25 episodes" in process.stdout
    assert "actions leave [-1, 1], up to 1.37: clipped" in process.stdout
    assert -5 < json.loads((only_run(tmp_path) / "result.json").read_text())["saq_cql"]["score"] < 20


def test_options_of_the_quantizer_and_tracking(tmp_path):
    """--plain picks the paper's recipe, an explicit flag wins over it; --track writes a W&B run."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = [*SHORT[:-2], "--plain", "--kmeans-init", "--action-only", "--average", 0.5, "--no-compare", "--track"]
    process = run_script("--out", tmp_path, *flags, env=environment)
    assert process.returncode == 0, process.stderr
    args = json.loads((only_run(tmp_path) / "args.json").read_text())["args"]
    assert (args["num_codes"], args["revive_every"], args["average"]) == (64, 0, 0.5)
    assert list((only_run(tmp_path) / "wandb").glob("offline-run-*/*.wandb"))


def test_compiled_training_is_the_same_training(tmp_path):
    """--compile and eager runs agree up to rounding, and a machine without a compiler falls back."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    short = [
        "--vq-steps",
        20,
        "--steps",
        20,
        "--eval-every",
        20,
        "--eval-episodes",
        1,
        "--final-episodes",
        1,
        "--no-compare",
    ]
    losses = []
    for name, flag, environment in [
        ("eager", "off", env),
        ("compiled", "on", env),
        ("fallback", "on", {**env, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}),
    ]:
        process = run_script("--out", tmp_path / name, "--compile", flag, *short, env=environment)
        assert process.returncode == 0, process.stderr
        assert ("torch.compile failed" in process.stdout) == (name == "fallback")
        with open(only_run(tmp_path / name) / "metrics.csv") as file:
            losses.append([float(row["value"]) for row in csv.DictReader(file) if row["name"].endswith("/loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == losses[0]


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        import h5py

        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
