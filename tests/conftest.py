import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
