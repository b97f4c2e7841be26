"""State per training sample, as tables that the framework saves, checks and restores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslzoo.checks import require


class PerSampleTable(nn.Module):
    """Named columns with one row per training sample, identical on all ranks.

    A method creates it in ``prepare``, where the number of samples is known, and keeps it as an attribute::

        self.memory = PerSampleTable(key=torch.zeros(plan.dataset_size, 128))

    Its loss reads rows by sample id, and writes the rows of all ranks::

        old = self.memory.read("key", batch.sample_id)  # (N, 128), a copy
        self.memory.write(gather_detached(batch.sample_id), key=gather_detached(z))

    The framework handles the rest:

    - Columns are buffers and thus in every checkpoint. They belong to the images they were computed from: a checkpoint
      can only be resumed with the same images, and ``--init-from`` does not load them.
    - Writes are visible to later reads, but are undone if fp16 overflows and the step is skipped.
    - If a row is not finite, no column of that sample is written. If a sample occurs several times, its last row is
      kept, on all ranks the same.

    ``dim`` is the dimension that indexes samples, in all columns and in the rows read and written.
    """

    def __init__(self, /, *, dim: int = 0, **columns: Tensor) -> None:
        super().__init__()
        self.dim = dim
        for name, start in columns.items():
            self.register_buffer(name, start)
        self._replaced: list[tuple[Tensor, dict[str, Tensor]]] | None = None  # ids and old rows of each write

    def read(self, column: str, ids: Tensor) -> Tensor:
        """The rows of the samples ``ids``, an integer tensor of any shape, which replaces the dimension ``dim``."""
        values: Tensor = getattr(self, column)
        require(
            values.dtype not in (torch.float16, torch.bfloat16),
            f"a per-sample table was cast to {values.dtype}, which is too imprecise for moving averages; use "
            "trainer.precision=bf16-mixed or 16-mixed instead of bf16-true or 16-true",
        )
        return values[self._at(ids)]

    @torch.no_grad()
    def write(self, ids: Tensor, /, **rows: Tensor) -> None:
        """Store ``rows`` of the samples ``ids`` (n,) by column name. Both must be gathered from all ranks in rank order
        (``gather_detached``). Needs no host-device synchronisation."""
        # With duplicate indices, the row that an indexed write keeps is undefined, so all duplicates get the last row.
        ordered, order = ids.sort(stable=True)
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        rows = {name: new.index_select(self.dim, last) for name, new in rows.items()}
        finite = torch.stack([self._is_finite(new) for new in rows.values()]).all(0)  # (n,)
        old = {name: self.read(name, ids) for name in rows}
        for name, new in rows.items():
            mask = finite.view(-1, *[1] * (new.ndim - self.dim - 1))
            values: Tensor = getattr(self, name)
            values[self._at(ids)] = torch.where(mask, new.to(values.dtype), old[name])
        if self._replaced is not None:
            self._replaced.append((ids, old))

    def watch(self) -> None:
        """Start keeping overwritten rows, for :meth:`take_back`, until :meth:`let_go`."""
        self._replaced = []

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo all writes since :meth:`watch`."""
        for ids, rows in reversed(self._replaced or []):
            for name, old in rows.items():
                getattr(self, name)[self._at(ids)] = old

    def let_go(self) -> None:
        """Accept the writes: forget the overwritten rows."""
        self._replaced = None

    def _at(self, ids: Tensor) -> tuple[slice | Tensor, ...]:
        return (*[slice(None)] * self.dim, ids)

    def _is_finite(self, rows: Tensor) -> Tensor:
        return rows.isfinite().movedim(self.dim, 0).flatten(1).all(1) if rows.ndim > 1 else rows.isfinite()


def tables_of(module: nn.Module) -> dict[str, PerSampleTable]:
    """The tables in ``module``, by their names in its ``state_dict``."""
    return {name: table for name, table in module.named_modules() if isinstance(table, PerSampleTable)}
