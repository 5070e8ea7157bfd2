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
they mix tasks, a score becomes 0 for D4RL's random policy and 1 for its expert, or for the data's own episodes where
these are better, and is clipped: no task then weighs more than another, whoever else is in the table.

Needs requirements-benchmarks.txt.
"""

import csv
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from vqvae import UserError, exit_in_words, write_file

PUBLISHED = Path(__file__).parent / "results" / "paper.csv"

# Agents of one panel, by what their names have in common; one that is not listed belongs to what follows "saq_".
FAMILIES = {"td3_bc": "rebrac", "ifql": "fql", "gaussian_bc": "bc", "bc_gmm": "bc"}
ORDER = ["cql", "iql", "brac", "bc", "awac", "bear", "spot", "rebrac", "fql"]
QUANTIZERS = ["vqvae", "mixture", "hard-mixture", "aquadem"]
# Okabe and Ito's colours, which the colour-blind tell apart; lines of equal colour are never in one panel.
BLUE, RED, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
CODES = dict(zip(QUANTIZERS, [BLUE, RED, ORANGE, GREEN], strict=True))
TWINS = {"gaussian_bc": (PURPLE, "-."), "td3_bc": (PURPLE, "-."), "ifql": (PURPLE, "-."), "bc_gmm": ("grey", ":")}
# What agents log of a quantity that is exact over codes and sampled over actions: name, families, title of the panel.
EXACT = {
    "figure2": ("penalty", "cql", "conservative penalty"),
    "kl": ("kl", "brac", "KL from the data's policy"),
    "mmd": ("mmd", "bear", "root of MMD² from the data"),
}
PAGE = 5, 6  # columns and rows of panels that a figure can hold at the width of a README


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
    quantizer: str  # empty: an agent without codes
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
                except (ValueError, TypeError, KeyError) as error:
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
    """Sorts agents: by family, those over codes before their twins."""
    place = ORDER.index(family(run.agent)) if family(run.agent) in ORDER else len(ORDER)
    kind = QUANTIZERS.index(run.quantizer) if run.quantizer in QUANTIZERS else len(QUANTIZERS)
    return place, family(run.agent), kind, run.quantizer, list(TWINS).index(run.agent) + 1 if run.agent in TWINS else 0


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
    """0: D4RL's random policy; 1: its expert, or the data's own episodes where they are better. Clipped."""
    return min(max(score / max(100.0, run.data_score), 0.0), 1.0)


def normalised_scores(runs, score):
    """{label: (seeds, tasks)} of agents that have all tasks, over the seeds that they have in all of them. Tasks whose
    score is a return have no 0 and 1, and are left out. `score(run)` may be None."""
    runs = [run for run in runs if "The score is the return" not in run.provenance]
    tasks, matrices = list(dict.fromkeys(run.task for run in runs)), {}
    for label, own in by_label(runs).items():
        scores = {(run.seed, run.task): normalise(score(run), run) for run in own if score(run) is not None}
        seeds = [seed for seed in sorted({run.seed for run in own}) if all((seed, task) in scores for task in tasks)]
        if seeds:
            matrices[label] = np.array([[scores[seed, task] for task in tasks] for seed in seeds])
    return matrices


def load_rliable():
    """rliable's library and metrics, imported on first use: reading a table needs neither."""
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-benchmarks.txt.") from None
    return library, metrics


