"""SAQ-CQL: conservative Q-learning on quantized actions, beside the continuous CQL that it replaces.

Luo et al., "Action-Quantized Offline Reinforcement Learning for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731;
CQL is Kumar et al., NeurIPS 2020, arXiv:2006.04779. CQL pushes down log sum_a exp Q(s, a). Over continuous actions that
sum is an integral and has to be estimated from samples; over the K codes of a VQ-VAE it is exact (Eq. 12).

    python saq_cql.py                                             # three maze demonstrations, 7 minutes on 2 cores
    python saq_cql.py --env hopper-expert-v2 --no-compare         # a D4RL name; downloads the dataset once
    python saq_cql.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Needs vqvae.py next to it; offline_envs.py too for the names of D4RL, robomimic and Minari.
"""

import copy
import csv
import dataclasses
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
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

# isort: off
from vqvae import ActionVQVAE, UserError, accelerate, adam, check_arguments, codebook_health, describe_health, fit
from vqvae import load_arrays, make_env, make_transitions, minimize, mlp, polyak_update, scale_rewards, scoring
from vqvae import tune_cpu

SCRIPT = Path(__file__).stem

# --- Arguments ---


@dataclass
class Args:
    # --- Task and data ---
    env: str = "maze2d-large-demos-v1"  # a task of D4RL, robomimic or Minari, a Gymnasium id, or "none"
    dataset_path: str | None = None  # an .hdf5 or .npz file in place of the task's own dataset
    # --- The run ---
    seed: int = 0  # seed of networks and batches; every run is evaluated in the same episodes
    compare: bool = True  # train the continuous twin after SAQ, on the same data
    plain: bool = False  # the authors' settings, without what is added here (PLAIN, below)
    out: str = "runs"  # folder for runs; each run makes its own folder in it
    resume: str | None = None  # go on with the run in this folder from its checkpoint
    eval_only: str | None = None  # evaluate the policies saved in this run folder, train nothing
    track: bool = False  # log to Weights & Biases as well
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where tensors live
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile on the CPU; auto: where --steps is at least 10_000
    # --- Evaluation and logging ---
    eval_every: int = 5_000  # steps between two evaluations, each followed by a checkpoint
    eval_episodes: int = 10  # episodes of each evaluation during training
    final_episodes: int = 100  # episodes of the final evaluation
    log_every: int = 500  # steps between two log entries
    # --- Quantizer ---
    vq_steps: int = 30_000  # gradient steps of the quantizer (the authors: 500_000)
    num_codes: int = 64  # K, the number of codes
    action_only: bool = False  # the paper's ablation: quantize actions without looking at the state (Table 3)
    vq_decay: bool = True  # let the quantizer's learning rate fall to 0 along a cosine
    revive_every: int = 100  # move dead codes to where actions are, every so many steps; 0: never
    kmeans_init: bool = False  # start the codebook at k-means centres of the encoder's outputs
    # --- Both agents ---
    steps: int = 70_000  # gradient steps of each agent (the authors: 1_000_000)
    batch_size: int = 256  # transitions a gradient step sees
    lr: float = 3e-4  # learning rate of every network
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # is added to them then; scores stay as they are
    act: Literal["greedy", "sample"] = "greedy"  # SAQ (and Gaussian cloning): the likeliest action, or one drawn
    # --- SAQ-CQL ---
    alpha: float = 20.0  # weight of the penalty; the TD loss has no 1/2, so the paper's alpha is half of it
    target_every: int = 200  # steps between two copies of the Q network into its target
    weight_decay: float = 1e-3  # AdamW's weight decay (the official code passes it as Adam's beta1)
    average: float = 0.001  # rate of the running average of the Q network that acts; 0: the trained network acts
    # --- Continuous CQL ---
    cql_alpha: float = 5.0  # weight of the sampled conservative penalty
    cql_samples: int = 10  # actions drawn from each of: uniform, policy in s, policy in s'
    polyak: float = 0.005  # rate at which target critics follow the critics


