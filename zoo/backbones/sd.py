"""Stable Diffusion family: any `StableDiffusionPipeline` (SD 1.x, 2.x and fine-tunes, our emoji teacher), eps or v prediction."""
from __future__ import annotations

import torch

from ..errors import UserError
from ..process import VP
from .base import Prompted

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def variance_preserving(name: str, scheduler) -> tuple[VP, str]:
    """(process, pred) of a stock VP scheduler. Raises UserError when it is none."""
    config = scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise UserError(f"{name} samples by {type(scheduler).__name__} (prediction {config.get('prediction_type')}), and this family is read on "
                        "variance-preserving schedules with prediction epsilon, v_prediction or sample: if it is a few-step student already, "
                        "distil from its teacher")
    return VP.from_config(config), PREDICTIONS[config.get("prediction_type", "epsilon")]


class StableDiffusion(Prompted):
    family = "sd"
    bf16_on_cpu = True
    folds_guidance = True

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.open(folder, name, data, guidance)
        self.process, self.pred = variance_preserving(name, self.pipe.scheduler)
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

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """[n, tokens, width], exactly as the stock pipeline encodes them."""
        return self.pipe.encode_prompt(prompts, self.module.device, 1, False)[0]

    def conditions(self, prompts):
        return {"prompt": self.encode_prompts(prompts)}

    def student_pipeline(self, module, scheduler):
        """A plain StableDiffusionPipeline, whatever the teacher's class takes besides."""
        import inspect

        from diffusers import StableDiffusionPipeline
        wanted = inspect.signature(StableDiffusionPipeline.__init__).parameters
        parts = {k: v for k, v in self.pipe.components.items() if k in wanted} | {"unet": module, "scheduler": scheduler}
        for part in ("safety_checker", "feature_extractor", "image_encoder"):
            parts.setdefault(part, None)
        return StableDiffusionPipeline(**parts, requires_safety_checker=parts["safety_checker"] is not None)