def interquartile_means(matrices, reps):
    """{label: (mean of the middle half of all runs, low, high)} of {label: (seeds, tasks)}: the bounds hold 95% of
    `reps` bootstrap samples, stratified, which draw seeds anew in each task. Bounds of one seed are NaN."""
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
    """Markdown: agents by tasks, mean over seeds ± standard error, and the interquartile mean over tasks. Bold: the best
    of a column and what lies within its standard error (its interval) of it. `score(run)` may be None: a mean that
    lacks seeds would favour the fast ones, so its cell is empty."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    columns = {task: {} for task in tasks}
    for label, own in by_label(runs).items():
        for task in tasks:
            scores = [score(run) for run in own if run.task == task]
            if scores and None not in scores:
                mean, error = mean_and_error(scores)
                columns[task][label] = mean, mean - error, f"{mean:.1f}" + f" ± {error:.1f}" * (len(scores) > 1)
    columns["IQM"], matrices, seeds = {}, normalised_scores(runs, score), len({run.seed for run in runs})
    for label, (mean, low, high) in interquartile_means(matrices, reps).items():
        interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
        fewer = f", {len(matrices[label])} of {seeds} seeds" * (len(matrices[label]) < seeds)
        columns["IQM"][label] = mean, low if interval else mean, f"{mean:.2f}{interval}{fewer}"
    known = {run.task: run for run in runs}
    head = [f"{task} †" if task in known and is_substitute(known[task]) else task for task in columns]
    lines = ["| agent | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    least = {name: max(column.values())[1] for name, column in columns.items() if column}
    for label in by_label(runs):
        found = [(name, column.get(label)) for name, column in columns.items()]
        cells = [f"**{c[2]}**" if c and c[0] >= least[name] else c[2] if c else "" for name, c in found]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    data = [f"{known[task].data_score:.1f}" for task in tasks]
    return [*lines, "| *episodes of the data* | " + " | ".join([*data, ""]) + " |"]


def is_substitute(run):
    """Whether the data stand in for those that the task is named after."""
    return re.search("data are (not|of another)", run.provenance) is not None


def notes_on_data(runs):
    """A sentence for each kind of data: what they are (without the returns that scores are measured by), and of which
    tasks."""
    found = {}
    for run in {run.task: run for run in runs}.values():
        found.setdefault(run.provenance.split("; ")[-1].rstrip("."), []).append(run.task)
    return [f"{sentence[:1].upper()}{sentence[1:]}: {', '.join(tasks)}." for sentence, tasks in found.items()]


def seeds_of(runs):
    seeds = sorted({run.seed for run in runs})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def published_table(runs):
    """Markdown: what papers print of these tasks and agents, beside ours. Corrected are averages that differ from those
    of the rows above them, and, by conjecture, rows that were mixed up; `source` says which."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    lines = ["| task | agent | here | published | corrected | source |", "|---|---|---|---|---|---|"]
    for task in dict.fromkeys(run.task for run in runs):
        for label, own in by_label(run for run in runs if run.task == task).items():
            name, kind = own[0].agent, own[0].quantizer
            name = {"": name, "vqvae": name, "aquadem": name.replace("saq_", "aquadem_")}.get(kind)
            mean, error = mean_and_error([run.score for run in own])
            ours = f"{mean:.1f}" + f" ± {error:.1f}" * (len(own) > 1) + " †" * is_substitute(own[0])
            for row in published:
                if (row["task"], row["agent"]) == (task, name):
                    cells = task, label, ours, row["score"], row["corrected"], row["source"]
                    lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else ["None is published of these tasks and agents."]


RULES = """\
Means over seeds ± standard error. Bold: the best of a column and what lies within its standard error. IQM: interquartile
mean over tasks and seeds, and the 95% interval of a stratified bootstrap (rliable), of agents that have all tasks; bold:
the best and what lies within its interval. For it, 0 is D4RL's random policy and 1 its expert or, where they score more,
the data's own episodes; clipped. †: the data stand in for those that the task is named after.
"""
TIME_RULES = """\
The score of the last evaluation that was done by then, the seconds of the quantizer's fit included and those of
evaluations not; empty where a seed had none. A run that was over keeps its last score.
"""


def write_page(name, runs, options):
    """All tables as one Markdown text."""
    origin = [f"{len(runs)} runs, {seeds_of(runs)}"]
    for what, values in ("commits", {run.commit[:10] for run in runs}), ("machines", {run.host for run in runs}):
        origin.append(f"{what} {', '.join(sorted(values))}")
    page = [f"# {name}", "", "; ".join(origin) + ".", "", RULES, *(f"- {note}" for note in notes_on_data(runs)), ""]
    page += ["## Mean of the last five evaluations", "", *make_table(runs, lambda run: run.score, options.reps), ""]
    page += ["## By time", "", TIME_RULES]
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
    if run.quantizer:
        return {"color": CODES.get(run.quantizer, "grey"), "linestyle": "-"}
    color, line = TWINS.get(run.agent, ("black", "--"))
    return {"color": color, "linestyle": line}


def panels(rows, titles, legend=0, height=1.45, **share):
    """A figure as wide as a README, and its axes: so many rows (R, C), a column for each title. legend: lines to leave
    room for below them."""
    figure = Figure(figsize=(9, 1.2 + height * rows + 0.16 * legend), layout="constrained", dpi=150)
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


def most_labels(runs, column):
    """How many lines the longest legend of a figure has; `column(run)` is the column that a run is shown in."""
    columns = [column(run) for run in {run.label: run for run in runs}.values()]
    return max(columns.count(name) for name in columns)


def name_lines(panel, runs):
    """The legend of a column, below its last panel and that panel's label."""
    handles = [Line2D([], [], label=label, **look(own[0])) for label, own in by_label(runs).items()]
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
    panel.set(xscale="log", xlim=(low, high))
    panel.set_xticks([seconds for seconds in ticks if low <= seconds <= high])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: ticks.get(round(seconds), "")))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("time of one core", fontsize=8)


