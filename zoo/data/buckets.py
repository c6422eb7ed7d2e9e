"""Aspect-ratio buckets: pictures of about one area and several shapes, every global batch of one shape.

The shapes are whole numbers of `step` pixels on a side, of at most side^2 pixels, up to 2:1; a picture goes where its own ratio is nearest."""
from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 2.0            # longest side to shortest


def shapes(side: int, step: int) -> list[tuple[int, int]]:
    """(height, width) in pixels of every bucket, the square first."""
    found = [(side, side)]
    for width in range(side + step, int(side * math.sqrt(MOST)) + step, step):
        height = side * side // width // step * step
        if height and width / height <= MOST:
            found += [(height, width), (width, height)]
    return found


def nearest(height: int, width: int, among: list[tuple[int, int]]) -> int:
    """Number of the bucket whose ratio is nearest to height : width."""
    ratio = math.log(height / width)
    return min(range(len(among)), key=lambda i: abs(math.log(among[i][0] / among[i][1]) - ratio))


class Order:
    """Which item each global sample number is, given the bucket [N] of every item: a global batch is of one bucket, an epoch visits every item
    (some twice, to fill a bucket's last batch) and mixes the buckets, all drawn from (seed, epoch)."""

    def __init__(self, bucket: Tensor):
        self.members = [torch.nonzero(bucket == b).flatten() for b in bucket.unique().tolist()]
        self._known: dict[tuple, Tensor] = {}

    def __call__(self, numbers: Tensor, seed: int, batch: int) -> Tensor:
        """Items of the global sample numbers; `batch` consecutive ones from a multiple of `batch` make a global batch."""
        per_epoch = sum(-(-len(m) // batch) for m in self.members) * batch
        out = torch.empty_like(numbers)
        for epoch in (numbers // per_epoch).unique().tolist():
            here = numbers // per_epoch == epoch
            out[here] = self._epoch(epoch, seed, batch)[numbers[here] % per_epoch]
        return out

    def _epoch(self, epoch: int, seed: int, batch: int) -> Tensor:
        key = (epoch, seed, batch)
        if key not in self._known:
            draw = torch.Generator().manual_seed(seed * 9_973 + epoch)
            rows = []
            for members in self.members:
                mixed = members[torch.randperm(len(members), generator=draw)]
                count = -(-len(members) // batch) * batch
                rows.append(mixed[torch.arange(count) % len(members)].reshape(-1, batch))
            every = torch.cat(rows)
            if len(self._known) > 2:
                self._known.clear()
            self._known[key] = every[torch.randperm(len(every), generator=draw)].flatten()
        return self._known[key]
