"""Measures of the leaderboard that are functions of tensors alone. Features are [N, D], images [N, C, H, W] in [-1, 1]."""
from __future__ import annotations

import torch
from torch import Tensor

from zoo.metrics import Interval


def _radius(x: Tensor, k: int) -> Tensor:
    """Distance [N] to the k-th nearest other point."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d.fill_diagonal_(torch.inf).kthvalue(k, dim=1).values


def manifold(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al., NeurIPS 2019, https://arxiv.org/abs/1904.06991) and density and coverage (Naeem et
    al., ICML 2020, https://arxiv.org/abs/2002.09797) between features of data and of samples.

    A set's manifold is the union of balls around its points that reach their k-th nearest neighbour. precision: share of samples in
    the data's manifold; recall: share of data in the samples' manifold; density: mean number of data balls around a sample, over k;
    coverage: share of data balls with a sample inside. Recall depends on the number of samples: compare equal numbers only."""
    near = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist")
    reach, spread = _radius(real, k), _radius(fake, k)
    inside = near <= reach[:, None]
    share = lambda hits: hits.double().mean().item()
    return {"precision": share(inside.any(0)), "recall": share((near <= spread).any(1)),
            "density": inside.sum().item() / (k * len(fake)), "coverage": share(inside.any(1))}


def paired_kid(x: Tensor, y: Tensor) -> Interval:
    """`zoo.metrics.kid` for sets whose i-th members are dependent (made from the same noise): the pairs (x_i, y_i) are left out,
    so that the estimate stays unbiased where `kid` would come out too low. x, y [N, D], N at least 3."""
    if len(x) != len(y):
        raise ValueError(f"paired sets have one length, got {len(x)} and {len(y)}")
    n, kernel = len(x), lambda a, b: ((a @ b.T).double() / a.shape[1] + 1) ** 3
    cross = kernel(x, y)
    h = (kernel(x, x) + kernel(y, y) - cross - cross.T).fill_diagonal_(0).sum(1)
    value = h.sum() / (n * (n - 1))
    without = (h.sum() - 2 * h) / ((n - 1) * (n - 2))
    error = ((n - 1) * without.var(unbiased=False)).sqrt()
    return Interval(*(1e3 * float(v) for v in (value, value - 1.96 * error, value + 1.96 * error)))


def endpoint_error(images: Tensor, reference: Tensor, diversity: float) -> float:
    """Root-mean-square difference to the teacher's own images from the same noise, averaged over images, in units of its seed
    `diversity`: 0 is the teacher's map, 1 as far as another seed of the same prompt."""
    return (images - reference).flatten(1).square().mean(1).sqrt().mean().item() / diversity