def learning_curves(runs, over):
    """Figures of scores over "steps" or "seconds": a row a task, a column a family; as many as it takes."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    names = list(dict.fromkeys(family(run.agent) for run in sorted(runs, key=rank)))
    for top in range(0, len(tasks), PAGE[1]):
        for left in range(0, len(names), PAGE[0]):
            rows, columns = tasks[top : top + PAGE[1]], names[left : left + PAGE[0]]
            shown = [run for run in runs if run.task in rows and family(run.agent) in columns]
            if shown:
                yield curves_page(shown, rows, columns, over)


def curves_page(runs, tasks, names, over):
    rows, titles = most_labels(runs, lambda run: family(run.agent)), [name.upper() for name in names]
    figure, axes = panels(len(tasks), titles, rows, sharex=True, sharey="row")
    for i, task in enumerate(tasks):
        axes[i, 0].set_ylabel(f"{wrap_task(task)}\nscore", fontsize=7)
        for panel, name in zip(axes[i], names, strict=True):
            own = [run for run in runs if (run.task, family(run.agent)) == (task, name)]
            for group in by_label(own).values():
                steps, seconds, scores = align(group, "score")
                draw_band(panel, steps if over == "steps" else seconds, scores, **look(group[0]))
            for run in own[:1]:
                panel.axhline(run.data_score, color="grey", linewidth=0.8, zorder=0)
    for panel, name in zip(axes[-1], names, strict=True):
        label_steps(panel) if over == "steps" else label_seconds(panel, runs)
        name_lines(panel, [run for run in runs if family(run.agent) == name])
    later = "" if over == "steps" else " The fit of a quantizer comes first, so its agents begin later."
    caption(figure, runs, f"Mean score over seeds, band: ± standard error; grey: the data's own episodes.{later}")
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
    text = "Circles: over codes, diamonds: continuous; bars: 95% of stratified bootstrap samples. 0: D4RL's random"
    caption(figure, runs, f"{text} policy, 1: its expert, or the data's own episodes where they score more.")
    return figure


def profile_figures(runs, profiles, taus):
    """Figures of the share of runs above each score: a column a family, as many as it takes."""
    runs = [run for run in runs if run.label in profiles]
    names = list(dict.fromkeys(family(run.agent) for run in sorted(runs, key=rank)))
    for left in range(0, len(names), PAGE[0]):
        columns = names[left : left + PAGE[0]]
        rows = most_labels([run for run in runs if family(run.agent) in columns], lambda run: family(run.agent))
        figure, axes = panels(1, [name.upper() for name in columns], rows, height=2.0, sharex=True, sharey=True)
        for panel, name in zip(axes[0], columns, strict=True):
            own = [run for run in runs if family(run.agent) == name]
            for label, group in by_label(own).items():
                style, (shares, bounds) = look(group[0]), profiles[label]
                panel.plot(taus, shares, linewidth=1.4, **style)
                panel.fill_between(taus, *bounds, color=style["color"], alpha=0.18, linewidth=0)
            panel.set_xlabel("normalised score τ", fontsize=8)
            name_lines(panel, own)
        axes[0, 0].set_ylabel("share of runs above τ", fontsize=8)
        text = "Bands: 95% of stratified bootstrap samples. τ = 0: D4RL's random policy, 1: its expert, or the data's"
        caption(figure, runs, f"{text} own episodes where they score more.")
        yield figure


def exact_figures(runs, quantity, name, title):
    """Figures of what is exact over codes and estimated from samples over actions, in the course of training: a row a
    task, the agent over codes beside its twin."""
    runs = [run for run in runs if family(run.agent) == name and f"{quantity}_exact" in run.curves]
    tasks = list(dict.fromkeys(run.task for run in runs))
    for top in range(0, len(tasks), PAGE[1]):
        rows = tasks[top : top + PAGE[1]]
        shown = [run for run in runs if run.task in rows]
        agents = list(dict.fromkeys(run.agent for run in sorted(shown, key=rank)))
        lines = most_labels(shown, lambda run: run.agent)
        figure, axes = panels(len(rows), [f"{agent}: {title}" for agent in agents], lines, sharex=True)
        for i, task in enumerate(rows):
            axes[i, 0].set_ylabel(wrap_task(task), fontsize=7)
            for panel, agent in zip(axes[i], agents, strict=True):
                own = [run for run in shown if (run.task, run.agent) == (task, agent)]
                for group in by_label(own).values():
                    for series, line in (f"{quantity}_exact", "-"), (f"{quantity}_sampled", ":"):
                        if all(series in run.curves for run in group):
                            steps, _, values = align(group, series)
                            draw_band(panel, steps, values, **look(group[0]) | {"linestyle": line})
        for panel, agent in zip(axes[-1], agents, strict=True):
            label_steps(panel)
            name_lines(panel, [run for run in shown if run.agent == agent])
        text = (
            "Solid: exact; dotted: as samples estimate it. Mean over seeds, band: ± standard error. Sums over codes and"
        )
        caption(figure, shown, f"{text} integrals over actions have different zeros: compare gaps, not levels.")
        yield figure


# --- All of it ---


def draw(runs, reps):
    """(name, figure) of everything that these runs have."""
    for over in ("steps", "seconds"):
        yield over, learning_curves(runs, over)
    if matrices := normalised_scores(runs, lambda run: run.score):
        taus = np.linspace(0, 1, 101)
        yield "iqm", [interval_figure(runs, interquartile_means(matrices, reps))]
        yield "profiles", profile_figures(runs, performance_profiles(matrices, taus, reps), taus)
    for name, (quantity, of, title) in EXACT.items():
        yield name, exact_figures(runs, quantity, of, title)


def main():
    options = tyro.cli(Options, description=__doc__)
    if options.reps < 1 or not all(0 < minutes < math.inf for minutes in options.minutes):
        raise UserError("reps and minutes must be positive numbers.")
    load_rliable()
    runs = read(options.table)
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
