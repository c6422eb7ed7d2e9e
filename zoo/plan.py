"""What a run will cost, said before step 1: parameters and memory per role, and a refusal when it cannot fit."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from .errors import UserError
from .tokens import Masked

GB = 1024**3


@dataclass
class Estimate:
    """Bytes. `held` is allocated already (weights, averages); `needed` comes on top during training."""
    held: int
    needed: int
    free: int
    micro_batch: int
    lines: list[str] = field(default_factory=list)

    def refuse_if_too_large(self):
        if self.needed > self.free:
            raise UserError(f"this run needs about {self.needed / GB:.2f} GB more memory and {self.free / GB:.2f} GB are free: use a smaller --batch, "
                            f"a larger --accumulate (micro-batch is {self.micro_batch}), --gradient_checkpointing or --lora 64")


def activation_bytes(net, shape: tuple[int, ...], cond: dict) -> int:
    """Bytes autograd keeps for one sample through `net`, counted at one real forward pass (parameters excluded)."""
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.trainable().values()} | {p.untyped_storage().data_ptr() for p in net.module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(iter(net.trainable().values())).device
    tokens = isinstance(net.process, Masked)
    x = net.process.prior(1, *shape, device) if tokens else torch.randn(1, *shape, device=device)
    t = torch.full((1,), 0.5, device=device)
    cond = {k: v[:1].to(device) for k, v in cond.items()}
    if net.slot == "guidance":
        cond["guidance"] = torch.ones(1, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x, t, cond, to="x0" if tokens else "v")
    return sum(seen.values())


def plan(run) -> Estimate:
    """Measure, and print under --dry_run: the resolved configuration, and per role its trainable parameters and memory."""
    cfg, model = run.cfg, run.model
    micro = cfg.batch // (run.world * cfg.accumulate)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    base = size(model.module.parameters())
    lines = [f"{k} = {v}" for k, v in run.describe().items()]
    lines += [f"devices: {run.world} x {run.device.type}, micro-batch {micro}, global batch {cfg.batch}", f"teacher: {base / GB:.3f} GB of weights"]
    held, needed, activations = base, 0, 0
    cond = model.examples(1).cond
    for t in run.trainees.values():
        own = size(t.params.values())
        averages = len(t.averages) * own
        per_sample = activation_bytes(t.net, model.shape, cond)
        copies = 0 if t.net.role else size(t.net.module.parameters())
        held, needed, activations = held + copies + averages, needed + 3 * own, max(activations, per_sample * micro)
        lines.append(f"{t.name}: {sum(p.numel() for p in t.params.values()):,} trainable parameters; weights {copies / GB:.3f} GB, gradient and "
                     f"Adam {3 * own / GB:.3f} GB, averages {averages / GB:.3f} GB, activations {per_sample * micro / GB:.3f} GB")
    needed += activations
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.device)[0]
    else:
        import psutil
        free = psutil.virtual_memory().available
    lines.append(f"memory: {held / GB:.3f} GB held, about {needed / GB:.3f} GB more at the peak of a step, {free / GB:.2f} GB free")
    batch = next((r["batch"] for n, r in cfg.recipes.items() if n == cfg.recipe and "batch" in r), None)
    if batch:
        lines.append(f"global batch {cfg.batch}, the recipe's is {batch}")
    if cfg.dry_run and run.rank == 0:
        print("\n".join(lines), file=sys.stdout, flush=True)
    return Estimate(held, needed, free, micro, lines)
