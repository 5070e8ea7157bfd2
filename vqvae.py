"""The state-conditioned action quantizer of SAQ (Luo et al., "Action-Quantized Offline Reinforcement Learning for
Robotic Skill Learning", CoRL 2023, arXiv:2310.11731): a VQ-VAE that turns each action into one of K codes.

    with torch.device("cpu"):                                  # or "cuda", where obs and actions are
        vqvae = ActionVQVAE(obs_dim, action_dim, num_codes=64)
    for step, info in fit(vqvae, obs, actions, steps=20_000):  # obs (N, O), actions (N, A) in [-1, 1], float32
        ...                                                    # log info, save vqvae.state_dict(), ...
    codes = vqvae.encode(obs, actions)                         # (N,)    which code each action became
    actions = vqvae.decode(obs, codes)                         # (N, A)  what a code stands for *in that state*

Sizes, initialisation and loss scales are those of the authors' JAX code, which differs from the paper's equations in
scale; `forward` says where. After the quantizer come its fit, and two things that every script here needs: tasks and
their data, checked, and what makes a training step fast.
"""

import ctypes
import importlib
import importlib.util
import logging
import math
import sys
from typing import NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """nn.Linear in a form that torch.compile makes more of: it merges the bias with the ReLU, and a layer with a single
    output with all around it, where a call of a matrix product would take longer than the product."""

    def forward(self, x):
        product = (x * self.weight).sum(-1, keepdim=True) if self.out_features == 1 else x @ self.weight.T
        return product + self.bias


def mlp(in_dim, out_dim, hidden=(512, 512)):
    """A ReLU network initialised like the authors' Flax networks: LeCun normal (truncated at two standard deviations),
    the last layer uniform with variance 0.01 / fan_in, biases zero."""
    sizes = [in_dim, *hidden, out_dim]
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layer = Linear(fan_in, fan_out)
        std = fan_in**-0.5 / 0.8796  # 0.8796: what truncation leaves of a standard normal's deviation
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    nn.init.uniform_(layer.weight, -((0.03 / fan_in) ** 0.5), (0.03 / fan_in) ** 0.5)
    return nn.Sequential(*layers[:-1])


