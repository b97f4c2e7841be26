"""Restore buffers and tables after a step that the fp16 scaler skipped."""

from __future__ import annotations

import torch
from torch import nn

from sslzoo.nn.per_sample import tables_of


class Undo:
    """A snapshot of the buffers of ``module``, such as running statistics.

    A forward pass updates batch-norm statistics, and a loss may write tables, before it is known whether fp16
    overflows and the step is skipped. Per-sample tables may be large and only few of their rows change, so they
    keep the overwritten rows themselves instead of being copied.
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
        """Restore the snapshot."""
        now = dict(self._module.named_buffers())
        for name, before in self._before.items():
            now[name].copy_(before)
        for table in self._tables:
            table.take_back()

    def close(self) -> None:
        """Discard the snapshot."""
        for table in self._tables:
            table.let_go()
