"""Gradient steps per second of each phase of each script, and the share they reach of what matrix products do alone.

    python benchmarks/speed.py

A phase and its products are timed in turn, in short bursts, and shares are medians over the bursts: on a shared machine
absolute speeds drift, ratios taken within one run hold. Sizes: hopper's 11 observations and 3 actions, 64 codes, batch
256. Where d3rlpy is installed, its DiscreteCQL and CQL are timed at the same sizes. At the end, a file in D4RL's layout
is loaded, in a process of its own: its seconds beside those that h5py takes to read the arrays, and its peak memory.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import saq_bc
import saq_brac
import saq_cql
import saq_iql
from vqvae import ActionVQVAE, Transitions, accelerate, load_arrays, make_transitions, prepare

OBS, ACTIONS, CODES, BATCH, SAMPLES = 11, 3, 64, 256, 31


@dataclass
class Options:
    compile: bool = True  # torch.compile the updates, as the scripts do in long runs
    rounds: int = 15  # bursts of each phase
    burst: float = 0.4  # seconds of one burst
    transitions: int = 2_000_000  # of the file that is loaded, with antmaze's 29 observations and 8 actions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


# --- The matrix products of one step: (rows, inner, columns) of each ---


def forward(sizes, rows=BATCH):
    return [(rows, fan_in, fan_out) for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)]


def to_inputs(sizes, rows=BATCH):
    """The gradient of each layer's input."""
    return [(rows, fan_out, fan_in) for _, fan_in, fan_out in forward(sizes, rows)]


def to_weights(sizes, rows=BATCH):
    """The gradients of the weights; the first layer's input needs none."""
    return [(fan_out, rows, fan_in) for _, fan_in, fan_out in forward(sizes, rows)] + to_inputs(sizes, rows)[1:]


def train(sizes, rows=BATCH):
    return forward(sizes, rows) + to_weights(sizes, rows)


Q_K, V_512 = [OBS, 512, 512, CODES], [OBS, 512, 512, 1]  # SAQ's networks
Q, V, POLICY, MEAN = (
    [OBS + ACTIONS, 256, 256, 1],
    [OBS, 256, 256, 1],
    [OBS, 256, 256, 2 * ACTIONS],
    [OBS, 256, 256, ACTIONS],
)
ENCODER, DECODER = [OBS + ACTIONS, 512, 512, 128], [OBS + 128, 512, 512, ACTIONS]
PRODUCTS = {
    "quantizer fit": train(ENCODER)
    + train(DECODER)
    + to_inputs(DECODER)[:1]
    + train(Q_K)
    + [(BATCH, 128, CODES), (BATCH, CODES, 128), (CODES, BATCH, 128)],  # distances, look-up, its gradient
    "SAQ-CQL": train(Q_K) + 2 * forward(Q_K),
    "SAQ-IQL": 2 * train(Q_K) + forward(Q_K) + train(V_512) + forward(V_512),
    "SAQ-BRAC": 4 * train(Q_K) + 7 * forward(Q_K),
    "SAQ-BC": train(Q_K),
    "CQL": 2 * (train(Q, SAMPLES * BATCH) + forward(Q))
    + 3 * forward(POLICY)
    + train(POLICY)
    + 2 * (forward(Q) + to_inputs(Q)),
    "IQL": train(V) + 2 * forward(V) + train(MEAN) + 2 * forward(Q) + 2 * train(Q),
    "BRAC": 2 * train(POLICY) + 3 * forward(POLICY) + 2 * (train(Q) + 2 * forward(Q) + to_inputs(Q)),
    "BC": train(MEAN),
}


def multiply(phase, device):
    """A function that does the products of one step of `phase`, each on operands of its own."""
    operands = [
        (torch.rand(m, k, device=device), torch.rand(n, k, device=device).T, torch.empty(m, n, device=device))
        for m, k, n in PRODUCTS[phase]
    ]

    def step():
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    return accelerate(step, device)  # on CUDA, products too are captured in one graph


# --- The phases ---


def phases(device, compile):
    rows = 100_000
    obs, next_obs = torch.randn(2, rows, OBS, device=device)
    actions, codes = torch.rand(rows, ACTIONS, device=device) * 2 - 1, torch.randint(CODES, (rows,), device=device)
    data = Transitions(obs, actions, torch.rand(rows, device=device), next_obs, torch.zeros(rows, device=device), codes)
    with device:
        vqvae = ActionVQVAE(OBS, ACTIONS, CODES)
        agents = {}
        for script in (saq_cql, saq_iql, saq_brac, saq_bc):
            agents |= script.make_agents(OBS, ACTIONS, vqvae, script.Args())

    def fit_step():
        batch = data.sample(BATCH)
        return vqvae.update(batch.obs, batch.actions)

    def learn_step(agent):
        return accelerate(lambda: agent.update(data.sample(BATCH)), device, compile)

    steps = {name.upper().replace("_", "-"): learn_step(agent) for name, agent in agents.items()}
    return {"quantizer fit": accelerate(fit_step, device, compile)} | steps


