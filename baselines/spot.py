"""SPOT over codes, where the density of the data is exact, beside the SPOT that bounds it; then both learn on, online.

SPOT (Wu et al., NeurIPS 2022, arXiv:2202.06239) holds a policy to what the dataset's own, p, is likely to do, and to
nothing else: it matches no distribution, it stays in the support of one. lambda is the price of a nat:

    max_pi  Q(s, pi(s)) / mean |Q| + lambda log p(pi(s) | s)

Over continuous actions log p comes from a variational autoencoder, as a lower bound, and the maximum from a policy
network. Over the K codes of a quantizer p is its prior, and the maximum is one of K numbers:

    k* = argmax_k  Q(s, k) / mean |Q| + lambda log p(k | s)        (--hard: argmax of Q where p(k | s) > epsilon)

At the lambda that suits a short training, 0.3, that is nearly always the likeliest code: SAQ-SPOT then clones.
With --online-steps N both go on in the environment: N steps, an update after each, on the dataset and all that is new,
while lambda falls to a fifth, so that they may leave the data little by little. Over codes, a new transition is stored
with the code that was chosen.

    python baselines/spot.py --online-steps 5000                         # three maze demonstrations, then 5,000 steps
    python baselines/spot.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Explained in docs/baselines.md. Needs vqvae.py and, for benchmark names, offline_envs/.
"""

import copy
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
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
from vqvae import Memory, copy_learner, play  # online


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
    lr: float = 3e-4  # learning rate of every network but the density model's, 1e-3
    decay: bool = True  # let the learning rates of agents fall to 0 along a cosine
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # added after that; scores do not change
    act: Literal["greedy", "sample", "mean"] = "greedy"  # SAQ: the likeliest code, a drawn one, or the mean action
    support: float = 0.1  # SAQ: codes with less than this share of the prior's highest probability do not act
    # --- Both SPOTs ---
    polyak: float = 0.005  # rate at which target networks follow
    online_steps: int = 0  # steps in the environment after the offline phase, with an update after each
    online_updates: bool = True  # --no-online-updates: act as often and learn nothing, for comparison
    online_weight: float = 0.2  # the share of its lambda to which the density falls online
    reference: float = 100.0  # the score of no regret: D4RL's expert, or every episode a success; of returns, yours
    # --- SAQ-SPOT ---
    code_weight: float = 0.3  # lambda: weight of log p(k | s), in nats, beside Q / mean |Q|
    hard: float | None = None  # epsilon: codes with p(k | s) <= it are left out instead; lambda is left to draws
    # --- Continuous SPOT ---
    vae_steps: int = 30_000  # gradient steps of the density model, before the agents' (the authors: 100_000)
    density_weight: float = 0.1  # lambda: weight of the bound as the authors scale it, a nat as 1 / (4 A)


# A task's row is the longest that its name begins with; a flag wins. Weights of the density are the authors' for
# hopper, halfcheetah, walker2d and antmaze, CORL's (for cloned data) for adroit, ours for ant and the demonstrations,
# which score 186.2. All about codes is ours.
MAZE = dict(num_codes=4, vq_steps=15_000, vae_steps=10_000, steps=10_000, eval_every=500)
HPARAMS = {
    "maze2d-large-demos-": dict(MAZE, density_weight=1.0, reference=186.2),
    "hopper- ant-": dict(act="mean", support=0.2, density_weight=0.1),
    "halfcheetah-": dict(act="mean", support=0.2, density_weight=0.05),
    "halfcheetah-medium-expert-": dict(act="mean", support=0.2, density_weight=1.0),
    "hopper-medium-expert- walker2d-": dict(act="mean", support=0.2, density_weight=0.2),
    "walker2d-medium-expert-": dict(act="mean", support=0.2, density_weight=0.5),
    "hopper-medium-v": dict(act="mean", support=0.0, density_weight=0.1),
    "halfcheetah-medium-v": dict(act="mean", support=0.0, density_weight=0.05),
    "walker2d-medium-v": dict(act="mean", support=0.0, density_weight=0.2),
    "antmaze-": dict(reward_shift=-1.0, eval_episodes=100, density_weight=0.025),
    "antmaze-umaze-": dict(reward_shift=-1.0, eval_episodes=100, density_weight=0.25),
    "antmaze-medium-play-": dict(reward_shift=-1.0, eval_episodes=100, density_weight=0.05),
    "pen- door- hammer- relocate-": dict(density_weight=1.0, act="sample"),  # docs/vqvae.md, "Acting"
    "lift- can- square- tool- transport- ogbench:": dict(eval_episodes=50),
    "mixture": dict(num_codes=64, act="mean"),  # by quantizer, over the task's row: K needs no choice
    "aquadem": dict(num_codes=10),  # as published
}


