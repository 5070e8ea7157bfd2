"""The action quantizer of SAQ: a state-conditioned VQ-VAE, which turns each action of a dataset into one of K codes.

Over continuous actions, what conservative offline RL needs (a sum over all actions, the distance between two policies)
can only be estimated. But in any one state a robot's dataset does only a few things. If K codes can stand for them,
"all actions" are K actions, and every such quantity is a sum of K terms.

A VQ-VAE (van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017,
arXiv:1711.00937) is an autoencoder whose bottleneck can take only K values, the vectors e_1 .. e_K of a codebook:

    z = encoder(s, a)              k = argmin_j ||z - e_j||^2              a' = decoder(s, e_k)

    loss = ||a' - a||^2 + ||stop(e_k) - z||^2 / D + ||e_k - stop(z)||^2 / D    (Eq. 8 and 11; stop: without gradient)

Beside it a prior learns to name the code from the state, by - log p(k | s). Luo et al. ("Action-Quantized Offline
Reinforcement Learning for Robotic Skill Learning", CoRL 2023, arXiv:2310.11731) show the state s to encoder and
decoder, so that one code means different actions in different states.

    with torch.device("cpu"):                                  # or "cuda": where it will train, with its optimizer
        vqvae = ActionVQVAE(obs_dim, action_dim, num_codes=64)
    for step, info in fit(vqvae, obs, actions, steps=20_000):  # obs (N, O), actions (N, A) in [-1, 1], float32
        ...                                                    # log info, save vqvae.state_dict(), ...
    codes = vqvae.encode_dataset(obs, actions)                 # (N,)    which code each action became
    actions = vqvae.decode(obs[:256], codes[:256])             # (256, A)  what a code stands for *in that state*

`Mixture` and `Aquadem`, with the same interface, have no encoder: they predict K candidate actions from the state.

In four parts: 1 the quantizers and their fit, 2 what makes a training step fast, 3 a user's data and files, checked, 4
learning online (baselines/spot.py).
Sizes, initialisation and the scales of the losses are those of the authors' JAX code; the paper's equations have no
1 / D, D being the length of z. Importing it takes PyTorch and NumPy; what else a function needs, it imports itself.
"""

import atexit
import copy
import ctypes
import importlib
import io
import json
import logging
import math
import os
import queue
import shlex
import sys
import threading
import time
import zipfile
import zlib
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# === 1. The quantizers ===


class Quantizer(nn.Module):
    """What all quantizers share: size, units of observations, training step, acting. A subclass adds `forward` (the
    loss), `encode`, `decode`, `candidates` (what all codes stand for), `prior_logits`, and sets `self.optimizer`.

    obs_dim: O. num_codes: K. action_only: the paper's ablation (Table 3), in which the quantizer's networks see zeros
    in place of the state."""

    def __init__(self, obs_dim, num_codes, action_only):
        super().__init__()
        self.num_codes, self.action_only = num_codes, action_only
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def condition(self, obs):
        return torch.zeros_like(obs) if self.action_only else obs

    def update(self, obs, actions):
        """One gradient step on obs (B, O), actions (B, A); returns what to log."""
        return minimize(*self(obs, actions), self.optimizer)

    def act(self, obs, logits, how, support=0.0):
        """What a policy over codes, the softmax of logits (B, K), does in obs (B, O): actions (B, A) in [-1, 1].

        how: "greedy", its likeliest code, decoded; "sample", one that it draws; "mean", its expected action, an exact
        sum over the codes: right where actions are one intention plus noise, wrong between two intentions.
        support: leaves out unlikely codes; see `supported`."""
        logits = self.supported(obs, logits, support)
        if how == "mean":
            return (logits.softmax(1)[..., None] * self.candidates(obs)).sum(1).clamp(-1, 1)
        if how not in ("greedy", "sample"):
            raise ValueError(f'a policy acts "greedy", by "sample" or by "mean", not {how!r}')
        codes = logits.argmax(1) if how == "greedy" else logits.softmax(1).multinomial(1)[:, 0]  # (B,)
        return self.decode(obs, codes).clamp(-1, 1)

    def supported(self, obs, logits, support):
        """logits (B, K), at -inf for codes to which the prior gives less than `support` times its likeliest one's
        probability, as in discrete BCQ (Fujimoto et al. 2019, arXiv:1910.01708): no data bear out what Q says there."""
        if support == 0:
            return logits
        prior = self.prior_logits(obs)
        return logits.masked_fill(prior < prior.amax(1, keepdim=True) + math.log(support), -math.inf)

    @torch.no_grad()
    def encode_dataset(self, obs, actions, chunk=4096):
        """`encode` for any number of rows, in chunks that fit in memory."""
        codes = [self.encode(o, a) for o, a in zip(obs.split(chunk), actions.split(chunk), strict=True)]
        return torch.cat(codes)

    def set_units(self, obs):
        """Lets `normalize` subtract the mean of obs (N, O), column by column, and divide by their standard deviation.
        Both are buffers: they are saved and loaded with the quantizer."""
        std, mean = torch.std_mean(obs.double(), 0, correction=0)
        constant = std <= 1e-6 * (1 + mean.abs())  # such a column is shifted, not divided
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std.where(~constant, torch.ones_like(std)))

    def normalize(self, obs):
        """obs (B, O) as an environment shows them -> (B, O) as networks see them; unchanged before `set_units`."""
        return (obs - self.obs_mean) / self.obs_std


