"""SAQ-IQL: implicit Q-learning on quantized actions, beside the continuous IQL that it replaces.

Offline RL learns from a fixed dataset. Q-learning's target, r + gamma max_a Q(s', a), then seeks out actions whose Q is
too high by mistake. IQL rates no action but the dataset's: V(s) is a high expectile of their Q. A policy must then be
extracted from Q: over continuous actions by a regression, over the K codes of a VQ-VAE in closed form. The steps:

    1. `fit` trains the VQ-VAE on the dataset: encode (s, a) -> code, decode (s, code) -> a (vqvae.py)
    2. `encode_dataset` replaces every action of the dataset by its code k, once
    3. `DiscreteIQL.update` trains V(s), 0 beyond terminals, and Q(s, .), K outputs, of which Q' is a slow copy, by
           V: |tau - 1[Q'(s, k) < V(s)]| (Q'(s, k) - V(s))^2            Q: (Q(s, k) - r - gamma V(s'))^2
    4. `DiscreteIQL.act` decodes a code of p(k | s) exp((Q(s, k) - V(s)) / lambda) (Eq. 14), p the quantizer's prior

    python saq_iql.py                                             # three maze demonstrations
    python saq_iql.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Luo et al., "Action-Quantized Offline RL for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731. IQL: Kostrikov et
al., ICLR 2022, arXiv:2110.06169. Needs vqvae.py and, for benchmark names, offline_envs/; docs/saq_iql.md has the rest.
"""

import copy
import math
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

# isort: off
from vqvae import QUANTIZERS, adamw, codebook_health, decay_lr, fit, minimize, mlp, plot_codes, polyak_update  # method
from vqvae import UserError, check_numbers, check_unchanged, describe_health, exit_in_words, film, lock, make_eval_envs
from vqvae import accelerate, load_task, prepare, read_checkpoint, take_quantizer, tracker, write_checkpoint, write_file


@dataclass
class Args:
    # --- Task and data ---
    env: str = "maze2d-large-demos-v1"  # a task of D4RL, robomimic, OGBench or Minari, a Gymnasium id, or "none"
    dataset_path: str | None = None  # an .hdf5 or .npz file in place of the task's own dataset
    normalize_obs: bool = True  # subtract the dataset's mean from observations, divide by its standard deviation
    obs_noise: float = 0.0  # standard deviation of noise on observations in training: 0.1 for a few demonstrations
    # --- The run ---
    seed: int = 0  # seed of networks and batches; every run is evaluated in the same episodes
    compare: bool = True  # also train what it is compared with, on the same data
    plain: bool = False  # the authors' settings, without what is added here: the fields of PLAIN
    out: str = "runs"  # folder for runs; each run makes its own folder in it
    resume: str | None = None  # go on with the run in this folder from its checkpoint
    eval_only: str | None = None  # evaluate the policies saved in this run folder, train nothing
    track: bool = False  # log to Weights & Biases as well
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where tensors live
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile (auto: for 10_000 steps or more); GPU: CUDA graphs
    precision: Literal["float32", "bfloat16"] = "float32"  # of products between hidden layers; bfloat16 is faster
    log_every: int = 500  # steps between two log entries
    eval_every: int = 5_000  # steps between two evaluations, each after a checkpoint
    eval_episodes: int = 10  # episodes of each evaluation during training, and of --eval-only
    final_episodes: int = 100  # episodes of the final evaluation
    video: int = 0  # episodes of each agent to film at the end
    # --- Quantizer ---
    vq_steps: int = 30_000  # gradient steps of the quantizer (the authors: 500_000)
    vq_batch_size: int = 256  # transitions that each of them sees
    quantizer: Literal["vqvae", "mixture", "aquadem"] = "vqvae"  # vqvae: the paper's; docs/vqvae.md
    num_codes: int = 64  # K, the number of codes
    action_only: bool = False  # the paper's ablation: quantize actions without looking at the state (Table 3)
    vq_decay: bool = True  # let the quantizer's learning rate fall to 0 along a cosine
    revive_every: int = 100  # vqvae: steps between two moves of unchosen codes to where actions are; 0: never
    quantizer_from: str | None = None  # take the quantizer that the run in this folder fitted to the same data
    # --- Every agent ---
    steps: int = 70_000  # gradient steps of each agent (the authors: 1_000_000)
    batch_size: int = 256  # transitions that each of them sees
    lr: float = 3e-4  # learning rate of every network
    decay: bool = True  # let the learning rates of agents fall to 0 along a cosine
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # added after that; scores do not change
    act: Literal["greedy", "sample", "mean"] = "greedy"  # SAQ: the likeliest code, a drawn one, or the mean action
    support: float = 0.1  # SAQ: codes with less than this share of the prior's highest probability do not act
    # --- Both IQLs ---
    expectile: float = 0.7  # tau: V(s) is this expectile of Q(s, a) over the dataset's actions
    polyak: float = 0.005  # rate at which target networks follow
    # --- SAQ-IQL ---
    temperature: float = 2.0  # lambda of Eq. 14, in units of Q: the larger, the closer the policy is to the data
    prior_floor: float = -8.0  # log p(k | s) counts as at least this: Q can still choose a rare code (authors)
    weight_decay: float = 1e-3  # AdamW's weight decay of the Q network
    exact_expectile: bool = False  # V(s) is the expectile of Q(s, k) over the prior's k, computed: no V network learns
    best_of: int = 0  # N > 0: EMaQ, in V(s) and in the policy: the best by Q of N codes drawn from the prior, computed
    # --- Continuous IQL ---
    beta: float = 3.0  # inverse temperature: weights are exp(beta A). SAQ's lambda divides instead: beta = 1 / lambda


