"""Every command of the README works, shortened; what it claims about files holds."""

import itertools
import os
import re
import runpy
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, dataset, from_pypi, make_minari, run_forked, run_script
from test_ogbench import cube_file

from vqvae import make_env

README = (ROOT / "README.md").read_text()
RESULTS, TABLE = ROOT / "benchmarks" / "results", "algorithms-standin.csv"
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if "python " in line]
SCRIPTS = [command.split("&&")[-1].strip() for command in COMMANDS if "python saq_" in command]
TINY = "--vq-steps 20 --steps 20 --eval-every 10 --eval-episodes 1 --final-episodes 1 --compile off"


def test_the_two_commands_are_there():
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements"
    assert f"{install}.txt && python saq_cql.py" in README
    assert f"{install}-test.txt && pytest" in README
    assert f"{install}-test.txt && pytest" in (ROOT / ".ci" / "run").read_text()


def local_datasets(command, folder, config):
    """An environment in which the datasets that a command would download are there already, small ones."""
    environment = {**os.environ, "D4RL_DATASET_DIR": str(folder)}
    if "hopper-expert-v2" in command:
        with h5py.File(folder / "hopper_expert-v2.hdf5", "w") as file:
            for key, array in dataset(obs_dim=11, action_dim=3).items():
                file[key] = array
    if "lift-ph" in command:
        (folder / "lift" / "ph").mkdir(parents=True)
        file = from_pypi("robomimic==0.1.0", "robomimic-0.1.0/tests/assets/test.hdf5", config)
        (folder / "lift" / "ph" / "low_dim_v141.hdf5").symlink_to(file)
    if "singletask" in command:
        environment["OGBENCH_DATASET_DIR"] = str(folder)
        cube_file(folder / "cube-single-play-v0.npz")
    if "D4RL/door" in command:
        environment |= make_minari(folder / "minari", "AdroitHandDoor-v1", "D4RL/door/human-v2", "0", "1000")
    return environment


@pytest.mark.parametrize("command", sorted(set(SCRIPTS)))
def test_commands_of_the_scripts(command, tmp_path, pytestconfig):
    script, *words = shlex.split(command)[1:]
    if "--resume" in words or "--eval-only" in words:  # of the run that this makes
        assert run_forked("--out", tmp_path, "--no-compare", *TINY.split(), script=script).returncode == 0
        words[words.index("DIR")] = str(next(tmp_path.iterdir()))
        assert run_forked(*words, script=script).returncode == 0
        return
    if "--help" in words:
        help = " ".join(run_forked(*words, script=script).stdout.split())
        assert "--alpha FLOAT" in help
        assert "(default: 100.0)" in help  # the default of the task at hand
        return
    if "mine.npz" in words or "mine.hdf5" in words:  # stands for the reader's own file
        at = words.index("--dataset-path") + 1
        words[at] = str(tmp_path / words[at])
        save(tmp_path / Path(words[at]).name)
    process = run_forked(
        *words,
        *TINY.split(),
        "--out",
        tmp_path / "runs",
        script=script,
        env=local_datasets(command, tmp_path, pytestconfig),
    )
    assert process.returncode == 0, process.stderr
    assert (next((tmp_path / "runs").iterdir()) / "checkpoint.pt").exists()


def test_a_module_before_the_name_is_understood():
    assert make_env("offline_envs:maze2d-large-demos-v1").spec.id == "maze2d-large-demos-v1"


def test_the_benchmark(tmp_path):
    options = "--rounds 1 --burst 0.05 --no-compile --transitions 20000"
    process = run_script(*options.split(), script="benchmarks/speed.py")
    assert process.returncode == 0, process.stderr
    *rows, side_by_side, loading = process.stdout.splitlines()[1:]
    rates = re.fullmatch(r"SAQ-CQL: (\d+) steps/s in a process .*, (\d+) in \d+ of one thread", side_by_side)
    assert min(map(int, rates.groups())) > 0
    assert re.fullmatch(r"loading 20,000 transitions: [\d.]+ s, [\d.]+ times h5py alone; peak memory .*", loading)
    names = ["quantizer fit", "mixture fit", "Aquadem fit", "SAQ-CQL", "SAQ-IQL", "SAQ-BRAC", "SAQ-BC"]
    names += ["CQL", "IQL", "BRAC", "BC"]
    assert [row[:20].strip() for row in rows] == names
    assert all(float(row.split("%")[0].split()[-1]) > 0 for row in rows)


