"""benchmark/report.py on run folders made by hand, and the pages of results against the CSVs in benchmark/results."""
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
PAGES = "\n".join((ROOT / "docs" / name).read_text() for name in ("results.md", "early_results.md"))
SUITE = """
seeds = [1, 2, 3]
[[methods]]
label = "A"
script = "mfql_offline.py"
[[methods]]
label = "B"
script = "benchmark/baselines/iql.py"
[tasks]
"hopper medium" = {paper = {A = 98.1}}
"walker" = {}
"""


def make_run(folder, evaluations, single=None, done=None, **args):
    """A run folder: (step, return) of the evaluations, the return of one candidate, the step of done.json."""
    def row(step, family, value):
        return {"step": step, f"{family}/episodic_return": value, f"{family}/episodic_return_std": 2.5,
                f"{family}/episodic_length": 50.0, f"{family}/normalized_score": value / 10}

    rows = []
    for step, value in evaluations:
        rows += [{"step": step - 5, "charts/UPS": 10.0}, {"step": step, "charts/UPS": step + 0.0},
                 row(step, "eval", value)]
    if single is not None:
        rows.append(row(evaluations[-1][0], "eval_n1", single))
    folder.mkdir(parents=True)
    about = dict(transitions=70, episodes=7, mean_return=150.0, best=900.0, best_quarter=450.0, sha256="f00")
    (folder / "args.json").write_text(json.dumps({"args": args, "data": about}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (folder / "done.json").write_text(json.dumps({"step": done}))


@pytest.fixture
def suite(tmp_path):
    """Method A, best of 5, on two tasks; B, one candidate, unfinished with seed 2 and missing on the second task."""
    (tmp_path / "tiny.toml").write_text(SUITE)
    for seed, last in ((1, 500), (2, 700), (3, 900)):
        five = dict(seed=seed, num_candidates=5, num_candidates_eval=None)
        make_run(tmp_path / f"tiny/A__hopper_medium__{seed}", [(10, 990), (20, last)], last - 300, 20, **five)
        make_run(tmp_path / f"tiny/A__walker__{seed}", [(10, 0), (20, 100 * seed)], 50, 20, **five)
        make_run(tmp_path / f"tiny/B__hopper_medium__{seed}", [(10, 100 * seed)] + [(20, 200)] * (seed != 2),
                 done=20 if seed != 2 else None, seed=seed)
    return tmp_path


def run_report(folder, *flags, **kwargs):
    return subprocess.run([sys.executable, "benchmark/report.py", folder / "tiny.toml", "--runs-dir", folder, "--out",
                           folder / "out", *flags], cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_rows_of_a_run(suite):
    _, runs = report.suites.load_suite(str(suite / "tiny.toml"), suite)
    rows, _ = report.read_run(next(run for run in runs if (run.label, run.task, run.seed) == ("A", "walker", 2)))
    report.write_csv(suite / "rows.csv", rows)
    assert (suite / "rows.csv").read_text() == """\
label,script,task,seed,step,family,n,return,return_std,length,score,success,updates_per_s,final
A,mfql_offline.py,walker,2,10,eval,5,0,2.5,50,0,,10,0
A,mfql_offline.py,walker,2,20,eval,5,200,2.5,50,20,,15,1
A,mfql_offline.py,walker,2,20,eval_n1,1,50,2.5,50,5,,15,1
"""
    again = report.read_csv(suite / "rows.csv")
    assert [row["score"] for row in again] == [0, 20, 5] and math.isnan(again[0]["success"])


def test_tables_of_a_suite(suite):
    done = run_report(suite)
    assert done.returncode == 0, done.stderr
    text = (suite / "out/tiny.md").read_text()
    assert done.stdout == f"{text}\nCSVs and pictures: {suite / 'out'}\n"
    for line in (
        "| hopper medium (score) |  |  |  |  |  |  |",
        "|  | A | 5 | 70.0 ± 20.0 | 40.0 ± 20.0 | 3 of 3 | 98.1 |",  # the last evaluations, not the best ones (99.0)
        "|  | B | 1 | 20.0 ± 0.0 | 20.0 ± 0.0 | 2 of 3 |  |",  # one candidate is its own best
        "|  | A | 5 | 20.0 ± 10.0 | 5.0 ± 0.0 | 3 of 3 |  |",
        "|  | B |  | - | - | 0 of 3 |  |",
        "|  | *data, mean* |  | 15.0 |  |  |  |",
        "|  | *data, best quarter of the episodes* |  | 45.0 |  |  |  |",
        "- B, hopper medium, seed 2: unfinished, last evaluation at step 10",
        "- B, walker, seed 3: no evaluation yet",
    ):
        assert line in text.splitlines()
    # six runs, 10 20 30 50 70 90: the middle four; one interval for each number of candidates
    overall = next(line for line in text.splitlines() if line.startswith("| A | "))
    assert re.fullmatch(r"\| A \| 42\.5 \[\d+\.\d, \d+\.\d\] \| \d+\.\d \[.*\] \| 2 of 2 \| 6 of 6 \|", overall)
    assert "| B | " not in text.partition("Interquartile")[2]  # two seeds of one task are no evidence
    assert (suite / "out/tiny_data.csv").read_text() == (
        "task,transitions,episodes,mean_return,mean_score,best_quarter_return,best_quarter_score,sha256\n"
        "hopper medium,70,7,150,15,450,45,f00\nwalker,70,7,150,15,450,45,f00\n")
    if "pip install matplotlib" not in done.stderr:
        assert (suite / "out/tiny_curves.png").stat().st_size > 5000
        assert (suite / "out/tiny_profile.png").stat().st_size > 5000


def test_pages_pictures_and_bad_input_take_a_line(suite):
    (suite / "matplotlib.py").write_text("raise ImportError")
    page = suite / "page.md"
    page.write_text("before\n<!-- table tiny -->\nold\n<!-- end -->\nafter\n")
    done = run_report(suite, "--docs", page, env={"PYTHONPATH": str(suite), "PATH": ""})
    assert (done.returncode, done.stderr) == (0, "no pictures: pip install matplotlib\n")
    text = done.stdout.partition("\nCSVs and pictures: ")[0]
    assert page.read_text() == f"before\n<!-- table tiny -->\n{text}<!-- end -->\nafter\n"
    assert not (suite / "out/tiny.md").exists()
    with (suite / "tiny/A__walker__1/metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    for flags in ((), ("--runs-dir", suite / "none"), ("--no-runs", "--out", suite / "none"),
                  ("--no-runs", "--docs", suite / "tiny.toml")):
        done = run_report(suite, *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, (flags, done.stderr)


def test_other_data_under_one_name_are_refused(suite):
    about = suite / "tiny/A__walker__2/args.json"
    about.write_text(about.read_text().replace("150.0", "151.0"))
    done = run_report(suite)
    assert done.returncode == 2 and "different data" in done.stderr


def test_units(tmp_path):
    """Success in percent where there is no score, else the return, of which no mean over tasks is made."""
    base = dict(label="A", seed=1, family="eval", n=5, final=1, step=9)
    rows = [dict(base, task="pen", score=math.nan, success=0.25, **{"return": 7.0}),
            dict(base, task="ant", score=math.nan, success=math.nan, **{"return": 4321.5})]
    text = report.table([dict(row, seed=seed) for row in rows for seed in (1, 2, 3)])
    assert "| pen (success, %) |" in text and "|  | A | 5 | 25.0 ± 0.0 | - | 3 of 3 |" in text
    assert "| ant (return) |" in text and "|  | A | 5 | 4322 ± 0 | - | 3 of 3 |" in text
    assert "Interquartile" not in text


def test_interquartile_mean():
    assert report.iqm([9, 1, 2, 3, 100, 4, 5, -50]) == (2 + 3 + 4 + 5) / 4
    assert report.iqm([1, 2, 3]) == 2  # a quarter of three is none
    assert list(report.iqm([[0, 4, 8, 100], [1, 1, 1, 1]])) == [6, 1]
    stats = pytest.importorskip("scipy.stats")
    for count in (5, 8, 18, 31):
        values = np.random.default_rng(count).normal(size=count)
        assert report.iqm(values) == pytest.approx(stats.trim_mean(values, 0.25))


def test_interval_by_hand():
    """Strata of (0, 4) and (10, 10): means of 5, 6 and 7 with probabilities 1/4, 1/2 and 1/4; a plain bootstrap of the
    four values would reach from 0 to 10."""
    assert list(report.interval([[0, 4], [10, 10]], report.iqm)) == [5, 7]
    assert list(report.interval([[3, 3], [5, 5, 5]], lambda sample: sample.mean(-1))) == [4.2, 4.2]


def test_interval_is_the_known_one():
    """Of a mean: 1.96 standard errors to both sides; of the interquartile mean: what scipy finds."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = report.interval([values], lambda sample: sample.mean(-1))
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)
    stats = pytest.importorskip("scipy.stats")
    strata = [values[:5], values[5:12] + 9, values[12:17] - 4]
    theirs = stats.bootstrap(strata, lambda *s, axis: stats.trim_mean(np.concatenate(s, axis), 0.25, axis),
                             method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert report.interval(strata, report.iqm) == pytest.approx(tuple(theirs), abs=0.05)


# ---------------------------------------------------------------- docs/results.md, docs/early_results.md
BLOCKS = re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", PAGES, re.DOTALL)


def test_pictures_of_the_pages_are_there():
    pictures = re.findall(r"\]\((.*?\.png)\)", PAGES)
    assert len(pictures) >= len(BLOCKS) >= 9 and all((ROOT / "docs" / picture).exists() for picture in pictures)


@pytest.mark.parametrize("name, text", BLOCKS)
def test_tables_are_those_of_the_csvs(name, text):
    assert text == report.table(*report.load(name, RESULTS))


def test_bold_figures_are_in_the_csvs():
    """In those of the section, or in those that the line names."""
    def values(name):
        paths = [path for path in (RESULTS / f"{name}.csv", RESULTS / f"{name}_data.csv") if path.exists()]
        return [100 * value if key == "success" else value for path in paths for row in report.read_csv(path)
                for key, value in row.items() if key not in (*report.TEXT, "seed", "step", "n", "final")]

    count = 0
    for section in PAGES.split("\n## ")[1:]:
        for line in section.splitlines():
            names = re.findall(r"`(early_\w+)`", line) or re.findall(r"<!-- table (\S+) -->", section)
            for figure in re.findall(r"\*\*(-?[\d.,]+)\*\*", line):
                half_a_digit = 0.5001 * 10 ** -len(figure.partition(".")[2])
                count += 1
                assert any(abs(value - float(figure)) < half_a_digit for name in names for value in values(name)), line
    assert count > 20
