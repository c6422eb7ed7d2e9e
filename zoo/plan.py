"""What a run will cost, said before step 1: parameters and memory per role, and a refusal when it cannot fit."""
from __future__ import annotations

import errno
import gc
import os
import re
import sys
from dataclasses import dataclass, field

import torch

from . import denoiser, optimizers, quantized, sharding
from .errors import UserError
from .tokens import Masked

GB = 1024**3


@dataclass
class Estimate:
    """Bytes on one device. `held` is allocated already (weights, averages); `needed` comes on top during training. `roles`: per trainee its
    weights, gradient, optimizer, averages (`host_averages` where they are kept on the CPU) and activations."""
    held: int
    needed: int
    free: int
    micro_batch: int
    lines: list[str] = field(default_factory=list)
    roles: dict[str, dict[str, int]] = field(default_factory=dict)

    def refuse_if_too_large(self):
        if self.needed > self.free:
            raise UserError(f"this run needs about {self.needed / GB:.2f} GB more memory and {self.free / GB:.2f} GB are free: use a smaller --batch, "
                            f"a larger --accumulate (micro-batch is {self.micro_batch}), --gradient_checkpointing or --lora 64")


def activation_bytes(net, shape: tuple[int, ...], cond: dict, n: int = 1) -> int:
    """Bytes autograd keeps for `n` samples through `net`, counted at one real forward pass (parameters excluded, not what autocast makes of them).
    Under activation checkpointing the largest block is added, which the backward pass makes again."""
    seen: dict[int, int] = {}
    place = lambda tensor: tensor.untyped_storage()._cdata
    own = {place(sharding.own(p)) for p in (*net.trainable().values(), *net.module.parameters())}
    there: dict = {}

    def keep(tensor, into=seen):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            into[storage._cdata] = storage.nbytes()
        return tensor.detach()                # itself, an output would hold the graph that holds it

    def gathered(module, _inputs):            # parameters of a cut network change while it runs
        there[module] = {place(p if sharding.flat(p) else sharding.own(p)) for p in module.parameters(recurse=False)} - own
        own.update(there[module])

    def dropped(module, *_):                  # an activation may come to lie where they lay
        own.difference_update(there.pop(module, ()))
    inside = [0]

    def look(block, args):
        made: dict[int, int] = {}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t, made), lambda t: t):
            out = block(*args)
        for given in filter(torch.is_tensor, args):           # kept anyway
            made.pop(place(given), None)
        inside[0] = max(inside[0], sum(made.values()) + max(made.values(), default=0))         # and a gradient of the largest
        del out

    device = next(iter(net.trainable().values())).device
    tokens = isinstance(net.process, Masked)
    x = net.process.prior(n, *shape, device) if tokens else torch.randn(n, *shape, device=device)
    t = torch.full((n,), 0.5, device=device)
    cond = {k: v[:1].repeat_interleave(n, 0).to(device) for k, v in cond.items()}
    if net.slot == "guidance":
        cond["guidance"] = torch.ones(n, device=device)
    parts = net.module.modules() if sharding.is_cut(net.module) else ()
    hooks = [hook for m in parts for hook in (m.register_forward_pre_hook(gathered), m.register_forward_hook(dropped))]
    denoiser.LOOKING.append(look)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(x, t, cond, to="x0" if tokens else "v")
    finally:
        denoiser.LOOKING.pop()
        for hook in hooks:
            hook.remove()
    return sum(seen.values()) + inside[0]


def _activations(run, net, cond: dict, micro: int) -> int:
    """`activation_bytes` of a micro-batch in the run's precision, from passes of one and of two samples: weights that autocast has cast are kept once,
    however many samples follow. What the passes leave behind in cycles is let go, which else lies under the first step."""
    with run.accelerator.autocast():
        size = activation_bytes(net, run.model.shape, cond)
        if micro > 1:
            size += (micro - 1) * (activation_bytes(net, run.model.shape, cond, 2) - size)
    gc.collect()
    return size


