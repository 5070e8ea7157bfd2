"""The path of CUDA graphs, where there is a device; everything else in this suite hides it."""

import os
import subprocess
import sys
from pathlib import Path

import on_device
import pytest
import torch
from conftest import DEVICES_SEEN, ROOT, checkpoint, only_run, tensors

from vqvae import accelerate

needs_cuda = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA device")
SCRIPTS = ["saq_cql", "saq_iql", "saq_brac", "saq_bc", "baselines/rebrac", "baselines/spot"]
WORDS = {"baselines/rebrac": [], "baselines/spot": ["--vq-steps=20", "--vae-steps=20", "--online-steps=20"]}
LEARNERS = ["quantizer", "mixture", "aquadem", "saq_cql", "cql", "saq_iql", "iql", "saq_brac", "brac"]
LEARNERS += ["saq_bc", "bc", "gaussian_bc", "bc_gmm", "saq_awac", "awac", "saq_bear", "bear", "saq_spot", "spot"]
LEARNERS += ["rebrac", "td3_bc", "fql", "ifql"]


def run(*words):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": DEVICES_SEEN}
    if DEVICES_SEEN is None:
        del environment["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, *map(str, words)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "bfloat16"),
        pytest.param("cuda", "float32", marks=needs_cuda),
        pytest.param("cuda", "bfloat16", marks=needs_cuda),
    ],
)
def test_fast_steps_are_the_plain_ones(device, precision):
    """Graphs against plain steps. On the CPU, where both are plain, that every learner does steps in bfloat16."""
    lines = [line.split() for line in run("tests/on_device.py", device, precision).splitlines() if "has no" not in line]
    assert [name for name, _ in lines] == LEARNERS
    limit = {"float32": 1e-5, "bfloat16": 1e-3}[precision]
    assert [(name, error) for name, error in lines if float(error) > limit] == []


class CheckedAdamW(torch.optim.AdamW):
    """AdamW for tensors without values: it looks at devices, and steps nowhere."""

    def __init__(self, parameters, lr, **options):
        super().__init__(parameters, 1e-3, **options)  # which would read a tensor
        self.param_groups[0]["lr"] = lr

    def step(self):
        (group,) = self.param_groups
        tensors = [group["lr"], getattr(self, "found_inf", group["lr"]), *(p.grad for p in group["params"])]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert group["capturable"]


@pytest.fixture(scope="module")
def on_meta():
    """Learners by name and transitions, on the meta device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", CheckedAdamW)
        patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it reads what it has drawn
        device = torch.device("meta")
        yield on_device.learners(device), on_device.transitions(device)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_leaves_its_device_nowhere(name, on_meta):
    """On PyTorch's meta device, whose tensors have no values: whoever reads one, which no CUDA graph can, or mixes it
    with the CPU's raises. So every update and policy is sound as far as that goes, and none was seen on a GPU."""
    learner, data = on_meta[0][name], on_meta[1]
    for _ in range(2):
        info = on_device.update_of(learner, data)
    seen = [*info.values(), *learner.parameters(), *learner.buffers()]
    if name in ("quantizer", "mixture", "aquadem"):
        logits = learner.prior_logits(data.obs)
        seen += [learner.act(data.obs, logits, how, 0.1) for how in ("greedy", "sample", "mean")]
        seen += [learner.encode_dataset(data.obs, data.actions), learner.normalize(data.obs)]
    else:
        seen += [learner.act(data.obs), *learner.diagnose(on_device.batch_for(learner, data)).values()]
    seen += learner.explore(data.obs[:1]) if hasattr(learner, "explore") else ()
    assert {tensor.device.type for tensor in seen} == {"meta"}


def test_graphs_can_be_switched_off():
    update = dict
    assert accelerate(update, torch.device("cuda"), "off") is update


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path, script):
    tiny = ["--device=cuda", "--eval-every=10", "--eval-episodes=1", "--final-episodes=1"]
    tiny += WORDS.get(script, ["--vq-steps=20"])
    flag = "--online-steps" if script == "baselines/spot" else "--steps"  # whose offline phase is over by then
    run(f"{script}.py", "--steps", 20, *tiny, flag, 20, "--out", tmp_path / "whole")
    run(f"{script}.py", "--steps", 20, *tiny, flag, 10, "--out", tmp_path / "parts")
    run(f"{script}.py", "--resume", only_run(tmp_path / "parts"), flag, 20)
    whole, parts = (tensors(checkpoint(only_run(tmp_path / name))["parts"]) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    run(f"{script}.py", "--eval-only", only_run(tmp_path / "parts"), "--eval-episodes", 1)


@needs_cuda
def test_the_benchmark_runs():
    assert "saq_cql" in run("benchmarks/speed.py", "--rounds", 1, "--burst", 0.05, "--transitions", 20000)