class ActionVQVAE(Quantizer):
    """Encoder (s, a) -> z, codebook of K vectors e_k, decoder (s, e_k) -> a, and a prior over codes p(k | s).

    obs_dim, action_dim: O and A. num_codes: K. code_dim: D, the length of a codebook vector. action_only: the paper's
    ablation (Table 3), in which these networks see zeros in place of the state. lr: learning rate of Adam.

    The prior is a by-product, a cloned policy that passes no gradient to the rest. The agents that need p(k | s) take
    it as it is when the fit ends.
    """

    def __init__(self, obs_dim, action_dim, num_codes=64, action_only=False, lr=3e-4, code_dim=128, hidden=(512, 512)):
        super().__init__(obs_dim, num_codes, action_only)
        self.encoder = mlp(obs_dim + action_dim, code_dim, hidden)
        self.decoder = mlp(obs_dim + code_dim, action_dim, hidden)
        self.prior = mlp(obs_dim, num_codes, hidden)
        # Uniform with variance 1 / K, as in the authors' code: Flax takes the K of the shape (K, D) for the fan-in.
        self.codebook = nn.Parameter(torch.empty(num_codes, code_dim).uniform_(-1, 1) * (3 / num_codes) ** 0.5)
        self.optimizer = adamw(self.parameters(), lr)

    def embed(self, obs, actions):
        """Encoder outputs z (B, D)."""
        return self.encoder(torch.cat([self.condition(obs), actions], -1))

    def nearest(self, z):
        """Index of the nearest code (B,): argmin_k ||z - e_k||^2, without ||z||^2, which is the same for all codes."""
        return (self.codebook.square().sum(1) - 2 * z @ self.codebook.T).argmin(-1)

    @torch.no_grad()
    def encode(self, obs, actions):
        """obs (B, O), actions (B, A) -> codes (B,), int64. A whole dataset goes to `encode_dataset`."""
        return self.nearest(self.embed(obs, actions))

    def decode(self, obs, codes):
        """obs (B, O), codes (B,) -> actions (B, A). The output is linear and can leave [-1, 1]: clip it."""
        return self.decoder(torch.cat([self.condition(obs), self.codebook[codes]], -1))

    def candidates(self, obs):
        """obs (B, O) -> actions (B, K, A): what every code stands for there."""
        codes = torch.arange(self.num_codes, device=obs.device)
        return self.decode(obs[:, None].expand(-1, self.num_codes, -1), codes.expand(len(obs), -1))

    def prior_logits(self, obs):
        """obs (B, O) -> logits (B, K) of p(k | s): which codes the dataset uses in this state."""
        return self.prior(self.condition(obs))

    def forward(self, obs, actions):
        """The training loss, Eq. 8 and 11, at the scales of the authors' code: the reconstruction error is summed over
        the A action dimensions, the two terms of the codebook are averaged over its D dimensions."""
        z = self.embed(obs, actions)  # (B, D)
        codes = self.nearest(z)  # (B,)
        # One-hot rows times the codebook: the same as indexing, with a faster gradient (a matrix product).
        e = F.one_hot(codes, self.num_codes).to(z.dtype) @ self.codebook  # (B, D)
        # Straight-through: the decoder reads e, its gradient goes to z as if nothing had been rounded.
        z_q = z + (e - z).detach()
        reconstruction = self.decoder(torch.cat([self.condition(obs), z_q], -1))  # (B, A)
        reconstruction_loss = (reconstruction - actions).square().sum(-1).mean()
        # Draws encoder outputs to their codes, at weight 1 as in the authors' code; VQ-VAE's own weight is 0.25.
        commitment_loss = (e.detach() - z).square().mean()
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


def mlp(in_dim, out_dim, hidden=(512, 512)):
    """A ReLU network initialised like the authors' Flax networks: LeCun normal (truncated at two standard deviations),
    the last layer uniform with variance 0.01 / fan_in, biases zero."""
    sizes = [in_dim, *hidden, out_dim]
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layer = Linear(fan_in, fan_out)  # nn.Linear in a form that compiles to faster code (part 2)
        std = fan_in**-0.5 / 0.8796  # 0.8796: what truncation leaves of a standard normal's deviation
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    for inner in layers[2:-2:2]:
        inner.between = True  # between two hidden layers: may multiply in bfloat16 (part 2)
    nn.init.uniform_(layer.weight, -((0.03 / fan_in) ** 0.5), (0.03 / fan_in) ** 0.5)
    return nn.Sequential(*layers[:-1])


class Mixture(Quantizer):
    """K candidate actions u_k(s), a prior p(k | s) and one spread sigma, of one network that sees the state alone: a
    mixture of K Gaussians, fitted by its exact likelihood,

        p(a | s) = sum_k p(k | s) N(a; u_k(s), sigma^2)               loss = -log p(a | s)

    The code of an action is the component that it most likely came from; a code decodes to its candidate. No encoder
    sees the state beside the action, so nothing asks a code to tell of the state, and a state uses as many codes as
    the actions there need. K = 1 is regression."""

    def __init__(self, obs_dim, action_dim, num_codes=64, action_only=False, lr=3e-4, hidden=(512, 512)):
        super().__init__(obs_dim, num_codes, action_only)
        self.net = mlp(obs_dim, num_codes * (1 + action_dim), hidden)
        with torch.no_grad():  # candidates that began at the same action would stay together
            self.net[-1].bias[num_codes:].uniform_(-1, 1)
        self.register_buffer("variance", torch.tensor(0.25))  # sigma^2
        self.optimizer = adamw(self.parameters(), lr)

    def outputs(self, obs):
        """obs (B, O) -> candidates u (B, K, A), log p(k | s) (B, K)."""
        logits, u = self.net(self.condition(obs)).tensor_split([self.num_codes], -1)
        return u.unflatten(-1, (self.num_codes, -1)), logits.log_softmax(-1)

    def log_joint(self, obs, actions):
        """log p(k | s) + log N(a; u_k(s), sigma^2) of obs (B, O), actions (B, A) for each code (B, K), and the squared
        distances of the actions from the candidates (B, K)."""
        u, log_prior = self.outputs(obs)
        distance = (actions[:, None] - u).square().sum(-1)
        log_normal = -0.5 * distance / self.variance - 0.5 * actions.shape[1] * (2 * math.pi * self.variance).log()
        return log_prior + log_normal, distance

    def forward(self, obs, actions):
        log_joint, distance = self.log_joint(obs, actions)  # (B, K) each
        loss = -log_joint.logsumexp(1).mean()
        # sigma^2 at its optimum: the mean squared distance of actions from the candidates, weighed by their shares,
        # over A; as a running average of batches. One sigma for all dimensions: with one for each, a dimension whose
        # actions are clipped at a bound would shrink its own to nothing, and decide every code.
        with torch.no_grad():
            residual = (log_joint.softmax(1) * distance).sum(1).mean() / actions.shape[1]
        return loss, {"loss": loss, "residual": residual}

    def update(self, obs, actions):
        """One gradient step on obs (B, O), actions (B, A), after which sigma follows; returns what to log."""
        info = super().update(obs, actions)
        with torch.no_grad():
            self.variance.lerp_(info["residual"], 0.01).clamp_(min=1e-6)
        return info

    @torch.no_grad()
    def encode(self, obs, actions):
        """obs (B, O), actions (B, A) -> codes (B,), int64. A whole dataset goes to `encode_dataset`."""
        return self.log_joint(obs, actions)[0].argmax(-1)

    def candidates(self, obs):
        """obs (B, O) -> actions (B, K, A): what every code stands for there."""
        return self.outputs(obs)[0]

    def decode(self, obs, codes):
        """obs (B, O), codes (B,) -> actions (B, A). The output is linear and can leave [-1, 1]: clip it."""
        return self.candidates(obs).take_along_dim(codes[:, None, None], 1)[:, 0]

    def prior_logits(self, obs):
        """obs (B, O) -> logits (B, K) of p(k | s): which codes the dataset uses in this state."""
        return self.outputs(obs)[1]


