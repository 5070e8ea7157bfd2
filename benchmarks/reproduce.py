"""One command for each table and figure: runs the scripts over tasks, quantizers and seeds, here or on a cluster.

    python benchmarks/reproduce.py small --data FOLDER           # six datasets, 10,000 steps: hours of two cores
    python benchmarks/reproduce.py table1 --paper --dry-run      # the commands of the paper's Table 1, and their hours
    python benchmarks/reproduce.py table1 --paper --address auto --gpus-per-run 0.2             # on a Ray cluster

A run is a process of a script with the command that the table shows: what runs is what a reader reads. A quantizer is
fitted once for each task, kind and seed, in each of --fits, by `saq_bc.py --use-prior`, whose score stands in the table
as that of the agent "prior"; only the runs that need it wait for it.

Results go to benchmarks/results/NAME.csv, a row an agent, as soon as a run ends. What that file holds is not run again:
an interrupted table goes on where it stopped. It does not know of changes to the scripts: after one, name another
--table and other --fits. Where --flags try something, --table has to say where to. A run whose worker dies is tried
again; one that fails is named at the end (exit code 1), and the others go on. plot.py makes tables and figures of the
CSV.

Ray (requirements-benchmarks.txt) spreads the runs. Without --address it is started here, and ends with this process. A
cluster's machines need the packages of requirements.txt and see --data, the folder of D4RL's files and of those that
stand in for them, under the same path; the code is sent to them as it is when the table begins.
"""

import csv
import ctypes
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import saq_bc  # noqa: E402
from vqvae import UserError, check_numbers, exit_in_words, one_line, write_file  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ["task", "agent", "quantizer", "seed", "score", "final", "seconds", "fit_seconds", "data_score", "provenance"]
COLUMNS += ["host", "commit", "command", "curves", "online"]  # the last: what is said of an online phase

# --- What there is to run ---

# The agents of each script, its twins after SAQ's.
SCRIPTS = {
    "saq_bc": ["saq_bc", "bc", "gaussian_bc", "bc_gmm"],
    "saq_cql": ["saq_cql", "cql"],
    "saq_iql": ["saq_iql", "iql"],
    "saq_brac": ["saq_brac", "brac"],
    "baselines/rebrac": ["rebrac", "td3_bc"],
    "baselines/fql": ["fql", "ifql"],
    "baselines/awac": ["saq_awac", "awac"],
    "baselines/bear": ["saq_bear", "bear"],
    "baselines/spot": ["saq_spot", "spot"],
}
SAQ = ["saq_bc", "saq_cql", "saq_iql", "saq_brac"]
BASELINES = [script for script in SCRIPTS if "/" in script]
NO_QUANTIZER = {"baselines/rebrac", "baselines/fql"}
ONLINE = {"saq_spot": "saq_online", "spot": "spot_online"}  # what learns on after an agent, with --online-steps
FITTED_FIRST = {"spot": "density", "spot_online": "density"}  # before an agent without codes, by its own script
OURS = {"--env", "--seed", "--dataset-path", "--out", "--quantizer-from", "--resume", "--eval-only", "--quantizer"}
OURS |= {"--compare", "--no-compare", "--use-prior", "--no-use-prior"}  # which agents a run has
# The paper's tasks: rows of its Table 5, whose means by suite are its Table 1.
LOCOMOTION = [
    f"{robot}-{data}-v2"
    for robot in ("halfcheetah", "hopper", "walker2d")
    for data in ("expert", "medium-expert", "medium-replay", "medium")
]
ANTMAZE = [f"antmaze-{maze}-v2" for maze in ("medium-diverse", "medium-play", "large-diverse", "large-play")]
ADROIT = [f"{task}-human-v0" for task in ("door", "hammer", "pen", "relocate")]
KITCHEN = [f"kitchen-{data}-v0" for data in ("mixed", "complete", "partial")]
D4RL = [*LOCOMOTION, *ANTMAZE, *ADROIT, *KITCHEN]
ROBOMIMIC = [f"{task}-ph" for task in ("lift", "can", "square", "tool-hang", "transport")]
# Six datasets that a laptop can do: the maze demonstrations that ship here, and files in --data by these names.
MAZE, HOPPERS = "maze2d-large-demos-v1", ["hopper-expert-v2", "hopper-medium-v2", "hopper-medium-replay-v2"]
SMALL = [MAZE, *HOPPERS, "halfcheetah-medium-replay-v2", "door-human-v0"]
FILES = {
    "hopper-expert-v2": "hopper_expert-d4rlsim.hdf5",
    "hopper-medium-v2": "hopper_medium-d4rlsim.hdf5",
    "hopper-medium-replay-v2": "hopper_medium-replay-d4rlsim.hdf5",
    "halfcheetah-medium-replay-v2": "halfcheetah_medium-replay-d4rlsim.hdf5",
    "door-human-v0": "door-human-v0.hdf5",
}
CUBE = "cube-single-play-singletask-task2-v0"  # of OGBench; in --data, what demos/make_ogbench.py makes
FILES[CUBE] = "ogbench/cube-single-play-v0.npz"


