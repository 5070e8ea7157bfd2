"""Whatever is wrong with the input: one sentence on stderr, exit code 2, no traceback, nothing lost."""

import resource
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_run, dataset, one_sentence, only_run, run_forked, run_script, succeeded, write

import saq_brac
from saq_cql import FREE_TO_EVALUATE, FREE_TO_RESUME, Args
from vqvae import (
    ActionVQVAE,
    UserError,
    check_numbers,
    check_unchanged,
    load_arrays,
    make_env,
    make_transitions,
    scale_rewards,
)

TINY = ["--vq-steps", 20, "--steps", 20, "--eval-every", 10, "--eval-episodes", 1, "--final-episodes", 1]
TINY += ["--env", "tiny_envs:Tiny-v0", "--no-compare"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags of a run of a second on data of tiny_envs."""
    return [*TINY, "--dataset-path", write(tmp_path_factory.mktemp("data") / "tiny.npz", dataset(n=60, episode=5))]


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
    """Where the environment's bounds are known; where they are not, such actions are in another unit: refused."""
    arrays = dataset()
    arrays["actions"] *= 2
    arrays["actions"][[3, 4]] = [[3.0], [-4.0]]
    data, _ = make_transitions(arrays, make_env("Pendulum-v1"), torch.device("cpu"))
    assert data.actions[3:5, 0].tolist() == [1.0, -1.0]
    assert "2 of 400 actions leave [-1, 1], up to 2: clipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"actions reach 4, and no environment tells bounds: scale to \[-1, 1\]"):
        make_transitions(arrays, None, torch.device("cpu"))
    arrays["actions"] = np.full_like(arrays["actions"], 1.0005)  # rounding
    assert make_transitions(arrays, None, torch.device("cpu"))[0].actions.max() == 1


def test_sizes_that_do_not_fit_the_environment(tmp_path):
    path = write(tmp_path / "d.npz", dataset(obs_dim=7))
    process = run_forked("--env", "Pendulum-v1", "--dataset-path", path, "--out", tmp_path / "runs")
    assert "observations have size 7, the environment's are a Box of shape (3,)" in one_sentence(process)


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    write(path, dataset())
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
    process = run_forked("--env", "hoper-expert-v2")
    assert "hoper-expert-v2 cannot be made: Environment `hoper-expert` doesn't exist" in one_sentence(process)


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
    assert "no dataset of its own, or none is named: name a file" in one_sentence(run_forked("--env", "Pendulum-v1"))


def test_environment_with_discrete_actions():
    process = run_forked("--env", "CartPole-v1", "--dataset-path", "x.npz")
    assert "CartPole-v1 must have flat Box spaces" in one_sentence(process)


def test_a_dataset_that_cannot_be_downloaded(tmp_path):
    environment = {"D4RL_DATASET_DIR": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    line = one_sentence(run_forked("--env", "hopper-expert-v2", env=environment))
    assert "could not be downloaded" in line
    assert str(tmp_path / "hopper_expert-v2.hdf5") in line


def test_a_run_folder_that_cannot_be_written(tmp_path, tiny):
    (tmp_path / "file").write_text("in the way")
    assert "file" in one_sentence(run_forked(*tiny, "--out", tmp_path / "file"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("finished")
    succeeded(run_forked(*tiny, "--out", out))
    return only_run(out)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_full_disk_keeps_the_last_checkpoint(run, tmp_path):
    """Files may not grow past 1 MB, a checkpoint takes more: writing it fails as on a full disk. Nothing is left of
    the attempt, and what was there goes on as if there had been none."""
    before, straight = files(run), shutil.copytree(run, tmp_path / "straight")
    full = run_forked("--resume", run, "--steps", 40, limits={resource.RLIMIT_FSIZE: 1_000_000})
    assert "File too large" in one_sentence(full)
    assert {**files(run), "args.json": None} == {**before, "args.json": None}
    for folder in (run, straight):
        succeeded(run_forked("--resume", folder, "--steps", 40))
    assert_same_run(run, straight)


def test_a_corrupted_checkpoint(run):
    file = run / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:100_000])
    for flag in ("--resume", "--eval-only"):
        assert "checkpoint.pt cannot be used" in one_sentence(run_forked(flag, run))
    assert file.stat().st_size == 100_000


def test_a_checkpoint_of_another_environment(finished):
    line = one_sentence(run_forked("--resume", finished, "--env", "hopper-expert-v2"))
    assert "has begun with env tiny_envs:Tiny-v0: leave env out" in line


def test_a_checkpoint_of_other_networks(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["args"]["num_codes"] = 7
    torch.save(state, run / "checkpoint.pt")
    assert "checkpoint.pt cannot be used" in one_sentence(run_forked("--resume", run))


def test_a_checkpoint_of_another_script(finished):
    """It has other arguments than this one knows."""
    one_sentence(run_forked("--resume", finished, script="saq_iql.py"))


@pytest.mark.parametrize(
    "flag", [("num_codes", 7), ("lr", 0.1), ("vq_steps", 40), ("compare", True), ("out", "x"), ("act", "mean")]
)
def test_what_a_resumed_run_may_not_change(flag):
    begun = vars(Args(compare=False))
    moved = dict(dataset_path="elsewhere.npz", device="cuda", compile="on", track=True, eval_every=7, video=1)
    check_unchanged(begun | moved | dict(steps=80_000, resume="r"), begun, FREE_TO_RESUME)
    with pytest.raises(UserError, match=f"has begun with {flag[0]} .*: leave {flag[0]} out"):
        check_unchanged(begun | dict([flag]), begun, FREE_TO_RESUME)


@pytest.mark.parametrize("flag", [("steps", 9), ("final_episodes", 9), ("seed", 9)])
def test_what_an_evaluation_would_ignore(flag):
    moved = dict(act="sample", dataset_path="elsewhere.npz", device="cuda", video=1)
    begun = vars(Args())
    check_unchanged(begun | moved | dict(eval_only="r", eval_episodes=9), begun, FREE_TO_EVALUATE)
    with pytest.raises(UserError, match=f"has begun with {flag[0]} .*: leave {flag[0]} out"):
        check_unchanged(begun | dict([flag]), begun, FREE_TO_EVALUATE)


@pytest.mark.parametrize(
    "field",
    [("steps", 0), ("final_episodes", 0), ("target_every", 0), ("lr", -1.0), ("discount", 1.1), ("seed", -1)],
)
def test_numbers_out_of_range(field):
    check_numbers(vars(Args()))
    with pytest.raises(UserError, match=f"{field[0]} must be a number between"):
        check_numbers(vars(Args()) | dict([field]))


def test_brac_without_an_actor_needs_an_alpha():
    vqvae = ActionVQVAE(3, 1, 4)
    saq_brac.DiscreteBRAC(3, vqvae, saq_brac.Args(alpha=0.0))
    with pytest.raises(UserError, match="without an actor the policy is divided by alpha"):
        saq_brac.DiscreteBRAC(3, vqvae, saq_brac.Args(alpha=0.0, actor_free=True))


def test_brac_without_a_penalty_of_the_value_has_no_form_of_it():
    with pytest.raises(UserError, match="literal is a form of the value's penalty, and no value_penalty leaves"):
        saq_brac.DiscreteBRAC(3, ActionVQVAE(3, 1, 4), saq_brac.Args(literal=True, value_penalty=False))


def test_a_number_out_of_range_ends_the_script():
    line = one_sentence(run_forked("--temperature", 0, script="saq_iql.py"))
    assert "temperature must be a number between" in line


def test_resuming_and_evaluating_exclude_each_other(finished):
    process = run_forked("--resume", finished, "--eval-only", finished)
    assert "--resume and --eval-only exclude each other" in one_sentence(process)


def test_cloning_refuses_what_it_would_ignore():
    assert "cloning reads no rewards" in one_sentence(run_forked("--discount", 0.9, script="saq_bc.py"))


def test_returns_that_cannot_be_scaled():
    rewards = torch.ones(4)
    torch.testing.assert_close(scale_rewards(rewards, np.array([0.0, 500.0]), 0, -1), rewards)
    with pytest.raises(UserError, match="same return"):
        scale_rewards(rewards, np.array([2.0, 2.0]), 0, 0)
    rewards = np.float32([0.1, 0.2, 0.3, 0.4, 0.7])  # the same in another order: float32 adds up to another number
    returns = np.add.reduceat(np.concatenate([rewards, rewards[::-1]]), [0, 5])
    assert returns[0] != returns[1]
    with pytest.raises(UserError, match="same return"):
        scale_rewards(rewards, returns, 0, 0)


def test_a_device_that_is_not_there(tmp_path):
    line = one_sentence(run_forked("--device", "cuda", "--out", tmp_path / "runs"))
    assert line == "error: PyTorch sees no CUDA device here: choose device cpu."
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run(tmp_path):
    assert "checkpoint.pt cannot be used" in one_sentence(run_forked("--resume", tmp_path))
    torch.save({"args": {"env": "x", "no_such_field": 1}}, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt cannot be used" in one_sentence(run_forked("--resume", tmp_path))


def test_an_unknown_flag():
    process = run_forked("--no-such-flag")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
