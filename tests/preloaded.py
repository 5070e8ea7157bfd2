"""What the scripts import of other packages; the fork server of `forked` imports this module once."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import filelock  # noqa: E402, F401
import gymnasium_robotics  # noqa: E402, F401
import h5py  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import tqdm  # noqa: E402, F401
import tyro  # noqa: E402, F401
from gymnasium.wrappers import RecordVideo  # noqa: E402, F401
from gymnasium_robotics.envs.adroit_hand import adroit_door  # noqa: E402, F401
from gymnasium_robotics.envs.franka_kitchen import kitchen_env  # noqa: E402, F401
from gymnasium_robotics.envs.maze import maze_v4  # noqa: E402, F401

torch.set_num_threads(1)
