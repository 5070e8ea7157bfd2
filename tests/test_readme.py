"""Every command of the README works, shortened; what it claims about files holds."""

import csv
import os
import re
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, dataset, from_pypi, make_minari, run_forked, run_script
from test_ogbench import cube_file

from vqvae import QUANTIZERS, make_env

sys.path.insert(0, str(ROOT / "benchmarks"))
import reproduce
import speed

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if "python " in line]
SCRIPTS = [command.split("&&")[-1].strip() for command in COMMANDS if "python saq_" in command]
TINY = "--vq-steps 20 --steps 20 --eval-every 20 --eval-episodes 1 --final-episodes 1 --compile off"


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
        words += ["--eval-episodes", "2", "--video", "0"] if "--video" in words else []  # test_films... makes films
        assert run_forked(*words, script=script).returncode == 0
        return
    if "--help" in words:
        help = " ".join(run_forked(*words, script=script).stdout.split())
        assert "--alpha FLOAT" in help
        assert "(default: 100.0)" in help  # the default of the task at hand
        return
    if "lift-ph" in words:  # whose episodes take seconds: of one agent
        words += ["--no-compare"]
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
        figures=True,
        env=local_datasets(command, tmp_path, pytestconfig),
    )
    assert process.returncode == 0, process.stderr
    assert (next((tmp_path / "runs").iterdir()) / "checkpoint.pt").exists()


def test_a_module_before_the_name_is_understood():
    assert make_env("offline_envs:maze2d-large-demos-v1").spec.id == "maze2d-large-demos-v1"


def test_the_benchmark(tmp_path):
    options = "--rounds 1 --burst 0.01 --no-compile --transitions 20000"
    process = run_script(*options.split(), "--table", tmp_path / "speed.csv", script="benchmarks/speed.py")
    assert process.returncode == 0, process.stderr
    *rows, side_by_side, loading = process.stdout.splitlines()[1:]
    rates = re.fullmatch(r"SAQ-CQL: (\d+) steps/s in a process .*, (\d+) in \d+ of one thread", side_by_side)
    assert min(map(int, rates.groups())) > 0
    assert re.fullmatch(r"loading 20,000 transitions: [\d.]+ s, [\d.]+ times h5py alone; peak memory .*", loading)
    with open(tmp_path / "speed.csv", newline="") as file:
        timed = {row["update"]: row for row in csv.DictReader(file)}
    assert [row[:20].strip() for row in rows] == list(timed)
    fits = {f"{kind} fit" for kind in [*QUANTIZERS, "density"]}
    assert timed.keys() == fits.union(*reproduce.SCRIPTS.values())
    assert all(float(row["steps_per_second"]) > 0 and float(row["share"]) > 0 for row in timed.values())


def test_one_update_is_timed(tmp_path):
    options = "--rounds 1 --burst 0.01 --no-compile --only"
    process = run_script(*options.split(), "bc", script="benchmarks/speed.py")
    assert process.returncode == 0, process.stderr
    assert [row[:20].strip() for row in process.stdout.splitlines()] == ["update", "bc"]
    process = run_forked(*options.split(), "nothing", script="benchmarks/speed.py")
    assert process.returncode == 2
    assert process.stderr.startswith("error: no update is called 'nothing': --only takes some of vqvae fit, ")
    process = run_forked(*options.split(), "bc", "--table", tmp_path / "t.csv", script="benchmarks/speed.py")
    assert (process.returncode, list(tmp_path.iterdir())) == (2, [])  # a table of some would lose the others


def test_products_are_counted():
    """Of one layer: forward, the gradient of its weights and, where asked for, that of its input."""
    layer, x = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    with speed.Products() as products:
        layer(x).sum().backward()
    assert sorted(products.sizes) == sorted([(7, 3, 5), (5, 7, 3), (7, 5, 3)])
    with speed.Products() as products:
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert products.sizes == [(3, 4, 5), (3, 4, 5)]


def save(path):
    if path.suffix == ".npz":
        np.savez(path, **dataset())
    else:
        with h5py.File(path, "w") as file:
            for key, array in dataset().items():
                file[key] = array


