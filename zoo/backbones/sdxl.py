"""Stable Diffusion XL: a `StableDiffusionXLPipeline` (base 1.0 and fine-tunes), eps or v prediction, two text encoders.

Besides the prompt the UNet reads the pooled text and six numbers (original size, crop, target size); as in the stock pipeline's plain
call they are the sample's own size, uncropped. The stock unguided half is all zeros where the pipeline says so, not an empty prompt."""
from __future__ import annotations

import torch

from .sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    family = "sdxl"
    bf16_on_cpu = False
    stock_guidance = 5.0

    def forward(self, module, x, timestep, cond):
        height, width = (n * self.pipe.vae_scale_factor for n in x.shape[-2:])
        numbers = x.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1)
        return module(x, timestep, encoder_hidden_states=cond["prompt"].to(x.dtype), return_dict=False,
                      added_cond_kwargs={"text_embeds": cond["pooled"].to(x.dtype), "time_ids": numbers})[0]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[dict, dict]:
        """(cond, uncond) of the stock pipeline."""
        prompt, nothing, pooled, no_pooled = self.pipe.encode_prompt(prompts, device=self.module.device, do_classifier_free_guidance=True)
        return {"prompt": prompt, "pooled": pooled}, {"prompt": nothing, "pooled": no_pooled}

    def conditions(self, prompts):
        return self._encode(prompts)[0]

    def unconditional(self):
        return self._encode([""])[1]

    def encode_prompts(self, prompts):
        """[n, tokens, width of both encoders], exactly as the stock pipeline encodes them."""
        return self.conditions(prompts)["prompt"]

    def student_pipeline(self, module, scheduler):
        parts = self.pipe.components | {"unet": module, "scheduler": scheduler}
        return type(self.pipe)(**parts, force_zeros_for_empty_prompt=self.pipe.config.force_zeros_for_empty_prompt, add_watermarker=False)
