"""Runs with each quantizer: resumed, shared between runs, refused where they do not fit."""

import dataclasses
import re
import shutil
import signal

import pytest
import torch
from conftest import assert_same_run, checkpoint, dataset, one_sentence, only_run, run_forked, succeeded, write
from forked import Forked

import saq_bc
import saq_brac
import saq_cql
import saq_iql
from vqvae import FIT, QUANTIZERS

SHORT = ["--env", "tiny_envs:Tiny-v0", "--no-compare", "--eval-episodes", 1, "--final-episodes", 1, "--num-codes", 4]
SHORT += ["--vq-steps", 40, "--steps", 40, "--eval-every", 20, "--log-every", 10]
SCRIPTS = {"saq_cql": saq_cql, "saq_iql": saq_iql, "saq_brac": saq_brac, "saq_bc": saq_bc}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(script, flags): the folder of a short run; those of the same flags are made once."""
    folder = tmp_path_factory.mktemp("quantizers")
    data = write(folder / "tiny.npz", dataset(n=60, episode=5))
    made = {}

    def run(script, *flags):
        if (script, flags) not in made:
            out = folder / str(len(made))
            succeeded(run_forked("--out", out, "--dataset-path", data, *SHORT, *flags, script=f"{script}.py"))
            made[script, flags] = only_run(out)
        return made[script, flags]

    run.data = data
    return run


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("script", "update"), [("saq_bc", 27), ("saq_iql", 47)])
def test_a_killed_run_resumes_bit_for_bit(runs, quantizer, script, update, tmp_path):
    """Killed in the middle of the fit, and of the agent's training."""
    whole = runs(script, "--quantizer", quantizer)
    process = Forked(
        *("--out", tmp_path, "--dataset-path", runs.data, *SHORT, "--quantizer", quantizer),
        script=f"{script}.py",
        before=("signal_in_update", signal.SIGKILL, update),
    )
    assert process.wait().returncode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert checkpoint(folder)["done"] == {"quantizer": update // 20 * 20}
    succeeded(run_forked("--resume", folder, script=f"{script}.py"))
    assert_same_run(whole, folder)


def test_noise_reaches_the_fit(runs):
    flags = ("--quantizer", "mixture")
    clean, noisy = (checkpoint(runs("saq_bc", *flags, *more))["parts"] for more in ((), ("--obs-noise", 0.5)))
    assert not torch.equal(clean["quantizer"]["net.0.weight"], noisy["quantizer"]["net.0.weight"])


@pytest.mark.parametrize("quantizer", ["vqvae", "mixture"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quantizer_that_another_run_fitted_changes_nothing(runs, quantizer, script, tmp_path):
    """The agent becomes, bit for bit, the one over a fit of its own."""
    other = runs("saq_bc", "--quantizer", quantizer)
    own = checkpoint(runs(script, "--quantizer", quantizer))
    taken = checkpoint(runs(script, "--quantizer", quantizer, "--quantizer-from", other))
    for name, part in own["parts"][script].items():
        assert torch.equal(part, taken["parts"][script][name]), name
    assert own["done"] == taken["done"]
    scores = [[row for row in state["log"] if row[1] == f"{script}/score"] for state in (own, taken)]
    assert scores[0] == scores[1]


OTHERS = {  # a flag, and what stands in the run whose quantizer is asked for
    "quantizer": (["--quantizer", "vqvae"], "mixture"),
    "num_codes": (["--num-codes", 5], "4"),
    "vq_batch_size": (["--vq-batch-size", 32], "256"),
    "lr": (["--lr", 1e-3], "0.0003"),
    "vq_decay": (["--no-vq-decay"], "True"),
    "normalize_obs": (["--no-normalize-obs"], "True"),
    "action_only": (["--action-only"], "False"),
    "revive_every": (["--revive-every", 7], "100"),
    "obs_noise": (["--obs-noise", 0.1], "0.0"),
    "precision": (["--precision", "bfloat16"], "float32"),
}
REFUSALS = [(flags, f"has {name} {value}: pass the same") for name, (flags, value) in OTHERS.items()]
REFUSALS += [(["--vq-steps", 41], r"no quantizer that 41 steps \(vq_steps\) have fitted to these data")]


def test_every_setting_of_a_fit_is_compared():
    assert OTHERS.keys() == set(FIT.split())


@pytest.mark.parametrize(("flags", "sentence"), REFUSALS)
def test_another_quantizer_is_refused(runs, flags, sentence, tmp_path):
    flags = ["--quantizer", "mixture", "--quantizer-from", runs("saq_bc", "--quantizer", "mixture"), *flags]
    process = run_forked("--out", tmp_path, "--dataset-path", runs.data, *SHORT, *flags, script="saq_iql.py")
    one_sentence(process)
    assert re.search(sentence, process.stderr)
    assert not any(tmp_path.iterdir())


def test_a_quantizer_of_other_data_or_of_none_is_refused(runs, tmp_path):
    other = write(tmp_path / "other.npz", dataset(n=60, episode=5, seed=1))
    fitted = runs("saq_bc", "--quantizer", "mixture")
    flags = ["--out", tmp_path / "out", "--dataset-path", other, *SHORT, "--quantizer", "mixture"]
    one_sentence(run_forked(*flags, "--quantizer-from", fitted))
    one_sentence(run_forked(*flags, "--quantizer-from", tmp_path / "nowhere"))
    damaged = shutil.copytree(fitted, tmp_path / "damaged")
    (damaged / "checkpoint.pt").write_bytes((damaged / "checkpoint.pt").read_bytes()[:-1000])
    one_sentence(run_forked(*flags, "--quantizer-from", damaged))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_agent_works_over_every_quantizer(script, quantizer):
    """Constructed as `main` does; acts in [-1, 1] in all three ways."""
    args = dataclasses.replace(SCRIPTS[script].defaults(quantizer=quantizer), compare=False, quantizer=quantizer)
    vqvae = QUANTIZERS[quantizer](3, 2, args.num_codes, args.action_only, args.lr)
    (agent,) = SCRIPTS[script].make_agents(3, 2, vqvae, args).values()
    for how in ("greedy", "sample", "mean"):
        args.act = how
        actions = agent.act(torch.randn(7, 3))
        assert actions.shape == (7, 2)
        assert actions.abs().max() <= 1
