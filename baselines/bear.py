"""BEAR over codes, where its constraint is exact, beside the BEAR that estimates it from samples.

BEAR (Kumar et al., NeurIPS 2019, arXiv:1906.00949) lets a policy pi raise Q as long as its actions, as a set, stay near
those of the dataset's policy p. Near means: the maximum mean discrepancy of a kernel k between both is below epsilon,

    MMD^2(pi, p) = E k(a, a') - 2 E k(a, b) + E k(b, b'),     a, a' ~ pi,  b, b' ~ p

Over continuous actions that takes a generative model of p and four draws of each, and a draw's distance from itself, 0,
is counted among the distances: even where pi = p the estimate is (2 / n) (1 - E k(b, b')), which at the published
bandwidth exceeds epsilon^2 as soon as the variances of actions sum to 0.1. Over the K codes of a quantizer MMD^2 is a
quadratic form, with u_k what code k decodes to in this state:

    MMD^2 = (pi - p)' M (pi - p),     M_jk = exp(-||u_j - u_k||^2 / (2 sigma))

This is the teaching case: run it for its figure, which shows the sampled constraint and the exact one side by side.

    python baselines/bear.py                                             # three maze demonstrations
    python baselines/bear.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Explained in docs/baselines.md. Needs vqvae.py and, for benchmark names, offline_envs/.
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
sys.path.append(str(Path(__file__).resolve().parents[1]))  # vqvae.py lies there, or beside a copy of this file
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
    steps: int = 70_000  # gradient steps of each agent (the authors: 3_000_000)
    batch_size: int = 256  # transitions that each of them sees
    lr: float = 3e-4  # learning rate of every network
    decay: bool = True  # let the learning rates of agents fall to 0 along a cosine
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # added after that; scores do not change
    act: Literal["greedy", "sample", "mean"] = "greedy"  # SAQ: the likeliest code, a drawn one, or the mean action
    support: float = 0.1  # SAQ: codes with less than this share of the prior's highest probability do not act
    # --- Both BEARs ---
    epsilon: float = 0.05  # the root of MMD^2 that is allowed
    sigma: float = 20.0  # bandwidth of the kernel, not squared in it (as the authors')
    price_lr: float = 0.01  # learning rate of the constraint's price (the authors: 0.001, in 3_000_000 steps)
    warm_up: float = 0.04  # share of the steps in which the policy only comes near the data (the authors: 0.013)
    polyak: float = 0.005  # rate at which target networks follow
    samples: int = 4  # draws of either policy that estimate the discrepancy; over codes, in the figure alone
    # --- Continuous BEAR ---
    backup_samples: int = 10  # actions of the policy among which the target takes the best


# A task's row is the longest that its name begins with; a flag wins. Epsilon and sigma: the authors' for locomotion.
MAZE = dict(num_codes=4, act="sample", vq_steps=15_000, steps=10_000, eval_every=500)
HPARAMS = {
    "maze2d-large-demos-": MAZE,
    "hopper- halfcheetah-": dict(act="mean", support=0.2),
    "hopper-medium-v halfcheetah-medium-v": dict(act="mean", support=0.0),
    "walker2d- ant-": dict(act="mean", support=0.2, sigma=50.0),
    "walker2d-medium-v": dict(act="mean", support=0.0, sigma=50.0),
    "pen- door- hammer- relocate-": dict(act="sample"),  # docs/vqvae.md, "Acting"
    "antmaze-": dict(reward_shift=-1.0, eval_episodes=100),
    "lift- can- square- tool- transport- ogbench:": dict(eval_episodes=50),
    "mixture": dict(num_codes=64, act="mean"),  # by quantizer, over the task's row: K needs no choice
    "aquadem": dict(num_codes=10),  # as published
}


# --- The constraint ---


def kernel(x, y, sigma):
    """x (..., n, A), y (..., m, A) -> exp(-||x - y||^2 / (2 sigma)) (..., n, m)."""
    distance = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return (-distance / (2 * sigma)).exp()


def exact_mmd(pi, p, actions, sigma):
    """MMD^2 (B,) of two policies pi, p (B, K) over codes that stand for actions (B, K, A)."""
    difference = pi - p
    return torch.einsum("bj,bjk,bk->b", difference, kernel(actions, actions, sigma), difference)


def sampled_mmd(x, y, sigma):
    """An estimate of MMD^2 (B,) from n draws of each policy, x and y (B, n, A): the V-statistic of the official code,
    in which each draw's kernel with itself, 1, counts."""
    inner = kernel(x, x, sigma).mean((1, 2)) + kernel(y, y, sigma).mean((1, 2))
    return inner - 2 * kernel(x, y, sigma).mean((1, 2))


