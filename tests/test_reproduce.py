"""benchmarks/reproduce.py: plans whose commands exist, and tables that no killed driver, worker or machine bends."""

import csv
import importlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, one_sentence, run_forked, run_script
from filelock import FileLock

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "baselines"))
import reproduce

from vqvae import UserError

SCRIPT = "benchmarks/reproduce.py"
TINY = "--compile off --eval-episodes 1 --final-episodes 1"


def plan(name, **options):
    given = dict(name=name, data=None, tasks=(), agents=(), quantizers=(), seeds=1, steps=None, paper=False, flags="")
    given |= dict(first_seed=0)
    return reproduce.make_jobs(SimpleNamespace(**given | options))


def test_table1_has_every_task_agent_and_seed():
    jobs = plan("table1", paper=True, seeds=3)
    rows = {row for job in jobs.values() for row in job.rows() if row[1] != "prior"}
    agents = ["brac", "iql", "cql", "bc"]
    tasks = {row[0] for row in rows}
    assert len(tasks) == 23  # of the paper's Table 5, whose 27 rows hold four averages
    assert {row[:2] + row[3:] for row in rows} >= set(
        itertools.product(tasks, agents + [f"saq_{agent}" for agent in agents], "012")
    )
    assert all(
        "--plain" in command and "--steps 1000000" in command for command in jobs if "--use-prior" not in command
    )


def test_papers_own_settings_where_plain_has_others():
    commands = list(plan("table5", paper=True))
    aquadem = [command for command in commands if "--quantizer aquadem" in command]
    assert aquadem
    assert all("--num-codes 10" in command for command in aquadem)
    iql = {command.split()[3]: f"{command} " for command in commands if "saq_iql.py" in command}
    assert {task for task, command in iql.items() if "--temperature 1 " in command} == set(reproduce.ADROIT)
    assert {task for task, command in iql.items() if "--temperature 0.1 " in command} == set(reproduce.ANTMAZE)


def test_a_quantizer_is_fitted_once_and_before_it_is_needed():
    jobs = list(plan("small", data=ROOT).values())
    fits = [job.command for job in jobs if "--use-prior" in job.command]
    assert len(fits) == len(set(fits)) == 6 * 3  # six tasks, three kinds
    for i, job in enumerate(jobs):
        assert job.fit is None or job.fit in [other.command for other in jobs[:i]]
        assert job.fit or "--use-prior" in job.command or job.quantizer == ""
    rows = [row for job in jobs for row in job.rows()]
    assert len(rows) == len(set(rows))  # nothing is measured twice
    assert {row[1] for row in rows} == {"prior", *itertools.chain(*reproduce.SCRIPTS.values())}


def test_a_fit_gets_those_flags_that_concern_it():
    flags = "--alpha -5  --precision bfloat16 --no-decay --average=0"
    fit, run = plan("small", tasks=(reproduce.MAZE,), agents=("saq_cql",), quantizers=("mixture",), flags=flags)
    assert fit.endswith(" --precision bfloat16")
    assert run.endswith(" --alpha -5 --precision bfloat16 --no-decay --average=0")
    fit, run = plan("small", tasks=(reproduce.MAZE,), agents=("saq_cql",), quantizers=("mixture",), flags="--alpha 5")
    assert fit in plan("small")  # shared with runs that have other flags, or none
    assert run not in plan("small")


def test_every_agent_of_a_task_gets_its_flags():
    for task, flags in reproduce.TASK_FLAGS.items():
        commands = plan("small", tasks=(task,))
        assert len(commands) > 10
        assert all(f" {flags} " in f"{command} " for command in commands)


@pytest.mark.parametrize(
    ("script", "field", "weights"),
    [("rebrac", "actor_beta", reproduce.REBRAC_BETAS), ("spot", "density_weight", reproduce.SPOT_WEIGHTS)],
)
def test_weights_of_a_million_steps_are_taken_ten_times(script, field, weights):
    flag, published = f"--{field.replace('_', '-')}", importlib.import_module(script).defaults
    assert weights.keys() == set(reproduce.SMALL[1:])
    for task, weight in weights.items():
        assert weight == pytest.approx(10 * getattr(published(task), field))
        agent = reproduce.SCRIPTS[f"baselines/{script}"][0]
        (command,) = (command for command in plan("small", tasks=(task,), agents=(agent,)) if script in command)
        assert f" {flag} {weight} " in f"{command} "
    assert not any("--actor-beta" in command for command in plan("ogbench", agents=("rebrac",)))


