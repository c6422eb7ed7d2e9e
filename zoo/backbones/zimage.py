"""Z-Image: `ZImagePipeline`. Its network counts time from noise (0) to data (1) and returns minus the velocity; its guidance_scale g means
D_c + g (D_c - D_u), which is w = 1 + g here. The time embedding is a sequence of layers of its own."""
from __future__ import annotations

import torch

from .flow import Flow, padded


class ZImage(Flow):
    family = "zimage"
    stock_guidance = 6.0             # the stock guidance_scale 5
    student_call = {"guidance_scale": 0.0}
    large_encoders = ("text_encoder",)
    blocks = ("layers", "")
    last = "all_final_layer.2-1.linear"
    time_embeddings = ("t_embedder.mlp",)
    lora_targets = r".*(to_q|to_k|to_v|to_out\.0|feed_forward\.w[123]|cond_proj)"

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance)
        self.size(self.module.config.in_channels, 128, 128)

    def head_shape(self):
        return self.module.config.dim, None

    def forward(self, module, x, timestep, cond):
        texts = [row[:n].to(x.dtype) for row, n in zip(cond["prompt"], cond["mask"].sum(1).tolist())]
        out = module(list(x.unsqueeze(2).unbind(0)), (1000 - timestep) / 1000, texts, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def conditions(self, prompts):
        made, _ = self.pipe.encode_prompt(list(prompts), device=self.module.device, do_classifier_free_guidance=False, max_sequence_length=self.length)
        return padded(made, self.length)
