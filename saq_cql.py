"""SAQ-CQL: conservative Q-learning on quantized actions, beside the continuous CQL that it replaces.

Luo et al., "Action-Quantized Offline Reinforcement Learning for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731;
CQL is Kumar et al., NeurIPS 2020, arXiv:2006.04779. CQL pushes down log sum_a exp Q(s, a). Over continuous actions that
sum is an integral and has to be estimated from samples; over the K codes of a VQ-VAE it is exact (Eq. 12).

    python saq_cql.py                                             # three maze demonstrations, made for this figure
    python saq_cql.py --env hopper-expert-v2 --no-compare         # any D4RL name; downloads the dataset once
    python saq_cql.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Needs vqvae.py next to it; offline_envs.py too for D4RL's names.
"""

import copy
import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from vqvae import ActionVQVAE, accelerate, adam, codebook_health, fit, mlp, use_fast_matmul

# --- Arguments ---


@dataclass
class Args:
    # --- Task and data ---
    env: str = "maze2d-large-demos-v1"
    """a D4RL name, any Gymnasium id (with --dataset-path), or "none" to train without evaluation"""
    dataset_path: str | None = None
    """an .hdf5 or .npz file in D4RL's layout, in place of the task's own dataset"""
    # --- The run ---
    seed: int = 0
    """seed of networks, batches and evaluation"""
    compare: bool = True
    """train the continuous twin after SAQ, on the same data"""
    plain: bool = False
    """the paper's plain recipe: 64 codes, no dead-code revival, the trained Q network itself acts"""
    out: str = "runs"
    """folder for runs; each run makes its own folder in it"""
    resume: str | None = None
    """go on with the run in this folder from its checkpoint"""
    eval_only: str | None = None
    """evaluate the policies saved in this run folder, train nothing"""
    track: bool = False
    """log to Weights & Biases as well"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where tensors live"""
    compile: bool | None = None
    """torch.compile the updates; by default when there are enough steps to repay the compilation"""
    # --- Evaluation and logging ---
    eval_every: int = 5_000
    """steps between two evaluations, each followed by a checkpoint"""
    eval_episodes: int = 10
    """episodes of each evaluation during training"""
    final_episodes: int = 100
    """episodes of the final evaluation"""
    log_every: int = 500
    """steps between two log entries"""
    # --- Quantizer ---
    vq_steps: int = 30_000
    """gradient steps of the quantizer (the paper: 500_000)"""
    num_codes: int = 64
    """K, the number of codes"""
    action_only: bool = False
    """the paper's ablation: quantize actions without looking at the state (Table 3)"""
    revive_every: int = 100
    """move dead codes to where actions are, every so many steps; 0: never"""
    kmeans_init: bool = False
    """start the codebook at k-means centres of the encoder's outputs"""
    # --- Both agents ---
    steps: int = 70_000
    """gradient steps of each agent (the paper: 1_000_000)"""
    batch_size: int = 256
    """transitions a gradient step sees"""
    lr: float = 3e-4
    """learning rate of every network"""
    discount: float = 0.99
    """gamma"""
    # --- SAQ-CQL ---
    alpha: float = 20.0
    """weight of the conservative penalty; the TD loss has no 1/2, so the paper's alpha is half of it"""
    target_every: int = 200
    """steps between two copies of the Q network into its target"""
    weight_decay: float = 1e-3
    """AdamW's weight decay (the official code passes it as Adam's beta1)"""
    average: float = 0.001
    """rate of the running average of the Q network that acts; 0: the trained network acts"""
    # --- Continuous CQL ---
    cql_alpha: float = 5.0
    """weight of the sampled conservative penalty"""
    cql_samples: int = 10
    """actions drawn from each of: uniform, policy in s, policy in s'"""
    polyak: float = 0.005
    """rate at which target critics follow the critics"""


# Fields by task; the longest prefix that fits --env wins, and a flag on the command line wins over its row.
HPARAMS = {
    "maze2d-large-demos": dict(num_codes=4, vq_steps=5_000, steps=10_000, alpha=20.0, eval_every=500),
}
PLAIN = dict(num_codes=64, revive_every=0, average=0.0)


