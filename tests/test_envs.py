"""offline_envs: D4RL's names, physics conventions, scores and files."""

import builtins
import hashlib
import importlib.util
import re
import runpy
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import MagicMock

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from conftest import ROOT, SHARED_DATA, from_pypi
from gymnasium.utils.env_checker import check_env

from offline_envs.maze2d import MAZES


def make(name):
    return gym.make(f"offline_envs:{name}")


FOLDERS = ["gym_mujoco", "hand_manipulation_suite", "kitchen", "locomotion", "pointmaze"]
WITHOUT_DATA = {"pen-v0", "door-v0", "hammer-v0", "relocate-v0"}  # D4RL registers the bare environments, too


def registered_by_d4rl(folder, infos, config):
    """What a family's own `__init__.py` registers: {name: (steps, keyword arguments of the environment)}."""
    names = {}

    def register(id, entry_point, max_episode_steps, kwargs=None):
        names[id] = (max_episode_steps, kwargs or {})

    package = MagicMock(register=register, infos=SimpleNamespace(**infos))  # in place of all that the file imports
    source = from_pypi("d4rl==1.1", f"d4rl/{folder}/__init__.py", config).read_text()
    exec(source, {"__builtins__": {**vars(builtins), "__import__": lambda *names: package}})
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_of_d4rl(folder, pytestconfig):
    """Names, horizons, URLs and reference scores that D4RL's own package registers."""
    make("hopper-expert-v2")
    infos = runpy.run_path(str(from_pypi("d4rl==1.1", "d4rl/infos.py", pytestconfig)))
    theirs = registered_by_d4rl(folder, infos, pytestconfig)
    assert len(theirs) >= 3
    for name in theirs.keys() - WITHOUT_DATA:
        steps, kwargs = theirs[name]
        ours = gym.registry[name]
        assert ours.max_episode_steps == steps, name
        assert ours.kwargs["dataset"] == kwargs["dataset_url"], name
        for bound in ("ref_min_score", "ref_max_score"):
            assert ours.kwargs[bound] == kwargs[bound], name


def test_every_name_in_d4rls_tables(pytestconfig):
    make("hopper-expert-v2")
    infos = runpy.run_path(str(from_pypi("d4rl==1.1", "d4rl/infos.py", pytestconfig)))
    families = re.compile("(hopper|halfcheetah|walker2d|ant|pen|door|hammer|relocate|kitchen|antmaze|maze2d)-")
    names = {name for name in infos["DATASET_URLS"] if families.match(name)}
    assert len(names) > 110
    for name in names:
        ours = gym.registry[name].kwargs
        assert ours["dataset"] == infos["DATASET_URLS"][name]
        for bound in ("ref_min_score", "ref_max_score"):  # a few are in D4RL's registry alone
            assert ours[bound] == infos[bound.upper()].get(name, ours[bound])


def test_scores_are_d4rls():
    env = make("door-human-v0")
    assert env.get_wrapper_attr("get_normalized_score")(2880.5693087298737) == 1
    assert env.get_wrapper_attr("get_normalized_score")(-56.512833) == 0
    assert env.get_wrapper_attr("dataset_filepath").name == "door-v0_demos_clipped.hdf5"


FAMILIES = ["hopper-medium-v2", "walker2d-expert-v1", "ant-medium-v2", "pen-human-v1", "door-human-v1"]
FAMILIES += ["hammer-human-v1", "relocate-human-v1", "kitchen-mixed-v0", "maze2d-medium-v1", "maze2d-large-demos-v1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_gymnasium_accepts_the_environment(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about wrappers and about Box bounds
        env = make(name)
        check_env(env if name.startswith("kitchen") else env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_seeded_episodes_repeat(name):
    runs = []
    for _ in range(2):
        env = make(name)
        env.action_space.seed(3)
        rows = [env.reset(seed=5)[0]]
        rows += [env.step(env.action_space.sample())[0] for _ in range(20)]
        runs.append(np.stack(rows))
    assert np.array_equal(*runs)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("maze2d-umaze-v1", 300),
        ("maze2d-medium-v1", 600),
        ("door-human-v0", 200),
        ("hammer-human-v0", 200),
        ("relocate-human-v0", 200),
        ("pen-human-v0", 100),
        ("kitchen-partial-v0", 280),
    ],
)
def test_horizon_and_no_termination(name, steps):
    env = make(name)
    env.reset(seed=0)
    for step in range(1, steps + 1):
        _, _, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        assert not terminated
        assert truncated == (step == steps)


