"""Bytes and time of a step's collective beside those of the gradients: `python benchmarks/collective.py`.

Each is reduced alone, by gloo between processes of this machine; the time is the median of a rank's calls.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cbp_fast import ContinualBackprop


def _milliseconds(tensor: Tensor, calls: int) -> float:
    times = []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def run(rank: int, size: int, store: str, widths: list[int], calls: int) -> None:
    """One process: prints a line for every way of spreading the model."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    for way in ("replicated", "fully_shard"):
        layers = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
        if way == "fully_shard":
            fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        state = ContinualBackprop(model)._engine.state
        flat = state.flat[: state.reduced]
        ours, theirs = _milliseconds(flat, calls), _milliseconds(gradients, calls)
        if rank == 0:
            print(
                f"{way:12} {size} processes, {'-'.join(map(str, widths))}: continual backprop {flat.nbytes} bytes "
                f"{ours:.2f} ms, gradients {gradients.nbytes} bytes {theirs:.2f} ms"
            )
    dist.destroy_process_group()


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 2048, 2048, 10])
    parser.add_argument("--calls", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, f"{folder}/store", options.widths, options.calls)
        mp.spawn(run, args=arguments, nprocs=options.processes)


if __name__ == "__main__":
    main()
