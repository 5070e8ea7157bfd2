"""D4RL's maze2d: Gymnasium-Robotics' point in D4RL's mazes and coordinates."""

import os
from pathlib import Path

import numpy as np
from gymnasium_robotics.envs.maze import point
from gymnasium_robotics.envs.maze.maze_v4 import Maze

from .datasets import SERVER, read
from .offline_env import register

MAZES = {
    "open": "####### #OOOOO# #OOGOO# #OOOOO# #######",
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
    "############",
    "eval-umaze": "##### #OOG# #O### #OOO# #####",
    "eval-medium": "######## #OOOOOG# #O#O##O# #OOOO#O# ###OO### #OOOOOO# #OO##OO# ########",
    "eval-large": "############ #OO#OOO#OGO# ##O###O#O#O# #OO#O#OOOOO# #O##O#OO##O# #OOOOOO#OOO# #O##O#O#O### "
    "#OOOO#OOOOO# ############",
}


class Maze2d(point.PointEnv):
    """D4RL's maze2d: a force-actuated ball, reward 1 within 0.5 of the goal (dense: exp(-distance)), no termination.

    The observation is (x, y, vx, vy) in D4RL's coordinates, where cell (row, column) of the maze is reached at
    about x = row, y = column. An episode starts in a random free cell, or always in `start`. D4RL's data are one long
    walk to ever new goals; what is called a timeout there marks the step in which one of them was reached.
    """

    def __init__(self, maze, dense=False, start=None, render_mode=None):
        cells = np.array([list(row) for row in MAZES[maze].split()])
        # Gymnasium-Robotics draws a maze from above, D4RL by matrix index: a quarter turn and a shift apart.
        walls = np.rot90(cells == "#").astype(int).tolist()
        _, xml_file = Maze.make_maze(str(Path(point.__file__).parent / "../assets/point/point.xml"), walls, 1, 0.4)
        super().__init__(xml_file=xml_file, render_mode=render_mode)
        os.remove(xml_file)
        # MuJoCo 2.1.0 averages over three axes how easily the ball is pushed, though it moves along two.
        self.model.body_invweight0[1, 0] *= 2 / 3
        self.cells, self.offset = cells, np.array(cells.shape) / 2 - 0.7
        self.goal = np.argwhere(cells == "G")[0]
        self.starts = np.concatenate([np.argwhere(cells == "O"), [self.goal]]) if start is None else np.array([start])
        self.dense = dense

    def _get_obs(self):
        return np.concatenate([self.data.qpos + self.offset, self.data.qvel]), {}

    def step(self, action):
        obs, *_, info = super().step(action)
        distance = np.linalg.norm(obs[:2] - self.goal)
        reward = np.exp(-distance) if self.dense else distance <= 0.5
        return obs, float(reward), False, False, info

    def read(self, file, mask=None):
        arrays = read(file, mask)
        if "timeouts" not in arrays and "terminals" in arrays:  # D4RL's generator calls these marks terminals
            arrays |= {"timeouts": arrays["terminals"], "terminals": np.zeros(len(arrays["terminals"]), bool)}
        return arrays

    def reset_model(self):
        cell = self.starts[self.np_random.integers(len(self.starts))]
        position = cell + self.np_random.uniform(-0.1, 0.1, size=2)
        self.set_state(position - self.offset, 0.1 * self.np_random.standard_normal(2))
        return self._get_obs()[0]


NAMES = {  # steps, then the return of a random and of an expert policy: sparse reward, dense reward
    "open-v0": (150, (0.01, 20.66), (11.17817, 27.166538620695782)),
    "umaze-v0": (150, (0.94, 62.6), (23.249793, 81.78995240126592)),
    "medium-v0": (250, (5.77, 85.14), (19.477620, 96.03474232952358)),
    "large-v0": (600, (4.83, 191.99), (27.388310, 215.09965671563742)),
    "umaze-v1": (300, (23.85, 161.86), (68.537689, 193.66285642381482)),
    "medium-v1": (600, (13.13, 277.39), (44.264742, 297.4552547777125)),
    "large-v1": (800, (6.7, 273.99), (30.569041, 303.4857382709002)),
    "eval-umaze-v1": (300, (36.63, 141.4), (56.95455, 178.21373133248397)),
    "eval-medium-v1": (600, (13.07, 204.93), (42.28578, 235.5658957482388)),
    "eval-large-v1": (800, (16.4, 302.22), (56.95455, 326.09647655082637)),
}
for name, (steps, *returns) in NAMES.items():
    maze, version = name.rsplit("-", 1)
    for reward, (low, high) in zip(("sparse", "dense"), returns, strict=True):
        file = f"maze2d-{maze}-{reward}" + (f"-{version}" if version != "v0" else "")
        full_name = f"maze2d-{maze}-{version}" if reward == "sparse" else f"maze2d-{maze}-dense-{version}"
        url = f"{SERVER}/maze2d/{file}.hdf5"
        register(full_name, steps, Maze2d, url, low, high, maze=maze, dense=reward == "dense")

# The diagnosis experiment of SAQ (Luo et al., 2023, Sec. 4.3): one start, three demonstrations. The paper does not
# name its start cell; (1, 1) is the corner opposite to the goal.
demos = Path(__file__).parents[1] / "demos" / "maze2d-large-demos-v1.hdf5"
register("maze2d-large-demos-v1", 800, Maze2d, demos, 6.7, 273.99, maze="large", start=(1, 1))
