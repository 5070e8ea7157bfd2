"""Every command of the README works, shortened; what it claims about files holds."""

import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, dataset, run_script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if "python " in line]
SCRIPTS = [command.split("&&")[-1].strip() for command in COMMANDS if "saq_cql.py" in command]
TINY = "--vq-steps 20 --steps 20 --eval-every 10 --eval-episodes 1 --final-episodes 1 --compile off"


def test_the_two_commands_are_there():
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements"
    assert f"{install}.txt && python saq_cql.py" in README
    assert f"{install}-test.txt && pytest" in README
    assert f"{install}-test.txt && pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", sorted(set(SCRIPTS)))
def test_saq_cql_commands(command, tmp_path):
    words = shlex.split(command)[1:]
    if "--resume" in words or "--eval-only" in words:  # of the run that this makes
        assert run_script("--out", tmp_path, "--no-compare", *TINY.split()).returncode == 0
        words[words.index("DIR")] = str(next(tmp_path.iterdir()))
        assert run_script(*words[1:]).returncode == 0
        return
    if "--help" in words:
        assert "--num-codes" in run_script("--help").stdout
        return
    if "mine.npz" in words or "mine.hdf5" in words:  # stands for the reader's own file
        at = words.index("--dataset-path") + 1
        words[at] = str(tmp_path / words[at])
        save(tmp_path / Path(words[at]).name)
    elif "--env" in words:
        pytest.skip("downloads a dataset")
    process = run_script(*words[1:], *TINY.split(), "--out", tmp_path / "runs")
    assert process.returncode == 0, process.stderr
    assert (next((tmp_path / "runs").iterdir()) / "checkpoint.pt").exists()


def test_the_benchmark(tmp_path):
    process = run_script("--rounds", 1, "--burst", 0.05, "--no-compile", script="benchmarks/speed.py")
    assert process.returncode == 0, process.stderr
    rows = process.stdout.splitlines()[-3:]
    assert [row[:20].strip() for row in rows] == ["quantizer fit", "discrete update", "continuous update"]
    assert all(float(row.split("%")[0].split()[-1]) > 0 for row in rows)


def save(path):
    if path.suffix == ".npz":
        np.savez(path, **dataset())
    else:
        with h5py.File(path, "w") as file:
            for key, array in dataset().items():
                file[key] = array


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
