"""What features are like without a look at labels: spread, rank and spectrum, neighbours, and invariance to views.

Every function takes float64 and follows the definition in its paper. Shapes: N samples, F features, P samples that are
compared in pairs, n samples in q views each. "Normalised" means rows of length 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslzoo.data.module import UNLABELLED

SAMPLES = UNLABELLED  # images whose features are measured at most, as many as in the RankMe paper
PAIRS = 2_048  # of these, images that are compared in pairs
NEIGHBOURS = 10  # nearest of these, for the overlap between evaluations
VIEWS = 4  # views of an image for alignment and LiDAR, at least
OBJECTS = 512  # images shown in views, or as many as features if these are more,
SHARE = 16  # but at most one image in so many, so that small data sets do not spend their time on it
EPSILON = 1e-7  # added to each share of an effective rank (RankMe, LiDAR)
DELTA = 1e-4  # added to the variance within images (LiDAR)
SMALLEST = 1e-12  # eigenvalues below this fraction of the largest are rounding errors


class Neighbours(NamedTuple):
    """The nearest neighbours of some samples among themselves."""

    sample_id: Tensor  # (P,), ascending
    nearest: Tensor  # (P, k): the sample_id of each one's nearest, in any order


class Plain(NamedTuple):
    """What is measured on plain images."""

    figures: dict[str, float]
    spectrum: Tensor  # (min(N - 1, F),): eigenvalues of the covariance, descending
    neighbours: Neighbours


def objects(size: int, width: int) -> int:
    """Of how many of ``size`` training images views are measured, for features of ``width`` F.

    At least as many as features where there are enough images, so that the variance within images has full rank.
    """
    return min(max(OBJECTS, width), max(2, size // SHARE))


@torch.no_grad()
def measure_plain(x: Tensor, label: Tensor | None, sample_id: Tensor, compared: Tensor) -> Plain:
    """Measure features ``x`` (N, F), float64 and finite, N at least 2, of the samples ``sample_id`` (N,), ascending;
    ``label`` (N,) if there are labels. ``compared`` are the indices (P,), at least 2 and ascending, of the samples that
    are compared in pairs.

    Figures: ``width`` (F), ``std``, ``rankme``, ``alpha``, ``uniformity``, and ``separation`` with labels. Those that
    the features do not determine (``alpha`` with less than three components, ``separation`` of one class) are absent.
    """
    z = normalised(x)
    of_x, of_centred = singular_values(x)
    spectrum = of_centred.square() / len(x)
    cosine = z[compared] @ z[compared].T
    figures = {
        "width": float(x.shape[1]),
        "std": deviation(z),
        "rankme": effective_rank(of_x),
        "alpha": decay(spectrum),
        "uniformity": uniformity(cosine),
        "separation": None if label is None else separation(z, label),
    }
    known = {name: value for name, value in figures.items() if value is not None}
    return Plain(known, spectrum, nearest(cosine, sample_id[compared]))


@torch.no_grad()
def measure_views(x: Tensor) -> dict[str, float]:
    """``alignment`` and ``lidar`` of features ``x`` (n, q, F), float64 and finite, n and q at least 2."""
    return {"alignment": alignment(normalised(x)), "lidar": lidar(x)}


@torch.no_grad()
def measure_embeddings(x: Tensor) -> dict[str, float]:
    """``embedding_width`` (D), ``embedding_std`` and ``embedding_rankme`` of what the loss sees, ``x`` (N, D), float64
    and finite: a collapse shows there first, and may leave the features as they began."""
    of_x, _ = singular_values(x)
    return {
        "embedding_width": float(x.shape[1]),
        "embedding_std": deviation(normalised(x)),
        "embedding_rankme": effective_rank(of_x),
    }


def normalised(x: Tensor) -> Tensor:
    """``x`` (..., F) with rows of length 1; rows of zeros stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def deviation(z: Tensor) -> float:
    """Standard deviation of each of the F features over the samples, averaged, for normalised ``z`` (N, F): 0 where all
    samples are alike, at most 1/sqrt(F), where they fill all directions evenly (Chen and He, arXiv:2011.10566, 4.1)."""
    return float(z.std(0, correction=0).mean())


