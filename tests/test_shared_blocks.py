"""The scripts share no code at run time, so blocks that they repeat must not drift apart.

A function, class or constant that has one name in two scripts has one text there, letter for letter, so that
`diff` of two scripts shows their algorithms and nothing else.
"""
import ast
import itertools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST = "    # ---- experiment: the same in every script ----"  # begins the half of Args that is the same everywhere
MARK = "    # ---- algorithm ----"  # ends it
MAX_COLUMNS = 119
MAY_DIFFER = {  # name: why two scripts may write it differently
    "Args": "its second half holds the algorithm's own flags; the first half is compared by itself",
    "TASKS": "the values per task are those of each paper",
    "LOCOMOTION": "values per task, found for each algorithm",
    "task_defaults": "it turns a row of TASKS into flags, which are the algorithm's own",
    "Policy": "the papers' networks",
    "TwinCritic": "the papers' networks",
    "sample_times": "an equation of each paper",
    "best_of_n": "an equation of each paper",
    "mean_flow_output_and_target": "an equation of each paper",
    "mean_flow_loss": "an equation of each paper",
    "one_step_action": "an equation of each paper",
    "critic_loss": "an equation of each paper",
    "actor_loss": "an equation of each paper",
    "actor_learning_rate": "the online phase has its own",
    "next_alpha": "the online phase may have its own",
    "make_env": "som_online takes Gymnasium names only, it reads no data",
    "main": "offline and online loops",
    "Agent": "networks, optimisers and schedules are the algorithm's own",
}


def is_script(path):
    """Scripts are the files that have an Args class; conftest.py and the like have none."""
    return any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in ast.parse(path.read_text()).body)


def scripts(folder):
    return sorted(path for path in folder.glob("*.py") if is_script(path))


def definitions(path):
    """{name: text} of a file's top-level functions, classes and constants: whole lines, decorators included."""
    text, found = path.read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id]
        else:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(names, "\n".join(text.splitlines()[first - 1:node.end_lineno]))
    return found


def experiment_half(path):
    """The lines of Args between FIRST and MARK; None where one of them is missing."""
    _, first, rest = definitions(path)["Args"].partition(f"\n{FIRST}\n")
    half, mark, _ = rest.partition(f"\n{MARK}\n")
    return half if first and mark else None


def imported_modules(path):
    """Every module that a file imports anywhere, as the first part of its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module.split(".")[0]] if node.module else (alias.name for alias in node.names)


def complaints(folder):
    """What is wrong with the scripts of a folder, one line each."""
    paths, found = scripts(folder), []
    for path in paths:
        if experiment_half(path) is None:
            found.append(f"{path.name}: Args has no line {FIRST.strip()!r} or no line {MARK.strip()!r}")
        for module in imported_modules(path):
            if (folder / f"{module}.py").exists() or list((folder / module).glob("*.py")):
                found.append(f"{path.name}: imports {module}, which is not a package of requirements.txt")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                found.append(f"{path.name}:{number}: {len(line)} columns")
    for one, other in itertools.combinations(paths, 2):
        left, right = definitions(one), definitions(other)
        for name in sorted((left.keys() & right.keys()) - MAY_DIFFER.keys()):
            if left[name] != right[name]:
                found.append(f"{one.name} and {other.name}: {name} differs")
        if experiment_half(one) != experiment_half(other):
            found.append(f"{one.name} and {other.name}: the experiment half of Args differs")
    return found


def test_scripts_have_not_drifted_apart():
    assert ROOT / "mfql_offline.py" in scripts(ROOT)
    assert complaints(ROOT) == []


def test_exceptions_are_needed():
    """A name that no script has any more must leave the list; every exception has its reason."""
    names = set().union(*(definitions(path) for path in scripts(ROOT)))
    assert set(MAY_DIFFER) <= names
    assert all(len(reason) > 10 for reason in MAY_DIFFER.values())


# ---------------------------------------------------------------- the checker itself, on scripts that drifted
FAKE = '''"""{doc}"""
import os

import numpy as np

RATE: float = 0.5
LOW, HIGH = -1, 1
URLS = (
    "http://one",  # first
    "http://two",
)


@dataclass
class Args:
    # ---- experiment: the same in every script ----
    seed: int = 1
    """seed of everything"""
    track: bool = False
    """log elsewhere"""

    # ---- algorithm ----
    {algorithm}


class Agent:
    """{doc}"""


@cached
def shared(x):
    """Twice x."""
    return 2 * x  # exactly


def {algorithm}_only():
    return None
'''


def fakes(folder, **changes):
    """Two scripts with the same blocks; `changes` maps a text of the second one to another."""
    (folder / "alpha_offline.py").write_text(FAKE.format(doc="Alpha.", algorithm="alpha"))
    text = FAKE.format(doc="Beta.", algorithm="beta")
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "beta_offline.py").write_text(text)
    (folder / "conftest.py").write_text("RATE = 7\n" + "#" * 200)  # no script: nobody minds
    return complaints(folder)


def test_scripts_that_differ_where_they_may(tmp_path):
    assert fakes(tmp_path) == []
    assert fakes(tmp_path, **{'Beta."""\nimport': f'Beta.{"x" * (119 - 11)}"""\nimport'}) == []


@pytest.mark.parametrize("old, new, complaint", [
    ("return 2 * x  # exactly", "return 2*x  # exactly", "shared differs"),
    ("  # exactly", "", "shared differs"),
    ('"""Twice x."""', '"""Double x."""', "shared differs"),
    ("@cached\n", "", "shared differs"),
    ("RATE: float = 0.5", "RATE: float = 0.6", "RATE differs"),
    ("LOW, HIGH = -1, 1", "LOW, HIGH = -1, 2", "HIGH differs"),
    ("  # first", "  # 1st", "URLS differs"),
    ("seed: int = 1", "seed: int = 2", "experiment half"),
    ('"""seed of everything"""', '"""seed"""', "experiment half"),
    ("    track: bool = False\n", "    track: bool = False\n    more: int = 3\n", "experiment half"),
    ("    # ---- algorithm ----\n", "", "no line"),
    ("    # ---- experiment: the same in every script ----\n", "", "no line"),
    ("import os\n", "import alpha_offline\n", "imports alpha_offline"),
    ("import os\n", "from alpha_offline import shared as other\n", "imports alpha_offline"),
    ("import os\n", "from . import other, alpha_offline\n", "imports alpha_offline"),
    ("    return None\n", "    import alpha_offline\n", "imports alpha_offline"),
    ("import os\n", "import conftest\n", "imports conftest"),
    ('Beta."""\nimport', f'Beta.{"x" * (120 - 11)}"""\nimport', "beta_offline.py:1: 120 columns"),
    ("seed: int = 1", "seed: int = 1" + " " * 120, "columns"),
])
def test_drift_is_found(tmp_path, old, new, complaint):
    """Each change of one of two equal scripts must be noticed, and named."""
    assert any(complaint in line for line in fakes(tmp_path, **{old: new}))


def test_drift_in_a_third_script_is_found(tmp_path):
    """All pairs are compared, not only neighbours."""
    fakes(tmp_path)
    (tmp_path / "aaa.py").write_text(FAKE.format(doc="Third.", algorithm="third").replace("0.5", "0.7"))
    assert [line.split(": ")[0] for line in complaints(tmp_path)] == [
        "aaa.py and alpha_offline.py", "aaa.py and beta_offline.py"]
