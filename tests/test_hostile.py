"""What people, disks, schedulers and other people's environments do to a run: nothing is lost, and words are said."""

import collections
import dataclasses
import errno
import importlib
import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import (
    ROOT,
    assert_same_run,
    checkpoint,
    dataset,
    metrics,
    one_sentence,
    only_run,
    run_forked,
    succeeded,
    write,
)
from forked import Forked

import saq_cql
import vqvae
from vqvae import ActionVQVAE, UserError, check_numbers, load_arrays, make_env, make_transitions, write_file

SHORT = ["--vq-steps", 6, "--steps", 6, "--eval-every", 3, "--log-every", 2, "--eval-episodes", 1]
SHORT += ["--final-episodes", 2, "--num-codes", 2, "--batch-size", 16]
SCRIPTS = ["saq_cql", "saq_iql", "saq_brac", "saq_bc"]
SCRIPTS += [f"baselines.{name}" for name in ("rebrac", "fql", "awac", "bear", "spot")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "tiny.npz", dataset(n=60, episode=5))


@pytest.fixture(scope="module")
def tiny(data):
    """The flags of a run of a second."""
    return ["--env", "tiny_envs:Tiny-v0", "--dataset-path", data, *SHORT]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny):
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight")
    succeeded(run_forked(*tiny, "--out", out))
    return only_run(out)


