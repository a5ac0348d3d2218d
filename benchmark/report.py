"""Makes the tables and pictures of a suite of runs: tidy CSVs first, everything else from them.

    python benchmark/report.py SUITE      # from run folders, into runs/SUITE: SUITE.csv, SUITE_data.csv, .md, pictures
    python benchmark/report.py SUITE --out benchmark/results --docs docs/results.md       # as the repository's own are
    python benchmark/report.py SUITE --no-runs --docs docs/results.md                    # the page from the CSVs alone

A figure is the mean over seeds of the *last* evaluation of finished runs, never of the best one. Over tasks: the
interquartile mean of all runs with a 95 % bootstrap interval stratified by task (Agarwal et al., 2021). A task's unit
is the normalised score if it has a reference, else success in percent, else the return, of which no mean over tasks is
made. The pictures need matplotlib (pip install matplotlib).
"""
import csv
import itertools
import json
import math
import pathlib
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import suite as suites  # noqa: E402
from suite import BadInput  # noqa: E402

METRICS = {"return": "episodic_return", "return_std": "episodic_return_std", "length": "episodic_length",
           "score": "normalized_score", "success": "success_rate"}
TEXT = "label", "script", "task", "family", "run", "sha256"  # columns that hold no number


@dataclass
class Args:
    suite: Annotated[str, tyro.conf.Positional]
    """suite of benchmark/suites, or a path of a TOML file; with --no-runs also the name of a CSV alone"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """the folder that suite.py was given"""
    out: pathlib.Path | None = None
    """folder of CSVs, table and pictures; default: the suite's run folders, with --no-runs benchmark/results"""
    runs: bool = True
    """--no-runs: table and pictures from the CSVs in --out, which stay as they are"""
    docs: pathlib.Path | None = None
    """page whose block <!-- table SUITE --> .. <!-- end --> gets the table, instead of <suite>.md"""


# ---------------------------------------------------------------- run folders to CSVs
def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path}: no JSON ({error}): remove it and run the suite again") from error


def read_run(run):
    """Rows of the evaluations of a run (of suite.Run), and its args.json; nothing of a run that has not begun."""
    if not (run.folder / "args.json").exists() or not (run.folder / "metrics.jsonl").exists():
        return [], {}
    about = read_json(run.folder / "args.json")
    done = read_json(run.folder / "done.json")["step"] if (run.folder / "done.json").exists() else None
    args, rows, rates = about["args"], [], []
    candidates = args.get("num_candidates_eval") or args.get("num_candidates") or 1  # peers have a single action
    for number, line in enumerate((run.folder / "metrics.jsonl").read_text().splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{run.folder}/metrics.jsonl, line {number}: {error}; suite.py mends it") from error
        step = found["step"]
        if "charts/UPS" in found:
            rates.append((step, found["charts/UPS"]))
        for family in ("eval", "eval_n1"):
            if f"{family}/episodic_return" in found:
                before = max((row["step"] for row in rows if row["step"] < step), default=-1)
                since = [rate for at, rate in rates if before < at <= step]
                rows.append(dict(
                    label=run.label, script=run.script, task=run.task, seed=run.seed, step=step, family=family,
                    n=candidates if family == "eval" else 1,
                    **{name: found.get(f"{family}/{key}", math.nan) for name, key in METRICS.items()},
                    updates_per_s=float(np.mean(since)) if since else math.nan, final=int(step == done)))
    return rows, about


def describe_data(task, rows, about):
    """The data's own figures, in scores too: a score is linear in the return, so two evaluations give the line."""
    data = about["data"]
    found = dict(task=task, **{key: data.get(key, math.nan) for key in ("transitions", "episodes")})
    pairs = sorted((row["return"], row["score"]) for row in rows if not math.isnan(row["score"]))
    (r0, s0), (r1, s1) = (pairs[0], pairs[-1]) if pairs else ((0, 0), (0, 0))
    for name, key in (("mean", "mean_return"), ("best_quarter", "best_quarter")):
        value = data.get(key, math.nan)
        found[f"{name}_return"] = value
        found[f"{name}_score"] = s0 + (value - r0) * (s1 - s0) / (r1 - r0) if r0 < r1 else math.nan
    return {**found, "sha256": data["sha256"]}


def write_csv(path, rows):
    def text(value):
        return ("" if math.isnan(value) else f"{value:.7g}") if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: text(value) for key, value in row.items()} for row in rows)


