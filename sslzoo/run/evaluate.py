"""Evaluate a trained encoder: read it, extract its features, run the evaluations, write and show the results."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from sslzoo.checks import require
from sslzoo.dashboards.loggers import show_evaluations
from sslzoo.data.datasets import open_source
from sslzoo.data.module import SSLDataModule
from sslzoo.distributed import rank, world_size
from sslzoo.evaluate.progress import EvaluationProgress
from sslzoo.exits import ExitCode, RunError
from sslzoo.files import write_json
from sslzoo.launch.words import last_words
from sslzoo.posthoc.evaluations import Bench, file_stem
from sslzoo.posthoc.files import check_format, write_features
from sslzoo.posthoc.options import KEEP
from sslzoo.posthoc.request import Request
from sslzoo.posthoc.results import Results
from sslzoo.posthoc.store import FeatureStore, read_stored
from sslzoo.posthoc.target import Target, read_target
from sslzoo.processes.departure import Departure, end_workers
from sslzoo.processes.ending import Ending
from sslzoo.processes.explain import explain
from sslzoo.processes.placement import Placement, place
from sslzoo.processes.rendezvous import Rendezvous, together
from sslzoo.recipe.load import LoadedRecipe
from sslzoo.recipe.plan import TrainingPlan
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.records.lock import is_alive
from sslzoo.records.page import PAGE, write_page
from sslzoo.run.messages import Messages
from sslzoo.run.summary import human_bytes
from sslzoo.run.trainer import TIMEOUT
from sslzoo.terminal import OUT

if TYPE_CHECKING:
    from sslzoo.method import SSLMethod

log = logging.getLogger(__name__)


def evaluate(request: Request, loaded: LoadedRecipe) -> int:
    """Evaluate as one process of possibly several; returns the exit code."""
    return _Evaluation(request, loaded, place()).live()


def evaluation_data(recipe: Recipe) -> SSLDataModule:
    """The data of ``recipe`` for evaluation alone, on any number of processes."""
    source = open_source(recipe.data)
    return SSLDataModule(
        data=recipe.data,
        views=recipe.views,
        eval=recipe.eval,
        probe=recipe.probe,
        plan=TrainingPlan(dataset_size=len(source), global_batch_size=1, max_epochs=1),
        seed=recipe.seed,
        source=source,
    )


class _Evaluation:
    """One evaluation in one process, from the first check to the last message."""

    def __init__(self, request: Request, loaded: LoadedRecipe, placement: Placement) -> None:
        self.request, self.loaded, self.placement = request, loaded, placement
        self.messages = Messages(placement)
        self.departure = Departure(placement, describe=self._ending_of, abandon=self._say)

    def live(self) -> int:
        """Evaluate, and end in an orderly way whatever happens; returns the exit code."""
        self.messages.start()
        self.messages.silence_lightning()
        try:
            self.departure.install()
            bench, folder = self._prepare()
            self._evaluate(bench, folder)
            ending = Ending(code=ExitCode.DONE, message="")
        except BaseException as error:
            self.departure.raised(error)
            ending = self._ending_of(error)
        first = self.departure.close(ending)
        if dist.is_initialized() and first.code == ExitCode.DONE:
            dist.destroy_process_group()
        self._say(first)
        self.messages.close()
        end_workers()
        self.departure.restore()
        return int(first.code)

    def _prepare(self) -> tuple[Bench, Path]:
        """Read the encoder, open the data, check all that can be checked, and join the other ranks; returns also the
        folder for results.

        Raises ``ValueError`` on all ranks if anything is invalid on any.
        """
        request, recipe = self.request, self.loaded.recipe
        meeting = Rendezvous(self.placement)
        self.departure.join(meeting.store)
        with together(meeting, "built"):
            if request.kind == "features":
                check_format(request.format)
            target = read_target(request.target, recipe)
            require(
                request.out is not None or target.folder is not None,
                f"{target.name} belongs to no run directory: name a folder for the results with --out",
            )
            folder = request.out or target.folder
            assert folder is not None
            device = device_of(recipe, self.placement)
            target.module.to(device)
            bench = Bench(
                target=target,
                data=evaluation_data(recipe),
                store=FeatureStore(folder / "features", keep=request.keep * 2**30),
                device=device,
                progress=EvaluationProgress(
                    shown=self.placement.is_leader, title=f"features of {target.name}"
                ),
                state=folder / "state",
                ks=request.ks,
                temperatures=request.temperatures,
            )
            bench.data.device = device
            bench.check(request.names)
        if meeting.store is not None:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("evaluation", meeting.store),
                rank=self.placement.rank,
                world_size=self.placement.world_size,
                timeout=TIMEOUT,
            )
        return bench, folder

    def _evaluate(self, bench: Bench, folder: Path) -> None:
        """Run the evaluations, write and show each as soon as it is there. Collective."""
        self.departure.enter("evaluating")
        leader = self.placement.is_leader
        if self.request.kind == "features":
            with bench.progress:
                bench.store.fill(bench.target, bench.data, bench.device, bench.progress.stage)
            if leader:
                for path in _write_files(bench, folder, self.request.format):
                    OUT.print(f"{path} ({human_bytes(path.stat().st_size)})", soft_wrap=True)
        for name in self.request.names:
            results = run_and_show(bench, name, shown=leader)
            if leader:
                OUT.print(f"{results.write(folder)}", soft_wrap=True)
        if leader:
            self._show(bench.target, folder)
            bench.forget(self.request.names)
        if leader and (deleted := bench.store.trim()):
            OUT.print(
                f"{human_bytes(deleted)} of features were deleted, because --keep {self.request.keep:g} GiB is less; "
                "the next evaluation extracts them again",
                soft_wrap=True,
            )
        if leader and (kept := bench.store.size()):
            OUT.print(
                f"{human_bytes(kept)} of features are kept in {bench.store.folder}; the next evaluation reads them",
                soft_wrap=True,
            )

    def _show(self, target: Target, folder: Path) -> None:
        """Show results in a run's directory on its page and its dashboards. A run that is alive does so itself."""
        if target.run is None or target.folder != folder or not self.request.names or is_alive(target.run):
            return
        try:
            manifest = Run(target.run, "").read_manifest()
        except (RunError, OSError) as error:
            log.warning("neither %s nor dashboards show the results: %s", PAGE, error)
            return
        try:
            write_page(target.run)
        except Exception as error:  # a page must not end an evaluation, whose results are written
            log.warning("%s could not be drawn: %s: %s", PAGE, type(error).__name__, error)
        show_evaluations(target.recipe, Run(target.run, manifest["run_id"]))

    def _ending_of(self, error: BaseException) -> Ending:
        recipe = self.loaded.recipe
        return explain(
            error,
            rank=self.placement.rank,
            phase=self.departure.phase,
            begun=False,
            out_of_memory=f"out of memory while evaluating; set eval.batch_size below {recipe.eval.batch_size}",
        )

    def _say(self, ending: Ending) -> None:
        """Print what happened, if it is not the results."""
        if ending.code == ExitCode.DONE:
            return
        if ending.code == ExitCode.PREEMPTED:
            kept = "; what was extracted so far is kept, and the same command continues from there"
            ending = replace(ending, message=ending.message + kept)
        text = last_words(ending, self.placement, None, self.loaded, verb="eval")
        self.messages.print_last(text, ending, leader_gone=self.departure.leader_gone)


