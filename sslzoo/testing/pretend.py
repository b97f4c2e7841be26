"""A pretended GPU: tensors that claim to be on ``cuda:0`` but compute on the CPU, with notes about operations that a
real GPU would refuse or wait for.

Kinds of notes, each with the line of code that caused it:

- ``nccl``: a collective got a CPU tensor, which the NCCL backend refuses.
- ``mixed``: an operation got both device and CPU tensors, which fails on a GPU. CPU scalars are allowed.
- ``sync``: the host waits for the device: ``item``, ``bool``, ``tolist``, ``nonzero``, boolean masks, copies.
- ``h2d``: a non-blocking copy to the device. It does not wait if the memory is pinned, which is unknown here.
- ``float64``: a result with more than one float64 number.
- ``collective``: a collective of the pretended group, with type and shape; its bytes are summed by name.

Kernels are the aten operations that are neither views nor allocations, with the bytes that they read and write.
:func:`pretend` runs the real ``Trainer.fit`` of a recipe, with the run's callbacks, and the final evaluation.
On the command line, with a recipe, a number of processes and overrides, it shrinks the recipe and prints a report on
each phase of the last steps; the exit code is 1 if a GPU would have refused something:

    python -m sslzoo.testing.pretend RECIPE WORLD [KEY=VALUE...]

Not pretended: DDP and its reduction of gradients, autocast (of ``trainer.precision=16-mixed`` only the loss scaler),
torch's synchronised batch norm (with ``trainer.sync_batchnorm=true`` the framework's is used instead), pinned memory,
streams, and all ranks but the first. The other ranks are assumed to have the same values: a sum is ``world`` times this
rank's value, and a broadcast from another rank gives zeros, or this rank's integers. Collectives other than all-reduce,
broadcast, and all-gather and reduce-scatter of tensors raise, as without a process group. Copies between host and
device do not propagate gradients, and a parameter shared by two modules is duplicated when they move. A ``stack`` in a
backward pass may contain CPU zeros from autograd, which are not noted. An aten operation counts as one kernel; on a GPU
it may be several.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.tensor  # while torch.Generator is what it expects
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sslzoo.checkpoints import latest
from sslzoo.data.datasets import open_source
from sslzoo.data.sources import FakeSource, ImageSource
from sslzoo.nn.batchnorm import to_sync
from sslzoo.processes.placement import Placement
from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.load import load_recipe
from sslzoo.recipe.sections import Recipe
from sslzoo.records.directory import Run
from sslzoo.run import trainer as launch
from sslzoo.run.build import build_run
from sslzoo.run.dry_run import evaluate

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
BREAKS = ("nccl", "mixed")  # kinds of note that are errors on a GPU
KINDS = (*BREAKS, "sync", "float64", "h2d", "collective")

# Operations whose result the host needs: sizes, errors, numbers.
WAITS = frozenset((
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave", "multinomial",
    "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "_linalg_eigh",
))  # fmt: skip
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
NO_KERNEL = frozenset((
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view",
    "resize_", "set_",
))  # fmt: skip


# -- notes --------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """A phase of a run, and the number of optimiser steps finished when it began."""

    phase: str
    step: int


@dataclass
class Notes:
    """The notes of one moment."""

    places: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    kernels: Counter[str] = field(default_factory=Counter)  # by operation
    kernel_places: Counter[str] = field(default_factory=Counter)
    kernel_bytes: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)

    def broken(self) -> list[str]:
        """Operations that a GPU would have refused, with their places in the code."""
        return [f"{kind}: {place}" for kind in BREAKS for place in self.places[kind]]


def _place() -> str:
    """The innermost line of the framework or the method on the stack, otherwise of another library."""
    frame, other = sys._getframe(2), ""
    packages = PretendedGPU.active().packages
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        package = module.partition(".")[0]
        ours = not module.startswith("sslzoo.testing") and module != "__main__"
        if ours and package in packages:
            return f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        if not other and ours and package != "torch":
            other = f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return other or "elsewhere"


# -- the tensor ---------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor that claims to be on the GPU. ``values`` is the CPU tensor with its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> DeviceTensor:
        new = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CPU,
            requires_grad=requires_grad,
        )
        new.values = values
        return new

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Always ``cuda:0``."""
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Always True."""
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """Always False."""
        return False

    def __repr__(self, **_: Any) -> str:
        PretendedGPU.active().note("sync", "repr")
        return f"DeviceTensor({tuple(self.values.shape)}, {self.values.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        new: Tensor = DeviceTensor(self.values.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the CPU tensor, because checkpoints are loaded to the CPU first."""
        PretendedGPU.active().note("sync", f"copy of {tuple(self.shape)} into a file")
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGPU.active().compute(func, args, kwargs or {})


