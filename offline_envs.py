"""D4RL's tasks for today's Gymnasium: the environments, datasets and reference scores, without mujoco_py.

This module is a Gymnasium plugin. It is never imported, Gymnasium loads it by name:

    env = gymnasium.make("offline_envs:hopper-expert-v2")
    dataset = env.get_wrapper_attr("get_dataset")()                        # dict of arrays in D4RL's layout
    score = 100 * env.get_wrapper_attr("get_normalized_score")(episode_return)

| names                                                | physics behind them                                      |
|------------------------------------------------------|----------------------------------------------------------|
| {hopper,halfcheetah,walker2d,ant}-*-v{0,1,2}         | Gymnasium's `-v4` environments                           |
| {pen,door,hammer,relocate}-*-v{0,1}                  | Gymnasium-Robotics' Adroit hand, D4RL's rewards          |
| kitchen-{complete,partial,mixed}-v0                  | Gymnasium-Robotics' FrankaKitchen, D4RL's observation    |
| antmaze-umaze{,-diverse}-v{0,2},                     | D4RL's ant and walls under Gymnasium's MujocoEnv; needs  |
| antmaze-{medium,large}-{play,diverse}-v{0,2}         | `pip install --no-deps d4rl==1.1`, for the robot's file  |
| maze2d-{umaze,medium,large}-v1, ...-dense-v1         | Gymnasium-Robotics' point, D4RL's mazes and coordinates  |
| maze2d-large-demos-v1                                | the same, from a fixed start; its data is in demos/      |

Datasets are read from ~/.d4rl/datasets (or $D4RL_DATASET_DIR) and downloaded there once. `get_dataset(path)` reads
any other file. URLs and reference scores are those of D4RL 1.1 (Fu et al., 2020, arXiv:2004.07219).
"""

import contextlib
import http.client
import importlib.util
import io
import os
import tempfile
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from tqdm import tqdm

with contextlib.redirect_stderr(io.StringIO()):  # the package warns of its Adroit rewards, which are repaired below
    from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_hammer import AdroitHandHammerEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_relocate import AdroitHandRelocateEnv
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES, KitchenEnv
    from gymnasium_robotics.envs.maze import point
    from gymnasium_robotics.envs.maze.maze_v4 import Maze

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
DEMOS = Path(__file__).parent / "demos"

# D4RL's names carry the version of the *dataset*; Gymnasium would advise "hopper-expert-v2" in place of v0.
warnings.filterwarnings("ignore", message=r".*The environment .*-v\d is out of date.*")


# --- Datasets and scores ---


class OfflineEnv(gym.Wrapper):
    """An environment that knows its D4RL dataset and reference scores.

    `dataset` is the URL of an HDF5 file, or the path of one that ships with this module.
    `ref_min_score` and `ref_max_score` are the returns of a random and of an expert policy: D4RL's 0 and 1.
    """

    def __init__(self, env, dataset, ref_min_score, ref_max_score):
        super().__init__(env)
        self.dataset, self.ref_min_score, self.ref_max_score = dataset, ref_min_score, ref_max_score

    def get_normalized_score(self, episode_return):
        """0 for D4RL's random policy, 1 for its expert. The tables of papers print 100 times this number."""
        return (episode_return - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)

    def provenance(self, h5path=None):
        """What a score over the data in `h5path`, by default the task's own, may be compared with: one sentence."""
        official = isinstance(self.dataset, str) and Path(h5path or self.dataset).name == Path(self.dataset).name
        data = "the data are D4RL's" if official else "the data are not D4RL's, so do not compare with D4RL's tables"
        return f"Score: 0 at a return of {self.ref_min_score:g}, 100 at {self.ref_max_score:g}; {data}."

    @property
    def dataset_filepath(self):
        """Where the dataset lies, or will lie once downloaded."""
        if isinstance(self.dataset, Path):
            return self.dataset
        folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
        return folder / self.dataset.rsplit("/", 1)[-1]

    def get_dataset(self, h5path=None):
        """Returns the file's `observations (N, O)`, `actions (N, A)`, `rewards (N,)`, `terminals (N,)`, and
        `timeouts (N,)` and `next_observations (N, O)` where the file has them. Raises OSError with one sentence
        when the file cannot be had or read."""
        path = Path(h5path or self.dataset_filepath)
        if h5path is None and not path.exists() and not isinstance(self.dataset, Path):
            download(self.dataset, path)
        keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        try:
            with h5py.File(path) as file:
                return {key: file[key][:] for key in keys if key in file}
        except OSError as error:
            raise OSError(f"{path} cannot be read as HDF5 ({error}): delete it to download it again.") from error