class Part(NamedTuple):
    """A block of a table: each script on each task over each quantizer, with the flags of each variant. Twins, which
    need no quantizer, run beside the first of them."""

    tasks: list
    scripts: list
    quantizers: list = ["vqvae"]
    variants: list = [""]
    twins: bool = True
    flags: str = ""


PLANS = {
    "table1": [Part(D4RL, SAQ)],
    "table2": [Part(ROBOMIMIC, ["saq_iql", "saq_cql", "saq_bc"])],
    "table3": [
        Part(
            [f"{robot}-medium-replay-v2" for robot in ("halfcheetah", "hopper", "walker2d")],
            SAQ[1:],
            variants=["--no-action-only", "--action-only"],
            twins=False,
        )
    ],
    "table4": [
        Part(["hopper-expert-v2"], SAQ[1:], variants=[f"--num-codes {k}" for k in (16, 32, 64, 128)], twins=False)
    ],
    "table5": [Part(D4RL, SAQ), Part(D4RL, SAQ[:3], ["aquadem"], twins=False)],
    "figure2": [Part([MAZE], ["saq_cql"])],
    "figure5": [Part(KITCHEN, ["saq_cql"])],
    "small": [
        Part(SMALL, SAQ, ["vqvae", "mixture"]),
        Part(SMALL, SAQ[:3], ["aquadem"], twins=False),
        Part(SMALL, BASELINES, ["mixture"]),
    ],
    "baselines": [Part(SMALL, BASELINES, ["mixture"])],
    "codes": [Part([HOPPERS[0], MAZE], SAQ[:3], ["mixture"], [f"--num-codes {k}" for k in (8, 16, 64, 128)], False)],
    "ogbench": [
        Part([CUBE], ["saq_iql"], ["mixture"]),
        Part([CUBE], ["saq_cql", "saq_bc"], ["mixture"], twins=False),
        Part([CUBE], ["baselines/rebrac", "baselines/fql"]),
    ],
    "online": [Part([MAZE, "hopper-medium-replay-v2"], ["baselines/spot"], ["mixture"], flags="--online-steps 20000")],
}

# The budget of today's tables, far below the paper's so that they take hours and not weeks; and the authors' (--paper).
BUDGET = dict(steps=10_000, vq_steps=10_000, eval_every=1_000, final_episodes=20)
OGBENCH_BUDGET = dict(steps=20_000, vq_steps=15_000, eval_every=2_000, final_episodes=50)
PAPER_BUDGET = dict(steps=1_000_000, vq_steps=500_000, eval_every=50_000, final_episodes=100)
# Of today's tables, what differs by task, by script, or by both. All episodes of the expert's file return nearly the
# same, which IQL's scaling of rewards would blow up. The door's 25 demonstrations would be learned by heart without
# noise. Three weights are published for a million steps: IQL's inverse temperature, here a thirtieth, since advantages
# are noise at first; ReBRAC's of the distance and SPOT's of the density, here ten times those, since they do not hold a
# policy while Q is wrong.
TASK_FLAGS = {MAZE: "--batch-size 256", "hopper-expert-v2": "--reward-scale 1", "door-human-v0": "--obs-noise 0.1"}
SCRIPT_FLAGS = {"saq_iql": "--beta 0.1"}
REBRAC_BETAS = dict(zip(SMALL[1:], (1.0, 0.1, 0.5, 0.1, 1.0), strict=True))
SPOT_WEIGHTS = dict(zip(SMALL[1:], (1.0, 1.0, 1.0, 0.5, 10.0), strict=True))
RUN_FLAGS = {("baselines/rebrac", task): f"--actor-beta {beta}" for task, beta in REBRAC_BETAS.items()}
RUN_FLAGS |= {("baselines/spot", task): f"--density-weight {weight}" for task, weight in SPOT_WEIGHTS.items()}
# Of the paper's tables, where one value of --plain does not serve all: K of Aquadem, and SAQ-IQL's lambda.
PAPER_CODE_FLAGS = {"aquadem": "--num-codes 10"}
# The authors' for adroit; for antmaze, of which none is known, ours.
PAPER_FLAGS = {("saq_iql", task): "--temperature 1" for task in ADROIT}
PAPER_FLAGS |= {("saq_iql", task): "--temperature 0.1" for task in ANTMAZE}