def _on_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or type(device) is int


def _values(x: Any) -> Any:
    """The CPU's counterpart of ``x``, for tensors and devices."""
    if isinstance(x, DeviceTensor):
        return x.values
    return CPU if isinstance(x, torch.device) else x


def _placed(x: Any) -> Any:
    return DeviceTensor(x.detach()) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


def _each(change: Callable[[Any], Any], x: Any) -> Any:
    """Apply ``change`` to every leaf of nested lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple)):
        return type(x)([_each(change, part) for part in x])
    return {key: _each(change, part) for key, part in x.items()} if isinstance(x, dict) else change(x)


def _tensors(x: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    _each(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, x)
    return tensors


class _Functions(TorchFunctionMode):
    """Intercepts functions that take a device, move tensors, or leave torch, which tensor dispatch does not see."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", str(func))
        first = args[0] if args else None
        if name in ("to", "cuda", "cpu") and isinstance(first, Tensor):
            return self._move(name, func, args, kwargs)
        if isinstance(first, DeviceTensor):
            if name == "tolist":
                self.gpu.note("sync", name)
                return first.values.tolist()
            if name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if name == "new_tensor":
                self.gpu.note("sync", "new_tensor: a blocking copy to the device")
                return _placed(torch.tensor(*args[1:], **({"dtype": first.dtype} | _on_host(kwargs))))
            if name == "__setitem__" and isinstance(args[2], (int, float)):
                # A GPU fills in the number on the device; here, C++ would create a CPU tensor from it.
                return func(first, args[1], DeviceTensor(torch.tensor(args[2], dtype=first.dtype)))
            if name == "one_hot":  # its C++ code reads the device directly
                return self._one_hot(func, args, kwargs)
            if name.startswith("new_") or name.endswith("_like"):
                asked = kwargs.get("device")
                if asked is not None and not _on_gpu(asked):
                    return func(first.values, *args[1:], **kwargs)
        if _on_gpu(kwargs.get("device")):
            return self._create(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _create(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*_each(_values, args), **_each(_values, _on_host(kwargs)))
        if name not in ("tensor", "as_tensor", "asarray"):
            self.gpu.check_generator(name, kwargs)
            self.gpu.count(name, out)
        elif not any(isinstance(x, DeviceTensor) for x in _tensors((args, kwargs))):
            self.gpu.note("sync", f"torch.{name}: a blocking copy to the device")
        return _each(_placed, out)

    def _one_hot(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1:
            self.gpu.note("sync", "one_hot without num_classes")
        out = func(*_each(_values, args), **kwargs)
        self.gpu.count("one_hot", out)
        return _placed(out)

    def _move(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args
        named = {"cuda": CUDA, "cpu": CPU}.get(name, kwargs.get("device", kwargs.get("other")))
        target = next((v for v in rest if isinstance(v, (torch.device, str, Tensor))), named)
        target = target.device if isinstance(target, Tensor) else target
        if target is None:  # conversion to another dtype
            return func(*args, **kwargs)
        if _on_gpu(target) == isinstance(x, DeviceTensor):  # already on that device
            staying = [CPU if isinstance(v, (torch.device, str)) else v for v in rest]
            return func(x, *staying, **_on_host(kwargs)) if name == "to" else x
        dtypes = [v for v in (*rest, kwargs.get("dtype")) if isinstance(v, torch.dtype)]
        dtype = dtypes[0] if dtypes else x.dtype
        if isinstance(x, DeviceTensor):
            self.gpu.note("sync", f"copy of {tuple(x.shape)} to the host")
            return x.values.detach().to(dtype, copy=True)
        non_blocking = kwargs.get("non_blocking", False) or any(v is True for v in rest)
        self.gpu.note_copy(x, non_blocking=non_blocking)
        return _placed(x.detach().to(dtype, copy=True))


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}


# -- the device and its group -------------------------------------------------------------------


class _Group(NamedTuple):
    """A pretended process group."""

    backend: str


class _Work:
    """A finished collective."""

    def wait(self) -> None:
        """Return at once."""


class PretendedGPU:
    """Context in which ``cuda:0`` and a process group of ``world`` ranks seem to exist.

    ``moments`` has the notes by phase and step; :meth:`enter` sets the current moment.
    """

    _active: ClassVar[PretendedGPU | None] = None

    def __init__(self, world: int = 1) -> None:
        self.world = world
        self.packages = {"sslzoo"}  # packages whose lines are reported as places
        self.moments: dict[Moment, Notes] = {}
        self.enter("start", 0)
        self._undo = ExitStack()

    @classmethod
    def active(cls) -> PretendedGPU:
        """The pretended GPU whose context is active."""
        assert cls._active is not None, "a device tensor was used outside of its context"
        return cls._active

    def __enter__(self) -> PretendedGPU:
        assert PretendedGPU._active is None, "there is one pretended GPU at a time"
        with ExitStack() as stack:
            PretendedGPU._active = self
            stack.callback(setattr, PretendedGPU, "_active", None)
            stack.enter_context(warnings.catch_warnings())
            # Autocast disables itself on a missing device, as it should.
            warnings.filterwarnings("ignore", ".*CUDA is not available")
            for name, value in self._collectives().items():
                stack.enter_context(mock.patch.object(dist, name, value, create=True))
            # Random numbers of the device come from the CPU's generator.
            stack.enter_context(mock.patch.object(torch, "Generator", _generator_class()))
            states = {
                "get_rng_state": lambda device=None: torch.get_rng_state(),
                "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            }
            stack.enter_context(mock.patch.multiple(torch.cuda, **states))
            # Let modules replace parameters when they move, and optimisers use foreach for device tensors.
            before = torch.__future__.get_overwrite_module_params_on_conversion()
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
            foreach: list[type] = import_module("torch.optim.optimizer")._foreach_supported_types
            foreach.append(DeviceTensor)
            stack.callback(foreach.remove, DeviceTensor)
            stack.enter_context(_Functions(self))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    # -- notes ----------------------------------------------------------------------------------

    def enter(self, phase: str, step: int) -> Notes:
        """Set the current moment, to which notes are added."""
        self.now = Moment(phase, step)
        self.notes = self.moments.setdefault(self.now, Notes())
        return self.notes

    @contextmanager
    def during(self, phase: str, step: int) -> Iterator[None]:
        """Set the current moment within a context."""
        before = self.now
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter(*before)

    def note(self, kind: str, what: str) -> None:
        """Add a note of ``kind`` at the current place in the code."""
        self.notes.places[kind][f"{_place()} [{what}]"] += 1

    def note_copy(self, x: Tensor, *, non_blocking: bool) -> None:
        """Note a copy from host to device."""
        if non_blocking:
            self.note("h2d", f"{x.numel() * x.element_size()} bytes")
        else:
            self.note("sync", f"blocking copy of {tuple(x.shape)} to the device")

    def count(self, name: str, out: Any, inputs: Sequence[Tensor] = ()) -> None:
        """Count a kernel that computed ``out`` from ``inputs``."""
        made = _tensors(out)
        if name not in NO_KERNEL:
            self.notes.kernels[name] += 1
            self.notes.kernel_places[_place()] += 1
            self.notes.kernel_bytes += sum(x.numel() * x.element_size() for x in (*made, *inputs))
            if any(x.dtype == torch.float64 and x.numel() > 1 for x in made):
                self.note("float64", name)

    def notes_of(self, phase: str, step: int) -> Notes:
        """The notes of a moment; empty if it did not occur."""
        return self.moments.get(Moment(phase, step), Notes())

    def places(self, kind: str) -> list[str]:
        """The places of all notes of ``kind``, in any moment."""
        return list(dict.fromkeys(place for notes in self.moments.values() for place in notes.places[kind]))

    def broken(self) -> list[str]:
        """All operations that a GPU would have refused, with moment and place."""
        return [
            f"{at.phase} of step {at.step}: {what}"
            for at, notes in self.moments.items()
            for what in notes.broken()
        ]

    # -- operations -----------------------------------------------------------------------------

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute the aten operation ``func`` on the CPU and add notes about it."""
        name: str = func._schema.name.partition("::")[2]
        tensors = _tensors((args, kwargs))
        placed = [x for x in tensors if isinstance(x, DeviceTensor)]
        if len(placed) < len(tensors):
            self._note_mix(name, args, [x for x in tensors if not isinstance(x, DeviceTensor)])
        if name in WAITS:
            self.note("sync", name)
        if name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self.note("sync", f"{name} with a mask")
        self.check_generator(name, kwargs)
        out = func(*_each(_values, args), **_each(_values, kwargs))
        if name == "_local_scalar_dense":
            return out
        if not func.is_view:
            self.count(name, out, [x.values for x in placed])
        # Operations in place must return the same device tensor.
        known = {id(x.values): x for x in placed}
        return _each(lambda x: known[id(x)] if id(x) in known else _placed(x), out)

    def _note_mix(self, name: str, args: Any, host: list[Tensor]) -> None:
        if name == "_to_copy":
            return
        if name == "copy_":
            into, source = args[:2]
            if isinstance(into, DeviceTensor):
                self.note_copy(source, non_blocking=len(args) > 2 and args[2])
            else:
                self.note("sync", f"copy of {tuple(source.shape)} to the host")
            return
        refused = [x for x in host if x.ndim > 0]
        if name in INDEXING and isinstance(args[0], DeviceTensor):
            refused = [x for x in args[2:3] if not isinstance(x, DeviceTensor) and x.ndim > 0]
            if any(x is not None and not isinstance(x, DeviceTensor) for x in args[1]):
                self.note("sync", f"{name} with an index from the host")
        elif name in ("cat", "stack"):
            # In a backward pass, C++ fills undefined gradients with zeros on the CPU.
            refused = [] if name == "stack" and torch._C._current_graph_task_id() != -1 else host
        elif name.endswith("_") and not isinstance(args[0], DeviceTensor):
            refused = host  # a device scalar is written to a CPU tensor
        if refused:
            self.note("mixed", f"{name} {[tuple(x.shape) for x in refused]}")

    def check_generator(self, name: str, kwargs: dict[str, Any]) -> None:
        """Note the use of a CPU generator on the device."""
        generator = kwargs.get("generator")
        if generator is not None and not getattr(generator, "on_gpu", False):
            self.note("mixed", f"{name} with a CPU generator")

    # -- collectives ----------------------------------------------------------------------------

    def _collectives(self) -> dict[str, Callable[..., Any]]:
        """Replacements for functions of ``torch.distributed``; none for one process."""
        world, whole = self.world, _Group("nccl")
        if world == 1:
            return {}

        def all_reduce(
            x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
        ) -> Any:
            self._check("all_reduce", group, x)
            same = (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG)
            assert op == dist.ReduceOp.SUM or op in same, f"{op} is not pretended"
            if op == dist.ReduceOp.SUM:
                _values(x).detach().mul_(world)
            return _Work()

        def all_gather(out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Any:
            self._check("all_gather", group, x, out)
            gathered = _values(x).detach().expand(world, *x.shape)
            _values(out).detach().view(gathered.shape).copy_(gathered)
            return _Work()

        def reduce_scatter(out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Any:
            self._check("reduce_scatter", group, x, out)
            _values(out).detach().copy_(_values(x).detach()[: len(out)] * world)
            return _Work()

        def broadcast(x: Tensor, src: int = 0, group: Any = None, async_op: bool = False) -> Any:
            self._check("broadcast", group, x)
            if src != 0 and x.is_floating_point():
                _values(x).detach().zero_()  # to be deterministic
            return _Work()

        return {
            "is_initialized": lambda: True,
            "get_world_size": lambda group=None: world,
            "get_rank": lambda group=None: 0,
            "get_backend": lambda group=None: (group or whole).backend,
            "new_group": lambda *_, backend="nccl", **__: _Group(backend),
            "all_reduce": all_reduce,
            "all_gather_single": all_gather,
            "all_gather_into_tensor": all_gather,
            "reduce_scatter_single": reduce_scatter,
            "reduce_scatter_tensor": reduce_scatter,
            "broadcast": broadcast,
        }

    def _check(self, name: str, group: _Group | None, sent: Tensor, *others: Tensor) -> None:
        if group is not None and group.backend != "nccl":
            return
        host = [x for x in (sent, *others) if not isinstance(x, DeviceTensor)]
        if host:
            self.note("nccl", f"{name} of a CPU tensor {tuple(host[0].shape)}")
        self.note("collective", f"{name} {sent.dtype} {tuple(sent.shape)}")
        self.notes.collectives[name] += 1
        # Bytes received: for a gather, those of all ranks.
        arrives = others[0] if others else sent
        self.notes.collective_bytes[name] += arrives.numel() * arrives.element_size()


def _generator_class() -> type:
    class Generator(torch.Generator):
        """A CPU generator that remembers the device it was created for."""

        on_gpu: bool

        def __new__(cls, device: Any = "cpu") -> Any:
            new = super().__new__(cls, "cpu")  # type: ignore[call-arg]
            new.on_gpu = _on_gpu(device)
            return new

        def __init__(self, device: Any = "cpu") -> None:
            pass

    return Generator


# -- a run --------------------------------------------------------------------------------------

STEPS = 6  # of the one epoch
CLASSES = 4
BATCH = 16
PIXELS = 32  # of the images and of the largest view
EVAL_PIXELS = 16
UNFINISHED = 2  # step of a save while Meter has pending sums, since rows come every 4 steps
SMALL = (
    f"data.global_batch_size={BATCH}",
    "data.workers=0",
    "data.classes=[]",
    "trainer.max_epochs=1",
    "optim.warmup_epochs=0",
    "optim.warmup_ramp=closed",
    "probe.holdout=0.3",
    "probe.online=true",
    "eval.every_epochs=1",
    f"eval.size={EVAL_PIXELS}",
    "eval.resize=null",
    "eval.knn_k=5",
    "eval.baselines=true",
    "logging.wandb=null",
    "logging.every_steps=4",
    "logging.checkpoint_every_steps=2",
)
# Trainer keys for hardware, which do not apply here.
MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A bundled recipe to be shrunk, and the number of ranks."""

    recipe: str
    world: int
    overrides: tuple[str, ...] = ()


class _Stop(Exception):
    """Ends a session, as a scheduler would."""


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Do nothing, because Lightning's method requires a CPU device."""


class _Scaling(MixedPrecision):
    def forward_context(self) -> Any:
        """No context: losses are scaled, but autocast is not pretended."""
        return nullcontext()


class _First(Callback):
    """Placed before the run's callbacks; sets the current phase."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu = gpu

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.gpu.enter("callbacks before", pl_module.optimizer_steps)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.gpu.enter("callbacks after", self.gpu.now.step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.gpu.enter("validation", pl_module.optimizer_steps)


class _Last(_First):
    """Placed after the run's callbacks; sets the current phase, and ends the session before step ``stop_at``."""

    def __init__(self, gpu: PretendedGPU, stop_at: int | None) -> None:
        super().__init__(gpu)
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.optimizer_steps == self.stop_at:
            self.gpu.enter("teardown", pl_module.optimizer_steps)
            raise _Stop
        self.gpu.enter("step", pl_module.optimizer_steps)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.gpu.enter("transfer", pl_module.optimizer_steps)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.gpu.enter("epoch end", pl_module.optimizer_steps)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.gpu.enter("teardown", pl_module.optimizer_steps)


def train(gpu: PretendedGPU, job: Job, folder: Path, *, stop_at: int | None = None) -> None:
    """Call :func:`pretend` with the shrunk recipe of ``job``. Checkpoints are saved at steps 2 and 5 with pending sums
    in Meter, at 4 and 6 without."""
    recipe, source = _small(job, folder / "images")
    pretend(gpu, recipe, source, folder, stop_at=stop_at)


def pretend(
    gpu: PretendedGPU, recipe: Recipe, source: ImageSource, folder: Path, *, stop_at: int | None = None
) -> None:
    """Run one session of ``recipe`` on ``gpu``, from the last checkpoint in ``folder`` to step ``stop_at``, or to the
    end including the final evaluation."""
    strategy = SingleDeviceStrategy(device=CUDA)
    strategy.world_size = gpu.world
    options = {key: value for key, value in recipe.trainer.items() if key not in MACHINE}
    here = replace(recipe, trainer=options | {"accelerator": "cpu", "devices": 1})
    built_here: dict[str, Any] = {
        "build_strategy": lambda *_: strategy,
        "Trainer": lambda **given: Trainer(**{**given, "accelerator": _Accelerator()}),
    }
    with gpu, mock.patch.multiple(launch, **built_here):
        placement = Placement(world_size=gpu.world)
        built = build_run(here, Run(folder, "pretended"), source=source, placement=placement, brief=True)
        method, trainer = built.method, built.trainer
        gpu.packages.add(type(method).__module__.partition(".")[0])
        if recipe.trainer.get("sync_batchnorm"):
            to_sync(method)
        if recipe.trainer.get("precision") == "16-mixed":
            strategy.precision_plugin = _Scaling("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        vars(trainer)["callbacks"] = [_First(gpu), *built.callbacks, _Last(gpu, stop_at)]
        save = trainer.save_checkpoint

        def save_noted(*args: Any, **kwargs: Any) -> None:
            with gpu.during("save", method.optimizer_steps):
                save(*args, **kwargs)

        with mock.patch.object(trainer, "save_checkpoint", save_noted), suppress(_Stop):
            checkpoint = latest(built.run.checkpoints)
            if checkpoint is not None:
                gpu.enter("resume", int(checkpoint.stem.removeprefix("step=")))
            trainer.fit(method, datamodule=built.data, ckpt_path=checkpoint)
            gpu.enter("evaluation", method.optimizer_steps)
            method.to(CUDA)
            evaluate(built)


def _small(job: Job, images: Path) -> tuple[Recipe, ImageSource]:
    """The recipe with few small steps and small views, and images of the type that it uses."""
    recipe = load_recipe(job.recipe, [*SMALL, *job.overrides]).recipe
    largest = max(view.size for view in recipe.views)
    if largest > PIXELS:
        views = tuple(replace(view, size=view.size * PIXELS // largest) for view in recipe.views)
        recipe = replace(recipe, views=views)
    count = STEPS * recipe.data.global_batch_size
    channels = len(recipe.data.mean)
    if not dataset_info(recipe.data.dataset).decoded_by_workers:
        return recipe, FakeSource(count, channels, PIXELS, CLASSES)
    if not images.exists():
        _write_images(images, count)
    recipe = replace(recipe, data=replace(recipe.data, dataset="imagefolder", root=str(images)))
    return recipe, open_source(recipe.data)


def _write_images(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    for i in range(count):
        for split in ("train", "test"):
            path = folder / split / f"class{i % CLASSES}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(path)


# -- command line -------------------------------------------------------------------------------


def report(gpu: PretendedGPU, places: int = 12) -> str:
    """One paragraph for each phase of the last two steps, each phase outside of steps, and each failure."""
    last = max((at.step for at in gpu.moments if at.phase == "step"), default=0)
    every_step = ("transfer", "callbacks before", "step", "callbacks after")
    lines: list[str] = []
    for at, notes in gpu.moments.items():
        if at.phase not in every_step or at.step >= last - 1 or notes.broken():
            lines += _paragraph(at, notes, places)
    return "\n".join(lines)


def _paragraph(at: Moment, notes: Notes, places: int) -> list[str]:
    kernels, mebibytes = sum(notes.kernels.values()), notes.kernel_bytes / 2**20
    sent = [f"{n} {name} {notes.collective_bytes[name]} bytes" for name, n in notes.collectives.items()]
    lines = [f"-- {at.phase} of step {at.step}: {kernels} kernels, {mebibytes:.1f} MiB; {', '.join(sent)}"]
    for kind, counts in notes.places.items():
        if counts:
            lines.append(f"   {kind}: {sum(counts.values())}")
            lines += [f"     {n:4d} x {place}" for place, n in counts.most_common(places)]
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run two sessions of a recipe, the second resumed from the first, and print reports; returns 1 on failures."""
    recipe, world, *overrides = arguments
    job = Job(recipe=recipe, world=int(world), overrides=tuple(overrides))
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for title, stop_at in (("a new run", UNFINISHED), ("resumed", None)):
            gpu = PretendedGPU(job.world)
            try:
                train(gpu, job, Path(folder), stop_at=stop_at)
            finally:
                sys.stdout.write(f"== {title}\n{report(gpu)}\n")
            broken += gpu.broken()
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
