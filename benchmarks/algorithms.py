"""Runs the four scripts over each quantizer, and their continuous twins, on six datasets and several seeds.

    python benchmarks/algorithms.py --data FOLDER

Writes a line per agent and seed to benchmarks/results/algorithms.csv, with the command that made it, as soon as its run
ends, and leaves out what the file holds already: an interrupted table goes on where it stopped. It does not know of
changes to the scripts: after one, pass another --table. Scripts that need the same quantizer (of one task, kind and
seed) share the one that the first of them has fitted, in --fits. At the end (with --show: at once) it prints means and
standard errors over the seeds as a Markdown table.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
COLUMNS = ["task", "agent", "quantizer", "seed", "last_5_mean", "last_5_std", "final", "command"]
SCRIPTS = {  # and the agents that each trains, its twins after SAQ's
    "saq_bc": ["saq_bc", "bc", "gaussian_bc", "bc_gmm"],
    "saq_cql": ["saq_cql", "cql"],
    "saq_iql": ["saq_iql", "iql"],
    "saq_brac": ["saq_brac", "brac"],
}
# The agents over each quantizer. Twins need none: they run beside the first.
QUANTIZERS = {
    "vqvae": ["saq_bc", "saq_cql", "saq_iql", "saq_brac"],
    "mixture": ["saq_bc", "saq_cql", "saq_iql", "saq_brac"],
    "aquadem": ["saq_bc", "saq_cql", "saq_iql"],
}
# Task: the file in --data (none for the demonstrations that ship here), and flags of this task alone.
TASKS = {
    "maze2d-large-demos-v1": (None, "--vq-steps 15000 --batch-size 256"),
    # All episodes of this file return nearly the same, which IQL's scaling of rewards would blow up.
    "hopper-expert-v2": ("hopper_expert-d4rlsim.hdf5", "--vq-steps 10000 --reward-scale 1"),
    "hopper-medium-v2": ("hopper_medium-d4rlsim.hdf5", "--vq-steps 10000"),
    "hopper-medium-replay-v2": ("hopper_medium-replay-d4rlsim.hdf5", "--vq-steps 10000"),
    "halfcheetah-medium-replay-v2": ("halfcheetah_medium-replay-d4rlsim.hdf5", "--vq-steps 10000"),
    "door-human-v0": ("door-human-v0.hdf5", "--vq-steps 10000 --act greedy"),
}
# One budget for all: far below the paper's 500_000 + 1_000_000 steps, so that the table takes hours and not weeks.
BUDGET = "--steps 10000 --eval-every 1000 --final-episodes 20"
# IQL's published inverse temperature is for a million steps: after so few, the advantages that it multiplies are noise.
SCRIPT_FLAGS = {"saq_iql": "--beta 0.1"}


@dataclass
class Options:
    data: Path | None = None  # folder with the datasets; without it, only the embedded demonstrations
    seeds: int = 3  # seeds 0, 1, ... of every run
    tasks: tuple[str, ...] = tuple(TASKS)  # of these tasks
    quantizers: tuple[str, ...] = tuple(QUANTIZERS)  # over these quantizers; the twins run beside vqvae
    workers: int = os.cpu_count() or 1  # runs at the same time, one thread each
    table: Path = ROOT / "benchmarks" / "results" / "algorithms.csv"  # where results are gathered
    fits: Path = ROOT / "runs" / "fits"  # where fitted quantizers are kept, a run folder each
    flags: str = ""  # more flags for every run, to try things out
    show: bool = False  # run nothing, print what the table holds


def read(table):
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def make_command(task, script, quantizer, seed, options):
    """The command of one run, as the table shows it: with the name of its data, not their folder."""
    file, flags = TASKS[task]
    flags = f"--quantizer {quantizer} {flags} {BUDGET} {SCRIPT_FLAGS.get(script, '')} {options.flags}"
    flags += "" if quantizer == "vqvae" else " --no-compare"
    flags += f" --dataset-path {file}" if file else ""
    return " ".join(f"python {script}.py --env {task} --seed {seed} {flags}".split())


def run(task, script, quantizer, seed, options):
    """One run in a process of its own; appends its agents' results to the CSV. Returns whether the run succeeded."""
    command, file = make_command(task, script, quantizer, seed, options), TASKS[task][0]
    words = [str(options.data.resolve() / file) if word == file else word for word in command.split()[1:]]
    fit = options.fits.resolve() / f"{task}-{quantizer}-{seed}"
    if fit.exists():
        words += ["--quantizer-from", str(fit)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, *words, "--out", folder],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            print(f"failed: {command}\n{process.stderr[-2000:]}", flush=True)
            return False
        (made,) = Path(folder).glob("*")
        result = json.loads((made / "result.json").read_text())
        if not fit.exists():
            options.fits.mkdir(parents=True, exist_ok=True)
            shutil.move(made, fit)
    rows = []
    for agent in SCRIPTS[script]:
        if agent in result:
            last = result[agent]["last_5_scores"]
            scores = [statistics.mean(last), statistics.pstdev(last), result[agent]["score"]]
            kind = quantizer if agent == script else ""
            rows.append([task, agent, kind, seed, *(round(score, 2) for score in scores), command])
            print(f"{task:30}{agent:12}{kind:8} seed {seed}: {scores[0]:7.1f} +- {scores[1]:.1f}", flush=True)
    with open(options.table, "a", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(rows)
    return True


def run_all(task, quantizer, seed, done, options):
    """The scripts over one quantizer, one after the other, so that the first fits it for the others."""
    succeeded = True
    for script in QUANTIZERS[quantizer]:
        if (task, script, quantizer, seed) not in done:
            succeeded = run(task, script, quantizer, seed, options) and succeeded
    return succeeded


def show(table):
    """The Markdown table: mean over seeds of the mean over the last five evaluations and, where there is more than one
    seed, its standard error."""
    scores = {}
    for row in read(table):
        key = row["task"], (row["agent"], row.get("quantizer", "vqvae" if row["agent"] in SCRIPTS else ""))
        scores.setdefault(key, []).append(float(row["last_5_mean"]))
    agents = [(script, kind) for kind, scripts in QUANTIZERS.items() for script in scripts]
    agents += [(twin, "") for twins in SCRIPTS.values() for twin in twins[1:]]
    tasks = [task for task in TASKS if any((task, agent) in scores for agent in agents)]
    print("| agent | " + " | ".join(tasks) + " |\n" + "|---" * (len(tasks) + 1) + "|")
    for agent in agents:
        cells = []
        for task in tasks:
            values = scores.get((task, agent), [])
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{error}" if values else "")
        if any(cells):
            print(f"| {', '.join(word for word in agent if word)} | " + " | ".join(cells) + " |")


def main():
    options = tyro.cli(Options, description=__doc__)
    if not options.show:
        if not options.table.exists():
            options.table.write_text(",".join(COLUMNS) + "\n")
        rows = read(options.table)
        done = {(row["task"], row["agent"], row["quantizer"], int(row["seed"])): row["command"] for row in rows}
        for (task, agent, quantizer, seed), command in done.items():
            if quantizer and command != make_command(task, agent, quantizer, seed, options):
                print(f"error: {options.table} is of other commands: pass another --table. {command}", file=sys.stderr)
                sys.exit(2)
        jobs = [
            (task, quantizer, seed, done, options)
            for seed in range(options.seeds)
            for quantizer in options.quantizers
            for task in options.tasks
            if TASKS[task][0] is None or options.data
        ]
        with ThreadPoolExecutor(options.workers) as pool:
            succeeded = list(pool.map(lambda job: run_all(*job), jobs))
    show(options.table)
    if not options.show and not all(succeeded):
        sys.exit(1)


if __name__ == "__main__":
    main()