class ActionVQVAE(nn.Module):
    """Encoder (s, a) -> z, codebook of K vectors e_k, decoder (s, e_k) -> a, and a prior over codes p(k | s), which
    the other networks do not use: it is a by-product, a cloned policy.

    `action_only` is the paper's ablation (Table 3): every network sees zeros in place of the state.
    """

    def __init__(self, obs_dim, action_dim, num_codes=64, code_dim=128, hidden=(512, 512), action_only=False, lr=3e-4):
        super().__init__()
        self.num_codes, self.action_only, self.lr = num_codes, action_only, lr
        self.encoder = mlp(obs_dim + action_dim, code_dim, hidden)
        self.decoder = mlp(obs_dim + code_dim, action_dim, hidden)
        self.prior = mlp(obs_dim, num_codes, hidden)
        # Flax's variance scaling reads fan_in = K off the codebook's shape (K, D), so its scale depends on K, not on D.
        self.codebook = nn.Parameter(torch.empty(num_codes, code_dim).uniform_(-1, 1) * (3 / num_codes) ** 0.5)
        self.optimizer = adam(self.parameters(), lr)

    def embed(self, obs, actions):
        """Encoder outputs z (B, D)."""
        return self.encoder(torch.cat([self.condition(obs), actions], -1))

    def nearest(self, z):
        """Index of the nearest code (B,): argmin_k ||z - e_k||^2, leaving out the ||z||^2 that all codes share."""
        return (self.codebook.square().sum(1) - 2 * z @ self.codebook.T).argmin(-1)

    def encode(self, obs, actions):
        """obs (B, O), actions (B, A) -> codes (B,), int64."""
        return self.nearest(self.embed(obs, actions))

    def decode(self, obs, codes):
        """obs (B, O), codes (B,) -> actions (B, A). The output is linear, so it can leave [-1, 1] a little: clip it."""
        return self.decoder(torch.cat([self.condition(obs), self.codebook[codes]], -1))

    def prior_logits(self, obs):
        """obs (B, O) -> logits (B, K) of p(k | s): which codes the dataset uses in this state."""
        return self.prior(self.condition(obs))

    def condition(self, obs):
        return torch.zeros_like(obs) if self.action_only else obs

    def forward(self, obs, actions):
        """The training loss, Eq. 8 and 11 of the paper at the scales of the authors' code: the reconstruction error is
        summed over action dimensions, the two codebook terms are averaged over the D code dimensions."""
        z = self.embed(obs, actions)  # (B, D)
        codes = self.nearest(z)  # (B,)
        e = F.one_hot(codes, self.num_codes).to(z.dtype) @ self.codebook  # (B, D)
        # Straight-through: the decoder reads e, its gradient goes to z as if nothing had been rounded.
        z_q = z + (e - z).detach()
        reconstruction = self.decoder(torch.cat([self.condition(obs), z_q], -1))  # (B, A)
        reconstruction_loss = (reconstruction - actions).square().sum(-1).mean()
        commitment_loss = (e.detach() - z).square().mean()  # draws encoder outputs to their codes
        codebook_loss = (e - z.detach()).square().mean()  # draws codes to their encoder outputs
        # The prior is a network of its own: trained at the same time, on targets that do not pass gradients back.
        prior_loss = F.cross_entropy(self.prior_logits(obs), codes)
        loss = reconstruction_loss + commitment_loss + codebook_loss + prior_loss
        info = {
            "loss": loss,
            "reconstruction_loss": reconstruction_loss,
            "commitment_loss": commitment_loss,
            "codebook_loss": codebook_loss,
            "prior_loss": prior_loss,
        }
        return loss, info

    def update(self, obs, actions):
        """One gradient step on obs (B, O), actions (B, A)."""
        return minimize(*self(obs, actions), self.optimizer)

    @torch.no_grad()
    def encode_dataset(self, obs, actions, chunk=4096):
        """`encode` for any number of rows, in chunks that fit in memory."""
        return torch.cat([self.encode(*rows) for rows in zip(obs.split(chunk), actions.split(chunk), strict=True)])


# --- The fit and its codebook's health ---


def fit(
    vqvae, obs, actions, steps, batch_size=256, start=0, compile=False, decay=True, revive_every=100, kmeans_init=False
):
    """Trains `vqvae` on obs (N, O), actions (N, A) from step `start` to `steps`. A generator: it yields (step, info)
    after each step, for the caller to log, save or stop.

    decay: let the learning rate fall to 0, so that the codes come to rest; False for the paper's constant one.
    revive_every: move dead codes to encoder outputs every so many of the first 90% of the steps; 0 for the plain fit.
    kmeans_init: start the codebook at the k-means centres of encoder outputs instead of at random.
    """

    def sample(size):
        rows = torch.randint(len(obs), (size,), device=obs.device)
        return obs[rows], actions[rows]

    if kmeans_init and start == 0:
        init_codebook(vqvae, *sample(4096))
    update = accelerate(lambda: vqvae.update(*sample(batch_size)), obs.device, compile)
    for step in range(start + 1, steps + 1):
        if decay:
            decay_lr(vqvae.optimizer, vqvae.lr, step, steps)
        info = update()
        if revive_every and step % revive_every == 0 and step <= 0.9 * steps:
            revive_dead_codes(vqvae, *sample(4096))
        yield step, info


@torch.no_grad()
def revive_dead_codes(vqvae, obs, actions):
    """Moves every code that none of obs (B, O), actions (B, A) chose onto the encoder output of a random one of them.
    A code far from all encoder outputs gets no gradient and would stay dead for good. Returns how many were moved."""
    z = vqvae.embed(obs, actions)  # (B, D)
    dead = torch.bincount(vqvae.nearest(z), minlength=vqvae.num_codes) == 0  # (K,)
    rows = torch.randint(len(z), (vqvae.num_codes,), device=z.device)
    vqvae.codebook.copy_(torch.where(dead[:, None], z[rows], vqvae.codebook))
    return int(dead.sum())