class Price(nn.Module):
    """The constraint's multiplier: it rises while the root of MMD^2 exceeds epsilon, and falls while it does not."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.optimizer = adamw([self.log_alpha], args.price_lr)

    def excess(self, mmd):
        """How far the root of MMD^2 (B,) exceeds what is allowed, on average."""
        return ((mmd.clamp(min=0) + 1e-6).sqrt() - self.args.epsilon).mean()

    def update(self, excess):
        """A step of Adam, up while the constraint is violated, down while it is not; within the authors' bounds."""
        minimize(-self.log_alpha * excess.detach(), {}, self.optimizer)
        with torch.no_grad():
            self.log_alpha.clamp_(-5, 10)


# --- SAQ-BEAR ---


class DiscreteBEAR(nn.Module):
    """BEAR over the K codes of a frozen quantizer: twin Q networks with K outputs, a policy network, an exact MMD.

    A training loop calls `update(batch)` and nothing else; `act(obs)` is the policy, for observations as
    `vqvae.normalize` returns them. The quantizer is a part of the agent: what state_dict() saves can act again.
    Read of `args`: lr, price_lr, steps, discount, epsilon, sigma, warm_up, polyak, samples, act, support."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        self.args, self.vqvae = args, vqvae
        self.qf = nn.ModuleList([mlp(obs_dim, vqvae.num_codes), mlp(obs_dim, vqvae.num_codes)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = mlp(obs_dim, vqvae.num_codes)
        self.price = Price(args)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far; CUDA graphs need a tensor
        # Updates of the warm-up: saved, so that it does not begin anew in a run that goes on with more steps.
        self.register_buffer("warm_up", torch.tensor(args.warm_up * args.steps, dtype=torch.float64))
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)
        self.price_optimizer = self.price.optimizer

    def qf_loss(self, batch):
        with torch.no_grad():
            next_q = torch.minimum(*(qf(batch.next_obs) for qf in self.qf_target))  # (B, K)
            next_v = (self.actor(batch.next_obs).softmax(1) * next_q).sum(1)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_v
        q_data = torch.cat([qf(batch.obs).gather(1, batch.codes[:, None]) for qf in self.qf], 1)  # (B, 2)
        qf_loss = (q_data - td_target[:, None]).square().mean(0).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def mmd(self, obs):
        """MMD^2 (B,) of the policy from the prior."""
        with torch.no_grad():
            actions, p = self.vqvae.candidates(obs), self.vqvae.prior_logits(obs).softmax(1)
        return exact_mmd(self.actor(obs).softmax(1), p, actions, self.args.sigma)

    def actor_loss(self, batch):
        """Raise what the policy expects of Q, and pay for what the MMD exceeds."""
        with torch.no_grad():
            q = torch.minimum(*(qf(batch.obs) for qf in self.qf))
        expected_q = (self.actor(batch.obs).softmax(1) * q).sum(1).mean()
        excess = self.price.excess(self.mmd(batch.obs))
        guided = (self.step > self.warm_up).float()
        actor_loss = self.price.log_alpha.exp().detach() * excess - guided * expected_q
        return actor_loss, {"actor_loss": actor_loss, "excess": excess, "alpha": self.price.log_alpha.exp()}

    def update(self, batch):
        """A gradient step of Q, of the policy and of the constraint's price; then the targets follow."""
        self.step += 1
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        self.price.update(info["excess"])
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): what the policy does, by its likeliest code, one drawn, or its mean."""
        return self.vqvae.act(obs, self.actor(obs), self.args.act, self.args.support)

    @torch.no_grad()
    def diagnose(self, batch):
        """The root of MMD^2, exact, and what a few draws of the same two policies say of it."""
        actions = self.vqvae.candidates(batch.obs)
        policies = self.actor(batch.obs).softmax(1), self.vqvae.prior_logits(batch.obs).softmax(1)
        draws = [actions.take_along_dim(p.multinomial(self.args.samples, True)[..., None], 1) for p in policies]
        roots = self.mmd(batch.obs), sampled_mmd(*draws, self.args.sigma)
        exact, sampled = ((mmd.clamp(min=0) + 1e-6).sqrt().mean() for mmd in roots)
        return {"mmd_exact": exact, "mmd_sampled": sampled}


# --- Continuous BEAR ---


class Actor(nn.Module):
    """A Gaussian policy, squashed into [-1, 1] by tanh."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim, hidden=(256, 256))

    def sample(self, obs, n):
        """n actions in each state before tanh (B, n, A)."""
        mean, log_std = self.net(obs).chunk(2, -1)
        noise = torch.randn(len(obs), n, mean.shape[1], device=obs.device)
        return mean[:, None] + (log_std - 1).clamp(-20, 2).exp()[:, None] * noise

    def mode(self, obs):
        return self.net(obs).chunk(2, -1)[0].tanh()