# A task's row is the longest that its name begins with; a flag wins. Where they come from: docs/saq_iql.md.
MAZE = dict(num_codes=4, act="sample", vq_steps=15_000, steps=10_000, eval_every=500)
LOCOMOTION = dict(temperature=10.0, beta=3.0, reward_scale=0.0, act="mean")
HPARAMS = {
    "maze2d-large-demos-": dict(MAZE, temperature=10.0, beta=0.1),
    "hopper- halfcheetah- walker2d- ant-": dict(LOCOMOTION, support=0.2),
    "hopper-medium-v halfcheetah-medium-v walker2d-medium-v": dict(LOCOMOTION, support=0.0),
    "pen- door- hammer- relocate-": dict(temperature=1.0, beta=0.5, act="sample"),  # docs/vqvae.md, "Acting"
    "kitchen- maze2d-": dict(temperature=2.0, beta=0.5),
    "antmaze-": dict(expectile=0.9, temperature=0.1, beta=10.0, reward_shift=-1.0, eval_episodes=100),
    "lift- can- square- tool- transport- ogbench:": dict(expectile=0.9, temperature=1.0, beta=1.0, eval_episodes=50),
    "mixture": dict(num_codes=64, act="mean"),  # by quantizer, over the task's row: K needs no choice
    "aquadem": dict(num_codes=10),  # as published
}


# --- SAQ-IQL ---


