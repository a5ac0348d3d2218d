"""README.md and docs/: links, paths, flags, commands and figures are those of the files, and the snippets run.

docs/results.md and docs/early_results.md have commands of old commits, and their figures are tested in test_report.py:
here only their links are.
"""
import ast
import csv
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys

import pytest
import tyro

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
OURS = {name: PAGES[name] for name in PAGES if not name.endswith("results.md")}
FOLDERS = [ROOT / folder for folder in (".", "data", "benchmark", "benchmark/baselines", "tests")]
SMALL = ("--env-id Hopper-v5 --dataset-path mine.hdf5 --no-cuda --offline-steps 2 --eval-episodes 1 --batch-size 8 "
         "--policy-width 8 --policy-depth 1 --critic-width 8 --critic-depth 1 --run-name")


def code(text):
    """What stands between backticks or in an indented or fenced block without a language, one string each."""
    fenced = r"```\w*\n.*?```"
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", re.sub(fenced, "", text, flags=re.DOTALL))]
    return inline + [line.strip() for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]


def commands():
    """(page, words) of each python command, without what stands around it; a shell's variable becomes 1."""
    for page, text in OURS.items():
        for part in (part for line in code(text) for part in re.split(r" && |; |  #", line)):
            if match := re.search(r"(?:^| )python ((?:-m |[\w/]+\.py)[^']*)", part):
                yield page, shlex.split(re.sub(r"\$\w+", "1", match[1]))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def find(file):
    """A Python file by its path in the repository, or by its name alone."""
    return next((folder / file for folder in FOLDERS if (folder / file).is_file()), None)


def load_module(path):
    if path.parent == ROOT:
        return importlib.import_module(path.stem)
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(f"data.{path.stem}" if path.parent.name == "data" else path.stem)


# ---------------------------------------------------------------- links, paths, flags, commands
def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    assert not [link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).exists()]


@pytest.mark.parametrize("page", OURS)
def test_files_that_are_named_exist(page):
    words = " ".join(code(OURS[page])).split()
    paths = [word for word in words if re.fullmatch(r"(data|docs|benchmark|tests)/[\w./-]*[\w/]", word)]
    files = [word for word in words if re.fullmatch(r"\w+\.py", word)]
    assert not [path for path in paths if not (ROOT / path).exists()] + [file for file in files if not find(file)]


