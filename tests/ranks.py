"""Running a function on several gloo processes and collecting what each returns."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _entry(
    rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], queue: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        result = fn(rank, world, *args)
        dist.barrier()
        # Pickled here: torch's own queue would send a handle that dies with this process.
        queue.put((rank, True, pickle.dumps(result)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(rank, world, *args)`` on ``world`` gloo processes; their results in rank order.

    ``fn`` must be a module-level function; tensors travel by value (numpy), so return plain data or
    detached CPU tensors. A failure on any rank raises here with that rank's traceback.
    """
    context = mp.get_context("fork")
    queue = context.Queue()
    port = free_port()
    processes = [context.Process(target=_entry, args=(r, world, port, fn, args, queue)) for r in range(world)]
    for p in processes:
        p.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, ok, value = queue.get(timeout=timeout)
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = pickle.loads(value)
    finally:
        for p in processes:
            p.join(10)
            if p.is_alive():
                p.kill()
    return [results[r] for r in range(world)]
