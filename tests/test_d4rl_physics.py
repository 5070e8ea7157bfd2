"""Our environments against D4RL's own.

d4rl_physics.npz was recorded from D4RL 1.1 under gym 0.23.1 and MuJoCo 2.1.0 (mujoco_py; kitchen too, in place of
dm_control), in float64. For each of 14 names it has 6 states x 24 actions, a step from every state in turn: `qpos` and
`qvel` before and after it, `extras` (what a reset draws in the model) and `goal`, `action`, `reward`, `done`, `obs` and
`next_obs`; the masses and inertias of the bodies; and mean and standard deviation of observations over 2,000 resets
(kitchen: 1,000). Kitchen's noise was off but for the resets, and all its tasks were to do before each step.
"""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from conftest import ROOT, from_pypi

from offline_envs import OfflineEnv

NUMBERS = np.load(ROOT / "tests" / "d4rl_physics.npz")
EXACT = ["hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2", "ant-medium-v2", "antmaze-umaze-v2"]
EXACT += ["antmaze-large-play-v2", "maze2d-umaze-v1", "maze2d-large-v1", "maze2d-large-dense-v1", "pen-human-v1"]
# Capsules against boxes, cylinders against boxes and meshes: there MuJoCo has other algorithms since 2.1.0. The share
# of steps whose positions are right to 1e-6, and the largest error of a position and of a reward.
TOUCHING = {
    "relocate-human-v1": (0.96, 0.02, 1e-4),
    "hammer-human-v1": (0.93, 0.02, 0.05),
    "kitchen-mixed-v0": (0.93, 0.25, 0.0),
    "door-human-v1": (0.72, 0.10, 0.05),
}
# Names of bodies and sites that a reset moves, and where.
MOVED = {
    "door": [("body_pos", "frame", slice(0, 3))],
    "hammer": [("body_pos", "nail_board", slice(0, 3))],
    "pen": [("body_quat", "target", slice(0, 4))],
    "relocate": [("body_pos", "Object", slice(0, 3)), ("site_pos", "target", slice(3, 6))],
}


class Task:
    """An environment that can be put into the recorded states."""

    def __init__(self, name, request):
        if name.startswith("antmaze"):
            request.getfixturevalue("ant")
        self.name, self.family, self.env = name, name.split("-")[0], gym.make(f"offline_envs:{name}")
        self.inner = self.env.unwrapped
        self.without_limit = self.env
        while not isinstance(self.without_limit, OfflineEnv):
            self.without_limit = self.without_limit.env
        self.robot = getattr(self.inner, "robot_env", self.inner)  # kitchen holds the simulation one deeper
        self.shift = getattr(self.inner, "offset", 0.0)  # maze2d: of D4RL's coordinates
        self.env.reset(seed=0)
        if self.family == "kitchen":
            request.getfixturevalue("monkeypatch").setattr("offline_envs.kitchen.NOISE", 0.0)
            self.robot.robot_noise_ratio = 0.0

    def recorded(self, key):
        return NUMBERS[f"{self.name}/{key}"]

    def restart(self, row):
        """The state before the step `row`, the rest of the simulation as after a reset. Returns the observation."""
        mujoco.mj_resetData(self.robot.model, self.robot.data)
        for part, name, where in MOVED.get(self.family, []):
            index = getattr(self.robot.model, part.split("_")[0])(name).id
            getattr(self.robot.model, part)[index] = self.recorded("extras")[row, where]
        if self.family == "antmaze":
            self.inner.goal = self.recorded("goal")[row]
        self.robot.set_state(self.recorded("qpos")[row] - self.shift, self.recorded("qvel")[row])
        if self.family == "kitchen":
            self.inner.tasks_to_complete = set(self.inner.goal)
            self.inner.episode_task_completions.clear()
            return self.env.get_wrapper_attr("observation")(self.inner._get_obs(self.robot._get_obs()))
        obs = self.inner._get_obs()
        return obs[0] if isinstance(obs, tuple) else obs

    def step(self, row):
        """Returns how far position, observation and reward are from the recorded ones, and whether the end is right."""
        obs, reward, done, *_ = self.without_limit.step(self.recorded("action")[row])
        position = np.abs(self.robot.data.qpos + self.shift - self.recorded("next_qpos")[row]).max()
        errors = np.abs(obs - self.recorded("next_obs")[row]).max(), abs(reward - self.recorded("reward")[row])
        return position, *errors, done == self.recorded("done")[row]


@pytest.fixture
def task(request):
    return Task(request.param, request)


def on(names):
    return pytest.mark.parametrize("task", list(names), indirect=True)


@on(EXACT)
def test_a_step_is_d4rls(task):
    """From each of the 144 states: position, observation, reward and end."""
    for row in range(144):
        assert np.abs(task.restart(row) - task.recorded("obs")[row]).max() <= 1e-9
        position, obs, reward, ends = task.step(row)
        assert position <= 1e-12
        assert max(obs, reward) <= 1e-11
        assert ends


@on(EXACT)
def test_24_steps_are_d4rls(task):
    for first in range(0, 144, 24):
        task.restart(first)
        errors = [task.step(row) for row in range(first, first + 24)]
        assert max(position for position, *_ in errors) <= 1e-9
        assert all(ends for *_, ends in errors)