@dataclass
class Options:
    name: tyro.conf.Positional[Literal[tuple(PLANS)]]  # the table or figure
    data: Path | None = None  # folder with the files that stand in for D4RL's; without it, tasks use their own
    tasks: tuple[str, ...] = ()  # of these tasks only
    agents: tuple[str, ...] = ()  # only runs that train one of these agents, with the twins that these runs have
    quantizers: tuple[str, ...] = ()  # over these quantizers only
    seeds: int = 3  # how many seeds of every run
    first_seed: int = 0  # the first of them: with 6, runs on seeds that no setting was chosen with
    steps: int | None = None  # gradient steps of quantizers and agents in place of the budget's, in ten evaluations
    paper: bool = False  # the authors' settings and steps: --plain, 500_000 of the quantizer, 1_000_000 of the agents
    flags: str = ""  # more flags for every run; the fits of quantizers get those of them that saq_bc.py has
    address: str | None = None  # of a Ray cluster, or "auto"; without it, Ray is started here
    cpus_per_run: float = 1.0  # cores, and threads, of a run
    gpus_per_run: float = 0.0  # GPUs of a run: 0.2 puts five on one
    table: Path | None = None  # where results are gathered; None: benchmarks/results/NAME.csv, or NAME-paper.csv, ...
    fits: Path = ROOT / "runs" / "fits"  # where fitted quantizers are kept
    dry_run: bool = False  # print the commands and what they would take, and run nothing


class Job(NamedTuple):
    """One run: its command as the table shows it, what identifies its rows, and the command that fits its quantizer."""

    command: str
    task: str
    quantizer: str  # and the flags of the variant; empty where there is none
    seed: int
    agents: dict  # whose results it has: an agent's name in result.json -> its name in the table
    fit: str | None = None

    def rows(self):
        """What identifies the row of each agent: task, agent, quantizer, seed. Twins have no quantizer."""
        coded = {agent: agent == "prior" or agent.startswith("saq_") for agent in self.agents.values()}
        return [(self.task, agent, self.quantizer if coded[agent] else "", str(self.seed)) for agent in coded]


def check(options):
    """Raises UserError for numbers out of range, flags that are ours to set, and names that the plan does not have."""
    bounds = dict(seeds=(1, 1e6), first_seed=(0, 1e9), cpus_per_run=(1e-3, 1e6), gpus_per_run=(0, 1e6))
    check_numbers(vars(options), **bounds)
    parts = PLANS[options.name]
    flags, ours = flags_of(options.flags), OURS.union(*(flags_of(v) for part in parts for v in part.variants))
    if taken := ours & flags.keys():
        raise UserError(f"--flags must leave {min(taken)} to this program.")
    if wrong := {flag for flag in flags if flag.endswith("steps") and not flags[flag].replace("_", "").isdecimal()}:
        raise UserError(f"--flags: {min(wrong)} must be followed by a whole number.")
    if options.flags.strip() and options.table is None:
        raise UserError("with --flags, pass a --table of its own: these are other runs than those of the default one.")
    agents = {"prior", *(agent for part in parts for script in part.scripts for agent in SCRIPTS[script])}
    known = {"tasks": {task for part in parts for task in part.tasks}, "agents": agents}
    known["quantizers"] = {kind for part in parts for kind in part.quantizers}
    for what, there in known.items():
        if unknown := set(getattr(options, what)) - there:
            raise UserError(f"{options.name} has no {min(unknown)!r} among its {what}: {', '.join(sorted(there))}.")


