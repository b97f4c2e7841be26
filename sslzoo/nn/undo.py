"""The way back from a step that did not happen."""

from __future__ import annotations

import torch
from torch import nn

from sslzoo.nn.per_sample import tables_of


class Undo:
    """What ``module`` carries beside its weights, as it is now: running statistics and all other buffers.

    A forward pass moves batch-norm statistics and a loss may write tables, before anybody knows whether fp16
    overflows and the step is skipped. Tables per training sample may be large and few of their rows change: they
    keep those themselves.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tables = tables_of(module).values()
        for table in self._tables:
            table.watch()
        apart = {id(column) for table in self._tables for column in table.buffers()}
        self._before = {n: b.detach().clone() for n, b in module.named_buffers() if id(b) not in apart}

    @torch.no_grad()
    def take_back(self) -> None:
        """Put everything back."""
        now = dict(self._module.named_buffers())
        for name, before in self._before.items():
            now[name].copy_(before)
        for table in self._tables:
            table.take_back()

    def close(self) -> None:
        """It is no longer needed."""
        for table in self._tables:
            table.let_go()
