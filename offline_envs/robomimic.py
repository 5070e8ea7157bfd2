"""robomimic's tasks in robosuite, and the layout of its files."""

import json
import logging

import gymnasium as gym
import h5py
import numpy as np

from .datasets import ROBOMIMIC_SERVER, best_rewards, join, same_length, split_mask
from .offline_env import register


class Robomimic(gym.Env):
    """A robosuite task, made as the dataset in `path` says, ending in success with reward 1: the mean return over
    episodes is robomimic's success rate. The observation holds, of each arm, the end effector's position (3) and
    quaternion (4) and the gripper (2), then the object's state: what robomimic's own low-dimensional agents see."""

    suite, metadata = "robomimic", {"render_modes": []}

    def __init__(self, task, path, render_mode=None):
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        try:
            import robosuite
        except ImportError as error:
            raise ImportError(f"pip install -r requirements-robomimic.txt first: {error}") from error
        with h5py.File(split_mask(path)[0]) as file:
            env_args = json.loads(file["data"].attrs["env_args"])
        if env_args["env_name"] != task:
            raise gym.error.Error(f"{path} is of the task {env_args['env_name']}, not {task}")
        headless = dict(has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, camera_depths=False)
        sparse = dict(use_object_obs=True, reward_shaping=False, ignore_done=True)
        before = np.random.get_state()  # robosuite draws from NumPy's global generator
        self.robosuite = robosuite.make(task, **env_args["env_kwargs"] | headless | sparse)
        np.random.set_state(before)
        arms = [robot.robot_model.naming_prefix for robot in self.robosuite.robots]
        self.keys = [arm + part for arm in arms for part in ("eef_pos", "eef_quat", "gripper_qpos")] + ["object"]
        size = len(self.observe(self.robosuite.observation_spec()))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (self.robosuite.action_dim,), np.float32)

    def observe(self, observed):
        return np.concatenate([observed["object-state" if key == "object" else key] for key in self.keys])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        before = np.random.get_state()
        np.random.seed(self.np_random.integers(2**32))
        observed = self.robosuite.reset()
        np.random.set_state(before)
        return self.observe(observed), {}

    def step(self, action):
        observed, *_ = self.robosuite.step(action)
        success = bool(self.robosuite._check_success())
        return self.observe(observed), float(success), success, False, {"success": success}

    def close(self):
        self.robosuite.close()

    def read(self, file, mask=None):
        """Every demonstration, or those of a mask, in the order of their numbers."""
        if mask and mask not in file.get("mask", ()):
            raise ValueError(f"it has no mask {mask}, but {', '.join(file.get('mask', ())) or 'none'}")
        names = [name.decode() for name in file["mask"][mask]] if mask else list(file["data"])
        episodes = []
        for name in sorted(names, key=lambda name: (len(name), name)):  # demo_2 before demo_10
            try:
                demo = file["data"][name]
                episode = {"actions": demo["actions"], "rewards": demo["rewards"], "terminals": demo["dones"]}
                for key, group in [("observations", "obs"), ("next_observations", "next_obs")]:
                    if group in demo:
                        episode[key] = np.concatenate([demo[group][part] for part in self.keys], 1)
                episodes.append(same_length(episode))
            except (KeyError, ValueError) as error:
                raise ValueError(f"{name} is not complete: {error}") from error
        arrays = join(episodes)
        return best_rewards(arrays, arrays["timeouts"])


TASKS = {  # robosuite's name, and robomimic's horizons for demonstrations of one and of several operators
    "lift": ("Lift", 400, 500),
    "can": ("PickPlaceCan", 400, 500),
    "square": ("NutAssemblySquare", 400, 500),
    "tool-hang": ("ToolHang", 700, None),
    "transport": ("TwoArmTransport", 700, 1100),
}
for name, (task, *horizons) in TASKS.items():
    for data, steps in zip(("ph", "mh"), horizons, strict=True):
        if steps:
            url = f"{ROBOMIMIC_SERVER}/{name.replace('-', '_')}/{data}/low_dim_v141.hdf5"
            register(f"{name}-{data}", steps, Robomimic, url, 0.0, 1.0, task=task)