class Aquadem(Mixture):
    """Candidate actions as in Dadashi et al., "Continuous Control with Action Quantization from Demonstrations", ICML
    2022, arXiv:2110.10149: the mixture with a uniform prior and a sigma^2 of T / 2 that does not move, times T,

        loss = -T log mean_k exp(-||a - u_k(s)||^2 / T)

    A network of its own, as published: a torso of 256, a hidden layer of 256 for each candidate, dropout in the fit.
    Beside it a prior over the codes is learned, as by ActionVQVAE: a by-product that passes no gradient to the rest."""

    def __init__(self, obs_dim, action_dim, num_codes=10, action_only=False, lr=3e-4, hidden=256, temperature=1e-3):
        Quantizer.__init__(self, obs_dim, num_codes, action_only)
        self.temperature = temperature
        self.torso, self.heads = Linear(obs_dim, hidden), Linear(hidden, num_codes * hidden)
        self.weight = nn.Parameter(torch.empty(num_codes, hidden, action_dim).uniform_(-1, 1) * hidden**-0.5)
        self.bias = nn.Parameter(torch.empty(num_codes, action_dim).uniform_(-1, 1) * hidden**-0.5)
        self.prior = mlp(obs_dim, num_codes)
        self.register_buffer("variance", torch.tensor(temperature / 2))
        self.optimizer = adamw(self.parameters(), lr)

    def outputs(self, obs, dropout=0.0):
        """obs (B, O) -> candidates u (B, K, A), and log p(k | s) (B, K) of the mixture, uniform."""
        x = F.dropout(self.condition(obs), dropout)
        x = F.dropout(self.torso(x).relu(), dropout)
        x = F.dropout(self.heads(x).relu(), dropout).unflatten(-1, (self.num_codes, -1))  # (B, K, 256)
        u = torch.einsum("bkh,kha->bka", x, self.weight) + self.bias
        return u, u.new_full(u.shape[:2], -math.log(self.num_codes))

    def forward(self, obs, actions):
        u, log_prior = self.outputs(obs, dropout=0.1)
        distance = (actions[:, None] - u).square().sum(-1)  # (B, K)
        loss = -self.temperature * (log_prior - distance / self.temperature).logsumexp(1).mean()
        prior_loss = F.cross_entropy(self.prior_logits(obs), self.encode(obs, actions))
        return loss + prior_loss, {"loss": loss, "prior_loss": prior_loss}

    def update(self, obs, actions):
        return Quantizer.update(self, obs, actions)  # sigma stays

    def prior_logits(self, obs):
        """obs (B, O) -> logits (B, K) of p(k | s): which codes the dataset uses in this state."""
        return self.prior(self.condition(obs))


QUANTIZERS = {
    "vqvae": ActionVQVAE,
    "mixture": Mixture,
    "aquadem": Aquadem,
}


# --- Its fit ---


def fit(vqvae, obs, actions, steps, batch_size=256, start=0, compile="off", decay=True, revive_every=100, noise=0.0):
    """Trains `vqvae` on obs (N, O), actions (N, A) from step `start` to `steps`. A generator: it yields (step, info)
    after each step, for the caller to log, save or stop. On a GPU the next step overwrites `info`.

    compile: "off", "on", or "auto": torch.compile, or a CUDA graph (`accelerate`).
    decay: let the learning rate fall to 0, so that the codes come to rest; False for the paper's constant one, and
    where `update` is to go on afterwards.
    revive_every: move dead codes to encoder outputs every so many of the first 90% of the steps; 0: never. Of
    ActionVQVAE alone: candidates that a mixture leaves unused are not missed.
    noise: standard deviation of Gaussian noise on obs, drawn anew in every step; see `with_noise`.
    """

    def sample(size):
        rows = torch.randint(len(obs), (size,), device=obs.device)
        seen = obs[rows] + noise * torch.randn_like(obs[rows]) if noise else obs[rows]
        return seen, actions[rows]

    update = accelerate(lambda: vqvae.update(*sample(batch_size)), obs.device, compile, steps)
    for step in range(start + 1, steps + 1):
        if decay:
            decay_lr(vqvae.optimizer, step, steps)
        info = update()
        if revive_every and step % revive_every == 0 and step <= 0.9 * steps and isinstance(vqvae, ActionVQVAE):
            revive_dead_codes(vqvae, *sample(4096))
        yield step, info


@torch.no_grad()
def revive_dead_codes(vqvae, obs, actions):
    """Moves each code that no pair of obs (B, O), actions (B, A) chose onto the encoder output of a random pair.
    A code far from all encoder outputs gets no gradient and would stay dead for good. Returns how many were moved."""
    z = vqvae.embed(obs, actions)  # (B, D)
    dead = torch.bincount(vqvae.nearest(z), minlength=vqvae.num_codes) == 0  # (K,)
    rows = torch.randint(len(z), (vqvae.num_codes,), device=z.device)
    vqvae.codebook.copy_(torch.where(dead[:, None], z[rows], vqvae.codebook))
    return int(dead.sum())


@torch.no_grad()
def codebook_health(vqvae, obs, actions):
    """How well the codes serve obs (N, O), actions (N, A). Returns a dict of floats:

    used: share of the K codes that some action chose.
    perplexity: exp of the entropy of the codes' use; K when all are used alike, 1 when one does all the work.
    per_state: exp of the prior's mean entropy, the codes that one state needs. perplexity / per_state: how many times
    fewer codes are left once the state is known (exp of their mutual information, if the prior is right). Where it is
    large, a policy has much to learn before it chooses well.
    persistence: is what sets an action apart from the prior's mean action still there one row later? The cosine
    similarity of the two differences, of 500 pairs of rows. Near 0 it is noise, and the mean may act; where it is
    large, demonstrators kept to one of several intentions.
    reconstruction_error: mean squared error over rows and dimensions; ..._a0, ..._a1: of each dimension.
    """
    codes = vqvae.encode_dataset(obs, actions)
    error, entropy = torch.zeros(actions.shape[1], device=obs.device), torch.zeros((), device=obs.device)
    for o, a, k in zip(obs.split(4096), actions.split(4096), codes.split(4096), strict=True):
        error += (vqvae.decode(o, k) - a).square().sum(0) / len(obs)
        entropy += torch.special.entr(vqvae.prior_logits(o).softmax(1)).sum() / len(obs)
    use = torch.bincount(codes, minlength=vqvae.num_codes) / len(codes)  # (K,)
    rows = torch.linspace(0, max(0, len(obs) - 2), 500, device=obs.device, dtype=torch.float64).long()
    rows = torch.cat([rows, (rows + 1).clamp(max=len(obs) - 1)])
    now, then = (actions[rows] - vqvae.act(obs[rows], vqvae.prior_logits(obs[rows]), "mean")).chunk(2)  # (500, A) each
    health = {
        "used": (use > 0).float().mean().item(),
        "perplexity": torch.special.entr(use).sum().exp().item(),
        "per_state": entropy.exp().item(),
        "persistence": F.cosine_similarity(now.flatten(), then.flatten(), 0).item(),
        "reconstruction_error": error.mean().item(),
    }
    return health | {f"reconstruction_error_a{i}": e for i, e in enumerate(error.tolist())}