def test_what_learns_on_has_rows_of_its_own():
    trained = [list(job.agents.values()) for job in plan("online").values()]
    assert trained == 2 * [["prior"], ["saq_spot", "spot", "saq_online", "spot_online"]]


def test_choosing_agents_chooses_twins():
    everything = plan("small")
    for agent in ("cql", "saq_cql", "rebrac"):
        chosen = plan("small", agents=(agent,))
        assert chosen.items() <= everything.items()  # the same commands, so that they may stand in one table
        assert [c for c in everything if agent in everything[c].agents] == [
            c for c in chosen if agent in chosen[c].agents
        ]
    fits = plan("small", agents=("prior",)).values()
    assert {row[1] for job in fits for row in job.rows()} == {"prior"}
    assert len(fits) == 6 * 3  # six tasks, three kinds


@pytest.mark.parametrize("name", list(reproduce.PLANS))
def test_every_command_parses(name, monkeypatch, capsys):
    """By the parser of its script, checks of numbers included."""
    commands = [*plan(name, data=ROOT), *(plan(name, paper=True) if name.startswith("t") else [])]
    for command in commands[:: 1 + len(commands) // 40]:  # a sample of the long plans
        _, script, *words = shlex.split(command)
        module = importlib.import_module(script.removeprefix("baselines/").removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *words])
        args = module.parse_args()
        assert f"--env {args.env} " in command
    capsys.readouterr()


def test_dry_run():
    process = run_forked("table4", "--dry-run", "--paper", "--seeds", 1, script=SCRIPT)
    assert process.returncode == 0, process.stderr
    *lines, last = process.stdout.splitlines()
    assert len(lines) == 16
    assert all(" h  python saq_" in line for line in lines)
    assert last.startswith("16 runs, 16 results, ")
    assert "core-hours" in last


def test_hours_of_an_estimate(tmp_path, monkeypatch, capsys):
    """By hand, from steps a second; what has not been timed is named, what is there costs nothing."""
    rates = "saq_spot,10\nspot,20\nmixture fit,40\n"
    (tmp_path / "speed.csv").write_text(f"update,steps_per_second\n{rates}")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    jobs = plan("online", tasks=(reproduce.MAZE,))  # 10,000 steps offline, 20,000 online
    reproduce.estimate(jobs, set(jobs))
    fit, run, last = capsys.readouterr().out.splitlines()
    assert float(fit.split()[0]) == pytest.approx(10_000 / 40 / 3600, abs=0.005)
    assert float(run.split()[0]) == pytest.approx(30_000 / 10 / 3600 + 30_000 / 20 / 3600, abs=0.005)
    assert last == "2 runs, 5 results, 1.3 core-hours of updates; evaluations come on top. Not timed: density fit."
    reproduce.estimate(jobs, set(list(jobs)[1:]))
    fit, run, last = capsys.readouterr().out.splitlines()
    assert fit.split()[0] == "there"
    assert last.startswith("1 runs, 4 results, 1.2")


def test_everything_has_been_timed(capsys):
    """And docs/results.md says of the paper's Table 1 what --dry-run does."""
    for name in reproduce.PLANS:
        jobs = plan(name, paper=name == "table1", seeds=3)
        reproduce.estimate(jobs, set(jobs))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith("evaluations come on top.")
        if name == "table1":
            runs, _, hours = last.removesuffix(" of updates; evaluations come on top.").split(", ")
            assert f"# {runs}, {hours} on this CPU" in (ROOT / "docs" / "results.md").read_text()


def wait_for(condition, process, seconds=240):
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < start + seconds
        time.sleep(0.05)


def flags(folder, *more):
    words = ["small", "--seeds", 1, "--steps", 3, "--agents", "saq_cql", "rebrac", "--quantizers", "mixture"]
    words += [f"--flags={TINY}", "--table", folder / "t.csv", "--fits", folder / "fits"]
    return [*words, "--tasks", "maze2d-large-demos-v1", *more]


def rows(table):
    """What does not depend on the machine and the moment."""
    with open(table, newline="") as file:
        found = [dict(row) for row in csv.DictReader(file)]
    for row in found:
        row["curves"] = {key: value for key, value in reproduce.json.loads(row["curves"]).items() if key != "seconds"}
        for column in ("seconds", "fit_seconds", "host", "commit"):
            del row[column]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    pytest.importorskip("ray", reason="requirements-benchmarks.txt is not installed")
    folder = tmp_path_factory.mktemp("undisturbed")
    process = run_script(*flags(folder), script=SCRIPT)
    assert process.returncode == 0, process.stderr
    return folder


