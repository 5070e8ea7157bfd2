"""The scripts are copies of one another but for the algorithm: what they share may not drift apart."""

import ast
import difflib
import io
import itertools
import tokenize

import pytest
from conftest import ROOT

SCRIPTS = ["saq_cql.py", "saq_iql.py", "saq_brac.py", "saq_bc.py"]
WITHOUT = ["baselines/rebrac.py", "baselines/fql.py"]  # a quantizer
ONLINE = ["baselines/spot.py"]  # main fits a model of the data as well, and goes online
BASELINES = [*WITHOUT, "baselines/awac.py", "baselines/bear.py", *ONLINE]
SHARED = {"defaults", "parse_args", "evaluate", "assess", "Run", "learn", "report", "plot", "main"}
OWN = {"Args", "Actor", "Critic", "make_agents"}  # alike in name only


def definitions(script):
    tree = ast.parse((ROOT / script).read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("script", SCRIPTS + BASELINES)
def test_what_every_script_has(script):
    assert set(definitions(script)) >= SHARED


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS + BASELINES, 2)))
def test_shared_definitions_are_the_same(one, other):
    ours, theirs = definitions(one), definitions(other)
    own = OWN | {"network"}
    if one in WITHOUT or other in WITHOUT:
        own = own | {"main"}  # there is no quantizer to fit
    if one in ONLINE or other in ONLINE:
        own = own | {"main"}  # there are phases more
    if (one in WITHOUT) != (other in WITHOUT):
        own = own | {"defaults", "parse_args"}  # nor one to choose
    for name in (ours.keys() & theirs.keys()) - own:
        assert ast.dump(ours[name]) == ast.dump(theirs[name]), f"{name} differs between {one} and {other}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_arguments_are_the_same(script):
    """Name, type, default and help of every argument up to the algorithm's own, which come last."""
    head = "    # --- Every agent ---"

    def block(file):
        lines = (ROOT / file).read_text().splitlines()
        start = lines.index("class Args:")
        end = next(i for i in range(lines.index(head, start) + 1, len(lines)) if lines[i].startswith("    # ---"))
        return lines[start:end]

    assert block(script) == block("saq_cql.py")


def code_lines(source):
    """The numbers of the lines that hold code: a token that is neither comment nor docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_what_counts_as_code():
    source = '"""Docstring\n\nof two."""\n# comment\n\nx = """text\nof two"""  # code\ny = [\n    1,\n]\n'
    assert code_lines(source) == {6, 7, 8, 9, 10}


@pytest.mark.parametrize("script", BASELINES)
def test_baselines_stay_short(script):
    assert len(code_lines((ROOT / script).read_text())) <= 450


@pytest.mark.parametrize("script", BASELINES)
def test_baselines_run_as_the_scripts_do(script):
    """The arguments of the task and of the run, name, type, default and help."""

    def block(file):
        text = (ROOT / file).read_text()
        return text[text.index("    # --- Task and data ---") : text.index("    video: int")]

    assert block(script) == block("saq_cql.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_short(script):
    """In lines of code; and the algorithm comes first."""
    source = (ROOT / script).read_text()
    assert len(code_lines(source)) <= 420
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert max(f.end_lineno - f.lineno + 1 for f in functions) <= 60
    (agent,) = (node for name, node in definitions(script).items() if name.startswith("Discrete"))
    assert agent.lineno < 120


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_a_diff_shows_the_algorithm_alone(one, other):
    """At most 45% of the lines of the longer script are not the other's."""
    a, b = ((ROOT / script).read_text().splitlines() for script in (one, other))
    common = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert 1 - common / max(len(a), len(b)) <= 0.45