def describe_health(health):
    """`codebook_health` in words, loud where the codebook is mostly dead."""
    errors = " ".join(f"{value:.4f}" for name, value in health.items() if name.startswith("reconstruction_error_a"))
    words = f"codebook: {health['used']:.0%} of the codes used, perplexity {health['perplexity']:.1f}, "
    words += f"{health['per_state']:.1f} of them in one state, persistence {health['persistence']:.2f}, "
    words += f"reconstruction error {health['reconstruction_error']:.4f} (by dimension: {errors})"
    if health["used"] < 0.5:
        words += "\nWARNING: MOST CODES ARE DEAD. In a vqvae, revive them (revive_every above 0) or ask "
        words += "for fewer (num_codes). A mixture may keep more than it needs."
    if health["perplexity"] > 10 * health["per_state"]:
        words += "\nwarning: which code is meant depends on the state much more than on the action, so that a policy "
        words += "has much to learn before it chooses well: try fewer codes or, if the data are many, the mixture."
    return words


@torch.no_grad()
def plot_codes(vqvae, obs, actions, states=6):
    """A Matplotlib figure of what every code means in a handful of states, evenly spaced in obs (N, O): arrows where
    actions (N, A) are two-dimensional, otherwise the value of each action dimension. A code has the same colour in all
    states, and is the fainter the less the data use it there, by the prior; black is what the data did."""
    from matplotlib.figure import Figure

    rows = torch.linspace(0, len(obs) - 1, states, device=obs.device, dtype=torch.float64).long()
    codes = torch.arange(vqvae.num_codes, device=obs.device)
    figure = Figure(figsize=(2 * states, 3), layout="constrained")
    figure.suptitle(
        "What the codes mean in some states of the data: a code is a colour, black is the data's own action"
    )
    for axes, row in zip(figure.subplots(1, states, sharey=True, squeeze=False)[0], rows.tolist(), strict=True):
        decoded = vqvae.decode(obs[row].expand(vqvae.num_codes, -1), codes).clamp(-1, 1).cpu()  # (K, A)
        action, usual = actions[row].cpu(), vqvae.prior_logits(obs[row : row + 1])[0].softmax(0).cpu()  # (A,), (K,)
        flat = len(action) == 2
        for k in usual.argsort().tolist():  # the usual ones on top
            style = {"color": f"C{k % 10}", "alpha": float(0.1 + 0.9 * usual[k] / usual.max())}
            if flat:
                axes.annotate("", decoded[k], (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2, **style})
            else:
                axes.plot(decoded[k], "_", markersize=12, markeredgewidth=2, **style)
        axes.plot(*(action[:, None] if flat else [action]), "k.")
        axes.set(title=f"row {row}", xlabel="a[0]" if flat else "dimension of the action", ylim=(-1.1, 1.1))
        if flat:
            axes.set(xlim=(-1.1, 1.1), aspect="equal")
    return figure


# === 2. What makes a training step fast ===


class Linear(nn.Linear):
    """nn.Linear in a form that torch.compile makes more of: it merges the bias with the ReLU, and a layer with a single
    output becomes a sum, merged with its surroundings: to call a product would take longer.

    Where `prepare` asks for it, layers `between` two hidden ones multiply in bfloat16, forward and backward: numbers
    of 8 significant bits, summed in float32. Observations, outputs, losses and what the optimizer adds up stay in
    float32."""

    bfloat16 = False  # set on the class, by `prepare`: for the whole process
    between = False  # set on a layer, by `mlp`

    def forward(self, x):
        if self.out_features == 1:
            product = (x * self.weight).sum(-1, keepdim=True)
        elif self.between and Linear.bfloat16:
            product = (x.bfloat16() @ self.weight.bfloat16().T).float()
        else:
            product = x @ self.weight.T
        return product + self.bias


def adamw(parameters, lr, weight_decay=0.0):
    """AdamW (without weight decay: Adam) in its fused form. Its learning rate is a tensor, so that a captured CUDA
    graph sees it change; `capturable` lets that graph hold the step, and changes nothing elsewhere."""
    parameters = list(parameters)
    rate = torch.tensor(lr, device=parameters[0].device)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=True)
    optimizer.defaults["initial_lr"] = lr  # for `decay_lr`; here copies and pickles keep it
    return optimizer


def minimize(loss, info, *optimizers):
    """loss.backward(), optimizer.step(), optimizer.zero_grad(), for the parameters of `optimizers` alone: what else
    `loss` has passed through (a critic, say, in a policy's loss) gets no gradient. Returns `info` for logging. Raises
    UserError where parameters have moved to another device since their optimizer was made."""
    info = {name: value.detach() for name, value in info.items()}
    loss.backward(inputs=[p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]])
    apply_gradients(*optimizers)
    return info


