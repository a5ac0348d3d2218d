"""Pictures of one-step samples on the 2-D toys of tests/test_mfql_toy.py and tests/test_ofql_toy.py (two minutes).

    python benchmark/toys.py

Cloning alone, seed 0. Writes docs/figures/mfql_toys.png, ofql_toys.png and toys.csv: of 4000 samples, the share that
lies on the data's modes, and the least visited mode's part of its fair share of those (the tests' `coverage`).
Needs matplotlib (pip install matplotlib).
"""
import csv
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_mfql_toy as mfql  # noqa: E402
import test_ofql_toy as ofql  # noqa: E402

RESIDUAL = mfql.m.mean_flow_output_and_target
STEPS = {"mfql": 1000, "ofql": 1500}


def mfql_samples(toy, form):
    mfql.m.mean_flow_output_and_target = form
    samples = mfql.one_step_samples(toy, STEPS["mfql"])
    mfql.m.mean_flow_output_and_target = RESIDUAL
    return samples


def ofql_samples(toy, flow_ratio):
    return ofql.one_step_samples(ofql.train(toy, flow_ratio, STEPS["ofql"]))


PICTURES = {  # script: its toys' module, and the columns of the picture
    "mfql": (mfql, {
        "data": lambda toy: mfql.draw(toy, 4000),
        "residual form, one step": lambda toy: mfql_samples(toy, RESIDUAL),
        "naive form, one step": lambda toy: mfql_samples(toy, mfql.naive_output_and_target)}),
    "ofql": (ofql, {
        "data": lambda toy: ofql.draw(toy, 4000),
        "flow ratio 0.5, one step": lambda toy: ofql_samples(toy, 0.5),
        "flow ratio 1, one step": lambda toy: ofql_samples(toy, 1.0)}),
}


def main():
    try:
        import matplotlib
    except ImportError as error:
        print(f"toys.py: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for script, (module, columns) in PICTURES.items():
        figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), sharex="row", sharey="row", constrained_layout=True)
        for toy, line in zip(module.TOYS, axes):
            for (kind, make), panel in zip(columns.items(), line):
                samples = make(toy)
                near, least = module.coverage(toy, samples)
                rows.append([script, toy, kind, STEPS[script] if kind != "data" else 0, f"{near:.2f}", f"{least:.2f}"])
                panel.scatter(*samples.T, s=1, alpha=0.4, linewidths=0, color="C0" if kind == "data" else "C1")
                panel.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
                panel.set_title(f"{kind}\n{near:.2f} on the modes, least mode {least:.2f}", fontsize=9)
                print(*rows[-1], flush=True)
        figure.savefig(ROOT / "docs" / "figures" / f"{script}_toys.png", dpi=100)
    with open(ROOT / "docs" / "figures" / "toys.csv", "w", newline="") as file:
        header = "script", "toy", "samples", "updates", "on_the_modes", "least_mode"
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