def download(url, path):
    """Downloads `url` to `path`, whole or not at all: under a temporary name first, renamed once its size is right."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    by_hand = f"Download it by hand and put it at {path}, or pass --dataset-path."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            size = int(response.headers["Content-Length"])
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(1 << 20):
                    bar.update(file.write(chunk))
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
        part.rename(path)
    except (OSError, http.client.HTTPException, TypeError) as error:  # TypeError: no length to check against
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{url} could not be downloaded ({reason}). {by_hand}") from error
    finally:
        part.unlink(missing_ok=True)


# --- Environments that differ from today's packages ---


class PadObservation(gym.ObservationWrapper):
    """D4RL's Ant observes 84 contact forces that its MuJoCo always reported as zero: (27,) becomes (111,)."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def observation(self, observation):
        return np.concatenate([observation, np.zeros(84)])


def reach(step, gap):
    """Repairs the reward of a step: Gymnasium-Robotics 1.4 rewards the palm for staying away from what it should take,
    +0.1 |palm - object|, where D4RL has -0.1. `gap` reads palm - object off the observation."""
    obs, reward, terminated, truncated, info = step
    return obs, float(reward - 0.2 * np.linalg.norm(gap(obs))), terminated, truncated, info


class Door(AdroitHandDoorEnv):
    def step(self, action):
        return reach(super().step(action), lambda obs: obs[35:38])


class Hammer(AdroitHandHammerEnv):
    def step(self, action):
        return reach(super().step(action), lambda obs: obs[33:36] - obs[36:39])


class Relocate(AdroitHandRelocateEnv):
    def step(self, action):
        return reach(super().step(action), lambda obs: obs[30:33])


