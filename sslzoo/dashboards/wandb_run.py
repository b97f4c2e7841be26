"""The history of a run at Weights & Biases, online, in offline segments, or sent afterwards from the run's files.

The line of W&B's history with ``_step`` n is row n of ``metrics.csv``, from 0, and only rows that a checkpoint includes
are sent. So nothing that was sent is ever taken back by a kill, and the last line that the server has says which row is
next. An offline start of the run writes its rows into a segment when it ends, for ``wandb sync``; ``sent.json`` says
how far the segments reach, and which of them are complete.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from sslzoo.callbacks.meter import Follower
from sslzoo.dashboards.history import History, Row, current_pictures, last_values, read_rows
from sslzoo.dashboards.login import logged_in, server_url
from sslzoo.exits import ExitCode, RunError
from sslzoo.files import write_json
from sslzoo.pictures import caption_of
from sslzoo.processes.ending import Ending
from sslzoo.recipe.sections import WandbConfig
from sslzoo.records.directory import Run
from sslzoo.records.lock import is_alive, refuse_if_owned
from sslzoo.records.page import PAGE
from sslzoo.records.record import Record
from sslzoo.terminal import OUT

if TYPE_CHECKING:
    from wandb import Run as Connection

log = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds to reach the server
UPLOAD = 30.0  # seconds that the end of a run waits for what is not uploaded yet
UPLOAD_ARTIFACT = 600.0  # the same for the exported encoder
PAUSE = 15.0  # seconds between two times that rows are sent
_STANDING = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { name historyLineCount historyTail }
  }
}
"""
# Ends after which all rows are sent, because such a run is finished, or not continued as it is.
COMPLETE = (ExitCode.DONE, ExitCode.NAN, ExitCode.COLLAPSED)
_ALERTS = {
    int(ExitCode.NAN): "The loss is not finite",
    int(ExitCode.PREEMPTED): "Pre-empted",
    int(ExitCode.FAILURE): "Failed",
}
_LEFT_OUT = ("recipe", "sessions", "error", "finished", "exit_code")  # of the manifest; W&B has its own


@dataclass
class Sent:
    """What W&B has been given of a run. Kept in ``wandb/sent.json``."""

    id: str  # of the run at W&B
    online: bool = False  # whether it was ever online, so that only the server knows what it has
    rows: int = 0  # in the segments together
    segments: list[str] = field(default_factory=list)  # folders that are complete

    @staticmethod
    def read(run: Run) -> Sent:
        """That of ``run``; empty if nothing was sent."""
        path = run.path / "wandb" / "sent.json"
        return Sent(**json.loads(path.read_text())) if path.exists() else Sent(run.run_id)

    def write(self, run: Run) -> None:
        """Keep it."""
        (run.path / "wandb").mkdir(parents=True, exist_ok=True)
        write_json(run.path / "wandb" / "sent.json", asdict(self))


def mode_of(
    cfg: WandbConfig, environ: Mapping[str, str] = os.environ
) -> Literal["online", "offline", "disabled"]:
    """How W&B is used: as the recipe says, or with ``auto`` as ``WANDB_MODE`` says, or online if there is a login."""
    asked = environ.get("WANDB_MODE", "") if cfg.mode == "auto" else cfg.mode
    if asked in ("disabled", "offline"):
        return asked
    return "online" if logged_in(environ) else "offline"


def push_command(run: Run) -> str:
    """The command that sends ``run``."""
    return f"sslzoo wandb push {shlex.quote(str(run.path))}"


def push(path: Path, *, project: str | None, entity: str | None) -> str:
    """Send the run in ``path`` from its files: everything that the server lacks. Returns the run's address there.

    Of a run that is not finished, only rows that a checkpoint includes are sent. Raises ``ValueError`` if ``path`` is
    no run, sends itself, or there is no login, and other exceptions if the server cannot be reached.
    """
    run = Run(path.absolute(), "")
    manifest = run.read_manifest()
    run = Run(run.path, manifest["run_id"])
    stored: dict[str, Any] = read_recipe(run)["logging"]["wandb"] or {}
    if not logged_in():
        raise RunError(f"there is no login for {server_url()}: run wandb login, or set WANDB_API_KEY")
    if Sent.read(run).online:
        refuse_if_owned(run.path)  # it sends its rows itself
    stored |= {"tags": tuple(stored.get("tags", ()))}
    stored |= {key: value for key, value in (("project", project), ("entity", entity)) if value is not None}
    cfg = WandbConfig(**stored)
    return str(_send_from_files(run, cfg, manifest["exit_code"]).connection.url)


