"""The tables and figures of benchmarks/reproduce.py, from the CSV that it writes and nothing else.

    python benchmarks/plot.py benchmarks/results/small.csv                  # small.md and small-*.png, beside the CSV
    python benchmarks/plot.py benchmarks/results/table5.csv --paper         # and the published numbers beside ours

NAME.md: means over seeds, the interquartile mean over tasks, the same after some minutes of one core. Figures:

    NAME-steps.png, NAME-seconds.png     learning curves
    NAME-iqm.png, NAME-profiles.png      interquartile means with intervals; which share of runs passes which score
    NAME-figure2.png                     CQL's penalty, exact and as samples estimate it: Figure 2 of the paper
    NAME-kl.png, NAME-mmd.png            the same of what BRAC and BEAR charge

One column a family of algorithms: agents over codes solid, their continuous twins dashed. Statistics over tasks are
rliable's (Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021, arXiv:2108.13264). Where
they mix tasks, scores are divided by 100, D4RL's expert, or by that of the data's own episodes where it is higher, and
clipped to [0, 1]: no task weighs more than another, and no agent's number depends on who else is in the table.

Needs requirements-benchmarks.txt.
"""

import csv
import itertools
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import offset_copy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vqvae import UserError, exit_in_words, write_file

# What papers print, and the tasks that their means are over.
PUBLISHED = Path(__file__).parent / "results" / "paper.csv"
SUITES = {
    "locomotion average": ("halfcheetah-", "hopper-", "walker2d-"),
    "antmaze average": ("antmaze-",),
    "adroit average": ("door-", "hammer-", "pen-", "relocate-"),
    "kitchen average": ("kitchen-",),
    "robomimic average": ("lift-", "can-", "square-", "tool-hang-", "transport-"),
    "medium-replay average": ("halfcheetah-", "hopper-", "walker2d-"),
}

# Agents of one panel, by what their names have in common; one that is not listed belongs to what follows "saq_".
FAMILIES = {"td3_bc": "rebrac", "ifql": "fql", "gaussian_bc": "bc", "bc_gmm": "bc"}
FAMILIES |= {"online": "spot", "spot_online": "spot"}  # of SPOT and of SAQ-SPOT, where they go on online
ORDER = ["cql", "iql", "brac", "bc", "awac", "bear", "spot", "rebrac", "fql"]
QUANTIZERS = ["vqvae", "mixture", "aquadem"]
# Okabe and Ito's colours, which the colour-blind tell apart. Variants of a quantizer take those that a table leaves.
BLUE, RED, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
CODES = dict(zip(QUANTIZERS, [BLUE, RED, GREEN], strict=True))
LOOKS = {  # of agents that share a panel with another of their kind
    "gaussian_bc": (PURPLE, "-."),
    "td3_bc": (PURPLE, "-."),
    "ifql": (PURPLE, "-."),
    "bc_gmm": ("grey", (0, (6, 1))),
    "saq_online": (SKY, "-"),
    "spot_online": (PURPLE, "-."),
}
# What is exact over codes and estimated over actions. Figure: the quantity, whose name begins those of its series in
# `curves`; the family that charges it; the title of a panel; what to know when reading it.
EXACT = {
    "figure2": (
        "penalty",
        "cql",
        "conservative penalty",
        "Logs of a sum and an integral (computed for actions of two dimensions): compare gaps, not levels.",
    ),
    "kl": (
        "kl",
        "brac",
        "KL from the data's policy",
        "Of shares of codes, from a prior with a floor (so it may lie below 0), and of densities: compare courses.",
    ),
    "mmd": ("mmd", "bear", "root of MMD² from the data", "Over a few draws it is not 0 even between equal policies."),
}
SERIES = {"exact": ("-", "exact"), "100_draws": ("--", "from 100 draws"), "sampled": (":", "from samples")}
PAGE = 5, 6  # columns and rows of panels that are readable at the width of a README