# --- SAQ-SPOT ---


class DiscreteSPOT(nn.Module):
    """SPOT over the K codes of a frozen quantizer: twin Q networks with K outputs, and no policy network.

    A training loop calls `update(batch)` and nothing else; `act(obs)` is the policy, for observations as
    `vqvae.normalize` returns them. The quantizer is a part of the agent: what state_dict() saves can act again.
    Read of `args`: lr, discount, code_weight, hard, polyak, act, support."""

    def __init__(self, obs_dim, vqvae, args):
        super().__init__()
        self.args, self.vqvae = args, vqvae
        self.qf = nn.ModuleList([mlp(obs_dim, vqvae.num_codes), mlp(obs_dim, vqvae.num_codes)])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)
        self.register_buffer("q_size", torch.ones(()))  # mean |Q| of the last batch: one state has none of its own
        self.register_buffer("caution", torch.ones(()))  # falls online, and lambda and epsilon with it

    def scores(self, obs):
        """obs (B, O) -> (B, K), what the policy maximises over codes, in units of mean |Q|."""
        q = torch.minimum(*(qf(obs) for qf in self.qf)) / self.q_size
        log_p = self.vqvae.prior_logits(obs).log_softmax(1)
        if self.args.hard is None:
            return q + self.caution * self.args.code_weight * log_p
        outside = log_p.exp() <= self.caution * self.args.hard
        return q.masked_fill(outside & (log_p < log_p.amax(1, keepdim=True)), -math.inf)  # the likeliest code stays

    def policy_logits(self, obs):
        """Logits (B, K) of the policy that draws, p(k | s) exp(Q(s, k) / (lambda mean |Q|)), whose mode is SPOT's code.
        With --hard: exp(...) alone, of the codes that are left."""
        return self.scores(obs) / (self.caution * self.args.code_weight).clamp(min=1e-6)

    def qf_loss(self, batch):
        """TD toward what the target networks, by the lower of them, say of the code that the policy takes next."""
        q = torch.stack([qf(batch.obs) for qf in self.qf])  # (2, B, K)
        with torch.no_grad():
            self.q_size.copy_(q.abs().mean().clamp(min=1e-6))
            next_codes = self.scores(batch.next_obs).argmax(1, keepdim=True)  # (B, 1)
            next_q = torch.minimum(*(qf(batch.next_obs).gather(1, next_codes)[:, 0] for qf in self.qf_target))
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q
        q_data = q.gather(2, batch.codes.expand(2, -1)[..., None])[..., 0]  # (2, B)
        qf_loss = (q_data - td_target).square().mean(1).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q_data.mean(), "q_size": self.q_size}

    def update(self, batch):
        """A gradient step of Q; then the targets follow. Returns what to log."""
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): what the best code stands for, one drawn, or the mean."""
        return self.vqvae.act(obs, self.policy_logits(obs), self.args.act, self.args.support)

    def explore(self, obs):
        """obs (B, O) -> actions (B, A) of codes that the policy draws, and these codes (B,): no action leaves them. It
        may draw what --support keeps from acting: only so do data come of it."""
        codes = self.policy_logits(obs).softmax(1).multinomial(1)[:, 0]
        return self.vqvae.decode(obs, codes).clamp(-1, 1), codes

    @torch.no_grad()
    def diagnose(self, batch):
        """log p of the policy's codes, for the figure."""
        return {"log_density": -F.cross_entropy(self.vqvae.prior_logits(batch.obs), self.scores(batch.obs).argmax(1))}


# --- Continuous SPOT ---


