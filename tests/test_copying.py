"""The code as something to copy: an agent, a quantizer, two files, in somebody else's program."""

import ast
import copy
import dataclasses
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, dataset, one_sentence, only_run, run_forked, run_script, succeeded, write
from test_closed_forms import random_batch

import saq_bc
import saq_brac
import saq_cql
import saq_iql
from vqvae import ActionVQVAE, UserError, decay_lr, load_task, make_transitions, prepare

SCRIPTS = [saq_cql, saq_iql, saq_brac, saq_bc]
SHORT = ["--vq-steps", 6, "--steps", 6, "--eval-every", 3, "--eval-episodes", 1, "--final-episodes", 1]
SHORT += ["--num-codes", 4, "--batch-size", 16, "--no-compare"]


def agents(**fields):
    """Every agent of every script, by name, over a quantizer of 8 codes."""
    found = {}
    for script in SCRIPTS:
        found |= script.make_agents(3, 2, ActionVQVAE(3, 2, 8, hidden=(8,)), script.Args(compare=True, **fields))
    return found


NAMES = sorted(agents())
DISCRETE = [name for name in NAMES if name.startswith("saq_")]


# --- An agent in a loop of one's own ---


@pytest.mark.parametrize("name", NAMES)
def test_acting_builds_no_graph(name):
    agent = agents()[name]
    agent.act(torch.randn(4, 3)).numpy()
    found = agent.diagnose(random_batch())
    assert not any(value.requires_grad for value in found.values())
    assert agent.update(random_batch()).keys().isdisjoint(found)  # in metrics.csv one name is one number


