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
MAY_DIFFER = {  # name: why any two scripts may write it differently
    "Args": "its second half holds the algorithm's own flags; the first half is compared by itself",
    "task_defaults": "it turns a row of TASKS into flags, which are the algorithm's own",
    "Agent": "networks, optimisers and schedules are the algorithm's own; methods are compared by themselves",
    "Agent.update": "the online phase has schedules of its own",
    "main": "offline and online loops; the functions within are compared by themselves",
    "main.save": "online runs have a replay buffer",
    "main.update": "batches of the data or of what the online phase has filled",
}
PAPERS_DIFFER = {"TASKS", "LOCOMOTION", "Policy", "TwinCritic", "sample_times", "mean_flow_output_and_target",
                 "mean_flow_loss", "one_step_action", "best_of_n", "critic_loss", "actor_loss",
                 "Agent.__init__", "Agent.act", "Agent.charts"}
PAPER = {"mfql_offline_to_online.py": "mfql_offline.py"}  # of the same paper, whose networks and equations it shares
MUST_SHARE = {  # names that may not be renamed in one of these scripts alone
    ("mfql_offline.py", "mfql_offline_to_online.py"): {
        "gelu", "RMSNorm", "Block", "Policy", "TwinCritic", "sample_time", "mean_flow_output_and_target",
        "mean_flow_loss", "one_step_action", "best_of_n", "critic_loss", "actor_loss", "losses",
        "actor_learning_rate", "next_alpha_factor", "TASKS", "LOCOMOTION", "BUNDLED", "Agent.__init__",
        "Agent.act", "Agent.charts"},
    ("mfql_offline.py", "ofql_offline.py", "mfql_offline_to_online.py"): {
        "D4RL", "load_hdf5", "load_minari", "prepare"},
    ("mfql_offline.py", "ofql_offline.py", "mfql_offline_to_online.py", "som_online.py"): {
        "RANGES", "BadInput", "blame", "make_env", "sample", "capture", "evaluate", "load", "parse_args", "main.log",
        "main.evaluate_and_log", "main.interrupt", "__main__"},
}


def is_script(path):
    """Scripts are the files that have an Args class; conftest.py and the like have none."""
    return any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in ast.parse(path.read_text()).body)


def scripts(folder):
    return sorted(path for path in folder.glob("*.py") if is_script(path))


def definitions(path):
    """{name: text} of a file's top-level functions, classes and constants, of the functions in `main` and `Agent` as
    main.name and Agent.name, and of what only a program runs as __main__: whole lines, decorators included."""
    text, found = path.read_text(), {}
    nodes = [(node, "") for node in ast.parse(text).body]
    for node, _ in list(nodes):
        if getattr(node, "name", None) in ("main", "Agent"):
            nodes += [(inner, f"{node.name}.") for inner in node.body if isinstance(inner, ast.FunctionDef)]
    for node, prefix in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [prefix + node.name]
        elif isinstance(node, ast.Assign):
            names = [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id]
        elif isinstance(node, ast.If):
            names = ["__main__"]
        else:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        lines = "\n".join(text.splitlines()[first - 1:node.end_lineno])
        found |= dict.fromkeys(names, found.get("__main__", "") + lines if isinstance(node, ast.If) else lines)
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
        same_paper = PAPER.get(one.name, one.name) == PAPER.get(other.name, other.name)
        exceptions = MAY_DIFFER.keys() | (set() if same_paper else PAPERS_DIFFER)
        for name in sorted((left.keys() & right.keys()) - exceptions):
            if left[name] != right[name]:
                found.append(f"{one.name} and {other.name}: {name} differs")
        if experiment_half(one) != experiment_half(other):
            found.append(f"{one.name} and {other.name}: the experiment half of Args differs")
    return found


def test_scripts_have_not_drifted_apart():
    assert ROOT / "mfql_offline.py" in scripts(ROOT)
    assert complaints(ROOT) == []


def test_what_is_shared_has_kept_its_name():
    """A block that one script renames is compared no more."""
    for names, shared in MUST_SHARE.items():
        for name in names:
            assert shared <= definitions(ROOT / name).keys(), name


def test_exceptions_are_needed():
    """An exception that no two scripts make use of must leave the list."""
    texts = [definitions(path) for path in scripts(ROOT)]
    for name in MAY_DIFFER.keys() | PAPERS_DIFFER:
        assert len({text[name] for text in texts if name in text}) > 1, name
    assert all(len(reason) > 10 for reason in MAY_DIFFER.values())


# ---------------------------------------------------------------- the checker itself, on scripts that drifted
FAKE = '''"""{doc}"""
import os

import numpy as np

if __name__ == "__main__":
    print("early")

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

    def update(self):
        return "{doc}"

    def load(self):
        return 3


@cached
def shared(x):
    """Twice x."""
    return 2 * x  # exactly


def {algorithm}_only():
    return None


def main():
    def log(x):
        print(x)


class Policy:
    """{doc}"""


if __name__ == "__main__":
    main()
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
    ("        print(x)", "        print(x, x)", "main.log differs"),
    ("        return 3", "        return 4", "Agent.load differs"),
    ("    main()\n", "    main(1)\n", "__main__ differs"),
    ('print("early")', "print()", "__main__ differs"),
])
def test_drift_is_found(tmp_path, old, new, complaint):
    """Each change of one of two equal scripts must be noticed, and named."""
    assert any(complaint in line for line in fakes(tmp_path, **{old: new}))


def test_scripts_of_one_paper_share_its_networks(tmp_path, monkeypatch):
    """Which scripts of two papers need not."""
    monkeypatch.setitem(PAPER, "beta_offline.py", "alpha_offline.py")
    assert fakes(tmp_path) == ["alpha_offline.py and beta_offline.py: Policy differs"]


def test_drift_in_a_third_script_is_found(tmp_path):
    """All pairs are compared, not only neighbours."""
    fakes(tmp_path)
    (tmp_path / "aaa.py").write_text(FAKE.format(doc="Third.", algorithm="third").replace("0.5", "0.7"))
    assert [line.split(": ")[0] for line in complaints(tmp_path)] == [
        "aaa.py and alpha_offline.py", "aaa.py and beta_offline.py"]