class DiscreteIQL(nn.Module):
    """IQL over the K codes of a frozen quantizer: V, one Q network with K outputs, the quantizer's prior p(k | s), and
    no policy network. Networks have two hidden layers of 512, where the authors have 256.

    A training loop calls `update(batch)` and nothing else; `act(obs)` is the policy, for observations as
    `vqvae.normalize` returns them. The quantizer is a part of the agent: what state_dict() saves can act again.
    Read of `args`: lr, weight_decay, discount, expectile, polyak, temperature, prior_floor, exact_expectile, best_of,
    act, support. Raises UserError for exact_expectile together with best_of."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        if args.exact_expectile and args.best_of:
            raise UserError("exact_expectile and best_of exclude each other: V(s) is one or the other.")
        self.args, self.vqvae = args, vqvae
        self.vf = mlp(obs_dim, 1)
        self.qf = mlp(obs_dim, vqvae.num_codes)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.vf_optimizer = adamw(self.vf.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr, args.weight_decay)

    def log_prior(self, obs):
        """obs (B, O) -> log p(k | s) (B, K), never below the floor."""
        return self.vqvae.prior_logits(obs).log_softmax(1).clamp(min=self.args.prior_floor)

    def value(self, obs):
        """obs (B, O) -> V(s) (B,): the network's, or the expectile that it would have to learn, or EMaQ's mean."""
        if not (self.args.exact_expectile or self.args.best_of):
            return self.vf(obs)[:, 0]
        q, p = self.qf_target(obs), self.vqvae.prior_logits(obs).softmax(1)  # (B, K) each
        if self.args.best_of:
            return (best_of(q, p, self.args.best_of) * q).sum(1)
        return expectile(q, p, self.args.expectile)

    def v_loss(self, batch):
        q = self.qf_target(batch.obs).gather(1, batch.codes[:, None])[:, 0]  # (B,)
        v_loss = expectile_loss(q - self.vf(batch.obs)[:, 0], self.args.expectile)
        return v_loss, {"v_loss": v_loss}

    def qf_loss(self, batch):
        """TD toward V(s'): no action is rated that the data (or, where V is computed, the prior) does not support."""
        with torch.no_grad():
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * self.value(batch.next_obs)
        q_data = self.qf(batch.obs).gather(1, batch.codes[:, None])[:, 0]  # (B,)
        qf_loss = (q_data - td_target).square().mean()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def update(self, batch):
        """A gradient step of V, and of Q toward the new V; then the target follows. Returns what to log."""
        computed = self.args.exact_expectile or self.args.best_of
        info = {} if computed else minimize(*self.v_loss(batch), self.vf_optimizer)
        info |= minimize(*self.qf_loss(batch), self.qf_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    def policy_logits(self, obs):
        """Eq. 14, the best policy that stays near the prior: pi(k | s) ~ p(k | s) exp(A(s, k) / lambda). V(s) is the
        same for every code, so Q stands in for A = Q - V. With best_of, EMaQ's policy. obs (B, O) -> (B, K)."""
        if self.args.best_of:  # masked first: a code that may not act could be the best and leave the others nothing
            p = self.vqvae.supported(obs, self.vqvae.prior_logits(obs), self.args.support).softmax(1)
            return best_of(self.qf(obs), p, self.args.best_of).log()
        return self.qf(obs) / self.args.temperature + self.log_prior(obs)

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): what the policy above does: its likeliest code, one drawn, or the mean."""
        return self.vqvae.act(obs, self.policy_logits(obs), self.args.act, self.args.support)

    @torch.no_grad()
    def diagnose(self, batch):
        """The mean of V, for the figure: one that runs away from what episodes return is a mistake."""
        return {"value": self.value(batch.obs).mean()}


def expectile_loss(adv, tau):
    """Squares, weighted tau where Q exceeds V and 1 - tau elsewhere: V leans toward the data's better actions."""
    return (torch.where(adv < 0, 1 - tau, tau) * adv.square()).mean()


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


def best_of(q, p, n):
    """The probability (B, K) that a code is the best, by its value q (B, K), of n drawn from p (B, K): that all n have
    values up to its own, less that all have lower ones (EMaQ, Ghasemipour et al., ICML 2021, without drawing).
    n = 1 is p itself, n to infinity the argmax of q where p is not 0."""
    order = q.argsort(1)
    up_to = p.gather(1, order).cumsum(1)  # (B, K), in the order of rising q
    all_up_to = (up_to / up_to[:, -1:]) ** n
    chances = all_up_to.diff(dim=1, prepend=torch.zeros_like(p[:, :1]))
    # Rounding may leave a chance below 0, or one above 0 where p is 0.
    return torch.zeros_like(p).scatter(1, order, chances).clamp(min=0).where(p > 0, 0.0)


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
    """IQL's losses in their authors' order, with twin critics and a policy by weighted regression; without dropout.

    Its protocol is DiscreteIQL's. Read of `args`: lr, steps, discount, expectile, polyak, beta."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.vf = mlp(obs_dim, 1, hidden=(256, 256))
        self.qf = nn.ModuleList([mlp(obs_dim + action_dim, 1, hidden=(256, 256)) for _ in range(2)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = Actor(obs_dim, action_dim)
        self.vf_optimizer = adamw(self.vf.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far

    def q_target(self, batch):
        """min Q(s, a) (B,) of the dataset's actions, by the target critics."""
        obs_actions = torch.cat([batch.obs, batch.actions], 1)
        q1, q2 = (qf(obs_actions)[:, 0] for qf in self.qf_target)  # (B,) each
        return torch.minimum(q1, q2)

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
        """A gradient step of V, then by the new V of the policy and of Q; then the targets follow. Returns what to log.
        The policy's learning rate falls to 0 along a cosine."""
        self.step += 1
        decay_lr(self.actor_optimizer, self.step - 1, self.args.steps)
        q = self.q_target(batch)  # (B,)
        info = minimize(*self.v_loss(batch, q), self.vf_optimizer)
        with torch.no_grad():
            v, next_v = self.vf(torch.cat([batch.obs, batch.next_obs]))[:, 0].chunk(2)  # (B,), (B,)
        actor_loss, actor_info = self.actor_loss(batch, q - v)
        qf_loss, qf_info = self.qf_loss(batch, next_v)
        info |= minimize(actor_loss + qf_loss, actor_info | qf_info, self.actor_optimizer, self.qf_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): the policy's mode."""
        return self.actor.mode(obs)

    @torch.no_grad()
    def diagnose(self, batch):
        return {"value": self.vf(batch.obs).mean()}


def make_agents(obs_dim, action_dim, vqvae, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"saq_iql": DiscreteIQL(obs_dim, vqvae, args)}
    return agents | ({"iql": ContinuousIQL(obs_dim, action_dim, args)} if args.compare else {})


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

SCRIPT, OWN_STEPS = Path(__file__).stem, {"quantizer"}  # and the phases with a number of steps of their own
PLAIN = dict(num_codes=64, vq_decay=False, decay=False, revive_every=0, normalize_obs=False, support=0.0)
PLAIN |= dict(act="sample", temperature=2.0)
# What a command line may change when the policies of a run are evaluated, and when it goes on.
FREE = {"device", "dataset_path", "eval_episodes", "video", "resume", "eval_only"}
FREE_TO_EVALUATE = FREE | {"act", "support", "temperature", "prior_floor"}
FREE_TO_RESUME = FREE | {"steps", "track", "compile", "log_every", "eval_every", "final_episodes"}


def defaults(env="maze2d-large-demos-v1", plain=False, quantizer="vqvae"):
    """The Args of a task. Later ones win: its row of HPARAMS, where it has one, the quantizer's row, PLAIN."""
    rows = {word: row for words, row in HPARAMS.items() for word in words.split()}
    name = env.split(":")[-1]
    name = f"ogbench:{name}" if "-singletask" in name else name  # its antmaze does not pay as D4RL's does
    words = [word for word in rows if name.startswith(word)]
    row = rows[max(words, key=len)] if words else {}
    row = row | rows.get(quantizer, {}) | (PLAIN if plain else {})
    return Args(env=env, plain=plain, quantizer=quantizer, **row)


def parse_args():
    """The command line over the defaults of its task or, where a run goes on, over what that run began with."""
    # A first look, for the task or the run; --help waits for their defaults.
    args = tyro.cli(Args, args=[word for word in sys.argv[1:] if word not in ("-h", "--help")])
    if args.resume is not None and args.eval_only is not None:
        raise UserError("--resume and --eval-only exclude each other: pass one of them.")
    folder = args.eval_only if args.resume is None else args.resume
    default, done = defaults(args.env, args.plain, args.quantizer), {}
    if folder is not None:
        state = read_checkpoint(Path(folder) / "checkpoint.pt", Run.NEW | {"args": vars(default)})
        default, done = Args(**state["args"] | {"resume": args.resume, "eval_only": args.eval_only}), state["done"]
    args = tyro.cli(Args, default=default, description=__doc__)  # --help shows the defaults of the task
    least = max([1, *(steps for phase, steps in done.items() if phase not in OWN_STEPS)])  # no fewer than are done
    check_numbers(vars(args), steps=(least, 1e9))
    if folder is not None:
        check_unchanged(vars(args), vars(default), FREE_TO_RESUME if args.eval_only is None else FREE_TO_EVALUATE)
    print("settings:", {name: value for name, value in vars(args).items() if value != getattr(Args(), name)})
    return args


@torch.no_grad()
def evaluate(agent, vqvae, envs, episodes, seed=1_000):
    """The returns (E,) of `episodes` episodes, `envs.num_envs` at a time; episode i starts from seed + i. Observations
    are padded to ten rows: a product rounds, and a policy draws, by how many there are, and what an environment is told
    alone is then what it is told among ten. This seeds PyTorch: in a training, call it as `assess` does."""
    returns, n = [], envs.num_envs
    for first in range(seed, seed + episodes, n):
        torch.manual_seed(first)
        obs, _ = envs.reset(seed=list(range(first, first + n)))
        total, running = np.zeros(n), np.ones(n, bool)
        while running.any():
            obs = torch.as_tensor(obs, dtype=torch.float32, device=vqvae.obs_mean.device)
            actions = agent.act(vqvae.normalize(F.pad(obs, (0, 0, 0, max(0, 10 - n)))))[:n].cpu().numpy()
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            total += rewards * running
            running &= ~(terminated | truncated)  # environments start again by themselves; the first episode counts
        returns.append(total)
    returns = np.concatenate(returns)[:episodes]
    if not np.isfinite(returns).all():
        raise UserError(f"an episode returned {returns[~np.isfinite(returns)][0]}: the rewards are wrong.")
    return returns


def assess(agent, vqvae, envs, task, data, args):
    """What is logged at an evaluation: score and return where there is an environment, and what `diagnose` finds."""
    with torch.random.fork_rng([0] if args.device == "cuda" else []):  # the training's random numbers stay as they are
        torch.manual_seed(args.seed)
        values = {name: value.item() for name, value in agent.diagnose(data.sample(256)).items()}
        if envs:
            mean = evaluate(agent, vqvae, envs, args.eval_episodes).mean()
            values = {"score": task.score(mean), "return": mean} | values
    return values


class Run:
    """The folder of a run: args.json and metrics.csv for readers, checkpoint.pt with all that --resume needs."""

    # What a checkpoint holds: arguments; checksums of the data; by phase the steps done and the state of the random
    # numbers; the phase whose evaluation comes next; the seconds that updates took, by phase; what was logged: (step,
    # name, value); networks and optimizers.
    NEW = {"args": {}, "data": [], "done": {}, "rng": {}, "due": "", "seconds": {}, "log": [], "parts": {}}

    def __init__(self, args, learners, checksum, done):
        self.args, self.learners, self.updating, self.stopping = args, learners, False, False
        self.state = copy.deepcopy(Run.NEW) | {"args": vars(args), "data": checksum, "done": done}
        if args.eval_only is not None:
            self.folder = Path(args.eval_only)
            return self.restore()
        self.folder = self.create() if args.resume is None else Path(args.resume)
        self.lock = lock(self.folder)
        if args.resume is not None:
            self.restore()
        self.track = tracker(self.folder, vars(args)) if args.track else lambda values: None
        loaded = {m: sys.modules[m].__version__ for m in ("torch", "numpy", "gymnasium", "mujoco") if m in sys.modules}
        write_file(self.folder / "args.json", {"args": vars(args), "python": sys.version, "versions": loaded})
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and what schedulers send before they kill
            signal.signal(number, self.interrupt)

    def create(self):
        """A new folder. It gets its name when its first checkpoint is in it: a run that can be seen can be resumed."""
        task = self.args.env.replace("/", "_").replace(":", "_")
        name = f"{task}__{SCRIPT}__s{self.args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = Path(self.args.out) / f".{name}"
        self.folder.mkdir(parents=True)
        for path in (Path(__file__), Path(minimize.__code__.co_filename)):  # the code as it ran
            write_file(self.folder / path.name, path.read_text(encoding="utf-8"))
        self.save()
        return self.folder.rename(self.folder.with_name(name))

    def save(self):
        write_checkpoint(self.folder / "checkpoint.pt", self.state, self.learners)
        lines = "".join(f"{step},{name},{value:.6g}\n" for step, name, value in self.state["log"])
        write_file(self.folder / "metrics.csv", f"step,name,value\n{lines}")

    def restore(self):
        begun = read_checkpoint(self.folder / "checkpoint.pt", Run.NEW, self.args.device, self.learners)
        if self.args.eval_only is None and begun["data"] != self.state["data"]:
            raise UserError(f"the run in {self.folder} has begun on other data than these.")
        self.state = begun | {"args": vars(self.args)}

    def log(self, phase, step, values):
        """Keeps numbers by name. UserError where one is not finite: no training comes back from there."""
        rows = [(step, f"{phase}/{name}", float(value)) for name, value in values.items()]
        self.state["log"] += rows
        self.track({name: value for _, name, value in rows} | {"step": step})
        for _, name, value in rows:
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} in step {step}: {self.folder}/checkpoint.pt is from before.")

    def history(self, name):
        """The steps and the values logged under `name`."""
        found = [(step, value) for step, logged, value in self.state["log"] if logged == name]
        return list(zip(*found, strict=True)) or [(), ()]

    def interrupt(self, *_):
        """During updates: finish the step, save, stop. Otherwise, and the second time: stop at once."""
        if self.stopping or not self.updating:
            raise KeyboardInterrupt("stopped", "--resume", self.folder)
        self.stopping = True

    def train(self, phase, updates, steps, evaluation):
        """Runs one phase to its last step; `updates` yields (step, info) after each. Logs, saves, and only then
        evaluates: what goes wrong there costs no training, and --resume begins with that evaluation."""
        start = self.state["done"].get(phase, 0)
        rng = torch.cuda if self.args.device == "cuda" else torch
        stream = f"{phase} on {self.args.device}"  # random numbers of its own: they do not depend on what ran before
        if stream in self.state["rng"]:
            rng.set_rng_state(self.state["rng"][stream].cpu())
        else:
            torch.manual_seed(self.args.seed + start)
        # Seconds of all updates but the first, which compiles: the process's CPU time (on a GPU the clock's).
        clock = time.perf_counter if self.args.device == "cuda" else time.process_time
        seconds, began = self.state["seconds"].get(phase, 0.0), None
        if self.state["due"] == phase:  # --resume begins with the evaluation that came next
            self.log(phase, start, evaluation() | {"seconds": seconds})
        pause = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of the bar
        bar = tqdm(updates, phase, steps, initial=start, dynamic_ncols=True, mininterval=pause, miniters=1)
        self.updating = True
        for step, info in bar:
            began = began or clock()
            evaluate_now = step % self.args.eval_every == 0 or step == steps
            if evaluate_now or step % self.args.log_every == 0:
                self.log(phase, step, {name: value.item() for name, value in info.items()})
            if evaluate_now or self.stopping:
                self.state["done"][phase], self.state["rng"][stream] = step, rng.get_rng_state()
                self.state["due"] = phase if evaluate_now else ""
                self.state["seconds"][phase] = seconds + clock() - began
                self.save()
            if self.stopping:
                raise KeyboardInterrupt(f"stopped in step {step} of {phase}", "--resume", self.folder)
            if evaluate_now:
                self.updating = False
                values = evaluation() | {"seconds": self.state["seconds"][phase]}
                self.log(phase, step, values)
                bar.set_postfix({name: f"{value:.4g}" for name, value in list(values.items())[:2]}, refresh=False)
                seconds, began, self.updating = values["seconds"], clock(), True
        self.updating = False
        self.state["due"] = "" if self.state["due"] == phase else self.state["due"]
        self.save()


