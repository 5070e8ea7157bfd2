"""The tasks of D4RL and robomimic for today's Gymnasium: environments, datasets and reference scores.

This module is a Gymnasium plugin, which Gymnasium loads by its name:

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
| {lift,can,square,transport}-{ph,mh}, tool-hang-ph    | robosuite 1.4.1, made as the dataset's env_args say;     |
|                                                      | needs `pip install -r requirements-robomimic.txt`        |
| minari-v0, with `dataset_id="D4RL/door/human-v2"`    | what a Minari dataset recovers                           |

Datasets are read from ~/.d4rl/datasets (or $D4RL_DATASET_DIR) and downloaded there once. `get_dataset(path)` reads
any other file. D4RL's URLs and reference scores are those of version 1.1 (Fu et al., 2020, arXiv:2004.07219).
"""

import contextlib
import http.client
import importlib.util
import io
import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from filelock import FileLock
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
ROBOMIMIC_SERVER = "http://downloads.cs.stanford.edu/downloads/rt_benchmark"
TIMEOUT = 30  # seconds without a byte, after which a download counts as broken
DEMOS = Path(__file__).parent / "demos"

# D4RL's names carry the version of the *dataset*; Gymnasium would advise "hopper-expert-v2" in place of v0.
warnings.filterwarnings("ignore", message=r".*The environment \w+-[\w-]+-v\d is out of date.*")


# --- Datasets and scores ---


class OfflineEnv(gym.Wrapper):
    """An environment that knows its dataset and its reference scores.

    `dataset` is the URL of an HDF5 file, or the path of one that ships with this module; the file in `path` is used in
    its place. `ref_min_score`, `ref_max_score`: the returns of a random and of an expert policy, D4RL's 0 and 1."""

    def __init__(self, env, dataset, ref_min_score, ref_max_score, path=None):
        super().__init__(env)
        self.dataset, self.path, self.ref_min_score, self.ref_max_score = dataset, path, ref_min_score, ref_max_score

    def get_normalized_score(self, episode_return):
        """0 for D4RL's random policy, 1 for its expert. The tables of papers print 100 times this number."""
        return (episode_return - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)

    def provenance(self, h5path=None):
        """What a score over the data in `h5path`, by default the task's own, may be compared with: one sentence."""
        suite, path = "robomimic" if isinstance(self.env, Robomimic) else "D4RL", h5path or self.dataset_filepath
        official = isinstance(self.dataset, str) and f"/{path}".endswith(f"/{file_name(self.dataset)}")
        data = f"are {suite}'s" if official else f"are not {suite}'s, so do not compare with {suite}'s tables"
        return f"Score: 0 at a return of {self.ref_min_score:g}, 100 at {self.ref_max_score:g}; the data {data}."

    @property
    def dataset_filepath(self):
        """Where the dataset lies, or will lie once downloaded."""
        return self.path or local_path(self.dataset)

    def get_dataset(self, h5path=None):
        """Returns a dict of arrays: `observations (N, O)`, `actions (N, A)`, `rewards (N,)`, `terminals (N,)`, and
        `timeouts (N,)` and `next_observations (N, O)` where the file has them. Reads the task's own file, downloaded if
        need be, or another .hdf5 or .npz file. Raises OSError with one sentence where the task's own cannot be had or
        is damaged; of another file, whatever h5py and NumPy raise, and ValueError where its parts do not fit."""
        path, mask = split_mask(h5path or self.path or fetch(self.dataset))
        try:
            with np.load(path) if path.suffix == ".npz" else h5py.File(path) as file:
                return getattr(self.env, "read", read)(file, mask)
        except OSError as error:
            if path != local_path(self.dataset) or type(error) is not OSError:  # not there, or not permitted
                raise
            raise OSError(f"{path} is damaged ({error}): delete it to download it again.") from error


def read(file, mask=None):
    """The arrays of D4RL's layout in an open file. ValueError for a `mask`, which only robomimic's files have."""
    if mask:
        raise ValueError(f"it has no mask {mask}: only robomimic's files have masks")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    arrays = {key: file[key][()] for key in keys if key in file}
    for key in {"rewards", "terminals", "timeouts"} & set(arrays):
        if arrays[key].shape[1:] not in ((), (1,)):
            raise ValueError(f"its {key} have shape {arrays[key].shape}, not one number a row")
        arrays[key] = arrays[key].reshape(-1)
    return same_length(arrays)