def update(run: Run, cfg: WandbConfig) -> None:
    """Send new evaluations of a run that has ended. One that is alive sends them itself when it ends."""
    if is_alive(run.path):
        return
    mode = mode_of(cfg)
    ended: int | None = run.read_manifest()["exit_code"]
    if mode == "online":
        _send_from_files(run, cfg, ended)
    elif mode == "offline":
        final = len(read_rows(run.path)) if ended in COMPLETE else Sent.read(run).rows
        write_segment(run, cfg, final, _shown_code(run, ended))


def _send_from_files(run: Run, cfg: WandbConfig, ended: int | None) -> Sender:
    """Send what the server lacks of a run that has ended with the exit code ``ended``, or None."""
    final = len(read_rows(run.path)) if ended in COMPLETE else _rows_of_checkpoint(run)
    sender = connect(run, cfg, final)
    sender.send(final)
    sender.end(_shown_code(run, ended))
    return sender


def _shown_code(run: Run, ended: int | None) -> int:
    """The exit code that W&B shows. A run without one was killed, which is shown as a failure, or still trains; W&B
    shows that as finished until it ends."""
    if ended is not None:
        return ended
    return int(ExitCode.DONE if is_alive(run.path) else ExitCode.FAILURE)


def _rows_of_checkpoint(run: Run) -> int:
    """Rows that the newest checkpoint includes."""
    from sslzoo.checkpoints import load_checkpoint, newest_sound

    checkpoint = newest_sound(run.checkpoints)
    return 0 if checkpoint is None else load_checkpoint(checkpoint)["callbacks"]["Meter"]["rows"]


