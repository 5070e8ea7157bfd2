"""D4RL's antmaze: D4RL's ant between D4RL's walls, under Gymnasium's MujocoEnv and the physics of MuJoCo 2.1.0."""

import importlib.util
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from .datasets import SERVER, best_rewards, read
from .maze2d import MAZES
from .mujoco210 import Mujoco210
from .offline_env import register

ENDS = {  # cells of start and goal
    "umaze": ((1, 1), (3, 1)),
    "medium": ((1, 1), (6, 6)),
    "large": ((1, 1), (7, 9)),
    "eval-umaze": ((1, 3), (3, 3)),
    "eval-medium": ((1, 1), (1, 6)),
    "eval-large": ((1, 1), (1, 9)),
}


class AntMaze(Mujoco210, MujocoEnv):
    """D4RL's antmaze: reward 1 and the end of the episode within 0.5 of the goal, which is not observed.

    The observation (29,) is the ant's positions, x and y first, and its velocities. Cells are 4 wide; the ant starts at
    the origin, the centre of its cell. The goal lies up to 1.5 beyond the centre of its cell, anew in every episode,
    or, with `fixed_goal`, as in D4RL's first version, at one place for good. In D4RL's data the ant walks on from the
    goal; each step that ends there has a terminal and reward 1.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 10}

    def __init__(self, maze, fixed_goal=False, render_mode=None):
        package = importlib.util.find_spec("d4rl")  # finds its folder without importing it, which needs mujoco_py
        if package is None:
            raise gym.error.DependencyNotInstalled("antmaze needs D4RL's ant: pip install --no-deps d4rl==1.1")
        tree = ElementTree.parse(Path(package.submodule_search_locations[0]) / "locomotion" / "assets" / "ant.xml")
        cells = np.array([list(row) for row in MAZES[maze].split()])
        self.fixed_goal, self.goal = fixed_goal, None
        start, goal = map(np.array, ENDS[maze])
        self.goal_cell = 4.0 * (goal - start)[::-1]  # (x, y): x runs along columns
        for y, x in 4.0 * (np.argwhere(cells == "#") - start):
            wall = {"type": "box", "pos": f"{x} {y} 1", "size": "2 2 1", "contype": "1", "conaffinity": "1"}
            ElementTree.SubElement(tree.find(".//worldbody"), "geom", wall)
        with tempfile.TemporaryDirectory() as folder:
            tree.write(f"{folder}/antmaze.xml")
            observed = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
            super().__init__(f"{folder}/antmaze.xml", 5, observed, render_mode=render_mode)
        self.action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def _get_obs(self):
        return np.concatenate([self.data.qpos[:15], self.data.qvel[:14]])

    def step(self, action):
        self.do_simulation(30 * np.clip(action, -1, 1), self.frame_skip)  # torques of up to 30
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self._get_obs(), float(reached), reached, False, {"success": reached}

    def read(self, file, mask=None):
        arrays = read(file, mask)
        position = arrays["observations"][:, :2]
        # The timeouts of the first version of these data are misplaced: no ant gets 2 further in a tenth of a second.
        jumps = np.append(np.linalg.norm(np.diff(position, axis=0), axis=1) > 2, True)
        timeouts = arrays["timeouts"] > 0 if "timeouts" in arrays else False
        arrays["timeouts"] = jumps | timeouts
        return best_rewards(arrays, arrays["timeouts"])

    def reset_model(self):
        if self.goal is None or not self.fixed_goal:
            beyond = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
            self.goal = np.maximum(self.goal_cell + beyond, 0)
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq), 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(self.init_qpos + noise[0], self.init_qvel + noise[1])
        return self._get_obs()


NAMES = {  # what files call the maze, whether their starts and their goals vary
    "umaze": ("u-maze", False, False),
    "umaze-diverse": ("u-maze", True, True),
    "medium-play": ("big-maze", True, False),
    "medium-diverse": ("big-maze", True, True),
    "large-play": ("hardest-maze", True, False),
    "large-diverse": ("hardest-maze", True, True),
    "eval-umaze": ("umaze_eval", True, False),
    "eval-umaze-diverse": ("umaze_eval", True, True),
    "eval-medium-play": ("medium_eval", True, True),
    "eval-medium-diverse": ("medium_eval", True, False),
    "eval-large-play": ("large_eval", True, True),
    "eval-large-diverse": ("large_eval", True, False),
}
for data, (called, starts, goals) in NAMES.items():
    maze = data.removesuffix("-diverse").removesuffix("-play")
    kind = f"noisy_multistart_{starts}_multigoal_{goals}_sparse"
    files = [f"ant_maze_new/Ant_maze_{called}_{kind}"]
    if "eval" not in data:
        files += [f"ant_maze_v1/Ant_maze_{maze}_{kind}", f"ant_maze_v2/Ant_maze_{called}_{kind}_fixed"]
    for version, file in enumerate(files):
        kwargs = {"maze": maze, "fixed_goal": version < 2}
        steps = 700 if "umaze" in maze else 1000
        register(f"antmaze-{data}-v{version}", steps, AntMaze, f"{SERVER}/{file}.hdf5", 0.0, 1.0, **kwargs)
