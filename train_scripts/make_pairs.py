"""A store of teacher pairs, or of whole sampling trajectories, made once and read by several runs (--pairs_dir).

    pair i = (z_i, c_i, x0_i):  z_i ~ N(0, 1) drawn from (seed, i);  x0_i = endpoint of the guided teacher's ODE from z_i, given c_i

The folder holds `--file` pairs a safetensors file, store.json, and with --trajectory every state on the way (noise first, endpoint last).
The ranks share the files; a file is whole or not there; the same command goes on where it was stopped and gives the same bits, on any
number of ranks; a larger --pairs adds to a store. The size of a store in bytes is printed before anything is made.

    accelerate launch train_scripts/make_pairs.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --pairs 100000 --steps 50
    accelerate launch train_scripts/make_pairs.py --pairs 1024 --steps 16 --trajectory                    # the embedded teacher
    accelerate launch train_scripts/train_dmd_pairs.py --pairs_dir outputs/pairs-emoji                    # reads it
"""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from zoo import backbones
from zoo.data import pairs
from zoo.data.cache import Storage
from zoo.errors import UserError
from zoo.run import cli


@dataclass
class Config:
    recipes: ClassVar[dict] = {}
    teacher: str = "emoji"          # as of the training scripts
    data: str = ""                  # prompts; default: the teacher's own
    output_dir: str = ""            # default: outputs/pairs-<teacher>
    pairs: int = 4096
    steps: int = 25                 # sampling steps of the teacher
    trajectory: bool = False        # store the states before every step, too
    guidance: float = 0.0           # teacher scale w; 0: the teacher's own default
    seed: int = 0
    file: int = 256                 # pairs a file: what a rank makes between two looks at what is there
    chunk: int = 32                 # pairs sampled at once
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    cache: str = ""                 # folder where encoded prompts are kept (docs/data.md)
    cache_gb: float = 100.0


def main(cfg: Config) -> Path:
    from accelerate import Accelerator
    if min(cfg.pairs, cfg.steps, cfg.file, cfg.chunk) < 1:
        raise UserError("--pairs, --steps, --file and --chunk must be at least 1")
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    accelerator = Accelerator(mixed_precision=cfg.mixed_precision, cpu=not torch.cuda.is_available())
    folder = Path(cfg.output_dir or f"outputs/pairs-{Path(str(model.name)).name}")
    rank, world = accelerator.process_index, accelerator.num_processes
    model.to(accelerator.device)
    model.storage = Storage(cfg.cache, cfg.cache_gb, folder.parent / f".{folder.name}-data", rank, world)
    items = model.batches()
    facts = pairs.describe(model, items, model.guidance) | {
        "pairs": cfg.pairs, "steps": cfg.steps, "seed": cfg.seed, "file": cfg.file, "chunk": cfg.chunk, "trajectory": cfg.trajectory,
        "precision": cfg.mixed_precision, "times": pairs.knots(model.process, cfg.steps).tolist()}
    pairs.open_store(folder, facts, write=False)
    accelerator.wait_for_everyone()
    if rank == 0:
        pairs.open_store(folder, facts, write=True)
        values = (2 + (cfg.steps + 1) * cfg.trajectory) * torch.Size(model.shape).numel()
        print(f"{cfg.pairs} pairs of {model.name}, {4e-9 * values * cfg.pairs:.3g} GB, in {folder}")
    accelerator.wait_for_everyone()
    pairs.make(folder, model.teacher, items, cfg.pairs, cfg.steps, shape=model.shape, guidance=model.guidance, seed=cfg.seed, path=cfg.trajectory,
               per_file=cfg.file, chunk=cfg.chunk, rank=rank, world=world, device=accelerator.device, autocast=accelerator.autocast)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    cli(main, Config)
