"""SANA: a `SanaPipeline` (rectified flow, deep-compression autoencoder, prompts through a decoder-only language model).

The stock scheduler is a solver on flow sigmas moved by `flow_shift`: a matter of which times are visited, not of the path, so the
process is the plain rectified flow and `shift` says where its sampler stands at time u (see times.shifted)."""
from __future__ import annotations

import inspect

import torch

from ..errors import UserError
from ..process import RectifiedFlow
from .base import Blocks, Prompted


STOCK_SIDE = 1024         # what the stock call makes when nothing is said, whatever the network was trained for


class Sana(Blocks, Prompted):
    family, part, pred = "sana", "transformer", "velocity"
    stock_guidance = 4.5
    large_encoders = ("text_encoder",)
    time_embeddings = ("time_embed.emb.timestep_embedder",)
    lora_targets = r".*(to_q|to_k|to_v|to_out\.0|conv_inverted|conv_point|linear_1|linear_2|cond_proj|time_embed\.linear)"

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.open(folder, name, data, guidance)
        config, times = self.module.config, self.pipe.scheduler.config
        if config.guidance_embeds:
            raise UserError(f"{name} takes its guidance as an input, so it is distilled already (SANA-Sprint): distil from the SANA it came from")
        if times.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise UserError(f"{name} predicts {times.prediction_type}, not a flow: use a SANA whose scheduler says flow_prediction")
        self.process, self.shift = RectifiedFlow(), float(times.get("flow_shift") or times.get("shift") or 1.0)
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        side = config.sample_size * self.pipe.vae_scale_factor
        self.stock_call = {"guidance_scale": 1.0} | ({} if side == STOCK_SIDE else {"height": side, "width": side})

    def forward(self, module, x, timestep, cond):
        return module(x, encoder_hidden_states=cond["prompt"].to(x.dtype), encoder_attention_mask=cond["mask"],
                      timestep=timestep * module.config.timestep_scale, return_dict=False)[0]

    @torch.no_grad()
    def conditions(self, prompts):
        """With the instruction the stock call puts before a prompt."""
        instruction = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default
        prompt, mask = self.pipe.encode_prompt(prompts, False, device=self.module.device, complex_human_instruction=instruction)[:2]
        return {"prompt": prompt.float(), "mask": mask}

    @torch.no_grad()
    def unconditional(self):
        prompt, mask = self.pipe.encode_prompt([""], True, negative_prompt="", device=self.module.device, complex_human_instruction=None)[2:]
        return {"prompt": prompt.float(), "mask": mask}

    @torch.no_grad()
    def encode(self, images):
        vae = self.pipe.vae
        latents = torch.cat([vae.encode(part.to(vae.device, vae.dtype), return_dict=False)[0] for part in images.split(8)])
        return latents.float() * vae.config.scaling_factor
