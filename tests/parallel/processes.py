"""Runs a function in several processes that form a gloo group, and brings back what each returned."""

import contextlib
import multiprocessing
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 240
# imported once, for all processes of a session; the optimizer would import the compiler at its first step
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "cbp_fast"]


def _run(function, rank, size, folder, args):
    torch.set_num_threads(1)
    # without it, gloo looks the host's name up
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
        result = function(rank, size, *args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        result = traceback.format_exc()
        torch.save((False, result), f"{folder}/{rank}")
        # peers that wait for this process are not to wait for long
        os._exit(1)
    torch.save((True, result), f"{folder}/{rank}")


def launch(size, function, *args, folder):
    """Results by rank; None for a process that left none, because it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        processes = [context.Process(target=_run, args=(function, rank, size, folder, args)) for rank in range(size)]
        for process in processes:
            process.start()
            stack.callback(process.kill)
        for process in processes:
            process.join(SECONDS)
    outcomes = [folder / str(rank) for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in outcomes]


def run(size, function, *args, folder):
    """What `function(rank, size, *args)` returned in each of `size` processes.

    Raises:
        AssertionError: one of them failed.
    """
    results = launch(size, function, *args, folder=folder)
    for rank, outcome in enumerate(results):
        assert outcome is not None, f"rank {rank} did not finish"
        assert outcome[0], f"rank {rank} failed:\n{outcome[1]}"
    return [value for _, value in results]
