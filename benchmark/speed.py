"""How fast the scripts update, act and evaluate, beside plain ports and other libraries. Prints Markdown tables.

    OMP_NUM_THREADS=2 python benchmark/speed.py                 # CPU; --help lists parts and sizes
    python benchmark/speed.py --cuda                            # one GPU: eager, compiled, graph, both

Peers: pip install stable-baselines3==2.9.2 d3rlpy==2.8.1 (left out with a line where they are missing). Every figure
is the median over blocks of calls, with the lowest and the highest block behind it. FLOPs are those of the matrix
products of one update (2 per multiply-add); the peak is that of one large float32 product on the same machine.
"""
import importlib
import importlib.util
import io
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import export  # noqa: E402
import plain_mfql  # noqa: E402
from pixels import flops  # noqa: E402

import mfql_offline  # noqa: E402
import ofql_offline  # noqa: E402

OBS_DIM, ACT_DIM = 11, 3  # Hopper
PARTS = ("updates", "profile", "acting", "growth", "memory")
GROUPS = {  # what torch's profiler calls the parts of an update; compiled kernels are named after what they compute
    "matrix products": r"aten::(addmm|mm|bmm|baddbmm)", "compiled kernels": r".*cpp_fused.*", "copies": "aten::copy_",
    "optimiser": r"aten::_fused_adam.*|.*Optimizer.*|aten::_foreach_.*|aten::lerp_|aten::linalg_vector_norm",
}
SIZES = {  # (script, name): flags beside the task's defaults
    ("mfql_offline", "paper's sizes (policy 256 x 3, critics 512 x 4, batch 256), N = 5 in the target"): dict(
        num_candidates_target=5),
    ("mfql_offline", "policy 128 x 2, critics 256 x 2, batch 256, N = 5 in the target"): dict(
        num_candidates_target=5, policy_width=128, policy_depth=2, critic_width=256, critic_depth=2),
    ("ofql_offline", "paper's sizes (policy 256 x 3, critics 256 x 3, batch 256)"): dict(),
    ("som_online", "defaults (K = 100, policy and critics 256 x 3, batch 256)"): dict(),
    ("som_online", "K = 16, policy 128 x 3, critics 256 x 2, batch 128"): dict(
        num_proposals=16, batch_size=128, policy_width=128, critic_depth=2),
}


@dataclass
class Args:
    parts: tuple[Literal["updates", "profile", "acting", "growth", "memory"], ...] = PARTS
    """which tables to print"""
    cuda: bool = False
    """measure on the first GPU instead of the CPU"""
    against: pathlib.Path | None = None
    """another checkout of this repository (git worktree add), whose updates are timed beside these, in turns"""
    blocks: int = 5
    """repeats of each measurement"""
    seconds: float = 2.0
    """length of one repeat"""
    compile: bool = True
    """also time compiled updates (on the CPU this needs a C++ compiler)"""
    peers: bool = True
    """also time stable-baselines3 and d3rlpy"""
    out: pathlib.Path = ROOT / "benchmark" / "results"
    """where the growth plots go"""


def timed(args, call):
    """Seconds per call: median, lowest and highest block. `call` has run before."""
    def block(count):
        start = time.perf_counter()
        for _ in range(count):
            call()
        if args.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    count = max(int(args.seconds / block(3)), 1)
    times = [block(count) for _ in range(args.blocks)]
    return float(np.median(times)), min(times), max(times)


def header(*names):
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names), flush=True)


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def spread(times, scale, text="{:,.1f}"):
    """'median (lowest .. highest)' of scale(seconds)."""
    middle, *ends = (scale(seconds) for seconds in times)
    return text.format(middle) + " (" + " .. ".join(text.format(end) for end in sorted(ends)) + ")"


def made_up_replay(rows, device):
    return dict(observations=torch.randn(rows, OBS_DIM, device=device),
                actions=torch.rand(rows, ACT_DIM, device=device) * 2 - 1, rewards=torch.randn(rows, device=device),
                masks=torch.ones(rows, device=device), next_observations=torch.randn(rows, OBS_DIM, device=device))


