"""Run an experiment from start to end: build, synchronise the ranks, train, evaluate, report, exit."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslzoo.callbacks.pictures import draw_views
from sslzoo.checkpoints import checkpoints, is_damaged, set_aside
from sslzoo.checks import require
from sslzoo.dashboards.loggers import Dashboards, build_dashboards, require_packages
from sslzoo.evaluate.figures import is_accuracy
from sslzoo.evaluate.final import final_evaluation
from sslzoo.evaluate.progress import EvaluationProgress
from sslzoo.exits import ExitCode, RunError
from sslzoo.export.write import write_at_end
from sslzoo.launch.words import last_words
from sslzoo.nn.weights import MissingWeights, described
from sslzoo.pictures import save
from sslzoo.processes.departure import Departure, end_workers
from sslzoo.processes.ending import Ending, tell_launcher
from sslzoo.processes.explain import explain, one_line, out_of_memory
from sslzoo.processes.placement import Placement, check_world_size, place
from sslzoo.processes.rendezvous import Rendezvous, together
from sslzoo.recipe.load import LoadedRecipe
from sslzoo.recipe.plan import Division
from sslzoo.recipe.registry import name_of
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Choice, Run, begin, choose
from sslzoo.records.lock import RunLock
from sslzoo.records.page import PAGE, write_page
from sslzoo.records.report import plot_curves, results_tables
from sslzoo.run.build import BuiltRun, Experiment, build_experiment, equip, load_weights, try_analyses
from sslzoo.run.evaluate import evaluate_at_end
from sslzoo.run.messages import Messages
from sslzoo.run.resize import obstacle
from sslzoo.run.stopwatch import Stopwatch
from sslzoo.run.summary import run_summary, trained_parameters
from sslzoo.run.trainer import check_device
from sslzoo.terminal import OUT, redraws
from sslzoo.verdict import judge_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A built run and the checkpoint it starts from; everything is checked, and nothing has been written."""

    built: BuiltRun
    choice: Choice

    @property
    def run(self) -> Run:
        """The run directory."""
        return self.choice.run


def fit(
    loaded: LoadedRecipe, *, out: Path | None = None, resume: str | None = None, init_from: Path | None = None
) -> int:
    """Train the recipe ``loaded`` as one process of the run. Returns the exit code, also recorded in the manifest.

    ``resume`` is ``auto`` (continue from the newest checkpoint in ``out``, or in the recipe's newest run that has one;
    start a new run if there is none) or the path of a checkpoint or run directory. ``init_from`` loads only weights.
    """
    return _Life(loaded, place()).live(out=out, resume=resume, init_from=init_from)


