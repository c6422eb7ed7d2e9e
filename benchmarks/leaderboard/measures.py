"""Measures of the leaderboard that are functions of tensors alone. Features are [N, D], images [N, C, H, W] in [-1, 1]."""
from __future__ import annotations

import torch
import torch.nn.functional as F
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


# ------------------------------------------------------------------------------------------------------- classifiers fitted here
class Classifier:
    """Ridge regression of one-hot labels on features: the largest score is the answer. Closed form, so that a refit gives the same.

    features [N, D]; labels: integers [N] of one question, or [N, Q] of several, answered each by itself; strength: the penalty, in
    units of the mean squared length of a centred row."""

    def __init__(self, features: Tensor, labels: Tensor, strength: float = 0.1):
        labels = labels[:, None] if labels.dim() == 1 else labels
        self.widths = [int(column.max()) + 1 for column in labels.T]
        y = torch.cat([F.one_hot(column, width) for column, width in zip(labels.T, self.widths)], 1).double()
        self.middle, self.base = features.mean(0), y.mean(0)
        x = features - self.middle
        penalty = strength * x.square().sum(1).mean().double()
        eye = torch.eye(min(x.shape), dtype=torch.float64)
        if len(x) <= x.shape[1]:         # as many unknowns as there are fewer of: pictures or features
            self.weight = x.T @ torch.linalg.solve((x @ x.T).double() + penalty * eye, y - self.base).float()
        else:
            self.weight = torch.linalg.solve((x.T @ x).double() + penalty * eye, x.T.double() @ (y - self.base)).float()

    def __call__(self, features: Tensor) -> Tensor:
        """Labels [N, Q]."""
        scores = (features - self.middle) @ self.weight + self.base.float()
        return torch.stack([part.argmax(1) for part in scores.split(self.widths, 1)], 1)


class Palette:
    """Features of flat-coloured pictures [N, 3, H, W]: which of `colours` each cell of a grid has, softly, [N, side * side * colours].

    Colours are spread over those of the pictures it is made from (farthest points, then k-means), so that close shades under one name
    become separate features, which a linear rule on plain pixels cannot tell."""

    def __init__(self, images: Tensor, colours: int = 64, side: int = 16, softness: float = 0.05, rounds: int = 10):
        self.side, self.softness = side, softness
        g = torch.Generator().manual_seed(0)
        pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)
        pixels = pixels[torch.randint(len(pixels), (20_000,), generator=g)]
        found, far = [pixels[0]], (pixels - pixels[0]).square().sum(1)
        for _ in range(colours - 1):
            found.append(pixels[far.argmax()])
            far = torch.minimum(far, (pixels - found[-1]).square().sum(1))
        self.colours = torch.stack(found)
        for _ in range(rounds):
            near = torch.cdist(pixels, self.colours).argmin(1)
            self.colours = torch.stack([pixels[near == k].mean(0) if (near == k).any() else c for k, c in enumerate(self.colours)])

    def __call__(self, images: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            x = F.adaptive_avg_pool2d(x, self.side).permute(0, 2, 3, 1)
            return F.softmax(-(x[..., None, :] - self.colours).square().sum(-1) / self.softness, -1).flatten(1)
        return torch.cat([part(x) for x in images.split(200)])