# Fields by task. A row holds for names that start with one of its words; the longest word wins, and a flag on the
# command line wins over the row. The paper prints no hyperparameters; what it says of the authors is from their code.
HPARAMS = {
    # Chosen here, on these demonstrations and on data that stand in for hopper-expert.
    "maze2d-large-demos": dict(num_codes=4, act="sample", vq_steps=15_000, steps=10_000, eval_every=500),
    "hopper-expert": dict(alpha=100.0, vq_steps=20_000, steps=40_000, eval_every=2_000),
    # The middle of what the authors' scripts sweep: alpha 15, 20, 30 for locomotion; 10, 15, 20, 30 for kitchen.
    "hopper halfcheetah walker2d ant kitchen": dict(alpha=20.0),
    # Nothing was released. Ours, untried: their kitchen value; for antmaze, CORL's CQL (rewards 10 r - 5, alpha 5).
    "pen door hammer relocate": dict(alpha=20.0),
    "antmaze": dict(alpha=5.0, reward_scale=10.0, reward_shift=-5.0, eval_episodes=100),
    "lift can square tool transport": dict(alpha=20.0, eval_episodes=50, final_episodes=50),
}
PLAIN = dict(num_codes=64, vq_decay=False, revive_every=0, average=0.0, act="greedy", alpha=20.0)
DIAGNOSIS = {"penalty_exact": "-", "penalty_sampled": ":"}  # the series in the figure's right panel, and their lines


def parse_args():
    """A flag on the command line > the task's row of HPARAMS > Args. A resumed run starts from its own arguments."""
    args = tyro.cli(Args, args=[word for word in sys.argv[1:] if word not in ("-h", "--help")])
    folder = args.resume or args.eval_only
    if folder:
        try:
            saved = json.loads((Path(folder) / "args.json").read_text())["args"]
            default = Args(**{**saved, "resume": args.resume, "eval_only": args.eval_only})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder} is not the folder of a run of this script: {error}.") from error
    else:
        task = args.env.split(":")[-1]
        rows = {word: row for words, row in HPARAMS.items() for word in words.split() if task.startswith(word)}
        word = max(rows, key=len, default="any task")
        row = rows.get(word, {}) | (PLAIN if args.plain else {})
        default = dataclasses.replace(Args(), env=args.env, plain=args.plain, **row)
        print(f"hyperparameters for {word}: {row or 'the defaults'}")
    args = tyro.cli(Args, default=default, description=__doc__)  # --help shows the defaults of the task
    check_arguments(args, default if folder else None)
    auto = "on" if args.steps >= 10_000 else "off"
    return dataclasses.replace(args, compile=auto if args.compile == "auto" else args.compile)


# --- Evaluation ---


def make_eval_envs(spec, episodes):
    rescale = [lambda env: gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))]
    return gym.make_vec(spec, num_envs=min(episodes, 10), vectorization_mode="sync", wrappers=rescale)


def choose(logits, how):
    """One code for each row of logits (B, K): the most likely, or one drawn from their softmax. Returns (B,)."""
    return logits.argmax(1) if how == "greedy" else logits.softmax(1).multinomial(1)[:, 0]


@torch.no_grad()
def evaluate(act, envs, episodes, device, seed=1_000):
    """The returns (E,) of `episodes` episodes, `envs.num_envs` at a time; episode i starts from seed + i."""
    torch.manual_seed(seed)  # for policies that sample
    returns = []
    for first in range(seed, seed + episodes, envs.num_envs):
        obs, _ = envs.reset(seed=list(range(first, first + envs.num_envs)))
        total, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
        while running.any():
            actions = act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu().numpy()
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            total += rewards * running
            running &= ~(terminated | truncated)  # environments start again by themselves; the first episode counts
        returns.append(total)
    return np.concatenate(returns)[:episodes]


@torch.no_grad()
def assess(agent, envs, data, score, args):
    """What is logged at an evaluation: score and return where there is an environment, and the agent's diagnosis."""
    with torch.random.fork_rng([0] if args.device == "cuda" else []):  # the training's random numbers stay as they are
        torch.manual_seed(args.seed)
        values = {name: value.item() for name, value in agent.diagnose(data.sample(256)).items()}
        if envs:
            mean = evaluate(agent.act, envs, args.eval_episodes, data.obs.device).mean()
            values = {"score": score(mean), "return": mean} | values
    return values


