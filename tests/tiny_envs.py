"""Environments of five steps, well-behaved and otherwise: `--env tiny_envs:Tiny-v0`.

The variable TINY says what goes wrong: "raise", "nan", "inf", or the name of a signal that the process then gets.
TINY_AT: in which step of all, counted from 1, of the environments in this process together.
"""

import os
import signal

import gymnasium as gym
import numpy as np

STEPS = 0


class Tiny(gym.Env):
    """Walks where it is pushed; the reward is the nearness to 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, render_mode=None, size=1, dtype=np.float32):
        self.render_mode = render_mode
        low = 0 if dtype == np.uint8 else -1
        self.action_space = gym.spaces.Box(low, 1, (size,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=3).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        global STEPS
        STEPS += 1
        wrong = os.environ.get("TINY") if int(os.environ.get("TINY_AT", 1)) <= STEPS else None
        if wrong == "raise":
            raise ValueError("the robot\nfell over")
        if wrong and wrong.startswith("SIG") and int(os.environ.get("TINY_AT", 1)) == STEPS:
            os.kill(os.getpid(), signal.Signals[wrong])
        self.place = (self.place + 0.1 * np.resize(action, 3)).astype(np.float32)
        reward = float(wrong) if wrong in ("nan", "inf") else -float(np.abs(self.place).sum())
        return self.place.copy(), reward, False, False, {}

    def render(self):
        return np.full((64, 64, 3), 200, np.uint8)


class Dark(Tiny):
    """Cannot be filmed."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode=None):
        if render_mode:
            raise RuntimeError("no screen\nhere")
        super().__init__()


gym.register("Tiny-v0", Tiny, max_episode_steps=5)
gym.register("Bytes-v0", Tiny, max_episode_steps=5, kwargs={"dtype": np.uint8})
gym.register("Endless-v0", Tiny)
gym.register("Dark-v0", Dark, max_episode_steps=5)