def test_ant_observes_d4rls_zeros():
    obs, _ = make("ant-medium-v2").reset(seed=0)
    assert obs.shape == (111,)
    assert (obs[27:] == 0).all()
    assert (obs[:27] != 0).any()


# --- maze2d ---


def test_maze2d_reward_is_d4rls():
    """Sparse: 1 within 0.5 of the goal at (7, 9). Dense: exp(-distance)."""
    env = make("maze2d-large-v1").unwrapped
    dense = make("maze2d-large-dense-v1").unwrapped
    assert env.goal.tolist() == [7, 9]
    for offset, reward in [(0.0, 1.0), (0.48, 1.0), (0.52, 0.0)]:
        for task in (env, dense):
            task.reset(seed=0)
            task.set_state(np.array([7.0 - offset, 9.0]) - task.offset, np.zeros(2))
        obs, got, *_ = env.step(np.zeros(2))
        assert obs[:2] == pytest.approx([7 - offset, 9], abs=1e-6)
        assert got == reward
        obs, got, *_ = dense.step(np.zeros(2))
        assert got == pytest.approx(np.exp(-np.linalg.norm(obs[:2] - [7, 9])))


def test_maze2d_resets_in_every_free_cell_with_d4rls_noise():
    env = make("maze2d-umaze-v1")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(400)])
    cells = {tuple(cell) for cell in starts[:, :2].round().astype(int)}
    assert cells == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    noise = starts[:, :2] - starts[:, :2].round()
    assert 0.09 < np.abs(noise).max() <= 0.1
    assert starts[:, 2:].std() == pytest.approx(0.1, rel=0.1)


def test_demos_task_starts_in_the_corner():
    env = make("maze2d-large-demos-v1")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(50)])
    assert np.abs(starts[:, :2] - [1, 1]).max() <= 0.1


def test_maze2d_walls_stand_where_d4rl_has_them():
    """From cell (1, 1) of the large maze (two free cells to the right, wall above) the ball can go right, not up."""
    env = make("maze2d-large-demos-v1")
    for action, axis, moves in [((0, 1), 1, True), ((-1, 0), 0, False), ((1, 0), 0, True), ((0, -1), 1, False)]:
        start, _ = env.reset(seed=0)
        for _ in range(60):
            obs, *_ = env.step(np.array(action, np.float32))
        assert (abs(obs[axis] - start[axis]) > 0.9) == moves


@pytest.mark.parametrize(
    "maze", ["open-v0", "umaze-v1", "medium-v1", "eval-umaze-v1", "eval-medium-v1", "eval-large-v1"]
)
def test_every_wall_of_maze2d_stands_where_d4rl_has_it(maze):
    """D4RL puts the block of cell (row, column) at (row + 1, column + 1), and a ball at rest at (1.2, 1.2)."""
    env = make(f"maze2d-{maze}").unwrapped
    env.set_state(np.zeros(2), np.zeros(2))
    blocks = env.data.geom_xpos[env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX][:, :2]
    ball = env.data.xpos[env.model.body("particle").id][:2]
    cells = {tuple(cell) for cell in (blocks - ball + env.offset + 0.2).round(9)}
    assert cells == {tuple(cell) for cell in np.argwhere(env.cells == "#").astype(float)}
    assert (env.cells[tuple(env.goal)], (env.cells == "G").sum()) == ("G", 1)


@pytest.mark.usefixtures("ant")
@pytest.mark.parametrize(
    ("name", "start", "goal"),
    [("eval-umaze-v0", (1, 3), (0, 8)), ("eval-medium-play-v0", (1, 1), (20, 0)), ("umaze-v1", (1, 1), (0, 8))],
)
def test_walls_and_goals_of_other_antmazes(name, start, goal):
    """D4RL's block of cell (row, column) stands at 4 (column, row), less the cell of the start, where the ant is."""
    env = make(f"antmaze-{name}").unwrapped
    env.reset(seed=0)
    blocks = env.model.geom_pos[env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX][:, :2]
    walls = MAZES[name.replace("-play", "").rsplit("-", 1)[0]].split()
    expected = [(row, column) for row, cells in enumerate(walls) for column, cell in enumerate(cells) if cell == "#"]
    np.testing.assert_array_equal(blocks, 4.0 * (np.array(expected) - start)[:, ::-1])
    assert (env.goal - goal >= 0).all()
    assert (env.goal - goal <= 1.5).all()
    first = env.goal
    env.reset(seed=1)
    assert env.goal is first  # before -v2 the goal is drawn once


