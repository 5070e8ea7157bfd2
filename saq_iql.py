"""SAQ-IQL: implicit Q-learning on quantized actions, beside the continuous IQL that it replaces.

Luo et al., "Action-Quantized Offline Reinforcement Learning for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731;
IQL is Kostrikov et al., ICLR 2022, arXiv:2110.06169. IQL learns values from the dataset's own actions and then has to
turn them into a policy by weighted regression. Over the K codes of a VQ-VAE that policy is a closed form (Eq. 14).

    python saq_iql.py                                             # three maze demonstrations
    python saq_iql.py --env hopper-medium-v2 --no-compare         # a D4RL name; downloads the dataset once
    python saq_iql.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

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
from vqvae import ActionVQVAE, UserError, accelerate, adam, check_arguments, codebook_health, decay_lr
from vqvae import describe_health, fit, load_arrays, make_env, make_transitions, minimize, mlp, polyak_update
from vqvae import scale_rewards, scoring, tune_cpu

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
    # --- Both IQLs ---
    expectile: float = 0.7  # tau: V(s) is this expectile of Q(s, a) over the dataset's actions
    polyak: float = 0.005  # rate at which target networks follow
    # --- SAQ-IQL ---
    temperature: float = 2.0  # lambda of Eq. 14, in units of reward: the larger, the closer the policy is to the data
    prior_floor: float = -8.0  # log p(k | s) counts as at least this: Q can still choose a rare code (authors)
    weight_decay: float = 1e-3  # AdamW's weight decay of the Q network
    exact_expectile: bool = False  # V(s) is the expectile of Q(s, k) over the prior's k, computed: no V network
    # --- Continuous IQL ---
    beta: float = 3.0  # inverse temperature: weights are exp(beta A). SAQ's lambda divides instead: beta = 1 / lambda


# Fields by task. A row holds for names that start with one of its words; the longest word wins, and a flag on the
# command line wins over the row. The paper prints no hyperparameters; "authors" is their code, "IQL" is IQL's code.
ROBOSUITE = dict(eval_episodes=50, final_episodes=50)
MAZE = dict(num_codes=4, act="sample", vq_steps=15_000, steps=10_000, eval_every=500)
HPARAMS = {
    "maze2d-large-demos": dict(**MAZE, temperature=10.0, beta=0.1),  # chosen here: lambda 2 swings, beta 3 fails
    # IQL's, ant in the same way. Lambda was chosen on stand-ins: the authors' 2 scores less on hopper's.
    "hopper halfcheetah walker2d ant": dict(expectile=0.7, temperature=10.0, beta=3.0, reward_scale=0.0),
    # Authors: adroit's sweep is expectile 0.7, 0.8, 0.9 and lambda 0.5, 1, 2. IQL: beta 0.5, and dropout.
    "pen door hammer relocate": dict(expectile=0.7, temperature=1.0, beta=0.5),
    # No runs of the authors. Expectile and beta are IQL's, robomimic's for its tasks; lambda = 1 / beta is ours.
    "kitchen": dict(expectile=0.7, temperature=2.0, beta=0.5),
    "antmaze": dict(expectile=0.9, temperature=0.1, beta=10.0, reward_shift=-1.0, eval_episodes=100),
    "lift can square tool transport": dict(expectile=0.9, beta=1.0, temperature=1.0, **ROBOSUITE),
}
PLAIN = dict(num_codes=64, vq_decay=False, revive_every=0, act="sample", temperature=2.0)
DIAGNOSIS = {"value": "-"}  # the series in the figure's right panel, and their lines


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


# --- SAQ-IQL ---


def expectile_loss(adv, tau):
    """Squares, weighted tau where Q exceeds V and 1 - tau elsewhere: V leans toward the data's better actions."""
    return (torch.where(adv < 0, 1 - tau, tau) * adv.square()).mean()


class DiscreteIQL(nn.Module):
    """IQL over the K codes of a frozen quantizer: V, one Q network with K outputs, the dataset's own policy over codes
    as a prior, and no policy network. Networks have SAQ-CQL's size; the authors' are 256-256."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        self.args, self.decode = args, vqvae.decode
        self.prior = mlp(obs_dim, vqvae.num_codes)
        self.vf = mlp(obs_dim, 1)
        self.qf = mlp(obs_dim, vqvae.num_codes)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.prior_optimizer = adam(self.prior.parameters(), args.lr)
        self.vf_optimizer = adam(self.vf.parameters(), args.lr)
        self.qf_optimizer = adam(self.qf.parameters(), args.lr, args.weight_decay)

    def log_prior(self, obs):
        """obs (B, O) -> log p(k | s) (B, K), never below the floor."""
        return self.prior(obs).log_softmax(1).clamp(min=self.args.prior_floor)

    def value(self, obs):
        """obs (B, O) -> V(s) (B,): the network's, or the expectile that the network would have to learn."""
        if self.args.exact_expectile:
            return expectile(self.qf_target(obs), self.prior(obs).softmax(1), self.args.expectile)
        return self.vf(obs)[:, 0]

    def v_loss(self, batch):
        q = self.qf_target(batch.obs).gather(1, batch.codes[:, None])[:, 0]  # (B,)
        v_loss = expectile_loss(q - self.vf(batch.obs)[:, 0], self.args.expectile)
        return v_loss, {"v_loss": v_loss}

    def qf_loss(self, batch):
        """TD toward V(s'): no action is rated that the data (or, with exact_expectile, the prior) does not support."""
        with torch.no_grad():
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * self.value(batch.next_obs)
        q_data = self.qf(batch.obs).gather(1, batch.codes[:, None])[:, 0]  # (B,)
        qf_loss = (q_data - td_target).square().mean()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def update(self, batch):
        """A gradient step of the prior, of V, and of Q toward the new V; returns what to log. The authors train the
        prior before the rest. Only `act` reads it (and exact_expectile), so at the end that comes to the same."""
        prior_loss = F.cross_entropy(self.prior(batch.obs), batch.codes)
        info = minimize(prior_loss, {"prior_loss": prior_loss}, self.prior_optimizer)
        if not self.args.exact_expectile:
            info |= minimize(*self.v_loss(batch), self.vf_optimizer)
        return info | minimize(*self.qf_loss(batch), self.qf_optimizer)

    def update_targets(self, step):
        polyak_update(self.qf_target, self.qf, self.args.polyak)

    def policy_logits(self, obs):
        """Eq. 14, the best policy that stays near the prior: pi(k | s) ~ p(k | s) exp(A(s, k) / lambda). V(s) is the
        same for every code, so Q stands in for A = Q - V. obs (B, O) -> (B, K)."""
        return self.qf(obs) / self.args.temperature + self.log_prior(obs)

    def act(self, obs):
        """obs (B, O) -> actions (B, A): a code by the policy of Eq. 14, decoded in its state."""
        return self.decode(obs, choose(self.policy_logits(obs), self.args.act)).clamp(-1, 1)

    def diagnose(self, batch):
        return {"value": self.value(batch.obs).mean()}


