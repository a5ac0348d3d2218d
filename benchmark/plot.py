"""Draws learning curves from metrics.jsonl files.

    python benchmark/plot.py OUT.png "label=RUN_FOLDER" --metric eval/normalized_score --line "data=17.1"

Runs with one label are drawn as thin lines with their mean. Needs matplotlib (pip install matplotlib).
"""
import json
import pathlib
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro


@dataclass
class Args:
    out: Annotated[str, tyro.conf.Positional]
    """PNG file to write"""
    runs: Annotated[list[str], tyro.conf.Positional]
    """label=FOLDER, one for each run; the folder holds metrics.jsonl"""
    metric: str | None = None
    """key of metrics.jsonl that is drawn; default: eval/normalized_score, else eval/episodic_return"""
    line: list[str] = field(default_factory=list)
    """label=VALUE, horizontal lines"""
    xlabel: str = "gradient steps"
    """what the steps are"""
    title: str = ""
    """title above the picture"""


def main():
    args = tyro.cli(Args)
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = []
    for run in args.runs:
        label, folder = run.rsplit("=", 1)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
        logs.append((label, [json.loads(line) for line in lines]))
    scored = all(any("eval/normalized_score" in row for row in rows) for _, rows in logs)
    metric, curves = args.metric or f"eval/{'normalized_score' if scored else 'episodic_return'}", defaultdict(list)
    for label, rows in logs:
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        if not points:
            sys.exit(f"plot.py: {label} has no {metric} yet")
        curves[label].append(np.array(points))
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for color, (label, runs) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], curves.items()):
        for curve in runs:
            axes.plot(curve[:, 0], curve[:, 1], color=color, linewidth=0.8, alpha=0.5 if len(runs) > 1 else 1)
        mean = np.mean([curve[: min(map(len, runs)), 1] for curve in runs], axis=0)
        axes.plot(runs[0][: len(mean), 0], mean, color=color, marker="o", markersize=3, label=f"{label} ({len(runs)})")
    for line in args.line:
        label, value = line.rsplit("=", 1)
        axes.axhline(float(value), color="gray", linestyle="--", linewidth=1)
        axes.annotate(label, (0, float(value)), xytext=(2, 2), textcoords="offset points", color="gray", fontsize=8)
    axes.set(xlabel=args.xlabel, ylabel=metric, title=args.title)
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