class WandB(Follower):
    """Sends a run while it trains. Without a server, everything stays in the run's files, and nothing fails."""

    def __init__(self, run: Run, cfg: WandbConfig, mode: Literal["online", "offline"]) -> None:
        self.run, self.cfg, self.mode = run, cfg, mode
        self._final = 0  # rows that are final
        self._sender: Sender | None = None
        self._sent_at = 0.0
        self._evaluated = False  # since rows were last sent
        self._said = False

    @property
    def destination(self) -> str:
        """Where the run is going to be sent, in words, and how to avoid that; empty if it is kept offline."""
        if self.mode == "offline":
            return ""
        project = self.cfg.project if self.cfg.entity is None else f"{self.cfg.entity}/{self.cfg.project}"
        return (
            f"W&B: figures, recipe and pictures of images go to project {project} at {server_url()} "
            "(logging.wandb=null switches it off)"
        )

    def begin(self, rows: int) -> None:
        """Connect, and send what the server lacks of the first ``rows`` rows."""
        self._final = rows
        if self.mode == "offline":
            _discard_incomplete(self.run)
            if Sent.read(self.run).rows > rows:
                _start_anew(self.run)
            self._said = True
            why = "" if logged_in() else f", because there is no login for {server_url()}"
            OUT.print(f"W&B: kept offline{why}; send with: {push_command(self.run)}", soft_wrap=True)
        else:
            self._connect()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember whether ``values`` are those of an evaluation."""
        self._evaluated |= any(key.startswith(("val/", "repr/")) for key in values)

    def saved(self, rows: int) -> None:
        """Send the rows that became final, unless some were sent a moment ago, and after an evaluation what the run
        has reached."""
        self._final = rows
        if self._sender is None or not (self._evaluated or time.monotonic() - self._sent_at > PAUSE):
            return
        self._sender.send(rows)
        if self._evaluated:
            self._sender.send_reached()
        self._evaluated, self._sent_at = False, time.monotonic()

    def alert(self, title: str, text: str) -> None:
        """Raise an alert at W&B, which sends it by mail or Slack as the user has chosen there."""
        if self._sender is not None:
            self._sender.alert(title, text)

    def end(self, ending: Ending) -> None:
        """Send the rest, and how the run ended."""
        complete = ending.code in COMPLETE
        if complete:
            self._final = len(read_rows(self.run.path))
            if not self._said:  # nothing was left to train
                self.begin(self._final)
        if self.mode == "offline" and self._said:
            write_segment(self.run, self.cfg, self._final, int(ending.code), ending)
        elif self._sender is not None:
            self._sender.send(self._final)
            self._sender.end(int(ending.code), ending)

    def _connect(self) -> None:
        try:
            self._sender = sender = connect(self.run, self.cfg, self._final)
            sender.send(self._final)
            sender.send_reached()
        except Exception as error:  # not installed, logged out, unreachable, a full disk: never fatal
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._sender, self._said = None, True
            log.warning("W&B: %s; kept offline; send with: %s", reason, push_command(self.run))
            return
        self._sent_at = time.monotonic()
        self._said = True
        OUT.print(f"W&B: {sender.connection.url}", soft_wrap=True)


class Sender:
    """A connection to a run at W&B, which has the first ``sent`` rows."""

    def __init__(self, connection: Connection, run: Run, cfg: WandbConfig, sent: int) -> None:
        self.recipe = read_recipe(run)
        self.connection, self.run, self.cfg, self.sent = connection, run, cfg, sent
        self._history = History(run.path)
        self._history.read(sent)

    def send(self, rows: int) -> None:
        """Send the first ``rows`` rows, without those that W&B has."""
        if rows <= self.sent:
            return
        for row in self._history.read(rows):
            self.connection.log(self._line(row), step=self.sent, commit=True)
            self.sent += 1

    def send_reached(self) -> None:
        """Send what the run has reached so far: its best figures, its throughput and the verdict."""
        self.connection.summary.update(_reached(Record(self.run.path)))

    def end(self, code: int, ending: Ending | None = None) -> None:
        """Send the last value of every column, the figures of all evaluations and the pictures, and close the
        connection with the run's exit code. ``ending`` is set if the run ends now, which may be worth an alert."""
        try:
            self._summarize()
            if ending is not None and (title := _ALERTS.get(code)) is not None:
                self.alert(title, ending.message, level="WARN" if code == ExitCode.PREEMPTED else "ERROR")
            if code == ExitCode.PREEMPTED:
                self.connection.mark_preempting()
            exported = self.run.path / "exported"  # by a finished run
            if self.cfg.artifact and code == ExitCode.DONE and exported.is_dir():
                self._send_export(exported)
        finally:  # uploads what is left
            self.connection.finish(exit_code=code)

    def alert(self, title: str, text: str, *, level: Literal["WARN", "ERROR"] = "ERROR") -> None:
        """Raise an alert that names the run."""
        self.connection.alert(title, f"{self.recipe['name']}, {self.run.run_id}: {text}", level=level)

    def _summarize(self) -> None:
        import wandb

        latest = last_values(read_rows(self.run.path, self.sent))
        record = Record(self.run.path)
        figures = {f"eval/{key}": value for key, value in record.accuracies.items()}
        pictures = _images(current_pictures(self.run.path))
        page = self.run.path / PAGE
        report = (
            {"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)} if page.exists() else {}
        )
        self.connection.summary.update(latest | figures | _reached(record) | pictures | report)

    def _send_export(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.recipe['name']}-{self.connection.id}", type="model")
        artifact.add_dir(str(folder))
        self.connection.log_artifact(artifact)

    def _line(self, row: Row) -> dict[str, Any]:
        import numpy as np
        import wandb

        axes = {
            "step": row.step,
            "epoch": row.epoch,
            "images": row.step * self.recipe["data"]["global_batch_size"],
        }
        histograms = {
            histogram.name: wandb.Histogram(
                np_histogram=(np.array(histogram.counts), np.array(histogram.edges))
            )
            for histogram in row.histograms
        }
        return {**axes, **row.values, **histograms, **_images(row.pictures)}


def connect(run: Run, cfg: WandbConfig, final: int) -> Sender:
    """A connection to ``run`` at the server, whose first ``final`` rows are final. If what the server has is not the
    beginning of these, as after going back to an older checkpoint, the run gets a new id there.

    Raises an ``Exception`` of any kind if the server cannot be reached.
    """
    while (sent := _standing(run, cfg, final)) is None:
        _start_anew(run)
    state = Sent.read(run)
    _drop_segments(run)  # the server gets their rows now
    Sent(state.id, online=True).write(run)
    return Sender(_open(run, cfg, state.id, "online"), run, cfg, sent)


def write_segment(run: Run, cfg: WandbConfig, final: int, code: int, ending: Ending | None = None) -> None:
    """Write the final rows that are in no segment yet into a new one, for ``wandb sync``, and the exit code. Rows of a
    run that was ever online are left to ``sslzoo wandb push``, because only the server knows which ones it has."""
    state = Sent.read(run)
    if state.online:
        return
    sender = Sender(_open(run, cfg, state.id, "offline"), run, cfg, state.rows)
    folder = Path(sender.connection.dir).parent.name
    sender.send(final)
    sender.end(code, ending)
    state.rows, state.segments = sender.sent, [*state.segments, folder]
    state.write(run)


def _standing(run: Run, cfg: WandbConfig, final: int) -> int | None:
    """Number of rows that the server has; None if what it has is not the beginning of this run's first ``final``
    rows."""
    wandb = _library()
    api = wandb.Api(timeout=int(PATIENCE))
    variables = {"project": cfg.project, "entity": cfg.entity, "name": Sent.read(run).id}
    model = api._service_api.execute_graphql(_STANDING, variables, timeout=PATIENCE).get("model")
    bucket = (model or {}).get("bucket")
    if not bucket or not bucket["historyLineCount"]:
        return 0
    count = int(bucket["historyLineCount"])
    last = json.loads(json.loads(bucket["historyTail"])[-1])
    rows = read_rows(run.path, final)
    follows = count <= len(rows) and last.get("_step") == count - 1
    return count if follows and last.get("step") == rows[count - 1].step else None


def _open(run: Run, cfg: WandbConfig, name: str, mode: Literal["online", "offline"]) -> Connection:
    wandb, recipe = _library(), read_recipe(run)
    connection = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        id=name,
        name=f"{recipe['name']}/{name}",
        group=recipe["name"],
        job_type="pretrain",
        tags=list(cfg.tags),
        notes=cfg.notes or None,
        config=recipe | {"run": _facts(run)},
        dir=str(run.path),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=PATIENCE,
            finish_timeout=UPLOAD_ARTIFACT if cfg.artifact else UPLOAD,
        ),
    )
    for axis in ("step", "epoch", "images"):
        connection.define_metric(axis, hidden=True)
    connection.define_metric("*", step_metric="step")
    return connection