def test_seconds_to_a_score():
    """Both agents pass a score that all have, in their second evaluation, and fail at one that nobody has."""
    tiny = ["--env=maze2d-large-demos-v1", "--vq-steps=20", "--steps=30", "--eval-every=10", "--limit=1000"]
    for score, how, steps in [(-10, "is", 20), (1000, "has not reached", 30)]:
        process = run_script("--to", score, *tiny, script="benchmarks/speed.py")
        assert process.returncode == 0, process.stderr
        _, _, *lines = process.stdout.splitlines()
        for line, agent in zip(lines, ("saq_cql", "cql"), strict=True):
            assert re.match(rf"{agent} {how} .*after \d+ s and {steps} steps", line), line


def save(path):
    if path.suffix == ".npz":
        np.savez(path, **dataset())
    else:
        with h5py.File(path, "w") as file:
            for key, array in dataset().items():
                file[key] = array


def test_the_table_of_algorithms(tmp_path):
    """Gathers every agent once, fits a quantizer once for all scripts, and runs nothing a second time."""
    table, fits = tmp_path / "t.csv", tmp_path / "fits"
    command = ["--seeds", 1, "--fits", fits, "--table", table, "--quantizers", "vqvae", "aquadem", f"--flags={TINY}"]
    first = run_script(*command, script="benchmarks/algorithms.py")
    assert first.returncode == 0, first.stderr
    written = table.read_text()
    agents = [tuple(line.split(",")[1:3]) for line in written.splitlines()[1:]]
    over = {"vqvae": ["saq_bc", "saq_brac", "saq_cql", "saq_iql"], "aquadem": ["saq_bc", "saq_cql", "saq_iql"]}
    twins = ["bc", "bc_gmm", "brac", "cql", "gaussian_bc", "iql"]
    expected = [(agent, kind) for kind, agents in over.items() for agent in agents] + [(twin, "") for twin in twins]
    assert sorted(agents) == sorted(expected)
    assert {folder.name for folder in fits.iterdir()} == {f"maze2d-large-demos-v1-{kind}-0" for kind in over}
    other = run_script(*command[:-1], f"--flags={TINY} --steps 0", script="benchmarks/algorithms.py")
    assert other.returncode == 2
    assert "is of other commands: pass another --table" in other.stderr
    fails = [*command[:5], tmp_path / "u.csv", "--quantizers", "mixture", f"--flags={TINY} --steps 0"]
    failed = run_script(*fails, script="benchmarks/algorithms.py")
    assert failed.returncode == 1
    assert "steps must be a number between" in failed.stdout
    second = run_script(*command, script="benchmarks/algorithms.py")
    assert table.read_text() == written
    rows = second.stdout.splitlines()
    assert rows[0] == "| agent | maze2d-large-demos-v1 |"
    assert {row.split(" | ")[0] for row in rows[2:]} == {f"| {', '.join(filter(None, agent))}" for agent in expected}


def test_means_and_standard_errors(tmp_path):
    rows = [
        f"hopper-medium-v2,saq_iql,mixture,{seed},{seed + 1},0,0,x" for seed in range(3)
    ]  # 1, 2, 3: 2 +- 1 / sqrt(3)
    (tmp_path / "t.csv").write_text(
        "task,agent,quantizer,seed,last_5_mean,last_5_std,final,command\n" + "\n".join(rows)
    )
    process = run_script("--show", "--table", tmp_path / "t.csv", script="benchmarks/algorithms.py")
    assert process.stdout.splitlines() == [
        "| agent | hopper-medium-v2 |",
        "|---|---|",
        "| saq_iql, mixture | 2.0 ± 0.6 |",
    ]


def test_the_readmes_table_is_whole():
    """Three seeds of every agent on every task."""
    module = runpy.run_path(str(ROOT / "benchmarks/algorithms.py"))
    runs = sorted((row["task"], row["agent"], int(row["seed"])) for row in module["read"](RESULTS / TABLE))
    agents = [agent for agents in module["SCRIPTS"].values() for agent in agents if agent != "bc_gmm"]
    assert runs == sorted(itertools.product(module["TASKS"], agents, range(3)))


def test_the_committed_table_is_the_readmes():
    process = run_script("--show", "--table", RESULTS / TABLE, script="benchmarks/algorithms.py")
    assert process.returncode == 0, process.stderr
    for line in process.stdout.strip().splitlines()[2:]:
        assert line in README.splitlines(), line


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
