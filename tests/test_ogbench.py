"""OGBench's tasks: its files, its rewards, its episodes, and data like its own."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED_DATA, one_sentence, only_run, run_forked, succeeded
from test_data import Server

from vqvae import UserError, load_arrays, load_task, make_env, make_transitions, scoring

CPU = torch.device("cpu")
CUBE = "cube-single-play-singletask-task2-v0"
FILE = SHARED_DATA / "ogbench" / "cube-single-play-v0.npz"
needs_ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="ogbench is not installed")
needs_file = pytest.mark.skipif(not FILE.exists(), reason="OGBench's data are not here")


@pytest.fixture(scope="module")
def cube():
    return make_env(CUBE)


def save(path, steps, sizes, **columns):
    """A file in OGBench's layout: two episodes of `steps` transitions and one more row, all zeros but for `columns`."""
    rows = 2 * (steps + 1)
    arrays = {key: np.zeros((rows, size), np.float32) for key, size in sizes.items()}
    arrays["observations"][:, 0] = np.arange(rows)
    np.savez(path, **arrays | {"terminals": np.arange(rows) % (steps + 1) == steps} | columns)
    return str(path)


CUBE_SIZES = {"observations": 28, "actions": 5, "qpos": 21, "qvel": 20}


def cube_file(path, solved=(), **columns):
    """One of a cube that is where task 2 wants it in the rows `solved`, elsewhere 0.05 away; success is within 0.04."""
    qpos = np.zeros((8, 21), np.float32)
    qpos[:, 14:17] = [0.50, 0.05, 0.02]
    qpos[list(solved), 15] = 0.03
    return save(path, 3, CUBE_SIZES, **{"qpos": qpos} | columns)


# --- Files ---


@needs_ogbench
@needs_file
def test_every_row_is_as_the_package_has_it():
    import ogbench

    _, theirs, _ = ogbench.make_env_and_datasets(CUBE, dataset_path=str(FILE))
    task, data = load_task(CUBE, str(FILE), CPU)
    for ours, column in [
        (data.obs, theirs["observations"]),
        (data.actions, theirs["actions"]),
        (data.next_obs, theirs["next_observations"]),
        (data.rewards, theirs["rewards"]),
        (data.terminals, 1 - theirs["masks"]),
    ]:
        np.testing.assert_array_equal(ours.numpy(), column)
    assert len(data.obs) == 100_000
    assert (data.rewards == 0).sum() == data.terminals.sum() == 1_912
    visited = [(episode == 0).any() for episode in theirs["rewards"].reshape(100, 1_000)]
    assert task.data_score == pytest.approx(100 * np.mean(visited))
    assert "100,000 transitions, are not OGBench's, so do not compare" in task.provenance  # though it has that name


@needs_ogbench
def test_rewards_terminals_and_what_follows(tmp_path, cube):
    """Two episodes of three transitions: the second comes by the goal, and goes on from there."""
    arrays = load_arrays(cube_file(tmp_path / "d.npz", solved=[5, 7]), cube)
    data, returns = make_transitions(arrays, cube, CPU)
    assert data.rewards.tolist() == [-1, -1, -1, -1, 0, -1]
    assert data.terminals.tolist() == [0, 0, 0, 0, 1, 0]
    assert data.obs[:, 0].tolist() == [0, 1, 2, 4, 5, 6]
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 5, 6, 7]  # the last row of an episode is where it ended
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [2, 5]
    assert returns.tolist() == [0, 1]  # row 7 is no transition's state
    score, _ = scoring(cube, str(tmp_path / "d.npz"))
    assert score(returns.mean()) == 50


@needs_ogbench
def test_rewards_of_a_maze(tmp_path):
    """-1, and 0 within 0.5 of the goal: cell (7, 10) of a large maze, 4 wide, whose cell (1, 1) is the origin."""
    env = make_env("antmaze-large-navigate-singletask-task1-v0")
    qpos = np.zeros((8, 15), np.float32)
    qpos[:, :2] = [36, 24]
    qpos[[0, 1], 0] += [0.49, 0.51]
    sizes = {"observations": 29, "actions": 8, "qpos": 15, "qvel": 14}
    arrays = load_arrays(save(tmp_path / "d.npz", 3, sizes, qpos=qpos), env)
    assert arrays["rewards"].tolist() == [0, -1, 0, 0, 0, 0]
    assert arrays["terminals"].tolist() == [True, False, True, True, True, True]


@needs_ogbench
def test_rewards_of_a_puzzle(tmp_path):
    """-1 for each button that is not as it should be; nothing is solved before all of them are."""
    env = make_env("puzzle-3x3-play-singletask-v0")
    goal = env.unwrapped.task_infos[4 - 1]["goal_button_states"]  # the default task is the fourth
    states = np.tile(goal, (8, 1))
    states[1, 0] ^= 1
    states[2] ^= 1
    sizes = {"observations": 55, "actions": 5, "qpos": 23, "qvel": 23}
    arrays = load_arrays(save(tmp_path / "d.npz", 3, sizes, button_states=states), env)
    assert arrays["rewards"].tolist() == [0, -1, -9, 0, 0, 0]
    assert arrays["terminals"].tolist() == [True, False, False, True, True, True]
    with pytest.raises(UserError, match="it has no button_states: OGBench's files have observations, "):
        load_arrays(save(tmp_path / "e.npz", 3, sizes), env)