class Pen(AdroitHandPenEnv):
    """D4RL's episode ends when the pen, whose position is observed at [24:27], falls out of the hand."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, float(reward), bool(obs[26] < 0.075), truncated, info


class Kitchen(gym.ObservationWrapper):
    """FrankaKitchen with D4RL's noise of 0.1 and its 60 observations: 9 joints of the robot, 21 positions of objects,
    and the 30 positions of the goal, 0 where they do not matter. Each task pays 1 once; all of them end the episode."""

    def __init__(self, tasks, render_mode=None):
        noise = {"robot_noise_ratio": 0.1, "object_noise_ratio": 0.1}
        super().__init__(KitchenEnv(tasks_to_complete=list(tasks), render_mode=render_mode, **noise))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (60,), np.float64)
        self.goal = np.zeros(30)
        for task in tasks:
            self.goal[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]

    def observation(self, observation):
        joints_and_objects = observation["observation"]
        return np.concatenate([joints_and_objects[:9], joints_and_objects[18:39], self.goal])


MAZES = {
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
    "############",
}


class Maze2d(point.PointEnv):
    """D4RL's maze2d: a force-actuated ball, reward 1 within 0.5 of the goal (dense: exp(-distance)), no termination.

    The observation is (x, y, vx, vy) in D4RL's coordinates, where cell (row, column) of the maze is reached at
    about x = row, y = column. An episode starts in a random free cell, or always in `start`.
    """

    def __init__(self, maze, dense=False, start=None, render_mode=None):
        cells = np.array([list(row) for row in MAZES[maze].split()])
        # Gymnasium-Robotics draws a maze from above, D4RL by matrix index: a quarter turn and a shift apart.
        walls = np.rot90(cells == "#").astype(int).tolist()
        _, xml_file = Maze.make_maze(str(Path(point.__file__).parent / "../assets/point/point.xml"), walls, 1, 0.4)
        super().__init__(xml_file=xml_file, render_mode=render_mode)
        os.remove(xml_file)
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

    def reset_model(self):
        cell = self.starts[self.np_random.integers(len(self.starts))]
        position = cell + self.np_random.uniform(-0.1, 0.1, size=2)
        self.set_state(position - self.offset, 0.1 * self.np_random.standard_normal(2))
        return self._get_obs()[0]


ANT_MAZES = {
    "umaze": "##### #ROO# ###O# #GOO# #####",
    "medium": "######## #RO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #ROOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
    "############",
}


class AntMaze(MujocoEnv):
    """D4RL's antmaze: reward 1 and the end of the episode within 0.5 of the goal, which is not observed.

    The observation (29,) is the ant's positions, x and y first, and its velocities. Cells are 4 wide, the ant starts at
    the origin, in the cell marked R. The goal lies up to 1.5 beyond the centre of the cell marked G, anew in every
    episode, or, with `fixed_goal`, as in D4RL's first version, at one place for good.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 10}

    def __init__(self, maze, fixed_goal=False, render_mode=None):
        package = importlib.util.find_spec("d4rl")  # finds its folder without importing it, which needs mujoco_py
        if package is None:
            raise gym.error.DependencyNotInstalled("antmaze needs D4RL's ant: pip install --no-deps d4rl==1.1")
        tree = ElementTree.parse(Path(package.submodule_search_locations[0]) / "locomotion" / "assets" / "ant.xml")
        cells = np.array([list(row) for row in ANT_MAZES[maze].split()])
        self.fixed_goal, self.goal = fixed_goal, None
        start = np.argwhere(cells == "R")[0]
        self.goal_cell = 4.0 * (np.argwhere(cells == "G")[0] - start)[::-1]  # (x, y): x runs along columns
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

    def reset_model(self):
        if self.goal is None or not self.fixed_goal:
            beyond = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
            self.goal = np.maximum(self.goal_cell + beyond, 0)
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq), 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(self.init_qpos + noise[0], self.init_qvel + noise[1])
        return self._get_obs()


# --- D4RL's names ---


def make(base, dataset, ref_min_score, ref_max_score, render_mode=None, **kwargs):
    """The entry point behind every name: the environment `base` with its dataset and reference scores."""
    if isinstance(base, str):
        with warnings.catch_warnings():  # "-v4 is out of date": it is the version whose physics is D4RL's
            warnings.simplefilter("ignore")
            env = gym.make(base, render_mode=render_mode, **kwargs).unwrapped
    else:
        env = base(render_mode=render_mode, **kwargs)
    if base == "Ant-v4":
        env = PadObservation(env)
    return OfflineEnv(env, dataset, ref_min_score, ref_max_score)


def register(name, steps, **kwargs):
    gym.register(name, entry_point=f"{__name__}:make", max_episode_steps=steps, kwargs=kwargs)


LOCOMOTION = {  # return of a random and of an expert policy
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
    "ant": ("Ant-v4", -325.6, 3879.7),
}
for robot, (base, low, high) in LOCOMOTION.items():
    for data in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
        file = f"{robot}_{data}".replace("-", "_")
        # The first version of the files had no full-replay, and called the replay data "mixed".
        first = file.replace("medium_replay", "mixed").replace("walker2d_mixed", "walker_mixed")
        urls = [f"{SERVER}/gym_mujoco/{first}.hdf5"] if data != "full-replay" else [None]
        urls += [f"{SERVER}/gym_mujoco_v{version}/{file}-v{version}.hdf5" for version in (1, 2)]
        for version, url in enumerate(urls):
            if url is not None:
                name = f"{robot}-{data}-v{version}"
                register(name, 1000, base=base, dataset=url, ref_min_score=low, ref_max_score=high)

