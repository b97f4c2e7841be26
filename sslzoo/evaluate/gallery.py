"""What an encoder sees, in pictures: nearest neighbours of fixed test images, and a map of the test images."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslzoo.data.sources import ImageSource, UnreadableImageError
from sslzoo.distributed import gather_detached, rank, world_size
from sslzoo.evaluate.task import Features, Task

if TYPE_CHECKING:
    from sslzoo.data.module import EvalSet

QUERIES = 8  # images whose neighbours are shown
NEIGHBOURS = 6
MAPPED = 800  # test images in the map, if there are so many: at least that, and fewer than twice as many
PIXELS = 64  # longer side of a thumbnail


class _Near(NamedTuple):
    """The most similar training images of each query, (Q, K): cosines and sample ids; -1 where there are fewer."""

    cosine: Tensor
    sample_id: Tensor


def gallery(task: Task, train: EvalSet, test: EvalSet) -> dict[str, Any] | None:
    """Neighbours and map as plain values on rank 0, None on the others. Collective.

    The images are the same at every evaluation. Neighbours are the images of k-NN's bank with the largest cosine; if
    ``test`` is ``train``, as for data without labels, an image is not its own neighbour. The map is the projection of
    the L2-normalised features to their first two principal components. The result does not depend on the number of
    processes. None if features are not finite.
    """
    chosen = _chosen(task.test, stride=max(1, test.size // MAPPED))
    order = chosen.sample_id.argsort()
    chosen = Features(*(part[order] for part in chosen))
    queries = _queries(chosen.label.tolist())
    near = _nearest(chosen.x[queries], task, but=chosen.sample_id[queries] if train is test else None)
    if rank() != 0 or len(chosen.label) < 3 or not bool(chosen.x.isfinite().all()):
        return None
    flat, explained = _projected(chosen.x)
    return {
        "class_names": list(train.source.class_names),
        "map": {
            "x": [round(v, 4) for v in flat[:, 0].tolist()],
            "y": [round(v, 4) for v in flat[:, 1].tolist()],
            "label": chosen.label.tolist(),
            "explained": explained,
        },
        "neighbours": [
            {
                "query": _described(test.source, int(chosen.sample_id[query])),
                "nearest": [
                    _described(train.source, int(sample)) | {"cosine": round(float(cosine), 4)}
                    for cosine, sample in zip(near.cosine[row], near.sample_id[row], strict=True)
                    if cosine > -torch.inf
                ],
            }
            for row, query in enumerate(queries)
        ],
    }


def _chosen(test: Features, *, stride: int) -> Features:
    """The test images whose id is a multiple of ``stride``, of all ranks, on the device of ``label``. Collective."""
    rows = (test.sample_id % stride == 0).nonzero().squeeze(1)
    own = Features(test.x[rows.to(test.x.device)].to(test.device), test.label[rows], test.sample_id[rows])
    if world_size() == 1:
        return own
    most = torch.tensor(len(rows), device=test.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    missing = int(most) - len(rows)
    x = gather_detached(F.pad(own.x, (0, 0, 0, missing)))
    label, sample_id = (
        gather_detached(F.pad(part, (0, missing), value=-1)) for part in (own.label, own.sample_id)
    )
    there = sample_id >= 0
    return Features(x[there], label[there], sample_id[there])


def _queries(labels: list[int]) -> list[int]:
    """Rows of images of as many classes as there are, spread evenly over them."""
    firsts = list({label: row for row, label in reversed(list(enumerate(labels)))}.values())[::-1]
    firsts = [firsts[i * len(firsts) // QUERIES] for i in range(QUERIES)] if len(firsts) > QUERIES else firsts
    spread = (i * len(labels) // QUERIES for i in range(QUERIES))
    return list(dict.fromkeys([*firsts, *spread]))[: min(QUERIES, len(labels))]


def _nearest(queries: Tensor, task: Task, *, but: Tensor | None) -> _Near:
    """The neighbours of ``queries`` (Q, F) in the bank of all ranks, without the sample ``but`` (Q,) of each.
    Collective."""
    unit = F.normalize(queries, dim=1)
    rows = task.roles.bank.nonzero().squeeze(1)
    best = _Near(
        unit.new_full((len(unit), NEIGHBOURS), -torch.inf),
        torch.full((len(unit), NEIGHBOURS), -1, device=unit.device, dtype=torch.int64),
    )
    start = 0
    for x, label in task.train.chunks(rows):
        ids = task.train.sample_id[rows[start : start + len(label)]]
        start += len(label)
        cosine = unit @ F.normalize(x, dim=1).T
        if but is not None:
            cosine = cosine.masked_fill(ids == but[:, None], -torch.inf)
        best = _merged(best, _Near(cosine, ids.expand(len(unit), -1)))
    if world_size() > 1:
        every = _Near(*(torch.cat(gather_detached(part[None]).unbind(), dim=1) for part in best))
        best = _merged(_Near(best.cosine[:, :0], best.sample_id[:, :0]), every)
    return best


def _merged(best: _Near, more: _Near) -> _Near:
    """The ``NEIGHBOURS`` largest of both; of equal ones the smaller ids, so that the order of ranks does not matter."""
    cosine = torch.cat([best.cosine, more.cosine], dim=1)
    sample_id = torch.cat([best.sample_id, more.sample_id], dim=1)
    by_id = sample_id.argsort(dim=1)
    cosine, sample_id = cosine.gather(1, by_id), sample_id.gather(1, by_id)
    first = cosine.argsort(dim=1, descending=True, stable=True)[:, :NEIGHBOURS]
    return _Near(cosine.gather(1, first), sample_id.gather(1, first))


def _projected(x: Tensor) -> tuple[Tensor, list[float]]:
    """First two principal components (N, 2) of the normalised rows, and the share of the variance in each.

    From the N x N matrix of products, which is smaller than that of the features.
    """
    unit = F.normalize(x.double().cpu(), dim=1)
    centred = unit - unit.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
    signs = torch.where(vectors.pow(3).sum(dim=0) < 0, -1.0, 1.0)  # an eigenvector has no sign of its own
    total = centred.square().sum().clamp_min(1e-30)
    return vectors * signs * values.sqrt(), [round(float(v / total), 4) for v in values]


def _described(source: ImageSource, sample: int) -> dict[str, Any]:
    """Id, label and thumbnail of an image."""
    label = None if source.labels is None else int(source.labels[sample])
    return {"sample_id": sample, "label": label, "image": _thumbnail(source, sample)}


def _thumbnail(source: ImageSource, sample: int) -> str:
    """The image as a PNG (small ones) or JPEG in base64; empty if it cannot be read."""
    from PIL import Image

    try:
        pixels = source.read(sample).permute(1, 2, 0).numpy()  # (H, W, C) uint8
    except UnreadableImageError:
        return ""
    image = Image.fromarray(pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0])
    small = max(image.size) <= PIXELS
    image.thumbnail((PIXELS, PIXELS))
    data = io.BytesIO()
    image.save(data, format="PNG" if small else "JPEG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