def same_length(arrays):
    """The arrays as they are. Raises ValueError where they have different lengths, or none."""
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"its columns have different lengths, or none: {lengths}")
    return arrays


def join(episodes):
    """Arrays (N, ...) from a list of episodes, each a dict of arrays (T, ...); a timeout in the last row of each."""
    if not episodes:
        raise ValueError("it has no episodes")
    keys = set.intersection(*(set(same_length(episode)) for episode in episodes))
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in keys}
    ends = np.cumsum([len(episode["rewards"]) for episode in episodes]) - 1
    return arrays | {"timeouts": np.isin(np.arange(ends[-1] + 1), ends)}


def best_rewards(arrays, ends):
    """Adds what an episode that ends in each of `ends` (N,) would return in an environment that pays for a task once,
    where the dataset pays in every step in which it is done."""
    first = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    return arrays | {"returns": np.maximum.reduceat(arrays["rewards"], first)}


def file_name(url):
    """D4RL tells its files apart by name, robomimic by folder."""
    return url.removeprefix(f"{ROBOMIMIC_SERVER}/") if url.startswith(ROBOMIMIC_SERVER) else url.rsplit("/", 1)[-1]


def local_path(dataset):
    """Where the file of a URL lies in the cache, or will lie. A file that ships with this module stays where it is."""
    if isinstance(dataset, Path):
        return dataset
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    try:
        return folder.expanduser() / file_name(dataset)
    except RuntimeError:  # a user without a home, or a "~user" that there is not
        raise OSError(f"{folder} has no home directory here: set D4RL_DATASET_DIR to another folder.") from None


def split_mask(path):
    """A path and, where it ends in ".hdf5:NAME", the name of a subset of robomimic's demonstrations."""
    name, _, mask = str(path).partition(".hdf5:")
    return (Path(f"{name}.hdf5"), mask) if mask else (Path(path), None)


def fetch(dataset):
    """The path of a dataset, downloaded first where it is not in the cache."""
    path = local_path(dataset)
    if not path.exists() and not isinstance(dataset, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # another process may be downloading it: wait, then use its file
            if not path.exists():
                download(dataset, path)
        Path(f"{path}.lock").unlink(missing_ok=True)
    return path


def download(url, path):
    """Downloads `url` to `path`, whole or not at all. What has arrived when the line breaks is kept under another name;
    the next of three attempts, or the next call, goes on from there."""
    for _ in range(3):
        try:
            return download_part(url, path).replace(path)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500:  # the server will not answer otherwise next time
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
    raise OSError(f"{url} could not be downloaded ({reason}): try again, put it at {path}, or pass --dataset-path.")


def download_part(url, path):
    """One attempt, from where the last one stopped. Returns the whole file, still under its other name."""
    response = urllib.request.urlopen(url, timeout=TIMEOUT)
    size, version = response.headers["Content-Length"], response.headers["ETag"] or response.headers["Last-Modified"]
    if size is None:
        raise ValueError("the server does not say how long the file is")
    # The name tells versions of the file apart, so that two of them are never joined.
    part = path.with_name(f"{path.name}.{zlib.crc32(f'{size} {version}'.encode()):08x}.part")
    size, have = int(size), part.stat().st_size if part.exists() else 0
    have = have if have < size else 0
    if have:
        response.close()
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
        have = have if response.status == 206 else 0  # 200: the server sends all of it again
    bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name)
    with response, bar, open(part, "ab" if have else "wb") as file:
        while chunk := response.read1(1 << 20):
            bar.update(file.write(chunk))
    if part.stat().st_size != size:
        raise OSError(f"{part.stat().st_size} of {size} bytes arrived")
    if not h5py.is_hdf5(part):  # a login page, say
        part.unlink()
        raise OSError("what the server sent is no HDF5 file")
    return part


# --- Environments that differ from today's packages ---