@torch.no_grad()
def init_codebook(vqvae, obs, actions, iterations=10):
    """k-means (Lloyd's algorithm) on the encoder outputs of obs (B, O), actions (B, A), from random ones of them."""
    z = vqvae.embed(obs, actions)  # (B, D)
    vqvae.codebook.copy_(z[torch.randint(len(z), (vqvae.num_codes,), device=z.device)])
    for _ in range(iterations):
        members = F.one_hot(vqvae.nearest(z), vqvae.num_codes).to(z.dtype)  # (B, K)
        count = members.sum(0)[:, None]
        vqvae.codebook.copy_(torch.where(count > 0, members.T @ z / count.clamp(min=1), vqvae.codebook))


def describe_health(health):
    """`codebook_health` in words, loud where the codebook is mostly dead."""
    errors = " ".join(f"{value:.4f}" for name, value in health.items() if name.startswith("reconstruction_error_a"))
    words = f"codebook: {health['used']:.0%} of the codes used, perplexity {health['perplexity']:.1f}, "
    words += f"reconstruction error {health['reconstruction_error']:.4f} (by dimension: {errors})"
    if health["used"] < 0.5:
        words += (
            "\nWARNING: MOST CODES ARE DEAD. Revive them (--revive-every 100), start from k-means (--kmeans-init), "
        )
        words += "or ask for fewer (--num-codes)."
    return words


@torch.no_grad()
def codebook_health(vqvae, obs, actions):
    """How well the codes serve obs (N, O), actions (N, A). Returns a dict of floats:

    used: share of the K codes that some action chose.
    perplexity: exp of the entropy of the codes' use; K when all are used alike, 1 when one does all the work.
    reconstruction_error: mean squared error of one action dimension, and ..._a0, ..._a1 for each of them.
    """
    codes = vqvae.encode_dataset(obs, actions)
    error = torch.zeros(actions.shape[1], device=obs.device)
    for o, a, k in zip(obs.split(4096), actions.split(4096), codes.split(4096), strict=True):
        error += (vqvae.decode(o, k) - a).square().sum(0) / len(obs)
    use = torch.bincount(codes, minlength=vqvae.num_codes) / len(codes)  # (K,)
    health = {
        "used": (use > 0).float().mean().item(),
        "perplexity": torch.special.entr(use).sum().exp().item(),
        "reconstruction_error": error.mean().item(),
    }
    return health | {f"reconstruction_error_a{i}": e for i, e in enumerate(error.tolist())}


# --- Tasks and their data ---


class UserError(Exception):
    """Something that the user of a script can mend. The message is one sentence: what is wrong and what to do."""


def one_line(error):
    """What an exception of a library says, without its line breaks and full stop."""
    words = " ".join(str(error).split()).rstrip(".")[:300]
    return f"no {words}" if isinstance(error, KeyError) else words or type(error).__name__


LIMITS = {
    "steps vq_steps num_codes batch_size log_every eval_every eval_episodes final_episodes": (1, math.inf),
    "target_every cql_samples": (1, math.inf),
    "lr weight_decay reward_scale revive_every alpha beta cql_alpha": (0, math.inf),
    "discount average polyak": (0, 1),
    "expectile": (0.001, 0.999),
    "temperature": (1e-6, math.inf),
    "prior_floor": (-math.inf, 0),
    "seed": (0, 2**32 - 1),
}


