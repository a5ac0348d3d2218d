"""What mfql_offline_pixels.py costs: FLOPs and time of an update, memory, and how frames are best kept on the disk.

    OMP_NUM_THREADS=1 python benchmark/pixels.py --updates 3                   # on the first GPU if there is one
    python benchmark/pixels.py --npz visual-cube-single-play-v0.npz            # formats, on frames of that file

FLOPs are those of the products and convolutions (2 per multiply-add). Numbers of docs/pixels.md come from here.
"""
import argparse
import contextlib
import pathlib
import resource
import sys
import tempfile
import time
import zipfile

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mfql_offline_pixels as m  # noqa: E402


def peak(device):
    """Bytes in use at most, of the process or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class NoModules(contextlib.nullcontext):
    """For the counter, whose hooks by module do not work with torch.func.grad within a backward pass."""

    parents = ("Global",)


def flops(function):
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        function()
    return counter.get_total_flops()


def update(updates):
    """An update at the paper's size, N = 5, on random frames."""
    args, device = m.Args(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (4096, 64, 64, 3), dtype=torch.uint8, device=device)
    replay = dict(actions=torch.rand(4096, 5, device=device) - 0.5, rewards=torch.zeros(4096, device=device),
                  masks=torch.ones(4096, device=device), stack=torch.randint(4096, (4096, 4), device=device))
    agent, before = m.Agent((3, 64, 64, 3), 5, args, device), peak(device)

    def timed(function):
        start, cpu = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    total = flops(lambda: agent.update(frames, m.sample(replay, args.batch_size)))
    planes = m.to_planes(frames[:args.batch_size, None].expand(-1, 3, -1, -1, -1))
    with torch.no_grad():
        once = flops(lambda: agent.policy_encoder(planes))
    found = [timed(lambda: agent.update(frames, m.sample(replay, args.batch_size))) for _ in range(updates)]
    wall, cpu = np.median(found, axis=0)
    parts = [(name, timed(function)[1]) for name, function in (
        ("one encoder forwards", lambda: agent.policy_encoder(planes)),
        ("gathering and cropping", lambda: m.gather(frames, m.sample(replay, args.batch_size)["stack"],
                                                    m.crop_offsets(args.batch_size, device))))]
    print(f"{device}, {torch.get_num_threads()} threads, batch {args.batch_size}: an update "
          f"{total / 1e9:.0f} GFLOP, one encoder forwards {once / 1e9:.1f}; {cpu:.2f} s of CPU ({wall:.2f} s by the "
          f"clock, median of {updates}); {(peak(device) - before) / 1e9:.2f} GB beside the frames, "
          f"{sum(p.numel() for p in agent.policy_encoder.parameters())} parameters an encoder")
    print("; ".join(f"{name} {seconds:.2f} s of CPU" for name, seconds in parts))


def formats(npz):
    """Bytes a frame and seconds of CPU to write and to read 1,000 frames, in several formats."""
    with np.load(npz) as file:
        frames = np.resize(file["observations"], (1000, 64, 64, 3))
    kinds = {"npz, deflate (OGBench's)": None, "HDF5, plain": {}, "HDF5, lzf": dict(compression="lzf"),
             "HDF5, gzip 1": dict(compression="gzip", compression_opts=1),
             "HDF5, gzip 4": dict(compression="gzip", compression_opts=4)}
    print("| format | bytes a frame | write 1,000, s | read 1,000, s |\n|---|---|---|---|")
    for name, options in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            path, seconds = pathlib.Path(folder) / "x.npz", [time.process_time()]
            if options is None:
                np.savez_compressed(path, observations=frames)
                seconds.append(time.process_time())
                with zipfile.ZipFile(path) as archive, archive.open("observations.npy") as stream:
                    stream.read()
            else:
                with h5py.File(path, "w") as file:
                    file.create_dataset("frames", data=frames, chunks=(64, 64, 64, 3), fletcher32=True, **options)
                seconds.append(time.process_time())
                with h5py.File(path) as file:
                    file["frames"][()]
            seconds.append(time.process_time())
            print(f"| {name} | {path.stat().st_size / 1000:.0f} | {seconds[1] - seconds[0]:.2f} | "
                  f"{seconds[2] - seconds[1]:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=0, help="time so many updates")
    parser.add_argument("--npz", type=pathlib.Path, help="compare formats on these frames")
    given = parser.parse_args()
    if given.updates:
        update(given.updates)
    if given.npz:
        formats(given.npz)