def test_the_readmes_table():
    """The one plot.py makes but for its last two columns, baselines and Aquadem's codes, and what is said of it."""
    pytest.importorskip("rliable", reason="requirements-benchmarks.txt is not installed")
    import plot

    text = " ".join(README.split())
    runs = plot.read(RESULTS / "small.csv")

    def score(task, label):
        scores = [run.score for run in runs if (run.task, run.label) == (task, label)]
        return "{:.1f} ± {:.1f}".format(*plot.mean_and_error(scores))

    medium, cheetah = score("hopper-medium-v2", "rebrac"), score("halfcheetah-medium-replay-v2", "rebrac")
    assert f"ReBRAC leads on hopper-medium ({medium}) and halfcheetah ({cheetah})" in text
    bear, brac = (score("hopper-medium-replay-v2", agent) for agent in ("bear", "brac"))
    assert abs(float(bear.split()[0]) - float(brac.split()[0])) <= float(bear.split()[-1])
    assert f"BEAR is level with BRAC on hopper-medium-replay ({bear})" in text

    def gain(task, agent, kind):
        over = [[run.score for run in runs if run[:3] == (task, name, kind)] for name in (agent, "prior")]
        return plot.mean_and_error(over[0])[0] - plot.mean_and_error(over[1])[0]

    mixed = ["hopper-medium-v2", "hopper-medium-replay-v2", "halfcheetah-medium-replay-v2"]
    gains = [f"{gain(task, 'saq_cql', 'vqvae'):.0f}" for task in mixed]
    assert f"SAQ-CQL adds {gains[0]}, {gains[1]} and {gains[2]} on medium and the replays" in text
    most = max(gain(task, agent, "mixture") for task in reproduce.SMALL for agent in reproduce.SAQ)
    assert f"over mixture codes at most {most:.0f} points" in text
    fresh = plot.read(RESULTS / "seeds.csv")
    assert {run.seed for run in fresh} == {3, 4, 5, 6, 7, 8}  # SAQ-CQL's alpha was chosen with the first three
    cells = [[run.score for run in fresh if run.agent == agent and run.seed > 5] for agent in ("saq_cql", "saq_iql")]
    cql, iql = map(plot.mean_and_error, cells)
    assert "saq_cql, mixture has {:.1f} ± {:.1f}, saq_iql {:.1f} ± {:.1f}".format(*cql, *iql) in text
    cube = plot.by_label(plot.read(RESULTS / "ogbench.csv"))
    cube = {label: plot.mean_and_error([run.score for run in cell])[0] for label, cell in cube.items()}
    cql, iql = cube.pop("saq_cql, mixture"), cube.pop("saq_iql, mixture")
    others = max(cube.values())
    assert f"saq_cql solves {cql:.0f}% of episodes, saq_iql {iql:.0f}%, others {others:.0f}% at most" in text
    agents = {"prior", *(agent for script in reproduce.SAQ for agent in reproduce.SCRIPTS[script])}
    runs = [run for run in runs if run.agent in agents and run.quantizer != "aquadem"]
    runs.sort(key=lambda run: reproduce.SMALL.index(run.task))
    lines = plot.make_table(runs, lambda run: run.score, reps=10)
    assert len(lines) > 10
    assert "\n".join(line.rsplit("|", 3)[0] + "|" for line in lines) in README


def test_the_scores_that_results_md_names():
    """Where it speaks of the six datasets, a mean ± error is one of a CSV: a score, or what RL adds to its prior."""
    pytest.importorskip("rliable", reason="requirements-benchmarks.txt is not installed")
    import plot

    known = set()
    for table in ("small", "seeds", "codes", "no-decay", "width"):
        runs = plot.read(RESULTS / f"{table}.csv")
        priors = {(run.task, run.quantizer, run.seed): run.score for run in runs if run.agent == "prior"}
        for task in {run.task for run in runs}:
            for cell in plot.by_label([run for run in runs if run.task == task]).values():
                gains = [run.score - priors.get((task, run.quantizer, run.seed), 0) for run in cell]
                fresh = [run.score for run in cell if run.seed > 5] or [0]
                for values in [run.score for run in cell], [run.final for run in cell], gains, fresh:
                    mean, error = plot.mean_and_error(values)
                    known.add(f"{round(mean, 1) + 0.0:.1f} ± {error:.1f}")
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.split("## Every script on six datasets")[1].split("\n## ")[0]
    section = " ".join(section.replace("−", "-").split())
    named = set(re.findall(r"-?\d+\.\d ± \d+\.\d", section))
    assert len(named) > 20
    assert not named - known


