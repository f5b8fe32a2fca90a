"""The house: maths <- parts <- scripts, read from every import statement, in functions too."""

import ast
import graphlib
import os
from pathlib import Path

import pytest
from conftest import ROOT

MATHS = {"divergences", "loss"}
SCRIPTS = {"sample", "train", "evaluate", "landscape", "study"}
TOY = {"toy.world", "toy.make"}


def module_name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


FILES = [path for folder in ("", "parts", "toy") for path in Path(ROOT, folder).glob("*.py")]
MODULES = {module_name(path): path for path in FILES}
PARTS = {name for name in MODULES if name.startswith("parts.")}


def imports(path):
    """Names of our own modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_the_graph_sees_the_imports():
    """Or every test below would pass on nothing."""
    assert GRAPH["sample"] >= {"loss", "parts.model", "parts.common"}
    assert GRAPH["parts.judges"] >= {"toy.world"}
    assert len(PARTS) >= 10


def test_the_top_level_is_the_maths_and_the_scripts():
    assert {name for name in MODULES if "." not in name} == MATHS | SCRIPTS
    assert {name for name in MODULES if name.startswith("toy.")} == TOY


def test_no_module_imports_itself_by_any_way_round():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downwards(name):
    if name in MATHS:
        allowed = set()
    elif name in PARTS:
        allowed = MATHS | PARTS
        if name.startswith("parts.judges"):
            allowed = allowed | {"toy.world"}  # the judge `taste`
    elif name in SCRIPTS:
        allowed = MATHS | PARTS | {"sample"}  # so train and evaluate do not know each other
    elif name == "toy.world":
        allowed = set()
    else:
        allowed = set(MODULES)
    assert GRAPH[name] <= allowed, f"{name} imports {sorted(GRAPH[name] - allowed)}"


def test_parts_and_toy_need_no_init_file():
    """Scripts run from the root; packages are plain folders."""
    assert not list(Path(ROOT).glob("*/__init__.py"))
    assert os.path.exists(os.path.join(ROOT, "toy", "world.py"))
