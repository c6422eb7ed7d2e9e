"""Qwen-Image: `QwenImagePipeline`. Text has the length it has; guidance is rescaled, token by token, to the norm of the conditional output."""
from __future__ import annotations

import torch
from torch import Tensor

from ..process import View, per_sample, view
from .flow import Flow, padded, trimmed


class QwenImage(Flow):
    family = "qwen_image"
    stock_guidance = 4.0
    large_encoders = ("text_encoder",)
    blocks = ("transformer_blocks", "img_norm2")
    time_embeddings = ("time_text_embed.timestep_embedder",)
    student_call: dict = {}          # the stock pipeline guides only where it is given a negative prompt

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        self.start(folder, name, data, guidance)
        self.size(self.module.config.in_channels // 4, 128, 128)

    def pack(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x.contiguous(), *x.shape)

    def unpack(self, z: Tensor, x: Tensor) -> Tensor:
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(z, *(n * scale for n in x.shape[-2:]), scale)[:, :, 0]

    def forward(self, module, x, timestep, cond):
        prompt, mask = trimmed(cond)
        out = module(hidden_states=self.pack(x), timestep=timestep / 1000, guidance=None, encoder_hidden_states_mask=mask,
                     encoder_hidden_states=prompt.to(x.dtype), img_shapes=[[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x), return_dict=False)[0]
        return self.unpack(out, x)

    def guide(self, net, x, t, cond, uncond, w, to="x0"):
        if not torch.is_tensor(w) and w == 1:
            return net(x, t, cond, to=to)
        inner = Rescaled(self, net.net if isinstance(net, View) else net, uncond, w)
        return view(inner, net.process)(x, t, cond, to=to)

    def unconditional(self):
        return self.conditions([" "])         # one space: the empty negative prompt of diffusers' own examples (pipeline_qwenimage_controlnet.py)

    def conditions(self, prompts):
        prompt, mask = self.pipe.encode_prompt(prompts, device=self.module.device, max_sequence_length=self.length)
        lengths = [prompt.shape[1]] * len(prompt) if mask is None else mask.sum(1).tolist()
        return padded([row[:n] for row, n in zip(prompt, lengths)], self.length)

    def _statistics(self, x):
        config = self.pipe.vae.config
        return (torch.tensor(v).view(1, -1, 1, 1, 1).to(x) for v in (config.latents_mean, config.latents_std))

    @torch.no_grad()
    def encode(self, images):
        vae = self.pipe.vae
        z = torch.cat([vae.encode(part[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode() for part in images.split(8)]).float()
        mean, std = self._statistics(z)
        return ((z - mean) / std)[:, :, 0]

    @torch.no_grad()
    def decode(self, x):
        vae, z = self.pipe.vae, x.float()[:, :, None]
        mean, std = self._statistics(z)
        return torch.cat([vae.decode(part.to(vae.dtype), return_dict=False)[0][:, :, 0] for part in (z * std + mean).split(8)]).float().clamp(-1, 1)


class Rescaled:
    """The guided network as a Net: v_u + w (v_c - v_u) with the norm of v_c, each over the channels of one packed token."""

    def __init__(self, model: QwenImage, net, uncond: dict, w):
        self.model, self.net, self.uncond, self.w, self.process = model, net, uncond, w, net.process

    def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
        both = {k: torch.cat([self.uncond[k], cond[k]]) for k in cond if k in self.uncond}
        out_u, out_c = self.net(torch.cat([x, x]), torch.cat([t, t]), both, to="velocity").chunk(2)
        w = per_sample(self.w, x) if torch.is_tensor(self.w) else self.w
        guided, plain = (self.model.pack(v) for v in (out_u + w * (out_c - out_u), out_c))
        v = self.model.unpack(guided * (plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), x)
        return self.process.convert(v, x, t, "velocity", to)