def make_jobs(options):
    """Every run of the plan by its command, seed by seed; the fit of a quantizer before the runs that need it."""
    jobs, first = {}, options.first_seed
    for seed, part in itertools.product(range(first, first + options.seeds), PLANS[options.name]):
        rows = itertools.product(part.tasks, part.quantizers, part.variants, part.scripts)
        for task, kind, variant, script in rows:
            agents, coded = SCRIPTS[script], script not in NO_QUANTIZER
            if coded and not (part.twins and kind == part.quantizers[0]):
                agents = agents[:1]  # without its twins, which know no codes: they are trained once
            wanted = task in (options.tasks or [task]) and kind in (options.quantizers or [kind])
            chosen = set(options.agents or agents)
            trains = chosen & set(agents)
            if not (wanted and (trains or (coded and "prior" in chosen))):
                continue
            name, flags, fit = "", "", None
            if coded:
                name, flags = f"{kind} {variant}".strip(), f"--quantizer {kind} {variant}"
                flags += f" {PAPER_CODE_FLAGS.get(kind, '')}" if options.paper else ""
                fit = make_command("saq_bc", task, seed, f"{flags} --use-prior --no-compare", options)
                jobs[fit] = Job(fit, task, name, seed, {"saq_bc": "prior"})
            if not trains:
                continue
            flags = f"{flags} {part.flags} {'--no-compare' if len(agents) == 1 else ''}"
            command = make_command(script, task, seed, flags, options)
            agents = agents + [ONLINE[agent] for agent in agents if "--online-steps" in command]
            jobs[command] = Job(command, task, name, seed, {agent: agent for agent in agents}, fit)
    return jobs