def parse_args():
    """Command line > the task's row > class defaults. A resumed run takes the arguments it was started with."""
    args = tyro.cli(Args, description=__doc__)
    folder = args.resume or args.eval_only
    if folder:
        try:
            saved = json.loads((Path(folder) / "args.json").read_text())["args"]
            default = Args(**{**saved, "resume": args.resume, "eval_only": args.eval_only})
        except (OSError, ValueError, TypeError, KeyError) as error:
            fail(f"{folder} is not a run folder of this script ({error}): name the folder that holds args.json.")
    else:
        row = max((prefix for prefix in HPARAMS if args.env.startswith(prefix)), key=len, default=None)
        row = HPARAMS.get(row, {}) | (PLAIN if args.plain else {})
        default = dataclasses.replace(Args(), env=args.env, plain=args.plain, **row)
    again = tyro.cli(Args, default=default)
    if folder and again.env != default.env:
        fail(f"{folder} holds a run of {default.env}, not of {again.env}: leave out --env.")
    return again


def fail(message):
    """Ends the program over something its user can mend: one sentence, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- Data ---


class Transitions(NamedTuple):
    """N transitions, float32. A terminal means "nothing follows, do not bootstrap"; a time limit is no terminal."""

    obs: torch.Tensor  # (N, O)
    actions: torch.Tensor  # (N, A), in [-1, 1]
    rewards: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminals: torch.Tensor  # (N,)
    codes: torch.Tensor  # (N,), int64: what the quantizer made of the actions


def sample(data, batch_size):
    """A batch of transitions, uniformly with replacement."""
    rows = torch.randint(len(data.obs), (batch_size,), device=data.obs.device)
    return Transitions(*(column[rows] for column in data))


def make_env(name):
    """The environment and its Gymnasium id: a D4RL name from offline_envs.py, or any id that Gymnasium knows."""
    if name == "none":
        return None, None
    reasons = []
    for env_id in (f"offline_envs:{name}", name):
        try:
            return gym.make(env_id), env_id
        except (gym.error.Error, ImportError) as error:
            reasons.append(str(error).rstrip("."))
    fail(f"there is no environment {name} ({'; '.join(reasons)}).")


def load_dataset(args, env):
    """Reads the dataset; returns a dict of arrays, and in words where they come from."""
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    own = env.get_wrapper_attr("dataset_filepath") if env and env.has_wrapper_attr("get_dataset") else None
    path = args.dataset_path or own
    if path is None:
        fail(f"{args.env} has no dataset of its own: pass --dataset-path.")
    try:
        if args.dataset_path is None:
            arrays = env.get_wrapper_attr("get_dataset")()
        elif path.endswith(".npz"):
            with np.load(path) as file:
                arrays = {key: file[key] for key in keys if key in file}
        else:
            with h5py.File(path) as file:
                arrays = {key: file[key][:] for key in keys if key in file}
    except Exception as error:  # h5py and numpy raise a dozen types over a damaged file
        fail(f"{path} cannot be read ({type(error).__name__}: {error}).")
    return arrays, str(path)


def make_transitions(arrays, env, device):
    """Checks D4RL's arrays and turns them into Transitions; returns them and the return of each episode."""
    if env is not None and not (isinstance(env.action_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        fail(f"{env.spec.id} has actions or observations that are no vectors: this script needs flat Box spaces.")
    columns = {}
    for key, dims in dict(observations=2, actions=2, rewards=1, terminals=1, timeouts=1, next_observations=2).items():
        if key not in arrays and key in ("timeouts", "next_observations"):
            continue
        if key not in arrays:
            fail(f"the dataset has no {key}: D4RL's layout is observations, actions, rewards, terminals, timeouts.")
        try:
            column = np.asarray(arrays[key], np.float32)
        except (TypeError, ValueError):
            fail(f"the dataset's {key} are no numbers, they are {np.asarray(arrays[key]).dtype}.")
        column = column[:, 0] if dims == 1 and column.ndim == 2 and column.shape[1] == 1 else column
        if column.ndim != dims or column.size == 0 or len(column) != len(arrays["observations"]):
            fail(f"the dataset's {key} have shape {column.shape}, its observations {arrays['observations'].shape}.")
        bad = np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(1))
        if len(bad) > 0:
            fail(f"the dataset's {key} are not finite in {len(bad)} rows, first in row {bad[0]}: remove those episodes.")
        columns[key] = column
    obs, actions, rewards = columns["observations"], columns["actions"], columns["rewards"]
    if env is not None:
        for name, column, space in [("observations", obs, env.observation_space), ("actions", actions, env.action_space)]:
            if column.shape[1:] != space.shape:
                fail(f"the dataset's {name} have size {column.shape[1]}, those of {env.spec.id} {space.shape[0]}.")
        low, high = env.action_space.low, env.action_space.high
        actions = actions if in_unit_box(env.action_space) else 2 * (actions - low) / (high - low) - 1
    outside = np.abs(actions) > 1
    if outside.any():
        print(f"warning: {outside.any(1).sum()} of {len(actions)} actions leave [-1, 1] (up to {np.abs(actions).max():.2f}): clipped")
        actions = actions.clip(-1, 1)

    # Where episodes end. Files without timeouts are cut where the environment's time limit would have struck.
    terminals = columns["terminals"] > 0
    ends = terminals | (columns["timeouts"] > 0) if "timeouts" in columns else terminals.copy()
    limit = env.spec.max_episode_steps if env is not None else None
    if "timeouts" not in columns and limit:
        step = 0
        for row, terminal in enumerate(terminals):
            step = 0 if terminal else step + 1
            if step == limit:
                ends[row], step = True, 0
    if not ends.any():
        fail("the dataset marks no episode ends: set terminals or timeouts in the last row of each episode.")
    ends[-1] = True
    returns = np.add.reduceat(rewards, np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1]))

    # The next observation is the next row, unless the file holds it. Where an episode ends for any other reason than a
    # terminal state, what follows is unknown and the transition is dropped.
    next_obs = columns.get("next_observations", np.roll(obs, -1, 0))
    keep = np.ones_like(ends) if "next_observations" in columns else terminals | ~ends
    columns = [obs, actions, rewards, next_obs, terminals.astype(np.float32), np.zeros(len(obs), np.int64)]
    return Transitions(*(torch.as_tensor(column[keep], device=device) for column in columns)), returns


