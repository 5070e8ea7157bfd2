"""offline_envs: D4RL's names, physics conventions, scores and files."""

import hashlib
import importlib.util
import runpy
import subprocess
import sys
import warnings

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import ROOT, SHARED_DATA, from_pypi
from gymnasium.utils.env_checker import check_env

from vqvae import make_env


def make(name):
    return gym.make(f"offline_envs:{name}")


def test_every_d4rl_name_of_the_covered_families():
    make("hopper-expert-v2")
    locomotion = [
        f"{robot}-{data}-v{version}"
        for robot in ("hopper", "halfcheetah", "walker2d", "ant")
        for data in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
        for version in (0, 1, 2)
        if (data, version) != ("full-replay", 0)
    ]
    adroit = [
        f"{task}-{data}-v{version}"
        for task in ("pen", "door", "hammer", "relocate")
        for data in ("human", "cloned", "expert")
        for version in (0, 1)
    ]
    kitchen = [f"kitchen-{data}-v0" for data in ("complete", "partial", "mixed")]
    mazes = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
    antmaze = [f"antmaze-{maze}-v{version}" for maze in mazes for version in (0, 2)]
    maze2d = [f"maze2d-{maze}{dense}-v1" for maze in ("umaze", "medium", "large") for dense in ("", "-dense")]
    for name in [*locomotion, *adroit, *kitchen, *antmaze, *maze2d, "maze2d-large-demos-v1"]:
        assert name in gym.registry, name


def test_scores_and_urls_are_d4rls(pytestconfig):
    """Against the tables in D4RL's own package, for every name that it has."""
    make("hopper-expert-v2")
    infos = runpy.run_path(str(from_pypi("d4rl==1.1", "d4rl/infos.py", pytestconfig)))
    ours = {name: spec.kwargs for name, spec in gym.registry.items() if spec.entry_point == "offline_envs:make"}
    common = set(ours) & set(infos["DATASET_URLS"])
    assert len(common) == 113
    for name in common:
        assert ours[name]["dataset"] == infos["DATASET_URLS"][name]
        assert ours[name]["ref_min_score"] == infos["REF_MIN_SCORE"][name]
        assert ours[name]["ref_max_score"] == infos["REF_MAX_SCORE"][name]
    env = make("door-human-v0")
    assert env.get_wrapper_attr("get_normalized_score")(2880.5693087298737) == 1
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


def test_kitchen_observations_are_noisy():
    """D4RL's noise ratio of 0.1, ten times the library's: an observed joint is off by up to 0.1 of its amplitude."""
    env = make("kitchen-mixed-v0")
    robot = env.unwrapped.robot_env
    resets = np.array([env.reset(seed=seed)[0][:9] - robot.data.qpos[:9] for seed in range(100)])
    amplitude = robot.robot_pos_noise_amp[:9]
    assert (amplitude > 0).all()
    assert ((resets.max(0) > 0.09 * amplitude) & (resets.max(0) <= 0.1 * amplitude)).all()


def test_kitchen_pays_each_task_once_and_ends_when_all_are_done():
    env = make("kitchen-complete-v0")
    env.reset(seed=0)
    robot, total = env.unwrapped.robot_env, 0.0
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
            _, reward, terminated, _, _ = env.step(np.zeros(env.action_space.shape, np.float32))
            total += reward
            assert reward == reward_expected
        assert terminated == done
    assert total == 4


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


# --- Physics ---

ROLLOUTS = ROOT / "tests" / "rollouts.npz"
PHYSICS = [*FAMILIES, "halfcheetah-medium-v2", "antmaze-umaze-v2", "antmaze-large-play-v2", "lift-ph"]


def rollout(name):
    """Observations (31, O) and rewards (30,) of fixed actions, slow waves, from a seeded start."""
    env = make_env(name, str(SHARED_DATA / "lift_ph_10demos.hdf5"))
    obs, rewards = [env.reset(seed=0)[0]], []
    for step in range(30):
        observation, reward, *_ = env.step(np.sin(0.2 * step + np.arange(env.action_space.shape[0])).astype(np.float32))
        obs.append(observation)
        rewards.append(reward)
    return np.stack(obs), np.array(rewards)


@pytest.mark.parametrize("name", PHYSICS)
def test_physics_has_not_changed(name, request):
    """Against rollouts that `python tests/test_envs.py` stored with the pinned versions."""
    if name.startswith("antmaze"):
        request.getfixturevalue("ant")
    if name == "lift-ph" and not (SHARED_DATA / "lift_ph_10demos.hdf5").exists():
        pytest.skip("robomimic's demonstrations are not here")
    with np.load(ROLLOUTS) as stored:
        for part, values in zip(("obs", "rewards"), rollout(name), strict=True):
            np.testing.assert_allclose(values, stored[f"{name}/{part}"], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    parts = {name: rollout(name) for name in PHYSICS}
    flat = {f"{name}/{part}": x for name, xs in parts.items() for part, x in zip(("obs", "rewards"), xs, strict=True)}
    np.savez_compressed(ROLLOUTS, **flat)