@dataclass
class Options:
    table: tyro.conf.Positional[Path]  # the CSV
    out: Path | None = None  # folder for what is written; without it, the CSV's own
    paper: bool = False  # add the published numbers, from benchmarks/results/paper.csv
    minutes: tuple[float, ...] = (1, 2, 5, 10)  # of one core, quantizer included: a table for each
    reps: int = 2_000  # bootstrap samples behind an interval


class Run(NamedTuple):
    """A row of the CSV: one agent, trained once."""

    task: str
    agent: str
    quantizer: str  # and the flags of a variant, "vqvae --num-codes 16"; empty: an agent without codes
    seed: int
    score: float  # mean of the last five evaluations
    final: float  # of the final episodes
    seconds: float  # of one core, for the agent's updates
    fit_seconds: float  # for its quantizer's; 0: it has none
    data_score: float  # of the data's own episodes
    provenance: str  # one sentence: what the data are
    host: str
    commit: str
    command: str
    curves: dict  # of lists: step, score, seconds, and what else was logged at each evaluation

    @property
    def label(self):
        return f"{self.agent}, {self.quantizer}" if self.quantizer else self.agent


# --- Reading ---


def read(path):
    """The runs in a CSV. Raises UserError, with the line, for anything that would make a table of it wrong."""
    if not path.is_file():
        raise UserError(f"{path} is no file: benchmarks/reproduce.py writes such tables.")
    csv.field_size_limit(2**31 - 1)  # curves are long
    runs = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in Run._fields if name not in (rows.fieldnames or ())]:
                raise UserError(f"{path} has no columns {', '.join(missing)}.")
            for row in rows:
                try:
                    run = parse(row)
                except (ValueError, TypeError, KeyError, OverflowError) as error:
                    raise UserError(f"{path}, line {rows.line_num}: {error}.") from None
                key = run.task, run.label, run.seed
                if key in runs:
                    raise UserError(f"{path} has seed {run.seed} of {run.label} on {run.task} twice.")
                runs[key] = run
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV: {error}.") from None
    if not runs:
        raise UserError(f"{path} holds no runs yet.")
    check_alike(path, runs.values())
    return list(runs.values())


def parse(row):
    """A Run of a row of text. Raises ValueError where it holds no finite numbers, or curves that do not fit."""
    values = {name: row[name] or "" for name in Run._fields}
    values["seed"] = int(values["seed"])
    for name in ("score", "final", "seconds", "fit_seconds", "data_score"):
        values[name] = float(values[name] or ("0" if name == "fit_seconds" else "nan"))
        if not math.isfinite(values[name]):
            raise ValueError(f"{name} is missing or not finite")
    curves = json.loads(values["curves"])
    if not isinstance(curves, dict) or not {"step", "score", "seconds"} <= curves.keys():
        raise ValueError("curves must have step, score and seconds")
    values["curves"] = {name: np.array(series, float) for name, series in curves.items()}
    step, shape = values["curves"]["step"], (len(curves["step"]),)
    fits = all(series.shape == shape and np.isfinite(series).all() for series in values["curves"].values())
    if not (fits and len(step) and (np.diff(step) > 0).all()):
        raise ValueError("curves must be finite, of equal lengths, and their steps must rise")
    return Run(**values)


def check_alike(path, runs):
    """Raises UserError where runs that would be averaged are of other commands, but for the seed, or of other data."""
    commands, data = {}, {}
    for run in runs:
        words = re.sub(rf"--seed[ =]{run.seed}(?!\S)", "", run.command).split()
        first = commands.setdefault((run.task, run.label), words)
        if words != first:
            ours, theirs = ([w for w in a if w not in b] for a, b in ((words, first), (first, words)))
            how = f"{' '.join(ours) or 'nothing'!r} in place of {' '.join(theirs) or 'nothing'!r}"
            raise UserError(f"{path} mixes commands of {run.label} on {run.task}: seed {run.seed} has {how}.")
        known = data.setdefault(run.task, run)
        if run.provenance != known.provenance or abs(run.data_score - known.data_score) > 0.05:
            raise UserError(f"{path} mixes data of {run.task}: compare {run.label} and {known.label}.")


