"""The life of a run: build, agree, train, evaluate, report, and end with a word and an exit code."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslzoo.checkpoints import checkpoints, is_damaged, set_aside
from sslzoo.checks import require
from sslzoo.evaluate.final import final_evaluation
from sslzoo.evaluate.progress import EvaluationProgress
from sslzoo.exits import ExitCode, RunError
from sslzoo.nn.weights import MissingWeights, described
from sslzoo.recipe.load import LoadedRecipe, plain
from sslzoo.recipe.registry import name_of
from sslzoo.recipe.sections import Recipe
from sslzoo.run.build import BuiltRun, Experiment, build_experiment, equip, load_weights, try_analyses
from sslzoo.run.departure import Departure
from sslzoo.run.directory import Choice, Run, begin, choose
from sslzoo.run.ending import Ending, tell_launcher
from sslzoo.run.explain import REFUSED, explain, one_line, out_of_memory
from sslzoo.run.lock import RunLock
from sslzoo.run.loggers import build_loggers, require_packages
from sslzoo.run.messages import Messages
from sslzoo.run.placement import Placement, check_world_size, place
from sslzoo.run.rendezvous import Rendezvous
from sslzoo.run.report import plot_curves, plot_views, results_table
from sslzoo.run.stopwatch import Stopwatch
from sslzoo.run.summary import run_summary
from sslzoo.run.words import last_words
from sslzoo.terminal import OUT

log = logging.getLogger(__name__)

EXAMPLES = 6  # images in views.png


@dataclass(frozen=True, kw_only=True)
class Session:
    """What is going to run, and from where: everything is built and checked, nothing is written."""

    built: BuiltRun
    choice: Choice

    @property
    def run(self) -> Run:
        """Its directory."""
        return self.choice.run


def fit(
    loaded: LoadedRecipe, *, out: Path | None = None, resume: str | None = None, init_from: Path | None = None
) -> int:
    """Train by ``loaded``, as one of the run's processes. Returns the exit code, which the manifest has too.

    ``resume`` is ``auto`` (the newest checkpoint of ``out``, or of the recipe's newest run that has one; a new run
    where there is none) or the path of a checkpoint or run directory. ``init_from`` takes weights only.
    """
    return _Life(loaded, place()).live(out=out, resume=resume, init_from=init_from)


class _Life:
    """One start of a run in one process, from the first check to the last word."""

    def __init__(self, loaded: LoadedRecipe, placement: Placement) -> None:
        self.loaded, self.placement = loaded, placement
        self.messages = Messages(placement)
        self.departure = Departure(placement, describe=self._ending_of, abandon=self._abandon)
        self.stopwatch = Stopwatch()
        self.session: Session | None = None
        self.lock: RunLock | None = None
        self.begun = False  # the directory is this run's, the manifest written

    def live(self, *, out: Path | None, resume: str | None, init_from: Path | None) -> int:
        """Prepare, train, evaluate; whatever happens, end in order."""
        self.messages.start()
        self.messages.silence_lightning()
        try:
            self.departure.install()
            session = self._prepare(out=out, resume=resume, init_from=init_from)
            if session.choice.finished:
                ending = Ending(code=ExitCode.DONE, message=self._already_finished())
            else:
                self._begin()
                self._train()
                ending = Ending(code=ExitCode.DONE, message=f"run directory: {session.run.path}")
        except BaseException as error:
            self.departure.raised(error)
            ending = self._ending_of(error)
        first = self.departure.close(ending)
        self._conclude(ending, first)
        self.departure.restore()
        return int(first.code)

    # -- before training ----------------------------------------------------------------------------

    def _prepare(self, *, out: Path | None, resume: str | None, init_from: Path | None) -> Session:
        """Build everything and agree with the other ranks on what to do; nothing is written yet.

        ``ValueError``, on all ranks, for whatever is wrong with recipe, data, checkpoint or directory.
        """
        recipe = self.loaded.recipe
        check_world_size(self.placement, recipe)
        meeting = Rendezvous(self.placement)
        self.departure.join(meeting.store)
        with _together(meeting, "built"):
            if self.placement.is_leader:
                require_packages(recipe.logging)
            experiment, missing = self._build(recipe, resume)
            if init_from is not None:
                require(
                    recipe.backbone.weights is None,
                    "--init-from brings the weights to start from: add backbone.weights=null",
                )
                load_weights(experiment.method, init_from)
            try_analyses(experiment)

        def decide() -> dict[str, Any]:
            choice = choose(
                self.loaded,
                experiment.plan,
                fingerprint=experiment.data.fingerprint,
                out=out,
                resume=resume,
            )
            return {
                "path": str(choice.run.path),
                "run_id": choice.run.run_id,
                "checkpoint": str(choice.checkpoint) if choice.checkpoint else None,
                "finished": choice.finished,
            }

        chosen = meeting.lead("choice", decide)
        checkpoint = Path(chosen["checkpoint"]) if chosen["checkpoint"] else None
        choice = Choice(Run(Path(chosen["path"]), chosen["run_id"]), checkpoint, chosen["finished"])
        with _together(meeting, "readable"):
            if missing is not None and checkpoint is None:
                raise missing
            if checkpoint is not None and not os.access(checkpoint, os.R_OK):
                raise RunError(
                    f"cannot read {checkpoint}, from which rank 0 continues; the run directory must lie on a file "
                    "system that all machines share"
                )
            built = equip(experiment, choice.run, placement=self.placement, departure=self.departure)
        self.session = session = Session(built=built, choice=choice)
        if not choice.finished:
            with _together(meeting, "owned"):
                if self.placement.is_leader:
                    self._own(session)
            self.begun = True
        return session

    def _build(self, recipe: Recipe, resume: str | None) -> tuple[Experiment, MissingWeights | None]:
        """Data and method. Who resumes does not need the weights that the run started from, unless there is no
        checkpoint: then they are what is missing."""
        world_size = self.placement.world_size
        try:
            return build_experiment(recipe, world_size=world_size), None
        except MissingWeights as error:
            if resume is None:
                raise
            return build_experiment(recipe, world_size=world_size, start=False), error

    def _own(self, session: Session) -> None:
        """Take the directory and write what is going to be run. Rank 0."""
        run, choice = session.run, session.choice
        run.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.path, seconds=self.stopwatch.seconds, on_lost=self._lost)
        lock.acquire()
        self.lock = lock
        begin(
            choice,
            self.loaded,
            session.built.plan,
            fingerprint=session.built.data.fingerprint,
            left_behind=lock.left_behind,
            start=None if choice.checkpoint else described(self.loaded.recipe.backbone),
        )
        session.built.keep_start(choice.checkpoint)
        self.begun = True
        tell_launcher("run", str(run.path))
        if choice.checkpoint is not None and choice.checkpoint.parent == run.checkpoints:
            for path in checkpoints(run.checkpoints):
                if path.name > choice.checkpoint.name and is_damaged(path):
                    set_aside(path)  # it was passed over for the one chosen

    def _begin(self) -> None:
        """Open the logs, show what is about to run."""
        session = self.session
        assert session is not None
        run, built, recipe = session.run, session.built, self.loaded.recipe
        self.messages.open(run)
        if not self.placement.is_leader:
            return
        built.trainer.loggers = build_loggers(recipe.logging, run.path, run.run_id, recipe=plain(recipe))
        source = self.loaded.source
        bundled = "" if name_of(source) == str(source) else f", bundled: {source}"
        OUT.print(f"recipe {name_of(source)}{bundled}", soft_wrap=True)
        OUT.print(run_summary(recipe, built.plan, built.method, str(run.path)))
        begins = f"continuing from {session.choice.checkpoint}" if session.choice.checkpoint else "a new run"
        log.info("%s: %s", shlex.join(sys.argv), begins)
        if session.choice.checkpoint is not None:
            OUT.print(begins, soft_wrap=True)
        example = built.data.example_batch(EXAMPLES)
        plot_views(
            example, run.path / "views.png", mean=recipe.data.mean, std=recipe.data.std, images=EXAMPLES
        )

    # -- training and after ---------------------------------------------------------------------------

    def _train(self) -> None:
        session = self.session
        assert session is not None
        built = session.built
        with self.stopwatch.phase("training"):
            built.trainer.fit(built.method, datamodule=built.data, ckpt_path=session.choice.checkpoint)
        self.departure.enter("evaluating")
        with self.stopwatch.phase("evaluation"):
            self._report(session)

    def _report(self, session: Session) -> None:
        """The final evaluation, its table and the pictures. Collective; rank 0 writes and prints."""
        run, built = session.run, session.built
        built.method.to(built.trainer.strategy.root_device)  # Lightning moves it to the CPU when it is done
        leader = self.placement.is_leader
        before = {phase: run.seconds_before(phase) if leader else 0.0 for phase in ("training", "evaluation")}
        summary = final_evaluation(
            built.method,
            built.data,
            built.recipe,
            online=built.callbacks.meter.latest,
            initial=built.initial_backbone,
            folder=run.evaluation,
            seconds=before["training"] + self.stopwatch.seconds()["training"],
            evaluated_before=before["evaluation"],
            progress=EvaluationProgress(shown=leader),
        )
        if leader:
            plot_curves(run.metrics, run.path / "curves.png")
            OUT.print(results_table(summary))
            figures = [f"{key} {value:.4f}" for key, value in summary.items() if "top" in key]
            log.info("finished: %s", ", ".join(figures) or summary["protocol"])

    def _already_finished(self) -> str:
        assert self.session is not None
        plan, run = self.session.built.plan, self.session.run
        epochs = f"{plan.max_epochs} epoch{'s' * (plan.max_epochs > 1)}, {plan.total_steps:,} steps"
        figures = run.evaluation / "summary.json"
        return f"{run.path} is finished: {epochs}; its figures are in {figures}. A larger trainer.max_epochs trains on"

    # -- the end ----------------------------------------------------------------------------------------

    def _ending_of(self, error: BaseException) -> Ending:
        """Exit code and one sentence for what ended this process."""
        advice = ""
        if self.session is not None:
            built = self.session.built
            device = str(built.trainer.strategy.root_device)
            advice = out_of_memory(built.plan, built.recipe.eval, device=device, phase=self.departure.phase)
        return explain(
            error,
            rank=self.placement.rank,
            phase=self.departure.phase,
            begun=self.begun,
            out_of_memory=advice,
        )

    def _conclude(self, own: Ending, ending: Ending) -> None:
        """Record the end in log and manifest, give the directory back, and have the last word.

        ``own`` is how this rank ended, ``ending`` how the first one did, which is what the others died of.
        """
        leader = self.placement.is_leader
        if own.traceback:
            self.messages.record(own.traceback)
        if ending.code != ExitCode.DONE:
            level = logging.ERROR if ending.is_failure else logging.WARNING
            _to_files_only(level, ending.described(self.placement.world_size))
        trouble = ""
        if leader and self.begun:
            assert self.session is not None
            try:
                self.session.run.conclude(ending, self.stopwatch.seconds())
            except (OSError, RunError) as error:
                trouble = f"the manifest lacks this end: {one_line(error)}"
        if self.lock is not None:
            with suppress(OSError):  # the directory may be what is wrong
                self.lock.release()
        self._last_word(ending, trouble)
        self.messages.close()
        _end_workers()

    def _last_word(self, ending: Ending, trouble: str) -> None:
        """What happened and what to do next, as the last lines on the terminal."""
        if ending.code == ExitCode.DONE:
            if self.placement.is_leader:
                OUT.print(ending.message, soft_wrap=True)
            return
        run = self.session.run if self.session is not None and self.begun else None
        text = last_words(ending, self.placement, run, self.loaded, trouble)
        if ending.is_failure and tell_launcher("ending", ending.to_json()):
            if self.placement.is_leader or ending.rank == self.placement.rank:
                tell_launcher("words", text)
        elif self.placement.is_leader or (
            ending.rank == self.placement.rank
            and (self.placement.node_rank > 0 or self.departure.leader_gone)
        ):
            # Rank 0 tells what happened to any rank. On another machine, or without rank 0, one tells it oneself.
            self.messages.print_error(text)

    def _abandon(self, ending: Ending) -> None:
        """The main thread waits for a rank that is gone: write what has to be written, from another thread."""
        self._conclude(ending, ending)

    def _lost(self, owner: str) -> None:
        """Another process owns the directory: whatever this one wrote now would damage its run."""
        self.messages.print_error(
            f"sslzoo fit: this run was silent for so long that {owner} has taken its directory over; it ends here"
        )
        os._exit(ExitCode.FAILURE)


def _to_files_only(level: int, text: str) -> None:
    """Into the logs; the terminal gets its own last word."""
    logger = logging.getLogger("sslzoo")
    record = logger.makeRecord("sslzoo.run.fit", level, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _end_workers() -> None:
    """Data workers leave signals to this process, so the polite end at exit would not reach them."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # the data loader's handler takes this end for an accident
    for worker in workers:
        worker.kill()
        worker.join()


@contextmanager
def _together(meeting: Rendezvous, stage: str) -> Iterator[None]:
    """What goes wrong inside on one rank is raised on all."""
    try:
        yield
    except Exception as error:
        try:
            meeting.agree(stage, one_line(error))
        except RunError as refusal:
            if isinstance(error, REFUSED):  # a plain word for all; a bug keeps its own traceback
                raise refusal from error
        raise
    meeting.agree(stage, None)