def check_arguments(args, begun=None):
    """Raises UserError for arguments that cannot be: numbers out of range, a missing device and, where a run has begun
    with arguments `begun`, any change that its checkpoint could not follow."""
    for names, (low, high) in LIMITS.items():
        for name in names.split():
            value = getattr(args, name, low)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} must be between {low:g} and {high:g}, not {value:g}.")
    if getattr(args, "actor_free", False) and args.alpha == 0:
        raise UserError("--actor-free divides by alpha: pass an --alpha above 0.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here: pass --device cpu.")
    if args.track and not args.eval_only and importlib.util.find_spec("wandb") is None:
        raise UserError("--track needs Weights & Biases here: pip install wandb.")
    if args.resume and args.eval_only:
        raise UserError("--resume and --eval-only exclude each other: pass one of them.")
    free = {"act", "eval_episodes", "resume", "eval_only"}
    # Going on with more steps starts the cosine of continuous IQL's policy anew, from where the longer one would be.
    later = {"steps", "track", "compile", "eval_every", "final_episodes", "log_every"}
    free |= {"device", "dataset_path", "track"} if args.eval_only else later
    for name, value in vars(args).items() if begun else ():
        if name not in free and value != (before := getattr(begun, name)):
            raise UserError(f"this run has begun with {name} {before}: leave out --{name.replace('_', '-')}.")


def make_env(name, dataset_path=None):
    """The environment of a task: a D4RL or robomimic name from offline_envs.py, any Gymnasium id, or the id of a Minari
    dataset; None for "none". Its `spec` makes more of them."""
    if name == "none":
        return None
    try:
        importlib.import_module("offline_envs")  # a plugin: registers its names with Gymnasium
        missing = ""
    except ImportError as error:
        missing = f" (offline_envs.py: {error})"
    env_id, kwargs = name.removeprefix("offline_envs:"), {}
    known = gym.registry.get(env_id)
    if known and known.entry_point == "offline_envs:make":  # robomimic's environments are made as a dataset says
        kwargs = {"dataset_path": dataset_path}
    if not known and "/" in name and ":" not in name:
        env_id, kwargs = "minari-v0", {"dataset_id": name}
    try:
        env = gym.make(env_id, **kwargs)
    except Exception as error:  # of Gymnasium, or of whatever the environment needs
        raise UserError(f"{name} cannot be made: {one_line(error)}{missing}.") from error
    box, flat = env.action_space, len(env.observation_space.shape or ()) == 1
    bounded = (
        isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.is_bounded() and (box.low < box.high).all()
    )
    if not (flat and bounded):
        raise UserError(f"{name} must have flat Box spaces for its observations and actions, the latter bounded.")
    return env


def scoring(env, path):
    """The function from returns to scores, and a sentence that says what such a score may be compared with."""
    if env is None:
        return float, "No environment: training runs, evaluation is skipped."
    if not env.has_wrapper_attr("provenance"):
        return float, "The score is the return itself."
    normalized = env.get_wrapper_attr("get_normalized_score")
    return lambda value: 100 * normalized(value), env.get_wrapper_attr("provenance")(path)


class Transitions(NamedTuple):
    """N transitions on the training device. A terminal means "do not bootstrap"; a time limit is no terminal."""

    obs: torch.Tensor  # (N, O)
    actions: torch.Tensor  # (N, A), in [-1, 1]
    rewards: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminals: torch.Tensor  # (N,)
    codes: torch.Tensor  # (N,), int64: what the quantizer made of the actions

    def sample(self, batch_size):
        """A batch of transitions, drawn uniformly with replacement."""
        rows = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return Transitions(*(column[rows] for column in self))


COLUMNS = dict(observations=2, actions=2, rewards=1, terminals=1, timeouts=1, next_observations=2)  # name: dimensions


def load_arrays(path, env):
    """The arrays of D4RL's layout in the .hdf5 or .npz file `path`, or the task's own where it is None. Tasks with a
    dataset of their own read files themselves: robomimic's have another layout."""
    own = env is not None and env.has_wrapper_attr("get_dataset")
    if path is None and not own:
        raise UserError("this task has no dataset of its own: pass --dataset-path.")
    try:
        if own:
            return env.get_wrapper_attr("get_dataset")(path)
        with np.load(path) if path.endswith(".npz") else h5py.File(path) as file:
            return {key: file[key][()] for key in COLUMNS if key in file}
    except Exception as error:  # h5py and numpy raise a dozen types over a missing or damaged file
        raise UserError(f"the dataset {path or 'of this task'} cannot be read: {one_line(error)}.") from None