def family(agent):
    name = agent.removeprefix("saq_")
    return FAMILIES.get(name, name)


def rank(run):
    """Sorts agents: by family, those over codes before their twins, variants by the numbers in their flags."""
    place = ORDER.index(family(run.agent)) if family(run.agent) in ORDER else len(ORDER)
    kind, numbers = run.quantizer.split(" ")[0], [int(word) for word in run.quantizer.split() if word.isdigit()]
    kinds = [*QUANTIZERS, kind] if kind else [*QUANTIZERS, None, kind]
    later = [*LOOKS].index(run.agent) if run.agent in LOOKS else -1
    return place, family(run.agent), kinds.index(kind), numbers, run.quantizer, later


def by_label(runs):
    """{label: its runs}, agents in the order of tables."""
    groups = {}
    for run in sorted(runs, key=rank):
        groups.setdefault(run.label, []).append(run)
    return groups


# --- Statistics ---


def mean_and_error(values):
    """The mean over seeds (N, ...) and its standard error, of one seed 0."""
    values = np.asarray(values, float)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(0), error


def score_after(run, seconds):
    """The score of the last evaluation that was done in so many seconds of a core, the quantizer's fit included; None
    where there was none. A run that was over by then keeps its last score."""
    done = run.fit_seconds + run.curves["seconds"] <= seconds
    return run.curves["score"][done][-1] if done.any() else None


def normalise(score, run):
    """0: D4RL's random policy, or no success; 1: its expert, or the data's own episodes where they score more."""
    return min(max(score / max(100.0, run.data_score), 0.0), 1.0)


def normalised_scores(runs, score):
    """{label: (seeds, tasks)} of agents that have all tasks, over the seeds that they have in all of them; none where
    `score(run)` is None for one of theirs, or where others have more seeds: what an interquartile mean leaves out
    depends on how many there are. Tasks whose score is a return have no 0 and 1, and are left out."""
    runs = [run for run in runs if "The score is the return" not in run.provenance]
    tasks, matrices = list(dict.fromkeys(run.task for run in runs)), {}
    for label, own in by_label(runs).items():
        scores = {(run.seed, run.task): score(run) for run in own}
        seeds = [seed for seed in sorted({run.seed for run in own}) if all((seed, task) in scores for task in tasks)]
        if seeds and None not in scores.values():
            known = {(run.seed, run.task): normalise(scores[run.seed, run.task], run) for run in own}
            matrices[label] = np.array([[known[seed, task] for task in tasks] for seed in seeds])
    most = max(map(len, matrices.values()), default=0)
    return {label: matrix for label, matrix in matrices.items() if len(matrix) == most}


def load_rliable():
    """rliable's library and metrics, imported on first use: reading a table needs neither."""
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-benchmarks.txt.") from None
    return library, metrics


def interquartile_means(matrices, reps):
    """{label: (mean of the middle half of all runs, as rliable counts it, low, high)} of {label: (seeds, tasks)}: the
    bounds hold 95% of `reps` bootstrap samples, stratified, which draw seeds anew in each task; of one seed, NaN."""
    library, metrics = load_rliable()
    found = {}
    for label, matrix in matrices.items():
        np.random.seed(0)  # rliable 1.2.0 draws from NumPy's global generator, whatever its random_state is
        iqm = lambda scores: np.array([metrics.aggregate_iqm(scores)])  # noqa: E731
        means, bounds = library.get_interval_estimates({label: matrix}, iqm, reps=reps)
        low, high = bounds[label][:, 0] if len(matrix) > 1 else (math.nan, math.nan)
        found[label] = means[label][0], low, high
    return found