def test_what_a_table_holds(undisturbed):
    found = rows(undisturbed / "t.csv")
    assert [row["agent"] for row in found] == ["prior", "rebrac", "saq_cql", "td3_bc"]
    for row in found:
        assert (row["task"], row["seed"]) == ("maze2d-large-demos-v1", "0")
        assert row["quantizer"] == ("" if row["agent"] in ("rebrac", "td3_bc") else "mixture")
        assert row["command"].startswith("python ")
        scores = row["curves"]["score"]
        assert row["curves"]["step"] == ([1] if row["agent"] == "prior" else [1, 2, 3])
        assert float(row["score"]) == pytest.approx(sum(scores[-5:]) / len(scores[-5:]), rel=1e-4)
    assert len(list((undisturbed / "fits").glob("*.pt"))) == 1


def test_what_is_missing_is_run_again_and_nothing_else(undisturbed, tmp_path):
    """A row of one agent is lost, and the fit that its run needs: both come back."""
    shutil.copy(undisturbed / "t.csv", tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines(keepends=True)
    (tmp_path / "t.csv").write_text("".join(line for line in lines if ",saq_cql," not in line))
    again = run_script(*flags(tmp_path), script=SCRIPT)
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "t.csv") == rows(undisturbed / "t.csv")
    assert [line for line in lines if ",saq_cql," not in line] == [
        line for line in (tmp_path / "t.csv").read_text().splitlines(keepends=True) if ",saq_cql," not in line
    ]
    assert len(list((tmp_path / "fits").glob("*.pt"))) == 1
    before = (tmp_path / "t.csv").read_bytes()
    again = run_script(*flags(tmp_path), script=SCRIPT)
    assert (again.returncode, (tmp_path / "t.csv").read_bytes()) == (0, before)


def test_which_runs_are_missing(tmp_path):
    job = reproduce.Job("python x.py", "hopper", "mixture", 0, {"saq_bc": "saq_bc", "bc": "bc"})
    table = reproduce.Table(tmp_path / "t.csv")
    logged = {f"{agent}/{what}": ([1], [2.0]) for agent in job.agents for what in ("score", "seconds")}
    logged["quantizer/seconds"] = [1], [2.0]
    result = {"saq_bc": {"score": 7.0}, "bc": {"score": 8.0}, "data_score": 50.0, "provenance": "whence"}
    assert table.missing({job.command: job}) == {job.command}
    for _ in range(2):  # the second time in place of the first
        table.add(job, dict(logged=logged, host="here", result=result), None, "abc")
        assert [row["agent"] for row in table.rows] == ["bc", "saq_bc"]
    assert table.missing({job.command: job}) == set()
    table.rows = table.rows[1:]
    assert table.missing({job.command: job}) == {job.command}


def test_where_nothing_is_missing_ray_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # its import fails
    assert reproduce.run_all({}, reproduce.Table(tmp_path / "t.csv"), None) == {}


KILLED_ONCE = """
import json, os, pathlib, signal, sys
run = pathlib.Path(sys.argv[-1], "run")
run.mkdir(parents=True)
if not pathlib.Path("tried").exists():
    pathlib.Path("tried").touch()
    os.kill(os.getpid(), signal.SIGKILL)
(run / "metrics.csv").write_text("step,name,value\\n1,a/score,2.5\\n")
(run / "result.json").write_text("{}")
"""


def test_a_run_that_a_signal_ends_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(KILLED_ONCE)
    outcome = reproduce.execute("python x.py", None, None, 1, 0)
    assert (outcome["error"], outcome["logged"]) == (None, {"a/score": ([1], [2.5])})
    assert (tmp_path / "tried").exists()


SAYS_WHAT_IT_SEES = """
import os, pathlib, sys
run = pathlib.Path(sys.argv[-1], "run")
run.mkdir(parents=True)
(run / "metrics.csv").write_text("step,name,value\\n")
(run / "result.json").write_text('{"gpus": "' + os.environ.get("CUDA_VISIBLE_DEVICES", "all") + '"}')
"""