# --- SAQ-CQL ---


class DiscreteCQL(nn.Module):
    """CQL over the K codes of a frozen quantizer: one Q network with K outputs, every sum over actions exact."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        self.args, self.decode = args, vqvae.decode
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
        # The conservative penalty log sum_k exp Q(s, k) - Q(s, k_data). It is the cross-entropy of softmax(Q) with the
        # data's codes (Eq. 12), so a large alpha turns SAQ-CQL into behavioural cloning.
        penalty = (q.logsumexp(1) - q_data).mean()
        loss = td_loss + self.args.alpha * penalty
        return loss, {"loss": loss, "td_loss": td_loss, "penalty": penalty, "q_data": q_data.mean()}

    def update(self, batch):
        """One gradient step; returns what to log."""
        return minimize(*self.loss(batch), self.optimizer)

    def update_targets(self, step):
        """After each step, counted from 1: the network that acts follows, the target is copied now and then."""
        if self.args.average:  # of the first steps a plain mean: the random start leaves no trace
            polyak_update(self.qf_average, self.qf, max(self.args.average, 1 / step))
        if step % self.args.target_every == 0:
            self.qf_target.load_state_dict(self.qf.state_dict())

    def act(self, obs):
        """obs (B, O) -> actions (B, A): the best code, or one drawn from softmax(Q), decoded in its state."""
        q = self.qf_average(obs) if self.args.average else self.qf(obs)  # (B, K)
        return self.decode(obs, choose(q, self.args.act)).clamp(-1, 1)

    def diagnose(self, batch):
        """The penalty, for the figure: over codes its exact value is the one that training sees."""
        return {"penalty_exact": self.loss(batch)[1]["penalty"]}


# --- Continuous CQL ---


class Actor(nn.Module):
    """A Gaussian policy, squashed into [-1, 1] by tanh."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim, hidden=(256, 256))

    def sample(self, obs, n):
        """obs (B, O) -> n actions in each state (n, B, A) and their log densities (n, B)."""
        mean, log_std = self.net(obs).chunk(2, -1)  # (B, A) each
        log_std = (log_std - 1).clamp(-20, 2)  # starts at a narrow e^-1, as in the authors' code
        noise = torch.randn(n, *mean.shape, device=obs.device)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2), kept stable
        return raw.tanh(), log_prob.sum(-1)

    def mode(self, obs):
        return self.net(obs).chunk(2, -1)[0].tanh()


class Critic(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, hidden=(256, 256))

    def forward(self, obs, actions):
        """obs (B, O), n actions in each state (n, B, A) -> Q values (n, B)."""
        return self.net(torch.cat([obs.expand(len(actions), *obs.shape), actions], -1))[..., 0]