def learn(agent, data, args, start):
    """Trains an agent on batches of `data`; yields (step, info) after each step that follows `start`."""
    size, noise = args.batch_size, args.obs_noise
    # The update itself, compiled or as a CUDA graph, unless --compile off.
    update = accelerate(lambda: agent.update(data.sample(size, noise)), data.obs.device, args.compile, args.steps)
    optimizers = [part for part in vars(agent).values() if isinstance(part, torch.optim.Optimizer)]
    for step in range(start + 1, args.steps + 1):
        for optimizer in optimizers if args.decay else ():
            decay_lr(optimizer, step, args.steps)
        yield step, update()


def report(run, agents, vqvae, task, episodes):
    """Evaluates each agent over `episodes` episodes and prints the table; returns what result.json says."""
    envs = make_eval_envs(task.env.spec, episodes)
    result = {"provenance": task.provenance, "data_score": task.data_score, "episodes": episodes}
    print(f"\n{'':12}{'score':>8}{'last 5 in training':>22}{'return':>20}")
    for name, agent in agents.items():
        returns = evaluate(agent, vqvae, envs, episodes)
        score, mean, std = task.score(returns.mean()), returns.mean(), returns.std()
        last = run.history(f"{name}/score")[1][-5:] or (math.nan,)
        print(f"{name:12}{score:8.1f}{np.mean(last):13.1f} +- {np.std(last):<5.1f}{mean:13.1f} +- {std:<5.1f}")
        result[name] = {"score": score, "last_5_scores": last, "return": mean, "return_std": std, "returns": [*returns]}
    print(f"{episodes} episodes each; those of the dataset score {task.data_score:.1f}. {task.provenance}")
    return result