def d3rlpy_updates(device):
    """d3rlpy's steps at the same sizes, {} where it is not installed."""
    try:
        import d3rlpy
    except ImportError:
        return {}
    rows, rng = 10_000, np.random.default_rng(0)
    encoder = {512: d3rlpy.models.VectorEncoderFactory([512, 512]), 256: d3rlpy.models.VectorEncoderFactory([256, 256])}
    kinds = {"SAQ-CQL": d3rlpy.ActionSpace.DISCRETE, "CQL": d3rlpy.ActionSpace.CONTINUOUS}
    updates = {}
    for phase, kind in kinds.items():
        if phase == "SAQ-CQL":
            actions = rng.integers(CODES, size=(rows, 1))
            config = d3rlpy.algos.DiscreteCQLConfig(batch_size=BATCH, encoder_factory=encoder[512])
        else:
            actions = rng.uniform(-1, 1, (rows, ACTIONS)).astype(np.float32)
            factories = {"actor_encoder_factory": encoder[256], "critic_encoder_factory": encoder[256]}
            config = d3rlpy.algos.CQLConfig(batch_size=BATCH, **factories)
        timeouts = (np.arange(rows) % 1000 == 999).astype(np.float32)
        observations, rewards = rng.standard_normal((rows, OBS)).astype(np.float32), rng.random((rows, 1), np.float32)
        terminals = np.zeros(rows, np.float32)
        dataset = d3rlpy.dataset.MDPDataset(observations, actions, rewards, terminals, timeouts, action_space=kind)
        algo = config.create(device=f"{device.type}:0")
        algo.build_with_dataset(dataset)
        updates[phase] = lambda algo=algo, dataset=dataset: algo.update(dataset.sample_transition_batch(BATCH))
    return updates


def rate(step, seconds, device):
    """Calls of `step` per second, over a burst of about so many seconds."""
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(5):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls += 5
    return calls / elapsed


# --- Loading ---


def write_file(path, rows):
    """Random transitions as D4RL writes them: float32 and bool, compressed, episodes of 1000."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.standard_normal((rows, 29), np.float32),
        "actions": rng.random((rows, 8), np.float32),
        "rewards": rng.random(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 1000 == 999,
    }
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, compression="gzip")


def read_alone(path):
    """Seconds that h5py takes to read the arrays."""
    start = time.perf_counter()
    with h5py.File(path) as file:
        _ = [file[key][()] for key in file]
    return time.perf_counter() - start


def load(path):
    """Seconds that a script takes until it has the transitions, and its peak memory as a multiple of their size."""
    before, start = memory("VmRSS"), time.perf_counter()
    data, _ = make_transitions(load_arrays(path, None), None, torch.device("cpu"))
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    return seconds, peak / sum(column.nbytes for column in data if column.dtype == torch.float32)


def memory(field):
    """Bytes of this process by a field of Linux's /proc: VmRSS now, VmHWM at most so far."""
    (line,) = (line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])


def in_new_process(function, path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (path,))


def main():
    options = tyro.cli(Options, description=__doc__)
    device = prepare(options.device)
    others = d3rlpy_updates(device)
    print(f"{'phase':20}{'steps/s':>10}{'products/s':>12}{'share':>8}{'d3rlpy/s':>10}{'ratio':>8}")
    steps = phases(device, "on" if options.compile else "off")
    for phase in PRODUCTS:
        step = steps[phase]
        contenders = {"ours": step, "limit": multiply(phase, device)}
        if phase in others:
            contenders["d3rlpy"] = others[phase]
        rates = {name: [] for name in contenders}
        for contender in contenders.values():
            rate(contender, options.burst, device)  # compilation, warm-up
        for _ in range(options.rounds):
            for name, contender in contenders.items():
                rates[name].append(rate(contender, options.burst, device))
        median = {name: statistics.median(values) for name, values in rates.items()}
        share = statistics.median(ours / limit for ours, limit in zip(rates["ours"], rates["limit"], strict=True))
        line = f"{phase:20}{median['ours']:10.1f}{median['limit']:12.1f}{share:8.0%}"
        if "d3rlpy" in rates:
            ratios = (ours / other for ours, other in zip(rates["ours"], rates["d3rlpy"], strict=True))
            line += f"{median['d3rlpy']:10.1f}{statistics.median(ratios):8.1f}"
        print(line, flush=True)

    if sys.platform != "linux":
        return  # /proc, which knows the memory, is Linux's
    with tempfile.TemporaryDirectory() as folder:
        write_file(f"{folder}/data.hdf5", options.transitions)
        alone = in_new_process(read_alone, f"{folder}/data.hdf5")
        seconds, peak = in_new_process(load, f"{folder}/data.hdf5")
    times = f"{seconds:.2f} s, {seconds / alone:.1f} times h5py alone"
    print(
        f"loading {options.transitions:,} transitions: {times}; peak memory {peak:.2f} times the transitions in float32"
    )


if __name__ == "__main__":
    main()