def performance_profiles(matrices, taus, reps):
    """{label: (share of runs above each of taus (T,), its bounds (2, T))}."""
    library, _ = load_rliable()
    found = {}
    for label, matrix in matrices.items():
        np.random.seed(0)
        shares, bounds = library.create_performance_profile(
            {label: matrix}, taus, custom_profile_func=lambda s, t: (s[..., None] > t).mean((0, 1)), reps=reps
        )
        found[label] = shares[label], bounds[label]
    return found


# --- Tables ---


def make_table(runs, score, reps):
    """Markdown: agents by tasks, mean over seeds ± standard error; the interquartile mean over tasks, and the mean.
    Bold: of the cells with a column's most seeds, the best and what lies within its standard error (its interval).
    `score(run)` may be None: a mean that lacks seeds would favour the fast ones, so its cell is empty. Two of three
    seeds are said, a single one has no error."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    columns, seeds = {task: {} for task in tasks}, len({run.seed for run in runs})
    for label, own in by_label(runs).items():
        for task in tasks:
            scores = [score(run) for run in own if run.task == task]
            if scores and None not in scores:
                mean, error = mean_and_error(scores)
                shown, off = round(mean, 1) + 0.0, round(float(error), 1)  # as they are printed, but never as -0.0
                least = round(shown - off, 1)
                text = f"{shown:.1f}" + f" ± {off:.1f}" * (len(scores) > 1)
                text += f" ({len(scores)})" * (1 < len(scores) < seeds)
                columns[task][label] = len(scores), shown, least, text
    columns |= {"IQM": {}, "mean": {}}
    matrices = normalised_scores(runs, score)
    for label, (mean, low, high) in interquartile_means(matrices, reps).items():
        interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
        fewer = f", {len(matrices[label])} of {seeds} seeds" * (len(matrices[label]) < seeds)
        columns["IQM"][label] = len(matrices[label]), mean, low if interval else mean, f"{mean:.2f}{interval}{fewer}"
        mean = round(matrices[label].mean(), 2)
        columns["mean"][label] = len(matrices[label]), mean, mean, f"{mean:.2f}"
    known = {run.task: run for run in runs}
    head = [f"{task} †" if task in known and is_substitute(known[task]) else task for task in columns]
    lines = ["| agent | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    best = {name: max(column.values()) for name, column in columns.items() if column}  # of the most seeds
    for label in by_label(runs):
        cells = []
        for name, column in columns.items():
            count, mean, _, text = column.get(label, (0, 0, 0, ""))
            bold = text and count == best[name][0] and mean >= best[name][2]
            cells.append(f"**{text}**" if bold else text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    data = [f"{known[task].data_score:.1f}" for task in tasks]
    return [*lines, "| *episodes of the data* | " + " | ".join([*data, "", ""]) + " |"]


def is_substitute(run):
    """Whether the data stand in for those that the task is named after: not the demonstrations that ship here."""
    return "-demos-" not in run.task and re.search("data are (not|of another)", run.provenance) is not None


def notes_on_data(runs):
    """A sentence for each kind of data: what they are (without the returns that scores are measured by), and of which
    tasks."""
    found = {}
    for run in {run.task: run for run in runs}.values():
        found.setdefault(run.provenance.split("; ")[-1].rstrip("."), []).append(run.task)
    return [f"{sentence[:1].upper()}{sentence[1:]}: {', '.join(tasks)}." for sentence, tasks in found.items()]


def seeds_of(runs):
    seeds = sorted({run.seed for run in runs})
    whole = len(runs) == len({(run.task, run.label) for run in runs}) * len(seeds)
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}{' (some have fewer)' * (not whole)}"


def published_name(run):
    """What results/paper.csv calls an agent; None where no paper has the like."""
    kind, _, variant = run.quantizer.partition(" ")
    name = {"": run.agent, "vqvae": run.agent, "aquadem": run.agent.replace("saq_", "aquadem_")}.get(kind)
    ending = {"": "", "--no-action-only": "", "--action-only": "_action_only"}
    ending |= {f"--num-codes {k}": f"_k{k}" for k in (16, 32, 64, 128)}
    return name + ending[variant] if name and variant in ending else None


def published_table(runs):
    """Markdown: what papers print of these tasks and agents, and of means over suites where all their tasks are here,
    beside ours. `corrected` and `source` are results/paper.csv's: averages that differ from those of the rows above
    them and, said to be conjecture, rows that were mixed up."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    ours, substitutes = {}, {run.task for run in runs if is_substitute(run)}
    for run in sorted(runs, key=rank):
        ours.setdefault((run.task, run.label), []).append(run)
    results = {key: (published_name(own[0]), *mean_and_error([run.score for run in own])) for key, own in ours.items()}
    for table, suite in dict.fromkeys((row["table"], row["task"]) for row in published if row["task"] in SUITES):
        table = "table5" if table == "table1" else table  # whose suites Table 1 averages
        names = {row["task"] for row in published if row["table"] == table}
        tasks = [task for task in names if task.startswith(SUITES[suite]) and task not in SUITES]
        for label in by_label(runs):
            parts = [results.get((task, label)) for task in tasks]
            if None not in parts:
                mean, error = sum(part[1] for part in parts), math.hypot(*(part[2] for part in parts))
                results[suite, label] = parts[0][0], mean / len(tasks), error / len(tasks)
                substitutes |= {suite} if substitutes & set(tasks) else set()
    lines = ["| task | agent | here | published | corrected | source |", "|---|---|---|---|---|---|"]
    order = [*dict.fromkeys(run.task for run in runs), *SUITES]
    for (task, label), (name, mean, error) in sorted(results.items(), key=lambda item: order.index(item[0][0])):
        here = f"{mean:.1f}" + f" ± {error:.1f}" * bool(error) + " †" * (task in substitutes)
        for row in published:
            if (row["task"], row["agent"]) == (task, name):
                cells = task, label, here, row["score"], row["corrected"], row["source"]
                lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else ["None is published of these tasks and agents."]


