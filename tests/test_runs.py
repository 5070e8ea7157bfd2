"""Whole runs in processes of their own: files, resuming, evaluation, interruption, a user's own data."""

import csv
import json
import os
import re
import shutil
import time
from functools import partial

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    checkpoint,
    dataset,
    one_sentence,
    only_run,
    run_forked,
    run_script,
    succeeded,
    tensors,
    write,
)
from forked import Forked

SHORT = ["--vq-steps", 60, "--steps", 60, "--eval-every", 30, "--log-every", 10, "--eval-episodes", 1]
SHORT += ["--final-episodes", 2, "--num-codes", 4]


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """finish(script): the folder and the process of one short run of the embedded task with its twins."""
    runs = {}

    def finish(script, *options):
        if (script, *options) not in runs:
            out = tmp_path_factory.mktemp(script)
            run = run_script if (script, *options) == ("saq_cql",) else partial(run_forked, figures=True)
            process = succeeded(run("--out", out, *SHORT, *options, script=f"{script}.py"))
            runs[script, *options] = (only_run(out), process)
        return runs[script, *options]

    return finish


@pytest.fixture
def finished(finish):
    return finish("saq_cql")


def test_a_run_writes_its_files(finished):
    folder, process = finished
    CODE = {"saq_cql.py", "vqvae.py"}
    names = {"args.json", "metrics.csv", "checkpoint.pt", "codes.png", "comparison.png", "result.json", *CODE}
    assert {file.name for file in folder.iterdir()} == names | {".lock"}
    assert all((folder / name).read_text() == (ROOT / name).read_text() for name in CODE)
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["steps"] == 60
    assert about["versions"]["torch"] == torch.__version__
    for name in ("codes.png", "comparison.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
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
    assert [step for step, name, _ in rows if name == "cql/score"] == [30, 60]
    result = json.loads((folder / "result.json").read_text())
    assert result["saq_cql"]["score"] == pytest.approx(100 * (result["saq_cql"]["return"] - 6.7) / (273.99 - 6.7))
    assert "not D4RL's" in result["provenance"]
    assert re.search(r"codebook: \d+% of the codes used, perplexity \d", process.stdout)
    table = process.stdout.splitlines()
    assert [line.split()[0] for line in table if line.startswith(("saq_cql  ", "cql  "))] == ["saq_cql", "cql"]
    assert "2397 transitions, 3 episodes" in process.stdout


@pytest.mark.parametrize(
    ("script", "agents", "logged"),
    [
        ("saq_iql", ["saq_iql", "iql"], {"saq_iql/qf_loss", "saq_iql/v_loss", "saq_iql/value", "iql/weight"}),
        ("saq_brac", ["saq_brac", "brac"], {"saq_brac/actor_loss", "saq_brac/kl_exact", "brac/kl_sampled"}),
        (
            "saq_bc",
            ["saq_bc", "bc", "gaussian_bc", "bc_gmm"],
            {"saq_bc/loss", "bc/action_error", "bc_gmm/action_error"},
        ),
    ],
)
def test_the_other_scripts(finish, script, agents, logged):
    folder, process = finish(script)
    assert checkpoint(folder)["done"] == dict.fromkeys(["quantizer", *agents], 60)
    result = json.loads((folder / "result.json").read_text())
    table = process.stdout.split("return\n")[1].splitlines()[: len(agents)]
    assert [line.split()[0] for line in table] == agents
    assert all(len(result[agent]["last_5_scores"]) == 2 for agent in agents)
    with open(folder / "metrics.csv") as file:
        assert logged <= {row["name"] for row in csv.DictReader(file)}
    assert (folder / "comparison.png").exists()


@pytest.mark.parametrize(
    ("script", "phase", "options"),
    [
        ("saq_cql", "quantizer", []),
        ("saq_cql", "saq_cql", []),
        ("saq_cql", "cql", []),
        ("saq_iql", "iql", []),
        ("saq_brac", "brac", []),
        ("saq_bc", "saq_bc", ["--precision=bfloat16", "--no-compare"]),
    ],
)
def test_killed_and_resumed_is_bit_for_bit_the_same(finish, tmp_path, script, phase, options):
    """kill -9 some time after the first checkpoint of a phase, --resume, and nothing differs at the end."""
    finished, _ = finish(script, *options)
    process = Forked("--out", tmp_path, *SHORT, *options, script=f"{script}.py", figures=True)
    wait_for(process, lambda: [file for file in tmp_path.glob("[!.]*/checkpoint.pt") if has_begun(file, phase)])
    process.kill()
    folder = only_run(tmp_path)
    assert checkpoint(folder)["done"] != checkpoint(finished)["done"]
    succeeded(run_forked("--resume", folder, script=f"{script}.py", figures=True))
    assert_same_run(folder, finished)


def has_begun(file, phase):
    return phase in checkpoint(file.parent)["done"]


def wait_for(process, condition):
    """Waits until the condition holds; fails where the process ends before that."""
    while not condition():
        assert process.process.is_alive(), process.stdout + process.stderr
        time.sleep(0.005)


def test_a_log_file_shows_no_score_beside_a_step_before_it(finished):
    """Where lines of the bar are rare, the count that it keeps is old when an evaluation ends."""
    shown = re.findall(r" (\d+)/\d+ \[[^]]*score=", finished[1].stderr)
    assert shown
    assert all(int(step) > 0 for step in shown)


def test_a_saved_policy_scores_the_same_in_a_fresh_process(finished, tmp_path):
    """The very returns that the run itself printed, and not a byte of its folder changes."""
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    process = succeeded(run_script("--eval-only", folder, "--eval-episodes", 2))
    for agent in ("saq_cql  ", "cql  "):
        (row,) = (line for line in finished[1].stdout.splitlines() if line.startswith(agent))
        assert row in process.stdout.splitlines()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in finished[0].iterdir()
    }


