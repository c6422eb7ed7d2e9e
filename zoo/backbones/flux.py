"""FLUX.1: `FluxPipeline`. The dev models embed their guidance: the scale w is an input of the network, one call a step, no unconditional half.

The teacher is read at the w it is asked for; student and critic are called at the teacher's default w, which a stock call must be told too
(`guidance_scale`). schnell has no such input and no guidance."""
from __future__ import annotations

import torch

from ..errors import UserError
from .flow import Flow


class Flux(Flow):
    family = "flux"
    stock_guidance = 3.5
    large_encoders = ("text_encoder_2",)
    time_embeddings = ("time_text_embed.timestep_embedder",)

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance, tokenizer="tokenizer_2")
        self.size(self.module.config.in_channels // 4, 128, 128)
        self.embeds = self.module.config.guidance_embeds
        self.takes_guidance = self.embeds
        if not self.embeds:
            self.guidance = guidance or 1.0

    @property
    def student_call(self):
        return {"guidance_scale": self.guidance} if self.embeds else {}

    def forward(self, module, x, timestep, cond):
        (b, c, h, w), scale = x.shape, self.pipe.vae_scale_factor
        guidance = None
        if self.embeds:
            guidance = cond["guidance"] if "guidance" in cond else torch.full((b,), self.guidance, device=x.device)
        prompt = cond["prompt"].to(x.dtype)
        out = module(self.pipe._pack_latents(x.contiguous(), b, c, h, w), timestep=timestep / 1000, guidance=guidance,
                     pooled_projections=cond["pooled"].to(x.dtype), encoder_hidden_states=prompt,
                     txt_ids=x.new_zeros(prompt.shape[1], 3), img_ids=self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype),
                     return_dict=False)[0]
        return self.pipe._unpack_latents(out, h * scale, w * scale, scale)

    def guide(self, net, x, t, cond, uncond, w, to="x0"):
        """The scale is an input; without one (schnell) the plain rule."""
        if self.embeds:
            return net(x, t, cond | {"guidance": w if torch.is_tensor(w) else torch.full_like(t, w, dtype=torch.float32)}, to=to)
        if not torch.is_tensor(w) and w == 1:
            return net(x, t, cond, to=to)
        raise UserError(f"{self.name} takes no guidance: it has neither an input for it nor an unconditional half; drop --guidance")

    def make(self, role, *, guidance_embedding=False, **options):
        if guidance_embedding and self.embeds:
            raise UserError(f"{self.name} embeds its guidance already and its student is trained at one scale: drop --guidance_range")
        return super().make(role, guidance_embedding=guidance_embedding, **options)

    def conditions(self, prompts):
        prompt, pooled, _ = self.pipe.encode_prompt(prompts, device=self.module.device, max_sequence_length=self.length)
        return {"prompt": prompt.float(), "pooled": pooled.float()}