NORMALISED = (
    "Normalised: divided by 100 (D4RL's expert; every episode a success) or, where it is higher, by the score of the "
    "data's own episodes, and clipped to [0, 1]."
)
RULES = f"""\
Means over seeds ± standard error; (2): of two seeds, where others have more. Bold: of the cells with a column's most
seeds, the best and what lies within its standard error. IQM: the interquartile mean of normalised scores over tasks and
seeds, and the 95% interval of a stratified bootstrap (rliable), of agents that have all tasks and seeds; bold: the best
and what lies within its interval. It leaves out the lowest and the highest quarter of an agent's runs, which may be the
whole of a task; the mean of all stands beside it. A `prior` is evaluated once, when its fit ends. {NORMALISED}
†: the data stand in for those that the task is named after.
"""
TIME_RULES = """\
The score of the last evaluation that was done by then, the seconds of the quantizer's fit included and those of
evaluations not; empty where a seed had none. A run that was over keeps its last score.
"""


def write_page(name, runs, options):
    """All tables as one Markdown text."""
    origin = [f"{len(runs)} runs, {seeds_of(runs)}"]
    for what, values in ("commits", {run.commit for run in runs}), ("machines", {run.host for run in runs}):
        origin.append(f"{what} {', '.join(sorted(values))}")
    page = [f"# {name}", "", "; ".join(origin) + ".", "", RULES, *(f"- {note}" for note in notes_on_data(runs)), ""]
    page += ["## Mean of the last five evaluations", "", *make_table(runs, lambda run: run.score, options.reps), ""]
    page += ["## By time", "", TIME_RULES]
    if len({run.host for run in runs}) > 1:
        page += ["These runs are of several machines (`host` in the CSV), and so are their seconds.", ""]
    for minutes in options.minutes:
        page += [f"### After {minutes:g} minute{'s' * (minutes != 1)} of one core", ""]
        page += [*make_table(runs, partial(score_after, seconds=60 * minutes), options.reps), ""]
    if options.paper:
        page += ["## Published numbers", "", "Over the benchmarks' own data, after the papers' own budgets.", ""]
        page += [*published_table(runs), ""]
    return "\n".join(page)


