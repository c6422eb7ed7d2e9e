"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline`, an MMDiT with two CLIP encoders and T5."""
from __future__ import annotations

from .flow import Flow


class StableDiffusion3(Flow):
    family = "sd3"
    stock_guidance = 7.0
    tokens = 256
    large_encoders = ("text_encoder_2", "text_encoder_3")
    time_embeddings = ("time_text_embed.timestep_embedder",)

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance, tokenizer="tokenizer_3")
        config = self.module.config
        self.size(config.in_channels, config.sample_size, config.sample_size)

    def forward(self, module, x, timestep, cond):
        return module(x, encoder_hidden_states=cond["prompt"].to(x.dtype), pooled_projections=cond["pooled"].to(x.dtype), timestep=timestep,
                      return_dict=False)[0]

    def conditions(self, prompts):
        prompt, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, self.module.device, do_classifier_free_guidance=False,
                                                       max_sequence_length=self.length)
        return {"prompt": prompt.float(), "pooled": pooled.float()}
