"""Where the ranks of a run meet before there is a process group: they start together or not at all.

A rank may come minutes after another (a cold file system, a slow node): the others say for whom they wait.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sslzoo.exits import RunError
from sslzoo.run.placement import Placement

log = logging.getLogger(__name__)

JOIN = 1800.0  # seconds that ranks wait for one another at the start
SPEAK = 30.0  # seconds of waiting after which they say so, and between two such lines
POLL = 0.05  # seconds between two looks at the store


class Rendezvous:
    """A key-value store of all ranks. With one process there is none, and agreeing is having no problem."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.store: Any = _connect(placement) if placement.world_size > 1 else None

    def agree(self, stage: str, problem: str | None) -> None:
        """Go on together, or raise ``RunError`` with the first rank's ``problem`` on all ranks. Collective."""
        if self.store is None:
            if problem is not None:
                raise RunError(problem)
            return
        place = self.placement
        self.store.set(f"{stage}/{place.rank}", json.dumps({"problem": problem, "host": platform.node()}))
        if place.is_leader:
            keys = [f"{stage}/{rank}" for rank in range(place.world_size)]
            self._wait(keys, "for the other processes")
            answers = [json.loads(self.store.get(key)) for key in keys]
            found = ((rank, a) for rank, a in enumerate(answers) if a["problem"] is not None)
            verdict = next((f"rank {rank} on {a['host']}: {a['problem']}" for rank, a in found), None)
            # One's own data folder missing on all ranks is no matter of ranks.
            if verdict is not None and all(a["problem"] == answers[0]["problem"] for a in answers):
                verdict = answers[0]["problem"]
            self.store.set(f"{stage}/verdict", json.dumps(verdict))
        else:
            verdict = json.loads(self._get(f"{stage}/verdict"))
        if verdict is not None:
            raise RunError(verdict)

    def lead(self, stage: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``decide`` returns on rank 0, on all ranks; its ``ValueError`` is raised on all. Collective."""
        if self.store is None:
            return decide()
        if not self.placement.is_leader:
            answer = json.loads(self._get(stage))
        else:
            try:
                answer = {"value": decide()}
            except (ValueError, OSError) as error:
                self.store.set(stage, json.dumps({"error": str(error)}))
                raise
            self.store.set(stage, json.dumps(answer))
        if "error" in answer:
            raise RunError(answer["error"])
        return answer["value"]

    def _get(self, key: str) -> bytes:
        self._wait([key], "for rank 0")
        return self.store.get(key)

    def _wait(self, keys: list[str], for_whom: str) -> None:
        start = spoken = time.monotonic()
        while not self.store.check(keys):
            time.sleep(POLL)
            now = time.monotonic()
            if now - spoken > SPEAK:
                spoken = now
                missing = [key.rpartition("/")[2] for key in keys if not self.store.check([key])]
                who = f" (ranks {', '.join(missing[:8])})" if len(keys) > 1 else ""
                log.warning("waiting %s%s for %.0f s", for_whom, who, now - start)
            if now - start > JOIN:
                raise RunError(
                    f"waited {JOIN / 60:.0f} minutes {for_whom}; see their own output for what keeps them"
                )


def _connect(placement: Placement) -> Any:
    """The store at the address where the process group is going to meet; keys carry torchrun's attempt."""
    from torch.distributed import DistError, PrefixStore, TCPStore

    serves = placement.is_leader and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_port(placement.address, placement.port)
    try:
        store = TCPStore(
            placement.address,
            placement.port,
            is_master=serves,
            multi_tenant=True,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
    except DistError as error:
        where = f"{placement.address}:{placement.port}"
        raise RunError(
            f"rank {placement.rank} cannot meet the others at {where}; set another MASTER_PORT"
        ) from error
    return PrefixStore(f"sslzoo/{placement.attempt}", store)


def _wait_for_port(address: str, port: int) -> None:
    """Until somebody listens there. The store's own waiting is silent at first and then a page of C++ frames."""
    start = spoken = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            now = time.monotonic()
            if now - start > JOIN:
                raise RunError(
                    f"nobody listens at {address}:{port} after {JOIN / 60:.0f} minutes ({error}); check MASTER_ADDR, "
                    "MASTER_PORT and the firewall between the nodes"
                ) from error
            if now - spoken > SPEAK:
                spoken = now
                log.warning("waiting for rank 0 at %s:%d for %.0f s", address, port, now - start)
            time.sleep(0.2)
        else:
            return