def without(path, key):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != key}
    np.savez(path, **arrays)


@needs_ogbench
def test_sentences_for_bad_files(tmp_path, cube):
    nan = np.zeros((8, 28), np.float32)
    nan[2, 0] = np.nan
    bad = {
        "its last row does not end an episode": dict(terminals=np.arange(8) == 3),
        "its columns have different lengths, .*'actions': 7": dict(actions=np.zeros((7, 5), np.float32)),
        r"its qpos have shape \(8, 28\), those of cube-single-singletask-task2-v0 21": dict(qpos=np.zeros((8, 28))),
        "observations have size 37, .* of shape .28,.": dict(observations=np.zeros((8, 37), np.float32)),
        "observations hold NaN, infinity or numbers beyond 1e10 in 1 rows": dict(observations=nan),
    }
    for sentence, columns in bad.items():
        path = cube_file(tmp_path / "d.npz", **columns)
        with pytest.raises(UserError, match=sentence):
            make_transitions(load_arrays(path, cube), cube, CPU)
    without(cube_file(tmp_path / "d.npz"), "qpos")
    with pytest.raises(UserError, match="it has no qpos: OGBench's files have observations, actions, terminals, qpos"):
        load_arrays(str(tmp_path / "d.npz"), cube)
    (tmp_path / "half.npz").write_bytes(Path(cube_file(tmp_path / "d.npz")).read_bytes()[:500])
    for name, sentence in [("half.npz", "it is no .npz file"), ("gone.npz", "No such file"), ("", "it is no file")]:
        with pytest.raises(UserError, match=sentence):
            load_arrays(str(tmp_path / name), cube)


@needs_ogbench
def test_the_folder_of_its_files(tmp_path, cube, monkeypatch):
    """A file that is there is read; one that is not is downloaded, and a page in its place is not kept."""
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    path = tmp_path / "cube-single-play-v0.npz"
    assert cube.get_wrapper_attr("dataset_filepath") == path
    whole = Path(cube_file(tmp_path / "source.npz")).read_bytes()
    server = Server(b"<html>Sign in, please</html>")
    datasets = sys.modules["offline_envs.datasets"]
    env = cube
    while not isinstance(env, sys.modules["offline_envs"].OGBench):
        env = env.env
    monkeypatch.setattr(datasets, "OGBENCH_SERVER", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(env, "dataset", f"http://127.0.0.1:{server.server_port}/{path.name}")
    with pytest.raises(UserError, match=f"no .npz file.*put it at {path}, or pass --dataset-path"):
        load_arrays(None, cube)
    server.body = whole
    assert len(load_arrays(None, cube)["rewards"]) == 6
    server.shutdown()
    server.server_close()
    assert len(load_arrays(None, cube)["rewards"]) == 6
    path.write_bytes(whole[:500])
    with pytest.raises(UserError, match="is damaged: delete it to download it again"):
        load_arrays(None, cube)
    np.savez(path, terminals=np.zeros(1_000_000, bool))  # as many as OGBench's own
    assert scoring(cube, None)[1].endswith("1,000,000 transitions, are OGBench's.")
    assert "are not OGBench's" in scoring(cube, cube_file(tmp_path / "other.npz"))[1]


# --- Environments ---


def test_names_that_are_refused_and_what_is_missing(monkeypatch):
    with pytest.raises(UserError, match="its observations are images; .* scene-play-singletask-v0"):
        make_env("visual-scene-play-singletask-v0")
    with pytest.raises(UserError, match="its goals vary .* such as cube-single-play-singletask-v0"):
        make_env("cube-single-play-v0")
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(UserError, match="pip install -r requirements-ogbench.txt first"):
        make_env(CUBE)


@needs_ogbench
def test_every_name_is_one_of_the_packages():
    """410 tasks of states and images, as OGBench counts them, and six names for five; the same horizons."""
    make_env(CUBE)
    ours = [spec for spec in gym.registry.values() if spec.entry_point == "offline_envs:OGBench"]
    tasks = [spec for spec in ours if "-singletask" in spec.id and not spec.id.startswith("visual-")]
    assert len(tasks) == 6 * 47
    for spec in tasks:
        data, task = spec.id.split("-singletask")
        theirs = gym.registry[f"{data[: data.rindex('-')]}-singletask{task}"]
        assert spec.max_episode_steps == theirs.max_episode_steps, spec.id


@needs_ogbench
@pytest.mark.parametrize("name", [CUBE, "antmaze-teleport-stitch-singletask-task4-v0"])
def test_seeded_episodes_repeat(name, cube):
    """Though OGBench draws from NumPy's global generator, and from action spaces that nobody seeds."""
    runs = []
    for env in (cube if name == CUBE else make_env(name), make_env(name)):
        np.random.seed(len(runs))
        before = np.random.get_state()[1]
        assert (env.action_space.low == -1).all()
        assert (env.action_space.high == 1).all()
        env.action_space.seed(3)
        rows = [env.reset(seed=5)[0]]
        rows += [env.step(env.action_space.sample())[0] for _ in range(20)]
        rows.append(env.reset()[0])
        assert not np.array_equal(rows[0], rows[-1])
        assert np.array_equal(before, np.random.get_state()[1])
        runs.append(np.stack(rows))
    np.testing.assert_array_equal(*runs)
    assert env.observation_space.contains(runs[0][0])


@needs_ogbench
def test_an_episode_ends_with_success_and_its_return_is_one(cube):
    """One step after the one that solves the task: OGBench judges an action by the state in which it is taken."""
    import mujoco

    cube.reset(seed=0)
    still = np.zeros(5, np.float32)
    steps = [cube.step(still) for _ in range(3)]
    assert [step[1:3] for step in steps] == [(0.0, False)] * 3
    assert [step[4] for step in steps] == [{"success": False, "data_reward": -1.0}] * 3  # as in the file
    arm = cube.unwrapped
    arm.data.joint("object_joint_0").qpos[:3] = [0.50, 0.0, 0.02]
    mujoco.mj_forward(arm.model, arm.data)
    assert cube.step(still)[1:3] == (0.0, False)
    _, reward, terminated, truncated, info = cube.step(still)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"success": True, "data_reward": 0.0})