@pytest.mark.parametrize("name", DISCRETE)
def test_a_saved_agent_decodes_as_before(name, tmp_path):
    """Its state holds the quantizer, units of observations included."""
    agent, obs = agents(act="greedy")[name], torch.randn(64, 3)
    agent.vqvae.set_units(10 * torch.randn(64, 3) + 3)
    agent.update(random_batch())
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    torch.manual_seed(1)
    fresh = agents(act="greedy")[name]
    assert not torch.equal(fresh.act(obs), agent.act(obs))
    fresh.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    assert torch.equal(fresh.act(obs), agent.act(obs))
    assert torch.equal(fresh.vqvae.normalize(obs), agent.vqvae.normalize(obs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_of_an_agent_learns_on_as_the_agent(name, clone):
    """Its learning rates and those of its quantizer fall as they did, too."""
    agent, batch = agents()[name], random_batch()
    agent.update(batch)
    both = [agent, clone(agent)]
    for one in both:
        optimizers = [part for part in vars(one).values() if isinstance(part, torch.optim.Optimizer)]
        optimizers += [one.vqvae.optimizer] if hasattr(one, "vqvae") else []
        for optimizer in optimizers:
            decay_lr(optimizer, 3, 10)
        torch.manual_seed(0)
        one.update(batch)
        if hasattr(one, "vqvae"):
            one.vqvae.update(batch.obs, batch.actions)
    ours, theirs = (one.state_dict() for one in both)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_codes_that_were_forgotten_are_an_error():
    """Training on transitions whose actions no quantizer has encoded."""
    arrays = dict(
        observations=np.zeros((9, 3)), actions=np.zeros((9, 2)), rewards=np.zeros(9), terminals=np.arange(9) == 8
    )
    data, _ = make_transitions(arrays, None, torch.device("cpu"))
    for name in DISCRETE:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            agents()[name].update(data.sample(4))


def test_how_a_policy_acts_is_no_guess():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    with pytest.raises(ValueError, match="'Mean'"):
        vqvae.act(torch.zeros(1, 3), torch.zeros(1, 8), "Mean")


def test_preparing_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    prepare("cpu", "float32")
    assert torch.equal(torch.get_rng_state(), before)


def test_encoding_builds_no_graph():
    """For many rows a graph would take gigabytes."""
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        vqvae.encode(torch.randn(5000, 3), torch.rand(5000, 2))
        vqvae.encode_dataset(torch.randn(5000, 3), torch.rand(5000, 2))
    assert saved == []


@pytest.fixture
def like_cuda():
    """Lets modules move to "meta" as they move to CUDA: parameters stay the objects that their optimizers hold."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize("name", NAMES)
def test_an_agent_that_was_moved_says_so(name):
    """Its optimizers were made where it was made."""
    agent = agents()[name].to("meta")
    if hasattr(agent, "step"):
        agent.step = torch.zeros((), dtype=torch.float64)  # a number that can be read
    batch = type(random_batch())(*(column.to("meta") for column in random_batch()))
    with pytest.raises(UserError, match=r"moved to meta after it was made: make it there, inside `with torch.device`"):
        agent.update(batch)


@pytest.mark.usefixtures("like_cuda")
def test_a_quantizer_that_was_moved_says_so():
    vqvae = ActionVQVAE(3, 2, 8, hidden=(8,)).to("meta")
    with pytest.raises(UserError, match="moved to meta after it was made"):
        vqvae.update(torch.randn(4, 3, device="meta"), torch.rand(4, 2, device="meta"))


@pytest.mark.parametrize("name", NAMES)
def test_update_is_the_whole_training_step(name):
    """In a loop that calls nothing else every network moves: targets, and the average that acts, too."""
    agent = agents(lr=1e-2)[name]
    if name == "saq_cql":
        agent.args.target_every = 2
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    for _ in range(4):
        info = agent.update(random_batch())
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in info.values())
    after = agent.state_dict()
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in still} <= {"vqvae", "warm_up"}


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_the_arguments_that_are_read(name):
    """All of them and no others: "Read of `args`: lr, ..."."""
    kind = type(agents()[name])
    source = inspect.getsource(kind)
    fields = set(re.findall(r"\bargs\.(\w+)", source))
    (named,) = re.findall(r"Read of `args`: ([^.]*)\.", kind.__doc__)
    assert set(re.split(r",\s+", named)) == fields
    protocol = r"A training loop calls `update\(batch\)` and nothing else|protocol is Discrete\w+'s"
    assert re.search(protocol, " ".join(kind.__doc__.split()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_those_of_the_table(script):
    """What a run of a task starts with can be had without a command line."""
    rows = {word: row for words, row in script.HPARAMS.items() for word in words.split()}
    expected = script.Args(env="hopper-expert-v2", **(rows.get("hopper-expert-") or rows["hopper-"]))
    assert script.defaults("hopper-expert-v2") == expected
    plugin = "offline_envs:hopper-expert-v2"
    assert script.defaults(plugin) == dataclasses.replace(expected, env=plugin)
    assert script.defaults("Pendulum-v1") == script.Args(env="Pendulum-v1")
    plain = vars(script.defaults("hopper-expert-v2", plain=True))
    assert plain == vars(expected) | {"plain": True} | script.PLAIN
    plain, bare = (vars(script.defaults(task, plain=True)) for task in ("hopper-medium-replay-v2", "Pendulum-v1"))
    kept = {"env", "reward_scale"} | ({"alpha", "beta"} if script is saq_brac else set())  # IQL's; BRAC's are unknown
    assert {field for field in plain if plain[field] != bare[field]} <= kept  # nothing that was chosen here


# --- The quantizer alone ---

ALONE = """
import sys
for name in ("gymnasium", "h5py", "matplotlib", "tyro", "tqdm", "wandb", "filelock"):
    sys.modules[name] = None  # importing it raises
import torch
from vqvae import ActionVQVAE, fit
obs = torch.randn(200, 3)
actions = obs[:, :2].tanh()
vqvae = ActionVQVAE(3, 2, num_codes=4)
for step, info in fit(vqvae, obs, actions, steps=20):
    pass
codes = vqvae.encode_dataset(obs, actions)
print(step, tuple(vqvae.decode(obs, codes).shape))
"""


def test_the_quantizer_needs_torch_and_numpy_alone(tmp_path):
    shutil.copy(ROOT / "vqvae.py", tmp_path)
    process = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split(maxsplit=1) == ["20", "(200, 2)\n"]


def test_actions_in_another_unit_are_refused_without_an_environment(tmp_path):
    """Nobody could scale them back."""
    arrays = dataset()
    arrays["actions"] *= 2
    with pytest.raises(UserError) as error:
        load_task("none", write(tmp_path / "d.npz", arrays), torch.device("cpu"))
    assert re.fullmatch(r"the dataset's actions reach 2, and .*: scale to \[-1, 1\]\.", str(error.value))


def test_messages_of_the_module_name_no_flags():
    """Whoever uses it without a script has none."""
    tree = ast.parse((ROOT / "vqvae.py").read_text())
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in strings if "--" in text] == []


# --- Two files in an empty folder ---

FOREIGN = """
import sys
import torch
from vqvae import ActionVQVAE, fit, load_task
import {script} as script

torch.manual_seed(0)
with torch.device("cpu"):
    task, data = load_task("none", sys.argv[1], torch.device("cpu"))
    vqvae = ActionVQVAE(3, 1, num_codes=4)
    for step, info in fit(vqvae, data.obs, data.actions, steps=20):
        pass
    data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions), rewards=data.obs[:, 0])  # to be learned
    args = script.defaults("none")
    args.num_codes = 4
    agent = next(iter(script.make_agents(3, 1, vqvae, args).values()))