@torch.compiler.disable  # torch.compile ends its graph here: tracing into an optimizer makes the step slower
def apply_gradients(*optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group["lr"].device != (device := group["params"][0].device):
                raise UserError(f"moved to {device} after it was made: make it there, inside `with torch.device`.")
        optimizer.step()
        optimizer.zero_grad()


def decay_lr(optimizer, step, steps):
    """Sets the learning rate of step `step`, a number or a tensor, on a cosine from the one it was made with to 0,
    where it stays after `steps`."""
    step = torch.as_tensor(step, dtype=torch.float64).clamp(max=steps)
    for group in optimizer.param_groups:
        group["lr"].copy_(optimizer.defaults["initial_lr"] * (1 + torch.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def polyak_update(target, network, rate):
    """target <- (1 - rate) target + rate network. The rate is a number, or a tensor () that changes from step to step:
    1 copies the network, 0 leaves the target alone."""
    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast, rate.to(slow.dtype) if isinstance(rate, torch.Tensor) else rate)


def accelerate(update, device, compile="off", steps=0):
    """Returns a function that does what `update` does, faster, unless `compile` is "off". `update` takes nothing and
    returns a dict of tensors.

    CUDA: a step is hundreds of tiny kernels, so the whole of it, sampling included, is captured in one CUDA graph. What
    it returns is overwritten by the next step; numbers and branches of Python stay what they were at the capture, so
    that what is to change must be a tensor.
    CPU: torch.compile merges everything between the matrix products, backward pass included. That needs a C++ compiler;
    without one it says so and `update` runs as it is. It takes half a minute before the first step, so "auto" leaves it
    out where there are fewer than 10,000 `steps`.
    """
    if device.type == "cuda":
        return update if compile == "off" else with_cuda_graph(update)
    if compile == "on" or (compile == "auto" and steps >= 10_000):
        update = with_compile(update)
    return with_a_word_when_slow(update)


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


def with_a_word_when_slow(update, block=100, seconds=20.0, times=10.0):
    """Says once when `block` updates take `times` as long as the fastest ones did, and at least so many seconds: on a
    machine shared with other work, the threads of one product wait for each other longer than they work."""
    fastest, took, calls, said = math.inf, 0.0, 0, False

    def step():
        nonlocal fastest, took, calls, said
        begin = time.perf_counter()
        info = update()
        took, calls = took + time.perf_counter() - begin, calls + 1  # without evaluations, between two calls
        if calls % block == 0:
            fastest = min(fastest, took)
            if took > max(seconds, times * fastest) and not said:
                said = True
                words = "Where other programs share the processor, stop, and resume with OMP_NUM_THREADS=1."
                print(f"\nwarning: a step takes {took / fastest:.0f} times as long as the fastest ones did. {words}")
            took = 0.0
        return info

    return step


def prepare(device, precision="float32"):
    """The torch.device of a name, "cpu" or "cuda", ready for training. Raises UserError where there is none.
    precision: "bfloat16" for `Linear` of this process to multiply in, where the device has such products."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here: choose device cpu.")
    Linear.bfloat16 = precision == "bfloat16" and has_bfloat16(device)
    if precision == "bfloat16" and not Linear.bfloat16:
        print(f"this {device} has no products in bfloat16: they are in float32")
    if device == "cpu":
        tune_cpu()
    return torch.device(device)


def has_bfloat16(device):
    """Whether products in bfloat16 are instructions there (others emulate them, slowly)."""
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8  # Ampere
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: ARM


def tune_cpu():
    """Two settings that make a step on the CPU up to twice as fast; results change by float32 rounding at most.

    oneDNN runs float32 matrix products, on AMD processors about twice as fast as MKL. "medium" also permits bfloat16,
    which processors with AMX then use; so the precision is tried out and the setting taken back where it is not enough.
    glibc keeps freed memory instead of giving every large tensor back to the system and faulting it in page by page."""
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))  # the caller's random numbers stay as they are
    torch.set_float32_matmul_precision("medium")
    if (x @ x - x.double() @ x.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision("highest")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# === 3. A user's data and files, checked ===


class UserError(Exception):
    """Something that the user of a script can mend. The message is one sentence: what is wrong and what to do."""


def one_line(error):
    """What an exception of a library says, without its line breaks and full stop."""
    words = " ".join(str(error).split()).rstrip(".")[:300]
    return f"no {words}" if isinstance(error, KeyError) else words or type(error).__name__


def write_file(path, content):
    """Writes `content` (a text, a dict as JSON, or what a function puts into an open file) to `path`: first under
    another name, so that neither an interruption nor a full disk leaves half a file or takes the one that was there."""
    buffer = io.BytesIO()  # on a full disk torch.save itself would raise a RuntimeError that says nothing
    if isinstance(content, dict):
        content = json.dumps(content, indent=2, default=float, allow_nan=False)
    content(buffer) if callable(content) else buffer.write(content.encode())
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # a power cut may not swap the rename and the writing
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def parts_of(learners):
    """The modules of a dict by name, and beside them the optimizers among their attributes, as "name.attribute"."""
    found = dict(learners)
    for name, learner in learners.items():
        optimizers = {key: value for key, value in vars(learner).items() if isinstance(value, torch.optim.Optimizer)}
        found |= {f"{name}.{key}": optimizer for key, optimizer in optimizers.items()}
    return found


def is_finite(state):
    """Whether all networks' weights and optimizers' averages in a state_dict are finite."""
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    return all(is_finite(value) for value in state.values()) if isinstance(state, dict) else True


def write_checkpoint(path, state, learners):
    """Writes `state`, a dict, to `path`, after putting into it the states of all `parts_of` the learners, as "parts".
    Raises UserError where one holds numbers that are not finite: what `path` held before stays."""
    state["parts"] = {name: part.state_dict() for name, part in parts_of(learners).items()}
    for name, its in state["parts"].items():
        if not is_finite(its):
            raise UserError(f"{name} holds numbers that are not finite: {path} is from before.")
    write_file(path, partial(torch.save, state))


def read_checkpoint(path, like, device="cpu", learners=None):
    """What `write_checkpoint` wrote to `path`: a dict with the keys of `like` and values of the same types; where one
    is a dict that holds something, with its keys too. Its "parts" are loaded into those of `learners`. Nothing in the
    file is executed. Raises UserError where it is missing, foreign, damaged, or holds numbers that are not finite."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # compares checksums, which torch.load does not
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, weights_only=True, map_location=device)
        for key, value in like.items():
            other = type(state.get(key)) is not type(value)
            if other or (isinstance(value, dict) and value and state[key].keys() != value.keys()):
                raise ValueError(f"its {key} are not those of a run of this script")
        for name, part in parts_of(learners or {}).items():
            if not is_finite(state["parts"][name]):
                raise ValueError(f"{name} in it holds numbers that are not finite")
            part.load_state_dict(state["parts"][name])
    except Exception as error:  # of a dozen types
        raise UserError(f"{path} cannot be used: {one_line(error)}.") from None
    return state


# What, beside the data and vq_steps, makes a quantizer what it is.
FIT = "quantizer num_codes vq_batch_size lr vq_decay normalize_obs action_only revive_every obs_noise precision"


def take_quantizer(args, checksum, vqvae):
    """Loads into `vqvae` and its optimizer what the run in args.quantizer_from has fitted; returns the "done" of a run
    that begins with it: {} where no other run is named, or a run goes on. Raises UserError where that run has not ended
    its fit, or has other observations or actions (`checksum`) or other settings of the quantizer than `args`."""
    if args.quantizer_from is None or args.resume is not None or args.eval_only is not None:
        return {}
    path, like = Path(args.quantizer_from) / "checkpoint.pt", {"args": {}, "data": [], "done": {}}
    other = read_checkpoint(path, like)
    if other["data"][:1] != checksum[:1] or other["done"].get("quantizer") != args.vq_steps:
        raise UserError(f"{path} holds no quantizer that {args.vq_steps} steps (vq_steps) have fitted to these data.")
    for name in FIT.split():
        if other["args"].get(name) != getattr(args, name):
            raise UserError(f"the quantizer in {path} has {name} {other['args'].get(name)}: pass the same.")
    read_checkpoint(path, like, args.device, {"quantizer": vqvae})
    return {"quantizer": args.vq_steps}


def lock(folder):
    """A lock on `folder`, held as long as the returned object lives. Raises UserError where another process has it."""
    from filelock import FileLock, Timeout

    held = FileLock(folder / ".lock")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is training in {folder}: wait for it, or stop it.") from None
    return held


def tracker(folder, config):
    """A function that logs a dict of numbers to Weights & Biases, in a run that is called like `folder`. It works in a
    thread of its own: no slow connection holds training up, and whatever goes wrong is one warning."""
    rows = queue.SimpleQueue()

    def work():
        try:
            import wandb

            settings = wandb.Settings(init_timeout=20, silent=True)
            options = {"id": folder.resolve().name, "resume": "allow", "dir": folder, "config": config}
            run = wandb.init(project="saq", settings=settings, **options)
            atexit.register(finish)  # again: the last one registered runs first, and wandb has registered its own
            run.define_metric("*", step_metric="step")
            while (row := rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:
            print(f"\nwarning: not logged to Weights & Biases: {one_line(error)}.")

    def finish():  # what is still to be sent gets a minute
        rows.put(None)
        thread.join(60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    atexit.register(finish)
    return rows.put


LIMITS = {  # the lowest and the highest value allowed, in all scripts
    "steps vq_steps vae_steps batch_size vq_batch_size num_codes": (1, 1e9),
    "log_every eval_every eval_episodes final_episodes": (1, 1e9),
    "target_every cql_samples layers width flow_steps candidates samples backup_samples": (1, 1e9),
    "seed lr price_lr weight_decay reward_scale revive_every video best_of obs_noise": (0, 1e9),
    "alpha beta cql_alpha actor_beta critic_beta noise epsilon code_weight density_weight online_steps": (0, 1e9),
    "discount polyak average support warm_up online_weight hard": (0, 1),
    "expectile": (0.001, 0.999),
    "temperature sigma reference": (1e-6, 1e9),
    "prior_floor": (-1e9, 0),
}


def check_numbers(arguments, **bounds):
    """Raises UserError where one of `arguments`, a dict, is a float that is not finite, or lies outside the bounds that
    `bounds` (low, high), both included, or else LIMITS have for its name."""
    bounds = {name: pair for names, pair in LIMITS.items() for name in names.split()} | bounds
    for name, value in arguments.items():
        low, high = bounds.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not (low <= value <= high and abs(value) < math.inf):
            raise UserError(f"{name} must be a number between {low:g} and {high:g}, not {value}.")


def check_unchanged(arguments, begun, free):
    """Raises UserError where one of `arguments`, a dict, is not what a run has `begun` with, unless `free` names it."""
    for name, value in arguments.items():
        if name not in free and value != begun[name]:
            raise UserError(f"this run has begun with {name} {begun[name]}: leave {name} out.")


def make_env(name, dataset_path=None):
    """The environment of a task: a D4RL, robomimic or OGBench name from offline_envs, any Gymnasium id, or the id of a
    Minari dataset; None for "none". Its `spec` makes more of them. Raises UserError where it cannot be made, or has no
    flat Box spaces."""
    if name == "none":
        return None
    import gymnasium as gym

    try:
        importlib.import_module("offline_envs")  # a plugin: registers its names with Gymnasium
        missing = ""
    except ImportError as error:
        missing = f" (offline_envs: {error})"
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
    signed = isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.dtype.kind in "fi"
    if not (flat and signed and box.is_bounded() and (box.low < box.high).all()):
        raise UserError(f"{name} must have flat Box spaces of signed numbers, the one of its actions bounded.")
    if env.spec.max_episode_steps is None:
        print(f"warning: {name} has no time limit: an episode that never ends keeps an evaluation waiting for ever")
    return env


def scoring(env, path):
    """The function from returns to scores, and a sentence that says what such a score may be compared with."""
    if env is None:
        return float, "No environment: training runs, evaluation is skipped."
    if not env.has_wrapper_attr("provenance"):
        return float, "The score is the return itself."
    normalized = env.get_wrapper_attr("get_normalized_score")
    return lambda value: 100 * normalized(value), env.get_wrapper_attr("provenance")(path)


class Task(NamedTuple):
    """What is known beside the transitions. A score never goes without its provenance."""

    env: object  # the environment, whose `spec` makes more of it; None where there is none
    score: object  # the function from returns to scores
    data_score: float  # the mean score of the dataset's own episodes
    provenance: str  # one sentence: what such a score may be compared with
    reward: object  # the function from the dataset's rewards to those of training


def load_task(name, dataset_path, device, reward_scale=1.0, reward_shift=0.0):
    """The Task of a name and its Transitions on `device`, rewards multiplied by the scale, then shifted. Says what was
    loaded. Raises UserError for whatever is wrong with the environment, the file or the numbers in it."""
    env = make_env(name, dataset_path)
    data, returns = make_transitions(load_arrays(dataset_path, env), env, device)
    score, provenance = scoring(env, dataset_path)  # the file is there by now, and it can be read
    source = env.get_wrapper_attr("dataset_filepath") if dataset_path is None else dataset_path
    print(f"data: {source}, {len(data.obs)} transitions, {len(returns)} episodes, ", end="")
    print(f"returns {returns.min():.1f} to {returns.max():.1f}. {provenance}")
    reward = partial(scale_rewards, returns=returns, scale=reward_scale, shift=reward_shift)
    return Task(env, score, score(returns.mean()), provenance, reward), data._replace(rewards=reward(data.rewards))


def make_eval_envs(spec, episodes, *wrappers, **kwargs):
    """The environments that step together, ten at most. Policies act in [-1, 1], whatever the environment's bounds."""
    import gymnasium as gym

    wrappers = [lambda env: gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)), *wrappers]
    return gym.make_vec(spec, num_envs=min(episodes, 10), vectorization_mode="sync", wrappers=wrappers, **kwargs)


def film(evaluate, agents, vqvae, task, episodes, folder):
    """Films `episodes` episodes of each agent, from the evaluation's starts; a policy that samples draws anew.
    `evaluate(agent, vqvae, envs, episodes)` is the script's."""
    from gymnasium.wrappers import RecordVideo

    for name, agent in agents.items() if episodes else ():
        record = partial(RecordVideo, video_folder=str(folder), episode_trigger=lambda _: True, name_prefix=name)
        try:
            envs = make_eval_envs(task.env.spec, 1, record, render_mode="rgb_array")
            evaluate(agent, vqvae, envs, episodes)
            envs.close()
        except Exception as error:  # no screen, no renderer, no package that writes films
            return print(f"warning: no video: {one_line(error)}.")


class Transitions(NamedTuple):
    """N transitions on the training device. A terminal means "do not bootstrap"; a time limit is no terminal."""

    obs: torch.Tensor  # (N, O)
    actions: torch.Tensor  # (N, A), in [-1, 1]
    rewards: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, O)
    terminals: torch.Tensor  # (N,)
    codes: torch.Tensor  # (N,), int64: what the quantizer made of the actions; -1 before that

    def checksum(self):
        """Two numbers: one tells these observations and actions from others, the other one the rest but the codes."""

        def crc(*columns):
            return reduce(lambda crc, column: zlib.crc32(column.cpu().numpy(), crc), columns, 0)

        return [crc(self.obs, self.actions), crc(self.rewards, self.next_obs, self.terminals)]

    def sample(self, batch_size, noise=0.0):
        """A batch of transitions, drawn uniformly with replacement. noise: see `with_noise`."""
        rows = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return with_noise(Transitions(*(column[rows] for column in self)), noise)