def check_arrays(arrays, env):
    """The arrays as float32, actions scaled to [-1, 1]. Raises UserError where one is missing, has another shape than
    it should, holds anything but numbers, or does not fit the environment."""
    checked = {}
    for key, dims in COLUMNS.items():
        if key not in arrays and key in ("timeouts", "next_observations"):
            continue
        if key not in arrays:
            raise UserError(f"the dataset has no {key}: D4RL's layout is {', '.join(list(COLUMNS)[:4])}, timeouts.")
        column = np.asarray(arrays[key])
        if column.dtype.kind not in "fiub":
            raise UserError(f"the dataset's {key} are not numbers.")
        column = column.astype(np.float32, copy=False)
        column = column[:, 0] if dims == 1 and column.shape[1:] == (1,) else column
        obs_shape = checked["observations"].shape if checked else column.shape
        misfit = key == "next_observations" and column.shape != obs_shape
        if column.ndim != dims or column.size == 0 or len(column) != obs_shape[0] or misfit:
            raise UserError(f"the dataset's {key} have shape {column.shape}, its observations {obs_shape}.")
        if not (column.min() > -1e10 and column.max() < 1e10):  # no measurement is as large, and NaN is neither
            bad = np.flatnonzero(~(np.abs(column) < 1e10).reshape(len(column), -1).all(1))
            where = f"in {bad.size} rows, the first of them row {bad[0]}"
            raise UserError(f"the dataset's {key} hold NaN, infinity or numbers beyond 1e10 {where}.")
        checked[key] = column
    for key, space in [("observations", env.observation_space), ("actions", env.action_space)] if env else ():
        size = checked[key].shape[1]
        if (size,) != space.shape:
            raise UserError(f"the dataset's {key} have size {size}, those of {env.spec.id} {space.shape[0]}.")
    if env and not (np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)):
        low, high = env.action_space.low.astype(np.float32), env.action_space.high.astype(np.float32)
        checked["actions"] = 2 * (checked["actions"] - low) / (high - low) - 1  # make_eval_envs rescales them back
    return checked


def find_ends(arrays, limit):
    """True (N,) in the last row of each episode. Without timeouts, an episode also ends where the environment's time
    limit (None: it has none) would have struck."""
    terminals = arrays["terminals"] > 0
    if "timeouts" in arrays:
        ends = terminals | (arrays["timeouts"] > 0)
    elif limit:
        rows = np.arange(len(terminals))
        first = np.maximum.accumulate(np.where(np.roll(terminals, 1), rows, 0))  # the row after the last terminal
        ends = terminals | ((rows - first) % limit == limit - 1)
    else:
        ends = terminals.copy()
    if not ends.any():
        raise UserError("the dataset marks no end of an episode: set terminals or timeouts in the last row of each.")
    ends[-1] = True
    return ends


def make_transitions(arrays, env, device):
    """Checks the arrays and turns them into Transitions; returns these and the return (E,) of each episode."""
    returns = arrays.get("returns")  # of tasks whose data pay otherwise than their environment does
    arrays = check_arrays(arrays, env)
    outside = (np.abs(arrays["actions"]) > 1).any(1)
    if outside.any():
        largest = np.abs(arrays["actions"]).max()
        print(f"warning: {outside.sum()} of {len(outside)} actions leave [-1, 1], up to {largest:.3g}: clipped")
    ends = find_ends(arrays, env.spec.max_episode_steps if env else None)
    if returns is None:
        returns = np.add.reduceat(arrays["rewards"], np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1]))

    # The next observation is the next row's, unless the file holds it. Where an episode ends without a terminal, what
    # followed is unknown and the transition is dropped.
    rows = np.flatnonzero(~ends | (arrays["terminals"] > 0) | ("next_observations" in arrays))
    if not rows.size:
        raise UserError("no transition's next observation is known: every row ends an episode. Add next_observations.")

    def column(key, rows):
        return torch.from_numpy(arrays[key].take(rows, 0, mode="clip"))

    obs, actions, rewards = column("observations", rows), column("actions", rows).clamp_(-1, 1), column("rewards", rows)
    shifted = "next_observations" not in arrays
    next_obs = column("observations", rows + 1) if shifted else column("next_observations", rows)
    terminals = column("terminals", rows).gt(0).float()
    columns = obs, actions, rewards, next_obs, terminals, torch.zeros(len(rows), dtype=torch.int64)
    return Transitions(*(column.to(device) for column in columns)), returns