def make_command(script, task, seed, flags, options):
    """The command of one run with the name of its data, not their folder, so that it means the same everywhere."""
    budget = dict(PAPER_BUDGET if options.paper else OGBENCH_BUDGET if options.name == "ogbench" else BUDGET)
    if options.steps is not None:
        budget |= dict(steps=options.steps, vq_steps=options.steps, eval_every=max(1, options.steps // 10))
    if script == "baselines/spot":
        budget["vae_steps"] = budget["vq_steps"]  # its model of the data's density is fitted as a quantizer is
    if script in NO_QUANTIZER:
        del budget["vq_steps"]
    if "--use-prior" in flags:
        budget["steps"] = 1  # there is nothing to learn but the quantizer
    words = [f"python {script}.py --env {task} --seed {seed}", flags]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in budget.items()]
    if options.paper:
        words += ["--plain", PAPER_FLAGS.get((script, task), "")]
    elif task != CUBE:
        words += [TASK_FLAGS.get(task, ""), SCRIPT_FLAGS.get(script, ""), RUN_FLAGS.get((script, task), "")]
    words += [flags_of_fit(options.flags) if "--use-prior" in flags else options.flags]
    if options.data is not None and task in FILES and not options.paper:
        words += [f"--dataset-path {FILES[task]}"]
    return " ".join(" ".join(words).split())


def flags_of_fit(flags):
    """Those of `flags` that saq_bc.py has, but for agents' rates: what only agents read changes no fit, so that runs
    with and without it share one."""
    options = {field.name for field in fields(saq_bc.Args)} - {"decay"}
    kept = []
    for flag in re.split(r"\s+(?=--)", flags.strip()):
        name = re.split("[ =]", flag)[0].removeprefix("--").replace("-", "_")
        if {name, name.removeprefix("no_")} & options:
            kept.append(flag)
    return " ".join(kept)


# --- One run, on whichever machine Ray has put it ---


def execute(command, fit, data, threads, gpus):
    """Runs a command in a process of its own, from the folder of the scripts. `fit` is what the run that fitted its
    quantizer returned; without a share of `gpus`, it sees none. Returns a dict: error, a sentence or None, and where
    there is none the machine, the result, the logged numbers {name: (steps, values)}, and of a run that fits a
    quantizer its checkpoint, as bytes."""
    if fit is not None and fit["error"]:
        return {"error": "its quantizer has not been fitted"}
    words = command.split()[1:]
    if data is not None and words[-2:-1] == ["--dataset-path"]:
        words[-1] = str(Path(data) / words[-1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray lets runs that ask for no GPU see all of them
    if data is not None:
        environment |= {"D4RL_DATASET_DIR": str(data), "OGBENCH_DATASET_DIR": str(Path(data) / "ogbench")}
    with tempfile.TemporaryDirectory() as folder:
        if fit is not None:
            (Path(folder) / "fit").mkdir()
            (Path(folder) / "fit" / "checkpoint.pt").write_bytes(fit["checkpoint"])
            words += ["--quantizer-from", f"{folder}/fit"]
        for attempt in range(3):  # a process that a signal has ended, say for want of memory, is tried again
            out = Path(folder, f"runs{attempt}")
            process = subprocess.run(
                [sys.executable, *words, "--out", str(out)],
                env=environment,
                capture_output=True,
                text=True,
                preexec_fn=end_with_parent,
            )
            if process.returncode >= 0:
                break
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return {"error": f"ended three times by {name}: is there enough memory for so many runs at once?"}
        if process.returncode:
            return {"error": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
        (run,) = out.glob("*")
        logged = {}
        with open(run / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                steps, values = logged.setdefault(row["name"], ([], []))
                steps.append(int(row["step"]))
                values.append(float(row["value"]))
        result = json.loads((run / "result.json").read_text())
        checkpoint = (run / "checkpoint.pt").read_bytes() if "--use-prior" in words else None
    return dict(error=None, host=describe_machine(), result=result, logged=logged, checkpoint=checkpoint)


def describe_machine():
    """Its name and its processor's: seconds are theirs."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{socket.gethostname()} ({models[0] if models else platform.machine()})"


def end_with_parent():
    """In the new process: when the worker that has started it is killed, it ends as well (where there is Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


# --- The driver ---


class Table:
    """The CSV of results: read once, written anew, whole and in one order, whenever a run ends."""

    def __init__(self, path):
        self.path, self.rows = path, []
        if not path.exists():
            return
        csv.field_size_limit(2**31 - 1)  # curves are long
        try:
            with open(path, newline="", encoding="utf-8") as file:
                names, *rows = csv.reader(file, strict=True)
            self.rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        except (ValueError, csv.Error):  # no text, no rows, or rows of other lengths
            names = None
        if names != COLUMNS:
            raise UserError(f"{path} is no table of this program: pass another --table.")

    def check(self, jobs):
        """Raises UserError where a result that is wanted is there already by another command, or others are of another
        budget."""
        wanted = {key: job.command for job in jobs for key in job.rows()}
        budget = {flag: number for job in jobs for flag, number in budget_of(job.command).items()}
        for row in self.rows:
            other = wanted.get(key_of(row), row["command"]) != row["command"]
            if other or any(budget.get(flag, n) != n for flag, n in budget_of(row["command"]).items()):
                raise UserError(f"{self.path} is of other commands: pass another --table. {row['command']}")

    def missing(self, jobs):
        """The commands of jobs (a dict by command) that have a row which is not there."""
        found = {key_of(row) for row in self.rows}
        return {command for command, job in jobs.items() if not found.issuperset(job.rows())}

    def add(self, job, outcome, fit, commit):
        """The rows of a run's agents, and the file anew: a reader finds all of them or none."""
        logged, result, rows = outcome["logged"], outcome["result"], []
        before = {online: agent for agent, online in ONLINE.items()}
        for name, key in zip(job.agents, job.rows(), strict=True):
            steps, scores = logged[f"{name}/score"]
            curves = {"step": steps}
            for series, (at, values) in logged.items():
                if series.startswith(f"{name}/") and at == steps:  # logged with a score; losses have steps of their own
                    curves[series.removeprefix(f"{name}/")] = values
            if name in before:  # it goes on where another agent ended
                spent = logged[f"{before[name]}/seconds"][1][-1]
                curves["seconds"] = [spent + seconds for seconds in curves["seconds"]]
            row = [*key, statistics.mean(scores[-5:]), result[name]["score"], curves["seconds"][-1]]
            fitted = (fit or outcome)["logged"]["quantizer/seconds"] if key[2] else None
            fitted = logged[f"{FITTED_FIRST[name]}/seconds"] if name in FITTED_FIRST else fitted
            row += [fitted[1][-1] if fitted else ""]
            row += [result["data_score"], result["provenance"], outcome["host"], commit, job.command]
            row += [json.dumps(curves), json.dumps(result.get("online", {}).get(name, {}))]
            row = [f"{value:.6g}" if isinstance(value, float) else value for value in row]
            rows.append(dict(zip(COLUMNS, row, strict=True)))
        self.rows = sorted([*(row for row in self.rows if key_of(row) not in job.rows()), *rows], key=key_of)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.path, text.getvalue())
        return rows

    def compare(self, job, outcome):
        """Of a quantizer that was fitted again: a sentence where its prior's score is not the one in the table."""
        ((name, key),) = zip(job.agents, job.rows(), strict=True)
        (before,) = (row["final"] for row in self.rows if key_of(row) == key)
        score = f"{outcome['result'][name]['score']:.6g}"
        if score == before:
            return None
        return f"fitted again on another machine or by other code: {' '.join(key)} scores {score}, not {before}"


def default_table(options):
    """The CSV of a table in this repository; those of other budgets and of fresh seeds have their own."""
    budget = "-paper" * options.paper + (f"-{options.steps}-steps" if options.steps else "")
    seeds = f"-from-seed-{options.first_seed}" if options.first_seed else ""
    return RESULTS / f"{options.name}{budget}{seeds}.csv"


def flags_of(command):
    """{flag: the word behind it}, however it is written; of two, the last, as in the script."""
    words = re.sub(r"--\S+", lambda flag: flag[0].replace("_", "-").replace("=", " "), command).split()
    pairs = itertools.zip_longest(words, words[1:], fillvalue="")
    return {word: value for word, value in pairs if word.startswith("--")}


def budget_of(command):
    """What all runs of a table have in common: {flag: number} of its steps, as far as the command says them."""
    flags = flags_of(command)
    common = {"--eval-every", "--vq-steps"} | ({"--steps"} if "--use-prior" not in flags else set())
    return {flag: flags[flag] for flag in common & flags.keys()}


def key_of(row):
    """What identifies a row: task, agent, quantizer, seed."""
    return tuple(row[column] for column in COLUMNS[:4])


class Fits:
    """Fitted quantizers on this machine's disk, for when a table goes on: by the command that fits them, and by the
    folder of the data, with the size and the time of the file that it names."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    FORMAT = 3  # of checkpoints: fits of another one are made again

    def path(self, command):
        *_, flag, name = command.split()
        file = Path(self.data, name) if flag == "--dataset-path" else None
        found = file.stat() if file and file.is_file() else None
        data = (self.data, found and (found.st_size, found.st_mtime_ns))
        name = hashlib.sha1(f"{command} {data} {self.FORMAT}".encode()).hexdigest()[:12]
        return self.folder / f"{name}.json"

    def save(self, command, outcome):
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.path(command).with_suffix(".pt"), lambda file: file.write(outcome["checkpoint"]))
        write_file(self.path(command), {"command": command} | outcome | {"checkpoint": None})

    def load(self, command):
        """What `execute` returned when that command ran, or None."""
        if not self.path(command).exists():
            return None
        checkpoint = self.path(command).with_suffix(".pt").read_bytes()
        return json.loads(self.path(command).read_text()) | {"checkpoint": checkpoint}


def describe_commit():
    """The commit of the code, "-dirty" where something but results has been edited since; empty without git."""
    if shutil.which("git") is None:
        return ""
    commit, edits = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["describe", "--always"], ["status", "--porcelain", "-uno", ".", ":!benchmarks/results"])
    )
    return f"{commit}-dirty" if edits else commit


def run_all(jobs, table, options):
    """Runs every job whose results the table lacks. Returns what failed, {command: why}."""
    todo = table.missing(jobs)
    if not todo:
        return {}
    try:
        import ray
    except ImportError:
        raise UserError("Ray is missing: pip install -r requirements-benchmarks.txt.") from None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    commit = describe_commit()
    # The code as it is now goes to every machine, this one included: what is edited meanwhile does not change a table.
    sent = {"working_dir": str(ROOT), "excludes": ["/.git", "/.venv", "/runs", "/tests", "/wandb"]}
    address = options.address or "local"  # not one that happens to run here
    try:
        ray.init(address, runtime_env=sent, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        task = ray.remote(execute).options(num_cpus=options.cpus_per_run, num_gpus=options.gpus_per_run, max_retries=3)
    except (ValueError, ConnectionError) as error:  # no such cluster; a GPU and a half
        raise UserError(one_line(error)) from None
    for name, number in ("CPU", options.cpus_per_run), ("GPU", options.gpus_per_run):
        most = max(node["Resources"].get(name, 0) for node in ray.nodes())
        if number > most:  # Ray would wait for such a machine
            raise UserError(f"no machine has the {number:g} {name} that a run asks for: the largest has {most:g}.")
    data = options.data and str(options.data.resolve())
    where = data, max(1, round(options.cpus_per_run)), options.gpus_per_run

    fits = Fits(options.fits, data)
    needed = todo | {jobs[command].fit for command in todo}
    started, waiting = {None: None}, {}  # references by command; jobs by reference, until their results are stored
    for command, job in jobs.items():
        if command not in needed:
            continue
        kept = fits.load(command)
        started[command] = ray.put(kept) if kept else task.remote(command, started[job.fit], *where)
        if command in todo or not kept:
            waiting[started[command]] = job

    failed = {}
    for _ in tqdm(range(len(waiting)), options.name, dynamic_ncols=True):
        (ready,), _ = ray.wait(list(waiting))
        job = waiting.pop(ready)
        try:
            outcome, fit = ray.get([ready, started[job.fit]]) if job.fit else (ray.get(ready), None)
        except ray.exceptions.RayError as error:  # its workers died, one after the other
            outcome = {"error": one_line(error)}
        if outcome["error"]:
            failed[job.command] = outcome["error"]
            continue
        if outcome["checkpoint"]:
            fits.save(job.command, outcome)
        if job.command not in todo:  # a quantizer whose prior has its row
            if difference := table.compare(job, outcome):
                tqdm.write(difference)
            continue
        for row in table.add(job, outcome, fit, commit):
            name = " ".join([row["agent"], row["quantizer"]])
            tqdm.write(f"{row['task']:37}{name:30} seed {row['seed']}: {float(row['score']):7.1f}")
    ray.shutdown()
    return failed


def estimate(jobs, missing):
    """Prints every command with the core-hours of its updates, by the steps a second that speed.py has measured; those
    that are not among `missing` are there."""
    with open(RESULTS / "speed.csv", newline="") as file:
        rates = {row["update"]: float(row["steps_per_second"]) for row in csv.DictReader(file)}
    total, unknown = 0.0, set()
    for job in jobs.values():
        if job.command not in missing:
            print(f"{'there':>10}  {job.command}")
            continue
        flags = flags_of(job.command)
        updates = [(agent, "--steps") for agent in job.agents if agent not in ONLINE.values()]
        if "--use-prior" in flags:
            updates = [(f"{flags['--quantizer']} fit", "--vq-steps")]
        if "spot" in job.agents:
            updates += [("density fit", "--vae-steps")]
        if "--online-steps" in flags:
            updates += [(agent, "--online-steps") for agent in ONLINE if agent in job.agents]
        hours = sum(int(flags[steps]) / rates[update] / 3600 for update, steps in updates if update in rates)
        unknown |= {update for update, _ in updates} - rates.keys()
        total += hours
        print(f"{hours:8.2f} h  {job.command}")
    results = sum(len(jobs[command].agents) for command in missing)
    print(
        f"{len(missing)} runs, {results} results, {total:.1f} core-hours of updates; evaluations come on top.", end=""
    )
    print(f" Not timed: {', '.join(sorted(unknown))}." if unknown else "")


def main():
    options = tyro.cli(Options, description=__doc__)
    check(options)
    jobs = make_jobs(options)
    if not jobs:
        raise UserError(f"no run of {options.name} has such a task, agent and quantizer together: see PLANS.")
    table = options.table or default_table(options)
    if options.dry_run:
        table = Table(table)
        table.check(jobs.values())
        return estimate(jobs, table.missing(jobs))
    try:
        with FileLock(f"{table}.lock", timeout=0):
            table = Table(table)
            table.check(jobs.values())
            failed = run_all(jobs, table, options)
    except Timeout:
        raise UserError(f"another process is writing {table}.") from None
    print(f"results: {table.path}. Tables and figures: python benchmarks/plot.py {table.path}")
    for command, error in failed.items():
        print(f"failed: {command}\n    {error}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    exit_in_words(main)