class DensityModel(nn.Module):
    """A model of the dataset's actions: a variational autoencoder that sees the state."""

    def __init__(self, obs_dim, action_dim, lr=1e-3, hidden=(750, 750)):
        super().__init__()
        self.latent = 2 * action_dim
        self.encoder = mlp(obs_dim + action_dim, 2 * self.latent, hidden)
        self.decoder = mlp(obs_dim + self.latent, action_dim, hidden)
        self.optimizer = adamw(self.parameters(), lr)

    def elbo_loss(self, obs, actions, beta=0.5):
        """The bound (B,) on -log p(a | s) of obs (B, O), actions (B, A), as the authors scale it: the squared error, a
        mean over A, plus beta times the latent's KL divergence from a standard Gaussian, a mean over 2 A. So a nat
        counts beta / (2 A), and the decoder's variance is beta / 4. One draw of the latent for each action."""
        mean, log_std = self.encoder(torch.cat([obs, actions], 1)).chunk(2, 1)  # (B, 2 A) each
        log_std = log_std.clamp(-4, 15)
        z = mean + log_std.exp() * torch.randn_like(mean)
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean(1)
        return (self.decoder(torch.cat([obs, z], 1)).tanh() - actions).square().mean(1) + beta * kl

    def update(self, batch):
        """A gradient step on a batch's actions. Returns what to log."""
        loss = self.elbo_loss(batch.obs, batch.actions).mean()
        return minimize(loss, {"elbo_loss": loss}, self.optimizer)