ADROIT = {  # steps, return of a random and of an expert policy
    "pen": (Pen, 100, 96.262799, 3076.8331017826877),
    "door": (Door, 200, -56.512833, 2880.5693087298737),
    "hammer": (Hammer, 200, -274.856578, 12794.134825156867),
    "relocate": (Relocate, 200, -6.425911, 4233.877797728884),
}
ADROIT_V0 = {"human": "{}-v0_demos_clipped", "cloned": "{}-demos-v0-bc-combined", "expert": "{}-v0_expert_clipped"}
for task, (base, steps, low, high) in ADROIT.items():
    for data, file in ADROIT_V0.items():
        for version, url in enumerate([f"hand_dapg/{file.format(task)}.hdf5", f"hand_dapg_v1/{task}-{data}-v1.hdf5"]):
            kwargs = {"dataset": f"{SERVER}/{url}", "ref_min_score": low, "ref_max_score": high}
            register(f"{task}-{data}-v{version}", steps, base=base, **kwargs)

KITCHEN = {  # file, and the two tasks beside microwave and kettle
    "complete": ("mini_kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "partial": ("kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "mixed": ("kitchen_microwave_kettle_bottomburner_light", "bottom burner", "light switch"),
}
for data, (file, *tasks) in KITCHEN.items():
    kwargs = {"tasks": ["microwave", "kettle", *tasks], "ref_min_score": 0.0, "ref_max_score": 4.0}
    register(f"kitchen-{data}-v0", 280, base=Kitchen, dataset=f"{SERVER}/kitchen/{file}-v0.hdf5", **kwargs)

ANTMAZE = {  # maze and steps, file
    "umaze": ("umaze", 700, "u-maze_noisy_multistart_False_multigoal_False_sparse"),
    "umaze-diverse": ("umaze", 700, "u-maze_noisy_multistart_True_multigoal_True_sparse"),
    "medium-play": ("medium", 1000, "big-maze_noisy_multistart_True_multigoal_False_sparse"),
    "medium-diverse": ("medium", 1000, "big-maze_noisy_multistart_True_multigoal_True_sparse"),
    "large-play": ("large", 1000, "hardest-maze_noisy_multistart_True_multigoal_False_sparse"),
    "large-diverse": ("large", 1000, "hardest-maze_noisy_multistart_True_multigoal_True_sparse"),
}
for data, (maze, steps, file) in ANTMAZE.items():
    for version, url in [(0, f"ant_maze_new/Ant_maze_{file}"), (2, f"ant_maze_v2/Ant_maze_{file}_fixed")]:
        kwargs = {"maze": maze, "fixed_goal": version == 0, "ref_min_score": 0.0, "ref_max_score": 1.0}
        register(f"antmaze-{data}-v{version}", steps, base=AntMaze, dataset=f"{SERVER}/{url}.hdf5", **kwargs)

MAZE2D = {  # steps, then the return of a random and of an expert policy: sparse reward, dense reward
    "umaze": (300, (23.85, 161.86), (68.537689, 193.66285642381482)),
    "medium": (600, (13.13, 277.39), (44.264742, 297.4552547777125)),
    "large": (800, (6.7, 273.99), (30.569041, 303.4857382709002)),
}
for maze, (steps, *returns) in MAZE2D.items():
    for reward, (low, high) in zip(("sparse", "dense"), returns, strict=True):
        name = f"maze2d-{maze}-v1" if reward == "sparse" else f"maze2d-{maze}-dense-v1"
        kwargs = {"maze": maze, "dense": reward == "dense", "ref_min_score": low, "ref_max_score": high}
        url = f"{SERVER}/maze2d/maze2d-{maze}-{reward}-v1.hdf5"
        register(name, steps, base=Maze2d, dataset=url, **kwargs)

# The diagnosis experiment of SAQ (Luo et al., 2023, Sec. 4.3): one start, three demonstrations. The paper does not
# name its start cell; (1, 1) is the corner opposite to the goal.
register(
    "maze2d-large-demos-v1",
    800,
    base=Maze2d,
    maze="large",
    start=(1, 1),
    dataset=DEMOS / "maze2d-large-demos-v1.hdf5",
    ref_min_score=6.7,
    ref_max_score=273.99,
)