def test_a_run_without_a_share_of_a_gpu_sees_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Ray says it to a run that has one
    (tmp_path / "x.py").write_text(SAYS_WHAT_IT_SEES)
    for share, seen in (0, ""), (0.2, "3"):
        outcome = reproduce.execute("python x.py", None, None, 1, share)
        assert (outcome["error"], outcome["result"]) == (None, {"gpus": seen})
        assert outcome["host"] == reproduce.describe_machine()


def test_a_fit_that_differs_from_the_one_before_is_named(tmp_path):
    """A table's later runs may be over a quantizer that another machine has fitted than that of its earlier ones."""
    job = reproduce.Job("python x.py", "hopper", "mixture", 0, {"saq_bc": "prior"})
    table = reproduce.Table(tmp_path / "t.csv")
    outcome = dict(logged={}, host="here", result={"saq_bc": {"score": 7.0}, "data_score": 50.0, "provenance": "w"})
    outcome["logged"] = {f"saq_bc/{what}": ([1], [7.0]) for what in ("score", "seconds")}
    outcome["logged"]["quantizer/seconds"] = [1], [2.0]
    table.add(job, outcome, None, "abc")
    assert table.compare(job, outcome) is None
    outcome["result"]["saq_bc"]["score"] = 7.25
    assert table.compare(job, outcome).endswith("hopper prior mixture 0 scores 7.25, not 7")


class FakeRay:
    """What run_all needs of Ray, at once and in this process."""

    class Reference:
        def __init__(self, value):
            self.value = value

    put = Reference

    def __init__(self):
        self.init = self.shutdown = lambda *_, **__: None
        self.nodes = lambda: [{"Resources": {"CPU": 4, "GPU": 1}}]
        self.wait = lambda references: (references[:1], references[1:])

    def remote(self, function):
        self.function = function
        return SimpleNamespace(options=self.options)

    def options(self, **shares):
        self.shares = shares
        return SimpleNamespace(remote=lambda *words: self.Reference(self.function(*map(self.get, words))))

    def get(self, what):
        found = [self.get(one) for one in what] if isinstance(what, list) else what
        return found.value if isinstance(found, self.Reference) else found


def test_what_runs_are_told(tmp_path, monkeypatch, capsys):
    """Their share of a GPU, threads, data and fit; a quantizer that is fitted again and scores otherwise is named."""
    told, ray, score = {}, FakeRay(), 7.0

    def execute(command, fit, data, threads, gpus):
        told[command] = fit, data, threads, gpus
        agent = "saq_bc" if "--use-prior" in command else "saq_cql"
        logged = {name: ([1], [1.0]) for name in (f"{agent}/score", f"{agent}/seconds", "quantizer/seconds")}
        result = {agent: {"score": score}, "data_score": 50.0, "provenance": "whence"}
        return dict(error=None, host="here", logged=logged, result=result, checkpoint=b"abc" * (agent == "saq_bc"))

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(reproduce, "execute", execute)
    more = dict(tasks=(reproduce.MAZE,), agents=("saq_cql",), quantizers=("mixture",), seeds=1, data=tmp_path)
    options = reproduce.Options("small", **more, cpus_per_run=2.0, gpus_per_run=0.2, fits=tmp_path / "fits")
    jobs, table = reproduce.make_jobs(options), reproduce.Table(tmp_path / "t.csv")
    assert reproduce.run_all(jobs, table, options) == {}
    assert ray.shares == dict(num_cpus=2.0, num_gpus=0.2, max_retries=3)
    (fit, run), at = jobs, (str(tmp_path), 2, 0.2)
    assert told[fit] == (None, *at)
    assert told[run][0]["checkpoint"] == b"abc"
    assert told[run][1:] == at
    assert [row["agent"] for row in table.rows] == ["prior", "saq_cql"]
    assert "fitted again" not in capsys.readouterr().out
    table.rows, score = table.rows[:1], 7.25  # a run is lost, and the fit that it needs
    shutil.rmtree(tmp_path / "fits")
    assert reproduce.run_all(jobs, table, options) == {}
    assert f"fitted again on another machine or by other code: {reproduce.MAZE} prior" in capsys.readouterr().out
    assert [(row["agent"], row["final"]) for row in table.rows] == [("prior", "7"), ("saq_cql", "7.25")]


