"""One rich console each for stdout and stderr, so that printing does not garble a live display.

Progress, warnings and errors go to stderr; the summary and the final table to stdout.
"""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

OUT = Console(highlight=False, soft_wrap=False)
ERR = Console(stderr=True, highlight=False)

REFRESH = 0.5  # seconds between updates
# Columns kept free at the right: Ctrl-C echoes ^C after the last row, and a line wrap would garble the bars.
FREE = 4
BESIDE_TEXTS = 24  # columns reserved for description, bar and count in a narrow terminal


def duration(seconds: float) -> str:
    """Format a duration: 200 becomes ``3 min 20 s``."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def captioned(table: Table, caption: str) -> Group:
    """``table``, and below it ``caption`` in the width of the terminal, however narrow the table is."""
    return Group(table, Text(caption, style="table.caption"))


def redraws(console: Console) -> bool:
    """Whether ``console`` is a terminal that can redraw progress bars."""
    return console.is_terminal and console.is_interactive


class Bars(Progress):
    """Progress rows with a description, a bar, ``count`` and a text; no column wraps.

    The bar takes the remaining width. The text column never shrinks while the terminal keeps its width, so
    that the bars do not jump when the text gets shorter.
    """

    def __init__(self, count: ProgressColumn, *, console: Console, out: Console = OUT) -> None:
        self._texts, self._terminal = Column(no_wrap=True), console
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            count,
            TextColumn("{task.fields[text]}", markup=False, table_column=self._texts),
            console=console,
            refresh_per_second=1 / REFRESH,
            redirect_stdout=redraws(out),  # if stdout is a file, output must go there and not to this console
        )

    @property
    def _width(self) -> int:
        return max(self._terminal.width - FREE, 1)

    def get_renderable(self) -> RenderableType:
        """The rows, limited to the free width; rich calls this at each update."""
        return Constrain(super().get_renderable(), self._width)

    def show(
        self,
        row: TaskID,
        *,
        text: str,
        completed: float,
        total: float | None = None,
        description: str | None = None,
    ) -> None:
        """Update ``row``; arguments that are None leave the value unchanged."""
        room = max(self._width - BESIDE_TEXTS, 1)
        self._texts.max_width = room
        self._texts.min_width = min(max(self._texts.min_width or 0, cell_len(text)), room)
        self.update(row, completed=completed, total=total, description=description, text=text)