def test_without_its_twin_saq_learns_the_same(finished, tmp_path):
    succeeded(run_forked("--out", tmp_path, "--no-compare", *SHORT))
    ours, theirs = (tensors(checkpoint(folder)["parts"]) for folder in (only_run(tmp_path), finished[0]))
    assert {name.split("/")[1] for name in theirs} - {name.split("/")[1] for name in ours} == {
        "cql",
        "cql.actor_optimizer",
        "cql.qf_optimizer",
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Here the quantizer's weights are multiplied by 1e30 in step 45; the checkpoint is from before."""
    line = one_sentence(run_forked("--out", tmp_path, *SHORT, before=("blow_up", 45)))
    assert line.startswith("error: quantizer/")
    assert "in step 50: " in line
    assert all(value.isfinite().all() for value in tensors(checkpoint(only_run(tmp_path))["parts"]).values())


def test_without_an_environment_training_runs_and_says_so(tmp_path):
    path = write(tmp_path / "mine.npz", dataset(obs_dim=5, action_dim=3))
    process = succeeded(run_forked("--env", "none", "--dataset-path", path, "--out", tmp_path / "runs", *SHORT))
    assert "evaluation is skipped" in process.stdout
    assert checkpoint(only_run(tmp_path / "runs"))["done"] == {"quantizer": 60, "saq_cql": 60, "cql": 60}


def test_options_of_the_quantizer_and_tracking(tmp_path):
    """--plain picks the paper's recipe, an explicit flag wins over it; --track writes a W&B run."""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = [*SHORT[:-2], "--plain", "--obs-noise", 0.2, "--action-only", "--average", 0.5, "--no-compare", "--track"]
    succeeded(run_script("--out", tmp_path, *flags, env={**os.environ, **environment}))
    args = json.loads((only_run(tmp_path) / "args.json").read_text())["args"]
    assert (args["num_codes"], args["revive_every"], args["average"]) == (64, 0, 0.5)
    assert list((only_run(tmp_path) / "wandb").glob("offline-run-*/*.wandb"))


def test_compiled_training_is_the_same_training(tmp_path):
    """It agrees with eager training up to rounding, resumes bit for bit, and falls back where there is no compiler."""
    data = write(tmp_path / "tiny.npz", dataset(n=60, episode=5))
    flags = ["--env", "tiny_envs:Tiny-v0", "--dataset-path", data, "--no-compare", "--vq-steps", 20, "--steps", 20]
    flags += ["--eval-every", 10, "--log-every", 5, "--eval-episodes", 1, "--final-episodes", 1]
    paths = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "tests")}
    env, losses = {**os.environ, **paths}, {}  # of saq_bc.py, which compiles fastest
    for name, flag, more in [
        ("eager", "off", {}),
        ("compiled", "on", {}),
        ("stopped", "on", {"TINY": "SIGTERM", "TINY_AT": "3"}),  # in its first evaluation
        ("fallback", "on", {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}),
    ]:
        process = run_script("--out", tmp_path / name, "--compile", flag, *flags, script="saq_bc.py", env=env | more)
        assert process.returncode == (130 if name == "stopped" else 0), process.stderr
        assert ("torch.compile failed" in process.stdout) == (name == "fallback")
        with open(only_run(tmp_path / name) / "metrics.csv") as file:
            losses[name] = [float(row["value"]) for row in csv.DictReader(file) if row["name"].endswith("/loss")]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-2)
    assert losses["fallback"] == losses["eager"]
    stopped = only_run(tmp_path / "stopped")
    assert checkpoint(stopped)["done"] == {"quantizer": 20, "saq_bc": 10}
    succeeded(run_script("--resume", stopped, script="saq_bc.py", env=env))
    assert_same_run(only_run(tmp_path / "compiled"), stopped)
