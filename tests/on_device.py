"""`python tests/on_device.py DEVICE PRECISION`: updates as a run makes them (on CUDA: graphs) against plain ones.

Prints a line for each learner: by how much its parameters differ after eight steps, relative to their norm.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import saq_bc
import saq_brac
import saq_cql
import saq_iql
from baselines import awac, bear, fql, rebrac, spot
from vqvae import ActionVQVAE, Aquadem, Mixture, Quantizer, Transitions, accelerate, prepare

OBS, ACTIONS, CODES, ROWS, STEPS = 5, 2, 8, 200, 8


def learners(device):
    """Fresh ones, the same at every call."""
    torch.manual_seed(0)
    with device:
        vqvae = ActionVQVAE(OBS, ACTIONS, CODES)
        found = {"quantizer": vqvae, "mixture": Mixture(OBS, ACTIONS, CODES), "aquadem": Aquadem(OBS, ACTIONS, CODES)}
        for script in (saq_cql, saq_iql, saq_brac, saq_bc, awac, bear, spot):
            found |= script.make_agents(OBS, ACTIONS, vqvae, script.Args())
        for script in (rebrac, fql):
            found |= script.make_agents(OBS, ACTIONS, script.Args())
    return found


def transitions(device):
    obs, next_obs = torch.randn(2, ROWS, OBS, device=device)
    actions, codes = torch.rand(ROWS, ACTIONS, device=device) * 2 - 1, torch.randint(CODES, (ROWS,), device=device)
    return Transitions(obs, actions, torch.rand(ROWS, device=device), next_obs, torch.zeros(ROWS, device=device), codes)


def batch_for(learner, data):
    batch = data.sample(32)
    return rebrac.Sarsa(*batch[:5], batch.actions) if isinstance(learner, rebrac.ReBRAC) else batch


def update_of(learner, data):
    """A step of `learner` on a batch of data."""
    batch = batch_for(learner, data)
    return learner.update(*(batch[:2] if isinstance(learner, Quantizer) else [batch]))


def train(learner, data, run):
    """Eight steps of `learner`, each made by what `run` makes of it; returns its parameters as one vector."""
    step = run(lambda: update_of(learner, data))
    torch.manual_seed(1)
    for _ in range(STEPS):
        info = step()
    assert all(torch.isfinite(value) for value in info.values())
    return torch.cat([parameter.detach().flatten().double() for parameter in learner.parameters()])


def main():
    device = prepare(*sys.argv[1:])
    torch.manual_seed(2)
    data = transitions(device)
    plain, fast = learners(device), learners(device)
    for name in plain:
        expected = train(plain[name], data, lambda update: update)
        got = train(fast[name], data, lambda update: accelerate(update, device, "auto"))
        print(name, float((got - expected).norm() / expected.norm()))


if __name__ == "__main__":
    main()