class ContinuousSPOT(nn.Module):
    """TD3 whose policy pays for how unlikely its actions are. Its protocol is DiscreteSPOT's, but for `vae`, a model of
    the data that is to be fitted before, by its own `update`, and stays as it is then.

    Read of `args`: lr, discount, density_weight, polyak."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args, self.vae = args, DensityModel(obs_dim, action_dim)
        self.actor = mlp(obs_dim, action_dim, hidden=(256, 256))  # no dropout: the authors' stays on in its target
        self.qf = nn.ModuleList([mlp(obs_dim + action_dim, 1, hidden=(256, 256)) for _ in range(2)])
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far; CUDA graphs need a tensor
        self.register_buffer("caution", torch.ones(()))  # falls online, and lambda with it

    def q_values(self, qf, obs, actions):
        """obs (B, O), actions (B, A) -> (2, B), of both critics."""
        return torch.stack([critic(torch.cat([obs, actions], 1))[:, 0] for critic in qf])

    def qf_loss(self, batch):
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(batch.actions)).clamp(-0.5, 0.5)
            next_actions = (self.actor_target(batch.next_obs).tanh() + noise).clamp(-1, 1)
            next_q = self.q_values(self.qf_target, batch.next_obs, next_actions).amin(0)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q
        q = self.q_values(self.qf, batch.obs, batch.actions)
        qf_loss = (q - td_target).square().mean(1).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q.mean()}

    def actor_loss(self, batch):
        """-Q / mean |Q| of the first critic, plus lambda times the bound, whose encoder sees the policy's action, too:
        the gradient takes both ways."""
        actions = self.actor(batch.obs).tanh()
        q = self.q_values(self.qf, batch.obs, actions)[0]
        elbo_loss = self.vae.elbo_loss(batch.obs, actions).mean()
        actor_loss = self.caution * self.args.density_weight * elbo_loss - q.mean() / q.abs().mean().detach()
        return actor_loss, {"actor_loss": actor_loss, "elbo_loss": elbo_loss}

    def update(self, batch):
        """A gradient step of the critics; in every second update one of the policy, after which all targets follow."""
        self.step += 1
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        # The policy's loss is computed in every update, since a CUDA graph has no branches. In every other one fused
        # Adam leaves out the step (found_inf, its switch for overflow in mixed precision), and targets follow by 0.
        delayed = (self.step % 2 == 0).float()
        self.actor_optimizer.found_inf = 1 - delayed
        info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        for target, network in ((self.qf_target, self.qf), (self.actor_target, self.actor)):
            polyak_update(target, network, self.args.polyak * delayed)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A)."""
        return self.actor(obs).tanh()

    def explore(self, obs):
        """obs (B, O) -> actions (B, A) with noise; codes (B,) that mean nothing."""
        noise = 0.1 * torch.randn(len(obs), self.vae.latent // 2, device=obs.device)
        return (self.act(obs) + noise).clamp(-1, 1), torch.zeros(len(obs), dtype=torch.int64, device=obs.device)

    @torch.no_grad()
    def diagnose(self, batch):
        """Minus the bound at the policy's actions, in nats up to a constant, for the figure."""
        return {"log_density": -2 * self.vae.latent * self.vae.elbo_loss(batch.obs, self.act(batch.obs)).mean()}


# --- The online phase ---


def fine_tune(agent, memory, vqvae, task, args, start, last):
    """A step in the environment, then an update, from step `start` to `last`, counted on from the offline ones; yields
    (step, info) after each. `caution` falls in a straight line, no lower than online_weight; learning rates are `lr`
    throughout, as published, not the 0 at which the offline phase's cosine ended."""
    updates = learn(agent, memory, replace(args, decay=False, steps=last), start)
    # Each turn of the loop is a step in the environment, which writes a transition into the memory.
    for step, _ in zip(range(start + 1, last + 1), play(agent.explore, memory, vqvae, task, args.seed), strict=False):
        if args.online_updates:
            agent.caution.fill_(max(args.online_weight, (last - step) / args.online_steps))
        yield next(updates) if args.online_updates else (step, {})


def go_online(run, agents, twins, memories, vqvae, envs, task, data):
    """The online phase of each agent. Its twin begins as it has ended, targets and Adam's averages included, and learns
    on; the agent stays, to compare with. A generator: yields the name and the `online_facts` of each."""
    for (name, twin), agent, memory in zip(twins.items(), agents.values(), memories.values(), strict=True):
        memory.fill(data)
        if name not in run.state["done"]:
            copy_learner(agent, twin)
        start = run.state["done"].setdefault(name, run.args.steps)
        last = start - len(memory.new().obs) + run.args.online_steps
        evaluation = partial(assess, twin, vqvae, envs, task, data, run.args)
        run.train(name, fine_tune(twin, memory, vqvae, task, run.args, start, last), last, evaluation)
        yield name, online_facts(run, name, memory, vqvae, data)


def online_facts(run, name, memory, vqvae, data):
    """What result.json says of an online phase beside scores: its curve, and the regret, 1 - the curve's mean / the
    reference; the quantizer's mean squared error on the actions of new states and of old ones; over codes, the share
    of those stored that the quantizer makes of their actions again: else they mean other actions than old ones."""
    scores, new = run.history(f"{name}/score")[1], memory.new()
    facts = {"scores": scores, "regret": 1 - np.mean(scores) / run.args.reference, "reference": run.args.reference}
    if name == "saq_online":
        facts["same_code"] = (vqvae.encode_dataset(new.obs, new.actions) == new.codes).float().mean().item()
    for which, rows in (("offline", data), ("online", new)):
        facts[f"error_{which}"] = codebook_health(vqvae, rows.obs, rows.actions)["reconstruction_error"]
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in facts.items() if key != "scores"))
    return facts


def make_agents(obs_dim, action_dim, vqvae, args, names=("saq_spot", "spot")):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {names[0]: DiscreteSPOT(obs_dim, vqvae, args)}
    return agents | ({names[1]: ContinuousSPOT(obs_dim, action_dim, args)} if args.compare else {})


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

