"""Which quantizer suits your data, without an environment: how well each imitates episodes that it has not seen.

    python benchmarks/held_out.py --env none --dataset-path mine.npz
    python benchmarks/held_out.py --env door-human-v0 --dataset-path door-human-v0.hdf5

A fifth of the episodes is kept aside, and each quantizer is fitted to the others. Then its own policy, p(k | s), is
asked for actions in 1,000 rows that were kept aside and, for comparison, in 1,000 that it was fitted to. The first four
numbers are distances, the lower the better:

    energy     E |X - a| - E |X - X'| / 2, where X and X' are draws of the policy and a is what the data did: no policy
               scores better, on average, than the one that made the data (Gneiting and Raftery, JASA 2007)
    greedy     how far the likeliest code's action lies from a
    mean       how far the mean of all codes lies from a
    nearest    how far the nearest code lies from a: what no choice among codes can mend
    per_state  how many codes a state needs, exp of the policy's mean entropy
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vqvae import QUANTIZERS, UserError, check_numbers, exit_in_words, fit, load_task, prepare  # noqa: E402

COLUMNS = ["energy", "greedy", "mean", "nearest", "per_state"]


@dataclass
class Args:
    env: str = "maze2d-large-demos-v1"  # a task, as the scripts know it, or "none"
    dataset_path: str | None = None  # an .hdf5 or .npz file in place of the task's own dataset
    quantizers: tuple[Literal[tuple(QUANTIZERS)], ...] = ("vqvae", "mixture")  # which to compare
    num_codes: int = 64  # K (with aquadem: 10, as published)
    vq_steps: int = 10_000  # gradient steps of each
    seeds: int = 3  # seeds 0, 1, ... of fits and of which episodes are kept aside


def episodes(data):
    """Transitions -> the number (N,) of the episode that each row belongs to: a new one begins where a row does not
    start from the state that the row before led to, or behind a terminal."""
    follows = (data.next_obs[:-1] == data.obs[1:]).all(1) & (data.terminals[:-1] == 0)
    return torch.cat([torch.zeros(1), (~follows).cumsum(0)]).long()


def energy_score(p, u, actions):
    """p (B, K), candidates u (B, K, A), actions (B, A) -> (B,): exact, the sums are over codes."""
    away = (p * (u - actions[:, None]).norm(dim=-1)).sum(1)
    apart = torch.einsum("bj,bk,bjk->b", p, p, torch.cdist(u, u))
    return away - apart / 2


@torch.no_grad()
def imitation(quantizer, obs, actions):
    """What the table shows of obs (B, O), actions (B, A): the numbers of COLUMNS."""
    u, p = quantizer.candidates(obs).clamp(-1, 1), quantizer.prior_logits(obs).softmax(1)
    distance = (u - actions[:, None]).norm(dim=-1)  # (B, K)
    mean = (p[..., None] * u).sum(1)
    distances = [energy_score(p, u, actions), distance.gather(1, p.argmax(1)[:, None])]
    distances += [(mean - actions).norm(dim=1), distance.amin(1)]
    return [*(d.mean().item() for d in distances), torch.special.entr(p).sum(1).mean().exp().item()]


def main():
    args = tyro.cli(Args, description=__doc__)
    check_numbers(vars(args), seeds=(1, 1e9))
    device = prepare("cpu")
    _, data = load_task(args.env, args.dataset_path, device, 1.0, 0.0)
    number = episodes(data)
    count = int(number[-1]) + 1
    if count < 2:
        raise UserError("the dataset is one episode: there is none to keep aside.")
    print(f"{'quantizer':14}{'seed':>5} {'rows':6}" + "".join(f"{name:>11}" for name in COLUMNS))
    for seed in range(args.seeds):
        aside = torch.zeros(count, dtype=torch.bool)
        torch.manual_seed(seed)
        aside[torch.randperm(count)[: max(1, count // 5)]] = True
        rows = {"aside": aside[number].nonzero()[:, 0], "seen": (~aside)[number].nonzero()[:, 0]}
        shown = {name: chosen[torch.randperm(len(chosen))[:1000]] for name, chosen in rows.items()}
        for kind in args.quantizers:
            torch.manual_seed(seed)
            codes = 10 if kind == "aquadem" else args.num_codes
            quantizer = QUANTIZERS[kind](data.obs.shape[1], data.actions.shape[1], codes)
            quantizer.set_units(data.obs[rows["seen"]])
            obs = quantizer.normalize(data.obs)
            for _ in fit(quantizer, obs[rows["seen"]], data.actions[rows["seen"]], args.vq_steps, compile="auto"):
                pass
            for name, chosen in shown.items():
                values = imitation(quantizer, obs[chosen], data.actions[chosen])
                print(f"{kind:14}{seed:5} {name:6}" + "".join(f"{v:11.3f}" for v in values), flush=True)


if __name__ == "__main__":
    exit_in_words(main)