# --- Figures ---


def look(run):
    """Colour and line of an agent, the same in every figure: solid over codes, dashed without."""
    usual = (CODES[run.quantizer], "-") if run.quantizer else ("black", "--")
    color, line = LOOKS.get(run.agent, usual)
    return {"color": color, "linestyle": line}


def panels(rows, titles, legends=(), height=1.45, **share):
    """A figure as wide as a README, and its axes: so many rows (R, C), a column for each title. Below them is room for
    legends, one for each column."""
    lines = max(map(len, legends), default=0)
    figure = Figure(figsize=(9, 1.2 + height * rows + 0.16 * lines), layout="constrained", dpi=150)
    axes = figure.subplots(rows, len(titles), squeeze=False, **share)
    for panel in axes.flat:
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    return figure, axes


def caption(figure, runs, text):
    """What is shown, and what the data are, at the foot of a figure."""
    notes = [f"{text} {seeds_of(runs).capitalize()}.", *notes_on_data(runs)]
    lines = [line for note in notes for line in textwrap.wrap(note, 165, break_on_hyphens=False)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color="#444444")


def name_lines(axes, legends):
    """Under each column its legend, below the label of its last panel: {name: how its line looks} for each."""
    for panel, lines in zip(axes[-1], legends, strict=True):
        handles = [Line2D([], [], label=name, **style) for name, style in lines.items()]
        below = offset_copy(panel.transAxes, panel.figure, y=-0.42, units="inches")
        place = dict(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0)
        panel.legend(handles=handles, fontsize=7, frameon=False, handlelength=2.2, **place)


def label_steps(panel):
    panel.set_xlabel("gradient steps", fontsize=8)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step else "0"))


def wrap_task(task):
    """A task's name in lines that fit beside a panel: broken after a hyphen."""
    return "\n".join(textwrap.wrap(task, 18, break_long_words=False))


def draw_band(panel, x, values, **style):
    mean, error = mean_and_error(values)
    panel.plot(x, mean, linewidth=1.4, **style)
    if len(values) > 1:
        panel.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.18, linewidth=0)


def align(runs, name):
    """Steps that all runs have evaluated after (T,), the mean seconds until then (T,), a series of theirs (N, T)."""
    steps = sorted(set.intersection(*(set(run.curves["step"]) for run in runs)))
    rows = [np.isin(run.curves["step"], steps) for run in runs]
    seconds = [run.fit_seconds + run.curves["seconds"][row] for run, row in zip(runs, rows, strict=True)]
    series = [run.curves[name][row] for run, row in zip(runs, rows, strict=True)]
    return np.array(steps), np.mean(seconds, 0), np.array(series)


def label_seconds(panel, runs):
    """A logarithmic axis of seconds, in units that people use."""
    ends = [run.fit_seconds + run.curves["seconds"][[0, -1]] for run in runs]
    low, high = max(np.min(ends), 0.1) / 1.2, np.max(ends) * 1.2
    ticks = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h", 360_000: "100 h"}
    if high < 20 * low:
        ticks |= {3: "3 s", 30: "30 s", 120: "2 min", 300: "5 min", 1800: "30 min", 10_800: "3 h", 108_000: "30 h"}
    panel.set(xscale="log", xlim=(low, high))
    panel.set_xticks([seconds for seconds in ticks if low <= seconds <= high])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: ticks.get(round(seconds), "")))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("time of one core", fontsize=8)


def learning_curves(runs, over):
    """Figures of scores over "steps" or "seconds": a row a task, a column a family; as many as it takes."""
    priors = [run for run in runs if run.agent == "prior"]  # which have no course: lines in the panels of others
    runs = [run for run in runs if run.agent != "prior"]
    tasks = list(dict.fromkeys(run.task for run in runs))
    for top in range(0, len(tasks), PAGE[1]):
        rows = tasks[top : top + PAGE[1]]
        own = [run for run in runs if run.task in rows]
        names = list(dict.fromkeys(family(run.agent) for run in sorted(own, key=rank)))
        for left in range(0, len(names), PAGE[0]):
            columns = names[left : left + PAGE[0]]
            yield curves_page([run for run in own if family(run.agent) in columns], priors, rows, columns, over)


