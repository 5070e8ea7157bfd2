"""D4RL's kitchen: Gymnasium-Robotics' FrankaKitchen with D4RL's observations, noise and rewards."""

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium_robotics.envs.franka_kitchen.kitchen_env import (
    BONUS_THRESH,
    OBS_ELEMENT_GOALS,
    OBS_ELEMENT_INDICES,
    KitchenEnv,
)

from .datasets import SERVER, best_rewards, read
from .mujoco210 import collide_as_before, weigh_capsules
from .offline_env import register

NOISE = 0.1  # times a uniform number in [-1, 1] and the amplitude of a joint (radians or meters)
# Of the 21 positions of objects: burners' knobs and light switch (10), slide and hinges (3), microwave, the kettle's
# position and quaternion. Gymnasium-Robotics takes each from the joint before.
AMPLITUDES = np.array([5e-3] * 2 + [5e-4] * 6 + [5e-3] * 3 + [0.1] * 3 + [5e-3] * 3 + [0.1] * 3 + [5e-3])


class Noisy(KitchenEnv):
    """FrankaKitchen with D4RL's noise, which decides what counts as done as well."""

    def _get_obs(self, robot_obs):
        noise = NOISE * AMPLITUDES * self.robot_env.np_random.uniform(-1, 1, 21)
        positions = np.concatenate([robot_obs[:9], self.data.qpos[9:] + noise])
        achieved = {task: positions[OBS_ELEMENT_INDICES[task]] for task in self.goal}
        return {"observation": positions, "achieved_goal": achieved, "desired_goal": self.goal}


class Kitchen(gym.ObservationWrapper):
    """The observation (60,) is 9 joints of the robot, 21 positions of objects, both with noise, and the 30 positions of
    the goal, 0 where they do not matter. Each of `tasks` pays 1 once, when its objects, as they are observed, are
    within 0.3 of the goal; all of them end the episode. D4RL's data pay in every step for each task that is done then,
    which `info` has as "data_reward", and have a terminal where a demonstration ends."""

    def __init__(self, tasks, render_mode=None):
        super().__init__(Noisy(tasks_to_complete=list(tasks), render_mode=render_mode, robot_noise_ratio=NOISE))
        robot = self.env.robot_env
        weigh_capsules(robot.model, robot.fullpath)
        collide_as_before(robot.model)
        mujoco.mj_normalizeQuat(robot.model, robot.init_qpos)  # the kettle's, which 2.1.0 does at the first reset
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.goal = np.zeros(30)
        for task in tasks:
            self.goal[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        distances = [np.linalg.norm(observation["achieved_goal"][task] - goal) for task, goal in self.env.goal.items()]
        done = sum(distance < BONUS_THRESH for distance in distances)
        return self.observation(observation), reward, terminated, truncated, info | {"data_reward": float(done)}

    def observation(self, observation):
        return np.concatenate([observation["observation"], self.goal])

    def read(self, file, mask=None):
        arrays = read(file, mask)
        arrays.setdefault("timeouts", np.zeros(len(arrays["terminals"]), bool))  # no demonstration is cut at 280 steps
        return best_rewards(arrays, (arrays["terminals"] > 0) | (arrays["timeouts"] > 0))


TASKS = {  # file, and the two tasks beside microwave and kettle
    "complete": ("mini_kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "partial": ("kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "mixed": ("kitchen_microwave_kettle_bottomburner_light", "bottom burner", "light switch"),
}
for data, (file, *tasks) in TASKS.items():
    url = f"{SERVER}/kitchen/{file}-v0.hdf5"
    register(f"kitchen-{data}-v0", 280, Kitchen, url, 0.0, 4.0, tasks=["microwave", "kettle", *tasks])