@on(TOUCHING)
def test_a_step_with_contacts_is_nearly_d4rls(task):
    share, largest, largest_reward = TOUCHING[task.name]
    positions = []
    for row in range(144):
        assert np.abs(task.restart(row) - task.recorded("obs")[row]).max() <= 3e-9
        position, _, reward, ends = task.step(row)
        positions.append(position)
        assert reward <= largest_reward
        assert ends
    assert np.mean(np.array(positions) <= 1e-6) >= share
    assert max(positions) <= largest


@on([*EXACT, *TOUCHING])
def test_bodies_weigh_what_d4rls_do(task):
    masses, inertias = task.recorded("body_mass"), task.recorded("body_inertia")
    if task.family == "kitchen":  # D4RL's has a body more, without mass, that stands for a hand-held controller
        assert masses[1] < 1e-4
        masses, inertias = np.delete(masses, 1), np.delete(inertias, 1, 0)
    np.testing.assert_allclose(task.robot.model.body_mass, masses, rtol=0, atol=1e-12)
    np.testing.assert_allclose(task.robot.model.body_inertia, inertias, rtol=0, atol=1e-12)
    timestep, frame_skip = task.recorded("dt_frame_skip")
    assert (task.robot.model.opt.timestep, task.robot.frame_skip) == (timestep, frame_skip)


@pytest.mark.parametrize("name", [*EXACT, *TOUCHING])
def test_resets_are_distributed_as_d4rls(name, request):
    """Means within 4 standard errors, standard deviations within 15%."""
    if name.startswith("antmaze"):
        request.getfixturevalue("ant")
    env, count = gym.make(f"offline_envs:{name}"), 300
    obs = np.array([env.reset(seed=seed)[0] for seed in range(count)])
    mean, deviation = (NUMBERS[f"{name}/reset_obs_{what}"] for what in ("mean", "std"))
    error = deviation * np.sqrt(1 / count + 1 / 1000)
    assert (np.abs(obs.mean(0) - mean) <= 4 * error + 1e-9).all()
    assert (np.abs(obs.std(0) - deviation) <= 0.15 * deviation + 1e-9).all()


@pytest.mark.parametrize("robot", ["hopper", "halfcheetah", "walker2d", "ant"])
def test_actions_are_clipped_before_they_cost(robot):
    envs = [gym.make(f"offline_envs:{robot}-medium-v2").unwrapped for _ in range(2)]
    rewards = []
    for env, size in zip(envs, (1.0, 3.0), strict=True):
        env.reset(seed=0)
        rewards.append(env.step(size * (-1.0) ** np.arange(env.action_space.shape[0]))[1])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(("robot", "name"), [("hopper", "Hopper-v5"), ("ant", "Ant-v5"), ("door", "AdroitHandDoor-v1")])
def test_other_environments_are_left_alone(robot, name):
    """Gymnasium's own, made after ours, have the physics of today's MuJoCo."""
    ours = gym.make(f"offline_envs:{robot}-{'human-v1' if robot == 'door' else 'medium-v2'}").unwrapped.model
    theirs = gym.make(name).unwrapped
    fresh = mujoco.MjModel.from_xml_path(theirs.fullpath)
    np.testing.assert_array_equal(theirs.model.body_mass, fresh.body_mass)
    assert theirs.model.opt.disableflags == fresh.opt.disableflags
    if robot == "door":
        assert ours.opt.disableflags != fresh.opt.disableflags
    else:
        assert 1.03 < fresh.body_mass.sum() / ours.body_mass.sum() < 1.04


# --- Kitchen's noise ---


def test_kitchen_noise_has_d4rls_amplitudes(pytestconfig):
    """Each number in D4RL's own file of amplitudes, at its own joint."""
    import xml.etree.ElementTree as ElementTree

    from offline_envs.kitchen import AMPLITUDES

    path = "d4rl/kitchen/adept_envs/franka/robot/franka_config.xml"
    root = ElementTree.parse(from_pypi("d4rl==1.1", path, pytestconfig)).getroot()
    expected = [float(root.find(f"qpos{joint}").get("pos_noise_amp")) for joint in range(9, 30)]
    np.testing.assert_array_equal(AMPLITUDES, expected)
    env = gym.make("offline_envs:kitchen-mixed-v0")
    simulated = env.unwrapped.data.qpos[9:].copy
    noise = np.array([env.reset(seed=seed)[0][9:30] - simulated() for seed in range(200)])
    assert (np.abs(noise) <= 0.1 * AMPLITUDES).all()
    assert (np.abs(noise).max(0) >= 0.095 * AMPLITUDES).all()


def test_kitchen_pays_for_what_is_observed():
    """A microwave 0.304 from its goal counts as open in a third of the steps: D4RL paid in 66 of 200."""
    env = gym.make("offline_envs:kitchen-mixed-v0")
    env.reset(seed=0)
    inner, paid = env.unwrapped, 0
    for _ in range(400):
        inner.tasks_to_complete = {"microwave"}
        inner.data.qpos[22] = -0.75 + 0.304
        obs = inner._get_obs(inner.robot_env._get_obs())
        reward = inner.compute_reward(obs["achieved_goal"], inner.goal, {})
        assert reward == (abs(obs["observation"][22] + 0.75) < 0.3)
        paid += reward
    assert 0.2 < paid / 400 < 0.4