def read_recipe(run: Run) -> dict[str, Any]:
    """The resolved recipe, without the code that it names: that of a plug-in may be elsewhere."""
    return yaml.safe_load(run.recipe.read_text(encoding="utf-8"))


def _facts(run: Run) -> dict[str, Any]:
    """The manifest, with what follows from recipe and data."""
    return {key: value for key, value in run.read_manifest().items() if key not in _LEFT_OUT}


def _reached(record: Record) -> dict[str, Any]:
    """The best figures, the throughput and the verdict."""
    return record.at_a_glance | {f"verdict/{key}": value for key, value in record.verdict.items()}


def _images(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The pictures by key. A file that cannot be read as one is left out, with a warning."""
    import wandb

    found: dict[str, Any] = {}
    for key, path in paths.items():
        try:
            found[key] = wandb.Image(str(path), caption=caption_of(path) or None)
        except Exception as error:
            log.warning("W&B does not show %s, which cannot be read: %s", path, type(error).__name__)
    return found


def _library() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")  # it would announce its login and repeat the address
    import wandb

    return wandb


def _discard_incomplete(run: Run) -> None:
    """Delete segments that a killed run has not finished writing; all their rows are in later ones."""
    complete = Sent.read(run).segments
    for path in (run.path / "wandb").glob("offline-run-*"):
        if path.name not in complete:
            shutil.rmtree(path, ignore_errors=True)


def _start_anew(run: Run) -> None:
    """Give the run another id at W&B, where it is sent from its first row."""
    state = Sent.read(run)
    number = int(state.id.removeprefix(run.run_id).removeprefix("-v") or 1)
    state = Sent(f"{run.run_id}-v{number + 1}")
    log.warning(
        "W&B: what was sent is not the beginning of metrics.csv any more; the run is sent anew as %s",
        state.id,
    )
    _drop_segments(run)
    state.write(run)


def _drop_segments(run: Run) -> None:
    for path in (run.path / "wandb").glob("offline-run-*"):
        shutil.rmtree(path, ignore_errors=True)