def test_one_step_of_the_point_is_d4rls():
    """D4RL's ball: timestep 0.01, radius 0.1, density 1000, gear 100, damping 1 (implicit), semi-implicit Euler."""
    env = make("maze2d-large-demos-v1")
    start, _ = env.reset(seed=0)
    obs, *_ = env.step(np.array([1.0, 0.0], np.float32))
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    velocity = start[2] + 0.01 * (100 - start[2]) / (mass + 0.01)
    assert obs[2] == pytest.approx(velocity, rel=1e-4)
    assert obs[0] == pytest.approx(start[0] + 0.01 * velocity, rel=1e-6)


def test_the_script_makes_the_shipped_demonstrations_again(tmp_path):
    shipped = ROOT / "demos" / "maze2d-large-demos-v1.hdf5"
    script = [sys.executable, str(ROOT / "demos" / "make_demos.py"), "--out", str(tmp_path / "again.hdf5")]
    subprocess.run(script, check=True, cwd=tmp_path, capture_output=True)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (shipped, tmp_path / "again.hdf5")]
    assert digests[0] == digests[1]


def test_the_shipped_demonstrations_replay():
    """Their actions, from their seeds, give their observations and rewards."""
    env = make("maze2d-large-demos-v1")
    data = env.get_wrapper_attr("get_dataset")()
    assert data["observations"].shape == (2400, 4)
    for episode in range(3):
        rows = slice(800 * episode, 800 * (episode + 1))
        obs, _ = env.reset(seed=episode)
        for want, action, reward in zip(
            data["observations"][rows], data["actions"][rows], data["rewards"][rows], strict=True
        ):
            assert obs == pytest.approx(want, abs=1e-5)
            obs, got, *_ = env.step(action)
            assert got == reward


# --- antmaze ---


def test_antmaze_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gym.error.DependencyNotInstalled, match="pip install --no-deps d4rl==1.1"):
        make("antmaze-umaze-v2")


@pytest.mark.usefixtures("ant")
@pytest.mark.parametrize(
    ("name", "steps", "cell", "file"),
    [
        ("antmaze-umaze-v2", 700, (0, 8), "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"),
        (
            "antmaze-medium-diverse-v0",
            1000,
            (20, 20),
            "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse.hdf5",
        ),
        (
            "antmaze-large-play-v2",
            1000,
            (32, 24),
            "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
    ],
)
def test_antmaze_starts_goals_and_horizon(name, steps, cell, file):
    """Starts within 0.1 of the origin, the goal up to 1.5 beyond its cell: in -v2 anew each episode, in -v0 once."""
    env = make(name)
    assert env.get_wrapper_attr("dataset_filepath").name == file
    assert env.spec.max_episode_steps == steps
    goals = []
    for seed in range(10):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (29,)
        assert np.abs(obs[:2]).max() <= 0.1
        assert abs(obs[2] - 0.75) <= 0.1
        goals.append(env.unwrapped.goal)
        assert (goals[-1] - cell >= 0).all()
        assert (goals[-1] - cell <= 1.5).all()
    assert len({tuple(goal) for goal in goals}) == (1 if name.endswith("v0") else 10)


@pytest.mark.usefixtures("ant")
def test_antmaze_ends_within_half_of_the_goal():
    env = make("antmaze-umaze-v2").unwrapped
    for offset, done in [(0.3, True), (0.8, False)]:
        env.reset(seed=0)
        qpos = env.init_qpos.copy()
        qpos[:2] = env.goal + [offset, 0]
        env.set_state(qpos, np.zeros(env.model.nv))
        obs, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated) == (float(done), done, False)
        np.testing.assert_array_equal(obs, np.concatenate([env.data.qpos[:15], env.data.qvel[:14]]))