def expectile(q, p, tau):
    """The tau-expectile (B,) of values q (B, K) that have probabilities p (B, K): the v that minimises the loss above.
    It is the mean of q with weights tau above v and 1 - tau below; of the K ways to split the sorted values into above
    and below, the right one has the largest such mean (the smallest where tau < 1/2; Bellini et al. 2014)."""
    q, order = q.sort(1)
    p = p.gather(1, order)
    below, mass_below = (p * q).cumsum(1), p.cumsum(1)  # (B, K): of the k smallest values, k = 1 .. K
    above, mass_above = below[:, -1:] - below, mass_below[:, -1:] - mass_below
    means = (tau * above + (1 - tau) * below) / (tau * mass_above + (1 - tau) * mass_below)  # (B, K)
    return means.amax(1) if tau >= 0.5 else means.amin(1)


# --- Continuous IQL ---


class Actor(nn.Module):
    """A Gaussian policy with its mean in [-1, 1] and one standard deviation for all states, as in IQL's code."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, action_dim, hidden=(256, 256))
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, obs, actions):
        """Log density (B,) of actions (B, A) in obs (B, O)."""
        log_std = self.log_std.clamp(-5, 2)
        z = (actions - self.mode(obs)) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(1)

    def mode(self, obs):
        return self.net(obs).tanh()


class ContinuousIQL(nn.Module):
    """IQL's losses in their authors' order, with twin critics and a policy by weighted regression; without dropout."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.vf = mlp(obs_dim, 1, hidden=(256, 256))
        self.qf = nn.ModuleList([mlp(obs_dim + action_dim, 1, hidden=(256, 256)) for _ in range(2)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = Actor(obs_dim, action_dim)
        self.vf_optimizer = adam(self.vf.parameters(), args.lr)
        self.qf_optimizer = adam(self.qf.parameters(), args.lr)
        self.actor_optimizer = adam(self.actor.parameters(), args.lr)

    def q_target(self, batch):
        """min Q(s, a) (B,) of the dataset's actions, by the target critics."""
        obs_actions = torch.cat([batch.obs, batch.actions], 1)
        return torch.min(*(qf(obs_actions) for qf in self.qf_target))[:, 0]

    def v_loss(self, batch, q):
        v_loss = expectile_loss(q - self.vf(batch.obs)[:, 0], self.args.expectile)
        return v_loss, {"v_loss": v_loss}

    def actor_loss(self, batch, adv):
        """Regression onto the dataset's actions, weighted by exp(beta A): what Eq. 14 has in closed form."""
        weight = (self.args.beta * adv).exp().clamp(max=100)
        actor_loss = -(weight * self.actor.log_prob(batch.obs, batch.actions)).mean()
        return actor_loss, {"actor_loss": actor_loss, "weight": weight.mean()}

    def qf_loss(self, batch, next_v):
        td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_v
        obs_actions = torch.cat([batch.obs, batch.actions], 1)
        q = torch.cat([qf(obs_actions) for qf in self.qf], 1)  # (B, 2)
        qf_loss = (q - td_target[:, None]).square().mean(0).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q.mean()}

    def update(self, batch):
        """A gradient step of V, then by the new V of the policy and of Q; returns what to log."""
        q = self.q_target(batch)  # (B,)
        info = minimize(*self.v_loss(batch, q), self.vf_optimizer)
        with torch.no_grad():
            v, next_v = self.vf(torch.cat([batch.obs, batch.next_obs]))[:, 0].chunk(2)  # (B,), (B,)
        (actor_loss, actor_info), (qf_loss, qf_info) = self.actor_loss(batch, q - v), self.qf_loss(batch, next_v)
        return minimize(actor_loss + qf_loss, info | actor_info | qf_info, self.actor_optimizer, self.qf_optimizer)

    def update_targets(self, step):
        """After each step, counted from 1: targets follow, the policy's learning rate falls to 0 along a cosine."""
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        decay_lr(self.actor_optimizer, self.args.lr, step, self.args.steps)

    def act(self, obs):
        """obs (B, O) -> actions (B, A): the policy's mode."""
        return self.actor.mode(obs)

    def diagnose(self, batch):
        return {"value": self.vf(batch.obs).mean()}


def make_agents(obs_dim, action_dim, vqvae, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"saq_iql": DiscreteIQL(obs_dim, vqvae, args)}
    return agents | ({"iql": ContinuousIQL(obs_dim, action_dim, args)} if args.compare else {})


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
