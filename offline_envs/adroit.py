"""D4RL's pen, door, hammer and relocate: Gymnasium-Robotics' Adroit hand with D4RL's rewards and collisions."""

import contextlib
import io

import numpy as np

with contextlib.redirect_stderr(io.StringIO()):  # the package warns of its rewards, which are repaired below
    from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_hammer import AdroitHandHammerEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_relocate import AdroitHandRelocateEnv

from .datasets import SERVER
from .mujoco210 import collide_as_before
from .offline_env import register


class Hand:
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        collide_as_before(self.model)


class Reaching(Hand):
    """Gymnasium-Robotics 1.4 rewards the palm for staying away from what it should take, +0.1 |palm - object|, where
    D4RL has -0.1. `gap` reads palm - object off the observation."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, float(reward - 0.2 * np.linalg.norm(self.gap(obs))), terminated, truncated, info


class Door(Reaching, AdroitHandDoorEnv):
    def gap(self, obs):
        return obs[35:38]


class Hammer(Reaching, AdroitHandHammerEnv):
    def gap(self, obs):
        return obs[33:36] - obs[36:39]


class Relocate(Reaching, AdroitHandRelocateEnv):
    def gap(self, obs):
        return obs[30:33]


class Pen(Hand, AdroitHandPenEnv):
    """D4RL's episode ends when the pen, whose position is observed at [24:27], falls out of the hand."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, float(reward), bool(obs[26] < 0.075), truncated, info


HANDS = {  # steps, steps of "longhorizon", return of a random and of an expert policy
    "pen": (Pen, 100, 200, 96.262799, 3076.8331017826877),
    "door": (Door, 200, 300, -56.512833, 2880.5693087298737),
    "hammer": (Hammer, 200, 600, -274.856578, 12794.134825156867),
    "relocate": (Relocate, 200, 500, -6.425911, 4233.877797728884),
}
FIRST = {"human": "{}-v0_demos_clipped", "cloned": "{}-demos-v0-bc-combined", "expert": "{}-v0_expert_clipped"}
for task, (base, steps, long, low, high) in HANDS.items():
    for data, file in FIRST.items():
        urls = [f"{SERVER}/hand_dapg/{file.format(task)}.hdf5", f"{SERVER}/hand_dapg_v1/{task}-{data}-v1.hdf5"]
        for version, url in enumerate(urls):
            register(f"{task}-{data}-v{version}", steps, base, url, low, high)
            if data == "human":
                register(f"{task}-human-longhorizon-v{version}", long, base, url, low, high)
