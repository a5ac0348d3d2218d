"""Once: the raw folders of benchmark/results as tidy CSVs in report.py's columns, with the old folder as `run`.

    python benchmark/convert_results.py && git rm -r the folders

A run is final if it reached the steps that its flags ask for; the two phases of an offline-to-online run are two labels.
"""
import math
import pathlib

import h5py
import minari
import numpy as np
import report
from suite import Run

R, MEDIUM, CHEETAH = "hopper_medium-replay-like", "hopper_medium-like", "halfcheetah_medium-replay-like"
BUNDLED, ABLATION = "bundled", "halfcheetah_medium-replay-like, 20,000 updates"
GROUPS = {
    "offline": {
        "MFQL": {R: [R], MEDIUM: [f"{MEDIUM}_target-n1"], CHEETAH: ["mfql_halfcheetah_100k"]},
        "MFQL, N = 5 in the target": {R: [f"{R}_target-n5"], MEDIUM: [MEDIUM]},
        "OFQL, target tau 0.01": {R: [f"ofql_{R}"], MEDIUM: [f"ofql_{MEDIUM}"], CHEETAH: ["ofql_halfcheetah_100k"]},
        "OFQL, target near-copies": {R: [f"ofql_{R}_hard-target_100k"], MEDIUM: [f"ofql_{MEDIUM}_hard-target_100k"],
                                     CHEETAH: ["ofql_halfcheetah_hard-target_100k"]},
        "cloning (OFQL, eta 0), 10,000 updates": {R: [f"ofql_{R}_bc"], MEDIUM: [f"ofql_{MEDIUM}_bc"]},
        "cloning (OFQL, eta 0)": {CHEETAH: ["ofql_halfcheetah_bc_100k"]},
    },
    "ofql_halfcheetah": {label: {CHEETAH: [f"ofql_halfcheetah_{run}"]} for label, run in {
        "default": "100k", "--max-q-backup --eta 1 --inverse-temperature 30": "max-q_eta1_100k",
        "--tau 0.995 --target-interval 5, 40,000": "hard-target", "--tau 0.995 --target-interval 5": "hard-target_100k",
        "--tau 0.995 --target-interval 5 --eta 10, 40,000": "eta10",
        "--tau 0.995 --target-interval 5 --critic-form plain, 40,000": "plain-critic",
        "--learning-rate 1e-3, 40,000": "lr1e-3", "--gamma 0.95 --inverse-temperature 3, 40,000": "gamma095",
        "--inverse-temperature 30, 40,000": "eta2",
        "--max-q-backup --eta 0.2 --inverse-temperature 30, 40,000": "max-q",
        "--gamma 0.995 --eta 0.1": "eta01_stopped", "--gamma 0.995 --eta 0.5": "eta05_stopped",
        "--eta 0.25": "eta025_stopped"}.items()},
    "ofql_settings": {
        "paper's text": {MEDIUM: [f"ofql_{MEDIUM}_paper_40k"], R: [f"ofql_{R}_paper_40k"],
                         CHEETAH: ["ofql_halfcheetah_paper_20k"]},
        "code base": {MEDIUM: [f"ofql_{MEDIUM}_code-base_40k"], R: [f"ofql_{R}_code-base_40k"],
                      CHEETAH: ["ofql_halfcheetah_code-base"]},
        "ours, target tau 0.01": {R: [f"ofql_{R}_ours_40k"], CHEETAH: ["ofql_halfcheetah_eta2"]},
        "ours, target near-copies": {MEDIUM: [f"ofql_{MEDIUM}_default_40k"], R: [f"ofql_{R}_default_40k"],
                                     CHEETAH: ["ofql_halfcheetah_hard-target"]},
        "ours with eta 0.3, noise temperature 0.5, 25,000": {R: [f"ofql_{R}_eta03"]},
    },
    "ofql_ablation": {label: {ABLATION: [f"ofql_ablation/{run}_seed{seed}" for seed in (1, 2)]} for label, run in {
        "flow ratio 1": "ratio1", "flow ratio 0.5": "ratio0.5", "flow ratio 0": "ratio0",
        "flow ratio 0.5, uniform times": "uniform"}.items()},
    "bundled": {
        "MFQL": {BUNDLED: ["bundled_seed1", "bundled_seed2", "bundled_seed3"]},
        "MFQL, batches drawn anew": {BUNDLED: ["bundled_seed1_b271779"]},
        "cloning (MFQL, alpha 1e6)": {BUNDLED: ["bundled_cloning"]},
        "OFQL, target tau 0.02": {BUNDLED: ["ofql_bundled_seed1"]},
        "OFQL, target near-copies": {BUNDLED: ["ofql_bundled_hard-target_seed1"]},
        "MFQL, 10,000 offline": {BUNDLED: ["o2o_bundled <= 10000"]},
        "MFQL, then 15,000 online": {BUNDLED: ["o2o_bundled > 10000"]},
    },
    "offline_to_online": {
        "30,000 offline": {MEDIUM: [f"o2o_{MEDIUM}_s{seed} <= 30000" for seed in (1, 2)],
                           R: [f"o2o_{R}_s{seed} <= 30000" for seed in (1, 2)]},
        "then 30,000 online": {MEDIUM: [f"o2o_{MEDIUM}_s{seed} > 30000" for seed in (1, 2)],
                               R: [f"o2o_{R}_s{seed} > 30000" for seed in (1, 2)]},
        "then 30,000 online, alpha 0.5": {
            MEDIUM: [f"o2o_{MEDIUM}_online-alpha05_s{seed} > 30000" for seed in (1, 2)]},
        "60,000 offline": {MEDIUM: [f"o2o_{MEDIUM}_offline_s{seed}" for seed in (1, 2)],
                           R: [f"o2o_{R}_offline_s{seed}" for seed in (1, 2)]},
        "30,000 online from scratch": {"Hopper-v4 without data": ["o2o_hopper_scratch_s1", "o2o_hopper_scratch_s2"]},
        "5,000 offline": {"door-human-v1": ["o2o_door-human <= 5000"]},
        "then 1,000 online": {"door-human-v1": ["o2o_door-human > 5000"]},
    },
    "antmaze": {
        "MFQL": {"antmaze-umaze-v2, 18 % random episodes": ["antmaze_mfql"]},
        "OFQL": {"antmaze-umaze-v2, 18 % random episodes": ["antmaze_ofql"]},
        "OFQL, tau 0.02, unscaled reward": {"antmaze-umaze-v2, half random": ["antmaze_ofql_half-random"]},
    },
    "cube": {
        "MFQL, alpha 3, N = 5 in the target": {"cube-single-play-singletask-task2-v0": ["cube-single"]},
        "MFQL, alpha 10, N = 1 in the target": {"cube-single-play-singletask-task2-v0": ["cube-single_alpha10"]},
    },
    "som": {
        "SOM": {"Hopper-v4": ["som_hopper_tau002_s1", "som_hopper_tau002_s2"],
                "HalfCheetah-v4": ["som_halfcheetah_tau002_s1", "som_halfcheetah_tau002_s2"]},
        "SAC": {"Hopper-v4": ["sac_hopper_s1", "sac_hopper_s2"],
                "HalfCheetah-v4": ["sac_halfcheetah_s1", "sac_halfcheetah_s2"]},
        "SAC, tau 0.02": {"Hopper-v4": ["sac_hopper_tau002_s1"], "HalfCheetah-v4": ["sac_halfcheetah_tau002_s1"]},
        "SOM, N = 16 in the target": {"Hopper-v4": ["som_hopper_target-n16_s2"],
                                      "HalfCheetah-v4": ["som_halfcheetah_target-n16_s2"]},
        "SOM, tau 0.005": {"Hopper-v4": ["som_hopper_s1"], "HalfCheetah-v4": ["som_halfcheetah_s1"],
                           "InvertedDoublePendulum-v4": ["som_pendulum_base"]},
        "SOM, tau 0.005, N = 32 in the target": {"InvertedDoublePendulum-v4": ["som_pendulum_target-n32"]},
        "SOM, tau 0.005, alpha 50": {"InvertedDoublePendulum-v4": ["som_pendulum_alpha50"]},
        "SOM, default command, 100,000 steps": {"InvertedDoublePendulum-v4": ["som_default"]},
    },
}
SCRIPTS = {"sac": "benchmark/sac.py", "som": "som_online.py", "ofql": "ofql_offline.py",
           "antmaze_ofql": "ofql_offline.py", "o2o": "mfql_offline_to_online.py"}


