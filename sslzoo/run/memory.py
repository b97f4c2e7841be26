"""Memory that a recipe needs: of a device, from steps on a few images, and shared memory of data workers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslzoo.recipe.catalog import dataset_info
from sslzoo.recipe.sections import Recipe

if TYPE_CHECKING:
    from sslzoo.run.build import BuiltRun

PREFETCHED = 2  # batches that each data worker makes ahead, as in torch


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made within it: ``held`` now, and ``peak``, the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # by id of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and count the memory of its results."""
        self._note((args, kwargs), counted=False)  # made before, if not known
        out = func(*args, **(kwargs or {}))
        self._note(out, counted=True)
        self.peak = max(self.peak, self.held)
        return out

    def _note(self, values: Any, *, counted: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._known:
                self._follow(tensor.untyped_storage(), counted=counted)

    def _follow(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key, size = id(storage), storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.held += size


class StepMemory(Callback):
    """Measures the tensors that a micro-batch makes: the most bytes at once until its backward pass is over, and from
    then on."""

    def __init__(self) -> None:
        self.peaks = (0, 0)
        self._mode: PeakMemory | None = None
        self._forward_and_backward = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin to measure."""
        self._mode = PeakMemory()
        self._mode.__enter__()

    def on_after_backward(self, *_: Any) -> None:
        """What follows is the optimiser's update, and further passes of some methods."""
        assert self._mode is not None
        self._forward_and_backward, self._mode.peak = self._mode.peak, self._mode.held

    def on_train_batch_end(self, *_: Any) -> None:
        """The micro-batch is over."""
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self.peaks = (
            max(self.peaks[0], self._forward_and_backward),
            max(self.peaks[1], self._mode.peak),
        )
        self._mode = None


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of the tensors on a device during a training step."""

    per_image: int  # bytes that grow with the batch of the device, for each image
    total: int  # bytes with the recipe's batch
    images: int  # that batch


def device_memory(first: BuiltRun, second: BuiltRun, train: Callable[[BuiltRun], None]) -> DeviceMemory:
    """Train two runs of one recipe, with different numbers of images in a micro-batch, and extrapolate to the
    micro-batch of the recipe's plan. What grows with the images of all devices, such as logits against gathered
    embeddings, is taken as growing with those of one."""
    measured = []
    for run in (first, second):
        memory = StepMemory()
        run.trainer.callbacks.insert(0, memory)  # type: ignore[attr-defined]
        train(run)
        measured.append((memory.peaks, run.data.plan.micro_batch_size))
    (peaks, n), (others, m) = measured
    state = sum(t.numel() * t.element_size() for t in (*first.method.parameters(), *first.method.buffers()))
    for optimizer in first.trainer.optimizers:  # its state is made in the first update, and stays
        tensors = (t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
        state += sum(t.numel() * t.element_size() for t in tensors)
    images = first.plan.micro_batch_size
    grows = [(b - a) / (m - n) for a, b in zip(peaks, others, strict=True)]
    totals = [state + a + slope * (images - n) for a, slope in zip(peaks, grows, strict=True)]
    largest = max(range(len(totals)), key=totals.__getitem__)
    return DeviceMemory(per_image=round(grows[largest]), total=round(totals[largest]), images=images)


def shared_memory(recipe: Recipe, micro_batch_size: int, devices: int) -> int:
    """Bytes of shared memory that the data workers of a machine with ``devices`` processes fill with batches."""
    if not dataset_info(recipe.data.dataset).decoded_by_workers:
        return 0
    image = sum(view.count * view.size * view.size * len(recipe.data.mean) for view in recipe.views)
    if _augments_in_workers(recipe):
        image *= torch.float32.itemsize  # otherwise uint8
    return image * micro_batch_size * recipe.data.workers * PREFETCHED * devices


def _augments_in_workers(recipe: Recipe) -> bool:
    """Whether the data workers finish the views; a recipe that leaves device and place open is taken as run here."""
    if recipe.data.augment_on is not None:
        return recipe.data.augment_on == "worker"
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())