def test_what_results_md_says_of_ogbench():
    """The table of plot.py but for its last two columns, and the rates by seed."""
    pytest.importorskip("rliable", reason="requirements-benchmarks.txt is not installed")
    import plot

    text = (ROOT / "docs" / "results.md").read_text().split("## OGBench's cube")[1].split("\n## ")[0]
    runs = plot.read(RESULTS / "ogbench.csv")
    lines = plot.make_table(runs, lambda run: run.score, reps=10)
    assert "\n".join(line.rsplit("|", 3)[0] + "|" for line in lines) in text
    text = " ".join(text.split())
    of = {label: sorted(cell, key=lambda run: run.seed) for label, cell in plot.by_label(runs).items()}
    assert all([run.seed for run in cell] == [0, 1, 2] for cell in of.values())
    cql, iql, bc = (of.pop(f"saq_{agent}, mixture") for agent in ("cql", "iql", "bc"))
    assert "SAQ-IQL is at {:.0f}, {:.0f} and {:.0f}%".format(*(run.score for run in iql)) in text
    assert "the same codes solves {:.0f}, {:.0f} and {:.0f}%".format(*(run.score for run in bc)) in text
    most = max(run.score for cell in of.values() for run in cell)
    assert f"continuous agents {most:.0f}% at most on any seed" in text
    curves = [(run.curves["step"], run.curves["score"]) for run in cql]
    assert max(step[score > runs[0].data_score][0] for step, score in curves) == 8_000
    assert "passes the data's own rate within 8,000 steps on every seed" in text
    assert min(run.score for run in cql[1:]) > cql[0].score  # with which settings were chosen


def test_what_results_md_says_of_width():
    """Its table, layers of 512 from the six datasets' and of 256 from its own; and the gaps to twins beside it."""
    pytest.importorskip("rliable", reason="requirements-benchmarks.txt is not installed")
    import plot

    text = (ROOT / "docs" / "results.md").read_text().split("### Width")[1].split("\n### ")[0]
    runs = {width: plot.read(RESULTS / f"{name}.csv") for width, name in ((512, "small"), (256, "width"))}
    tasks = ["hopper-medium-v2", "hopper-medium-replay-v2", "halfcheetah-medium-replay-v2"]

    def cells(width, label):
        own = [[run.score for run in runs[width] if (run.task, run.label) == (task, label)] for task in tasks]
        return [plot.mean_and_error(scores) for scores in own]

    gaps = []
    for agent in ("cql", "iql"):
        for width, name in ((512, f"saq_{agent}, mixture"), (256, "")):
            row = " | ".join("{:.1f} ± {:.1f}".format(*cell) for cell in cells(width, f"saq_{agent}, mixture"))
            assert re.search(rf"\| {name} ?\| {width} \| {re.escape(row)} \|", text)
        wide, twin = cells(512, f"saq_{agent}, mixture"), cells(512, agent)
        gaps.append([f"{a[0] - b[0]:.0f}" for a, b in zip(wide, twin, strict=True)])
    (_, hopper_cql, cheetah_cql), (_, hopper_iql, cheetah_iql) = gaps
    words = f"{hopper_cql} and {hopper_iql} points on hopper's, {cheetah_cql} and {cheetah_iql} on halfcheetah's"
    assert words in " ".join(text.split())
    fallen = [run for run in runs[256] if run[:4] == (tasks[1], "saq_cql", "mixture", 2)][0].curves["score"]
    assert (round(fallen[-4]), round(fallen[-2])) == (100, 58)