def best_quarter(task):
    """Mean return of the best quarter of the episodes of a file of the development machines, or of the bundled set."""
    if task == BUNDLED:
        returns = [episode.rewards.sum() for episode in minari.MinariDataset(
            pathlib.Path("data/meanflow/hopper/medium-replay-v0/data")).iterate_episodes()]
    elif (path := pathlib.Path(f"../shared/data/{task.split(',')[0]}.hdf5")).exists():
        with h5py.File(path) as file:
            ends = np.flatnonzero(file["terminals"][()] + file["timeouts"][()]) + 1
            returns = [episode.sum() for episode in np.split(file["rewards"][()], ends)[:len(ends)]]
    else:
        return math.nan
    return float(np.mean(sorted(returns)[-(-3 * len(returns) // 4):]))


def main():
    for group, labels in GROUPS.items():
        rows, data = [], {}
        for task in dict.fromkeys(task for tasks in labels.values() for task in tasks):
            abouts = []
            for label, tasks in labels.items():
                for name in tasks.get(task, ()):
                    name, _, phase = name.partition(" ")
                    folder = report.HERE / "results" / name
                    about = report.read_json(folder / "args.json")
                    script = next((script for start, script in SCRIPTS.items() if name.startswith(start)),
                                  "mfql_offline.py")
                    found, _ = report.read_run(Run(label, script, task, about["args"]["seed"], (), folder))
                    found = [row for row in found if eval(f"{row['step']} {phase}")] if phase else found
                    flags = about["args"]
                    end = flags.get("total_timesteps") or flags["offline_steps"] + flags.get("online_steps", 0)
                    end = int(phase.split()[1]) if phase.startswith("<") else end
                    rows += [{**row, "final": int(row["step"] == end), "run": name} for row in found]
                    if about.get("data") and task != "Hopper-v4 without data":
                        abouts.append(about)
            if abouts:
                about = abouts[0]
                about["data"]["best_quarter"] = best_quarter(task)
                data[task] = report.describe_data(task, [row for row in rows if row["task"] == task], about)
        report.write_csv(report.HERE / "results" / f"early_{group}.csv", rows)
        if data:
            report.write_csv(report.HERE / "results" / f"early_{group}_data.csv", list(data.values()))


if __name__ == "__main__":
    main()