def flags(script, **more):
    """The script's flags for Hopper, at full size."""
    module = importlib.import_module(script)
    env_id = "Hopper-v4" if script == "som_online" else "hopper-medium-v2"
    return module.Args(**{**module.task_defaults(env_id), "env_id": env_id, **more})


def updating(args, script, options):
    """(seconds per update, FLOPs of one) of a script, eager, compiled or as a graph of ten updates."""
    module, device = importlib.import_module(script), torch.device("cuda" if args.cuda else "cpu")
    replay = made_up_replay(100_000, device)
    eager = module.Agent(OBS_DIM, ACT_DIM, replace(options, compile=False), device)
    operations = flops(lambda: eager.update(module.sample(replay, options.batch_size)))  # a compiled one would fail
    agent = module.Agent(OBS_DIM, ACT_DIM, options, device)

    def update():
        return agent.update(module.sample(replay, options.batch_size))

    for _ in range(3):
        update()
    call, count = update, 1
    if args.cuda and options.cuda_graph:
        call, count = module.capture(update, 10), 10
        call()
    return [seconds / count for seconds in timed(args, call)], operations, call


def profile(args):
    """Where a compiled update spends its time, by torch's profiler."""
    torch._inductor.config.cpp.enable_kernel_profile = True
    torch._dynamo.reset()  # what is compiled already has no names of kernels in it
    header("compiled update", "ms", *GROUPS, "the rest", "the three dearest kernels")
    for (script, sizes), more in SIZES.items():
        *_, call = updating(args, script, flags(script, compile=True, cuda_graph=False, **more))
        with torch.profiler.profile() as profiler:
            for _ in range(5):
                call()
        times = {event.key: event.self_cpu_time_total / 5000 for event in profiler.key_averages()}  # ms per update
        parts, total = dict.fromkeys([*GROUPS, "the rest"], 0), sum(times.values())
        for key, milliseconds in times.items():
            parts[next((name for name, keys in GROUPS.items() if re.fullmatch(keys, key)), "the rest")] += milliseconds
        dearest = sorted((key for key in times if "cpp_fused" in key), key=times.get)[:-4:-1]
        row(f"{script}, {sizes}", f"{total:.0f}", *(f"{part / total:.0%}" for part in parts.values()),
            ", ".join(f"{key.partition('cpp_fused_')[2][:50]} {times[key] / total:.0%}" for key in dearest))


def updating_plainly(args, options):
    """The same of the plain port of MFQL, eager."""
    device = torch.device("cuda" if args.cuda else "cpu")
    plain, replay = plain_mfql.Plain(OBS_DIM, ACT_DIM, options, device), made_up_replay(100_000, device)

    def update():
        return plain.update(mfql_offline.sample(replay, options.batch_size))

    update()
    return timed(args, update), flops(update)


def matrix_peak(args):
    """FLOP/s of a large float32 matrix product."""
    size, device = (8192, "cuda") if args.cuda else (2048, "cpu")
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    for _ in range(3):
        torch.mm(a, b)
    return 2 * size**3 / timed(args, lambda: torch.mm(a, b))[0]


def waits(call):
    """How often the host waits for the GPU in three calls, by torch's profiler, which waits once itself."""
    def counted(calls):
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            for _ in range(calls):
                call()
        waiting = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaDeviceSynchronize")
        return sum(event.count for event in profile.key_averages() if event.key in waiting)

    return counted(3) - counted(0)