def in_unit_box(space):
    return bool((space.low == -1).all() and (space.high == 1).all())


# --- Evaluation ---


def make_eval_envs(env, env_id, episodes):
    wrappers = None if in_unit_box(env.action_space) else [lambda e: gym.wrappers.RescaleAction(e, -1.0, 1.0)]
    return gym.make_vec(env_id, num_envs=min(episodes, 10), vectorization_mode="sync", wrappers=wrappers)


@torch.no_grad()
def evaluate(act, envs, episodes, seed, device):
    """The returns (E,) of `episodes` episodes, a batch of environments at a time; episode i is seeded seed + i."""
    returns = []
    for first in range(0, episodes, envs.num_envs):
        obs, _ = envs.reset(seed=[seed + first + i for i in range(envs.num_envs)])
        total, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        while running.any():
            actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            total += rewards * running
            running &= ~(terminated | truncated)  # environments restart by themselves: count the first episode only
        returns.append(total)
    return np.concatenate(returns)[:episodes]


# --- SAQ-CQL ---


class DiscreteCQL(nn.Module):
    """CQL over the K codes of a frozen quantizer: one Q network with K outputs, and everything exact."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        self.decode, self.args = vqvae.decode, args
        self.qf = mlp(obs_dim, vqvae.num_codes)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.qf_average = copy.deepcopy(self.qf).requires_grad_(False)
        self.optimizer = adam(self.qf.parameters(), args.lr, args.weight_decay)

    def loss(self, batch):
        q = self.qf(batch.obs)  # (B, K)
        q_data = q.gather(1, batch.codes[:, None])[:, 0]  # (B,)
        # Double DQN: the network chooses the next code, its target rates it.
        with torch.no_grad():
            next_codes = self.qf(batch.next_obs).argmax(1, keepdim=True)  # (B, 1)
            next_q = self.qf_target(batch.next_obs).gather(1, next_codes)[:, 0]  # (B,)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q
        td_loss = (q_data - td_target).square().mean()
        # CQL's penalty, log sum_k exp Q(s, k) - Q(s, k_data), summed over all codes. It is the cross-entropy of
        # softmax(Q) with the data's code (Eq. 12): as alpha grows, SAQ-CQL becomes behavioural cloning.
        penalty = (q.logsumexp(1) - q_data).mean()
        loss = td_loss + self.args.alpha * penalty
        return loss, {"loss": loss, "td_loss": td_loss, "penalty": penalty, "q_data": q_data.mean()}

    def update(self, batch):
        """One gradient step on a batch of transitions; returns what to log."""
        loss, info = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.average:
            polyak_update(self.qf_average, self.qf, self.args.average)
        return {name: value.detach() for name, value in info.items()}

    def update_target(self, step):
        if step % self.args.target_every == 0:
            self.qf_target.load_state_dict(self.qf.state_dict())

    def act(self, obs):
        """Greedy actions (B, A) for obs (B, O): the best code, decoded in its state."""
        qf = self.qf_average if self.args.average else self.qf
        return self.decode(obs, qf(obs).argmax(1)).clamp(-1, 1)

    def diagnose(self, batch):
        return {"penalty_exact": self.loss(batch)[1]["penalty"]}

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, state):
        self.optimizer.load_state_dict(state)


@torch.no_grad()
def polyak_update(target, network, rate):
    """target <- (1 - rate) target + rate network."""
    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast, rate)


# --- Continuous CQL ---


class TanhGaussian(nn.Module):
    """A Gaussian policy squashed into [-1, 1] by tanh."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim, hidden=(256, 256))

    def forward(self, obs):
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, (log_std - 1).clamp(-20, 2)  # (B, A) each

    def sample(self, obs, n):
        """Draws n actions in each state: actions (n, B, A) and their log densities (n, B)."""
        mean, log_std = self(obs)
        noise = torch.randn(n, *mean.shape, device=obs.device)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log (1 - tanh(raw)^2), kept stable
        return raw.tanh(), log_prob.sum(-1)


