"""The scripts are copies of one another but for the algorithm: what they share may not drift apart."""

import ast
import difflib
import itertools

import pytest
from conftest import ROOT

SCRIPTS = ["saq_cql.py", "saq_iql.py", "saq_brac.py", "saq_bc.py"]
SHARED = {"parse_args", "make_eval_envs", "choose", "evaluate", "assess", "Run", "learn", "report", "main"}
OWN = {"Args", "Actor", "make_agents"}  # alike in name only


def definitions(script):
    tree = ast.parse((ROOT / script).read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_has(script):
    assert set(definitions(script)) >= SHARED


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_shared_definitions_are_the_same(one, other):
    ours, theirs = definitions(one), definitions(other)
    for name in (ours.keys() & theirs.keys()) - OWN:
        assert ast.dump(ours[name]) == ast.dump(theirs[name]), f"{name} differs between {one} and {other}"


def test_the_actor_of_brac_is_the_actor_of_cql():
    assert ast.dump(definitions("saq_cql.py")["Actor"]) == ast.dump(definitions("saq_brac.py")["Actor"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_arguments_are_the_same(script):
    """Name, type, default and help of every argument up to the algorithm's own, which come last."""
    head = "    # --- Both agents ---"

    def block(file):
        lines = (ROOT / file).read_text().splitlines()
        start = lines.index("class Args:")
        end = next(i for i in range(lines.index(head, start) + 1, len(lines)) if lines[i].startswith("    # ---"))
        return lines[start:end]

    assert block(script) == block("saq_cql.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_short(script):
    lines = (ROOT / script).read_text().splitlines()
    assert len(lines) <= 550
    functions = [n for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.FunctionDef)]
    assert max(f.end_lineno - f.lineno + 1 for f in functions) <= 60


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_a_diff_shows_the_algorithm_alone(one, other):
    """At most 45% of the lines of the longer script are not the other's."""
    a, b = ((ROOT / script).read_text().splitlines() for script in (one, other))
    common = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert 1 - common / max(len(a), len(b)) <= 0.45