class ContinuousCQL(nn.Module):
    """CQL(H) as SAQ's authors started from it (young-geng/JaxCQL): soft actor-critic with twin critics and automatic
    temperature, and the penalty, whose integral over actions has to be estimated from importance-weighted samples."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim)
        self.qf = nn.ModuleList([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.actor_optimizer = adam([*self.actor.parameters(), self.log_temperature], args.lr)
        self.qf_optimizer = adam(self.qf.parameters(), args.lr)

    def penalty_samples(self, batch):
        """Actions (3n, B, A) and their log densities (3n, B): uniform, from the policy in s, from the policy in s'.
        All of them are rated in s."""
        n, (size, dim) = self.args.cql_samples, batch.actions.shape
        uniform = 2 * torch.rand(n, size, dim, device=batch.obs.device) - 1
        here, log_prob_here = self.actor.sample(batch.obs, n)
        there, log_prob_there = self.actor.sample(batch.next_obs, n)
        log_prob_uniform = torch.full_like(log_prob_here, -dim * math.log(2))
        return torch.cat([uniform, here, there]), torch.cat([log_prob_uniform, log_prob_here, log_prob_there])

    def qf_loss(self, batch):
        with torch.no_grad():
            next_actions, _ = self.actor.sample(batch.next_obs, 1)
            next_q = torch.min(*(qf(batch.next_obs, next_actions) for qf in self.qf_target))[0]  # (B,)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q
            samples, log_prob = self.penalty_samples(batch)
        actions = torch.cat([batch.actions[None], samples])  # (1 + 3n, B, A)
        q = torch.stack([qf(batch.obs, actions) for qf in self.qf])  # (2, 1 + 3n, B)
        q_data, q_samples = q[:, 0], q[:, 1:]
        td_loss = (q_data - td_target).square().mean(1).sum()  # sums over both critics
        penalty = ((q_samples - log_prob).logsumexp(1) - q_data).mean(1).sum()
        loss = td_loss + self.args.cql_alpha * penalty
        return loss, {"loss": loss, "td_loss": td_loss, "penalty": penalty, "q_data": q_data.mean()}

    def actor_loss(self, batch):
        """Soft actor-critic's: raise min Q + temperature * entropy, and hold the entropy at -A by the temperature."""
        actions, log_prob = self.actor.sample(batch.obs, 1)
        q = torch.min(*(qf(batch.obs, actions) for qf in self.qf))
        actor_loss = (self.log_temperature.exp().detach() * log_prob - q).mean()
        temperature_loss = -self.log_temperature * (log_prob.detach() - batch.actions.shape[1]).mean()
        return actor_loss + temperature_loss, {"actor_loss": actor_loss, "entropy": -log_prob.mean()}

    def update(self, batch):
        """One gradient step of the critics and one of the actor; returns what to log."""
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        return info | minimize(*self.actor_loss(batch), self.actor_optimizer)

    def update_targets(self, step):
        polyak_update(self.qf_target, self.qf, self.args.polyak)

    def act(self, obs):
        """obs (B, O) -> actions (B, A): the policy's mode."""
        return self.actor.mode(obs)

    def diagnose(self, batch):
        """The penalty of the first critic as its samples estimate it (less the constant log 3n that the loss leaves in)
        and, where actions are two-dimensional, its exact value: the paper's diagnosis (Fig. 2)."""
        samples, log_prob = self.penalty_samples(batch)
        q_data = self.qf[0](batch.obs, batch.actions[None])[0]
        log_z = (self.qf[0](batch.obs, samples) - log_prob).logsumexp(0) - math.log(len(samples))
        info = {"penalty_sampled": (log_z - q_data).mean()}
        if batch.actions.shape[1] == 2:
            info["penalty_exact"] = (exact_log_z(self.qf[0], batch.obs) - q_data).mean()
        return info


def exact_log_z(qf, obs, grid=64):
    """log of the integral of exp Q(s, a) over [-1, 1]^2, (B,), by the midpoint rule on grid x grid cells."""
    centres = (torch.arange(grid, device=obs.device) + 0.5) * 2 / grid - 1
    actions = torch.cartesian_prod(centres, centres)[:, None].expand(-1, len(obs), 2)  # (grid^2, B, 2)
    q = torch.cat([qf(obs, chunk) for chunk in actions.split(256)])  # (grid^2, B)
    return q.logsumexp(0) + 2 * math.log(2 / grid)


def make_agents(obs_dim, action_dim, vqvae, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"saq_cql": DiscreteCQL(obs_dim, vqvae, args)}
    return agents | ({"cql": ContinuousCQL(obs_dim, action_dim, args)} if args.compare else {})


# --- One run ---