class Critic(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, hidden=(256, 256))

    def forward(self, obs, actions):
        """Q values (n, B) of actions (n, B, A) in obs (B, O)."""
        return self.net(torch.cat([obs.expand(len(actions), *obs.shape), actions], -1))[..., 0]


class ContinuousCQL(nn.Module):
    """CQL(H) as in the code that SAQ grew out of (young-geng/JaxCQL): SAC with twin critics and automatic temperature,
    plus the penalty, whose log-integral over actions is estimated from importance-weighted samples."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.actor = TanhGaussian(obs_dim, action_dim)
        self.qf1, self.qf2 = Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)
        self.qf1_target = copy.deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = copy.deepcopy(self.qf2).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.actor_optimizer = adam([*self.actor.parameters(), self.log_temperature], args.lr)
        self.qf_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], args.lr)

    def penalty_samples(self, batch):
        """Actions (3n, B, A) to estimate log integral exp Q(s, a) da with, and their log densities (3n, B): uniform,
        from the policy in s, and from the policy in s'. All of them are rated in s."""
        n, (size, dim) = self.args.cql_samples, batch.actions.shape
        uniform = torch.rand(n, size, dim, device=batch.obs.device) * 2 - 1
        here, log_prob_here = self.actor.sample(batch.obs, n)
        there, log_prob_there = self.actor.sample(batch.next_obs, n)
        log_prob_uniform = torch.full_like(log_prob_here, -dim * math.log(2))
        return torch.cat([uniform, here, there]), torch.cat([log_prob_uniform, log_prob_here, log_prob_there])

    def qf_loss(self, batch):
        with torch.no_grad():
            next_actions, _ = self.actor.sample(batch.next_obs, 1)
            next_q = torch.min(self.qf1_target(batch.next_obs, next_actions), self.qf2_target(batch.next_obs, next_actions))
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q[0]
            samples, log_prob = self.penalty_samples(batch)
        actions = torch.cat([batch.actions[None], samples])  # (1 + 3n, B, A)
        losses = []
        for qf in (self.qf1, self.qf2):
            q = qf(batch.obs, actions)  # (1 + 3n, B)
            td_loss = (q[0] - td_target).square().mean()
            penalty = ((q[1:] - log_prob).logsumexp(0) - q[0]).mean()
            losses.append(td_loss + self.args.cql_alpha * penalty)
        info = {"qf_loss": losses[0] + losses[1], "td_loss": td_loss, "penalty": penalty, "q_data": q[0].mean()}
        return losses[0] + losses[1], info

    def actor_loss(self, batch):
        """SAC's: maximise min Q + temperature * entropy, and move the temperature until the entropy is -A."""
        actions, log_prob = self.actor.sample(batch.obs, 1)
        q = torch.min(self.qf1(batch.obs, actions), self.qf2(batch.obs, actions))
        temperature = self.log_temperature.exp()
        actor_loss = (temperature.detach() * log_prob - q).mean()
        temperature_loss = (-self.log_temperature * (log_prob.detach() - batch.actions.shape[1])).mean()
        return actor_loss + temperature_loss, {"actor_loss": actor_loss, "entropy": -log_prob.mean(), "temperature": temperature}

    def update(self, batch):
        loss, info = self.qf_loss(batch)
        loss.backward()
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()
        loss, actor_info = self.actor_loss(batch)
        loss.backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        self.qf_optimizer.zero_grad()  # the actor's loss went through the critics
        return {name: value.detach() for name, value in {**info, **actor_info}.items()}

    def update_target(self, step):
        polyak_update(self.qf1_target, self.qf1, self.args.polyak)
        polyak_update(self.qf2_target, self.qf2, self.args.polyak)

    def act(self, obs):
        """The policy's mode (B, A) for obs (B, O)."""
        return self.actor(obs)[0].tanh()

    def diagnose(self, batch):
        """The penalty of the first critic as training estimates it, less the log(3n) by which that estimate is off by
        construction, beside its exact value, which two-dimensional actions allow (Fig. 2 of the paper)."""
        samples, log_prob = self.penalty_samples(batch)
        q_data = self.qf1(batch.obs, batch.actions[None])[0]
        log_z = (self.qf1(batch.obs, samples) - log_prob).logsumexp(0) - math.log(len(samples))
        info = {"penalty_sampled": (log_z - q_data).mean()}
        if batch.actions.shape[1] == 2:
            info["penalty_exact"] = (exact_log_z(self.qf1, batch.obs) - q_data).mean()
        return info

    def get_extra_state(self):
        return {"actor": self.actor_optimizer.state_dict(), "qf": self.qf_optimizer.state_dict()}

    def set_extra_state(self, state):
        self.actor_optimizer.load_state_dict(state["actor"])
        self.qf_optimizer.load_state_dict(state["qf"])


