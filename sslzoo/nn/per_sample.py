"""State per training sample: tables that a method keeps and the framework guards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslzoo.checks import require


class PerSampleTable(nn.Module):
    """Named columns with a row for each training sample, the same on every rank.

    A method makes one in ``prepare``, where the number of samples is known, and keeps it as an attribute::

        self.memory = PerSampleTable(key=torch.zeros(plan.dataset_size, 128))

    Its loss reads rows by sample id, and writes the rows of all ranks::

        old = self.memory.read("key", batch.sample_id)  # (N, 128), copied
        self.memory.write(gather_detached(batch.sample_id), key=gather_detached(z))

    The framework does the rest, for whatever is of this class:

    - Columns are buffers, hence in every checkpoint. They belong to the images that they were made from: a checkpoint
      is resumed on those alone, and ``--init-from`` leaves them out.
    - Later reads see what was written, but a step that does not happen, because fp16 overflowed, takes it back.
    - A row that is not finite is not written, and the other columns of that sample stay with it. Of several rows of
      one sample the last stays, the same on all ranks.

    ``dim`` is where samples are counted, in all columns and in the rows read and written.
    """

    def __init__(self, /, *, dim: int = 0, **columns: Tensor) -> None:
        super().__init__()
        self.dim = dim
        for name, start in columns.items():
            self.register_buffer(name, start)
        self._replaced: list[tuple[Tensor, dict[str, Tensor]]] | None = None  # ids and rows before each write

    def read(self, column: str, ids: Tensor) -> Tensor:
        """The rows of the samples ``ids``, of any shape, which takes the place of ``dim``."""
        values: Tensor = getattr(self, column)
        require(
            values.dtype not in (torch.float16, torch.bfloat16),
            f"a table per training sample was cast to {values.dtype}, too coarse to average in; use "
            "trainer.precision=bf16-mixed or 16-mixed instead of bf16-true or 16-true",
        )
        return values[self._at(ids)]

    @torch.no_grad()
    def write(self, ids: Tensor, /, **rows: Tensor) -> None:
        """Store ``rows`` of the samples ``ids`` (n,) in the columns that they are named after. Both are of all ranks,
        in rank order: ``gather_detached`` makes them so. Never waits for the device."""
        # Which of several rows an indexed write keeps is not defined: they all become the last.
        ordered, order = ids.sort(stable=True)
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        rows = {name: new.index_select(self.dim, last) for name, new in rows.items()}
        sound = torch.stack([self._is_finite(new) for new in rows.values()]).all(0)  # (n,)
        old = {name: self.read(name, ids) for name in rows}
        for name, new in rows.items():
            mask = sound.view(-1, *[1] * (new.ndim - self.dim - 1))
            values: Tensor = getattr(self, name)
            values[self._at(ids)] = torch.where(mask, new.to(values.dtype), old[name])
        if self._replaced is not None:
            self._replaced.append((ids, old))

    def watch(self) -> None:
        """From here on keep what is overwritten, for :meth:`take_back`, until :meth:`let_go`."""
        self._replaced = []

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo all writes since :meth:`watch`."""
        for ids, rows in reversed(self._replaced or []):
            for name, old in rows.items():
                getattr(self, name)[self._at(ids)] = old

    def let_go(self) -> None:
        """What was written stays."""
        self._replaced = None

    def _at(self, ids: Tensor) -> tuple[slice | Tensor, ...]:
        return (*[slice(None)] * self.dim, ids)

    def _is_finite(self, rows: Tensor) -> Tensor:
        return rows.isfinite().movedim(self.dim, 0).flatten(1).all(1) if rows.ndim > 1 else rows.isfinite()


def tables_of(module: nn.Module) -> dict[str, PerSampleTable]:
    """The tables in ``module`` by their names in its ``state_dict``."""
    return {name: table for name, table in module.named_modules() if isinstance(table, PerSampleTable)}