class Run:
    """The files of one run: args.json, metrics.csv and checkpoint.pt; `report` adds result.json and comparison.png."""

    def __init__(self, args, learners):
        self.args, self.done, self.interrupted = args, {}, False
        self.parts = {}  # what a checkpoint holds: the learners and their optimizers
        for name, learner in learners.items():
            optimizers = {k: v for k, v in vars(learner).items() if isinstance(v, torch.optim.Optimizer)}
            self.parts |= {name: learner} | {f"{name}.{key}": optimizer for key, optimizer in optimizers.items()}
        name = f"{args.env.replace('/', '_')}__{SCRIPT}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or args.eval_only or Path(args.out) / name)
        self.folder.mkdir(parents=True, exist_ok=bool(args.resume or args.eval_only))
        self.metrics = open(self.folder / "metrics.csv", "a", newline="")
        if args.resume or args.eval_only:
            self.load()
        else:
            self.metrics.write("step,name,value\n")
        if not args.eval_only:
            versions = {module.__name__: module.__version__ for module in (torch, np, gym)}
            commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
            about = {"args": vars(args), "python": sys.version, "versions": versions, "git_commit": commit}
            self.write("args.json", json.dumps(about, indent=2).encode())
        if args.track and not args.eval_only:
            import wandb

            settings = {"id": self.folder.name, "resume": "allow", "dir": self.folder, "config": vars(args)}
            self.wandb = wandb.init(project="saq", **settings)
            self.wandb.define_metric("*", step_metric="step")

    def log(self, phase, step, values):
        self.metrics.writelines(f"{step},{phase}/{name},{value:.6g}\n" for name, value in values.items())
        self.metrics.flush()
        if self.args.track:
            self.wandb.log({f"{phase}/{name}": value for name, value in values.items()} | {"step": step})

    def history(self, name):
        """The steps and the values logged under `name`."""
        with open(self.folder / "metrics.csv", newline="") as file:
            rows = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]
        return list(zip(*rows, strict=True)) or ((), ())

    def write(self, name, content):
        """Writes bytes to a file of the run, under another name first: an interruption never leaves half a file."""
        (self.folder / f"{name}.tmp").write_bytes(content)
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def save(self):
        state = {
            "done": self.done,  # steps done in each phase
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.args.device == "cuda" else None,
            "metrics_size": self.metrics.tell(),
        }
        buffer = io.BytesIO()  # on a full disk torch.save itself would raise a RuntimeError that says nothing
        torch.save(state, buffer)
        self.write("checkpoint.pt", buffer.getbuffer())

    def load(self):
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, weights_only=True, map_location=self.args.device)
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self.done = state["done"]
            torch.set_rng_state(state["rng"].cpu())
            if self.args.device == "cuda" and self.args.resume:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        except Exception as error:  # torch raises a dozen types over a missing, damaged or foreign file
            raise UserError(f"{path} cannot be used: {' '.join(repr(error).split())[:200]}") from None
        if self.args.resume:  # what was logged after the checkpoint will be logged again
            self.metrics.truncate(state["metrics_size"])

    def interrupt(self, *_):
        """Ctrl-C: finish the step, save, stop. A second one stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def train(self, phase, updates, steps, evaluation):
        """Runs one phase to its last step; `updates` yields (step, info) after each step. Logs, evaluates, saves."""
        start = self.done.get(phase, 0)
        if start == 0:
            torch.manual_seed(self.args.seed)  # a random stream for each phase: none depends on what ran before it
        signal.signal(signal.SIGINT, self.interrupt)
        bar = tqdm(updates, phase, steps, initial=start, dynamic_ncols=True)
        for step, info in bar:
            evaluate_now = step % self.args.eval_every == 0 or step == steps
            if evaluate_now or self.interrupted or step % self.args.log_every == 0:
                values = {name: value.item() for name, value in info.items()}
                for name, value in values.items():
                    if not math.isfinite(value):
                        kept = f"{self.folder}/checkpoint.pt is from before" if self.done else "nothing was saved yet"
                        raise UserError(f"{phase}/{name} is {value} in step {step}: {kept}.")
                self.log(phase, step, values)
            if evaluate_now:
                values = evaluation()
                self.log(phase, step, values)
                bar.set_postfix({name: f"{value:.4g}" for name, value in list(values.items())[:2]})
            if evaluate_now or self.interrupted:
                self.done[phase] = step
                self.save()
            if self.interrupted:
                print(f"\nstopped in step {step} of {phase}; go on with: python {SCRIPT}.py --resume {self.folder}")
                raise SystemExit(130)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def learn(agent, data, args, start):
    """Trains an agent on batches of `data`; yields (step, info) after each step that follows `start`."""
    update = accelerate(lambda: agent.update(data.sample(args.batch_size)), data.obs.device, args.compile == "on")
    for step in range(start + 1, args.steps + 1):
        info = update()
        agent.update_targets(step)
        yield step, info


def report(run, agents, envs, episodes, score, data_score, provenance):
    """Evaluates each agent over `episodes` episodes and prints the table. After training (not with --eval-only) it also
    writes result.json and comparison.png: scores, and what `diagnose` found, over training."""
    result = {"provenance": provenance, "data_score": data_score, "episodes": episodes}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(data_score, color="grey", linestyle="--", label="episodes of the dataset")
    print(f"\n{'':12}{'score':>8}{'last 5 evaluations':>22}{'return':>20}")
    for i, (name, agent) in enumerate(agents.items()):
        label, returns = name.upper().replace("_", "-"), evaluate(agent.act, envs, episodes, run.args.device)
        mean, std, (steps, scores) = returns.mean(), returns.std(), run.history(f"{name}/score")
        last = np.array(scores[-5:] or [np.nan])
        print(f"{label:12}{score(mean):8.1f}{last.mean():13.1f} +- {last.std():<5.1f}{mean:13.1f} +- {std:<5.1f}")
        result[name] = {"score": score(mean), "last_5_scores": list(last), "return": mean, "return_std": std}
        left.plot(steps, scores, color=f"C{i}", label=label)
        for series, line in DIAGNOSIS.items():
            steps, values = run.history(f"{name}/{series}")
            if steps:
                right.plot(steps, values, line, color=f"C{i}", label=f"{label}, {series}")
    print(f"{episodes} episodes each; those of the dataset score {data_score:.1f}. {provenance}")
    if run.args.eval_only:
        return
    run.write("result.json", json.dumps(result, indent=2, default=float).encode())
    left.set(title=run.args.env, xlabel="gradient steps", ylabel="score")
    right.set(title=" and ".join(DIAGNOSIS), xlabel="gradient steps")
    left.legend()
    right.legend()
    figure.savefig(run.folder / "comparison.png", dpi=120)
    print(f"{run.folder}: result.json, comparison.png, metrics.csv, checkpoint.pt")


def main():
    args = parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_cpu()

    # The data, and what a score over them means.
    env = make_env(args.env, args.dataset_path)
    score, provenance = scoring(env, args.dataset_path)
    data, returns = make_transitions(load_arrays(args.dataset_path, env), env, device)
    source = args.dataset_path or env.get_wrapper_attr("dataset_filepath")
    print(f"data: {source}, {len(data.obs)} transitions, {len(returns)} episodes, ", end="")
    print(f"returns {returns.min():.1f} to {returns.max():.1f}. {provenance}")
    data = data._replace(rewards=scale_rewards(data.rewards, returns, args.reward_scale, args.reward_shift))

    torch.manual_seed(args.seed)
    with device:
        obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
        vqvae = ActionVQVAE(obs_dim, action_dim, args.num_codes, action_only=args.action_only, lr=args.lr)
        agents = make_agents(obs_dim, action_dim, vqvae, args)
    run = Run(args, {"quantizer": vqvae, **agents})
    envs = make_eval_envs(env.spec, args.eval_episodes) if env else None
    if args.eval_only:
        trained = {name: agent for name, agent in agents.items() if name in run.done}
        if not (trained and env):
            raise UserError(f"{run.folder} holds no trained policy yet, or no environment to evaluate it in.")
        return report(run, trained, envs, args.eval_episodes, score, score(returns.mean()), provenance)

    # 1. Fit the quantizer on the dataset's states and actions.
    start, compile = run.done.get("quantizer", 0), args.compile == "on"
    options = dict(decay=args.vq_decay, revive_every=args.revive_every, kmeans_init=args.kmeans_init)
    updates = fit(vqvae, data.obs, data.actions, args.vq_steps, args.batch_size, start, compile, **options)
    run.train("quantizer", updates, args.vq_steps, lambda: codebook_health(vqvae, data.obs, data.actions))
    print(describe_health(codebook_health(vqvae, data.obs, data.actions)))

    # 2. Replace every action by its code, once: the quantizer stays as it is from here on.
    data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions))

    # 3. Learn over the K codes; then the continuous twin, from the same data with the same evaluation.
    for name, agent in agents.items():
        updates = learn(agent, data, args, run.done.get(name, 0))
        run.train(name, updates, args.steps, lambda agent=agent: assess(agent, envs, data, score, args))
    if env:
        report(run, agents, envs, args.final_episodes, score, score(returns.mean()), provenance)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after training; during it, Run.train saves first
        sys.exit(130)