def updates_against(args):
    """Eager updates of both checkouts, block by block in turns, so that a change of the machine's pace hits both."""
    header("update, eager", f"per second in {args.against}", "per second here", "ratio of the medians")
    for (script, sizes), more in SIZES.items():
        calls = []
        for folder in (args.against, ROOT):
            spec = importlib.util.spec_from_file_location(f"{script}_{len(calls)}", folder / f"{script}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
            env_id = "Hopper-v4" if script == "som_online" else "hopper-medium-v2"
            options = module.Args(**{**module.task_defaults(env_id), "env_id": env_id, **more})
            device = torch.device("cuda" if args.cuda else "cpu")
            agent, replay = module.Agent(OBS_DIM, ACT_DIM, options, device), made_up_replay(100_000, device)
            calls.append(lambda agent=agent, replay=replay, options=options, sample=module.sample:
                         agent.update(sample(replay, options.batch_size)))
            calls[-1]()
        times = [[], []]
        for _ in range(3 * args.blocks):
            for call, found in zip(calls, times):
                found.append(timed(replace(args, blocks=1, seconds=args.seconds / 3), call)[0])
        old, new = ((float(np.median(found)), min(found), max(found)) for found in times)
        row(f"{script}, {sizes}", spread(old, lambda s: 1 / s), spread(new, lambda s: 1 / s), f"{old[0] / new[0]:.2f}")


def updates(args):
    if args.against is not None:
        return updates_against(args)
    peak = matrix_peak(args)
    print(f"\nOne float32 matrix product: {peak / 1e9:,.0f} GFLOP/s")
    header("update", "mode", "per second", "GFLOP", "share of the peak", "ratio to the plain port")
    for (script, sizes), more in SIZES.items():
        base = None
        if script == "mfql_offline":
            times, flops = updating_plainly(args, flags(script, **more))
            base = times[0]
            row(f"plain port of MFQL, {sizes}", "eager", spread(times, lambda s: 1 / s), f"{flops / 1e9:.1f}",
                f"{flops / times[0] / peak:.0%}", "1")
        modes = [(compiled, graph) for graph in ((False, True) if args.cuda else (False,))
                 for compiled in ((False, True) if args.compile else (False,))]
        for compiled, graph in modes:
            times, flops, call = updating(args, script, flags(script, compile=compiled, cuda_graph=graph, **more))
            mode = ", ".join(name for name, on in (("compiled", compiled), ("graph", graph)) if on) or "eager"
            if args.cuda:
                mode += f"; {waits(call)} waits"
            row(f"{script}, {sizes}", mode, spread(times, lambda s: 1 / s), f"{flops / 1e9:.1f}",
                f"{flops / times[0] / peak:.0%}", f"{base / times[0]:.2f}" if base else "-")
    if args.cuda:
        print(f"\nLargest allocation of all of these: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    if args.peers:
        peer_updates(args)
    return None


def peer_updates(args):
    """stable-baselines3's SAC (as SOM: twin critics, a stochastic policy; no proposals) and d3rlpy's TD3+BC (as OFQL:
    twin critics, a cloning term; a deterministic policy, trained every second step)."""
    device = "cuda" if args.cuda else "cpu"
    if importlib.util.find_spec("stable_baselines3"):
        import gymnasium as gym
        import stable_baselines3

        sac = stable_baselines3.SAC("MlpPolicy", gym.make("Hopper-v5"), device=device, learning_starts=500)
        sac.learn(600)
        row("stable-baselines3 SAC, 256 x 2, batch 256", "eager",
            spread(timed(args, lambda: sac.train(1, 256)), lambda s: 1 / s), "", "", "")
    else:
        print("stable-baselines3 is not installed")
    if importlib.util.find_spec("d3rlpy"):
        import d3rlpy

        rng = np.random.default_rng(0)
        dataset = d3rlpy.dataset.MDPDataset(
            rng.normal(size=(10_000, OBS_DIM)).astype(np.float32), rng.uniform(-1, 1, (10_000, ACT_DIM)).astype("f"),
            rng.normal(size=10_000).astype("f"), (np.arange(10_000) % 1000 == 999).astype("f"))
        algorithm = d3rlpy.algos.TD3PlusBCConfig(batch_size=256).create(device="cuda:0" if args.cuda else "cpu:0")
        algorithm.build_with_dataset(dataset)
        call = lambda: algorithm.update(dataset.sample_transition_batch(256))
        call()
        row("d3rlpy TD3+BC, 256 x 2, batch 256", "eager", spread(timed(args, call), lambda s: 1 / s), "", "", "")
    else:
        print("d3rlpy is not installed")


def acting(args):
    """One Hopper observation, a numpy array in and out."""
    device = torch.device("cuda" if args.cuda else "cpu")
    observation = np.random.default_rng(0).normal(size=(1, OBS_DIM)).astype(np.float32)
    header("one action", "microseconds")
    generator = torch.Generator(device).manual_seed(0)
    for script in ("mfql_offline", "ofql_offline", "som_online"):
        options = flags(script)
        agent = importlib.import_module(script).Agent(OBS_DIM, ACT_DIM, options, device)
        for count in (1, options.num_candidates):
            def act(agent=agent, count=count):
                return agent.act(torch.as_tensor(observation, device=device), count, generator).cpu().numpy()

            act()
            row(f"{script}, N = {count}", spread(timed(args, act), lambda s: 1e6 * s, "{:,.0f}"))
            if args.cuda:
                continue
            program = export.export(agent, script, count, -torch.ones(ACT_DIM), torch.ones(ACT_DIM))[1]
            loaded = torch.export.load(io.BytesIO(program)).module()
            for name, policy in (("folded", export.fold(agent)), ("exported", loaded),
                                 ("exported, `forward`, which does not check the inputs", loaded.forward)):
                def act(script=script, policy=policy, count=count):
                    draws = export.draw(script, 1, count, ACT_DIM, generator)
                    return policy(torch.as_tensor(observation), *draws).numpy()

                act()
                row(f"{script}, N = {count}, {name}", spread(timed(args, act), lambda s: 1e6 * s, "{:,.0f}"))
    steps_of_one_network(args, device, observation)
    if args.peers and importlib.util.find_spec("stable_baselines3"):
        import gymnasium as gym
        import stable_baselines3

        sac = stable_baselines3.SAC("MlpPolicy", gym.make("Hopper-v5"), device=str(device))
        sac.predict(observation)
        row("stable-baselines3 SAC, `predict`",
            spread(timed(args, lambda: sac.predict(observation)), lambda s: 1e6 * s, "{:,.0f}"))


def steps_of_one_network(args, device, observation):
    """OFQL's network as one step from noise to action, and integrated in 5 and 10 steps of its instantaneous velocity
    (r = t), as a flow policy is."""
    policy = ofql_offline.Agent(OBS_DIM, ACT_DIM, flags("ofql_offline"), device).policy

    def sampler(steps):
        ends = [torch.full((1, 1), 1 - i / steps, device=device) for i in range(steps + 1)]

        @torch.no_grad()
        def act(observations, a):
            for t, r in zip(ends, ends[1:]):
                a = a - (t - r) * policy(observations, a, r if steps == 1 else t, t)
            return a.clamp(-1, 1)
        return act

    def timing(sample):
        def act():
            observations = torch.as_tensor(observation, device=device)
            return sample(observations, torch.randn(1, ACT_DIM, device=device)).cpu().numpy()

        act()
        return timed(args, act)

    for compiled in (False, True) if args.compile else (False,):
        one = None
        for steps in (1, 5, 10):
            times = timing(torch.compile(sampler(steps)) if compiled else sampler(steps))
            one = one or times[0]
            row(f"OFQL's network, {steps} step{'s' * (steps > 1)}{', compiled' * compiled}",
                spread(times, lambda s: 1e6 * s, "{:,.0f}") + f", {times[0] / one:.1f} times one step")


def growth(args):
    """Updates per second of eager MFQL at 128 x 2 against one size at a time."""
    small = dict(policy_width=128, policy_depth=2, critic_width=256, critic_depth=2, num_candidates_target=1)
    header("mfql_offline, " + ", ".join(f"{key} {value}" for key, value in small.items()), "value", "updates/s")
    found = {}
    for key, values in (("batch_size", (64, 128, 256, 512, 1024)), ("num_candidates_target", (1, 2, 5, 10, 20)),
                        ("policy_width", (64, 128, 256, 512))):
        for value in values:
            options = flags("mfql_offline", cuda_graph=args.cuda, **{**small, key: value})
            times = updating(args, "mfql_offline", options)[0]
            found.setdefault(key, []).append((value, 1 / times[0]))
            row(key, str(value), spread(times, lambda s: 1 / s))
    header("evaluation of ofql_offline on Hopper-v4, N = 50", "episodes", "seconds")
    for episodes in (10, 50, 150):
        options = flags("ofql_offline", eval_episodes=episodes)
        agent = ofql_offline.Agent(OBS_DIM, ACT_DIM, options, torch.device("cuda" if args.cuda else "cpu"))
        start = time.perf_counter()
        task = dict(env_id="Hopper-v4", kwargs={}, reference=None)
        length = ofql_offline.evaluate(agent, task, options, 50)["eval/episodic_length"]
        row(f"untrained policy, {length:.0f} steps an episode", str(episodes), f"{time.perf_counter() - start:.1f}")
    path = args.out / f"growth_{'cuda' if args.cuda else 'cpu'}.json"
    path.write_text(json.dumps(found, indent=1))
    if importlib.util.find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3), layout="constrained")
        for axis, (key, points) in zip(axes, found.items()):
            axis.plot(*zip(*points), marker="o")
            axis.set(xscale="log", xlabel=key, ylabel="updates/s", ylim=(0, None))
        figure.savefig(path.with_suffix(".png"), dpi=100)


