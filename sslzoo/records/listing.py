"""A list of runs with state and figures, for ``sslzoo runs``. Importable without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sslzoo.records.record import Record

HEAD = ("run", "state", "epoch", "linear", "k-NN", "started", "")
RIGHT = (2, 3, 4)  # columns that are aligned to the right


def listing(records: Sequence[Record], width: int | None = None) -> list[str]:
    """A line per run, the most recently started first, cut to ``width`` characters if that is not None, and a line with
    the number of runs in each state."""
    ordered = sorted(records, key=lambda record: str(record.manifest.get("started", "")), reverse=True)
    rows = [HEAD, *map(_cells, ordered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(size) if i in RIGHT else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if width is not None:
        lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    counts = ", ".join(f"{n} {state}" for state, n in sorted(Counter(r.state for r in records).items()))
    runs = f"{len(records)} run{'s' * (len(records) != 1)}{': ' * bool(counts)}{counts}"
    return [*lines, f"{runs}; best top-1 in per cent of all evaluations"]


def _cells(record: Record) -> tuple[str, ...]:
    return (
        record.name,
        record.state,
        _epochs(record),
        *("" if best is None else f"{100 * best:.1f}" for best in record.best("linear_top1", "knn_top1")),
        record.started.astimezone().strftime("%Y-%m-%d %H:%M") if record.started else "",
        _remarks(record),
    )


def _epochs(record: Record) -> str:
    total = record.recipe.get("trainer.max_epochs")
    if total is None:
        return ""
    return f"{total if record.state == 'done' else record.newest[1]}/{total}"


def _remarks(record: Record) -> str:
    """Why it ended, what the verdict is unless healthy, tags and notes."""
    verdict = record.final_verdict.get("state")
    parts = [
        record.reason,
        f"verdict: {verdict}" if verdict not in (None, "healthy") else "",
        ", ".join(f"#{tag}" for tag in record.tags),
        record.notes,
    ]
    return "; ".join(filter(None, parts))
