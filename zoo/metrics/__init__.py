"""Measurement: pure functions of images and feature tensors. Nothing here needs the network.

Distances are named after their feature space (`kid_efflite0`, `kid_pixels`, `kid_fashionnet`): values are
only comparable within one space and one reference set, and none of them is FID or CLIP score (see
`zoo.metrics.network`). Images are float tensors [N, C, H, W] in [-1, 1]; features are [N, D].
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UserError
from zoo.metrics import efflite0

Features = Callable[[Tensor], Tensor]


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


# -- feature spaces -------------------------------------------------------------------------------------


def pixels(images: Tensor) -> Tensor:
    """A fixed 391-d description without a network: mean colours on grids of 8, 4, 2 and 1 cells a side, and
    mean absolute horizontal and vertical luminance steps on grids of 8 and 2.

    Scaled by constants so that both groups spread about 1 over natural 32x32 images. The steps are taken at
    the images' own resolution (so blur and grain count): compare only images of one size. Grey counts as
    three channels.
    """
    x = images.float().clamp(-1, 1).expand(-1, 3, -1, -1)
    grey = x.mean(1, keepdim=True)
    steps = torch.cat([F.pad(grey.diff(dim=3).abs(), (0, 1)), F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1))], 1)

    def grids(maps: Tensor, sides: Sequence[int]) -> list[Tensor]:
        return [F.adaptive_avg_pool2d(maps, side).flatten(1) for side in sides]

    return torch.cat([2 * g for g in grids(x, (8, 4, 2, 1))] + [8 * g for g in grids(steps, (8, 2))], 1)


@functools.cache
def _classifier(device: str):
    from zoo.metrics import classifier

    return classifier.load().to(device)


@torch.no_grad()
def fashionnet(images: Tensor, batch: int = 500) -> Tensor:
    """Penultimate features [N, 64] of the shipped Fashion-MNIST classifier, for images [N, 1, 32, 32]."""
    net = _classifier(str(images.device))
    return torch.cat([net.features(chunk.float()) for chunk in images.split(batch)])


def flat(images: Tensor) -> Tensor:
    """The values themselves, [N, C * H * W]: for toys and other low-dimensional data."""
    return images.float().flatten(1)


SPACES: dict[str, Features] = {
    "efflite0": efflite0.features,
    "pixels": pixels,
    "fashionnet": fashionnet,
    "flat": flat,
}


def feature_space(name: str) -> Features:
    """The feature function of that name (images -> [N, D]). Raises UserError for an unknown name, and for
    'efflite0' where its weights are not installed (at once, not after an hour of sampling)."""
    if name not in SPACES:
        raise UserError(f"unknown feature space {name!r}: choose one of {', '.join(SPACES)}")
    if name == "efflite0":
        efflite0.load()
    return SPACES[name]


def default_feature_space(have_extra: bool | None = None) -> str:
    """'efflite0' where `fewstep[metrics]` is installed, else 'pixels'."""
    have_extra = efflite0.available() if have_extra is None else have_extra
    return "efflite0" if have_extra else "pixels"


# -- distances ------------------------------------------------------------------------------------------


def _gram_sums(x: Tensor, y: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Row and column sums (float64) of the kernel matrix (x . y / d + 1)^3, in blocks of rows."""
    rows, columns = [], torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for part in x.split(chunk):
        k = ((part @ y.T).double() / x.shape[1] + 1) ** 3
        rows.append(k.sum(1))
        columns += k.sum(0)
    return torch.cat(rows), columns


def _self_sums(x: Tensor) -> Tensor:
    """Row sums of the kernel matrix of x with itself, without the diagonal."""
    return _gram_sums(x, x)[0] - ((x * x).sum(1).double() / x.shape[1] + 1) ** 3


def kid(x_feats: Tensor, y_feats: Tensor) -> Interval:
    """Unbiased squared MMD times 1000 with the kernel (x . y / d + 1)^3 (Binkowski et al., ICLR 2018,
    https://arxiv.org/abs/1801.01401), in the given feature space: report it as `kid_<space>`.

    x_feats [N, D], y_feats [M, D], N and M at least 3. All pairs are used (no random subsets, no seed); the
    value may be negative where the sets agree. The 95 % interval is value -+ 1.96 standard errors of the
    two-sample delete-one jackknife, computed exactly from the row sums. It treats images as independent
    draws: several seeds of one prompt make it too narrow.
    """
    n, m = len(x_feats), len(y_feats)
    if min(n, m) < 3:
        raise UserError(f"kernel distance needs at least 3 images on each side, got {n} and {m}")
    if x_feats.shape[1] != y_feats.shape[1]:
        raise UserError(f"features of different spaces: {x_feats.shape[1]} and {y_feats.shape[1]} dimensions")
    y_feats = y_feats.to(x_feats)
    xx, yy = _self_sums(x_feats), _self_sums(y_feats)
    xy, yx = _gram_sums(x_feats, y_feats)

    def mmd(xx, yy, xy, n, m):
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    value = mmd(xx.sum(), yy.sum(), xy.sum(), n, m)
    without_x = mmd(xx.sum() - 2 * xx, yy.sum(), xy.sum() - xy, n - 1, m)
    without_y = mmd(xx.sum(), yy.sum() - 2 * yy, xy.sum() - yx, n, m - 1)
    error = sum((len(u) - 1) * u.var(unbiased=False) for u in (without_x, without_y)).sqrt()
    return Interval(*(1e3 * float(v) for v in (value, value - 1.96 * error, value + 1.96 * error)))


