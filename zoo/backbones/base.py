"""What every backbone shares: roles made from one teacher module, and data indexed by item."""
from __future__ import annotations

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from ..critics import GanHead, Heads
from ..denoiser import SLOT_DIM, Denoiser, add_adapter, add_slot, checkpoint_activations
from ..errors import UserError
from ..process import Pred, Process


@dataclass
class Examples:
    """Fixed conditions to look at and to measure on: names [n], cond and uncond dicts of tensors [n, ...]."""
    names: list[str]
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]


class Source:
    """`len(source)` items; `get(index [B])` gives a dict of cond, uncond and, where asked for, x0."""

    def __init__(self, n: int, get: Callable[[Tensor], dict]):
        self.n, self.get = n, get

    def __len__(self):
        return self.n


class Backbone:
    """A teacher and what can be made from it. Subclasses set the attributes below in __init__ and give `batches`,
    `examples`, `decode` and `export_module`.

    name: as the user gave it; module: the teacher's network; process, pred: how its output is read;
    shape: one sample [C, H, W]; guidance: default teacher scale w; tap: submodule feeding a GAN head;
    lora_targets: regular expression of the layers that get adapters."""

    name: str
    family: str
    module: nn.Module
    process: Process
    pred: Pred
    shape: tuple[int, ...]
    guidance: float
    data: str
    tap = "mid_block"
    part = "unet"             # subfolder of the network in an exported folder
    watched: tuple[int, int] | None = None      # prompts and seeds of each that a run samples to measure (None: as many as pictures take)
    last: tuple[str, str] | None = ("conv_act", "conv_out")       # the output layer, after the submodule that feeds it
    bf16_on_cpu = False       # whether bf16 autocast is faster on a CPU (measured: convolutional UNets gain, a small MLP loses)
    lora_targets = (r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|conv|"
                    r"time_emb_proj|linear_1|linear_2|cond_proj)")

    def forward(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: dict) -> Tensor:
        """Call the family's network; returns its raw prediction."""
        raise NotImplementedError

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher: the bare base weights, whatever adapters were added since."""
        return Denoiser(self.module, self.process, self.pred, self.forward)

    def make(self, role: str, *, lora: int = 0, two_time: bool = False, guidance_embedding: bool = False, head: bool | Callable[[nn.Module], nn.Module] = False,
             init: str = "", gradient_checkpointing: bool = False, frozen: str = "") -> Denoiser:
        """A trainable network that starts as the teacher.

        lora: rank of an adapter on the shared frozen base (0: a full copy); two_time / guidance_embedding: add a second
        scalar input, zero at start; head: GAN head on the mid-block, or a function of the network's output layer that makes a module
        reading what that layer reads (its result comes with logits=True, it is trained with the network and never exported);
        init: folder of a student to start from; frozen: regular expression of parameters that are not trained."""
        if two_time and guidance_embedding:
            raise UserError("a network has one extra scalar input: choose two_time or guidance_embedding")
        module = self.module if lora else copy.deepcopy(self.module)
        slot = "r" if two_time else "guidance" if guidance_embedding else None
        if slot:
            add_slot(module)
        if lora:
            add_adapter(module, role, lora, self.lora_targets)
        else:
            module.requires_grad_(True)
        if gradient_checkpointing:
            checkpoint_activations(module)
        if init:
            self.load_student(module, role if lora else None, init, slot)
        if frozen:
            left = [p for n, p in module.named_parameters() if re.search(frozen, n)]
            if not left:
                raise UserError(f"{self.name} has none of the layers that were to be frozen ({frozen}): train all of it")
            for p in left:
                p.requires_grad_(False)
        if callable(head) and self.last is None:
            raise UserError(f"this method adds outputs to the network's last layer: set the teacher's attribute `last` to (the submodule that feeds it, its name) of {self.name}")
        tap, made = (self.last[0], head(module.get_submodule(self.last[1]))) if callable(head) else (self.tap, GanHead(*self.head_shape()) if head else None)
        module.eval()         # dropout and batch statistics stay off in every role; gradients do not depend on the mode
        return Denoiser(module, self.process, self.pred, self.forward, role=role if lora else None,
                        slot=slot, tap=tap, head=made, frozen=frozen)

    @property
    def taps(self) -> list[str]:
        """Submodules feeding a discriminator of several depths, in the order in which they run."""
        return [f"down_blocks.{i}" for i in range(len(getattr(self.module, "down_blocks", ())))] + [self.tap]

    def discriminator(self, told: bool = False) -> Denoiser:
        """Heads at several depths (`taps`) of the frozen teacher network: call `judge`; only the heads are trained.

        told: they are given a number besides. Make it after the roles that copy the teacher's module, since its hooks stay on it."""
        if not all(self.taps):
            raise UserError(f"{self.name} has no submodule to feed a discriminator: give it tap=SUBMODULE")
        shapes = []
        keep = lambda _module, _inputs, out: shapes.append(tuple((out[0] if isinstance(out, tuple) else out).shape[1:]))
        hooks = [self.module.get_submodule(name).register_forward_hook(keep) for name in self.taps]
        x = torch.zeros(1, *self.shape, device=next(self.module.parameters()).device)
        with torch.no_grad():
            self.forward(self.module, x, self.process.timestep(torch.full_like(x.flatten()[:1], 0.5)),
                         {k: v.to(x.device) for k, v in self.examples(1).cond.items()})
        for hook in hooks:
            hook.remove()
        # A role without an adapter of its own reads the bare weights, and owns none of them.
        return Denoiser(self.module, self.process, self.pred, self.forward, role="discriminator", tap=self.taps, head=Heads(shapes, SLOT_DIM * told))

    @property
    def takes_second_scalar(self) -> bool:
        """Whether `make(two_time=True)` is possible: the network has a diffusers time embedding to add a second scalar to."""
        return hasattr(self.module, "time_embedding")

    def head_shape(self) -> tuple[int, int | None]:
        """(channels, side) of the tapped feature map."""
        raise NotImplementedError

    def batches(self, images: bool = False) -> Source:
        """Training items: cond and uncond, and x0 (data in the network's space) when `images`."""
        raise NotImplementedError

    def examples(self, n: int, seeds: int = 1) -> Examples:
        """n fixed conditions, each repeated `seeds` times in a row."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """Samples [B, *shape] to images [B, 3 or 1, H, W] in [-1, 1]."""
        raise NotImplementedError

    def load_student(self, module: nn.Module, role: str | None, folder: str, slot: str | None) -> None:
        """Copy an exported student's weights (folder/unet, or its LoRA file for a LoRA run) into `module`."""
        from ..hub.export import read_student
        read_student(self, module, role, Path(folder), slot)

    def to(self, device) -> "Backbone":
        self.module.to(device)
        return self


class Memo:
    """Results per item index, kept on the CPU up to `limit` items (oldest out first)."""

    def __init__(self, compute: Callable[[list[int]], Tensor], limit: int = 100_000):
        self.compute, self.limit, self.kept = compute, limit, OrderedDict()

    def __call__(self, index: Tensor) -> Tensor:
        wanted = index.tolist()
        missing = sorted({i for i in wanted if i not in self.kept})
        fresh = {}
        if missing:
            with torch.no_grad():
                fresh = dict(zip(missing, self.compute(missing).cpu()))
        out = torch.stack([fresh[i] if i in fresh else self.kept[i] for i in wanted])
        self.kept.update(fresh)
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        return out
