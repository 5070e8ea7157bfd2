"""Whatever is wrong with the input: one sentence on stderr, exit code 2, no traceback, nothing lost."""

import dataclasses
import json
import os
import resource
import shutil

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import dataset, run_script

from saq_brac import Args as BracArgs
from saq_cql import Args
from vqvae import UserError, check_arguments, load_arrays, make_env, make_transitions, scale_rewards

TINY = [
    "--vq-steps",
    20,
    "--steps",
    20,
    "--eval-every",
    10,
    "--eval-episodes",
    1,
    "--final-episodes",
    1,
    "--no-compare",
]


def one_sentence(process):
    """The sentence that a failed script left, checked for form."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.stderr.rstrip().splitlines()[-1] == line
    return line


def without(*keys):
    return lambda arrays: [arrays.pop(key) for key in keys]


def put(key, row, value):
    def change(arrays):
        arrays[key] = arrays[key].astype(np.float32)
        arrays[key][row] = value

    return change


def replace(key, function):
    return lambda arrays: arrays.update({key: function(arrays[key])})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without("rewards"), "has no rewards"),
        (without("observations"), "has no observations"),
        (replace("actions", lambda a: a[:-1]), r"actions have shape \(399, 1\), its observations \(400, 3\)"),
        (replace("rewards", lambda a: a[:, None].repeat(2, 1)), r"rewards have shape \(400, 2\)"),
        (replace("observations", lambda a: a[:, 0]), r"observations have shape \(400,\)"),
        (replace("rewards", lambda a: a.astype(str) + "x"), "rewards are not numbers"),
        (
            put("observations", 17, np.nan),
            "observations hold NaN, infinity or numbers beyond 1e10 in 1 rows, the first of them row 17",
        ),
        (
            put("actions", slice(5, 8), np.inf),
            "actions hold NaN, infinity or numbers beyond 1e10 in 3 rows, the first of them row 5",
        ),
        (
            put("rewards", -1, -np.inf),
            "rewards hold NaN, infinity or numbers beyond 1e10 in 1 rows, the first of them row 399",
        ),
        (put("timeouts", slice(None), 0), "marks no end of an episode"),
        (without("timeouts"), "marks no end of an episode"),
        (lambda arrays: arrays.update({k: v[:0] for k, v in arrays.items()}), r"have shape \(0, 3\)"),
        (
            lambda arrays: arrays.update(next_observations=arrays["observations"][:, :2]),
            r"next_observations have shape",
        ),
        (put("timeouts", slice(None), 1), "no transition's next observation is known"),
    ],
)
def test_bad_arrays(damage, sentence):
    arrays = dataset()
    damage(arrays)
    with pytest.raises(UserError, match=sentence):
        make_transitions(arrays, None, torch.device("cpu"))


def test_actions_outside_the_box_are_clipped_and_counted(capsys):
    arrays = dataset()
    arrays["actions"][[3, 4]] = [[1.5], [-2.0]]
    data, _ = make_transitions(arrays, None, torch.device("cpu"))
    assert data.actions[3:5, 0].tolist() == [1.0, -1.0]
    assert "2 of 400 actions leave [-1, 1], up to 2: clipped" in capsys.readouterr().out


def test_sizes_that_do_not_fit_the_environment(tmp_path):
    np.savez(tmp_path / "d.npz", **dataset(obs_dim=7))
    process = run_script("--env", "Pendulum-v1", "--dataset-path", tmp_path / "d.npz", "--out", tmp_path)
    assert "observations have size 7, those of Pendulum-v1 3" in one_sentence(process)


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    with h5py.File(path, "w") as file:
        for key, array in dataset().items():
            file[key] = array
    path.write_bytes(path.read_bytes()[:3000])


def absent(path):
    pass


@pytest.mark.parametrize("damage", [empty, truncated, absent])
@pytest.mark.parametrize("name", ["d.hdf5", "d.npz"])
def test_unreadable_files(tmp_path, damage, name):
    damage(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} cannot be read") as error:
        load_arrays(str(tmp_path / name), None)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_ends_the_script(tmp_path):
    process = run_script("--env", "Pendulum-v1", "--dataset-path", tmp_path / "absent.hdf5", "--out", tmp_path / "runs")
    assert "absent.hdf5 cannot be read" in one_sentence(process)
    assert not (tmp_path / "runs").exists()


def test_unknown_environment():
    assert "hoper-expert-v2 cannot be made: Environment `hoper-expert` doesn't exist" in one_sentence(
        run_script("--env", "hoper-expert-v2")
    )


def test_names_that_no_environment_can_have():
    for name in (":", "a:b:c", "no_such_module:X-v0", "Hopper-v2", ""):
        with pytest.raises(UserError, match="cannot be made") as error:
            make_env(name)
        assert "\n" not in str(error.value)


class Odd(gym.Env):
    """An environment with actions in bounds of another type and size, or one that cannot start."""

    def __init__(self, low=-2.0, high=2.0, broken=False):
        if broken:
            raise RuntimeError("no display\nanywhere")
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gym.spaces.Box(low, high, (1,), np.float64)


def test_odd_environments():
    gym.register("Odd-v0", entry_point=Odd)
    with pytest.raises(UserError, match="Odd-v0 must have flat Box spaces"):
        make_env_of(low=1.0, high=1.0)
    with pytest.raises(UserError, match="Odd-v0 cannot be made: no display anywhere"):
        make_env_of(broken=True)
    data, _ = make_transitions(dataset(), make_env_of(), torch.device("cpu"))
    assert data.actions.dtype == torch.float32
    torch.testing.assert_close(data.actions[:99], torch.as_tensor(dataset()["actions"][:99]) / 2)


def make_env_of(**kwargs):
    gym.registry["Odd-v0"].kwargs = kwargs
    return make_env("Odd-v0")


def test_environment_without_a_dataset():
    assert "no dataset of its own: pass --dataset-path" in one_sentence(run_script("--env", "Pendulum-v1"))


def test_environment_with_discrete_actions(tmp_path):
    process = run_script("--env", "CartPole-v1", "--dataset-path", "x.npz")
    assert "CartPole-v1 must have flat Box spaces" in one_sentence(process)


def test_a_dataset_that_cannot_be_downloaded(tmp_path):
    environment = {**os.environ, "D4RL_DATASET_DIR": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    line = one_sentence(run_script("--env", "hopper-expert-v2", env=environment))
    assert "could not be downloaded" in line
    assert str(tmp_path / "hopper_expert-v2.hdf5") in line


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in one_sentence(run_script("--out", tmp_path / "file", *TINY))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    process = run_script("--out", out, *TINY)
    assert process.returncode == 0, process.stderr
    return next(out.iterdir())


def test_a_full_disk_keeps_the_last_checkpoint(finished, tmp_path):
    """Files may not grow past 1 MB, a checkpoint takes more: writing it fails as on a full disk."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "checkpoint.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = run_script("--resume", run, "--steps", 40, preexec_fn=limit)
    assert "File too large" in one_sentence(process)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert run_script("--resume", run, "--steps", 40).returncode == 0