def scale_rewards(rewards, returns, scale, shift):
    """rewards * scale + shift. A scale of 0 stands for IQL's: 1000 / (highest - lowest return of an episode)."""
    if scale == 0:
        if returns.max() == returns.min():
            raise UserError("all episodes have the same return: pass a --reward-scale other than 0.")
        scale = 1000 / (returns.max() - returns.min())
    return scale * rewards + shift


# --- Speed ---


def adam(parameters, lr, weight_decay=0.0):
    """Adam, or AdamW where `weight_decay` is not 0, in the form that is fastest on the parameters' device."""
    parameters = list(parameters)
    lr, on_cuda = torch.tensor(lr, device=parameters[0].device), parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True, capturable=on_cuda)


def minimize(loss, info, *optimizers):
    """One gradient step on `loss` of the optimizers' parameters, and of no others. Returns `info` for logging."""
    info = {name: value.detach() for name, value in info.items()}
    loss.backward(inputs=[p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
    apply_gradients(*optimizers)
    return info


@torch.compiler.disable  # torch.compile ends its graph here: tracing into an optimizer makes the step slower
def apply_gradients(*optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def decay_lr(optimizer, lr, step, steps):
    """Sets the learning rate of step `step` on a cosine from `lr` to 0. In place: a captured CUDA graph sees it too."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def polyak_update(target, network, rate):
    """target <- (1 - rate) target + rate network."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), rate)


def accelerate(update, device, compile=False):
    """Returns a function that does what `update` does, faster. `update` takes nothing and returns a dict of tensors.

    CUDA: a step is hundreds of tiny kernels, so the whole of it, sampling included, is captured in one CUDA graph.
    CPU: `compile` merges everything between the matrix products with torch.compile, backward pass included. That
    needs a C++ compiler; without one it says so and `update` runs as it is.
    """
    if device.type == "cuda":
        return with_cuda_graph(update)
    return with_compile(update) if compile else update


def with_compile(update):
    compiled = None

    def step():
        nonlocal compiled
        try:
            if compiled is None:
                torch._dynamo.config.trace_autograd_ops = True  # loss.backward() joins the graph instead of ending it
                torch._dynamo.config.nested_graph_breaks = True  # so does the sampling that comes before
                torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
                options = {"pattern_matcher": False, "fallback_random": True, "cpp_wrapper": True}
                compiled = torch.compile(update, options=options)
            return compiled()
        except Exception as error:
            if compiled is update:
                raise
            print(f"torch.compile failed, training goes on without it. {type(error).__name__}: {error}"[:300])
            compiled = update
            return update()

    return step


def with_cuda_graph(update):
    graph, stream, calls, info = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None

    def step():
        nonlocal calls, info
        calls += 1
        if calls <= 3:  # a few ordinary steps first, on a stream of their own, as CUDA graphs ask for
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                info = update()
            torch.cuda.current_stream().wait_stream(stream)
            return info
        if calls == 4:
            with torch.cuda.graph(graph):
                info = update()
        graph.replay()
        return info

    return step


def tune_cpu():
    """Two settings that make a step on the CPU up to twice as fast; results change by float32 rounding at most.

    oneDNN runs float32 matrix products, on AMD processors about twice as fast as MKL. "medium" also permits bfloat16,
    which processors with AMX then use; so the precision is tried out and the setting taken back where it is not enough.
    glibc keeps freed memory instead of giving every large tensor back to the system and faulting it in page by page."""
    x = torch.rand(256, 256)
    torch.set_float32_matmul_precision("medium")
    if (x @ x - x.double() @ x.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision("highest")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
