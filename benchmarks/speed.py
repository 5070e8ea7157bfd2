"""Gradient steps per second of each update of each script, and the share they reach of what matrix products do alone.

    python benchmarks/speed.py

An update, its matrix products alone, and the update in bfloat16 where the device has it, are timed in turn, in short
bursts, and shares are medians over the bursts: on a shared machine absolute speeds drift, ratios within one run hold.
Sizes: hopper's 11 observations and 3 actions, 64 codes, batch 256. Beside them the steps of others: of d3rlpy where it
is installed, and of the checkouts that --saq-official, --fql-official and --corl name (others.py says what they need).

Then SAQ-CQL in as many processes of one thread each as there are cores, beside one process with all threads; and a file
in D4RL's layout is loaded, in a process of its own: its seconds beside those that h5py takes to read the arrays, and
its peak memory.
"""

import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import others
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "baselines"))
import awac
import bear
import fql
import rebrac
import spot

import saq_bc
import saq_brac
import saq_cql
import saq_iql
from vqvae import (
    QUANTIZERS,
    Linear,
    Transitions,
    UserError,
    accelerate,
    check_numbers,
    exit_in_words,
    has_bfloat16,
    load_arrays,
    make_transitions,
    one_line,
    prepare,
    with_compile,
)

OBS, ACTIONS, CODES, BATCH = 11, 3, 64, 256


@dataclass
class Options:
    only: tuple[str, ...] = ()  # time these updates and nothing else, by their names in the table
    compile: bool = True  # torch.compile the updates, as the scripts do in long runs
    rounds: int = 15  # bursts of each phase
    burst: float = 0.4  # seconds of one burst
    transitions: int = 2_000_000  # of the file that is loaded, with antmaze's 29 observations and 8 actions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    saq_official: Path | None = None  # a checkout of jianlanluo/SAQ, to time its steps as well
    fql_official: Path | None = None  # a checkout of seohongpark/fql, to time its FQL, IFQL and ReBRAC as well
    corl: Path | None = None  # a checkout of tinkoff-ai/CORL, to time its IQL, TD3+BC, AWAC and SPOT as well
    table: Path | None = None  # a CSV for the rates; reproduce.py estimates hours by benchmarks/results/speed.csv


# --- The matrix products of one step ---


class Products(TorchDispatchMode):
    """Notes the sizes (rows, inner, columns) of every matrix product that is done inside, backward passes included."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            a, b = args[-2:]  # of addmm and baddbmm the last two as well
            self.sizes += math.prod(a.shape[:-2]) * [(*a.shape[-2:], b.shape[-1])]
        return function(*args, **(kwargs or {}))


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def multiply(update, device):
    """A function that does the products of one `update`, each on operands of its own, and nothing else."""
    with Products() as products:
        update()
    operands = [
        (torch.rand(m, k, device=device), torch.rand(n, k, device=device).T, torch.empty(m, n, device=device))
        for m, k, n in products.sizes
    ]

    def step():
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    return fast(step, device, "off")  # on CUDA, products too are captured in one graph


# --- The updates ---


def fast(update, device, compile):
    """`accelerate`, without its watch for slow steps: here steps wait while others have their bursts."""
    if device.type == "cuda":
        return accelerate(update, device, "auto")
    return with_compile(update) if compile == "on" else update


def updates(device):
    """One gradient step of each quantizer and agent, {name: function}, as reproduce.py names them."""
    rows = 100_000
    obs = torch.randn(rows, OBS, device=device)
    actions, codes = torch.rand(rows, ACTIONS, device=device) * 2 - 1, torch.randint(CODES, (rows,), device=device)
    data = Transitions(
        obs, actions, torch.rand(rows, device=device), obs.roll(-1, 0), torch.zeros_like(obs[:, 0]), codes
    )
    with device:
        quantizers = {kind: make(OBS, ACTIONS, 10 if kind == "aquadem" else CODES) for kind, make in QUANTIZERS.items()}
        agents = {}
        for script in (saq_cql, saq_iql, saq_brac, saq_bc):
            agents |= script.make_agents(OBS, ACTIONS, quantizers["vqvae"], script.Args())
        for script in (awac, bear, spot):  # over the codes that baselines have in reproduce.py
            agents |= script.make_agents(OBS, ACTIONS, quantizers["mixture"], script.Args())
        for script in (rebrac, fql):
            agents |= script.make_agents(OBS, ACTIONS, script.Args())
    with_next = rebrac.with_next_actions(data)

    def fit_step(quantizer):
        def step():
            batch = data.sample(BATCH)
            return quantizer.update(batch.obs, batch.actions)

        return step

    steps = {f"{kind} fit": fit_step(quantizer) for kind, quantizer in quantizers.items()}
    steps["density fit"] = lambda: agents["spot"].vae.update(data.sample(BATCH))
    for name, agent in agents.items():
        seen = with_next if name in ("rebrac", "td3_bc") else data
        steps[name] = lambda agent=agent, seen=seen: agent.update(seen.sample(BATCH))
    return steps


def other_updates(options, device):
    """{update: {name: function}} of the other implementations that can be imported."""
    found = {}
    if importlib.util.find_spec("d3rlpy"):
        found["d3rlpy"] = others.d3rlpy_updates(OBS, ACTIONS, CODES, device)
    if options.saq_official:
        found["official"] = others.saq_official_updates(options.saq_official, OBS, ACTIONS, CODES)
    if options.fql_official:
        found["FQL's"] = others.fql_official_updates(options.fql_official, OBS, ACTIONS)
    if options.corl:
        found["CORL"] = others.corl_updates(options.corl, OBS, ACTIONS)
    names = sorted({update for steps in found.values() for update in steps})
    return {update: {name: steps[update] for name, steps in found.items() if update in steps} for update in names}


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


def race(contenders, options, device):
    """Times functions in turn, in bursts. Returns by name the median of calls per second, and that of the first one's
    calls over its own."""
    torch._dynamo.reset()  # it keeps eight graphs of a function at most; all updates are one to it
    rates = {name: [] for name in contenders}
    for turn in range(1 + options.rounds):
        for name, contender in contenders.items():
            Linear.bfloat16 = name == "bfloat16"
            measured = rate(contender, options.burst, device)
            if turn:  # the first one compiles
                rates[name].append(measured)
    first = next(iter(rates.values()))
    ratios = {name: [ours / other for ours, other in zip(first, values, strict=True)] for name, values in rates.items()}
    return {name: (statistics.median(values), statistics.median(ratios[name])) for name, values in rates.items()}


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


# --- Processes side by side ---


def saq_cql_rate(threads, seconds, compile):
    """Steps per second of SAQ-CQL in a process of its own with so many threads."""
    torch.set_num_threads(threads)
    device = prepare("cpu")
    step = fast(updates(device)["saq_cql"], device, compile)
    rate(step, seconds / 2, device)
    return rate(step, seconds, device)


def side_by_side(cores, seconds, compile):
    """Steps per second of one process with a thread for each core, and the sum over processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        together = pool.apply(saq_cql_rate, (cores, seconds, compile))
    with context.Pool(cores) as pool:
        alone = pool.starmap(saq_cql_rate, [(1, seconds, compile)] * cores)
    return together, sum(alone)


