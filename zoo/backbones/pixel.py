"""Pixel-space UNet2DModel, class-conditional or unconditional: `ConsistencyModelPipeline`, `DDPMPipeline`, `DDIMPipeline` folders.

A class-conditional network is guided through a null class, by convention its last one (as our Fashion-MNIST teacher). Pictures are read as they
are needed, from anything `--data` names (data.feed), their class numbers from the column label or the subfolders they are in."""
from __future__ import annotations

import torch

from ..data.feed import labelled
from .base import Backbone, Examples, Source, open_pipeline
from .sd import variance_preserving


class Pixel(Backbone):
    family = "pixel"
    bf16_on_cpu = True
    scale = 1                 # pixels of a picture per pixel of a sample

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.folder, self.name, self.data = folder, name, data
        self.pipe = open_pipeline(folder, name, torch.float32)
        self.module = self.pipe.unet.float().requires_grad_(False).eval()
        self.process, self.pred = variance_preserving(name, self.pipe.scheduler)
        size = self.module.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        self.shape = (self.module.config.in_channels, *size)
        self.classes = self.module.config.num_class_embeds        # the last one is the null class
        self.guidance = (guidance or 1.0) if self.classes else 1.0
        self.takes_guidance = bool(self.classes)

    def forward(self, module, x, timestep, cond):
        return module(x, timestep, class_labels=cond.get("label"), return_dict=False)[0]

    def head_shape(self):
        blocks = self.module.config.block_out_channels
        return blocks[-1], self.shape[-1] // 2 ** (len(blocks) - 1)

    def _conditions(self, label: torch.Tensor) -> dict:
        if not self.classes:
            return {"cond": {}, "uncond": {}}
        return {"cond": {"label": label}, "uncond": {"label": torch.full_like(label, self.classes - 1)}}

    def batches(self, images=False):
        if not images:                        # labels are all a data-free method needs
            n = max(self.classes - 1, 1) if self.classes else 1
            return Source(n * 1000, lambda index: self._conditions(index % n))
        return labelled(self, max(self.classes - 1, 1) if self.classes else 0, self._conditions)

    @property
    def picture_channels(self) -> int:
        return self.shape[0]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3 or 1, H, W] in [-1, 1] are the samples."""
        return images

    def examples(self, n, seeds=1):
        label = torch.arange(n).remainder(max((self.classes or 2) - 1, 1)).repeat_interleave(seeds)
        names = [f"class {i}" for i in label.tolist()] if self.classes else ["unconditional"] * len(label)
        return Examples(names, *self._conditions(label).values())

    def decode(self, x):
        return x.clamp(-1, 1)

    def student_pipeline(self, module, scheduler):
        """Of these pipelines the one that takes a scheduler of another kind and class labels."""
        from diffusers import ConsistencyModelPipeline
        return ConsistencyModelPipeline(unet=module, scheduler=scheduler)