# OWN_STEPS: phases with a number of steps of their own.
SCRIPT, OWN_STEPS = Path(__file__).stem, {"quantizer", "density", "saq_online", "spot_online"}
PLAIN = dict(num_codes=64, vq_decay=False, decay=False, revive_every=0, normalize_obs=False, support=0.0, act="greedy")
# What a command line may change when the policies of a run are evaluated, and when it goes on.
FREE = {"device", "dataset_path", "eval_episodes", "video", "resume", "eval_only"}
FREE_TO_EVALUATE = FREE | {"act", "support"}
FREE_TO_RESUME = FREE | {"steps", "track", "compile", "log_every", "eval_every", "final_episodes", "online_steps"}
FREE_TO_RESUME |= {"reference"}


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
DIAGNOSIS = "log density"
LINES = {"log_density": "-"}


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
    if args.online_steps and not task.env:
        raise UserError("online steps need an environment: leave online_steps out.")
    obs_dim, action_dim, checksum = data.obs.shape[1], data.actions.shape[1], data.checksum()
    torch.manual_seed(args.seed)
    with device:  # what is made in here lies on it
        vqvae = QUANTIZERS[args.quantizer](obs_dim, action_dim, args.num_codes, args.action_only, args.lr)
        agents = make_agents(obs_dim, action_dim, vqvae, args)
        twins = make_agents(obs_dim, action_dim, vqvae, args, ("saq_online", "spot_online"))  # for the online phase
    if args.normalize_obs:
        vqvae.set_units(data.obs)
    density = {"density": agents["spot"].vae} if args.compare else {}
    memories = {f"{name}_memory": Memory(data, args.online_steps) for name in twins}
    begun = take_quantizer(args, checksum, vqvae)
    run = Run(args, {"quantizer": vqvae, **density, **agents, **twins, **memories}, checksum, begun)
    data = data._replace(obs=vqvae.normalize(data.obs), next_obs=vqvae.normalize(data.next_obs))
    done = run.state["done"]
    if args.eval_only is not None:
        trained = {name: agent for name, agent in (agents | twins).items() if name in done}
        if not (trained and task.env):
            raise UserError(f"{run.folder} holds no trained policy yet, or no environment to evaluate it in.")
        report(run, trained, vqvae, task, args.eval_episodes)
        return film(evaluate, trained, vqvae, task, args.video, run.folder)
    if twins.keys() & done.keys() and done["saq_spot"] != args.steps:
        raise UserError("the online phase has begun where the offline one ended: leave steps out.")
    print(f"run: {run.folder}")
    envs = make_eval_envs(task.env.spec, args.eval_episodes) if task.env else None

    # 1. Fit the quantizer on the dataset's states and actions. `updates` is a generator: it waits for run.train to ask.
    options = dict(compile=args.compile, decay=args.vq_decay, revive_every=args.revive_every, noise=args.obs_noise)
    updates = fit(vqvae, data.obs, data.actions, args.vq_steps, args.vq_batch_size, done.get("quantizer", 0), **options)
    run.train("quantizer", updates, args.vq_steps, lambda: codebook_health(vqvae, data.obs, data.actions))
    print(describe_health(codebook_health(vqvae, data.obs, data.actions)))
    write_file(run.folder / "codes.png", plot_codes(vqvae, data.obs, data.actions).savefig)

    # 2. Replace every action by its code, once: the quantizer stays as it is from here on. Fit the twin's model.
    data = data._replace(codes=vqvae.encode_dataset(data.obs, data.actions))
    for name, vae in density.items():
        run.train(name, learn(vae, data, replace(args, steps=args.vae_steps), done.get(name, 0)), args.vae_steps, dict)

    # 3. Learn over the K codes; then the continuous twin, from the same data with the same evaluation. Then go online.
    for name, agent in agents.items():
        evaluation = partial(assess, agent, vqvae, envs, task, data, args)
        run.train(name, learn(agent, data, args, done.get(name, 0)), args.steps, evaluation)
        if envs:
            print(f"{name}: score {np.mean(run.history(f'{name}/score')[1][-5:]):.1f} in its last evaluations")
    facts = dict(go_online(run, agents, twins, memories, vqvae, envs, task, data)) if args.online_steps else {}
    agents |= {name: twins[name] for name in facts}

    # 4. Act, and compare.
    if envs:
        result = report(run, agents, vqvae, task, args.final_episodes) | {"online": facts}
        figure = plot(run, agents, task)
        figure.suptitle(", ".join(f"{name}: regret {found['regret']:.3f}" for name, found in facts.items()))
        write_file(run.folder / "result.json", result)
        write_file(run.folder / "comparison.png", figure.savefig)
        film(evaluate, agents, vqvae, task, args.video, run.folder)


if __name__ == "__main__":
    exit_in_words(main)