def known_flags():
    flags = {"--help", "--index-url"}  # the latter is pip's
    for path in (path for folder in FOLDERS[:4] for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                names = [line.target.id.replace("_", "-") for line in node.body if isinstance(line, ast.AnnAssign)]
                flags |= {prefix + name for name in names for prefix in ("--", "--no-")}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                flags |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return flags


@pytest.mark.parametrize("page", [page for page in OURS if page != "docs/cluster.md"])  # has Slurm's and Ray's as well
def test_flags_exist(page):
    text = re.sub(r"```diff\n.*?```", "", OURS[page], flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known_flags()


def test_reference_names_every_flag_of_the_scripts():
    scripts = [importlib.import_module(path.stem) for path in ROOT.glob("*.py")]
    flags = {f"`--{name.replace('_', '-')}`" for module in scripts for name in module.Args.__dataclass_fields__}
    assert not {flag for flag in flags if flag not in PAGES["docs/reference.md"]}


@pytest.mark.parametrize("page, words", list(commands()), ids=str)
def test_commands_parse(page, words, monkeypatch, capsys):
    """Without running them; those without `Args` that take no flags only have to exist."""
    file, *rest = words
    if file == "-m":
        assert rest[0] == "pytest" and all((ROOT / path).exists() for path in rest[1:])
        return
    path = find(file)
    assert path is not None, file
    if "matplotlib" in path.read_text() and importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    module, rest = load_module(path), [word for word in rest if word != "--help"]
    if file == "data/fetch.py":
        for name in ("fetch", "from_run"):
            monkeypatch.setattr(module, name, lambda *_: "parsed")
        monkeypatch.setattr(module, "leave_nothing_when_stopped", lambda: None)
        monkeypatch.setattr(sys, "argv", words)
        assert module.main() == 0 and "parsed" in capsys.readouterr().out
    elif hasattr(module, "Args") and module.__name__ != "bandit":
        args = tyro.cli(module.Args, args=rest)
        if hasattr(args, "suite"):
            assert (ROOT / "benchmark" / "suites" / f"{args.suite}.toml").exists()
    else:
        assert {word for word in rest if word.startswith("-")} <= known_flags()


def test_there_are_commands():
    assert len(list(commands())) > 30


# ---------------------------------------------------------------- figures
def test_lines_in_the_table_are_those_of_the_files():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", PAGES["README.md"], re.MULTILINE)
    assert {file: int(lines) for file, lines in rows} == {  # pixels have a page of their own
        path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py") if "pixels" not in path.name}


def rows_of(name):
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


def finished(names):
    """(script, "best of N" or "N = 1") to the final figures of each label and task: lists of (N, values)."""
    found = {}
    for name in names:
        runs = {}
        for row in rows_of(RESULTS / f"{name}.csv"):
            if row["final"] == "1":
                key = row["script"], row["family"], row["label"], row["task"], row["n"]
                runs.setdefault(key, []).append(float(row["score"] or row["return"]))
        for (script, family, _, _, n), values in runs.items():
            found.setdefault((script, family), []).append((n, values))
    return found


def rounds_to(value, figure):
    return abs(value - float(figure.replace(",", ""))) < 0.5001 * 10 ** -len(figure.partition(".")[2])


def says(text, values):
    """Whether `text`, "MEAN" or "MEAN ± DEVIATION", is what these values come to."""
    expected = [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    figures = text.split(" ± ")
    return len(figures) == len(expected) and all(map(rounds_to, expected, figures))


def test_scores_in_the_table_are_those_of_the_csvs():
    names, table = re.search(r"<!-- table: ([\w -]+?) -->\n(.*?)<!-- end -->", PAGES["README.md"], re.DOTALL).groups()
    found, count = finished(names.split()), 0
    for line in table.splitlines()[2:]:
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        best, n = re.fullmatch(r"(?:return )?(.*) \(N = (\d+)\)", cells[5]).groups()
        assert any(number == n and says(best, values) and len(values) == int(cells[7])
                   for number, values in found[cells[0], "eval"]), line
        assert any(says(cells[6].removeprefix("return "), values) and len(values) == int(cells[7])
                   for _, values in found[cells[0], "eval_n1"]), line
        count += 1
    assert count >= 4


@pytest.mark.parametrize("page", OURS)
def test_bold_figures_are_in_the_files_that_their_paragraph_names(page):
    for paragraph in OURS[page].split("\n\n"):
        figures = re.findall(r"\*\*(-?[\d.,]+)\*\*", paragraph)
        names = [name for name in re.findall(r"`(\w+)`", paragraph) if (RESULTS / f"{name}.csv").exists()]
        paths = [path for name in names for path in (RESULTS / f"{name}.csv", RESULTS / f"{name}_data.csv")]
        values = [float(value) for path in paths if path.exists() for row in rows_of(path)
                  for key, value in row.items() if key.endswith(("return", "score")) and value
                  and row.get("final", "1") == "1"]
        for figure in figures:
            assert any(rounds_to(value, figure) for value in values), figure


def test_citation_names_the_papers_of_the_scripts():
    heads = [path.read_text()[:900] for path in ROOT.glob("*.py")]
    numbers = {number for head in heads for number in re.findall(r"arXiv (\d{4}\.\d{5})", head)}
    for page in ((ROOT / "CITATION.cff").read_text(), PAGES["README.md"]):
        assert numbers <= set(re.findall(r"(?:arXiv:|abs/)(\d{4}\.\d{5})", page)), numbers


# ---------------------------------------------------------------- snippets
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in; signals and torch's switches are put back."""
    import torch

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore")
def test_snippets_run(folder):
    """Own data from docs/data.md, OFQL on them, its policy as docs/reference.md uses it, and its changed copy."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import export

    import ofql_offline

    own_data, = blocks("docs/data.md", "python")
    exec(own_data, {})
    assert ofql_offline.main([*SMALL.split(), "NAME"]) == 0
    export.main(["runs/NAME"])
    scope, snippets = {}, blocks("docs/reference.md", "python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, scope)
        assert scope["action"].shape == (3,) and scope["action"].abs().max() <= 1
        scope["env"].step(scope.pop("action").numpy())

    difference, = blocks("docs/reference.md", "diff")
    assert len([line for line in difference.splitlines() if line[0] in "+-"]) <= 20
    (folder / "ofql_offline.py").write_text((ROOT / "ofql_offline.py").read_text())
    subprocess.run(["git", "apply", "-"], input=difference, text=True, check=True, env={
        **os.environ, "GIT_DIR": str(folder / "none"), "GIT_CEILING_DIRECTORIES": str(folder)})
    spec = importlib.util.spec_from_file_location("ofql_copy", folder / "ofql_offline.py")
    copy = sys.modules["ofql_copy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.main([*SMALL.split(), "COPY", "--action-cost", "0.5"]) == 0
    assert json.loads((folder / "runs/COPY/args.json").read_text())["args"]["action_cost"] == 0.5


def test_speed_tables_are_the_printed_ones():
    printed = (RESULTS / "speed_cpu.md").read_text().strip().split("\n\n")
    tables = [part for part in printed if part.startswith("|")]
    assert len(tables) == 3 and all(table in PAGES["docs/speed.md"] for table in tables)
