"""D4RL's hopper, halfcheetah, walker2d and ant: Gymnasium's `-v4` under the physics of MuJoCo 2.1.0."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from .datasets import SERVER
from .mujoco210 import Mujoco210
from .offline_env import register


class Robot(Mujoco210):
    def step(self, action):
        return super().step(np.asarray(action).clip(-1, 1))  # before its cost is taken, as D4RL's wrapper does


class Hopper(Robot, HopperEnv):
    pass


class HalfCheetah(Robot, HalfCheetahEnv):
    pass


class Walker2d(Robot, Walker2dEnv):
    pass


class Ant(Robot, AntEnv):
    """Observes 84 contact forces (111 numbers in all), which were always zero under D4RL's MuJoCo."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def _get_obs(self):
        return np.concatenate([super()._get_obs(), np.zeros(84)])


ROBOTS = {  # return of a random and of an expert policy
    "hopper": (Hopper, -20.272305, 3234.3),
    "halfcheetah": (HalfCheetah, -280.178953, 12135.0),
    "walker2d": (Walker2d, 1.629008, 4592.3),
    "ant": (Ant, -325.6, 3879.7),
}
for robot, (base, low, high) in ROBOTS.items():
    for data in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
        file = f"{robot}_{data}".replace("-", "_")
        # The first version of the files had no full-replay, and called the replay data "mixed".
        first = file.replace("medium_replay", "mixed").replace("walker2d_mixed", "walker_mixed")
        urls = [f"{SERVER}/gym_mujoco/{first}.hdf5"] if data != "full-replay" else [None]
        urls += [f"{SERVER}/gym_mujoco_v{version}/{file}-v{version}.hdf5" for version in (1, 2)]
        for version, url in enumerate(urls):
            if url is not None:
                register(f"{robot}-{data}-v{version}", 1000, base, url, low, high)
register("ant-random-expert-v0", 1000, Ant, f"{SERVER}/gym_mujoco/ant_random_expert.hdf5", *ROBOTS["ant"][1:])