def curves_page(runs, priors, tasks, names, over):
    legends = [{run.label: look(run) for run in sorted(runs, key=rank) if family(run.agent) == name} for name in names]
    figure, axes = panels(len(tasks), [name.upper() for name in names], legends, sharex="col", sharey="row")
    for i, task in enumerate(tasks):
        axes[i, 0].set_ylabel(f"{wrap_task(task)}\nscore", fontsize=7)
        for panel, name in zip(axes[i], names, strict=True):
            own = [run for run in runs if (run.task, family(run.agent)) == (task, name)]
            for group in by_label(own).values():
                steps, seconds, scores = align(group, "score")
                draw_band(panel, steps if over == "steps" else seconds, scores, **look(group[0]))
                kind = group[0].quantizer
                if scores := [run.score for run in priors if (run.task, run.quantizer) == (task, kind)]:
                    panel.axhline(np.mean(scores), color=CODES[kind], linestyle=":", linewidth=1)
            for run in own[:1]:
                panel.axhline(run.data_score, color="grey", linewidth=0.8, zorder=0)
        low, high = axes[i, 0].get_ylim()
        room = max(0, 10 - (high - low)) / 2  # ten points at least: less is no difference to look at
        axes[i, 0].set_ylim(low - room, high + room)
    for panel, name in zip(axes[-1], names, strict=True):
        own = [run for run in runs if family(run.agent) == name]
        label_steps(panel) if over == "steps" else label_seconds(panel, own)
    name_lines(axes, legends)
    text = "Mean over seeds, band: ± standard error; grey: the data's own episodes; dotted: a quantizer's prior alone."
    later = "" if over == "steps" else " The fit of a quantizer comes first, so its agents begin later."
    caption(figure, runs, text + later)
    return figure


def interval_figure(runs, means):
    """A line an agent: the interquartile mean over tasks, and its interval."""
    figure, axes = panels(1, [""], height=0.3 + 0.2 * len(means))
    (panel,) = axes.flat
    known = {run.label: run for run in runs}
    for place, (label, (mean, low, high)) in enumerate(means.items()):
        style = look(known[label])
        if math.isfinite(low):
            panel.plot([low, high], [place, place], linewidth=4, alpha=0.35, color=style["color"])
        panel.plot(mean, place, "o" if known[label].quantizer else "D", color=style["color"], markersize=5)
    panel.set_yticks(range(len(means)), means, fontsize=8)
    panel.set_ylim(len(means) - 0.4, -0.6)
    panel.set_xlabel("interquartile mean of normalised scores", fontsize=8)
    text = "Circles: over codes, diamonds: continuous; bars: 95% of stratified bootstrap samples."
    caption(figure, runs, f"{text} {NORMALISED}")
    return figure


def profile_figures(runs, profiles, taus):
    """Figures of the share of runs above each score: a column a family, as many as it takes."""
    runs = [run for run in sorted(runs, key=rank) if run.label in profiles]
    names = list(dict.fromkeys(family(run.agent) for run in runs))
    for left in range(0, len(names), PAGE[0]):
        columns = names[left : left + PAGE[0]]
        legends = [{run.label: look(run) for run in runs if family(run.agent) == name} for name in columns]
        titles = [name.upper() for name in columns]
        figure, axes = panels(1, titles, legends, height=2.0, sharex=True, sharey=True)
        for panel, lines in zip(axes[0], legends, strict=True):
            for label, style in lines.items():
                shares, bounds = profiles[label]
                panel.plot(taus, shares, linewidth=1.4, **style)
                panel.fill_between(taus, *bounds, color=style["color"], alpha=0.18, linewidth=0)
            panel.set_xlabel("normalised score τ", fontsize=8)
        axes[0, 0].set_ylabel("share of runs above τ", fontsize=8)
        name_lines(axes, legends)
        caption(figure, runs, f"Bands: 95% of stratified bootstrap samples. {NORMALISED}")
        yield figure


