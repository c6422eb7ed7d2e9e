"""Causal rollouts of a chunk-wise video student: which frames see which, the cache of clean frames, and the rollout itself.

Videos are [B, F, ...], frames second, so that one time per frame [B, F] broadcasts just as one time per sample [B] does. A causal
net takes, besides what every `Net` takes, cond["cache"] (a `Cache`: the frames before x) and cond["write"] (append x to it);
without a cache x is a whole video seen through `Layout.sees`."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import Callable, Iterator

import torch
from torch import Tensor

from .rollout import expand, start


@dataclass(frozen=True)
class Layout:
    """Frames come `chunk` at a time. A frame sees all of its chunk, no frame after it, the first `sink` frames always, and of the
    others those within `window` frames counted back from the end of its chunk (0: all).

    slots: rotary positions count within what is seen, and not frames of the video. The two agree until the sink and the window part;
    a student must be sampled with the positions it was trained with."""
    chunk: int
    sink: int = 0
    window: int = 0
    slots: bool = False

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether frame query[i] sees frame key[j], bool [i, j]."""
        end = ((query // self.chunk + 1) * self.chunk)[:, None]
        near = key >= end - self.window if self.window else torch.ones_like(key, dtype=torch.bool)
        return (key < end) & (near | (key < self.sink))


class Cache:
    """What clean frames left in every layer: keys before rotation and values, each [B, frames * tokens, D], never with a graph.

    Only frames that the next chunk sees are kept. `layers` is replaced and never changed, so whoever holds it holds a snapshot:
    activation checkpointing recomputes from the cache of its own forward pass."""

    def __init__(self, layout: Layout):
        self.layout, self.layers = layout, {}
        self.next = 0                              # number of the first frame to come
        self.frames: tuple[int, ...] = ()          # numbers of the frames held

    def append(self, fresh: dict[int, tuple[Tensor, Tensor]], frames: int) -> None:
        """Add keys and values per layer of the next `frames` frames, and drop what falls out of sight."""
        held = (*self.frames, *range(self.next, self.next + frames))
        self.next += frames
        seen = self.layout.sees(torch.tensor([self.next]), torch.tensor(held))[0]
        kept = [i for i, s in enumerate(seen.tolist()) if s]

        def join(old, new):
            joined = new.detach() if old is None else torch.cat([old, new.detach()], 1)
            return joined if len(kept) == len(held) else joined.unflatten(1, (len(held), -1))[:, kept].flatten(1, 2)

        self.layers = {i: tuple(join(old, new) for old, new in zip(self.layers.get(i, (None, None)), pair)) for i, pair in fresh.items()}
        self.frames = tuple(held[i] for i in kept)


def stream(net, cond: dict, knots: Tensor, layout: Layout, draw: Callable[[int, int], Tensor], last: int | None = None) -> Iterator[Tensor]:
    """Chunks x0 [B, chunk, ...] of a video, one after another, without end (Self Forcing, Alg. 1).

    draw(i, k): noise of chunk i, its start (k = 0) and what re-noises it to knots[k]. last: number of the knot whose prediction is
    the chunk (the last one). Only that call may carry a gradient: earlier ones and the cache, written by a further pass over the
    chunk itself at t = 0, do not."""
    cache = Cache(layout)
    last = len(knots) - 1 if last is None else last
    for i in count():
        x = draw(i, 0)
        t = expand(knots[0], x)
        x = start(net.process, x, t)
        for k in range(last):
            with torch.no_grad():
                x0 = net(x, t, cond | {"cache": cache})
            t = expand(knots[k + 1], x)
            x = net.process.noise(x0, draw(i, k + 1), t)
        x0 = net(x, t, cond | {"cache": cache})
        yield x0
        with torch.no_grad():
            net(x0.detach(), torch.zeros_like(t), cond | {"cache": cache, "write": True})


def clip(net, cond: dict, knots: Tensor, layout: Layout, noise: Callable[[], Tensor], last: int | None = None) -> Tensor:
    """A whole video [B, F, ...], as long as noise() [B, F, ...] is: called once for the start and once for each re-noising."""
    last = len(knots) - 1 if last is None else last
    noises = [noise().split(layout.chunk, 1) for _ in range(last + 1)]
    return torch.cat(list(islice(stream(net, cond, knots, layout, lambda i, k: noises[k][i], last), len(noises[0]))), 1)
