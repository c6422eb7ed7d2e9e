"""PixArt-alpha and PixArt-Sigma: `PixArtAlphaPipeline` and `PixArtSigmaPipeline` (eps on a linear VP schedule, T5 prompts with a mask).

The network also predicts a variance, which samplers drop after guidance and which is left alone here. PixArt-alpha at 1024 reads the
picture's size and aspect ratio too."""
from __future__ import annotations

import torch

from .base import Blocks, Prompted
from .sd import variance_preserving


class PixArt(Blocks, Prompted):
    family, part = "pixart", "transformer"
    stock_guidance = 4.5
    stock_call = {"guidance_scale": 1.0}
    large_encoders = ("text_encoder",)
    time_embeddings = ("adaln_single.emb.timestep_embedder",)

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.open(folder, name, data, guidance)
        self.process, self.pred = variance_preserving(name, self.pipe.scheduler)
        config = self.module.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def forward(self, module, x, timestep, cond):
        sizes = {"resolution": None, "aspect_ratio": None}
        if module.use_additional_conditions:
            height, width = (n * self.pipe.vae_scale_factor for n in x.shape[-2:])
            sizes = {"resolution": x.new_tensor([[height, width]]).expand(len(x), -1), "aspect_ratio": x.new_tensor([[height / width]]).expand(len(x), -1)}
        out = module(x, encoder_hidden_states=cond["prompt"].to(x.dtype), encoder_attention_mask=cond["mask"], timestep=timestep,
                     added_cond_kwargs=sizes, return_dict=False)[0]
        return out[:, : self.shape[0]]

    @torch.no_grad()
    def conditions(self, prompts):
        prompt, mask = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.module.device)[:2]
        return {"prompt": prompt.float(), "mask": mask}