def main():
    options = tyro.cli(Options, description=__doc__)
    check_numbers(vars(options), rounds=(1, 1e6), burst=(1e-3, 1e6), transitions=(1, 1e9))
    device, compile = prepare(options.device), "on" if options.compile else "off"
    rows = [["update", "steps_per_second", "products_per_second", "share", "bfloat16_per_second", "bfloat16_ratio"]]
    ours, reduced = updates(device), updates(device) if has_bfloat16(options.device) else {}
    if unknown := set(options.only) - set(ours):
        raise UserError(f"no update is called {min(unknown)!r}: --only takes some of {', '.join(ours)}.")
    if options.only and options.table is not None:
        raise UserError("--table is for all updates: leave --only out, or the table.")
    print("".join(f"{name:>20}" for name in rows[0]))
    steps = {}
    for name, update in ours.items():
        if options.only and name not in options.only:
            continue
        contenders = {"limit": multiply(update, device)}
        contenders = {"ours": fast(update, device, compile)} | contenders
        steps[name] = contenders["ours"]
        if reduced:
            contenders["bfloat16"] = fast(reduced[name], device, compile)
        found = race(contenders, options, device)
        (rate, _), (limit, share) = found["ours"], found["limit"]
        row = [f"{rate:.1f}", f"{limit:.1f}", f"{share:.2f}"]
        if reduced:
            row += [f"{found['bfloat16'][0]:.1f}", f"{1 / found['bfloat16'][1]:.2f}"]
        rows.append([name, *row])
        print("".join(f"{word:>20}" for word in rows[-1]), flush=True)
    if options.table is not None:
        options.table.write_text("".join(",".join(row) + "\n" for row in rows))
    # Others come afterwards: from here on their threads are there, too, and short steps of ours feel it.
    try:
        elsewhere = other_updates(options, device)
    except ImportError as error:
        raise UserError(f"others.py says what a checkout needs: {one_line(error)}") from None
    for update, theirs in elsewhere.items():
        if update not in steps:
            continue
        found = race({"ours": steps[update]} | theirs, options, device)
        for name in theirs:
            print(f"{update}: {name} {found[name][0]:.1f} steps/s, ours {found[name][1]:.1f} times that", flush=True)
    if options.only:
        return

    cores = os.cpu_count()
    if device.type == "cpu" and cores > 1:
        together, alone = side_by_side(cores, 5 * options.burst, compile)
        print(f"SAQ-CQL: {together:.0f} steps/s in a process of {cores} threads, {alone:.0f} in {cores} of one thread")
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
    exit_in_words(main)
