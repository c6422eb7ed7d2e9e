"""DiT: a `DiTPipeline`, class-conditional latents of ImageNet (eps on a linear VP schedule, learned variance left alone).

Its null class is number 1000, as the stock pipeline has it. Every block embeds the time by itself, so a second scalar is added in each."""
from __future__ import annotations

import torch

from ..data.feed import labelled
from ..errors import UserError
from .base import Blocks, Examples, Latent, Source
from .sd import variance_preserving

NULL = 1000


class DiT(Blocks, Latent):
    family, part = "dit", "transformer"
    stock_guidance = 4.0
    stock_call = {"guidance_scale": 1.0}
    last = "proj_out_2"

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.open(folder, name, data, guidance)
        self.process, self.pred = variance_preserving(name, self.pipe.scheduler)
        config = self.module.config
        if config.num_embeds_ada_norm != NULL:
            raise UserError(f"{name} has {config.num_embeds_ada_norm} classes, and the stock DiT pipeline guides by class {NULL}: "
                            f"use a teacher of {NULL} classes")
        self.classes = NULL + 1
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.time_embeddings = tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in range(len(self.module.transformer_blocks)))
        self.scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    def forward(self, module, x, timestep, cond):
        return module(x, timestep=timestep, class_labels=cond["label"], return_dict=False)[0][:, : self.shape[0]]

    def _conditions(self, label: torch.Tensor) -> dict:
        return {"cond": {"label": label}, "uncond": {"label": torch.full_like(label, NULL)}}

    def batches(self, images=False):
        if not images:                        # labels are all a data-free method needs
            return Source(NULL * 100, lambda index: self._conditions(index % NULL))
        return labelled(self, NULL, self._conditions)

    def examples(self, n, seeds=1):
        label = (torch.arange(n) * 97).remainder(NULL).repeat_interleave(seeds)       # spread over the classes
        words = {number: word for word, number in reversed(self.pipe.labels.items())}
        return Examples([words.get(i, f"class {i}") for i in label.tolist()], *self._conditions(label).values())

    def student_pipeline(self, module, scheduler):
        names: dict[str, str] = {}
        for word, number in self.pipe.labels.items():
            names[str(number)] = f"{names[str(number)]}, {word}" if str(number) in names else word
        pipe = type(self.pipe)(transformer=module, vae=self.pipe.vae, scheduler=scheduler, id2label=names)
        pipe.register_to_config(id2label=names)
        return pipe
