"""FQL and IFQL: offline RL with a flow that imitates the dataset, whatever shape its actions have.

Where demonstrators go left or right, a Gaussian policy goes through the middle. A flow does not: it carries noise z to
actions, along a velocity v(s, x, t) that is learned by regression on straight lines from noise to the data's actions:

    ||v(s, x_t, t) - (a - z)||^2,     x_t = (1 - t) z + t a,     z ~ N(0, 1), t uniform in [0, 1]

where ||.||^2 is the mean over the action's dimensions. Following v in ten Euler steps from t = 0 to 1 draws an action
as the dataset would. Two agents act on it:

    FQL    distils the flow into a policy mu(s, z) of one step, which is paid for Q as well (Park, Li and Levine, "Flow
           Q-Learning", ICML 2025, arXiv:2502.02538):     alpha ||mu(s, z) - flow(s, z)||^2 - Q(s, mu(s, z)) / mean |Q|
           (--no-normalize-q: Q as it is)
    IFQL   trains IQL's V and Q beside the flow, and acts by the best of 32 of its actions, as `saq_iql.py --best-of`
           does over codes

FQL is what papers of 2025 compare themselves with. It compares mu(s, z) with the flow's action of the same z, so that
every z may keep a way of its own; rebrac.py has one action in each state.

    python baselines/fql.py                                             # three maze demonstrations
    python baselines/fql.py --env Pendulum-v1 --dataset-path mine.npz   # your own data in D4RL's layout

Explained in docs/baselines.md. Needs vqvae.py, for the data and what runs a script, and, for benchmark names,
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
from vqvae import Linear, adamw, decay_lr, minimize, polyak_update  # the method; the rest runs it
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
    steps: int = 70_000  # gradient steps of each agent (the authors: 500_000; OGBench: 1_000_000)
    batch_size: int = 256  # transitions that each of them sees
    lr: float = 3e-4  # learning rate of every network
    decay: bool = True  # let the learning rates of agents fall to 0 along a cosine (the authors: constant)
    discount: float = 0.99  # gamma
    reward_scale: float = 1.0  # multiplies rewards in training; 0: 1000 / (highest - lowest return), as IQL does
    reward_shift: float = 0.0  # added after that; scores do not change
    polyak: float = 0.005  # rate at which target networks follow
    width: int = 256  # of hidden layers (the authors: 512)
    layers: int = 2  # hidden layers of every network (the authors: 4; a step of 4x512 takes ten times as long)
    flow_steps: int = 10  # Euler steps from noise to an action
    # --- FQL ---
    alpha: float = 3.0  # weight of the distance from the flow, averaged over the action's dimensions
    normalize_q: bool = True  # divide Q by its mean size, so that alpha does not depend on the rewards
    pessimistic: bool = False  # the target takes the lower critic, not the mean of both
    # --- IFQL ---
    expectile: float = 0.9  # tau: V(s) is this expectile of Q(s, a) over the dataset's actions
    candidates: int = 32  # actions of the flow among which the best one acts


# A task's row is the longest that its name begins with; a flag wins. The authors' for adroit, antmaze and OGBench,
# which do not divide Q; for the rest they advise to divide it and to try alpha from 0.03 to 10.
ADROIT = dict(alpha=30_000.0, normalize_q=False, pessimistic=True)
ANTMAZE = dict(normalize_q=False, reward_shift=-1.0, eval_episodes=100)
OGBENCH = dict(normalize_q=False, eval_episodes=50)
HPARAMS = {
    "maze2d-large-demos-": dict(alpha=10.0, steps=10_000, eval_every=500),
    "antmaze-": dict(ANTMAZE, alpha=10.0),
    "antmaze-large-": dict(ANTMAZE, alpha=3.0),
    "door- hammer- relocate-": ADROIT,
    "hammer-cloned- relocate-human- pen-human- pen-cloned-": ADROIT | dict(alpha=10_000.0),
    "pen-expert-": ADROIT | dict(alpha=3_000.0),
    "lift- can- square- tool- transport- ogbench:": dict(eval_episodes=50),
    "ogbench:cube- ogbench:scene-": dict(OGBENCH, alpha=300.0),
    "ogbench:puzzle-": dict(OGBENCH, alpha=1_000.0),
    "ogbench:antmaze-": dict(OGBENCH, alpha=10.0, pessimistic=True),
    "ogbench:antmaze-giant-": dict(OGBENCH, alpha=10.0, pessimistic=True, discount=0.995),
    "ogbench:antsoccer-": dict(OGBENCH, alpha=10.0, discount=0.995),
    "ogbench:humanoidmaze-": dict(OGBENCH, alpha=30.0, discount=0.995),
}


# --- The flow ---


def network(in_dim, out_dim, args, layer_norm=False):
    """args.layers hidden layers of args.width with GELU, followed by LayerNorm if asked for; initialised by PyTorch's
    defaults (the authors: Xavier's uniform weights, biases of 0)."""
    modules = []
    for fan_in in [in_dim, *[args.width] * (args.layers - 1)]:
        layer = Linear(fan_in, args.width)
        layer.between = bool(modules)  # two hidden layers: in bfloat16, where it is asked for
        modules += [layer, nn.GELU()] + ([nn.LayerNorm(args.width)] if layer_norm else [])
    return nn.Sequential(*modules, Linear(args.width, out_dim))


class Flow(nn.Module):
    """A velocity v(s, x, t) that carries noise to the dataset's actions."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.steps = args.flow_steps
        self.net = network(obs_dim + action_dim + 1, action_dim, args)

    def velocity(self, obs, x, t):
        """obs (B, O), x (B, A), t (B, 1) -> (B, A)."""
        return self.net(torch.cat([obs, x, t], 1))

    def loss(self, obs, actions):
        """Regression on the straight line from a draw of noise to the data's action."""
        z, t = torch.randn_like(actions), torch.rand(len(actions), 1, device=actions.device)
        return (self.velocity(obs, (1 - t) * z + t * actions, t) - (actions - z)).square().mean()

    @torch.no_grad()
    def follow(self, obs, z):
        """obs (B, O), noise z (B, A) -> actions (B, A) in [-1, 1], in Euler steps."""
        for i in range(self.steps):
            z = z + self.velocity(obs, z, z.new_full((len(z), 1), i / self.steps)) / self.steps
        return z.clamp(-1, 1)


class Critics(nn.Module):
    """Two Q networks with LayerNorm."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.nets = nn.ModuleList([network(obs_dim + action_dim, 1, args, layer_norm=True) for _ in range(2)])

    def forward(self, obs, actions):
        """obs (B, O), actions (B, A) -> (2, B)."""
        return torch.stack([net(torch.cat([obs, actions], 1))[:, 0] for net in self.nets])


# --- FQL ---


class FQL(nn.Module):
    """Two critics, the flow, and a policy of one step, mu(s, z), which comes near the flow's action for the same noise.

    A training loop calls `update(batch)` and nothing else; `act(obs)` is the policy, which draws its noise anew.
    Read of `args`: lr, discount, polyak, width, layers, flow_steps, alpha, normalize_q, pessimistic."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.flow = Flow(obs_dim, action_dim, args)
        self.actor = network(obs_dim + action_dim, action_dim, args)
        self.qf = Critics(obs_dim, action_dim, args)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.optimizer = adamw([*self.flow.parameters(), *self.actor.parameters()], args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)

    def noise(self, obs):
        return torch.randn(len(obs), self.action_dim, device=obs.device)

    def qf_loss(self, batch):
        with torch.no_grad():
            next_actions = self.policy(batch.next_obs, self.noise(batch.next_obs)).clamp(-1, 1)
            next_q = self.qf_target(batch.next_obs, next_actions)  # (2, B)
            next_q = next_q.amin(0) if self.args.pessimistic else next_q.mean(0)
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_q
        q = self.qf(batch.obs, batch.actions)
        qf_loss = (q - td_target).square().mean()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q.mean()}

    def policy(self, obs, z):
        """mu(s, z): obs (B, O), z (B, A) -> (B, A)."""
        return self.actor(torch.cat([obs, z], 1))

    def actor_loss(self, batch):
        """The flow's regression, and the policy's price: its distance from the flow for the same noise, less Q."""
        flow_loss = self.flow.loss(batch.obs, batch.actions)
        z = self.noise(batch.obs)
        actions = self.policy(batch.obs, z)
        distance = (actions - self.flow.follow(batch.obs, z)).square().mean()
        q = self.qf(batch.obs, actions.clamp(-1, 1)).mean(0)
        size = q.abs().mean().detach() if self.args.normalize_q else 1.0
        loss = flow_loss + self.args.alpha * distance - q.mean() / size
        return loss, {"flow_loss": flow_loss}

    def update(self, batch):
        """A gradient step of all networks, from what they were before; the targets follow. Returns what to log."""
        qf_loss, info = self.qf_loss(batch)
        actor_loss, more = self.actor_loss(batch)
        polyak_update(self.qf_target, self.qf, self.args.polyak)  # toward the critics of before the step, as theirs
        # The policy first: its gradient passes through the critics, and fused Adam changes weights unseen by autograd.
        more = minimize(actor_loss, more, self.optimizer)
        return minimize(qf_loss, info, self.qf_optimizer) | more

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A), of one draw of noise in each state."""
        return self.policy(obs, self.noise(obs)).clamp(-1, 1)

    @torch.no_grad()
    def diagnose(self, batch):
        """How far the policy has gone from the flow, for the figure."""
        z = self.noise(batch.obs)
        return {"distance": (self.policy(batch.obs, z) - self.flow.follow(batch.obs, z)).square().mean()}


# --- IFQL ---


class IFQL(nn.Module):
    """IQL's V and Q over the dataset's actions, and the flow; the best of the flow's actions acts.

    Its protocol is FQL's. Read of `args`: lr, discount, polyak, width, layers, flow_steps, expectile, candidates."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.flow = Flow(obs_dim, action_dim, args)
        self.vf = network(obs_dim, 1, args, layer_norm=True)
        self.qf = Critics(obs_dim, action_dim, args)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.flow_optimizer = adamw(self.flow.parameters(), args.lr)
        self.vf_optimizer = adamw(self.vf.parameters(), args.lr)
        self.qf_optimizer = adamw(self.qf.parameters(), args.lr)

    def v_loss(self, batch):
        """V leans toward the data's better actions: squares, weighted tau where Q exceeds V and 1 - tau elsewhere."""
        with torch.no_grad():
            q = self.qf_target(batch.obs, batch.actions).amin(0)
        adv = q - self.vf(batch.obs)[:, 0]
        v_loss = (torch.where(adv < 0, 1 - self.args.expectile, self.args.expectile) * adv.square()).mean()
        return v_loss, {"v_loss": v_loss}

    def qf_loss(self, batch):
        with torch.no_grad():
            next_v = self.vf(batch.next_obs)[:, 0]
            td_target = batch.rewards + self.args.discount * (1 - batch.terminals) * next_v
        q = self.qf(batch.obs, batch.actions)
        qf_loss = (q - td_target).square().mean()
        return qf_loss, {"qf_loss": qf_loss, "q_data": q.mean()}

    def update(self, batch):
        """A gradient step of V, Q and the flow, from what they were before; the targets follow. Returns what to log."""
        flow_loss = self.flow.loss(batch.obs, batch.actions)
        info = minimize(flow_loss, {"flow_loss": flow_loss}, self.flow_optimizer)
        v_loss, qf_loss = self.v_loss(batch), self.qf_loss(batch)
        polyak_update(self.qf_target, self.qf, self.args.polyak)  # toward the critics of before the step, as theirs
        return minimize(*v_loss, self.vf_optimizer) | minimize(*qf_loss, self.qf_optimizer) | info

    @torch.no_grad()
    def act(self, obs):
        """obs (B, O) -> actions (B, A): of several draws of the flow, the one of the highest Q."""
        n = self.args.candidates
        rows = obs.repeat_interleave(n, 0)  # (B n, O)
        actions = self.flow.follow(rows, torch.randn(len(rows), self.action_dim, device=obs.device))
        best = self.qf(rows, actions).amin(0).view(-1, n).argmax(1)  # (B,)
        return actions.view(-1, n, self.action_dim)[torch.arange(len(obs), device=obs.device), best]

    @torch.no_grad()
    def diagnose(self, batch):
        """The squared distance between what acts and what the data did, for the figure."""
        return {"distance": (self.act(batch.obs) - batch.actions).square().mean()}


def make_agents(obs_dim, action_dim, args):
    """What this script trains, in this order, by the names that stand in tables and logs."""
    agents = {"fql": FQL(obs_dim, action_dim, args)}
    return agents | ({"ifql": IFQL(obs_dim, action_dim, args)} if args.compare else {})


# --- One run: arguments, evaluation, logging, checkpoints. The method ends above. ---

SCRIPT, OWN_STEPS = Path(__file__).stem, set()  # and the phases with a number of steps of their own
PLAIN = dict(decay=False, normalize_obs=False, width=512, layers=4)
# What a command line may change when the policies of a run are evaluated, and when it goes on.
FREE = {"device", "dataset_path", "eval_episodes", "video", "resume", "eval_only"}
FREE_TO_EVALUATE = FREE | {"candidates"}
FREE_TO_RESUME = FREE | {"steps", "track", "compile", "log_every", "eval_every", "final_episodes"}


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
DIAGNOSIS = "squared distance, from the flow or the data"
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