def exact_log_z(qf, obs, grid=64):
    """log of the integral of exp Q(s, a) over the square [-1, 1]^2, (B,): midpoint rule on a grid of grid^2 cells."""
    centres = (torch.arange(grid, device=obs.device) + 0.5) * 2 / grid - 1
    actions = torch.cartesian_prod(centres, centres)  # (grid^2, 2)
    q = torch.cat([qf(obs, chunk[:, None].expand(-1, len(obs), 2)) for chunk in actions.split(256)])  # (grid^2, B)
    return q.logsumexp(0) + 2 * math.log(2 / grid)


# --- One run ---


class Run:
    """The folder of one run: args.json, metrics.csv, checkpoint.pt, result.json, comparison.png."""

    def __init__(self, args):
        name = f"{args.env.replace('/', '_')}__{Path(__file__).stem}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.args, self.folder = args, Path(args.resume or args.eval_only or Path(args.out) / name)
        self.done, self.learners, self.interrupted = {}, {}, False
        if not (args.resume or args.eval_only):
            self.folder.mkdir(parents=True)
            versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium")}
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
            about = {"args": vars(args), "versions": versions, "python": sys.version, "git_commit": commit}
            (self.folder / "args.json").write_text(json.dumps(about, indent=2))
        self.metrics = open(self.folder / "metrics.csv", "a")
        if args.track:
            import wandb

            wandb.init(project="saq", name=self.folder.name, config=vars(args), dir=self.folder, resume="allow")
            wandb.define_metric("*", step_metric="step")

    def log(self, phase, step, values):
        """Appends step, name, value rows to metrics.csv."""
        self.metrics.writelines(f"{step},{phase}/{name},{value:.6g}\n" for name, value in values.items())
        self.metrics.flush()
        if self.args.track:
            import wandb

            wandb.log({f"{phase}/{name}": value for name, value in values.items()} | {"step": step})

    def save(self):
        """Writes checkpoint.pt: under another name first, so that an interruption never leaves half a file."""
        state = {
            "done": self.done,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "metrics_size": self.metrics.tell(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        temporary = self.folder / "checkpoint.pt.tmp"
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, self.folder / "checkpoint.pt")

    def load(self):
        """Takes up the state of checkpoint.pt."""
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, weights_only=True, map_location=self.args.device)
            for name, learner in self.learners.items():
                learner.load_state_dict(state["learners"][name])
        except Exception as error:  # torch raises a dozen types over a damaged or foreign file
            fail(f"{path} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}).")
        self.done = state["done"]
        torch.set_rng_state(state["rng"].cpu())
        if self.args.device != "cpu":
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        self.metrics.truncate(state["metrics_size"])  # rows written after the checkpoint will be written again

    def train(self, phase, steps, updates, evaluation=None):
        """Runs one phase to its last step. `updates(start)` yields (step, info) after each step from `start` on."""
        args, start = self.args, self.done.get(phase, 0)
        if start == 0:
            torch.manual_seed(args.seed)  # each phase draws from a stream of its own
        bar = tqdm(updates(start), phase, total=steps, initial=start, dynamic_ncols=True)
        for step, info in bar:
            last = step == steps or self.interrupted
            if last or step % args.log_every == 0 or step % args.eval_every == 0:
                values = {name: value.item() for name, value in info.items()}
                for name, value in values.items():
                    if not math.isfinite(value):
                        fail(f"{phase}/{name} is {value} in step {step}: the checkpoint in {self.folder} is the last good one.")
                self.log(phase, step, values)
            if step % args.eval_every == 0 or step == steps:
                if evaluation:
                    values = evaluation()
                    self.log(phase, step, values)
                    bar.set_postfix({name: f"{values[name]:.1f}" for name in ("score", "return") if name in values})
            if last or step % args.eval_every == 0:
                self.done[phase] = step
                self.save()
            if self.interrupted:
                print(f"\nstopped in step {step} of {phase}; go on with: python {Path(__file__).name} --resume {self.folder}")
                raise SystemExit(130)


