"""The tasks of D4RL, robomimic and OGBench for today's Gymnasium: environments, datasets and reference scores.

This package is a Gymnasium plugin, which Gymnasium loads by its name. A file here is a family of tasks.

    env = gymnasium.make("offline_envs:hopper-expert-v2")
    dataset = env.get_wrapper_attr("get_dataset")()                        # dict of arrays in D4RL's layout
    score = 100 * env.get_wrapper_attr("get_normalized_score")(episode_return)

locomotion.py       hopper-, halfcheetah-, walker2d-, ant-*: Gymnasium's `-v4` environments
adroit.py           pen-, door-, hammer-, relocate-*: Gymnasium-Robotics' hand with D4RL's rewards
kitchen.py          kitchen-*: Gymnasium-Robotics' FrankaKitchen with D4RL's observations and rewards
maze2d.py           maze2d-*: Gymnasium-Robotics' point in D4RL's mazes; maze2d-large-demos-v1, whose data is in demos/
antmaze.py          antmaze-*: D4RL's ant and walls; needs `pip install --no-deps d4rl==1.1`, for the robot's file
robomimic.py        lift-, can-, square-, transport-, tool-hang-*: robosuite 1.4.1, made as the dataset says; needs
                    `pip install -r requirements-robomimic.txt`
ogbench.py          cube-single-play-singletask-task2-v0 and all of OGBench's tasks with states and rewards; needs
                    `pip install -r requirements-ogbench.txt`
minari_datasets.py  minari-v0, with `dataset_id="D4RL/door/human-v2"`: what a Minari dataset recovers

Datasets are read from ~/.d4rl/datasets (or $D4RL_DATASET_DIR), OGBench's from ~/.ogbench/data ($OGBENCH_DATASET_DIR),
and downloaded there once. `get_dataset(path)` reads any other file. D4RL's URLs and reference scores are those of
version 1.1 (Fu et al., 2020, arXiv:2004.07219), and the physics is that of MuJoCo 2.1.0, on which it ran
(mujoco210.py).
"""

import warnings

from . import adroit, antmaze, kitchen, locomotion, maze2d, robomimic
from .minari_datasets import MinariEnv
from .offline_env import OfflineEnv, make
from .ogbench import OGBench

# A family registers its names when it is imported.
__all__ = ["MinariEnv", "OGBench", "OfflineEnv", "make", "adroit", "antmaze", "kitchen", "locomotion", "maze2d"]
__all__ += ["robomimic"]

# D4RL's names carry the version of the *dataset*; Gymnasium would advise "hopper-expert-v2" in place of v0.
warnings.filterwarnings("ignore", message=r".*The environment \w+-[\w-]+-v\d is out of date.*")
