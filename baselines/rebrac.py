"""ReBRAC, and TD3+BC as the preset of it that it grew from: offline RL by a penalty on the distance from the data.

TD3 learns two critics and a deterministic policy. On a fixed dataset the policy drifts to actions whose Q is too high
by mistake. TD3+BC (Fujimoto and Gu, NeurIPS 2021, arXiv:2106.06860) pays it to stay at the dataset's action a:

    policy:   -Q(s, pi(s)) / mean |Q| + beta_1 ||pi(s) - a||^2

ReBRAC (Tarasov et al., NeurIPS 2023, arXiv:2305.09836) puts the same into the critics' target, where a' is the action
that the dataset took in s', and gives the critics LayerNorm and everything a third layer:

    target:   r + gamma (min_i Q_i(s', pi(s') + noise) - beta_2 ||pi(s') + noise - a'||^2)

It is the strongest simple agent over continuous actions. What the squared distance says: where the data do two things,
their mean is the nearest policy to both, though nobody did it. An agent over codes, or fql.py, keeps the two apart.

    python baselines/rebrac.py                                             # three maze demonstrations
    python baselines/rebrac.py --env hopper-medium-v2                      # a D4RL name; downloads the dataset once
    python baselines/rebrac.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Explained in docs/baselines.md. Needs vqvae.py, for the data and what runs a script, and, but for Gymnasium's own names,
offline_envs/.
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
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

# isort: off
sys.path.append(str(Path(__file__).resolve().parents[1]))  # vqvae.py lies there, or beside a copy of this file
from vqvae import Linear, adamw, decay_lr, minimize, polyak_update, with_noise  # the method; the rest runs it
from vqvae import Quantizer, UserError, accelerate, check_numbers, check_unchanged, exit_in_words, film
from vqvae import load_task, lock, make_eval_envs, prepare, read_checkpoint, tracker, write_checkpoint, write_file


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
    # --- Every agent ---
    steps: int = 70_000  # gradient steps of each agent (the authors: 1_000_000)
    batch_size: int = 256  # transitions that each of them sees (the authors: 1_024 for locomotion)
    lr: float = 3e-4  # learning rate of every network (ReBRAC's authors: 1e-3 for locomotion)
    decay: bool = True  # let the learning rates of agents fall to 0 along a cosine (the authors: constant)
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # added after that; scores do not change
    polyak: float = 0.005  # rate at which target networks follow, in every second step
    noise: float = 0.2  # standard deviation of what is added to the target policy's action, clipped at 0.5
    # --- ReBRAC ---
    actor_beta: float = 0.01  # beta_1: weight of the distance in the policy, summed over the action's dimensions
    critic_beta: float = 0.01  # beta_2: its weight in the target
    layer_norm: bool = True  # LayerNorm after the hidden layers of the critics
    layers: int = 3  # hidden layers of 256 in every network of ReBRAC
    # --- TD3+BC ---
    alpha: float = 2.5  # weight of Q beside the mean squared distance: beta_1 is 1 / (alpha A)


ANTMAZE = dict(discount=0.999, reward_scale=100.0, eval_episodes=100)


# A task's row is the longest that its name begins with; a flag wins. Betas are the authors', for OGBench those that
# FQL's gave ReBRAC, and ours for the demonstrations. They are for a million steps: for a hundredth, ten times beta_1.
HPARAMS = {
    "maze2d-large-demos-": dict(actor_beta=0.3, critic_beta=0.0, steps=10_000, eval_every=500),
    "hopper-random-": dict(actor_beta=0.001, critic_beta=0.01),
    "hopper-medium-": dict(actor_beta=0.01, critic_beta=0.01),
    "hopper-medium-replay-": dict(actor_beta=0.05, critic_beta=0.5),
    "hopper-medium-expert-": dict(actor_beta=0.1, critic_beta=0.01),
    "hopper-expert-": dict(actor_beta=0.1, critic_beta=0.1),
    "halfcheetah-random- halfcheetah-full-replay-": dict(actor_beta=0.001, critic_beta=0.1),
    "halfcheetah-medium-": dict(actor_beta=0.001, critic_beta=0.01),
    "halfcheetah-medium-replay-": dict(actor_beta=0.01, critic_beta=0.001),
    "halfcheetah-medium-expert-": dict(actor_beta=0.01, critic_beta=0.1),
    "halfcheetah-expert-": dict(actor_beta=0.01, critic_beta=0.01),
    "walker2d-random-": dict(actor_beta=0.01, critic_beta=0.0),
    "walker2d-medium-": dict(actor_beta=0.05, critic_beta=0.1),
    "walker2d-medium-replay-": dict(actor_beta=0.05, critic_beta=0.01),
    "walker2d-medium-expert-": dict(actor_beta=0.01, critic_beta=0.01),
    "walker2d-expert-": dict(actor_beta=0.01, critic_beta=0.5),
    "maze2d-": dict(actor_beta=0.003, critic_beta=0.001, eval_episodes=100),
    "antmaze-": ANTMAZE,
    "antmaze-umaze-": dict(ANTMAZE, actor_beta=0.003, critic_beta=0.002),
    "antmaze-umaze-diverse-": dict(ANTMAZE, actor_beta=0.003, critic_beta=0.001),
    "antmaze-medium-play-": dict(ANTMAZE, actor_beta=0.001, critic_beta=0.0005),
    "antmaze-medium-diverse-": dict(ANTMAZE, actor_beta=0.001, critic_beta=0.0),
    "antmaze-large-play-": dict(ANTMAZE, actor_beta=0.002, critic_beta=0.001),
    "antmaze-large-diverse-": dict(ANTMAZE, actor_beta=0.002, critic_beta=0.002),
    "pen-human-": dict(actor_beta=0.1, critic_beta=0.5),
    "pen-cloned-": dict(actor_beta=0.05, critic_beta=0.5),
    "pen-expert- hammer-expert-": dict(actor_beta=0.01, critic_beta=0.01),
    "door-human-": dict(actor_beta=0.1, critic_beta=0.1),
    "door-cloned-": dict(actor_beta=0.01, critic_beta=0.1),
    "door-expert- relocate-expert-": dict(actor_beta=0.05, critic_beta=0.01),
    "hammer-human-": dict(actor_beta=0.01, critic_beta=0.5),
    "hammer-cloned-": dict(actor_beta=0.1, critic_beta=0.5),
    "relocate-human- relocate-cloned-": dict(actor_beta=0.1, critic_beta=0.01),
    "lift- can- square- tool- transport- ogbench:": dict(eval_episodes=50),
    "ogbench:antmaze-": dict(actor_beta=0.003, critic_beta=0.01, eval_episodes=50),
    "ogbench:antmaze-giant-": dict(actor_beta=0.003, critic_beta=0.01, discount=0.995, eval_episodes=50),
    "ogbench:humanoidmaze- ogbench:antsoccer-": dict(discount=0.995, eval_episodes=50),
    "ogbench:cube-": dict(actor_beta=0.1, critic_beta=0.0, eval_episodes=50),
    "ogbench:cube-single-": dict(actor_beta=1.0, critic_beta=0.0, eval_episodes=50),
    "ogbench:puzzle-": dict(actor_beta=0.3, critic_beta=0.01, eval_episodes=50),
    "ogbench:scene-": dict(actor_beta=0.1, critic_beta=0.01, eval_episodes=50),
}


# --- ReBRAC ---


class Sarsa(NamedTuple):
    """Transitions with the dataset's next action, s, a, r, s', a', which ReBRAC's critics ask for."""

    obs: torch.Tensor  # (N, O)
    actions: torch.Tensor  # (N, A), in [-1, 1]
    rewards: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminals: torch.Tensor  # (N,)
    next_actions: torch.Tensor  # (N, A); of a terminal transition: anything, it is multiplied by 0

    def sample(self, batch_size, noise=0.0):
        """A batch of transitions, drawn uniformly with replacement. noise: see `vqvae.with_noise`."""
        rows = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return with_noise(Sarsa(*(column[rows] for column in self)), noise)


def with_next_actions(data):
    """Transitions -> Sarsa. The next action is the next row's, where the next row is what followed; where it is not (a
    time limit) and nothing ended, it is unknown, and the transition is left out. Raises UserError where most are."""
    follows = (data.next_obs[:-1] == data.obs[1:]).all(1)
    follows, ends = torch.cat([follows, follows.new_zeros(1)]), data.terminals > 0
    if (follows & ~ends).sum() < (~ends).sum() / 2:
        raise UserError("most next actions are unknown: rows must stand in the order in which they happened.")
    known = follows | ends
    next_actions = data.actions.roll(-1, 0)
    return Sarsa(*(column[known] for column in (*data[:5], next_actions)))


def network(in_dim, out_dim, layers, layer_norm, bound):
    """Hidden layers of 256 with ReLU, each followed by LayerNorm if asked for; weights within +-`bound` at the end, so
    that outputs begin near 0 (the authors'; the rest is PyTorch's default, with biases of 0.1)."""
    modules = []
    for fan_in in [in_dim, *[256] * (layers - 1)]:
        layer = Linear(fan_in, 256)
        layer.between = bool(modules)  # two hidden layers: in bfloat16, where it is asked for
        nn.init.constant_(layer.bias, 0.1)
        modules += [layer, nn.ReLU()] + ([nn.LayerNorm(256)] if layer_norm else [])
    last = Linear(256, out_dim)
    nn.init.uniform_(last.weight, -bound, bound)
    nn.init.uniform_(last.bias, -bound, bound)
    return nn.Sequential(*modules, last)


class ReBRAC(nn.Module):
    """TD3 with a penalty on the squared distance from the dataset's actions, in the policy and in the target.

    A training loop calls `update(batch)` and nothing else, a batch of Sarsa; `act(obs)` is the policy. beta_1, beta_2:
    weights of the distance, summed over the action's dimensions. pessimistic: the policy raises the lower of both
    critics, as ReBRAC's does, not the first, as TD3+BC's. Read of `args`: lr, discount, polyak, noise."""

    def __init__(self, obs_dim, action_dim, args, beta_1, beta_2, layers, layer_norm, pessimistic):
        super().__init__()
        self.args, self.beta_1, self.beta_2, self.pessimistic = args, beta_1, beta_2, pessimistic
        self.actor = network(obs_dim, action_dim, layers, False, 1e-3)
        critics = [network(obs_dim + action_dim, 1, layers, layer_norm, 3e-3) for _ in range(2)]
        self.qf = nn.ModuleList(critics)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))  # updates so far; CUDA graphs need a tensor
        self.actor_optimizer = adamw(self.actor.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)

    def q_values(self, qf, obs, actions):
        """obs (B, O), actions (B, A) -> (2, B), of both critics."""
        obs_actions = torch.cat([obs, actions], 1)
        return torch.stack([critic(obs_actions)[:, 0] for critic in qf])

    def td_target(self, batch, noise):
        """y (B,). Where the target policy, with some noise, leaves what the dataset did next, it pays."""
        next_actions = (self.actor_target(batch.next_obs).tanh() + noise).clamp(-1, 1)
        distance = (next_actions - batch.next_actions).square().sum(1)
        next_q = self.q_values(self.qf_target, batch.next_obs, next_actions).amin(0) - self.beta_2 * distance
        return batch.rewards + self.args.discount * (1 - batch.terminals) * next_q

    def qf_loss(self, batch):
        with torch.no_grad():
            noise = (self.args.noise * torch.randn_like(batch.actions)).clamp(-0.5, 0.5)
            td_target = self.td_target(batch, noise)
        q = self.q_values(self.qf, batch.obs, batch.actions)
        qf_loss = (q - td_target).square().mean(1).sum()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q.mean()}

    def actor_loss(self, batch):
        """-Q / mean |Q| + beta_1 ||pi(s) - a||^2. Divided so, Q has the size of the distance in every task."""
        actions = self.actor(batch.obs).tanh()
        q = self.q_values(self.qf, batch.obs, actions)
        q = q.amin(0) if self.pessimistic else q[0]
        distance = (actions - batch.actions).square().sum(1)
        actor_loss = (self.beta_1 * distance - q / q.abs().mean().detach()).mean()
        return actor_loss, {"actor_loss": actor_loss}

    def update(self, batch):
        """A gradient step of the critics, in every second update one of the policy, after which all targets follow.
        Returns what to log."""
        self.step += 1
        info = minimize(*self.qf_loss(batch), self.qf_optimizer)
        delayed = (self.step % 2 == 0).float()
        # The policy's loss is computed in every update, since a CUDA graph has no branches. In every other one fused
        # Adam leaves out the step (found_inf, its switch for overflow in mixed precision), and targets follow by 0.
        self.actor_optimizer.found_inf = 1 - delayed
        polyak_update(self.actor_target, self.actor, self.args.polyak * delayed)  # the policy of before, as ReBRAC's
        info |= minimize(*self.actor_loss(batch), self.actor_optimizer)
        polyak_update(self.qf_target, self.qf, self.args.polyak * delayed)
        return info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A)."""
        return self.actor(obs).tanh()

    @torch.no_grad()
    def diagnose(self, batch):
        """The distance from the data's actions that both penalties weigh, for the figure."""
        return {"distance": (self.act(batch.obs) - batch.actions).square().sum(1).mean()}