class CVAE(nn.Module):
    """A generative model of the dataset's actions: a variational autoencoder that sees the state."""

    def __init__(self, obs_dim, action_dim, hidden=(256, 256)):
        super().__init__()
        self.latent = 2 * action_dim
        self.encoder = mlp(obs_dim + action_dim, 2 * self.latent, hidden)
        self.decoder = mlp(obs_dim + self.latent, action_dim, hidden)

    def loss(self, obs, actions):
        """Reconstruction and half the KL divergence of the latent from a standard Gaussian, both averaged (BEAR's)."""
        mean, log_std = self.encoder(torch.cat([obs, actions], 1)).chunk(2, 1)
        log_std = log_std.clamp(-4, 15)
        z = mean + log_std.exp() * torch.randn_like(mean)
        reconstruction = self.decoder(torch.cat([obs, z], 1)).tanh()
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
        return (reconstruction - actions).square().mean() + 0.5 * kl

    def sample(self, obs, n):
        """n actions in each state before tanh (B, n, A); latents are clipped to 0.5, as the authors' are."""
        z = torch.randn(len(obs), n, self.latent, device=obs.device).clamp(-0.5, 0.5)
        return self.decoder(torch.cat([obs[:, None].expand(-1, n, -1), z], 2))


class ContinuousBEAR(nn.Module):
    """BEAR with twin critics, a CVAE as the model of the dataset, and the MMD of a few draws before tanh.

    Its protocol is DiscreteBEAR's. Read of `args`: lr, price_lr, steps, discount, epsilon, sigma, warm_up, polyak,
    samples, backup_samples."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim)
        self.model = CVAE(obs_dim, action_dim)
        self.qf = nn.ModuleList([mlp(obs_dim + action_dim, 1, hidden=(256, 256)) for _ in range(2)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.price = Price(args)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far; CUDA graphs need a tensor
        # Updates of the warm-up: saved, so that it does not begin anew in a run that goes on with more steps.
        self.register_buffer("warm_up", torch.tensor(args.warm_up * args.steps, dtype=torch.float64))
        self.model_optimizer = adamw(self.model.parameters(), args.lr)
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)
        self.price_optimizer = self.price.optimizer

    def q_values(self, qf, obs, actions):
        """obs (B, O), actions (B, n, A) -> (2, B, n), of both critics."""
        obs = obs[:, None].expand(-1, actions.shape[1], -1)
        return torch.stack([critic(torch.cat([obs, actions], 2))[..., 0] for critic in qf])

    def qf_loss(self, batch):
        """The target takes the best of several actions of the policy, three quarters of it by the lower critic."""
        with torch.no_grad():
            actions = self.actor.sample(batch.next_obs, self.args.backup_samples).tanh()
            q = self.q_values(self.qf_target, batch.next_obs, actions)  # (2, B, n)
            next_v = (0.75 * q.amin(0) + 0.25 * q.amax(0)).amax(1)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_v
        q_data = self.q_values(self.qf, batch.obs, batch.actions[:, None])[..., 0]  # (2, B)
        qf_loss = (q_data - td_target).square().mean(1).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean()}

    def actor_loss(self, batch):
        x = self.actor.sample(batch.obs, self.args.samples)
        with torch.no_grad():
            y = self.model.sample(batch.obs, self.args.samples)
        excess = self.price.excess(sampled_mmd(x, y, self.args.sigma))
        q = self.q_values(self.qf, batch.obs, x.tanh()).amin(0).mean()
        guided = (self.step > self.warm_up).float()
        actor_loss = self.price.log_alpha.exp().detach() * excess - guided * q
        return actor_loss, {"actor_loss": actor_loss, "excess": excess, "alpha": self.price.log_alpha.exp()}

    def update(self, batch):
        """A gradient step of the model, of Q, of the policy and of the price; then the targets follow."""
        self.step += 1
        model_loss = self.model.loss(batch.obs, batch.actions)
        info = minimize(model_loss, {"model_loss": model_loss}, self.model_optimizer)
        info |= minimize(*self.qf_loss(batch), self.qf_optimizer)
        info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        self.price.update(info["excess"])
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): the policy's mode (the authors: the best of 100 draws by Q)."""
        return self.actor.mode(obs)

    @torch.no_grad()
    def diagnose(self, batch):
        """The root of MMD^2 as the constraint sees it, and as 100 draws of the same two policies do."""
        roots = {}
        for name, n in (("mmd_sampled", self.args.samples), ("mmd_100_draws", 100)):
            draws = self.actor.sample(batch.obs, n), self.model.sample(batch.obs, n)
            roots[name] = (sampled_mmd(*draws, self.args.sigma).clamp(min=0) + 1e-6).sqrt().mean()
        return roots


def make_agents(obs_dim, action_dim, vqvae, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"saq_bear": DiscreteBEAR(obs_dim, vqvae, args)}
    return agents | ({"bear": ContinuousBEAR(obs_dim, action_dim, args)} if args.compare else {})


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

SCRIPT, OWN_STEPS = Path(__file__).stem, {"quantizer"}  # and the phases with a number of steps of their own
PLAIN = dict(num_codes=64, vq_decay=False, decay=False, revive_every=0, normalize_obs=False, support=0.0, act="greedy")
PLAIN |= dict(price_lr=1e-3, warm_up=0.0133)
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
DIAGNOSIS = "root of MMD^2 from the data\nexact or 100 draws (solid), few draws (dotted)"
LINES = {"mmd_exact": "-", "mmd_100_draws": "-", "mmd_sampled": ":"}


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