def pad(observation):
    """D4RL's Ant observes 84 contact forces that its MuJoCo always reported as zero: (27,) becomes (111,)."""
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
    and the 30 positions of the goal, 0 where they do not matter. Each task pays 1 once; all of them end the episode.
    D4RL's data pay in every step for each task that is done then, and have a terminal where a demonstration ends."""

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

    def read(self, file, mask=None):
        arrays = read(file, mask)
        arrays.setdefault("timeouts", np.zeros(len(arrays["terminals"]), bool))  # no demonstration is cut at 280 steps
        return best_rewards(arrays, (arrays["terminals"] > 0) | (arrays["timeouts"] > 0))


MAZES = {
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# #OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# "
    "############",
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


ANT_GOALS = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}


class AntMaze(MujocoEnv):
    """D4RL's antmaze: reward 1 and the end of the episode within 0.5 of the goal, which is not observed.

    The observation (29,) is the ant's positions, x and y first, and its velocities. Cells are 4 wide; the ant starts at
    the origin, the centre of cell (1, 1). The goal lies up to 1.5 beyond the centre of its cell, anew in every episode,
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
        self.goal_cell = 4.0 * (np.array(ANT_GOALS[maze]) - 1)[::-1]  # (x, y): x runs along columns
        for y, x in 4.0 * (np.argwhere(cells == "#") - 1):
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


class Robomimic(gym.Env):
    """A robosuite task, made as the dataset in `path` says, ending in success with reward 1: the mean return over
    episodes is robomimic's success rate. The observation holds, of each arm, the end effector's position (3) and
    quaternion (4) and the gripper (2), then the object's state: what robomimic's own low-dimensional agents see."""

    metadata = {"render_modes": []}

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


# --- Minari ---


class MinariEnv(OfflineEnv):
    """The environment that a Minari dataset recovers, its observations flattened, and the dataset in D4RL's layout.
    Datasets are found in ~/.minari/datasets (or $MINARI_DATASETS_PATH) or downloaded by Minari."""

    def __init__(self, dataset_id, render_mode=None):
        import minari

        self.minari = minari.load_dataset(dataset_id, download=True)
        env = self.minari.recover_environment(eval_env=True, **({"render_mode": render_mode} if render_mode else {}))
        self.space, metadata = env.observation_space, self.minari.storage.metadata
        if not isinstance(self.space, gym.spaces.Box):
            env = gym.wrappers.FlattenObservation(env)
        self.has_references = metadata.get("ref_max_score", 0) != metadata.get("ref_min_score", 0)
        references = (metadata["ref_min_score"], metadata["ref_max_score"]) if self.has_references else (0.0, 100.0)
        super().__init__(env, Path(self.minari.spec.data_path), *references)

    def provenance(self, path=None):
        data = "of another file than Minari's" if path else "Minari's"
        if not self.has_references:
            return f"The score is the return itself, Minari has no references of this dataset; the data are {data}."
        scores = f"0 at a return of {self.ref_min_score:g}, 100 at {self.ref_max_score:g}"
        return f"Score: {scores}, by Minari's references, which are not D4RL's numbers; the data are {data}."

    def get_dataset(self, path=None):
        """All episodes, or the arrays of another file in D4RL's layout."""
        if path:
            return super().get_dataset(path)
        episodes = []
        for episode in self.minari.iterate_episodes():
            obs = flatten(self.space, episode.observations)  # (T + 1, O)
            arrays = {"observations": obs[:-1], "next_observations": obs[1:], "actions": episode.actions}
            episodes.append(arrays | {"rewards": episode.rewards, "terminals": episode.terminations})
        return join(episodes)


