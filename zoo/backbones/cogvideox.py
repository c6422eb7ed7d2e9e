"""CogVideoX: `CogVideoXPipeline`, text to video, v-prediction on a variance-preserving schedule with zero terminal SNR and a shifted SNR.

No few-step scheduler of diffusers knows the SNR shift, so the schedule is written down as betas: the same table, for teacher and student."""
from __future__ import annotations

import torch

from ..errors import UserError
from ..process import VP
from .flow import FlowVideo
from .video import FACTS


class CogVideoX(FlowVideo):
    family, pred = "cogvideox", "v"
    stock_guidance = 6.0
    tokens = 226
    large_encoders = ("text_encoder",)
    time_embeddings = ("time_embedding",)

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.open(folder, name, data, guidance)
        scheduler, config = self.pipe.scheduler, self.module.config
        ours = "_fewstep" in scheduler.config                    # an exported student: its table is written down already
        if not (ours or type(scheduler).__name__.startswith("CogVideoX")) or scheduler.config.prediction_type != "v_prediction":
            raise UserError(f"{name} uses {type(scheduler).__name__} ({scheduler.config.get('prediction_type')}), not CogVideoX's v-prediction: "
                            "distil from the original model")
        if config.patch_size_t is not None:
            raise UserError(f"{name} is a CogVideoX 1.5 model, whose patches span frames: it is not supported; use CogVideoX-2b or -5b")
        if not ours:
            table = scheduler.alphas_cumprod.double()
            betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
            scheduler.register_to_config(trained_betas=betas.tolist(), rescale_betas_zero_snr=False)
        self.process = VP.from_config(scheduler.config)
        self.guidance = guidance or scheduler.config.get(FACTS, {}).get("guidance", self.guidance)
        self.length = min(self.tokens, self.pipe.tokenizer.model_max_length, config.max_text_seq_length)
        self.size(config.in_channels, (config.sample_frames - 1) // self.pipe.vae_scale_factor_temporal + 1, config.sample_height, config.sample_width)

    shift = 1.0

    def forward(self, module, x, timestep, cond):
        factor = self.pipe.vae_scale_factor_spatial
        rotary = (self.pipe._prepare_rotary_positional_embeddings(x.shape[3] * factor, x.shape[4] * factor, x.shape[2], x.device)
                  if module.config.use_rotary_positional_embeddings else None)
        return module(hidden_states=x.transpose(1, 2), encoder_hidden_states=cond["prompt"].to(x.dtype), timestep=timestep,
                      image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)

    def conditions(self, prompts):
        prompt, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.module.device)
        return {"prompt": prompt.float()}

    @torch.no_grad()
    def encode(self, clips):
        vae = self.pipe.vae
        return vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float() * self.pipe.vae_scaling_factor_image

    def decode_video(self, x):
        return self.pipe.decode_latents(x.transpose(1, 2).to(self.pipe.vae.dtype))
