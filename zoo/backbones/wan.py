"""Wan 2.1 and the single-network Wan 2.2 (TI2V-5B), text to video: `WanPipeline`, bidirectional students of the stock transformer.

Causal students, and our own small teachers without autoencoder, are the `video` family."""
from __future__ import annotations

import torch

from ..errors import UserError
from .flow import FlowVideo
from .video import Video


def wan(folder: str, name: str, data: str = "", guidance: float = 0.0):
    """The adapter of a WanPipeline folder: `Wan`, or `Video` for the small teachers of make_video_teacher.py."""
    from diffusers import WanPipeline
    if WanPipeline.load_config(folder)["vae"][0] is None:
        return Video(folder, name, data, guidance)
    return Wan(folder, name, data, guidance)


class Wan(FlowVideo):
    family = "wan"
    stock_guidance = 5.0
    large_encoders = ("text_encoder",)
    blocks = ("blocks", "")
    time_embeddings = ("condition_embedder.time_embedder",)
    lora_targets = r"blocks\..*(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)|.*time_embedder\.(linear_1|linear_2|cond_proj)"

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        from diffusers import WanPipeline
        index = WanPipeline.load_config(folder)
        if index.get("transformer_2", [None])[0] or index.get("boundary_ratio") is not None:
            raise UserError(f"{name} is a Wan 2.2 A14B model: two networks, one per range of noise, are not supported: use Wan 2.1 or Wan 2.2 TI2V-5B")
        self.start(folder, name, data, guidance)
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        self.size(self.module.config.in_channels, 80 // time + 1, 480 // space, 832 // space)       # the stock call's 81 frames
        self.patch = self.module.config.patch_size

    def forward(self, module, x, timestep, cond):
        if self.pipe.config.expand_timesteps:                 # one time per token: here all the same
            timestep = timestep[:, None].expand(-1, x.shape[2] * -(-x.shape[3] // 2) * -(-x.shape[4] // 2))
        return module(x, timestep, cond["prompt"].to(x.dtype), return_dict=False)[0]

    def conditions(self, prompts):
        prompt, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.module.device)
        return {"prompt": prompt.float()}

    @property
    def student_options(self):
        return {"expand_timesteps": self.pipe.config.expand_timesteps}

    def decode_video(self, x):
        vae = self.pipe.vae
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(x) for v in (vae.config.latents_mean, vae.config.latents_std))
        return vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def encode(self, clips):
        vae = self.pipe.vae
        z = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(z) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (z - mean) / std

    def causal(self) -> Video:
        """The same pipeline as the family of causal students, frames first."""
        model = Video.__new__(Video)
        model._open(self.pipe, self.name)
        model.folder, model.data, model.guidance, model.watched = self.folder, self.data, self.guidance, self.watched
        model.shape = (self.shape[1], self.shape[0], *self.shape[2:])
        return model
