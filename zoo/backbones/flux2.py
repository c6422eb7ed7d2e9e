"""FLUX.2-klein: `Flux2KleinPipeline`. The base models are guided by an unconditional half; the distilled ones take no guidance.

The sample is the picture's latent [C, H, W] before its 2x2 patches become channels; the normalisation of the patches is the autoencoder's.
The time embedding has no biases. A second time that is fixed at export becomes a constant all the same: the slow waves of the network's own
time features add up to 1 at every timestep, so its weights on them carry it (`constant_of_time`)."""
from __future__ import annotations

import torch

from .flow import Flow


class Flux2Klein(Flow):
    family = "flux2"
    stock_guidance = 4.0
    large_encoders = ("text_encoder",)
    time_embeddings = ("time_guidance_embed.timestep_embedder",)
    lora_targets = (r".*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|linear_in|linear_out|to_qkv_mlp_proj|cond_proj)"
                    r"|single_transformer_blocks\..*to_out")

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance)
        self.size(self.module.config.in_channels // 4, 128, 128)
        if self.pipe.config.is_distilled:
            self.guidance = guidance or 1.0

    student_call: dict = {}
    student_options = {"is_distilled": True}      # which leaves guidance out of a stock call

    def mu(self, config):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
        return compute_empirical_mu(self.sequence, 50)         # the stock call's own number of steps

    def constant_of_time(self):
        """Least squares over the timesteps 0 to 1000, the smallest solution: within 1e-6 of 1 for the 256 features of the published networks."""
        timesteps = torch.linspace(0, 1000, 2001, dtype=torch.float64)
        features = self.module.time_guidance_embed.time_proj(timesteps).double()
        return torch.linalg.lstsq(features, torch.ones_like(timesteps), rcond=1e-7, driver="gelsd").solution

    def forward(self, module, x, timestep, cond):
        pipe, z = self.pipe, self.pipe._patchify_latents(x.contiguous())
        ids, prompt = pipe._prepare_latent_ids(z).to(x.device), cond["prompt"].to(x.dtype)
        out = module(hidden_states=pipe._pack_latents(z), timestep=timestep / 1000, guidance=None, encoder_hidden_states=prompt,
                     txt_ids=pipe._prepare_text_ids(prompt).to(x.device), img_ids=ids, return_dict=False)[0]
        return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(out, ids, *z.shape[-2:]))

    def conditions(self, prompts):
        return {"prompt": self.pipe.encode_prompt(prompts, device=self.module.device, max_sequence_length=self.length)[0].float()}

    def _statistics(self, x):
        vae = self.pipe.vae
        mean, variance = (v.view(1, -1, 1, 1).to(x) for v in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    @torch.no_grad()
    def encode(self, images):
        vae, pipe = self.pipe.vae, self.pipe
        z = torch.cat([pipe._patchify_latents(vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()) for part in images.split(32)]).float()
        mean, std = self._statistics(z)
        return pipe._unpatchify_latents((z - mean) / std)

    @torch.no_grad()
    def decode(self, x):
        vae, z = self.pipe.vae, self.pipe._patchify_latents(x.float().contiguous())
        mean, std = self._statistics(z)
        z = self.pipe._unpatchify_latents(z * std + mean).to(vae.dtype)
        return torch.cat([vae.decode(part, return_dict=False)[0] for part in z.split(32)]).float().clamp(-1, 1)