@functools.cache
def lpips_network():
    """LPIPS on VGG-16 of the `lpips` package, or None where the package or its network's file (torchvision's, in torch's cache) is
    not installed: nothing is downloaded."""
    if not Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth").exists():
        return None
    try:
        import lpips
    except ImportError:
        return None
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)


def perceptual_name() -> str:
    """Which distance `perceptual` is here: `lpips_vgg` or `perceptual_efflite0`."""
    return "perceptual_efflite0" if lpips_network() is None else "lpips_vgg"


def perceptual(x: Tensor, y: Tensor, size: int = 96) -> Tensor:
    """A perceptual distance [N] at `size` pixels, differentiable. LPIPS (Zhang et al., CVPR 2018) where its package and weights are
    installed, see `perceptual_name`; else squared distance of channel-normalised EfficientNet-Lite0 block outputs, averaged over
    positions and summed over five blocks: the form of LPIPS without its learnt weights, so the two are not comparable."""
    if (network := lpips_network()) is not None:
        see = lambda v: F.interpolate(v.float().expand(-1, 3, -1, -1), (size, size), mode="bilinear", antialias=True, align_corners=False)
        return network.to(x.device)(see(x), see(y)).flatten()
    total = 0
    for a, b in zip(efflite0.blocks(x, size), efflite0.blocks(y, size)):
        total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
    return total


# -- agreement with the prompt --------------------------------------------------------------------------


def _similarity(sample_feats: Tensor, data_feats: Tensor) -> Tensor:
    """Cosine [N, M] after subtracting the mean of the data."""
    mean = data_feats.mean(0)
    return F.normalize(sample_feats - mean, dim=1) @ F.normalize(data_feats - mean, dim=1).T


def retrieval(sample_feats: Tensor, data_feats: Tensor, target_index: Tensor, k: Sequence[int] = (1, 5)
              ) -> dict[str, float]:
    """`retrieval@k`: share of samples whose prompted image is among the k most similar of the data set.

    sample_feats [N, D], data_feats [M, D], target_index [N] (rows of the data). Similarity is the cosine
    centred on the data. Ties share their mean rank, so a collapsed sampler scores chance and exact
    duplicates cost nothing.
    """
    similarity = _similarity(sample_feats, data_feats)
    target = torch.as_tensor(target_index, device=similarity.device)[:, None]
    own = similarity.gather(1, target)
    rank = (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2
    return {f"retrieval@{i}": (rank < i).double().mean().item() for i in k}


def nearest(sample_feats: Tensor, data_feats: Tensor) -> Tensor:
    """Index [N] of each sample's most similar image of the data set (centred cosine)."""
    return _similarity(sample_feats, data_feats).argmax(1)


def nearest_label_accuracy(sample_feats: Tensor, data_feats: Tensor, data_labels: Sequence,
                           labels: Sequence) -> float:
    """Share of samples whose nearest image carries the label asked for (a style word, a class); labels of any
    comparable type, `data_labels` of length M, `labels` of length N."""
    index = nearest(sample_feats, data_feats).tolist()
    return sum(data_labels[i] == label for i, label in zip(index, labels, strict=True)) / len(index)


def class_accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 32, 32] that the shipped Fashion-MNIST classifier gives their label [N]."""
    from zoo.metrics import classifier

    return classifier.accuracy(_classifier(str(images.device)), images.float(), labels)


# -- diversity and speed --------------------------------------------------------------------------------


def diversity(samples: Tensor) -> float:
    """Per-prompt seed diversity: root-mean-square difference of two samples of one prompt, averaged over
    prompts.

    samples [P, S, ...]: S >= 2 seeds of each of P prompts, images or features. Divided by the teacher's
    value on the same prompts it says how much of the teacher's variety is left.
    """
    if samples.dim() < 3 or samples.shape[1] < 2:
        raise UserError(f"diversity needs samples [prompts, seeds >= 2, ...], got {list(samples.shape)}")
    x = samples.flatten(2).float()
    pairs = torch.cdist(x, x) / x.shape[2] ** 0.5
    return (pairs.sum((1, 2)) / (x.shape[1] * (x.shape[1] - 1))).mean().item()


def wall_time_per_image(fn: Callable[[], object], n: int, repeats: int = 5) -> float:
    """Seconds per image of `fn()`, which makes n images: median of `repeats` calls after one that is not
    counted. Waits for the GPU where there is one."""

    def once() -> float:
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(repeats)) / n