def read_csv(path):
    """Rows as dictionaries; an empty cell of a column of numbers is nan."""
    def value(key, text):
        return text if key in TEXT else int(text) if text.lstrip("-").isdigit() else float(text or "nan")

    with path.open(newline="") as file:
        return [{key: value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


# ---------------------------------------------------------------- statistics
def iqm(values):
    """Interquartile mean over the last axis, as scipy.stats.trim_mean(values, 0.25)."""
    count = np.shape(values)[-1]
    return np.sort(values, axis=-1)[..., count // 4:count - count // 4].mean(-1)


def interval(strata, statistic, draws=10_000):
    """Percentiles 2.5 and 97.5 of the statistic, when each stratum (the seeds of a task) is drawn with replacement."""
    random = np.random.default_rng(0)
    sample = np.concatenate([np.asarray(s)[random.integers(len(s), size=(draws, len(s)))] for s in strata], axis=1)
    return np.percentile(statistic(sample), (2.5, 97.5), axis=0)


# ---------------------------------------------------------------- CSVs to tables
def units(rows):
    """{task: name of the column that its figures come from}."""
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        found[task] = next((unit for unit in ("score", "success")
                            if not any(math.isnan(row[unit]) for row in of_task)), "return")
    return found


def figure(row, unit):
    return 100 * row["success"] if unit == "success" else row[unit]


def finals(rows):
    """{(label, task): {seed: (N, figure with N candidates, figure with one)}} of finished runs."""
    unit, found = units(rows), {}
    for family in ("eval", "eval_n1"):
        for row in rows:
            if row["final"] and row["family"] == family:
                seeds, value = found.setdefault((row["label"], row["task"]), {}), figure(row, unit[row["task"]])
                if family == "eval":
                    seeds[row["seed"]] = row["n"], value, value if row["n"] == 1 else math.nan
                elif row["seed"] in seeds:
                    seeds[row["seed"]] = *seeds[row["seed"]][:2], value
    return found


def strata(found, unit, label, column):
    """Figures of a method, task by task, where a mean over tasks makes sense and there are three seeds or more."""
    values = ([seed[column] for seed in seeds.values()] for (name, task), seeds in found.items()
              if name == label and unit[task] != "return" and len(seeds) > 2)
    return [of_task for of_task in values if not np.isnan(of_task).any()]


def spread(values):
    """Mean ± standard deviation (of n - 1) over seeds."""
    if len(values) == 0 or np.isnan(values).any():
        return "-"
    digits = 0 if max(np.abs(values)) >= 1000 else 1
    mean = round(np.mean(values), digits) + 0.0  # no "-0.0"
    return f"{mean:.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def table(rows, data=(), plan=None, planned=()):
    """The Markdown text. plan: the suite's TOML, planned: its runs; without them, what is in the rows is the plan."""
    runs = (dict.fromkeys((run.label, run.task, run.seed) for run in planned)
            or dict.fromkeys((row["label"], row["task"], row["seed"]) for row in rows))
    rows = [row for row in rows if (row["label"], row["task"], row["seed"]) in runs]
    found, unit, about = finals(rows), units(rows), {row["task"]: row for row in data}
    papers = {(label, task): str(value) for task, entry in (plan or {}).get("tasks", {}).items()
              for label, value in entry.get("paper", {}).items()}
    head = ["task", "method", "N", "best of N", "N = 1", "seeds", *["paper"] * bool(papers)]
    lines = [head, ["---"] * len(head)]
    for task in dict.fromkeys(run[1] for run in runs):
        what = unit.get(task, "no run yet").replace("success", "success, %")
        lines.append([f"{task} ({what})", *[""] * (len(head) - 1)])
        for label, count in Counter(run[0] for run in runs if run[1] == task).items():
            seeds = list(found.get((label, task), {}).values())
            n, best, one = zip(*seeds) if seeds else ((), (), ())
            lines.append(["", label, " or ".join(map(str, sorted(set(n)))), spread(best), spread(one),
                          f"{len(seeds)} of {count}", *[papers.get((label, task), "")] * bool(papers)])
        for key, kind in (("mean", "data, mean"), ("best_quarter", "data, best quarter of the episodes")):
            value = about.get(task, {}).get(f"{key}_{unit.get(task)}", math.nan)  # of success the data say nothing
            if not math.isnan(value):
                lines.append(["", f"*{kind}*", "", spread([value]), *[""] * (len(head) - 4)])
    text = ["Last evaluation of finished runs, mean ± standard deviation over seeds.", ""]
    text += [f"| {' | '.join(line)} |" for line in lines] + [""]
    for label, task, seed in runs:
        if seed not in found.get((label, task), {}):
            steps = [row["step"] for row in rows if (row["label"], row["task"], row["seed"]) == (label, task, seed)]
            state = f"unfinished, last evaluation at step {max(steps)}" if steps else "no evaluation yet"
            text.append(f"- {label}, {task}, seed {seed}: {state}")
    return "\n".join(text + overall(runs, found, unit)).rstrip() + "\n"


def overall(runs, found, unit):
    """Lines of the table over tasks; none if no method has two tasks with three seeds."""
    def cell(values):
        if len(values) < 2:
            return "-"
        low, high = interval(values, iqm)
        return f"{iqm(np.concatenate(values)):.1f} [{low:.1f}, {high:.1f}]"

    lines = []
    for label in dict.fromkeys(run[0] for run in runs):
        best, asked = strata(found, unit, label, 1), [run for run in runs if run[0] == label]
        if len(best) > 1:
            tasks, done = f"{len(best)} of {len({run[1] for run in asked})}", f"{sum(map(len, best))} of {len(asked)}"
            lines.append(f"| {label} | {cell(best)} | {cell(strata(found, unit, label, 2))} | {tasks} | {done} |")
    if not lines:
        return []
    return ["", "Interquartile mean of the runs of all tasks, in brackets its 95 % interval (bootstrap of the seeds, "
            "stratified by task).", "", "| method | best of N | N = 1 | tasks | runs |", f"|{'---|' * 5}", *lines]


# ---------------------------------------------------------------- CSVs to pictures
def draw_curves(plt, rows, data, colors):
    unit, found, curves = units(rows), finals(rows), {}
    for row in rows:
        if row["family"] == "eval":
            seeds = curves.setdefault((row["task"], row["label"]), {})
            seeds.setdefault(row["seed"], {})[row["step"]] = figure(row, unit[row["task"]])
    wide = min(3, len(unit))
    high = -(-len(unit) // wide)
    picture, axes = plt.subplots(high, wide, squeeze=False, layout="constrained",
                                 figsize=(3.4 * wide + 1.6, 2.8 * high + 0.2 * -(-len(colors) // wide) + 0.6))
    for axis in axes.flat[len(unit):]:
        axis.remove()
    axes = dict(zip(unit, axes.flat))
    for (task, label), seeds in curves.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))
        values = np.array([[curve[step] for step in steps] for curve in seeds.values()])
        axes[task].plot(steps, values.mean(0), color=colors[label], marker="o", markersize=3)
        axes[task].fill_between(steps, values.min(0), values.max(0), color=colors[label], alpha=0.2, linewidth=0)
        single = [one for n, _, one in found.get((label, task), {}).values() if n > 1]
        axes[task].plot(steps[-1:] * len(single), single, "D", color=colors[label], fillstyle="none", markersize=4)
    for task, axis in axes.items():
        for value, style in ((about.get(f"{key}_{unit[task]}", math.nan), style) for about in data
                             if about["task"] == task for key, style in (("mean", "--"), ("best_quarter", ":"))):
            axis.axhline(value, color="gray", linestyle=style, linewidth=1)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.set(title=task, xlabel="step", ylabel=unit[task].replace("success", "success, %"))
    note = ("line: mean of the seeds, band: lowest to highest, diamonds: N = 1 at the end; "
            "gray: the data's mean (dashed) and best quarter (dotted)")
    picture.legend([plt.Line2D([], [], color=color) for color in colors.values()], colors, fontsize=8, ncols=wide,
                   loc="outside lower center", title=textwrap.fill(note, 60 * wide), title_fontsize=7)
    return picture


def draw_profile(plt, groups, colors):
    values = np.concatenate([of_task for group in groups.values() for of_task in group])
    levels = np.linspace(min(values.min(), 0), values.max(), 101)

    def above(sample):
        return np.stack([(sample > level).mean(-1) for level in levels], -1)

    picture, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for label, group in groups.items():
        axis.plot(levels, above(np.concatenate(group)), color=colors[label], label=label)
        axis.fill_between(levels, *interval(group, above, 2000), color=colors[label], alpha=0.2, linewidth=0)
    axis.set(xlabel="score at the end, best of N", ylabel="share of runs above it (band: 95 % interval)")
    axis.legend(fontsize=8)
    return picture


def pictures(rows, data, out, name):
    """<name>_curves.png, and <name>_profile.png where there is something to take a mean of over tasks."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    palette = plt.get_cmap("tab20").colors
    colors = dict(zip(dict.fromkeys(row["label"] for row in rows), itertools.cycle(palette[::2] + palette[1::2])))
    draw_curves(plt, rows, data, colors).savefig(out / f"{name}_curves.png", dpi=100)
    groups = {label: strata(finals(rows), units(rows), label, 1) for label in colors}
    if groups := {label: group for label, group in groups.items() if len(group) > 1}:
        draw_profile(plt, groups, colors).savefig(out / f"{name}_profile.png", dpi=100)


# ----------------------------------------------------------------
def load(suite, out, runs_dir="runs"):
    """What table() takes, of the CSVs in `out` and, if there is one, of the suite's file."""
    path, about = (out / f"{pathlib.Path(suite).stem}{end}.csv" for end in ("", "_data"))
    if not path.exists():
        raise BadInput(f"{path} is missing: python benchmark/report.py {suite} makes it from run folders")
    is_suite = pathlib.Path(suite).suffix == ".toml" or (HERE / "suites" / f"{suite}.toml").exists()
    plan, planned = suites.load_suite(suite, runs_dir) if is_suite else (None, ())
    return read_csv(path), read_csv(about) if about.exists() else [], plan, planned


def collect(suite, runs_dir, out):
    """Writes the CSVs of what is in the run folders, in the order of the suite."""
    plan, runs = suites.load_suite(suite, runs_dir)
    labels = [method["label"] for method in plan["methods"]]
    runs.sort(key=lambda run: (list(plan["tasks"]).index(run.task), labels.index(run.label), run.seed))
    read, data = [(run.task, *read_run(run)) for run in runs], {}
    rows = [row for _, found, _ in read for row in found]
    if not rows:
        raise BadInput(f"no evaluation in {runs[0].folder.parent} yet: python benchmark/suite.py {suite} runs it")
    for task, _, about in read:
        if "data" in about:
            now = describe_data(task, [row for row in rows if row["task"] == task], about)
            first = data.setdefault(task, now)
            if not math.isclose(first["mean_return"], now["mean_return"], rel_tol=1e-5):
                raise BadInput(f"runs of {task} have different data, of mean return {first['mean_return']:.6g} and "
                               f"{now['mean_return']:.6g}: move the older folders away")
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{pathlib.Path(suite).stem}.csv", rows)
    if data:
        write_csv(out / f"{pathlib.Path(suite).stem}_data.csv", list(data.values()))


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    args.out = args.out or (args.runs_dir / pathlib.Path(args.suite).stem if args.runs else HERE / "results")
    if args.runs:
        collect(args.suite, args.runs_dir, args.out)
    rows, data, plan, planned = load(args.suite, args.out, args.runs_dir)
    name, text = pathlib.Path(args.suite).stem, table(rows, data, plan, planned)
    if args.docs:
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = args.docs.read_text().partition(begin)
        if not found or end not in rest:
            raise BadInput(f"{args.docs} has no block {begin.strip()} .. {end}")
        args.docs.write_text(before + begin + text + end + rest.partition(end)[2])
    else:
        (args.out / f"{name}.md").write_text(text)
    print(text)
    pictures(rows, data, args.out, name)
    print(f"CSVs and pictures: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