def learn(agent, data, args, start):
    """Trains an agent on batches of `data`; yields (step, info) after each step."""
    update = accelerate(lambda: agent.update(sample(data, args.batch_size)), data.obs.device, args.compile)
    for step in range(start + 1, args.steps + 1):
        info = update()
        agent.update_target(step)
        yield step, info


def main():
    args = parse_args()
    print({k:v for k,v in vars(args).items()})
    device = torch.device(args.device)
    if device.type == "cpu":
        use_fast_matmul()
    if args.compile is None:
        args.compile = args.steps >= 50_000
    env, env_id = make_env(args.env)
    arrays, source = load_dataset(args, env)
    data, returns = make_transitions(arrays, env, device)
    normalize = env.get_wrapper_attr("get_normalized_score")
    print(f"data: {source}, {len(data.obs)} transitions, {len(returns)} episodes, returns {returns.min():.1f} to {returns.max():.1f} score {100*normalize(returns.mean()):.1f}")
    run = Run(args)
    torch.manual_seed(args.seed)
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    with device:
        vqvae = ActionVQVAE(obs_dim, action_dim, args.num_codes, action_only=args.action_only, lr=args.lr)
        agent = DiscreteCQL(obs_dim, vqvae, args)
        run.learners = {"quantizer": vqvae, "saq_cql": agent}
        if args.compare:
            run.learners["cql"] = twin = ContinuousCQL(obs_dim, action_dim, args)
    if args.resume: run.load()
    envs = make_eval_envs(env, env_id, args.eval_episodes)
    def ev(agent):
        def f():
            r = evaluate(agent.act, envs, args.eval_episodes, 1000, device)
            g = sample(data, 256)
            return {"return": r.mean(), "score": 100*normalize(r.mean()), **{k:v.item() for k,v in agent.diagnose(g).items()}}
        return f
    def health(): return codebook_health(vqvae, data.obs, data.actions)
    t=time.time()
    run.train("quantizer", args.vq_steps, lambda start: fit(vqvae, data.obs, data.actions, args.vq_steps, args.batch_size, args.revive_every, args.kmeans_init, start, args.compile), None)
    print(health(), time.time()-t)
    data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions))
    for name in list(run.learners)[1:]:
        t=time.time()
        run.train(name, args.steps, lambda start: learn(run.learners[name], data, args, start), ev(run.learners[name]))
        print(name, time.time()-t)
        import subprocess as sp
        sc=[float(l.split(',')[2]) for l in open(run.folder/'metrics.csv') if f',{name}/score' in l]
        print('SCORES', name, 'last5 %.1f'%np.mean(sc[-5:]), [round(x) for x in sc])

if __name__ == "__main__":
    main()
