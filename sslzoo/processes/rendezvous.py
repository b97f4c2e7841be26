"""Rendezvous of the ranks before there is a process group, so that either all start or none.

A rank may arrive minutes after the others (cold file system, slow node); they report which ranks they wait for.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sslzoo.exits import RunError
from sslzoo.processes.explain import REFUSED, one_line
from sslzoo.processes.placement import Placement

log = logging.getLogger(__name__)

JOIN = 1800.0  # seconds that ranks wait for each other at the start
SPEAK = 10.0  # seconds until the first message about waiting; each further one comes after twice the time
POLL = 0.05  # seconds between polls of the store


class Rendezvous:
    """Agreement between ranks through a key-value store (TCPStore); with one process there is no store."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.store: Any = connect(placement, "sslzoo") if placement.world_size > 1 else None

    def agree(self, stage: str, problem: str | None) -> None:
        """Return if no rank has a ``problem``; otherwise raise ``RunError`` with the lowest rank's problem on all
        ranks. Collective."""
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
            failed = ((rank, a) for rank, a in enumerate(answers) if a["problem"] is not None)
            verdict = next((f"rank {rank} on {a['host']}: {a['problem']}" for rank, a in failed), None)
            # If all ranks have the same problem, such as a missing data folder, no rank is named.
            if verdict is not None and all(a["problem"] == answers[0]["problem"] for a in answers):
                verdict = answers[0]["problem"]
            self.store.set(f"{stage}/verdict", json.dumps(verdict))
        else:
            verdict = json.loads(self._get(f"{stage}/verdict"))
        if verdict is not None:
            raise RunError(verdict)

    def lead(self, stage: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call ``decide`` on rank 0 and return its JSON-compatible result on all ranks; on a ``ValueError`` or
        ``OSError`` all ranks raise. Collective."""
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
        start = time.monotonic()
        speak = SPEAK
        while not self.store.check(keys):
            time.sleep(POLL)
            waited = time.monotonic() - start
            if waited > speak:
                speak *= 2
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                who = f" ({missing_ranks(self.placement, missing)})" if len(keys) > 1 else ""
                log.warning("waiting %s%s for %.0f s", for_whom, who, waited)
            if waited > JOIN:
                raise RunError(f"waited {JOIN / 60:.0f} minutes {for_whom}; see their output for the reason")


@contextmanager
def together(meeting: Rendezvous, stage: str) -> Iterator[None]:
    """Raise an error that occurs inside on one rank on all ranks."""
    try:
        yield
    except Exception as error:
        try:
            meeting.agree(stage, one_line(error))
        except RunError as refusal:
            if isinstance(error, REFUSED):  # a plain message on all ranks; bugs keep their own traceback
                raise refusal from error
        raise
    meeting.agree(stage, None)


def missing_ranks(placement: Placement, ranks: list[int]) -> str:
    """Name missing ``ranks``; if whole machines are missing that sslzoo's own launcher does not start, say how to."""
    named = f"ranks {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"
    nodes = sorted({rank // placement.per_node for rank in ranks})
    whole = [n for n in nodes if {*range(n * placement.per_node, (n + 1) * placement.per_node)} <= {*ranks}]
    if placement.starter != "sslzoo" or not whole:
        return named
    where = f"MASTER_ADDR={placement.address} MASTER_PORT={placement.port}"
    others = ", ".join(f"NODE_RANK={node}" for node in whole[:3]) + ", ..." * (len(whole) > 3)
    return f"{named}: start the same command with {where} and {others} on the other machines"


def connect(placement: Placement, purpose: str) -> Any:
    """Connect to a TCPStore at the process group's address.

    Keys are prefixed by the ``purpose`` and torchrun's restart count, because the store of torchrun's agent outlives a
    restart of the ranks.
    """
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
            f"rank {placement.rank} cannot connect to the other ranks at {where}; set another MASTER_PORT"
        ) from error
    return PrefixStore(f"{purpose}/{placement.attempt}", store)


def _wait_for_port(address: str, port: int) -> None:
    """Wait until the port accepts connections. TCPStore would wait silently and then print a C++ stack trace."""
    start = time.monotonic()
    speak = SPEAK
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            waited = time.monotonic() - start
            if waited > JOIN:
                raise RunError(
                    f"no connection to rank 0 at {address}:{port} after {JOIN / 60:.0f} minutes ({error}); check "
                    "MASTER_ADDR, MASTER_PORT and the firewall between the nodes"
                ) from error
            if waited > speak:
                speak *= 2
                log.warning(
                    "waiting for rank 0 at %s:%d for %.0f s; is it started there?", address, port, waited
                )
            time.sleep(0.2)
        else:
            return
