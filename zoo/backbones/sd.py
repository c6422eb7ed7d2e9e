"""Stable Diffusion family: any `StableDiffusionPipeline` (SD 1.x, 2.x and fine-tunes, our emoji teacher), eps or v prediction."""
from __future__ import annotations

import torch

from .. import data as datasets_
from ..errors import UserError
from ..process import VP
from .base import Backbone, Examples, Memo, Source

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class StableDiffusion(Backbone):
    family = "sd"
    bf16_on_cpu = True

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        from diffusers import DiffusionPipeline

        self.folder, self.name, self.data = folder, name, data
        self.guidance = guidance or 7.5          # the stock pipeline's own default
        self.pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
        self.pipe.set_progress_bar_config(disable=True)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.float().requires_grad_(False).eval()
        self.module = self.pipe.unet
        config = self.pipe.scheduler.config
        self.process, self.pred = VP.from_config(config), PREDICTIONS[config.prediction_type]
        size = self.module.config.sample_size
        self.shape = (self.module.config.in_channels, size, size)
        if size <= 32 and not torch.cuda.is_available():
            # On a CPU the fused kernel's backward pass takes a third of a training step at 16x16; plain attention a twentieth.
            from diffusers.models.attention_processor import AttnProcessor
            self.module.set_attn_processor(AttnProcessor())

    def forward(self, module, x, timestep, cond):
        return module(x, timestep, encoder_hidden_states=cond["prompt"].to(x.dtype), return_dict=False)[0]

    def head_shape(self):
        blocks = self.module.config.block_out_channels
        return blocks[-1], self.module.config.sample_size // 2 ** (len(blocks) - 1)

    # ---------------------------------------------------------------------------------------------- conditions and data
    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """[n, tokens, width], exactly as the stock pipeline encodes them."""
        return self.pipe.encode_prompt(prompts, self.module.device, 1, False)[0]

    def batches(self, images=False):
        if images:
            size = self.shape[-1] * self.pipe.vae_scale_factor
            pixels, table = datasets_.load(self.data, size, 3)
            if "caption" not in table.column_names:
                raise UserError(f"--data {self.data} has no caption column (caption, text or prompt) beside its images: it has {', '.join(table.column_names)}")
            captions = list(table["caption"])
            latents = Memo(lambda i: self.encode(pixels[i]))
        else:
            captions = datasets_.prompts(self.data)
        embeddings = Memo(lambda i: self.encode_prompts([captions[j] for j in i]), limit=20_000)
        empty = self.encode_prompts([""])

        def get(index):
            fields = {"cond": {"prompt": embeddings(index)}, "uncond": {"prompt": empty.expand(len(index), -1, -1)}}
            return fields | ({"x0": latents(index)} if images else {})
        return Source(len(captions), get)

    def examples(self, n, seeds=1):
        captions = sorted(set(datasets_.prompts(self.data)))
        pick = torch.randperm(len(captions), generator=torch.Generator().manual_seed(7))[:n].tolist()
        names = [captions[i] for i in pick for _ in range(seeds)]
        return Examples(names, {"prompt": self.encode_prompts(names)}, {"prompt": self.encode_prompts([""]).expand(len(names), -1, -1)})

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] to scaled latents (mode)."""
        vae = self.pipe.vae
        latents = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mode() for part in images.split(32)])
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x):
        vae = self.pipe.vae
        return torch.cat([vae.decode(part.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0] for part in x.split(32)]).clamp(-1, 1)

    def to(self, device):
        self.pipe.to(device)
        return self