def device_of(recipe: Recipe, placement: Placement) -> torch.device:
    """The device of this process, as ``trainer.accelerator`` says; ``ValueError`` if this machine has none."""
    wanted = recipe.trainer.get("accelerator", "auto")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require(
        wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available(),
        f"trainer.accelerator={wanted} is not available for an evaluation here; set trainer.accelerator=cpu",
    )
    require(
        placement.local_rank < torch.cuda.device_count(),
        f"process {placement.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start fewer",
    )
    device = torch.device("cuda", placement.local_rank)
    torch.cuda.set_device(device)
    return device


def _write_files(bench: Bench, folder: Path, form: str) -> list[Path]:
    """Write the features of every labelled data set, split and layer to files; rank 0 only."""
    written: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    for index, eval_set in enumerate(bench.data.eval_sets()):
        for layer, path in bench.store.paths(bench.target, bench.data, index).items():
            name = eval_set.name.rpartition(":")[2] or "data"
            about = bench.about() | {
                "layer": layer,
                "dataset": eval_set.source.name,
                "split": eval_set.split,
                "class_names": list(eval_set.source.class_names),
            }
            stem = folder / f"features-{layer}-{name}-{eval_set.split}"
            written += write_features(read_stored(path), stem, form, about)
    return written


def run_and_show(bench: Bench, name: str, *, shown: bool) -> Results:
    """Run the evaluation ``name``, and show progress and results if ``shown``. Collective."""
    title = f"{name}: evaluating {bench.target.name}"
    with EvaluationProgress(shown=shown, title=title) as progress:
        results = replace(bench, progress=progress).run(name)
    if shown:
        OUT.print(*results.tables(), sep="\n")
    return results


def evaluate_at_end(
    method: SSLMethod[Any],
    data: SSLDataModule,
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device,
    summary: dict[str, Any],
    brief: bool = False,
) -> dict[str, Any]:
    """Run the evaluations in ``eval.after``, write them to ``folder`` as :func:`evaluate` does, and add their figures
    to ``summary`` and ``folder/summary.json``; returns the new summary. Collective.

    Evaluations that an earlier start of the run has finished are read from their files. With ``brief``, for dry runs,
    nothing is shown, and protocols with views train for one epoch.
    """
    if not recipe.eval.after:
        return summary
    shown = rank() == 0 and not brief
    target = Target(
        name=recipe.name, recipe=recipe, backbone=method.backbone, method=method, step=method.optimizer_steps
    )
    bench = Bench(
        target=target,
        data=data,
        store=FeatureStore(folder / "features", keep=KEEP * 2**30),
        device=device,
        progress=EvaluationProgress(),
        state=folder / "state",
        brief=brief,
    )
    was_training = method.training
    method.eval()
    for name in recipe.eval.after:
        results = _finished(bench, name, folder)
        if results is None:
            results = run_and_show(bench, name, shown=shown)
            if rank() == 0:
                results.write(folder)
        summary = summary | results.figures()
        summary["interval_95"] = summary["interval_95"] | results.intervals()
    method.train(was_training)
    if rank() == 0:
        write_json(folder / "summary.json", summary)
        bench.forget(recipe.eval.after)
        bench.store.trim()
    return summary


def _finished(bench: Bench, name: str, folder: Path) -> Results | None:
    """The results of ``name`` that an earlier start has written for the same weights and data, equal on all ranks."""
    found: list[Results | None] = [None]
    if rank() == 0:
        with suppress(OSError, ValueError):
            results = Results.read(folder / f"{file_stem(name)}.json")
            found = [results if results.identity == bench.identity(name) else None]
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0, device=bench.device)
    return found[0]