def memory(args):
    """A million made-up Hopper transitions: largest resident set (and GPU allocation), seconds to the first update."""
    import h5py

    header("script, a million transitions", "peak resident set, GiB", "seconds from the command to the first update")
    with tempfile.TemporaryDirectory() as folder:
        rng, rows = np.random.default_rng(0), 1_000_000
        with h5py.File(f"{folder}/data.hdf5", "w") as file:
            for key, width in (("observations", OBS_DIM), ("actions", ACT_DIM)):
                file[key] = rng.uniform(-1, 1, (rows, width)).astype(np.float32)
            file["rewards"], file["terminals"] = rng.normal(size=rows).astype(np.float32), np.zeros(rows, bool)
            file["timeouts"] = np.arange(rows) % 1000 == 999
        for script in ("mfql_offline", "ofql_offline"):
            program = ("import resource, runpy, sys\n"
                       f"sys.argv = ['{script}.py', '--env-id', 'hopper-medium-v2', '--dataset-path',"
                       f"'{folder}/data.hdf5', '--offline-steps', '20', '--log-interval', '1', '--eval-episodes', '1',"
                       f"'--runs-dir', '{folder}/{script}', '--{'no-' * (not args.cuda)}cuda']\n"
                       "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
                       "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
            start, first = time.time(), None
            process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                       stderr=sys.stderr)
            while process.poll() is None and first is None:
                logs = list(pathlib.Path(folder, script).glob("*/metrics.jsonl"))
                first = time.time() - start if logs and logs[0].stat().st_size else None
                time.sleep(0.05)
            kilobytes = int(process.communicate()[0].split()[-1])
            if process.returncode:
                raise SystemExit(f"{script} failed with code {process.returncode}")
            row(script, f"{kilobytes / 2**20:.2f}", f"{first:.1f}")


def main():
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # this and the next lines as the scripts do
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_flush_denormal(True)  # a fresh MFQL has such numbers for some dozens of updates, slow ones on Intel
    if args.cuda:
        torch.cuda.set_stream(torch.cuda.Stream())
    name = torch.cuda.get_device_name() if args.cuda else platform.processor() or platform.machine()
    if not args.cuda and (cpuinfo := pathlib.Path("/proc/cpuinfo")).exists():
        name = cpuinfo.read_text().partition("model name")[2].split("\n")[0].strip("\t :") or name
    print(f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}")
    for part in args.parts:
        dict(updates=updates, profile=profile, acting=acting, growth=growth, memory=memory)[part](args)


if __name__ == "__main__":
    main()
