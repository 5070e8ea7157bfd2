import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import gymnasium as gym
import h5py
import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from forked import Forked

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
DEVICES_SEEN = os.environ.get("CUDA_VISIBLE_DEVICES")  # before this suite hid them: for test_cuda.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite tests the CPU, bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # its runs are tiny: threads would wait for each other
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeats", derandomize=True)  # a suite has the same examples in every run
hypothesis.settings.load_profile("repeats")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=12, help="how often test_hostile.py kills a run")


def pytest_collection_modifyitems(items):
    """The files that take longest come first: no process is to be left with one of them when the other has ended."""
    first = ["test_runs.py", "test_reproduce.py", "test_readme.py", "test_hostile.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run_script(*args, cwd=ROOT, script="saq_cql.py", **kwargs):
    """Runs a script to its end; returns the finished process, its output as text."""
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=540, **kwargs)


def run_forked(*args, **kwargs):
    """The same in a second: in a process that has its packages already (see Forked for the keywords)."""
    return Forked(*args, **kwargs).wait()


def one_sentence(process):
    """The sentence that a failed script left, checked for form."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.stderr.rstrip().splitlines()[-1] == line
    return line


def succeeded(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def only_run(out):
    """The run in a folder of runs; a hidden one would be a run that has not begun."""
    (folder,) = Path(out).iterdir()
    assert not folder.name.startswith(".")
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(state, prefix=""):
    """All tensors in a checkpoint, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{prefix}/{key}").items()}


def timeless(log):
    """What was logged, but for the seconds that updates took."""
    return [row for row in log if not row[1].endswith("/seconds")]


def metrics(folder):
    """The rows of metrics.csv, but for the seconds that updates took."""
    lines = (folder / "metrics.csv").read_text().splitlines() if (folder / "metrics.csv").exists() else []
    return timeless([line.split(",") for line in lines])


def assert_same_run(ours, theirs):
    """Bit for bit the same tensors, random numbers, log and results; paths in the arguments may differ, and seconds."""
    (one, other) = (checkpoint(folder) for folder in (ours, theirs))
    for part in ("parts", "rng"):
        a, b = tensors(one[part]), tensors(other[part])
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert timeless(one["log"]) == timeless(other["log"])
    assert all(one[key] == other[key] for key in ("done", "data", "due"))
    assert metrics(ours) == metrics(theirs)
    for name in ("result.json", "codes.png", "comparison.png"):
        assert (ours / name).exists() == (theirs / name).exists(), name
        assert not (ours / name).exists() or (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def write(path, arrays, **options):
    """Saves arrays as .npz or .hdf5, by the name of the path; returns it as text."""
    if path.suffix.lower() == ".npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, **options)
    return str(path)


def dataset(n=400, obs_dim=3, action_dim=1, episode=100, seed=0):
    """A valid dataset in D4RL's layout: random observations, actions that depend on them, `n // episode` episodes."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((n, obs_dim)).astype(np.float32)
    timeouts = np.zeros(n, bool)
    timeouts[episode - 1 :: episode] = True
    return {
        "observations": obs,
        "actions": np.tanh(obs[:, :action_dim] + 0.3 * rng.standard_normal((n, action_dim))).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": timeouts,
    }


def from_pypi(requirement, member, config):
    """A member of a package's archive, unpacked in pytest's cache; skips the test where PyPI cannot be reached."""
    folder, name = Path(config.cache.mkdir("pypi")), requirement.split("==")[0]
    with FileLock(folder / "lock"):
        if not list(folder.glob(f"{name}*.*")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip(f"{requirement} cannot be had from PyPI")
        if not (folder / member).exists():
            (archive,) = folder.glob(f"{name}*.*")
            with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as packed:
                packed.extract(member, folder)
    return folder / member


@pytest.fixture
def ant(monkeypatch, pytestconfig):
    """Lets offline_envs find D4RL's ant: where d4rl is not installed, from its wheel."""
    if importlib.util.find_spec("d4rl") is None:
        file = from_pypi("d4rl==1.1", "d4rl/locomotion/assets/ant.xml", pytestconfig)
        monkeypatch.syspath_prepend(str(file.parents[3]))


# --- Minari ---


class Unsorted(gym.Env):
    """An environment whose dictionary of observations is not in the order of its keys."""

    def __init__(self):
        sizes = OrderedDict(z=2, a=1)
        self.observation_space = gym.spaces.Dict(
            OrderedDict((key, gym.spaces.Box(0, 9, (size,), np.float32)) for key, size in sizes.items())
        )
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return OrderedDict(z=np.full(2, 2, np.float32), a=np.full(1, 1, np.float32)), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


MAKE_MINARI = """
import sys
import gymnasium as gym, gymnasium_robotics, minari, numpy as np
from minari.data_collector import EpisodeBuffer
env_id, name, low, high = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
gym.register_envs(gymnasium_robotics)
gym.register("Unsorted-v0", entry_point="conftest:Unsorted")
env, episodes = gym.make(env_id, max_episode_steps=20), []
env.action_space.seed(0)
for seed in range(3):
    obs, rows = [env.reset(seed=seed)[0]], []
    while not (rows and (rows[-1][2] or rows[-1][3])):
        action = env.action_space.sample()
        observation, *rest, _ = env.step(action)
        obs.append(observation)
        rows.append((action, *rest))
    obs = {key: np.stack([o[key] for o in obs]) for key in obs[0]} if isinstance(obs[0], dict) else np.stack(obs)
    actions, rewards, terminations, truncations = map(np.array, zip(*rows))
    kwargs = dict(actions=actions, rewards=rewards, terminations=terminations, truncations=truncations)
    episodes.append(EpisodeBuffer(id=seed, observations=obs, **kwargs))
references = {} if np.isnan(low) else dict(ref_min_score=low, ref_max_score=high)
minari.create_dataset_from_buffers(name, episodes, env=env, **references)
"""


def make_minari(folder, *arguments):
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", MAKE_MINARI, *arguments]
    subprocess.run(command, check=True, env=environment, cwd=ROOT / "tests", capture_output=True)
    return environment
