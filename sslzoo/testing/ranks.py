"""Run a function on several gloo processes and collect the results."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LEAVES = 10.0  # seconds that a process gets to exit after its result


class RankFailed(RuntimeError):
    """A process raised an exception, died or timed out; ``reason`` is one line, the message has the traceback."""

    def __init__(self, rank: int, details: str) -> None:
        super().__init__(f"rank {rank} failed:\n{details}")
        self.reason = f"rank {rank} fails: {details.strip().splitlines()[-1]}"


def free_port() -> int:
    """A TCP port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _entry(
    rank: int, world: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], queue: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        result = fn(rank, world, *args)
        dist.barrier()
        # Pickled here, because torch's queue would send a handle that becomes invalid when this process exits.
        queue.put((rank, True, pickle.dumps(result)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` gloo processes with torchrun's environment variables, and return the
    results in rank order.

    ``fn`` must return plain data or detached CPU tensors. The processes are forked, so do not use several threads
    before. Raises :class:`RankFailed` if a rank fails, or if there is no result for ``timeout`` seconds; the other
    ranks are then killed.
    """
    context = mp.get_context("fork")
    queue = context.Queue()
    port = free_port()
    processes = [context.Process(target=_entry, args=(r, world, port, fn, args, queue)) for r in range(world)]
    for p in processes:
        p.start()
    results: dict[int, Any] = {}
    leaves = 0.0
    try:
        for _ in range(world):
            try:
                rank, ok, value = queue.get(timeout=timeout)
            except Empty:
                late = min(set(range(world)) - results.keys())
                raise RankFailed(late, f"no result after {timeout:g} s") from None
            if not ok:
                raise RankFailed(rank, value)
            results[rank] = pickle.loads(value)
        leaves = LEAVES
    finally:
        end = time.monotonic() + leaves
        for p in processes:
            p.join(max(end - time.monotonic(), 0.0))
            if p.is_alive():
                p.kill()
                p.join()
    return [results[r] for r in range(world)]