class _Life:
    """One start of a run in one process, from the first check to the last message."""

    def __init__(self, loaded: LoadedRecipe, placement: Placement) -> None:
        self.loaded, self.placement = loaded, placement
        self.messages = Messages(placement)
        self.departure = Departure(placement, describe=self._ending_of, abandon=self._abandon)
        self.stopwatch = Stopwatch()
        self.session: Session | None = None
        self.lock: RunLock | None = None
        self.dashboards: Dashboards | None = None  # on rank 0, once the run has begun
        self.before: Division | None = None  # on rank 0: how steps were divided before the checkpoint
        self.begun = False  # whether this run owns its directory and has written the manifest

    def live(self, *, out: Path | None, resume: str | None, init_from: Path | None) -> int:
        """Prepare, train and evaluate, and end in an orderly way whatever happens; returns the exit code."""
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
        """Build everything, agree with the other ranks on what to do, and take the directory.

        Raises ``ValueError`` on all ranks if recipe, data, checkpoint or directory are invalid on any rank.
        """
        recipe = self.loaded.recipe
        check_world_size(self.placement, recipe)
        meeting = Rendezvous(self.placement)
        self.departure.join(meeting.store)
        with together(meeting, "built"):
            if self.placement.is_leader:
                require_packages(recipe.logging)
            require(
                init_from is None or recipe.backbone.weights is None,
                "--init-from provides the initial weights: add backbone.weights=null",
            )
            check_device(recipe.trainer)
            experiment, missing = self._build(recipe, resume)
            if init_from is not None:
                load_weights(experiment.method, init_from)
            try_analyses(experiment)

        def decide() -> dict[str, Any]:
            choice = choose(
                self.loaded,
                experiment.plan,
                fingerprint=experiment.data.fingerprint,
                out=out,
                resume=resume,
                attempt=self.placement.attempt,
                obstacle=lambda before, draws: obstacle(experiment.method, recipe, before, draws=draws),
            )
            self.before = choice.before
            return {
                "path": str(choice.run.path),
                "run_id": choice.run.run_id,
                "launch": choice.launch,
                "checkpoint": str(choice.checkpoint) if choice.checkpoint else None,
                "finished": choice.finished,
            }

        chosen = meeting.lead("choice", decide)
        checkpoint = Path(chosen["checkpoint"]) if chosen["checkpoint"] else None
        run = Run(Path(chosen["path"]), chosen["run_id"])
        choice = Choice(run, checkpoint, chosen["finished"], launch=chosen["launch"])
        with together(meeting, "readable"):
            if missing is not None and checkpoint is None:
                raise missing
            if checkpoint is not None and not os.access(checkpoint, os.R_OK):
                raise RunError(
                    f"cannot read {checkpoint}, from which rank 0 continues; the run directory must be on a file "
                    "system that all machines share"
                )
            built = equip(experiment, choice.run, placement=self.placement, departure=self.departure)
        self.session = session = Session(built=built, choice=choice)
        if not choice.finished:
            with together(meeting, "owned"):
                if self.placement.is_leader:
                    self._own(session)
            self.begun = True
        return session

    def _build(self, recipe: Recipe, resume: str | None) -> tuple[Experiment, MissingWeights | None]:
        """Build data and method. A resumed run does not need its initial weights, so ``MissingWeights`` is returned
        instead of raised then, to be raised if there is no checkpoint."""
        world_size = self.placement.world_size
        try:
            return build_experiment(recipe, world_size=world_size), None
        except MissingWeights as error:
            if resume is None and self.placement.attempt == 0:
                raise
            return build_experiment(recipe, world_size=world_size, start=False), error

    def _own(self, session: Session) -> None:
        """Lock the directory and write manifest and recipe. Rank 0 only."""
        run, choice = session.run, session.choice
        run.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.path, seconds=self.stopwatch.seconds, on_lost=self._lost)
        lock.acquire()
        self.lock = lock
        session.built.callbacks.checkpoint.manifest = begin(
            choice,
            self.loaded,
            session.built.plan,
            fingerprint=session.built.data.fingerprint,
            left_behind=lock.left_behind,
            parameters=trained_parameters(session.built.method),
            start=None if choice.checkpoint else described(self.loaded.recipe.backbone),
        )
        session.built.keep_start(choice.checkpoint)
        self.begun = True
        tell_launcher("run", str(run.path))
        if choice.checkpoint is not None and choice.checkpoint.parent == run.checkpoints:
            for path in checkpoints(run.checkpoints):
                if path.name > choice.checkpoint.name and is_damaged(path):
                    set_aside(path)  # it was skipped in favour of an older one

    def _begin(self) -> None:
        """Open the log files, and show what is about to run."""
        session = self.session
        assert session is not None
        run, built, recipe = session.run, session.built, self.loaded.recipe
        self.messages.open(run)
        if not self.placement.is_leader:
            return
        self.dashboards = build_dashboards(recipe, run)
        built.callbacks.meter.followers = self.dashboards.followers
        source = self.loaded.source
        bundled = "" if name_of(source) == str(source) else f", bundled: {source}"
        OUT.print(f"recipe {name_of(source)}{bundled}", soft_wrap=True)
        OUT.print(run_summary(recipe, built.plan, built.method, str(run.path), before=self.before))
        if (wandb := self.dashboards.wandb) is not None and wandb.destination:
            OUT.print(wandb.destination, soft_wrap=True)
        if built.plan.steps(recipe.optim.warmup_epochs) >= built.plan.total_steps:
            log.warning(
                "the warm-up takes all %d steps of the run, in which the learning rate only rises: lower "
                "optim.warmup_epochs=%g or raise trainer.max_epochs=%d",
                built.plan.total_steps, recipe.optim.warmup_epochs, built.plan.max_epochs,
            )  # fmt: skip
        begins = f"continuing from {session.choice.checkpoint}" if session.choice.checkpoint else "a new run"
        log.info("%s: %s", shlex.join(sys.argv), begins)
        if session.choice.checkpoint is not None:
            OUT.print(begins, soft_wrap=True)
        self._draw_views()
        self._draw_page()

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
        """Run the final evaluation and those in ``eval.after``, show tables and plots, export the encoder. Collective;
        rank 0 writes and prints."""
        run, built = session.run, session.built
        built.method.to(built.trainer.strategy.root_device)  # Lightning moves it to the CPU after training
        leader = self.placement.is_leader
        before = {phase: run.seconds_before(phase) if leader else 0.0 for phase in ("training", "evaluation")}
        verdict = judge_file(run.metrics) if leader else None
        summary = final_evaluation(
            built.method,
            built.data,
            built.recipe,
            last=built.last_measured,
            initial=built.initial_backbone,
            folder=run.evaluation,
            seconds=before["training"] + self.stopwatch.seconds()["training"],
            evaluated_before=before["evaluation"],
            progress=EvaluationProgress(shown=leader),
            verdict=None if verdict is None else verdict.as_json(),
        )
        if leader:
            OUT.print(*results_tables(summary), sep="\n")
            if verdict is not None:
                OUT.print(verdict.sentence, soft_wrap=not redraws(OUT), markup=False)
        summary = evaluate_at_end(
            built.method,
            built.data,
            built.recipe,
            run.evaluation,
            device=built.trainer.strategy.root_device,
            summary=summary,
        )
        if leader:
            file = write_at_end(
                built.method, built.recipe, run.path, manifest=run.read_manifest(), results=summary
            )
            log.info("encoder exported to %s", file)
            self._draw("curves.png", lambda path: plot_curves(run.metrics, path, summary))
            figures = [f"{key} {value:.4f}" for key, value in summary.items() if is_accuracy(key)]
            figures += [f"{key} {value:.4g}" for key, value in summary.get("representation", {}).items()]
            log.info("finished: %s", ", ".join(figures) or f"not measured: {summary['not_measured']}")

    def _already_finished(self) -> str:
        assert self.session is not None
        plan, run = self.session.built.plan, self.session.run
        epochs = f"{plan.max_epochs} epoch{'s' * (plan.max_epochs > 1)}, {plan.total_steps:,} steps"
        figures = run.evaluation / "summary.json"
        return f"{run.path} is finished: {epochs}; results are in {figures}. Raise trainer.max_epochs to train longer"

    # -- the end ----------------------------------------------------------------------------------------

    def _ending_of(self, error: BaseException) -> Ending:
        """Exit code and one-sentence message for the exception that ends this process."""
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
        """Record the end in log and manifest, release the directory, and print the last message.

        ``own`` is how this rank ended; ``ending`` is how the first rank ended, which made the others end too.
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
                unreadable = self.session.built.data.unreadable_by_source()
                self.session.run.conclude(ending, self.stopwatch.seconds(), unreadable)
            except (OSError, RunError) as error:
                trouble = f"the manifest does not record this end: {one_line(error)}"
        if leader and self.begun:
            self._draw_page()
        if self.dashboards is not None:
            self.dashboards.end(ending)
        if self.lock is not None:
            with suppress(OSError):  # the directory itself may be gone
                self.lock.release()
        self._print_last_words(ending, trouble)
        self.messages.close()
        end_workers()

    def _draw(self, name: str, draw: Callable[[Path], object]) -> None:
        """Draw the file ``name`` of the run directory. A failure is logged, because a picture must not end a run."""
        assert self.session is not None
        try:
            draw(self.session.run.path / name)
        except Exception as error:
            log.warning("%s could not be drawn: %s: %s", name, type(error).__name__, error)

    def _draw_page(self) -> None:
        """Draw the page of the run as it is now."""
        self._draw(PAGE, lambda path: write_page(path.parent))

    def _draw_views(self) -> None:
        """Draw a few images of different classes, and what the recipe's views make of them."""
        assert self.session is not None
        data = self.session.built.data
        self._draw("views.png", lambda path: save(draw_views(data, epoch=0), path))

    def _print_last_words(self, ending: Ending, trouble: str) -> None:
        """Print what happened and what to do next as the last lines on the terminal."""
        if ending.code == ExitCode.DONE:
            if self.placement.is_leader:
                if self.session is not None:
                    OUT.print(f"report: {self.session.run.path / PAGE}", soft_wrap=True)
                OUT.print(ending.message, soft_wrap=True)
            return
        run = self.session.run if self.session is not None and self.begun else None
        text = last_words(ending, self.placement, run, self.loaded, trouble)
        self.messages.print_last(text, ending, leader_gone=self.departure.leader_gone)

    def _abandon(self, ending: Ending) -> None:
        """Conclude from another thread because the main thread waits for a rank that is gone."""
        self._conclude(ending, ending)

    def _lost(self, owner: str) -> None:
        """Exit because another process owns the directory, and writing to it would damage that run."""
        self.messages.print_error(
            f"sslzoo fit: {owner} has taken over the run directory, because this run did not renew its lock for "
            "too long; stopping"
        )
        os._exit(ExitCode.FAILURE)


def _to_files_only(level: int, text: str) -> None:
    """Log ``text`` to the log files but not to the terminal, which gets its own message."""
    logger = logging.getLogger("sslzoo")
    record = logger.makeRecord("sslzoo.run.fit", level, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