def with_noise(batch, noise):
    """A batch with Gaussian noise of this standard deviation, in their units, on obs and next_obs (S4RL, Sinha et al.
    2021, arXiv:2103.06326): what a few demonstrations do is then not learned by heart, state by state."""
    if noise == 0:
        return batch
    obs, next_obs = (column + noise * torch.randn_like(column) for column in (batch.obs, batch.next_obs))
    return batch._replace(obs=obs, next_obs=next_obs)


COLUMNS = dict(observations=2, actions=2, rewards=1, terminals=1, timeouts=1, next_observations=2)  # name: dimensions


def load_arrays(path, env):
    """The arrays of D4RL's layout in the .hdf5 or .npz file `path`, or the task's own where it is None. Tasks with a
    dataset of their own read files themselves: robomimic's and OGBench's have other layouts. Raises UserError where it
    cannot be read."""
    own = env is not None and env.has_wrapper_attr("get_dataset")
    if path == "" or (path is None and not own):
        raise UserError("this task has no dataset of its own, or none is named: name a file (dataset_path).")
    try:
        if path is not None and Path(path).exists():
            check_file(path)
        if own:
            return env.get_wrapper_attr("get_dataset")(path)
        if path.lower().endswith(".npz"):
            with np.load(path) as file:
                return {key: file[key] for key in COLUMNS if key in file}
        import h5py

        with h5py.File(path) as file:
            return {key: file[key][()] for key in COLUMNS if key in file}
    except Exception as error:  # h5py and numpy raise a dozen types over a missing or damaged file
        raise UserError(f"the dataset {path or 'of this task'} cannot be read: {one_line(error)}.") from None