agent.args.discount = 0.0  # a target that stays
losses = []
for step in range(60):
    info = agent.update(data.sample(64))
    losses.append(sum(value.item() for name, value in info.items() if name.endswith("loss")))
actions = agent.act(data.obs).numpy()
assert actions.shape == (len(data.obs), 1) and abs(actions).max() <= 1
print(sum(losses[:10]) / 10, sum(losses[-10:]) / 10)
"""


@pytest.mark.parametrize(
    ("script", "suffix", "run"),
    [
        ("saq_cql", ".npz", run_script),
        ("saq_cql", ".hdf5", run_forked),
        ("saq_iql", ".npz", run_forked),
        ("saq_brac", ".hdf5", run_forked),
        ("saq_bc", ".npz", run_forked),
    ],
)
def test_two_files_in_an_empty_folder_train_on_a_users_own_data(tmp_path, script, suffix, run):
    """By the command, and in a training loop of the user's own."""
    for file in (f"{script}.py", "vqvae.py"):
        shutil.copy(ROOT / file, tmp_path)
    arrays = dataset()
    arrays["actions"] *= 2  # Pendulum's torque lies in [-2, 2]
    write(tmp_path / f"mine{suffix}", arrays)
    command = ["--env", "Pendulum-v1", "--dataset-path", f"mine{suffix}", *SHORT]
    process = succeeded(run(*command, cwd=tmp_path, script=f"{script}.py"))
    assert "396 transitions, 4 episodes" in process.stdout
    assert "The score is the return itself." in process.stdout
    assert "leave [-1, 1]" not in process.stdout
    assert (only_run(tmp_path / "runs") / "result.json").exists()
    (tmp_path / "foreign.py").write_text(FOREIGN.format(script=script))
    scaled = write(tmp_path / f"scaled{suffix}", dataset())
    process = succeeded(run_forked(scaled, cwd=tmp_path, script="foreign.py"))
    first, last = map(float, process.stdout.splitlines()[-1].split())
    assert last < first


def test_with_the_folder_of_environments_a_copy_knows_d4rls_names(tmp_path):
    for file in ("saq_bc.py", "vqvae.py"):
        shutil.copy(ROOT / file, tmp_path)
    write(tmp_path / "hopper_medium-v2.hdf5", dataset(obs_dim=11, action_dim=3))
    command = ["--env", "hopper-medium-v2", "--vq-steps=20", "--steps=20", "--eval-episodes=1", "--final-episodes=1"]
    command += ["--no-compare"]
    options = {"cwd": tmp_path, "script": "saq_bc.py", "env": {**os.environ, "D4RL_DATASET_DIR": str(tmp_path)}}
    assert "(offline_envs: No module named 'offline_envs')" in one_sentence(run_script(*command, **options))
    shutil.copytree(ROOT / "offline_envs", tmp_path / "offline_envs")
    process = succeeded(run_script(*command, **options))
    assert "the data are D4RL's." in process.stdout