# The figure's panel for what an agent's `diagnose` finds: its title, and the line of each series.
DIAGNOSIS = "mean of V over the data"
LINES = {"value": "-"}


def plot(run, names, task):
    """The figure: scores over training, and beside them what each agent's `diagnose` found."""
    figure = Figure(figsize=(3.5 * (1 + len(names)), 3.6), layout="constrained")
    scores, *panels = figure.subplots(1, 1 + len(names))
    scores.axhline(task.data_score, color="grey", linestyle="--", label="the dataset's episodes")
    for i, (name, panel) in enumerate(zip(names, panels, strict=True)):
        scores.plot(*run.history(f"{name}/score"), color=f"C{i}", label=name)
        for series, line in LINES.items():
            panel.plot(*run.history(f"{name}/{series}"), line, color=f"C{i}")
        panel.set(title=f"{name}: {DIAGNOSIS}", xlabel="gradient steps")
    scores.set(title=f"score\n{run.args.env}", xlabel="gradient steps")
    scores.legend()
    return figure


def main():
    args = parse_args()
    device = prepare(args.device, args.precision)
    task, data = load_task(args.env, args.dataset_path, device, args.reward_scale, args.reward_shift)
    obs_dim, action_dim, checksum = data.obs.shape[1], data.actions.shape[1], data.checksum()

    torch.manual_seed(args.seed)
    with device:  # what is made in here lies on it
        vqvae = QUANTIZERS[args.quantizer](obs_dim, action_dim, args.num_codes, args.action_only, args.lr)
        agents = make_agents(obs_dim, action_dim, vqvae, args)
    if args.normalize_obs:
        vqvae.set_units(data.obs)
    run = Run(args, {"quantizer": vqvae, **agents}, checksum, take_quantizer(args, checksum, vqvae))
    data = data._replace(obs=vqvae.normalize(data.obs), next_obs=vqvae.normalize(data.next_obs))
    done = run.state["done"]
    if args.eval_only is not None:
        trained = {name: agent for name, agent in agents.items() if name in done}
        if not (trained and task.env):
            raise UserError(f"{run.folder} holds no trained policy yet, or no environment to evaluate it in.")
        report(run, trained, vqvae, task, args.eval_episodes)
        return film(evaluate, trained, vqvae, task, args.video, run.folder)
    print(f"run: {run.folder}")
    envs = make_eval_envs(task.env.spec, args.eval_episodes) if task.env else None

    # 1. Fit the quantizer on the dataset's states and actions. `updates` is a generator: it waits for run.train to ask.
    options = dict(compile=args.compile, decay=args.vq_decay, revive_every=args.revive_every, noise=args.obs_noise)
    updates = fit(vqvae, data.obs, data.actions, args.vq_steps, args.vq_batch_size, done.get("quantizer", 0), **options)
    run.train("quantizer", updates, args.vq_steps, lambda: codebook_health(vqvae, data.obs, data.actions))
    print(describe_health(codebook_health(vqvae, data.obs, data.actions)))
    write_file(run.folder / "codes.png", plot_codes(vqvae, data.obs, data.actions).savefig)

    # 2. Replace every action by its code, once: the quantizer stays as it is from here on.
    data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions))

    # 3. Learn over the K codes; then the continuous twin, from the same data with the same evaluation.
    for name, agent in agents.items():
        evaluation = partial(assess, agent, vqvae, envs, task, data, args)
        run.train(name, learn(agent, data, args, done.get(name, 0)), args.steps, evaluation)
        if envs:
            print(f"{name}: score {np.mean(run.history(f'{name}/score')[1][-5:]):.1f} in its last evaluations")

    # 4. Act, and compare.
    if envs:
        write_file(run.folder / "result.json", report(run, agents, vqvae, task, args.final_episodes))
        write_file(run.folder / "comparison.png", plot(run, agents, task).savefig)
        film(evaluate, agents, vqvae, task, args.video, run.folder)


if __name__ == "__main__":
    exit_in_words(main)