def exact_figures(runs, quantity, name, title, note):
    """Figures of what is exact over codes and estimated over actions, in the course of training: a row a task, the
    agent over codes beside its twin."""
    series = {f"{quantity}_{kind}": (line, words) for kind, (line, words) in SERIES.items()}
    runs = [run for run in sorted(runs, key=rank) if family(run.agent) == name and series.keys() & run.curves.keys()]
    estimated = {run.task for run in runs if f"{quantity}_sampled" in run.curves}  # without one, nothing to compare
    tasks = list(dict.fromkeys(run.task for run in runs if run.task in estimated))
    for top in range(0, len(tasks), PAGE[1]):
        rows = tasks[top : top + PAGE[1]]
        shown = [run for run in runs if run.task in rows]
        agents, legends = list(dict.fromkeys(run.agent for run in shown)), []
        for agent in agents:
            own = [run for run in shown if run.agent == agent]
            legends.append(
                {
                    f"{run.label}: {words}": look(run) | {"linestyle": line}
                    for run in own
                    for key, (line, words) in series.items()
                    if key in run.curves
                }
            )
        figure, axes = panels(len(rows), [f"{agent}: {title}" for agent in agents], legends, sharex=True)
        for i, task in enumerate(rows):
            axes[i, 0].set_ylabel(wrap_task(task), fontsize=7)
            for panel, agent in zip(axes[i], agents, strict=True):
                for group in by_label(run for run in shown if (run.task, run.agent) == (task, agent)).values():
                    for key, (line, _) in series.items():
                        if all(key in run.curves for run in group):
                            steps, _, values = align(group, key)
                            draw_band(panel, steps, values, **look(group[0]) | {"linestyle": line})
        for panel in axes[-1]:
            label_steps(panel)
        name_lines(axes, legends)
        caption(figure, shown, f"Mean over seeds, band: ± standard error. {note}")
        yield figure


# --- All of it ---


def draw(runs, reps):
    """(name, figures) of everything that these runs have."""
    kinds = list(dict.fromkeys(run.quantizer for run in sorted(runs, key=rank) if run.quantizer))
    free = [color for color in (BLUE, RED, ORANGE, GREEN, SKY, PURPLE) if color not in map(CODES.get, kinds)]
    variants = [kind for kind in kinds if kind not in CODES]
    CODES.update(zip(variants, itertools.cycle(free or ["grey"]), strict=False))
    for over in ("steps", "seconds"):
        yield over, learning_curves(runs, over)
    if matrices := normalised_scores(runs, lambda run: run.score):
        taus = np.linspace(0, 1, 101)
        yield "iqm", [interval_figure(runs, interquartile_means(matrices, reps))]
        yield "profiles", profile_figures(runs, performance_profiles(matrices, taus, reps), taus)
    for kind, words in EXACT.items():
        yield kind, exact_figures(runs, *words)


def main():
    options = tyro.cli(Options, description=__doc__)
    if options.reps < 1 or not all(0 < minutes < math.inf for minutes in options.minutes):
        raise UserError("reps and minutes must be positive numbers.")
    runs = read(options.table)
    load_rliable()
    folder, name = options.out or options.table.parent, options.table.stem
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page(name, runs, options)
    print(page)
    write_file(folder / f"{name}.md", page)
    for kind, figures in draw(runs, options.reps):
        for number, figure in enumerate(figures, 1):
            path = folder / f"{name}-{kind}{f'-{number}' * (number > 1)}.png"
            write_file(path, figure.savefig)
            print(f"figure: {path}")


if __name__ == "__main__":
    exit_in_words(main)