@pytest.mark.usefixtures("ant")
def test_antmaze_has_walls():
    """An ant that is pushed against the wall west of its start does not leave the maze."""
    env = make("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    velocity = np.zeros(env.model.nv)
    for _ in range(30):
        velocity[0] = -5.0
        env.set_state(env.data.qpos.copy(), velocity)
        obs, *_ = env.step(np.zeros(8, np.float32))
    assert -2.0 < obs[0] < -1.0
    check_env(env, skip_render_check=True)


# --- Adroit ---


@pytest.mark.parametrize("task", ["Door", "Hammer", "Relocate"])
def test_adroit_reward_has_d4rls_sign(task):
    """D4RL's -0.1 |palm - object|, from the simulator's own positions, where the library has +0.1."""
    env, library = make(f"{task.lower()}-human-v0"), gym.make(f"AdroitHand{task}-v1")
    env.reset(seed=0)
    library.reset(seed=0)
    action = np.full(env.action_space.shape, 0.1, np.float32)
    obs, ours, *_ = env.step(action)
    same_obs, theirs, *_ = library.step(action)
    assert np.array_equal(obs, same_obs)
    hand = env.unwrapped
    palm = hand.data.site_xpos[hand.grasp_site_id if task == "Door" else hand.S_grasp_site_id]
    goal = hand.data.site_xpos[hand.handle_site_id] if task == "Door" else hand.data.xpos[hand.obj_body_id]
    distance = np.linalg.norm(palm - goal)
    assert distance > 0.05
    assert ours == pytest.approx(theirs - 0.2 * distance)


def test_a_dropped_pen_ends_the_episode():
    env = make("pen-human-v0")
    env.reset(seed=0)
    state = env.unwrapped.get_env_state()
    qpos, qvel = state["qpos"].copy(), state["qvel"].copy()
    qpos[-6:-3] += [0.3, 0.3, -0.2]  # out of the hand, over nothing
    env.unwrapped.set_state(qpos, qvel)
    for _ in range(60):
        obs, _, terminated, _, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        if terminated:
            break
    assert terminated
    assert obs[26] < 0.075


# --- Kitchen ---


def test_kitchen_observes_d4rls_goal():
    obs, _ = make("kitchen-mixed-v0").reset(seed=0)
    goal = np.zeros(30)
    goal[[11, 12]], goal[[17, 18]], goal[22] = [-0.88, -0.01], [-0.69, -0.05], -0.75
    goal[23:30] = [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]
    np.testing.assert_array_equal(obs[30:], goal)


def test_kitchen_pays_each_task_once_and_ends_when_all_are_done():
    env = make("kitchen-complete-v0")
    env.reset(seed=0)
    robot, total, as_in_data = env.unwrapped.robot_env, 0.0, []
    for indices, goal, done in [
        ([22], [-0.75], False),
        ([19], [0.37], False),
        ([17, 18], [-0.69, -0.05], False),
        (list(range(23, 30)), [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06], True),
    ]:
        for reward_expected in (1.0, 0.0)[: 1 if done else 2]:
            qpos = robot.data.qpos.copy()
            qpos[indices] = goal
            robot.set_state(qpos, np.zeros_like(robot.data.qvel))
            _, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
            total += reward
            as_in_data.append(info["data_reward"])
            assert reward == reward_expected
        assert terminated == done
    assert total == 4
    assert as_in_data == [1, 1, 2, 2, 3, 3, 4]  # D4RL's file pays in every step in which a task is done


@pytest.mark.skipif(not (SHARED_DATA / "door-human-v0.hdf5").exists(), reason="the human demonstrations are not here")
def test_door_demonstrations_replay():
    """The 25 human demonstrations, replayed from their stored states, earn what the file says: 794 on average."""
    env = make("door-human-v0").unwrapped
    with h5py.File(SHARED_DATA / "door-human-v0.hdf5") as file:
        actions, rewards, ends = file["actions"][:], file["rewards"][:], np.flatnonzero(file["timeouts"][:])
        states = {key: file["init_state"][key][:] for key in ("qpos", "qvel", "door_body_pos")}
    first, replayed = 0, []
    for episode, last in enumerate(ends):
        env.reset(seed=0)
        env.set_env_state({key: value[episode] for key, value in states.items()})
        replayed.append(sum(env.step(action)[1] for action in actions[first : last + 1]))
        first = last + 1
    assert np.mean(replayed) == pytest.approx(rewards.sum() / len(ends), rel=0.005)  # the library's: 0.011