def singular_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of ``x`` (N, F) and of ``x`` less its mean, descending.

    They are those of the triangular factor R of [1, x] = QR: without its first column, and without its first row too.
    """
    r = torch.linalg.qr(torch.cat([x.new_ones(len(x), 1), x], dim=1), mode="r")[1]
    return torch.linalg.svdvals(r[:, 1:]), torch.linalg.svdvals(r[1:, 1:])


def effective_rank(size: Tensor) -> float:
    """exp(-sum_k p_k log p_k) with p_k = size_k / sum(size) + 1e-7, for sizes (K,) that are not negative.

    Of the singular values of the features it is RankMe (Garrido et al., arXiv:2210.02885): about the number of
    directions that are used.
    """
    p = size / size.sum().clamp_min(torch.finfo(size.dtype).tiny) + EPSILON
    return float((-(p * p.log()).sum()).exp())


def decay(spectrum: Tensor) -> float | None:
    """The exponent alpha of eigenvalues (K,) of the covariance that fall like j**-alpha: the slope of log eigenvalue
    over log j by least squares (Agrawal et al., "alpha-ReQ", NeurIPS 2022).

    Of K components above rounding errors, those from K/20 to K/2 are fitted: the first few follow no power law, nor do
    the last. None with less than three of them.
    """
    known = int((spectrum > SMALLEST * spectrum[0]).sum()) if len(spectrum) else 0
    first, last = max(1, known // 20), max(known // 2, min(known, 3))
    if last - first < 2:
        return None
    log_j = torch.arange(first, last + 1, dtype=spectrum.dtype, device=spectrum.device).log()
    log_value = spectrum[first - 1 : last].log()
    log_j = log_j - log_j.mean()
    return -float((log_j * log_value).sum() / log_j.square().sum())


def uniformity(cosine: Tensor) -> float:
    """log of the mean of exp(-2 |a - b|^2) over all pairs of different samples, from the cosines (P, P) between them
    (Wang and Isola, arXiv:2005.10242): 0 where all are alike, about -4 where they are spread evenly."""
    off = ~torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    return float((4 * cosine[off] - 4).exp().mean().log())


def nearest(cosine: Tensor, sample_id: Tensor) -> Neighbours:
    """The 10 nearest of each of the samples ``sample_id`` (P,) by the cosines (P, P) between them."""
    others = cosine.masked_fill(torch.eye(len(cosine), dtype=torch.bool, device=cosine.device), -torch.inf)
    index = others.topk(min(NEIGHBOURS, len(cosine) - 1), dim=1).indices
    return Neighbours(sample_id, sample_id[index])


def overlap(before: Neighbours, now: Neighbours) -> float | None:
    """The fraction of the nearest neighbours ``now`` that were among them ``before``, over the samples of both.
    1: the encoder has not changed the neighbourhoods. None if no sample is in both."""
    place = torch.searchsorted(before.sample_id, now.sample_id).clamp_max(len(before.sample_id) - 1)
    new = (before.sample_id[place] == now.sample_id).nonzero()[:, 0]
    old = place[new]
    if len(new) == 0:
        return None
    same = before.nearest[old][:, :, None] == now.nearest[new][:, None, :]
    return float(same.any(1).double().mean())


def separation(z: Tensor, label: Tensor) -> float | None:
    """1 - (mean cosine distance within classes) / (mean cosine distance over all), classes weighted equally, for
    normalised ``z`` (N, F): 0 where classes are mixed, 1 where each is a point (Kornblith et al., arXiv:2010.16402).

    Unlike there, no sample is compared with itself, so that it is 0 by chance however few images a class has; classes
    of one image are left out. None if there is no second class, or if all samples are alike.
    """
    index = label.unique(return_inverse=True)[1]
    count = torch.bincount(index).to(z.dtype)
    sums = z.new_zeros(len(count), z.shape[1]).index_add_(0, index, z)
    own = z.new_zeros(len(count)).index_add_(0, index, z.square().sum(1))  # of samples with themselves
    count, sums, own = (part[count > 1] for part in (count, sums, own))
    within = 1 - (sums.square().sum(1) - own) / (count * (count - 1))
    means = sums / count[:, None]
    distance = (1 - means @ means.T).fill_diagonal_(0) + within.diag()
    if len(count) < 2 or float(distance.mean()) <= 1e-12:
        return None
    return float(1 - within.mean() / distance.mean())


def alignment(z: Tensor) -> float:
    """Mean of |a - b|^2 over all pairs of views of the same image, for normalised ``z`` (n, q, F): 0 where views do not
    matter (Wang and Isola, arXiv:2005.10242, with exponent 2)."""
    # The sum over pairs of views equals q times the sum over views of the squared distance to their mean.
    q = z.shape[1]
    distance = (z - z.mean(1, keepdim=True)).square().sum(2).sum(1)
    return float((2 * distance / (q - 1)).mean())


def lidar(x: Tensor) -> float:
    """LiDAR of features ``x`` (n, q, F) of n images in q views (Thilak et al., arXiv:2312.04000): the
    :func:`effective_rank` of the eigenvalues of W^-1/2 B W^-1/2, where B is the covariance of the images' means and W
    that of views around them, plus 1e-4 on the diagonal. About the number of directions that
    tell images apart, however they are shown.
    """
    n, q, width = x.shape
    means = x.mean(1)
    within = (x - means[:, None]).reshape(n * q, width)
    w = within.T @ within / (n * q) + DELTA * torch.eye(width, dtype=x.dtype, device=x.device)
    between = (means - means.mean(0)).T / n**0.5  # (F, n)
    # With W = L L^T, the eigenvalues are the squared singular values of L^-1 between.
    root, failed = torch.linalg.cholesky_ex(w)
    if bool(failed):  # features so large that their rounding errors exceed 1e-4
        variance, axes = torch.linalg.eigh(w)
        scaled = (axes.T @ between) / variance.clamp_min(DELTA).sqrt()[:, None]
    else:
        scaled = torch.linalg.solve_triangular(root, between, upper=False)
    eigenvalues = torch.linalg.svdvals(scaled).square()
    return effective_rank(torch.cat([eigenvalues, eigenvalues.new_zeros(width - len(eigenvalues))]))