def check_file(path):
    """Raises ValueError where `path` is no file, or an HDF5 file that would show zeros in place of data: columns that
    were declared and never written (if none of it was: a part cannot be told), and virtual ones whose sources are gone.
    Flags may be all zero."""
    if not Path(path).is_file():
        raise ValueError("it is no file")
    if path.lower().endswith(".npz"):
        return
    import h5py

    if not h5py.is_hdf5(path):
        return
    with h5py.File(path) as file:
        for key in {"observations", "actions", "rewards", "next_observations"} & set(file):
            column, folder = file[key], Path(path).parent
            if column.is_virtual:
                written = all((folder / source.file_name).exists() for source in column.virtual_sources())
            else:
                written = column.size == 0 or column.id.get_storage_size() > 0
            if not written:
                raise ValueError(f"its {key} were never written, or lie in another file that is gone")


def check_arrays(arrays, env):
    """The arrays as float32, actions scaled to [-1, 1]. Raises UserError where one is missing, has another shape than
    it should, holds anything but numbers, or does not fit the environment."""
    checked = {}
    for key, dims in COLUMNS.items():
        if key not in arrays and key in ("timeouts", "next_observations"):
            continue
        if key not in arrays:
            raise UserError(f"the dataset has no {key}: D4RL's layout is {', '.join(list(COLUMNS)[:4])}, timeouts.")
        try:
            column = np.asarray(arrays[key])
        except ValueError:  # rows of different lengths
            column = np.asarray(None)
        if column.dtype.kind not in "fiub":
            raise UserError(f"the dataset's {key} are not numbers, or not as many in each row.")
        with np.errstate(over="ignore"):  # infinity is found below
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
    if env is None and (largest := np.abs(checked["actions"]).max()) > 1.001:
        raise UserError(
            f"the dataset's actions reach {largest:.3g}, and no environment tells bounds: scale to [-1, 1]."
        )
    for key, space in [("observations", env.observation_space), ("actions", env.action_space)] if env else ():
        size = checked[key].shape[1]
        if (size,) != space.shape:
            kind = f"{type(space).__name__} of shape {space.shape}"
            raise UserError(f"the dataset's {key} have size {size}, the environment's are a {kind}.")
    if env and not (np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)):
        low, high = env.action_space.low.astype(np.float32), env.action_space.high.astype(np.float32)
        checked["actions"] = 2 * (checked["actions"] - low) / (high - low) - 1  # make_eval_envs rescales them back
    return checked


def find_ends(arrays, limit):
    """True (N,) in the last row of each episode. Without timeouts, an episode also ends where the environment's time
    limit (None: it has none) would have struck. Raises UserError where nothing marks an end."""
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
    """A user's arrays, checked, as Transitions on `device`, all codes -1, and the return (E,) of each episode.

    arrays: observations (N, O), actions (N, A), rewards (N,), terminals (N,) and, if there are any, timeouts (N,) and
    next_observations (N, O), episodes in a row. env: tells the bounds of actions and the time limit; None: actions lie
    in [-1, 1]. Rows whose next observation is unknown are left out. Raises UserError where the arrays do not fit."""
    returns = arrays.get("episode_returns")  # of tasks whose data pay otherwise than their environment does
    arrays = check_arrays(arrays, env)
    outside = (np.abs(arrays["actions"]) > 1).any(1)
    if outside.any():
        largest = np.abs(arrays["actions"]).max()
        print(f"warning: {outside.sum()} of {len(outside)} actions leave [-1, 1], up to {largest:.3g}: clipped")
    ends = find_ends(arrays, env.spec.max_episode_steps if env and env.spec else None)
    if returns is None:
        returns = np.add.reduceat(arrays["rewards"], np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1]))

    # The next observation is the next row's, unless the file holds it. At a terminal it does not count. Where an
    # episode ends without one, what followed is unknown and the transition is dropped.
    rows = np.flatnonzero(~ends | (arrays["terminals"] > 0) | ("next_observations" in arrays))
    if not rows.size:
        raise UserError("no transition's next observation is known: every row ends an episode. Add next_observations.")

    def column(key, rows):
        return torch.from_numpy(arrays[key].take(rows, 0, mode="clip"))

    obs, actions, rewards = column("observations", rows), column("actions", rows).clamp_(-1, 1), column("rewards", rows)
    shifted = "next_observations" not in arrays
    next_obs = column("observations", rows + 1) if shifted else column("next_observations", rows)
    terminals = column("terminals", rows).gt(0).float()
    columns = obs, actions, rewards, next_obs, terminals, torch.full((len(rows),), -1)
    return Transitions(*(column.to(device) for column in columns)), returns


