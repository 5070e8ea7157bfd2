"""SAQ-BRAC: behaviour-regularised actor-critic on quantized actions, beside the continuous BRAC that it replaces.

Offline RL learns from a fixed dataset, and Q-learning seeks out actions whose Q is too high by mistake. BRAC lets its
policy pi leave the dataset's own, p, only at a price: beta KL(pi || p). Over continuous actions that takes a density
model of the data and samples of the policy; over the K codes of a VQ-VAE it is a sum of K terms. The steps:

    1. `fit` trains the VQ-VAE on the dataset: encode (s, a) -> code, decode (s, code) -> a (vqvae.py)
    2. `encode_dataset` replaces every action of the dataset by its code k, once
    3. `DiscreteBRAC.update` trains twin Q(s, .) with K outputs and pi(k | s), near the quantizer's prior p(k | s), by
           V(s) = sum_k pi(k | s) (Q(s, k) - beta log(pi(k | s) / p(k | s))),  (Q(s, k) - r - gamma V(s'))^2 (Eq. 2, 3)
           max_pi sum_k pi(k | s) (Q(s, k) + beta log p(k | s) - alpha log pi(k | s))                            (Eq. 6)
    4. `DiscreteBRAC.act` decodes a code of pi; its twin, `ContinuousBRAC`, learns the same data

    python saq_brac.py                                            # three maze demonstrations
    python saq_brac.py --env Pendulum-v1 --dataset-path mine.npz  # your own data in D4RL's layout

Luo et al., "Action-Quantized Offline RL for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731. BRAC: Wu, Tucker and
Nachum, 2019, arXiv:1911.11361. Needs vqvae.py and, for benchmark names, offline_envs/; docs/saq_brac.md has the rest.
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
    # --- Both BRACs ---
    beta: float = 1.0  # weight of staying near the dataset's policy, in units of Q, in the policy and in the value
    value_penalty: bool = True  # the value pays too, as BRAC-v's; False: BRAC-p, and if actor_free, AWAC over codes
    polyak: float = 0.005  # rate at which target networks follow
    # --- SAQ-BRAC ---
    alpha: float = 1.0  # weight of the policy's entropy (Eq. 6); at alpha = beta the policy's two terms are -beta KL
    prior_floor: float = -8.0  # log p(k | s) counts as at least this: Q can still choose a rare code
    literal: bool = False  # the value of Eq. 3 to the letter, which rewards log p(k | s) instead of subtracting the KL
    actor_free: bool = False  # the policy that maximises Eq. 6, computed: no policy network learns
    weight_decay: float = 1e-3  # AdamW's weight decay of the Q networks
    # --- Continuous BRAC ---
    warm_up: float = 0.3  # share of the steps in which the policy only follows the model of the data


PRICE = dict(alpha=10.0, beta=10.0)  # SAQ-BRAC's settings were not released: ours (docs/saq_brac.md)
HPARAMS = {  # by the first letters of a task's name; a flag wins
    "maze2d-large-demos-": dict(PRICE, num_codes=4, act="sample", vq_steps=15_000, steps=10_000, eval_every=500),
    "hopper- halfcheetah- walker2d- ant-": dict(PRICE, act="mean", support=0.2),
    "hopper-medium-v halfcheetah-medium-v walker2d-medium-v": dict(PRICE, act="mean", support=0.0),
    "pen- door- hammer- relocate-": dict(PRICE, act="sample"),  # docs/vqvae.md, "Acting"
    "kitchen-": PRICE,
    "antmaze- maze2d-": dict(alpha=0.1, beta=0.1, reward_shift=-1.0, eval_episodes=100),
    "lift- can- square- tool- transport- ogbench:": dict(alpha=1.0, beta=1.0, eval_episodes=50),
    "mixture": dict(num_codes=64, act="mean"),  # by quantizer, over the task's row: K needs no choice
    "aquadem": dict(num_codes=10),  # as published
}


# --- SAQ-BRAC ---


class DiscreteBRAC(nn.Module):
    """BRAC-v over the K codes of a frozen quantizer, which stays near the quantizer's prior p(k | s).

    A training loop calls `update(batch)` and nothing else; `act(obs)` is the policy, for observations as
    `vqvae.normalize` returns them. The quantizer is a part of the agent: what state_dict() saves can act again.
    Read of `args`: lr, weight_decay, discount, beta, alpha, value_penalty, polyak, prior_floor,
    literal, actor_free, act, support. Raises UserError for actor_free without an alpha, and for
    literal without a value penalty."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        if args.actor_free and args.alpha == 0:
            raise UserError("without an actor the policy is divided by alpha: pass an alpha above 0.")
        if args.literal and not args.value_penalty:
            raise UserError("literal is a form of the value's penalty, and no value_penalty leaves that out: pass one.")
        self.args, self.vqvae = args, vqvae
        self.qf = nn.ModuleList([mlp(obs_dim, vqvae.num_codes), mlp(obs_dim, vqvae.num_codes)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = mlp(obs_dim, vqvae.num_codes)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr, args.weight_decay)
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)

    def log_prior(self, obs):
        """obs (B, O) -> log p(k | s) (B, K), never below the floor."""
        return self.vqvae.prior_logits(obs).log_softmax(1).clamp(min=self.args.prior_floor)

    def log_policy(self, obs, q):
        """obs (B, O), q (B, K) -> log pi(k | s) (B, K): the network's, or the maximum of Eq. 6 in closed form."""
        if self.args.actor_free:
            return ((q + self.args.beta * self.log_prior(obs)) / self.args.alpha).log_softmax(1)
        return self.actor(obs).log_softmax(1)

    def value(self, obs):
        """V(s) (B,), Eq. 3 with the whole KL of Eq. 2: what the policy expects of Q, less beta times its divergence
        from the floored prior. Without an actor, at alpha = beta: alpha log sum_k p(k | s) exp(Q(s, k) / alpha)."""
        q = torch.minimum(*(qf(obs) for qf in self.qf_target))  # (B, K)
        log_pi, log_prior = self.log_policy(obs, q), self.log_prior(obs)
        penalty = -log_prior if self.args.literal else log_pi - log_prior
        beta = self.args.beta if self.args.value_penalty else 0.0
        return (log_pi.exp() * (q - beta * penalty)).sum(1)

    def qf_loss(self, batch):
        with torch.no_grad():
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * self.value(batch.next_obs)
        q_data = torch.cat([qf(batch.obs).gather(1, batch.codes[:, None]) for qf in self.qf], 1)  # (B, 2)
        qf_loss = (q_data - td_target[:, None]).square().mean(0).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def actor_loss(self, batch):
        """Eq. 6: raise sum_k pi(k | s) (Q(s, k) + beta log p(k | s) - alpha log pi(k | s))."""
        with torch.no_grad():
            q = torch.minimum(*(qf(batch.obs) for qf in self.qf))
            log_prior = self.log_prior(batch.obs)  # (B, K)
        log_pi = self.log_policy(batch.obs, q)  # (B, K)
        objective = (log_pi.exp() * (q + self.args.beta * log_prior - self.args.alpha * log_pi)).sum(1)
        actor_loss = -objective.mean()
        return actor_loss, {"actor_loss": actor_loss}

    def update(self, batch):
        """One gradient step of each network; then the targets follow. Returns what to log."""
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        if not self.args.actor_free:
            info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): what the policy does, by its likeliest code, one drawn, or its mean."""
        log_pi = self.log_policy(obs, torch.minimum(*(qf(obs) for qf in self.qf)))
        return self.vqvae.act(obs, log_pi, self.args.act, self.args.support)

    @torch.no_grad()
    def diagnose(self, batch):
        """KL(pi || p) of the policy from the floored prior, for the figure: a sum of K terms."""
        log_pi = self.log_policy(batch.obs, torch.minimum(*(qf(batch.obs) for qf in self.qf)))
        return {"kl_exact": (log_pi.exp() * (log_pi - self.log_prior(batch.obs))).sum(1).mean()}


# --- Continuous BRAC ---


class Actor(nn.Module):
    """A Gaussian, squashed into [-1, 1] by tanh: the policy, and the model of the dataset's policy. Densities are those
    of actions before tanh, x: a divergence between two of them is the same there, and finite up to the box's edge."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim, hidden=(256, 256))

    def distribution(self, obs):
        """obs (B, O) -> mean and log standard deviation of x (B, A)."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, (log_std - 1).clamp(-20, 2)  # starts at a narrow e^-1, as in the authors' code

    def log_prob(self, obs, x):
        """Log density (..., B) of x (..., B, A) in obs (B, O)."""
        mean, log_std = self.distribution(obs)
        return (-0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, obs, n):
        """n draws of x in each state (n, B, A), and their log densities (n, B)."""
        mean, log_std = self.distribution(obs)
        noise = torch.randn(n, *mean.shape, device=obs.device)
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return mean + log_std.exp() * noise, log_prob


class Critic(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1, hidden=(256, 256))

    def forward(self, obs, actions):
        """obs (B, O), actions (B, A) -> Q values (B,)."""
        return self.net(torch.cat([obs, actions], -1))[:, 0]


class ContinuousBRAC(nn.Module):
    """BRAC-v with twin critics, a Gaussian model of the dataset's policy, and the KL divergence from it estimated by
    four actions of the policy, as in BRAC's own code. In the first `warm_up` of the steps the policy is the model, as
    far as that is fitted; it then leaves at a tenth of the critics' rate.

    Its protocol is DiscreteBRAC's. Read of `args`: lr, steps, discount, beta, value_penalty, polyak,
    warm_up."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.behaviour = Actor(obs_dim, action_dim)
        self.actor = Actor(obs_dim, action_dim)
        self.qf = nn.ModuleList([Critic(obs_dim, action_dim), Critic(obs_dim, action_dim)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far; CUDA graphs need a tensor
        # Updates of the warm-up: saved, so that it does not begin anew in a run that goes on with more steps.
        self.register_buffer("warm_up", torch.tensor(args.warm_up * args.steps, dtype=torch.float64))
        self.behaviour_optimizer = adamw(self.behaviour.parameters(), args.lr)
        self.actor_optimizer = adamw(self.actor.parameters(), 0.1 * args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)

    def behaviour_loss(self, batch):
        """Maximum likelihood of the dataset's actions. tanh never reaches 1, so they are clipped a little inside."""
        x = batch.actions.clamp(-0.999, 0.999).atanh()
        behaviour_loss = -self.behaviour.log_prob(batch.obs, x).mean()
        return behaviour_loss, {"behaviour_loss": behaviour_loss}

    def sample(self, obs, n=4):
        """An action of the policy in each state (B, A), and the mean of log pi - log p over n of them (B,): the KL."""
        x, log_prob = self.actor.sample(obs, n)
        return x[0].tanh(), (log_prob - self.behaviour.log_prob(obs, x)).mean(0)

    def qf_loss(self, batch):
        with torch.no_grad():
            next_actions, kl = self.sample(batch.next_obs)
            next_v = torch.minimum(*(qf(batch.next_obs, next_actions) for qf in self.qf_target))
            next_v = next_v - self.args.beta * kl if self.args.value_penalty else next_v
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_v
        q_data = torch.stack([qf(batch.obs, batch.actions) for qf in self.qf])  # (2, B)
        qf_loss = (q_data - td_target).square().mean(1).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def actor_loss(self, batch):
        actions, kl = self.sample(batch.obs)
        actor_loss = (self.args.beta * kl - torch.minimum(*(qf(batch.obs, actions) for qf in self.qf))).mean()
        return actor_loss, {"actor_loss": actor_loss}

    def update(self, batch):
        """One gradient step of each network; then the targets follow. Returns what to log."""
        self.step += 1
        info = minimize(*self.behaviour_loss(batch), self.behaviour_optimizer)
        info |= minimize(*self.qf_loss(batch), self.qf_optimizer)
        info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        # Rate 1, a copy, until the warm-up ends; then 0, no change.
        polyak_update(self.actor, self.behaviour, self.step <= self.warm_up)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): the policy's mode."""
        return self.actor.distribution(obs)[0].tanh()

    @torch.no_grad()
    def diagnose(self, batch):
        return {"kl_sampled": self.sample(batch.obs)[1].mean()}


def make_agents(obs_dim, action_dim, vqvae, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"saq_brac": DiscreteBRAC(obs_dim, vqvae, args)}
    return agents | ({"brac": ContinuousBRAC(obs_dim, action_dim, args)} if args.compare else {})


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

SCRIPT, OWN_STEPS = Path(__file__).stem, {"quantizer"}  # and the phases with a number of steps of their own
PLAIN = dict(num_codes=64, vq_decay=False, decay=False, revive_every=0, normalize_obs=False, support=0.0, act="greedy")
# What a command line may change when the policies of a run are evaluated, and when it goes on.
FREE = {"device", "dataset_path", "eval_episodes", "video", "resume", "eval_only"}
FREE_TO_EVALUATE = FREE | {"act", "support"}
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
DIAGNOSIS = "KL from the data's policy\nexact (solid), from four samples (dotted)"
LINES = {"kl_exact": "-", "kl_sampled": ":"}


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