def plan(run) -> Estimate:
    """Measure, and print under --dry_run: the resolved configuration, and per role its trainable parameters and memory."""
    cfg, model = run.cfg, run.model
    micro = cfg.batch // (run.world * cfg.accumulate)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in map(sharding.own, tensors))
    base = size(model.module.parameters()) + quantized.scale_bytes(model.module)
    lines = [f"{k} = {v}" for k, v in run.describe().items()]
    lines += [f"devices: {run.world} x {run.device.type}, micro-batch {micro}, global batch {cfg.batch}", f"teacher: {base / GB:.3f} GB of weights"]
    held, needed, once, roles = base, 0, 0, {}
    cond = model.examples(1).cond
    for t in run.trainees.values():
        averages = sum(size(values.values()) for _, values in t.averages)
        r = roles[t.name] = {"weights": 0 if t.net.role else size(t.net.module.parameters()), "gradient": size(t.own.values()),
                             "optimizer": sum(optimizers.state_bytes(cfg.optimizer, tuple(p.shape), p.element_size()) for p in t.own.values()),
                             "averages": 0 if cfg.offload_averages else averages, "host_averages": averages if cfg.offload_averages else 0,
                             "activations": _activations(run, t.net, cond, micro)}
        if run.engine is not None and run.engine.trainee is t:
            r |= run.engine.planned(r, lambda shape: optimizers.state_bytes(cfg.optimizer, shape))
        held, needed = held + r["weights"] + r["averages"], needed + r["optimizer"]
        once = max(once, r["gradient"] + r["activations"])       # of one trainee at a time: gradients go with its step
        lines.append(f"{t.name}: {sum(map(sharding.count, t.params.values())):,} trainable parameters; weights {r['weights'] / GB:.3f} GB, gradient "
                     f"{r['gradient'] / GB:.3f} GB, {cfg.optimizer} {r['optimizer'] / GB:.3f} GB, averages {averages / GB:.3f} GB"
                     f"{' on the CPU' * cfg.offload_averages}, activations {r['activations'] / GB:.3f} GB")
    needed += once
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.device)[0]
    else:
        import psutil
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))       # its ranks share it
    lines.append(f"memory: {held / GB:.3f} GB held, about {needed / GB:.3f} GB more at the peak of a step, {free / GB:.2f} GB free")
    batch = next((r["batch"] for n, r in cfg.recipes.items() if n == cfg.recipe and "batch" in r), None)
    if batch:
        lines.append(f"global batch {cfg.batch}, the recipe's is {batch}")
    if cfg.dry_run and run.rank == 0:
        print("\n".join(lines), file=sys.stdout, flush=True)
    plan.latest = Estimate(held, needed, free, micro, lines, roles)
    return plan.latest


plan.latest = None         # of this process: what an out-of-memory error is told beside


def out_of_space(error: BaseException) -> str:
    """One line for a write that found no room, or ""."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not full and not (type(error).__name__ == "SafetensorError" and re.search(r"os error (27|28|122)\b", str(error))):
        return ""
    return f"could not write ({error}): free some space, or give another --output_dir; the same command resumes from the last checkpoint"


def out_of_memory(error: BaseException) -> str:
    """One line for an allocation that failed, with the estimate it contradicts and three ways out; "" for any other error."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    cuda = isinstance(error, torch.cuda.OutOfMemoryError)
    if not (cuda or isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text):
        return ""
    e = plan.latest
    said = (f"the estimate before step 1 was {e.held / GB:.2f} GB held and {e.needed / GB:.2f} GB more at the peak, with {e.free / GB:.2f} GB free" if e
            else "it did not get as far as the estimate before step 1")
    return (f"out of {'GPU ' * cuda}memory ({text[:160]}); {said}. Three ways out: (1) a smaller --batch or a larger --accumulate"
            f"{f' (micro-batch is {e.micro_batch})' * bool(e)}; (2) --gradient_checkpointing; (3) --lora 64, one base instead of copies")