def test_a_corrupted_checkpoint(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:100_000])
    for flag in ("--resume", "--eval-only"):
        assert "checkpoint.pt cannot be used" in one_sentence(run_script(flag, tmp_path / "run"))
    assert file.stat().st_size == 100_000


def test_a_checkpoint_of_another_environment(finished):
    line = one_sentence(run_script("--resume", finished, "--env", "hopper-expert-v2"))
    assert "has begun with env maze2d-large-demos-v1: leave out --env" in line


def test_a_checkpoint_of_other_networks(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    about["args"]["num_codes"] = 7
    (tmp_path / "run" / "args.json").write_text(json.dumps(about))
    assert "checkpoint.pt cannot be used" in one_sentence(run_script("--resume", tmp_path / "run"))


@pytest.mark.parametrize("flag", [("num_codes", 7), ("lr", 0.1), ("vq_steps", 40), ("compare", True), ("out", "x")])
def test_what_a_resumed_run_may_not_change(flag):
    begun = Args(compare=False)
    check_arguments(dataclasses.replace(begun, steps=80_000, resume="r", act="sample"), begun)
    with pytest.raises(UserError, match=f"has begun with {flag[0]} .*: leave out --{flag[0].replace('_', '-')}"):
        check_arguments(dataclasses.replace(begun, **dict([flag])), begun)


@pytest.mark.parametrize("flag", [("steps", 9), ("final_episodes", 9), ("seed", 9)])
def test_what_an_evaluation_would_ignore(flag):
    moved = dict(act="sample", dataset_path="elsewhere.npz", track=False)
    check_arguments(dataclasses.replace(Args(), eval_only="r", eval_episodes=9, **moved), Args(track=True))
    with pytest.raises(UserError, match=f"has begun with {flag[0]} .*: leave out --{flag[0].replace('_', '-')}"):
        check_arguments(dataclasses.replace(Args(), eval_only="r", **dict([flag])), Args())


@pytest.mark.parametrize(
    "field",
    [("steps", 0), ("final_episodes", 0), ("target_every", 0), ("lr", -1.0), ("discount", 1.1), ("seed", -1)],
)
def test_numbers_out_of_range(field):
    with pytest.raises(UserError, match=f"--{field[0].replace('_', '-')} must be between"):
        check_arguments(dataclasses.replace(Args(), **dict([field])))


def test_brac_without_an_actor_needs_an_alpha():
    check_arguments(dataclasses.replace(BracArgs(), alpha=0.0))
    with pytest.raises(UserError, match="--actor-free divides by alpha"):
        check_arguments(dataclasses.replace(BracArgs(), alpha=0.0, actor_free=True))


def test_a_number_out_of_range_ends_the_script():
    assert "--temperature must be between" in one_sentence(run_script("--temperature", 0, script="saq_iql.py"))


def test_resuming_and_evaluating_exclude_each_other(finished):
    process = run_script("--resume", finished, "--eval-only", finished)
    assert "--resume and --eval-only exclude each other" in one_sentence(process)


def test_cloning_refuses_what_it_would_ignore():
    assert "cloning reads no rewards" in one_sentence(run_script("--discount", 0.9, script="saq_bc.py"))


def test_returns_that_cannot_be_scaled():
    rewards = torch.ones(4)
    torch.testing.assert_close(scale_rewards(rewards, np.array([0.0, 500.0]), 0, -1), rewards)
    with pytest.raises(UserError, match="same return"):
        scale_rewards(rewards, np.array([2.0, 2.0]), 0, 0)


def test_a_folder_that_is_no_run(tmp_path):
    assert "is not the folder of a run" in one_sentence(run_script("--resume", tmp_path))
    (tmp_path / "args.json").write_text(json.dumps({"args": {"env": "x", "no_such_field": 1}}))
    assert "is not the folder of a run" in one_sentence(run_script("--resume", tmp_path))


def test_an_unknown_flag():
    process = run_script("--no-such-flag")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