def flatten(space, batch):
    """What gym.spaces.flatten makes of each of a batch of samples of a Box, or of Boxes in a Dict: (B, ...)."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, batch[key]) for key, part in space.spaces.items()], 1)
    assert isinstance(space, gym.spaces.Box), f"observations of {space} cannot be flattened"
    return np.asarray(batch).reshape(len(batch), -1)


# --- D4RL's names ---


def make(base, dataset, ref_min_score, ref_max_score, dataset_path=None, render_mode=None, **kwargs):
    """The entry point behind every name: the environment `base` with its dataset, or the file in `dataset_path`, and
    reference scores. Robomimic's environments are made as their dataset says."""
    if base is Robomimic:
        kwargs["path"] = dataset_path or fetch(dataset)
    if isinstance(base, str):
        with warnings.catch_warnings():  # "-v4 is out of date": it is the version whose physics is D4RL's
            warnings.simplefilter("ignore")
            env = gym.make(base, render_mode=render_mode, **kwargs).unwrapped
    else:
        env = base(render_mode=render_mode, **kwargs)
    if base == "Ant-v4":
        env = gym.wrappers.TransformObservation(env, pad, gym.spaces.Box(-np.inf, np.inf, (111,), np.float64))
    return OfflineEnv(env, dataset, ref_min_score, ref_max_score, dataset_path)


def register(name, steps, base, dataset, low, high, **kwargs):
    kwargs |= {"base": base, "dataset": dataset, "ref_min_score": low, "ref_max_score": high}
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
                register(f"{robot}-{data}-v{version}", 1000, base, url, low, high)

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
            register(f"{task}-{data}-v{version}", steps, base, f"{SERVER}/{url}", low, high)

KITCHEN = {  # file, and the two tasks beside microwave and kettle
    "complete": ("mini_kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "partial": ("kitchen_microwave_kettle_light_slider", "light switch", "slide cabinet"),
    "mixed": ("kitchen_microwave_kettle_bottomburner_light", "bottom burner", "light switch"),
}
for data, (file, *tasks) in KITCHEN.items():
    tasks = ["microwave", "kettle", *tasks]
    register(f"kitchen-{data}-v0", 280, Kitchen, f"{SERVER}/kitchen/{file}-v0.hdf5", 0.0, 4.0, tasks=tasks)

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
        kwargs = {"maze": maze, "fixed_goal": version == 0}
        register(f"antmaze-{data}-v{version}", steps, AntMaze, f"{SERVER}/{url}.hdf5", 0.0, 1.0, **kwargs)

MAZE2D = {  # steps, then the return of a random and of an expert policy: sparse reward, dense reward
    "umaze": (300, (23.85, 161.86), (68.537689, 193.66285642381482)),
    "medium": (600, (13.13, 277.39), (44.264742, 297.4552547777125)),
    "large": (800, (6.7, 273.99), (30.569041, 303.4857382709002)),
}
for maze, (steps, *returns) in MAZE2D.items():
    for reward, (low, high) in zip(("sparse", "dense"), returns, strict=True):
        name = f"maze2d-{maze}-v1" if reward == "sparse" else f"maze2d-{maze}-dense-v1"
        url = f"{SERVER}/maze2d/maze2d-{maze}-{reward}-v1.hdf5"
        register(name, steps, Maze2d, url, low, high, maze=maze, dense=reward == "dense")

# The diagnosis experiment of SAQ (Luo et al., 2023, Sec. 4.3): one start, three demonstrations. The paper does not
# name its start cell; (1, 1) is the corner opposite to the goal.
demos = DEMOS / "maze2d-large-demos-v1.hdf5"
register("maze2d-large-demos-v1", 800, Maze2d, demos, 6.7, 273.99, maze="large", start=(1, 1))

ROBOMIMIC = {  # robosuite's name, and robomimic's horizons for demonstrations of one and of several operators
    "lift": ("Lift", 400, 500),
    "can": ("PickPlaceCan", 400, 500),
    "square": ("NutAssemblySquare", 400, 500),
    "tool-hang": ("ToolHang", 700, None),
    "transport": ("TwoArmTransport", 700, 1100),
}
for name, (task, *horizons) in ROBOMIMIC.items():
    for data, steps in zip(("ph", "mh"), horizons, strict=True):
        if steps:
            url = f"{ROBOMIMIC_SERVER}/{name.replace('-', '_')}/{data}/low_dim_v141.hdf5"
            register(f"{name}-{data}", steps, Robomimic, url, 0.0, 1.0, task=task)

gym.register("minari-v0", entry_point=f"{__name__}:MinariEnv", kwargs={"dataset_id": None})
