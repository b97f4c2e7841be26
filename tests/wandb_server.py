"""A stand-in for a W&B server, on the loopback interface: it keeps what it is sent.

A run's history is a list of lines; lines that come with an offset replace what stands from there on, which is what
wandb's client relies on (0.31.0). W&B's own server was not at hand.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "output"}


@dataclass
class KeptRun:
    """What the server knows of a run."""

    streams: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _STREAMS.values()})
    summary: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)  # project, groupName, tags, config, ...
    alerts: list[str] = field(default_factory=list)  # titles
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the history."""
        return [json.loads(line) for line in self.streams["history"]]

    @property
    def config(self) -> dict[str, Any]:
        """The config, by key."""
        values = json.loads(self.attributes.get("config") or "{}")
        return {key: entry["value"] for key, entry in values.items() if key != "_wandb"}


class Server:
    """The state of the server, and its address."""

    def __init__(self) -> None:
        self.runs: dict[str, KeptRun] = {}
        self.views: dict[str, dict[str, Any]] = {}  # by name
        self.artifacts: list[tuple[str, str]] = []  # types and names
        self.url = ""
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which wandb uses this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take lines of the run ``name``."""
        with self._lock:
            kept = self.runs.setdefault(name, KeptRun())
            for file, part in (sent.get("files") or {}).items():
                if file == "wandb-summary.json":
                    kept.summary = json.loads(part["content"][-1])
                elif file in _STREAMS:
                    kept.streams[_STREAMS[file]][part["offset"] :] = part["content"]
            if sent.get("complete"):
                kept.exit_code = sent.get("exitcode")

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL reply."""
        with self._lock:
            name = variables.get("name") or variables.get("runName") or ""
            if "RunResumeStatus" in query:
                bucket = self._bucket(name) if name in self.runs else None
                return {"model": {**_project(variables), "bucket": bucket}}
            if "upsertBucket" in query:
                known = name in self.runs
                kept = self.runs.setdefault(name, KeptRun())
                kept.attributes |= {key: value for key, value in variables.items() if value is not None}
                return {"upsertBucket": {"bucket": self._bucket(name), "inserted": not known}}
            if "createRunFiles" in query:
                files = [{"name": file, "uploadUrl": f"{self.url}/up"} for file in variables["files"]]
                return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
            if "notifyScriptableRunAlert" in query:
                self.runs[name].alerts.append(variables["title"])
                return {"notifyScriptableRunAlert": {"success": True}}
            if "viewer" in query:
                viewer = {"id": "U", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
                return {"viewer": viewer, "serverInfo": {}}
            if "createArtifact(" in query:
                about = variables["input"]
                self.artifacts.append((about["artifactTypeName"], about["artifactCollectionName"]))
                artifact = {
                    "id": "A",
                    "state": "COMMITTED",
                    "artifactSequence": {"id": "S", "latestArtifact": None},
                }
                return {"createArtifact": {"artifact": artifact}}
            if "ArtifactType(" in query:
                return {"project": None}
            if "upsertView" in query:
                known = variables["name"] in self.views
                self.views[variables["name"]] = variables
                view = {"id": f"V-{variables['name']}", "name": variables["name"]}
                return {"upsertView": {"view": view, "inserted": not known}}
            if "allViews" in query:
                view = self.views.get(variables["viewName"])
                nodes = [] if view is None else [{"id": f"V-{view['name']}"} | view]
                return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}
            return {"project": {"id": "P", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==", "name": "p"}}

    def _bucket(self, name: str) -> dict[str, Any]:
        kept = self.runs[name]
        counts = {
            f"{key}LineCount": len(kept.streams[stream])
            for key, stream in {"history": "history", "events": "events", "log": "output"}.items()
        }
        return {
            "id": f"B-{name}", "name": name, "displayName": name, "sweepName": None, "tags": [], "notes": "",
            "project": _project(kept.attributes), "config": kept.attributes.get("config", "{}"),
            "summaryMetrics": json.dumps(kept.summary), "wandbConfig": '{"t": {}}', **counts,
            "historyTail": json.dumps(kept.streams["history"][-1:]),
            "eventsTail": json.dumps(kept.streams["events"][-1:]),
        }  # fmt: skip


def _project(variables: dict[str, Any]) -> dict[str, Any]:
    """The project that ``variables`` name, by default that of the user ``e``."""
    return {
        "id": "P",
        "name": variables.get("project"),
        "entity": {"id": "E", "name": variables.get("entity") or "e"},
    }


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the end of the ``with`` block."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_POST(self) -> None:
            try:
                sent = json.loads(self._body())
            except ValueError:
                sent = {}
            reply: dict[str, Any] = {}
            if self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], sent)
                reply = {"exitcode": None, "limits": {}}
            elif "graphql" in self.path:
                reply = {"data": state.answer(sent.get("query", ""), sent.get("variables") or {})}
            self._reply(reply)

        def _body(self) -> bytes:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw

        def _reply(self, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
