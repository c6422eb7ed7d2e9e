"""Items a second of the loader, with and without the caches, in one run: captioned pictures of the emoji set, encoded by its teacher.

    python benchmarks/data/run.py                      # a minute on one core; writes results.json here

none     every prompt and picture is decoded and encoded when it is asked for
first    the first pass with --cache: encoded, and written
memory   later passes without --cache: kept in memory
disk     a new process's pass with --cache: read from the files
The passes are repeated in turn and the median is reported; the teacher is small, so that larger ones gain more."""
from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass
class Config:
    teacher: str = "emoji"
    data: str = "emoji"
    items: int = 512
    batch: int = 32
    repeats: int = 3
    threads: int = 1
    out: Path = Path(__file__).with_name("results.json")


def one_pass(source, items: int, batch: int) -> float:
    """Items a second of one pass in a shuffled order."""
    order = torch.randperm(min(items, len(source)), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    for part in order.split(batch):
        source.get(part)
    return len(order) / (time.perf_counter() - began)


def main(cfg: Config) -> dict:
    from zoo import backbones
    from zoo.data import cache as caches
    torch.set_num_threads(cfg.threads)
    model = backbones.load(cfg.teacher, cfg.data)
    memory, rates = caches.MEMORY_BYTES, {k: [] for k in ("none", "first", "memory", "disk")}

    def source(folder: str = "", most: int = memory):
        """The items with a fresh cache object of each kind."""
        caches.MEMORY_BYTES, model.storage, model._texts = most, caches.Storage(folder), None
        return model.batches(images=True)

    one_pass(source(most=0), cfg.batch, cfg.batch)          # warm up
    for _ in range(cfg.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rates["none"].append(one_pass(source(most=0), cfg.items, cfg.batch))
            kept = source()
            one_pass(kept, cfg.items, cfg.batch)
            rates["memory"].append(one_pass(kept, cfg.items, cfg.batch))
            began = time.perf_counter()                       # with the encoding of all prompts, which comes before the first step
            cold = source(folder)
            prepared = time.perf_counter() - began
            seconds = cfg.items / one_pass(cold, cfg.items, cfg.batch)
            rates["first"].append(cfg.items / (seconds + prepared * min(1.0, cfg.items / len(cold))))
            for cache in (model.texts.cache, cold.cache):
                cache.flush()
            rates["disk"].append(one_pass(source(folder), cfg.items, cfg.batch))
            size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?") if os.path.exists("/proc/cpuinfo") else "?"
    result = {"hardware": f"{cpu}, {cfg.threads} thread", "device": "cpu", "teacher": cfg.teacher, "items": cfg.items, "batch": cfg.batch,
              "repeats": cfg.repeats, "items_per_second": {k: round(statistics.median(v), 1) for k, v in rates.items()}, "cache_bytes": size}
    base = result["items_per_second"]["none"]
    for k, v in result["items_per_second"].items():
        print(f"{k:8} {v:10.1f} items/s   {v / base:6.1f} x")
    cfg.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
