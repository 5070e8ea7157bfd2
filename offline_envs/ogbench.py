"""OGBench's tasks for rewards, with their data relabelled by the package's own functions."""

import contextlib
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np

from .datasets import OGBENCH_SERVER, best_rewards, fetch
from .offline_env import OfflineEnv

WHOLE = 1_000_000  # transitions of the smallest file that OGBench publishes


class OGBench(OfflineEnv):
    """One task of OGBench's, which pays 1 for success and ends with it: the mean return over episodes is the success
    rate. As the package has it, an action is judged by the state in which it is taken: one more step follows the one
    that solves the task. `info` has as "data_reward" what the data pay (see get_dataset), and "success".

    `name` is that of the dataset and the task: "cube-single-play-singletask-task2-v0" is task 2 of the environment
    cube-single with the file cube-single-play-v0.npz; without "-task2" it is OGBench's default task. Raises
    gym.error.Error for a name with images or with goals, which this package does not read."""

    def __init__(self, name, render_mode=None):
        state_task = name.removeprefix("visual-")
        if "-singletask" not in name:
            state_task = state_task.replace("-v0", "-singletask-v0")
            raise gym.error.Error(f"its goals vary and it has no rewards; take one of its tasks, such as {state_task}")
        if name != state_task:
            raise gym.error.Error(f"its observations are images; take the task with states, {state_task}")
        data, task = name.split("-singletask")
        self.env_id = f"{data.rsplit('-', 1)[0]}-singletask{task}"  # the package's names are without the kind of data
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a screen that is not there, and of spaces with bounds of 64 bits
            try:
                import ogbench  # registers its environments
            except ImportError as error:
                raise ImportError(f"pip install -r requirements-ogbench.txt first: {error}") from error
            env = gym.make(self.env_id, disable_env_checker=True).unwrapped
            # A reset takes a few random steps. The arm makes an action space anew whenever it is asked for one, and no
            # seed reaches these; here it keeps one.
            env.__class__ = type(type(env).__name__, (type(env),), {"action_space": env.action_space})
        env.metadata = {"render_modes": ["rgb_array"], "render_fps": env.metadata.get("render_fps", 20)}
        env.render_mode = render_mode
        super().__init__(env, f"{OGBENCH_SERVER}/{data}-v0.npz", 0.0, 1.0)
        self.load_dataset = ogbench.load_dataset
        self.observation_space = env.observation_space  # the arm computes it each time
        self.random = np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        self.random = self.random if seed is None else np.random.default_rng(seed)
        seed = int(self.random.integers(2**31))
        self.env.action_space.seed(seed)
        with global_random(seed):
            return self.env.reset(seed=seed)[0], {}

    def step(self, action):
        with global_random(self.random.integers(2**31)):  # teleports
            obs, reward, terminated, truncated, info = self.env.step(action)
        info = {"success": bool(info["success"]), "data_reward": float(reward)}
        return obs, float(info["success"]), terminated, truncated, info

    def provenance(self, path=None):
        """Made of a file that is there. A part of OGBench's data under the name of the whole is not OGBench's."""
        path = Path(path or self.dataset_filepath)
        with np.load(path) as file:
            transitions = int((~file["terminals"].astype(bool)).sum())
        official = path.name == self.dataset_filepath.name and transitions >= WHOLE
        data = "OGBench's" if official else "not OGBench's, so do not compare with OGBench's tables"
        return f"Score: the percentage of episodes that succeed; the data, {transitions:,} transitions, are {data}."

    def get_dataset(self, path=None):
        """The arrays of OfflineEnv.get_dataset from a file in OGBench's layout, with rewards as the package has them: 0
        in a state that solves the task, which is a terminal, as nothing more can be earned; elsewhere -1 in mazes, and
        where arms work -1 for each cube, button, drawer and window that is not as it should be. `returns` (E,) are 1
        for an episode that comes by such a state and 0 for others. Raises OSError where the task's own file cannot be
        had or is damaged; of another file, ValueError where it is no such file."""
        from ogbench.relabel_utils import relabel_dataset

        file = Path(path or fetch(self.dataset))
        if file.is_file() and not zipfile.is_zipfile(file):
            if path is None:
                raise OSError(f"{file} is damaged: delete it to download it again.")
            raise ValueError("it is no .npz file")
        check(file, self)
        data = self.load_dataset(str(file), add_info=True)
        relabel_dataset(self.env_id, self, data)
        ends, solved = data["terminals"] > 0, data["masks"] == 0
        arrays = {key: data[key] for key in ("observations", "actions", "next_observations", "rewards")}
        returns = best_rewards({"rewards": solved.astype(np.float32)}, ends)["episode_returns"]
        return arrays | {"terminals": solved, "timeouts": ends, "episode_returns": returns}


def check(path, env):
    """Raises ValueError where the file in `path` lacks what the package needs to tell success in `env`."""
    needed = ["observations", "actions", "terminals", "qpos"]
    needed += ["button_states"] * env.env_id.startswith(("scene-", "puzzle-"))
    with np.load(path) as file:
        if missing := [key for key in needed if key not in file]:
            raise ValueError(f"it has no {', '.join(missing)}: OGBench's files have {', '.join(needed)}")
        columns = {key: file[key] for key in needed}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1 or lengths["terminals"] < 2:
        raise ValueError(f"its columns have different lengths, or fewer than 2 rows: {lengths}")
    if not columns["terminals"][-1]:
        raise ValueError("its last row does not end an episode: OGBench's terminals are true in the last row of each")
    if columns["qpos"].shape[1:] != (env.unwrapped.model.nq,):
        raise ValueError(f"its qpos have shape {columns['qpos'].shape}, those of {env.env_id} {env.unwrapped.model.nq}")


@contextlib.contextmanager
def global_random(seed):
    """NumPy's global generator, which OGBench draws from, seeded for a while and then as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


TASKS = [  # environments, steps of an episode, kinds of data
    ("pointmaze-medium pointmaze-large pointmaze-giant pointmaze-teleport", 1000, "navigate stitch"),
    ("antmaze-medium antmaze-large antmaze-teleport", 1000, "navigate stitch explore"),
    ("antmaze-giant", 1000, "navigate stitch"),
    ("humanoidmaze-medium humanoidmaze-large", 2000, "navigate stitch"),
    ("humanoidmaze-giant", 4000, "navigate stitch"),
    ("antsoccer-arena antsoccer-medium", 1000, "navigate stitch"),
    ("cube-single", 200, "play noisy"),
    ("cube-double puzzle-3x3 puzzle-4x4", 500, "play noisy"),
    ("scene", 750, "play noisy"),
    ("cube-triple cube-quadruple puzzle-4x5 puzzle-4x6", 1000, "play noisy"),
]
for environments, steps, kinds in TASKS:
    for name in [f"{env}-{kind}" for env in environments.split() for kind in kinds.split()]:
        for task in ["", "-singletask", *(f"-singletask-task{number}" for number in range(1, 6))]:
            for full_name in (f"{name}{task}-v0", f"visual-{name}{task}-v0"):  # some to be refused in words
                kwargs = {"name": full_name}
                gym.register(full_name, entry_point=f"{__package__}:OGBench", max_episode_steps=steps, kwargs=kwargs)
