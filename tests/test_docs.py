"""The pages: what they run, runs; what they link, exists."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, dataset, only_run, run_forked, succeeded, write
from test_scripts_agree import BASELINES, SCRIPTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python(*words, cwd=ROOT, **environment):
    process = subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 175


def test_the_loop_of_ones_own(tmp_path):
    """The README's Python block as it stands, beside copies of the two files that it names."""
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    for name in ("saq_iql.py", "vqvae.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "loop.py").write_text(block + "\nprint(tuple(actions.shape))\n")
    process = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout == "(3, 2)\n", process.stderr
    assert (tmp_path / "agent.pt").exists()


def test_what_a_script_has_trained_acts_elsewhere(tmp_path):
    """The README's second block, with the folder of a run on data of its sizes, in a folder with the two files."""
    *_, block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    for name in ("saq_iql.py", "vqvae.py"):
        shutil.copy(ROOT / name, tmp_path)
    write(tmp_path / "mine.npz", dataset(obs_dim=5, action_dim=2))
    words = "--env none --dataset-path mine.npz --vq-steps 5 --steps 5 --no-compare --quantizer mixture --num-codes 7"
    words = words.replace("mine.npz", str(tmp_path / "mine.npz")).split()
    succeeded(run_forked(*words, "--out", tmp_path / "runs", script="saq_iql.py"))
    (tmp_path / "act.py").write_text(
        block.replace("NAME", only_run(tmp_path / "runs").name) + "\nprint(actions.shape, actions.abs().max() <= 1)\n"
    )
    assert python("act.py", cwd=tmp_path).stdout == "torch.Size([3, 2]) tensor(True)\n"


def test_the_walkthrough(tmp_path):
    """All of its cells, with few steps; figures go where they are asked to go."""
    python(ROOT / "demos" / "walkthrough.py", WALKTHROUGH_STEPS="10", WALKTHROUGH_FIGURES=str(tmp_path))
    assert list(tmp_path.glob("*.png"))


def test_the_drawing_is_what_its_script_draws(tmp_path):
    before = (ROOT / "docs" / "method.svg").read_bytes()
    try:
        python(ROOT / "demos" / "method.py")
        assert (ROOT / "docs" / "method.svg").read_bytes() == before
    finally:
        (ROOT / "docs" / "method.svg").write_bytes(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)  # code has brackets of its own
    links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^":]+)"', text)
    for link in links:
        assert (page.parent / link).exists(), link
    names = re.findall(r"\[`([\w.]+)`\]\(\.\./((?:baselines/)?\w+\.py)\)", text)  # a function or a class, and its file
    for name, file in names:
        assert re.search(rf"(def |class |\n){name.split('.')[-1]}\b", (ROOT / file).read_text()), name


@pytest.mark.parametrize("script", [*SCRIPTS, *BASELINES])
def test_every_logged_number_is_explained(script):
    """Every key that a script's losses and diagnoses hold stands in its page."""
    page = "baselines" if script in BASELINES else script.removesuffix(".py")
    code, page = (ROOT / script).read_text(), (ROOT / "docs" / f"{page}.md").read_text()
    agents = code[code.index("(nn.Module)") : code.index("def make_agents")]
    keys = set(re.findall(r'"(\w+)": [\w.()]', agents)) - {"scores", "reference"}  # of result.json
    assert keys
    assert sorted(key for key in keys if f"`{key}`" not in page) == []


def test_the_environments_without_the_scripts(tmp_path):
    """The example for those who miss D4RL, beside a copy of the folder, where there is no PyTorch."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), flags=re.S)
    shutil.copytree(ROOT / "offline_envs", tmp_path / "offline_envs")
    write(tmp_path / "hopper_medium-v2.hdf5", dataset(obs_dim=11, action_dim=3))
    (tmp_path / "alone.py").write_text("import sys\nsys.modules['torch'] = None\n" + block)
    process = python("alone.py", cwd=tmp_path, D4RL_DATASET_DIR=str(tmp_path))
    shapes, score = process.stdout.splitlines()
    assert shapes == "(400, 11) (400, 3)"
    assert -1 < float(score.removeprefix("a random policy scores ")) < 3