@pytest.fixture
def run(straight, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(straight, tmp_path / "run")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def wait_for(process, condition):
    while not condition():
        assert process.process.is_alive(), process.stdout + process.stderr
        time.sleep(0.005)


# --- Files that are whole, or not there ---


def test_a_full_disk_leaves_every_file_of_a_finished_run(run):
    """No file may grow past 5 kB, as on a disk that is full: figures and results are those from before."""
    before = files(run)
    line = one_sentence(run_forked("--resume", run, limits={resource.RLIMIT_FSIZE: 5_000}))
    assert "File too large" in line
    assert json.loads((run / "args.json").read_text())["args"]["resume"] == str(run)  # small enough to be written
    assert {**files(run), "args.json": None} == {**before, "args.json": None}


def test_a_figure_that_breaks_off_leaves_the_old_one(tmp_path):
    path = tmp_path / "comparison.png"
    write_file(path, lambda file: file.write(b"the old one"))

    def draw(file):
        file.write(b"half of a ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, draw)
    assert files(tmp_path) == {"comparison.png": b"the old one"}


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut leaves an empty one."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_file(tmp_path / "checkpoint.pt", "text")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("step,na")])
def test_a_lost_log_comes_back_from_the_checkpoint(run, straight, damage):
    damage(run / "metrics.csv")
    succeeded(run_forked("--resume", run))
    assert_same_run(run, straight)


@pytest.mark.parametrize("line", ["12,saq_cql/score,", "12,saq_cql/sc"])
def test_half_a_line_in_the_log_does_not_stop_an_evaluation(run, line):
    with open(run / "metrics.csv", "a") as file:
        file.write(line)
    succeeded(run_forked("--eval-only", run))


@pytest.mark.parametrize("args", ["", '{"args": {"steps": "abc", "env": 5, "device": "tpu"}}', "[1"])
def test_args_json_is_for_readers_only(run, straight, args):
    (run / "args.json").write_text(args)
    succeeded(run_forked("--resume", run))
    assert_same_run(run, straight)
    assert json.loads((run / "args.json").read_text())["args"]["steps"] == 6


def nan_weights(state):
    state["parts"]["saq_cql"]["qf.0.weight"][0, 0] = math.nan


FOREIGN = {
    "no log": lambda state: state.pop("log"),
    "no phases": lambda state: state.pop("done"),
    "phases of another type": lambda state: state.update(done=3),
    "arguments of another type": lambda state: state.update(args=[]),
    "unknown arguments": lambda state: state["args"].update(colour="red"),
    "no parts": lambda state: state.update(parts={}),
    "NaN weights": nan_weights,
    "NaN moments": lambda state: state["parts"]["cql.qf_optimizer"]["state"][0]["exp_avg"].fill_(math.nan),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_that_is_another_one(run, what):
    state = checkpoint(run)
    FOREIGN[what](state)
    torch.save(state, run / "checkpoint.pt")
    for command in (["--resume", run], ["--eval-only", run, "--act", "sample"]):
        assert "checkpoint.pt cannot be used" in one_sentence(run_forked(*command))


def test_flipped_bytes_in_a_checkpoint_are_found(run):
    content = bytearray((run / "checkpoint.pt").read_bytes())
    middle = len(content) // 2  # in a tensor
    content[middle : middle + 400] = bytes(byte ^ 1 for byte in content[middle : middle + 400])
    (run / "checkpoint.pt").write_bytes(content)
    assert "is damaged" in one_sentence(run_forked("--resume", run))


def test_numbers_that_are_not_finite_do_not_reach_a_checkpoint(tmp_path):
    """Training may diverge between two log entries, and a signal come then: what was written before stays."""
    path, net = tmp_path / "checkpoint.pt", torch.nn.Linear(2, 1)
    net.optimizer = vqvae.adamw(net.parameters(), 1e-3)
    vqvae.minimize(net(torch.ones(1, 2)).sum(), {}, net.optimizer)
    vqvae.write_checkpoint(path, {}, {"net": net})
    before = path.read_bytes()
    for tensor in (net.weight, net.optimizer.state[net.bias]["exp_avg_sq"]):
        kept = tensor.detach().clone()
        tensor.detach().fill_(math.inf)
        with pytest.raises(UserError, match=r"net(\.optimizer)? holds numbers that are not finite: .* is from before"):
            vqvae.write_checkpoint(path, {}, {"net": net})
        tensor.detach().copy_(kept)
    assert path.read_bytes() == before
    vqvae.write_checkpoint(path, {}, {"net": net})


# --- Going on ---


def test_more_steps_are_what_a_longer_run_had_been(tiny, tmp_path):
    """With the twin: each phase goes on with its own random numbers. Learning rates that fall would end elsewhere."""
    longer = [*tiny, "--no-decay", "--steps", 12]
    succeeded(run_forked(*tiny, "--no-decay", "--out", tmp_path / "a"))
    succeeded(run_forked(*longer, "--out", tmp_path / "b"))
    folder, whole = only_run(tmp_path / "a"), only_run(tmp_path / "b")
    succeeded(run_forked("--resume", folder, "--steps", 12))
    assert checkpoint(folder)["done"] == {"quantizer": 6, "saq_cql": 12, "cql": 12}
    rows = [sorted(metrics(path)) for path in (folder, whole)]
    assert rows[0] == rows[1]
    for path in (folder, whole):  # the order in which phases were logged is another one
        state = checkpoint(path)
        torch.save(state | {"log": sorted(state["log"])}, path / "checkpoint.pt")
        (path / "metrics.csv").unlink()
    assert_same_run(folder, whole)


def test_fewer_steps_than_there_were_are_refused(straight):
    before = files(straight)
    line = one_sentence(run_forked("--resume", straight, "--steps", 4))
    assert "steps must be a number between 6 and" in line
    assert files(straight) == before


def test_a_run_that_can_be_seen_can_be_resumed(tiny, tmp_path, straight):
    """Killed as soon as its folder has a name, long before the first evaluation."""
    process = Forked(*tiny, "--out", tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("tiny*")))
    process.kill()
    succeeded(run_forked("--resume", only_run(tmp_path)))
    assert_same_run(only_run(tmp_path), straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_log_entries(tiny, tmp_path, straight, number):
    """It ends the step, saves, and says how to go on; the log then has no row that an undisturbed run would not."""
    process = run_forked(*tiny, "--out", tmp_path, before=("signal_in_update", number, 7))
    folder = only_run(tmp_path)
    assert process.returncode == 130
    assert f"stopped in step 1 of saq_cql; go on with: python {ROOT}/saq_cql.py --resume {folder}" in process.stdout
    assert checkpoint(folder)["done"] == {"quantizer": 6, "saq_cql": 1}
    succeeded(run_forked("--resume", folder))
    assert_same_run(folder, straight)


@pytest.mark.parametrize(("step", "when"), [(7, "an evaluation"), (21, "the final evaluation")])
def test_ctrl_c_in_an_evaluation_stops_at_once(tiny, tmp_path, straight, step, when):
    process = run_forked(*tiny, "--out", tmp_path, env={"TINY": "SIGINT", "TINY_AT": str(step)})
    assert process.returncode == 130
    assert f"stopped; go on with: python {ROOT}/saq_cql.py --resume {only_run(tmp_path)}" in process.stdout
    succeeded(run_forked("--resume", only_run(tmp_path)))
    assert_same_run(only_run(tmp_path), straight)


def test_a_run_goes_on_where_its_data_have_moved(run, straight, data, tmp_path):
    state = checkpoint(run)
    state["args"] |= {"dataset_path": "gone.npz"}
    torch.save(state, run / "checkpoint.pt")
    moved = shutil.copy(data, tmp_path / "moved.npz")
    succeeded(run_forked("--resume", run, "--dataset-path", moved))
    assert_same_run(run, straight)
    other = write(tmp_path / "other.npz", dataset(n=60, episode=5, seed=1))
    paid = write(tmp_path / "paid.npz", {**np.load(data), "rewards": np.zeros(60)})  # the same but for the rewards
    for file in (other, paid):
        assert "has begun on other data than these" in one_sentence(run_forked("--resume", run, "--dataset-path", file))


def test_a_run_goes_on_another_device(tiny, tmp_path):
    """What was stopped on a GPU, whose random numbers are of no use here, goes on with others."""
    run_forked(*tiny, "--out", tmp_path, before=("signal_in_update", signal.SIGTERM, 9))
    folder = only_run(tmp_path)
    state = checkpoint(folder)
    assert state["done"] == {"quantizer": 6, "saq_cql": 3}
    state["args"] |= {"device": "cuda"}
    state["rng"] = {stream.replace("cpu", "cuda"): numbers for stream, numbers in state["rng"].items()}
    torch.save(state, folder / "checkpoint.pt")
    succeeded(run_forked("--resume", folder, "--device", "cpu"))
    state = checkpoint(folder)
    assert state["done"] == {"quantizer": 6, "saq_cql": 6, "cql": 6}
    assert {"saq_cql on cuda", "saq_cql on cpu"} <= state["rng"].keys()


def test_six_runs_at_once(tiny, tmp_path):
    processes = [Forked(*tiny, "--no-compare", "--out", tmp_path) for _ in range(6)]
    for process in processes:
        succeeded(process.wait())
    assert len(list(tmp_path.iterdir())) == 6


def test_two_processes_in_one_folder(run):
    """The second one is told; the first one goes on."""
    first = Forked("--resume", run, "--steps", 100_000, "--compile", "off")
    wait_for(first, lambda: "run: " in first.stdout)
    assert "another process is training in" in one_sentence(run_forked("--resume", run))
    first.send_signal(signal.SIGTERM)
    first.wait()
    assert first.returncode == 130
    succeeded(run_forked("--eval-only", run))


def test_evaluating_leaves_a_published_run_alone(run):
    """Not a file is made or opened for writing: its folder may be read-only."""
    for name in ("metrics.csv", "args.json", ".lock"):
        (run / name).unlink(missing_ok=True)
    before, times = files(run), {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    run.chmod(0o500)
    succeeded(run_forked("--eval-only", run))
    run.chmod(0o700)
    assert files(run) == before
    assert {file.name: file.stat().st_mtime_ns for file in run.iterdir()} == times


@pytest.mark.parametrize("flag", ["--resume", "--eval-only", "--dataset-path"])
def test_an_empty_name_is_a_mistake(tiny, tmp_path, flag):
    """As of a shell variable that is not set: no new run begins."""
    one_sentence(run_forked("--out", tmp_path / "runs", *SHORT, flag, ""))
    assert not (tmp_path / "runs").exists()


# --- Numbers ---


@pytest.mark.parametrize("name", ["num_codes", "batch_size", "cql_samples"])
def test_more_than_memory_holds(tiny, tmp_path, name):
    flag = f"--{name.replace('_', '-')}"
    line = one_sentence(run_forked(*tiny, "--out", tmp_path / "runs", flag, 10**12))
    assert f"{name} must be a number between 1 and 1e+09, not 1000000000000" in line
    memory = {resource.RLIMIT_AS: 4 << 30}
    line = one_sentence(run_forked(*tiny, "--out", tmp_path / "runs", flag, 900_000_000, limits=memory))
    assert line.endswith("Fewer codes, smaller batches or fewer samples take less memory.")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e38"])
@pytest.mark.parametrize("name", ["lr", "alpha", "weight_decay", "reward_scale", "reward_shift"])
def test_numbers_that_are_none(name, value):
    if (name, value) == ("reward_shift", "1e38"):
        pytest.skip("a shift may be any number")
    with pytest.raises(UserError, match=f"{name} must be a number between"):
        check_numbers(vars(saq_cql.Args()) | {name: float(value)})


@pytest.mark.parametrize("name", ["steps", "reward_shift"])
def test_a_number_of_any_length_is_shown(name):
    with pytest.raises(UserError, match=f"{name} must be a number between .*, not 10{'0' * 399}"):
        check_numbers({name: 10**400}, reward_shift=(-1, 1))
    with pytest.raises(UserError, match="steps must be a number between 1 and 1e\\+09, not 1000000001"):
        check_numbers({"steps": 10**9 + 1})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_limits(script):
    """But for a shift of rewards, which may be any number."""
    known = {name for names in vqvae.LIMITS for name in names.split()}
    kinds = {field.name: field.type for field in dataclasses.fields(importlib.import_module(script).Args)}
    assert {name for name, kind in kinds.items() if kind in (int, float, float | None)} - known == {"reward_shift"}


def test_numbers_are_refused_before_anything_is_made(tmp_path):
    for script in ("saq_iql.py", "saq_brac.py"):
        line = one_sentence(run_forked("--beta", "inf", "--out", tmp_path / "runs", script=script))
        assert "beta must be a number between" in line
    assert not (tmp_path / "runs").exists()


# --- Environments ---


def test_an_environment_that_breaks_costs_no_training(tiny, tmp_path, straight):
    """Its error comes after the checkpoint, and --resume begins with the evaluation that it broke."""
    process = run_forked(*tiny, "--out", tmp_path, env={"TINY": "raise", "TINY_AT": "8"})
    assert process.returncode != 0
    assert "the robot" in process.stderr
    folder = only_run(tmp_path)
    assert checkpoint(folder)["done"] == {"quantizer": 6, "saq_cql": 6}
    succeeded(run_forked("--resume", folder))
    assert_same_run(folder, straight)


@pytest.mark.parametrize(("value", "at"), [("nan", 1), ("inf", 1), ("nan", 26), ("inf", 26)])
def test_rewards_that_are_no_numbers(tiny, tmp_path, value, at):
    """In an evaluation, and in the final one alone: one sentence, and no result that is none."""
    line = one_sentence(run_forked(*tiny, "--out", tmp_path, env={"TINY": value, "TINY_AT": str(at)}))
    assert value in line
    assert not (only_run(tmp_path) / "result.json").exists()


def test_an_environment_without_a_time_limit_is_announced(data, capsys):
    assert make_env("tiny_envs:Endless-v0").spec.max_episode_steps is None
    assert "warning: tiny_envs:Endless-v0 has no time limit" in capsys.readouterr().out
    make_env("tiny_envs:Tiny-v0")
    assert capsys.readouterr().out == ""


def test_actions_of_unsigned_numbers_are_refused(data, tmp_path):
    command = ["--env", "tiny_envs:Bytes-v0", "--dataset-path", data, "--out", tmp_path / "runs", *SHORT]
    assert "must have flat Box spaces of signed numbers" in one_sentence(run_forked(*command))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["saq_cql", "saq_bc"])
def test_a_sampled_episode_is_the_same_however_many_run_beside_it(script):
    """SAQ's codes and the Gaussian's actions, over 1, 3, 7, 10 and 14 episodes."""
    module = __import__(script)
    args = module.Args(act="sample", num_codes=4)
    vqvae = ActionVQVAE(3, 1, 4)
    agents = module.make_agents(3, 1, vqvae, args)
    spec = gym.make("tiny_envs:Tiny-v0").spec
    for agent in (agents[script], *(agent for name, agent in agents.items() if name == "gaussian_bc")):
        scores = [module.evaluate(agent, vqvae, module.make_eval_envs(spec, n), n) for n in (14, 1, 3, 7, 10)]
        assert len(set(scores[0])) == 14
        for fewer in scores[1:]:
            assert fewer.tolist() == scores[0][: len(fewer)].tolist()


def test_printed_scores_do_not_depend_on_how_many_trained(tiny, tmp_path):
    """A run that evaluated one episode at a time, evaluated again: the very lines that it printed."""
    process = succeeded(run_forked(*tiny, "--out", tmp_path, "--act", "sample"))
    again = succeeded(run_forked("--eval-only", only_run(tmp_path), "--eval-episodes", 2))
    tables = [rows_of(process), rows_of(again)]
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]


def rows_of(process):
    return [line for line in process.stdout.splitlines() if line.startswith(("saq_cql  ", "cql  "))]


# --- Datasets ---


def test_columns_that_were_never_written(tmp_path):
    """HDF5 would show zeros."""
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for key, array in dataset().items():
            file.create_dataset(key, array.shape, array.dtype)
    with pytest.raises(UserError, match="d.hdf5 cannot be read: its .* were never written"):
        load_arrays(str(tmp_path / "d.hdf5"), None)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("name", ["none", "kitchen-mixed-v0"])
def test_one_column_that_was_never_written(tmp_path, key, name):
    arrays = dataset(obs_dim=60, action_dim=9)
    arrays["next_observations"] = arrays["observations"]
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for other, array in arrays.items():
            file.create_dataset(other, array.shape, array.dtype, None if other == key else array)
    with pytest.raises(UserError, match=f"d.hdf5 cannot be read: its {key} were never written"):
        load_arrays(str(tmp_path / "d.hdf5"), make_env(name))


def test_virtual_columns_whose_source_is_gone(tmp_path):
    write(tmp_path / "source.hdf5", dataset())
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for key, array in dataset().items():
            layout = h5py.VirtualLayout(array.shape, array.dtype)
            layout[:] = h5py.VirtualSource("source.hdf5", key, array.shape)
            file.create_virtual_dataset(key, layout)
    arrays = load_arrays(str(tmp_path / "d.hdf5"), None)
    np.testing.assert_array_equal(arrays["observations"], dataset()["observations"])
    (tmp_path / "source.hdf5").unlink()
    with pytest.raises(UserError, match="in another file that is gone"):
        load_arrays(str(tmp_path / "d.hdf5"), None)


@pytest.mark.parametrize(("env", "name"), [("none", "d.npz"), ("none", "d.hdf5"), ("hopper-expert-v2", "d.hdf5")])
def test_a_pipe_is_no_dataset(tmp_path, env, name):
    """Opening it would wait for ever for somebody to write."""
    os.mkfifo(tmp_path / name)
    command = ["--env", env, "--dataset-path", tmp_path / name]
    assert "it is no file" in one_sentence(Forked(*command).wait(timeout=60))


def test_a_suffix_in_capitals(tmp_path):
    arrays = load_arrays(write(tmp_path / "D.NPZ", dataset()), None)
    np.testing.assert_array_equal(arrays["actions"], dataset()["actions"])


def test_rewards_of_several_columns_are_refused():
    arrays = dataset()
    arrays["rewards"] = arrays["rewards"][:, None].repeat(3, 1)
    with pytest.raises(UserError, match=r"rewards have shape \(400, 3\)"):
        make_transitions(arrays, None, torch.device("cpu"))


def test_rewards_and_flags_may_be_columns():
    arrays = dataset()
    columns = arrays | {key: arrays[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    (flat, returns), (data, same) = (make_transitions(a, None, torch.device("cpu")) for a in (arrays, columns))
    assert all(torch.equal(one, other) for one, other in zip(flat, data, strict=True))
    np.testing.assert_array_equal(returns, same)


def test_an_environment_of_ones_own():
    """Made by its class, it has no spec; and not every one has vectors of actions."""
    make_transitions(dataset(), tiny_envs.Tiny(), torch.device("cpu"))
    for name, space in [("Discrete", gym.spaces.Discrete(3)), ("Box", gym.spaces.Box(-1, 1, (2, 2)))]:
        env = tiny_envs.Tiny()
        env.action_space = space
        with pytest.raises(UserError, match=f"actions have size 1, the environment's are a {name} of shape"):
            make_transitions(dataset(), env, torch.device("cpu"))


def test_rows_of_different_lengths_and_numbers_beyond_float32(recwarn):
    arrays = dataset()
    with pytest.raises(UserError, match="actions are not numbers, or not as many in each row"):
        make_transitions(arrays | {"actions": [[0.0], [0.0, 1.0]] * 200}, None, torch.device("cpu"))
    with pytest.raises(UserError, match="rewards hold NaN, infinity or numbers beyond 1e10 in 400 rows"):
        make_transitions(arrays | {"rewards": np.full(400, 1e300)}, None, torch.device("cpu"))
    assert not recwarn.list


# --- Weights & Biases, terminals, folders ---

WANDB = """
import json
class Settings:
    def __init__(self, **kwargs):
        pass
class Run:
    def define_metric(self, *args, **kwargs):
        pass
    def log(self, row):
        {log}
        open({rows!r}, "a").write(json.dumps(row) + chr(10))
    def finish(self):
        pass
def init(**kwargs):
    open({ids!r}, "a").write(repr(kwargs.get("id")) + chr(10))
    {init}
    return Run()
"""


def test_what_is_logged_is_tracked(tiny, tmp_path):
    """Every number in metrics.csv, with its step."""
    stub = WANDB.format(rows=str(tmp_path / "rows"), ids=str(tmp_path / "ids"), log="pass", init="pass")
    (tmp_path / "wandb.py").write_text(stub)
    succeeded(run_forked(*tiny, "--out", tmp_path / "runs", "--track", path=[tmp_path]))
    tracked = []
    for row in map(json.loads, (tmp_path / "rows").read_text().splitlines()):
        step = row.pop("step")
        tracked += [[str(step), name, f"{value:.6g}"] for name, value in row.items() if not name.endswith("/seconds")]
    assert tracked == metrics(only_run(tmp_path / "runs"))[1:]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("init", "raise ValueError('no login\\nhere')"),
        ("init", "raise OSError('no network')"),
        ("log", "raise OSError('no network')"),
    ],
)
def test_tracking_that_fails_is_one_warning(tiny, tmp_path, straight, where, error):
    """Whatever Weights & Biases raises: training goes on, and comes to the same."""
    broken = {"init": "pass", "log": "pass"} | {where: error}
    stub = WANDB.format(rows=str(tmp_path / "rows"), ids=str(tmp_path / "ids"), **broken)
    (tmp_path / "wandb.py").write_text(stub)
    process = succeeded(run_forked(*tiny, "--out", tmp_path / "runs", "--track", path=[tmp_path]))
    assert process.stdout.count("warning: not logged to Weights & Biases") == 1
    folder = only_run(tmp_path / "runs")
    assert_same_run(folder, straight)
    # Identifiers are the folder's name, also where the folder is named ".", and hold nothing that W&B refuses.
    again = run_forked("--resume", ".", "--track", cwd=folder, script=str(ROOT / "saq_cql.py"), path=[tmp_path])
    succeeded(again)
    ids = [line.strip("'") for line in (tmp_path / "ids").read_text().splitlines()]
    assert ids == [folder.name] * 2
    assert not set(folder.name) & set("/\\#?%:")


def test_a_folder_whose_name_is_a_command(tiny, tmp_path):
    """What is printed to go on with can be pasted into a shell."""
    folder = tmp_path / "my 'own'; touch PWNED; echo $HOME"
    folder.mkdir()
    for name in ("saq_cql.py", "vqvae.py"):
        shutil.copy(ROOT / name, folder)
    how = {"script": str(folder / "saq_cql.py"), "before": ("signal_in_update", signal.SIGTERM, 7)}
    process = run_forked(*tiny, "--no-compare", "--out", folder / "runs", **how)
    (line,) = [line for line in process.stdout.splitlines() if "go on with: " in line]
    words = ["python", str(folder / "saq_cql.py"), "--resume", str(only_run(folder / "runs"))]
    assert shlex.split(line.split("go on with: ")[1]) == words


def test_a_terminal_that_knows_ascii_only(tiny, tmp_path):
    process = run_forked(*tiny, "--out", tmp_path / "ünï cødé", env={"PYTHONIOENCODING": "ascii"})
    succeeded(process)
    assert (only_run(tmp_path / "ünï cødé") / "comparison.png").exists()


def test_a_bar_that_nobody_watches_is_short(monkeypatch):
    """In a file it writes a line every 30 seconds, in a terminal ten a second."""
    found = []
    monkeypatch.setattr(saq_cql, "tqdm", lambda updates, *args, mininterval, **kwargs: found.append(mininterval) or ())
    state = {"done": {}, "rng": {}, "due": "", "seconds": {}}
    args = saq_cql.Args(device="cpu")
    run = SimpleNamespace(args=args, state=state, save=lambda: None, updating=False, stopping=False)
    for terminal in (False, True):
        monkeypatch.setattr(saq_cql.sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        saq_cql.Run.train(run, "quantizer", (), 1, None)
    assert found == [30, 0.1]


def test_steps_that_become_slow_are_announced_once(monkeypatch, capsys):
    """As where other programs take the processor: ten times the fastest hundred, and twenty seconds, are too long."""
    clock, pace = [0.0], [0.01]
    monkeypatch.setattr(vqvae.time, "perf_counter", lambda: clock[0])

    def update():
        clock[0] += pace[0]
        return {}

    step = vqvae.with_a_word_when_slow(update)
    for seconds, said in [(0.01, 0), (0.05, 0), (0.3, 1), (0.3, 0)]:  # 0.05: five times; 0.3: thirty times
        pace[0] = seconds
        for _ in range(100):
            assert step() == {}
        assert capsys.readouterr().out.count("OMP_NUM_THREADS=1") == said


def test_an_evaluation_is_no_slow_step(monkeypatch, capsys):
    """However long it takes: the time between two steps is not theirs."""
    clock = [0.0]
    monkeypatch.setattr(vqvae.time, "perf_counter", lambda: clock[0])

    def update():
        clock[0] += 0.01
        return {}

    step = vqvae.with_a_word_when_slow(update)
    for i in range(300):
        clock[0] += 1_000.0 if i == 250 else 0.0
        step()
    assert capsys.readouterr().out == ""


# --- kill -9 ---


def test_killed_at_any_moment(tiny, tmp_path, request, capsys):
    """Runs are killed after a random time, resumed (some are killed again), and at the end nothing differs from a run
    that was left alone: not a bit of the checkpoint, the log, the results and the figures.
    `pytest -n 0 tests/test_hostile.py -k any_moment --kills 500` for more."""
    kills, rng, killed, n = request.config.getoption("kills"), random.Random(0), collections.Counter(), 0
    durations = []
    for name in ("straight", "again"):
        begin = time.monotonic()
        succeeded(run_forked(*tiny, "--out", tmp_path / name))
        durations.append(time.monotonic() - begin)
    straight = only_run(tmp_path / "straight")
    assert_same_run(only_run(tmp_path / "again"), straight)
    while killed.total() < kills:
        n, out, finished = n + 1, tmp_path / f"run{n}", False
        while not finished:
            found = list(out.glob("tiny*"))
            command = ["--resume", found[0]] if found else [*tiny, "--out", out]
            process = Forked(*command)
            if killed.total() < kills and rng.random() < 0.8:
                process.process.join(rng.uniform(0, durations[-1]))
                process.kill()
            else:
                process.wait()
            finished = process.returncode == 0
            if not finished:
                assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
                killed[phase_of(out)] += 1
        folder = next(out.glob("tiny*"))
        assert len(list(out.glob("tiny*"))) == 1
        assert_same_run(folder, straight)
        assert not list(folder.glob("*.tmp"))
        shutil.rmtree(out)
    with capsys.disabled():
        where = ", ".join(f"{count} in {phase}" for phase, count in sorted(killed.items()))
        print(f"\n{kills} kills in {n} runs: {where}")


def phase_of(out):
    """What a killed process was at, as far as its files tell."""
    folder = next(out.glob("tiny*"), None)
    if folder is None:
        return "the start"
    if parts := [file.name.removesuffix(".tmp") for file in folder.glob("*.tmp")]:
        return f"writing {parts[0]}"
    done = checkpoint(folder)["done"]
    running = [phase for phase in ("quantizer", "saq_cql", "cql") if done.get(phase, 0) < 6]
    return running[0] if running else "the last evaluation and the report"