def make_agents(obs_dim, action_dim, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    betas = dict(beta_1=args.actor_beta, beta_2=args.critic_beta)
    rebrac = ReBRAC(
        obs_dim, action_dim, args, **betas, layers=args.layers, layer_norm=args.layer_norm, pessimistic=True
    )
    if not args.compare:
        return {"rebrac": rebrac}
    if args.alpha == 0:
        raise UserError("td3_bc divides by alpha: pass an alpha above 0, or --no-compare, which leaves td3_bc out.")
    # TD3+BC averages the distance over dimensions and weighs Q, by alpha.
    beta_1 = 1 / (args.alpha * action_dim)
    td3_bc = ReBRAC(obs_dim, action_dim, args, beta_1, beta_2=0.0, layers=2, layer_norm=False, pessimistic=False)
    return {"rebrac": rebrac, "td3_bc": td3_bc}


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

SCRIPT, OWN_STEPS = Path(__file__).stem, set()  # and the phases with a number of steps of their own
PLAIN = dict(decay=False, normalize_obs=False, lr=1e-3, batch_size=1_024)
# What a command line may change when the policies of a run are evaluated, and when it goes on.
FREE_TO_EVALUATE = {"device", "dataset_path", "eval_episodes", "video", "resume", "eval_only"}
FREE_TO_RESUME = FREE_TO_EVALUATE | {"steps", "track", "compile", "log_every", "eval_every", "final_episodes"}


def defaults(env="maze2d-large-demos-v1", plain=False):
    """The Args of a task. Later ones win: its row of HPARAMS, where it has one, PLAIN."""
    rows = {word: row for words, row in HPARAMS.items() for word in words.split()}
    name = env.split(":")[-1]
    name = f"ogbench:{name}" if "-singletask" in name else name  # its antmaze does not pay as D4RL's does
    words = [word for word in rows if name.startswith(word)]
    row = rows[max(words, key=len)] if words else {}
    return Args(env=env, plain=plain, **row | (PLAIN if plain else {}))


def parse_args():
    """The command line over the defaults of its task or, where a run goes on, over what that run began with."""
    # A first look, for the task or the run; --help waits for their defaults.
    args = tyro.cli(Args, args=[word for word in sys.argv[1:] if word not in ("-h", "--help")])
    if args.resume is not None and args.eval_only is not None:
        raise UserError("--resume and --eval-only exclude each other: pass one of them.")
    folder = args.eval_only if args.resume is None else args.resume
    default, done = defaults(args.env, args.plain), {}
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
DIAGNOSIS = "squared distance from the data"
LINES = {"distance": "-"}


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
        units = Quantizer(obs_dim, 0, False)  # no codes: it keeps the units of observations
        agents = make_agents(obs_dim, action_dim, args)
    if args.normalize_obs:
        units.set_units(data.obs)
    run = Run(args, {"units": units, **agents}, checksum, {})
    data = data._replace(obs=units.normalize(data.obs), next_obs=units.normalize(data.next_obs))
    transitions, data = len(data.obs), with_next_actions(data)
    print(f"next actions are known in {len(data.obs)} of {transitions} transitions; the others are left out")
    done = run.state["done"]
    if args.eval_only is not None:
        trained = {name: agent for name, agent in agents.items() if name in done}
        if not (trained and task.env):
            raise UserError(f"{run.folder} holds no trained policy yet, or no environment to evaluate it in.")
        report(run, trained, units, task, args.eval_episodes)
        return film(evaluate, trained, units, task, args.video, run.folder)
    print(f"run: {run.folder}")
    envs = make_eval_envs(task.env.spec, args.eval_episodes) if task.env else None

    # 1. Learn, each agent from the same data with the same evaluation.
    for name, agent in agents.items():
        evaluation = partial(assess, agent, units, envs, task, data, args)
        run.train(name, learn(agent, data, args, done.get(name, 0)), args.steps, evaluation)
        if envs:
            print(f"{name}: score {np.mean(run.history(f'{name}/score')[1][-5:]):.1f} in its last evaluations")

    # 2. Act, and compare.
    if envs:
        write_file(run.folder / "result.json", report(run, agents, units, task, args.final_episodes))
        write_file(run.folder / "comparison.png", plot(run, agents, task).savefig)
        film(evaluate, agents, units, task, args.video, run.folder)


if __name__ == "__main__":
    exit_in_words(main)
