"""LTX-Video: `LTXPipeline`, text to video. Times go to the network in thousandths; positions are scaled by the frame rate (the stock 25)."""
from __future__ import annotations

import torch

from .flow import FlowVideo


class LTX(FlowVideo):
    family = "ltx"
    stock_guidance = 3.0
    tokens = 128
    large_encoders = ("text_encoder",)
    time_embeddings = ("time_embed.emb.timestep_embedder",)
    factors = ("vae_temporal_compression_ratio", "vae_spatial_compression_ratio")
    frame_rate = 25

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance)
        time, space = (getattr(self.pipe, factor) for factor in self.factors)
        self.patch = (self.pipe.transformer_temporal_patch_size, *2 * (self.pipe.transformer_spatial_patch_size,))
        self.size(self.module.config.in_channels, 160 // time + 1, 512 // space, 704 // space)      # the stock call's 161 frames

    def forward(self, module, x, timestep, cond):
        time, space = (getattr(self.pipe, factor) for factor in self.factors)
        frames, height, width = x.shape[2:]
        patches = self.pipe.transformer_spatial_patch_size, self.pipe.transformer_temporal_patch_size
        out = module(hidden_states=self.pipe._pack_latents(x, *patches), encoder_hidden_states=cond["prompt"].to(x.dtype), timestep=timestep,
                     encoder_attention_mask=cond["mask"], num_frames=frames, height=height, width=width,
                     rope_interpolation_scale=(time / self.frame_rate, space, space), return_dict=False)[0]
        return self.pipe._unpack_latents(out, frames, height, width, *patches)

    def conditions(self, prompts):
        prompt, mask, _, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.module.device)
        return {"prompt": prompt.float(), "mask": mask}

    @torch.no_grad()
    def encode(self, clips):
        vae = self.pipe.vae
        z = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return self.pipe._normalize_latents(z, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def decode_video(self, x):
        vae = self.pipe.vae
        z = self.pipe._denormalize_latents(x, vae.latents_mean, vae.latents_std, vae.config.scaling_factor).to(vae.dtype)
        clean = torch.zeros(len(z), device=z.device, dtype=z.dtype) if vae.config.timestep_conditioning else None     # the stock decode_timestep 0
        return vae.decode(z, clean, return_dict=False)[0]