def test_what_a_row_says(tmp_path):
    job = reproduce.Job("python x.py", "hopper", "mixture", 0, {"saq_bc": "saq_bc", "bc": "bc"}, "fit")
    logged = {}
    for agent in job.agents:
        logged[f"{agent}/score"] = ([1, 2, 3, 4, 5, 6], [9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        logged[f"{agent}/seconds"] = ([1, 2, 3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    result = {"saq_bc": {"score": 7.0}, "bc": {"score": 8.0}, "data_score": 50.0, "provenance": "whence"}
    outcome = dict(logged=logged, host="here", result=result)
    fit = {"logged": {"quantizer/seconds": ([9], [45.0])}}
    found = reproduce.Table(tmp_path / "t.csv").add(job, outcome, fit, "abc")
    columns = ["agent", "quantizer", "score", "final", "seconds", "fit_seconds", "data_score", "provenance", "host"]
    assert [[row[column] for column in columns] for row in found] == [
        ["saq_bc", "mixture", "3", "7", "6", "45", "50", "whence", "here"],
        ["bc", "", "3", "8", "6", "", "50", "whence", "here"],
    ]


def test_one_table_has_one_budget(tmp_path):
    """Runs of another length are refused beside those that a table has, even of agents that it does not have."""
    rows = {agent: list(plan("small", tasks=(reproduce.MAZE,), agents=(agent,)).values()) for agent in ("iql", "cql")}
    short = list(plan("small", tasks=(reproduce.MAZE,), agents=("cql",), steps=100).values())
    table = reproduce.Table(tmp_path / "t.csv")
    for job in rows["iql"]:
        table.rows += [dict(zip(reproduce.COLUMNS, key, strict=False), command=job.command) for key in job.rows()]
    table.check(rows["cql"])
    table.check(plan("small", tasks=(reproduce.MAZE,), agents=("rebrac",)).values())  # which fits no quantizer
    longer = plan("small", tasks=(reproduce.MAZE,), agents=("cql",), steps=10_009)  # as often evaluated
    with pytest.raises(UserError, match="is of other commands"):
        table.check([job for job in longer.values() if "cql" in job.agents])
    with pytest.raises(UserError, match="is of other commands"):
        table.check([job for job in short if "cql" in job.agents])


def test_seeds_begin_where_one_says():
    ours, theirs = plan("figure2", seeds=2, first_seed=3), plan("figure2", seeds=5)
    assert {job.seed for job in ours.values()} == {3, 4}
    assert ours.items() <= theirs.items()


def test_an_online_agent_goes_on_where_another_ended(tmp_path):
    """Its seconds begin with those of the offline one; SPOT's density model, fitted before, is in `fit_seconds`."""
    (job,) = (job for job in plan("online", tasks=(reproduce.MAZE,)).values() if "spot" in job.agents)
    logged = {"density/seconds": ([5, 9], [30.0, 60.0])}
    for agent, seconds in ("saq_spot", 10.0), ("spot", 20.0), ("saq_online", 3.0), ("spot_online", 4.0):
        logged |= {f"{agent}/score": ([1, 2], [1.0, 2.0]), f"{agent}/seconds": ([1, 2], [seconds / 2, seconds])}
    result = {agent: {"score": 7.0} for agent in job.agents} | {"data_score": 50.0, "provenance": "whence"}
    outcome = dict(logged=logged, host="here", result=result | {"online": {"spot_online": {"regret": 0.5}}})
    rows = reproduce.Table(tmp_path / "t.csv").add(job, outcome, {"logged": {"quantizer/seconds": ([9], [45.0])}}, "c")
    found = {row["agent"]: (row["seconds"], row["fit_seconds"]) for row in rows}
    assert found == {
        "saq_spot": ("10", "45"),
        "spot": ("20", "60"),
        "saq_online": ("13", "45"),
        "spot_online": ("24", "60"),
    }
    assert reproduce.json.loads(rows[-1]["curves"])["seconds"] == [22, 24]
    assert [row["online"] for row in rows] == ["{}", "{}", "{}", '{"regret": 0.5}']


def test_a_fit_is_of_its_data(tmp_path):
    """The same command over another folder, or another file of that name, finds nothing."""
    command = "python saq_bc.py --use-prior --dataset-path x.hdf5"
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.hdf5").write_text("1")
    fits = [reproduce.Fits(tmp_path / "fits", str(folder)) for folder in folders]
    fits[0].save(command, {"checkpoint": b"abc", "error": None})
    assert fits[0].load(command)["checkpoint"] == b"abc"
    assert fits[1].load(command) is None
    (folders[0] / "x.hdf5").write_text("12")
    assert fits[0].load(command) is None
    maze = "python saq_bc.py --use-prior --env maze"
    reproduce.Fits(tmp_path / "fits", None).save(maze, {"checkpoint": b"abc", "error": None})
    assert reproduce.Fits(tmp_path / "fits", None).load(maze)["checkpoint"] == b"abc"


def test_a_run_that_signals_end_again_and_again_is_named(tmp_path, monkeypatch):
    """Not by the last thing that it said, which is its bar."""
    monkeypatch.chdir(tmp_path)
    kill = "import os, signal, sys; sys.stderr.write('saq_cql: 45%'); os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "x.py").write_text(kill)
    assert "ended three times by SIGKILL" in reproduce.execute("python x.py", None, None, 1, 0)["error"]


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b"task,agent\n", b"HEAD\nhopper,cql\n"])
def test_what_is_no_table(content, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content.replace(b"HEAD", ",".join(reproduce.COLUMNS).encode()))
    with pytest.raises(UserError, match="is no table of this program"):
        reproduce.Table(path)


def test_a_table_of_long_curves_is_read(tmp_path):
    """Of more characters than Python's csv expects in a field."""
    line = ",".join(["x"] * (len(reproduce.COLUMNS) - 1) + ["9" * 200_000])
    (tmp_path / "t.csv").write_text(",".join(reproduce.COLUMNS) + f"\n{line}\n")
    assert len(reproduce.Table(tmp_path / "t.csv").rows[0]["online"]) == 200_000


def test_which_table_a_result_goes_to(tmp_path):
    """What is tried does not get among the results that ship here."""
    options = reproduce.Options("small")
    assert reproduce.default_table(options).name == "small.csv"
    assert reproduce.default_table(reproduce.Options("small", steps=200)).name == "small-200-steps.csv"
    assert reproduce.default_table(reproduce.Options("table1", paper=True)).name == "table1-paper.csv"
    assert reproduce.default_table(reproduce.Options("small", first_seed=3)).name == "small-from-seed-3.csv"
    with pytest.raises(UserError, match="with --flags, pass a --table"):
        reproduce.check(reproduce.Options("small", flags="--lr 1"))
    reproduce.check(reproduce.Options("small", flags="--act sample", table=tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("flags", "name"),
    [("--seed 7", "seed"), ("--lr 1 --dataset-path x.hdf5", "dataset-path"), ("--env=none", "env")]
    + [("--dataset_path=x", "dataset-path"), ("--no-compare", "no-compare"), ("--use-prior", "use-prior")]
    + [("--quantizer aquadem", "quantizer"), ("--num_codes=8", "num-codes")],  # the plan has it as a variant
)
def test_flags_that_are_not_for_the_user(flags, name, tmp_path):
    with pytest.raises(UserError, match=f"--flags must leave --{name} to this program"):
        reproduce.check(reproduce.Options("table4", flags=flags, table=tmp_path / "t.csv"))


def test_steps_in_flags_are_numbers(tmp_path):
    with pytest.raises(UserError, match="--vq-steps must be followed by a whole number"):
        reproduce.check(reproduce.Options("table4", flags="--lr 16 --vq_steps=many", table=tmp_path / "t.csv"))
    reproduce.check(reproduce.Options("table4", flags="--lr 16 --vq-steps 1_000", table=tmp_path / "t.csv"))


def test_budget_in_flags_counts_however_it_is_written():
    for flags in ("--steps=200 --vq_steps 7", "--steps 200 --vq-steps=7"):
        fit, run = plan("small", tasks=(reproduce.MAZE,), agents=("saq_cql",), quantizers=("mixture",), flags=flags)
        assert reproduce.budget_of(run) == {"--steps": "200", "--vq-steps": "7", "--eval-every": "1000"}
        assert reproduce.budget_of(fit) == {"--vq-steps": "7", "--eval-every": "1000"}


def test_the_commit_is_of_the_code_not_of_results(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert reproduce.describe_commit() == ""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/small.csv"):
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "1")
    clean = reproduce.describe_commit()
    assert len(clean) >= 7
    (tmp_path / "benchmarks" / "results" / "small.csv").write_text("2")
    assert reproduce.describe_commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert reproduce.describe_commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert reproduce.describe_commit() == ""  # no git


def test_a_table_of_other_commands_is_refused(undisturbed, tmp_path):
    line = one_sentence(run_forked(*flags(undisturbed, "--steps", 7), script=SCRIPT))
    assert "is of other commands: pass another --table" in line
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert "is no table of this program" in one_sentence(run_forked(*flags(tmp_path), script=SCRIPT))


def test_two_drivers_do_not_write_one_table(tmp_path):
    with FileLock(tmp_path / "t.csv.lock"):
        assert "another process is writing" in one_sentence(run_forked(*flags(tmp_path), script=SCRIPT))


def test_what_there_is_not(tmp_path):
    line = one_sentence(run_forked("small", "--tasks", "door-human-v0", "hopper-exprt", script=SCRIPT))
    assert "small has no 'hopper-exprt' among its tasks: door-human-v0, " in line
    line = one_sentence(run_forked("small", "--quantizers", "mixture", "--agents", "cql", script=SCRIPT))
    assert "no run of small has such a task, agent and quantizer together" in line
    assert "seeds must be a number between 1 and" in one_sentence(run_forked("table4", "--seeds", 0, script=SCRIPT))


def test_machines_that_are_not_there(tmp_path):
    pytest.importorskip("ray", reason="requirements-benchmarks.txt is not installed")
    line = one_sentence(run_script(*flags(tmp_path, "--cpus-per-run", 1000), script=SCRIPT))
    assert "no machine has the 1000 CPU that a run asks for" in line
    assert "error: " in one_sentence(run_forked(*flags(tmp_path, "--address", "nowhere"), script=SCRIPT))


def test_a_driver_and_a_worker_are_killed(undisturbed, tmp_path):
    """The driver after its first result; then, when it goes on, a worker in its run."""
    pytest.importorskip("ray", reason="requirements-benchmarks.txt is not installed")
    command = [sys.executable, SCRIPT, *map(str, flags(tmp_path))]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver = subprocess.Popen(command, **options)
    wait_for((tmp_path / "t.csv").exists, driver)
    driver.kill()
    driver.communicate()
    done = len(rows(tmp_path / "t.csv"))
    assert done < len(rows(undisturbed / "t.csv"))
    driver = subprocess.Popen(command, **options)
    wait_for(lambda: children_in_runs(driver.pid), driver)
    _, worker = children_in_runs(driver.pid)[0]
    os.kill(worker, signal.SIGKILL)
    out, error = driver.communicate(timeout=300)
    assert driver.returncode == 0, error
    assert rows(tmp_path / "t.csv") == rows(undisturbed / "t.csv")


def children_in_runs(driver):
    """(pid, parent) of the processes under `driver` that run a script of ours."""
    processes = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    parents = {int(line.split()[0]): int(line.split()[1]) for line in processes}

    def under(pid):
        return pid == driver or (pid in parents and under(parents[pid]))

    found = [line.split(None, 2) for line in processes if " --env " in line and "reproduce.py" not in line]
    return [(int(pid), int(parent)) for pid, parent, _ in found if under(int(pid))]


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    """Where there is no file for the hopper, the maze is run all the same."""
    pytest.importorskip("ray", reason="requirements-benchmarks.txt is not installed")
    words = ["small", "--seeds", 1, "--steps", 3, "--agents", "rebrac", f"--flags={TINY}", "--data", tmp_path / "none"]
    words += ["--tasks", "maze2d-large-demos-v1", "hopper-medium-v2", "--table", tmp_path / "t.csv"]
    process = run_script(*words, script=SCRIPT)
    assert process.returncode == 1, process.stderr
    assert "failed: python baselines/rebrac.py --env hopper-medium-v2" in process.stderr
    assert "hopper_medium-d4rlsim.hdf5" in process.stderr.rstrip().splitlines()[-1]
    assert {row["task"] for row in rows(tmp_path / "t.csv")} == {"maze2d-large-demos-v1"}


def test_two_machines_share_the_runs_and_one_dies(undisturbed, tmp_path):
    """Two Ray nodes on this machine; the second is killed when both work."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="requirements-benchmarks.txt is not installed")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        other = cluster.add_node(num_cpus=1)
        command = [sys.executable, SCRIPT, *map(str, flags(tmp_path, "--address", cluster.address))]
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(children_in_runs(os.getpid())) == 2, driver)
        cluster.remove_node(other, allow_graceful=False)
        out, error = driver.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, error
    assert rows(tmp_path / "t.csv") == rows(undisturbed / "t.csv")
