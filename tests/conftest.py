import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite tests the CPU, bit for bit
os.environ["OMP_NUM_THREADS"] = "1"  # its runs are tiny: threads would wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run_script(*args, cwd=ROOT, script="saq_cql.py", **kwargs):
    """Runs a script to its end; returns the finished process, its output as text."""
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=540, **kwargs)


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
    folder = Path(config.cache.mkdir("pypi"))
    with FileLock(folder / "lock"):
        if not (folder / member).exists():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), requirement]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip(f"{requirement} cannot be had from PyPI")
            (archive,) = folder.glob(f"{requirement.split('==')[0]}*")
            with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as packed:
                packed.extract(member, folder)
            archive.unlink()
    return folder / member


@pytest.fixture
def ant(monkeypatch, pytestconfig):
    """Lets offline_envs find D4RL's ant: where d4rl is not installed, from its wheel."""
    if importlib.util.find_spec("d4rl") is None:
        file = from_pypi("d4rl==1.1", "d4rl/locomotion/assets/ant.xml", pytestconfig)
        monkeypatch.syspath_prepend(str(file.parents[3]))