def scale_rewards(rewards, returns, scale, shift):
    """rewards (N,) * scale + shift. A scale of 0 stands for IQL's: 1000 / (highest - lowest), of the episodes' returns
    (E,). Raises UserError where these are the same, up to float32's rounding."""
    if scale == 0:
        spread = returns.max() - returns.min()
        if spread <= 1e-5 * np.abs(returns).max():
            raise UserError("all episodes have the same return: pass a reward_scale other than 0.")
        scale = 1000 / spread
    return scale * rewards + shift


def exit_in_words(main):
    """Runs a script's `main`. What its user can mend becomes one sentence on stderr and exit code 2. Ctrl-C, whose
    arguments are what was stopped and with what to call the script to go on, becomes a line of them, and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold letters that the terminal does not know
    try:
        main()
    except KeyboardInterrupt as stop:
        what, *options = stop.args or ["stopped"]
        command = shlex.join(["python", sys.argv[0], *map(str, options)])
        print(f"\n{what}; go on with: {command}" if options else f"\n{what}")
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # OSError: a full disk, say
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        hint = " Fewer codes, smaller batches or fewer samples take less memory." if memory else ""
        print(f"error: {one_line(error)}.{hint}", file=sys.stderr)
        sys.exit(2)


# === 4. The online phase: what is learned after the dataset ===


class Memory:
    """A dataset, and behind it room for `room` new transitions: what an online phase learns from. A `Run` saves
    its state_dict, which holds what is new: the dataset is loaded again. Tensors stay where they are, as CUDA graphs
    ask."""

    def __init__(self, data, room):
        self.old, self.room = len(data.obs) if room else 0, room  # without room nobody learns from it
        self.columns = Transitions(*(column.new_zeros(self.old + room, *column.shape[1:]) for column in data))
        self.obs = self.columns.obs
        self.count = torch.tensor(self.old, device=data.obs.device)  # rows in use
        self.began = 0  # new rows when the episode in progress began

    def fill(self, data):
        """The dataset's rows, when they have codes."""
        for column, rows in zip(self.columns, data, strict=True):
            column[: self.old] = rows

    def new(self):
        """The new Transitions, in the order in which they were made."""
        return Transitions(*(column[self.old : int(self.count)] for column in self.columns))

    def add(self, transition, ended):
        """Writes a transition, Transitions without their first dimension, into the next row. ended: its episode has."""
        for column, value in zip(self.columns, transition, strict=True):
            column[self.count] = value
        self.count += 1
        self.began = int(self.count) - self.old if ended else self.began

    def sample(self, batch_size, noise=0.0):
        """A batch of old and new transitions, drawn uniformly with replacement. noise: see `with_noise`."""
        rows = (torch.rand(batch_size, device=self.count.device, dtype=torch.float64) * self.count).long()
        return with_noise(Transitions(*(column[rows] for column in self.columns)), noise)

    def state_dict(self):
        rows = {name: rows.clone() for name, rows in self.new()._asdict().items()}
        return rows | {"began": torch.tensor(self.began)}

    def load_state_dict(self, state):
        done, self.began = len(state["obs"]), int(state["began"])
        if done > self.room:
            raise UserError(f"{done} online steps are done: ask for no fewer (online_steps)")
        for name, column in self.columns._asdict().items():
            column[self.old : self.old + done] = state[name]
        self.count.fill_(self.old + done)


@torch.no_grad()
def play(explore, memory, vqvae, task, seed):
    """Steps of `explore`, which maps obs (1, O) to an action (1, A) and a code (1,), in an environment of its own. A
    generator: each `next` writes one transition into `memory`, its reward in the dataset's units. An environment whose
    data pay otherwise than it does says what they would in `info`, as "data_reward". Raises UserError where
    observations or rewards are not finite.

    An environment cannot be saved. So each episode begins from a seed of its own, and where a memory was loaded in the
    middle of one, its actions are played again: the episode goes on as if nothing had stopped it. Where that does not
    lead to the same state, a warning is printed, and another episode begins."""
    import gymnasium as gym

    def see(obs):
        return vqvae.normalize(torch.as_tensor(obs, dtype=torch.float32, device=memory.count.device)[None])  # (1, O)

    env = gym.wrappers.RescaleAction(gym.make(task.env.spec), np.float32(-1), np.float32(1))
    while True:
        obs, _ = env.reset(seed=(seed + 1) * 1_000_000 + memory.began)  # no evaluation's: these are 1_000, 1_001, ...
        ended, again = False, memory.new()
        for action in again.actions[memory.began :]:
            if not ended:
                obs, _, terminal, timeout, _ = env.step(action.cpu().numpy())
                ended = terminal or timeout
        if memory.began < len(again.obs) and (ended or not torch.allclose(see(obs)[0], again.next_obs[-1])):
            print("warning: the environment does not do the same from the same seed: a new episode begins.")
            memory.began = len(again.obs)
            continue
        while not ended:
            here = see(obs)
            action, code = explore(here)
            obs, reward, terminal, timeout, info = env.step(action[0].cpu().numpy())
            if not (np.isfinite(reward) and np.isfinite(obs).all()):
                number = int(memory.count) - memory.old + 1
                raise UserError(
                    f"in online step {number} the environment gives NaN or infinity; saved is what was before"
                )
            ended = terminal or timeout  # a time limit is no terminal; a goal in the last step allowed is one
            reward = float(task.reward(info.get("data_reward", reward)))
            row = Transitions(here[0], action[0], reward, see(obs)[0], float(terminal), code[0])
            memory.add(row, ended)
            yield


def copy_learner(learner, twin):
    """Gives `twin` the tensors of `learner` and the state of its optimizers; learning rates stay the twin's own."""
    for its, part in zip(parts_of({"": twin}).values(), parts_of({"": learner}).values(), strict=True):
        rates = {key: value for key, value in its.state_dict().items() if key == "param_groups"}
        its.load_state_dict(copy.deepcopy(part.state_dict() | rates))