@needs_ogbench
def test_an_episode_that_fails_runs_out_of_time(cube):
    cube.reset(seed=0)
    steps = [cube.step(np.zeros(5, np.float32))[1:4] for _ in range(200)]
    assert steps == [(0.0, False, False)] * 199 + [(0.0, False, True)]


@pytest.mark.parametrize(
    "script", ["saq_cql", "saq_iql", "saq_brac", "saq_bc", "rebrac", "fql", "awac", "bear", "spot"]
)
def test_its_antmaze_does_not_take_d4rls_settings(script, monkeypatch):
    """There -1 is added to rewards of 0 and 1, or they are multiplied; here they are -1 and 0 already."""
    monkeypatch.syspath_prepend(ROOT / "baselines")
    defaults = importlib.import_module(script).defaults
    args = defaults("antmaze-large-navigate-singletask-task1-v0")
    assert args.eval_episodes == 50
    rewards = {field.name for field in dataclasses.fields(args)} & {"reward_scale", "reward_shift"}
    assert [getattr(args, name) for name in sorted(rewards)] == [1.0, 0.0][: len(rewards)]


# --- Data like its own ---


@needs_ogbench
def test_an_episode_of_ones_own_trains_an_agent(tmp_path, cube):
    """In its 400 steps the oracle brings the cube to several targets."""
    path = tmp_path / "mine.npz"
    made = succeeded(run_forked("--episodes", 1, "--steps", 400, "--out", path, script="demos/make_ogbench.py"))
    targets = int(made.stdout.split()[-4])
    assert f"1 episodes of 400 transitions; {targets} targets" in made.stdout
    assert targets >= 3
    data, returns = make_transitions(load_arrays(str(path), cube), cube, CPU)
    assert (len(data.obs), len(returns)) == (400, 1)
    assert data.obs.std(0).min() > 0
    assert data.actions.abs().max() == 1
    tiny = "--vq-steps 20 --steps 20 --eval-every 20 --eval-episodes 1 --final-episodes 1 --no-compare --compile off"
    options = ["--env", CUBE, "--dataset-path", path, "--out", tmp_path / "runs", *tiny.split()]
    process = succeeded(run_forked(*options, script="saq_bc.py"))
    assert "the percentage of episodes that succeed; the data, 400 transitions, are not OGBench's" in process.stdout
    result = json.loads((only_run(tmp_path / "runs") / "result.json").read_text())
    assert result["saq_bc"]["score"] == 100 * np.mean(result["saq_bc"]["returns"])


@needs_ogbench
def test_its_episodes_are_those_of_their_seeds(monkeypatch):
    """The actions of an episode, taken again in its first state, give its states."""
    monkeypatch.syspath_prepend(ROOT / "demos")
    script = importlib.import_module("make_ogbench")
    env, oracles = script.make_env("cube-single-play-v0")
    (one, _), (same, _), (other, _) = (script.record(env, oracles, 20, seed) for seed in (3, 3, 4))
    for key in one:
        np.testing.assert_array_equal(one[key], same[key])
    assert not np.array_equal(one["observations"], other["observations"])
    env.reset(seed=3)
    for action, state in zip(one["actions"], one["qpos"], strict=True):
        np.testing.assert_allclose(env.data.qpos, state, atol=1e-6)
        env.step(action)


def test_sentences_of_the_script(tmp_path):
    for options, sentence in [
        (["--env", "cube-single-noisy-v0", "--out", tmp_path / "d.npz"], "there is no plan for cube-single-noisy-v0"),
        (["--out", tmp_path / "d.hdf5"], "the dataset is an .npz file"),
        (["--episodes", 0, "--out", tmp_path / "d.npz"], "episodes must be a number between 1 and"),
    ]:
        assert sentence in one_sentence(run_forked(*options, script="demos/make_ogbench.py"))
