"""``speed.compile``: torch.compile for encoders and for losses, which are pure functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from sslzoo.recipe.sections import Compiler

P = ParamSpec("P")
T = TypeVar("T")

_compiler: ContextVar[Compiler | None] = ContextVar("compiler", default=None)


@contextmanager
def compiled_losses(compiler: Compiler | None) -> Iterator[None]:
    """Context in which functions marked by :func:`compilable` are compiled by ``compiler``; None: not compiled."""
    before = _compiler.set(compiler)
    try:
        yield
    finally:
        _compiler.reset(before)


def compilable(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a loss that ``speed.compile`` compiles: a pure function that torch traces as a whole."""

    compiled: dict[Compiler, Callable[P, T]] = {}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # part of another loss
            return function(*args, **kwargs)
        compiler = _compiler.get()
        if compiler is None:
            return function(*args, **kwargs)
        if compiler not in compiled:
            compiled[compiler] = torch.compile(function, backend=compiler)
        return compiled[compiler](*args, **kwargs)

    return call


def compile_encoders(method: nn.Module, backbone: nn.Module, compiler: Compiler) -> None:
    """Compile ``backbone`` and its copies in ``method``, such as a momentum encoder's. Weights keep their names, and
    dropout draws what it draws uncompiled."""
    if compiler == "inductor":
        from torch._inductor import config

        config.fallback_random = True
    # torch's compiler looks at this attribute of all inputs.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for module in method.modules():
        if type(module) is type(backbone):
            module.compile(backend=compiler)
