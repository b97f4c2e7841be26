"""Summary of a run, shown before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.nn.backbones import parameter_count
from sslzoo.recipe.plan import Division, TrainingPlan
from sslzoo.recipe.sections import Recipe, ViewConfig

if TYPE_CHECKING:
    from torch import nn

    from sslzoo.method import SSLMethod


def human_bytes(count: float) -> str:
    """Format a number of bytes: 1536 becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def state_memory(method: nn.Module) -> list[tuple[str, int]]:
    """Bytes of each top-level module's state that is not optimised (queues, tables, momentum networks), largest
    first. Batch-norm statistics of trained modules are not counted."""
    sizes: dict[str, int] = {}
    frozen = [(name, p) for name, p in method.named_parameters() if not p.requires_grad]
    parts = {name.partition(".")[0] for name, _ in frozen}
    norms = {id(b) for m in method.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)}
    for name, tensor in (*frozen, *method.named_buffers()):
        part = name.partition(".")[0]
        if id(tensor) not in norms or part in parts:
            sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    return sorted(sizes.items(), key=lambda item: -item[1])


def trained_parameters(method: nn.Module) -> int:
    """Number of parameters that are optimised."""
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


def describe_view(view: ViewConfig) -> str:
    """Describe a view: ``2 x 224 px global, area 0.2-1.0``."""
    crop = f"padding {view.padding} px" if view.scale is None else f"area {view.scale[0]:g}-{view.scale[1]:g}"
    return f"{view.count} x {view.size} px {view.role}, {crop}"


def _rows(
    recipe: Recipe, plan: TrainingPlan, method: SSLMethod[Any], before: Division | None
) -> Iterator[tuple[str, str]]:
    yield "method", f"{recipe.method.name} on {recipe.backbone.name}, {method.feature_dim} features"
    if recipe.backbone.weights is not None:
        yield "encoder starts", f"from {recipe.backbone.weights}"
    trained = trained_parameters(method)
    yield (
        "parameters",
        f"{trained / 1e6:.2f} M trained ({parameter_count(method.backbone) / 1e6:.2f} M of them the backbone)",
    )
    state = [f"{name} {human_bytes(size)}" for name, size in state_memory(method)]
    yield "carried state", ", ".join(state) or "none"
    yield "data", f"{recipe.data.dataset}, {plan.dataset_size:,} images"
    yield "views", "; ".join(describe_view(view) for view in recipe.views)
    yield (
        "batch",
        f"{plan.global_batch_size} per optimiser step = {plan.division} x {plan.micro_batch_size}"
        + (f"; before this start {before}" if before not in (None, plan.division) else ""),
    )
    yield (
        "steps",
        f"{plan.max_epochs} epochs x {plan.steps_per_epoch} = {plan.total_steps:,} optimiser steps "
        f"({plan.steps(recipe.optim.warmup_epochs)} of warm-up)",
    )
    optim = recipe.optim
    scaling = "" if optim.lr_scaling == "none" else f" ({optim.lr:g} before {optim.lr_scaling} scaling)"
    yield (
        "optimiser",
        f"{optim.name}, learning rate {plan.scaled_lr(optim):g}{scaling}, "
        f"{optim.schedule.name}, weight decay {optim.weight_decay:g}",
    )
    probe, evaluation = recipe.probe, recipe.eval
    learned, bank = (
        "all" if size is None else f"{size:,}" for size in (probe.train_size, evaluation.bank_size)
    )
    yield (
        "evaluation",
        f"every {evaluation.every_epochs} epochs: representation, and if there are labels: linear probe on {learned} "
        f"training images, k-NN among {bank}{', an online probe in each step' * probe.online}",
    )
    yield "precision", str(recipe.trainer.get("precision", "32-true"))


def run_summary(
    recipe: Recipe,
    plan: TrainingPlan,
    method: SSLMethod[Any],
    where: str,
    *,
    before: Division | None = None,
) -> Group:
    """A table that describes the run, to be printed with rich. ``before``: how steps were divided up to the checkpoint
    that it continues from."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in _rows(recipe, plan, method, before):
        table.add_row(name, value)
    table.add_row("run directory", where)
    return Group(Text(f"sslzoo: {recipe.name}", style="bold"), table)
