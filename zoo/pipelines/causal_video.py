"""Streaming of causal video students: chunk after chunk through a key-value cache, frames as they come, videos of any length."""
from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Callable, Iterator

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from torch import Tensor

from ..backbones.video import Decoder, encode_prompts
from ..backbones.wan_causal import causal_forward, open_attention
from ..denoiser import Denoiser
from ..errors import UserError
from ..hub.contract import Contract
from ..process import RectifiedFlow
from ..rollout_causal import Layout, stream


@dataclass
class Videos:
    """frames: per video a list of PIL images, or a tensor [B, F, C, H, W] in [0, 1] ("pt"), or samples as the trainer's ("latent")."""
    frames: list | Tensor


class CausalVideoPipeline(DiffusionPipeline):
    """`pipe(prompt)` or `for chunk in pipe.stream(prompt)`, by the contract in the scheduler's config. Another number of steps than it was
    trained for warns once and runs through times spaced as the trained ones are.

    transformer: a stock WanTransformer3DModel, called causally; vae: Wan's autoencoder, or none for students in pixel space."""

    _optional_components = ["vae"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, tokenizer, text_encoder, transformer, scheduler, vae=None):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler, vae=vae)
        open_attention(transformer)

    @property
    def contract(self) -> Contract:
        data = self.scheduler.config.get("_fewstep")
        if data is None:
            raise UserError("this folder holds no contract: it was not exported by a run of these scripts")
        return Contract.from_json(data)

    @torch.no_grad()
    def latents(self, prompt: str | list[str], num_inference_steps: int | None = None, generator: torch.Generator | None = None,
                draw: Callable[[int, int], Tensor] | None = None) -> Iterator[Tensor]:
        """Chunks [B, chunk, C, H, W] in the network's space, without end. draw(i, k): noise of chunk i and step k, instead of the
        generator's. A student trained without a window keeps as many frames in sight as its clips had."""
        from diffusers.utils.torch_utils import randn_tensor

        contract = self.contract
        shape = contract.layout["shape"]
        layout = Layout(**{f.name: contract.layout[f.name] for f in fields(Layout)})
        if not layout.window:
            layout = Layout(layout.chunk, layout.sink, shape[0] - layout.sink, layout.slots)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self.transformer.device
        if draw is None:
            draw = lambda i, k: randn_tensor((len(prompts), layout.chunk, *shape[1:]), generator=generator, device=device)
        flow = RectifiedFlow()
        net = Denoiser(self.transformer, flow, "velocity", partial(causal_forward, layout))
        steps = max(contract.knots) if num_inference_steps is None else num_inference_steps
        knots = contract.times_for(steps, flow)
        if steps not in contract.knots and not getattr(self, "_warned", False):
            warnings.warn(f"this student was trained for {', '.join(map(str, contract.steps))} steps, not {steps}", stacklevel=2)
            self._warned = True
        yield from stream(net, {"prompt": encode_prompts(self, prompts)}, knots, layout, draw)

    @torch.no_grad()
    def stream(self, prompt: str | list[str], **options) -> Iterator[Tensor]:
        """Frames [B, f, C, H, W] in [0, 1] of one chunk after another, without end; options as for `latents`."""
        decode = Decoder(self.vae)
        for chunk in self.latents(prompt, **options):
            yield decode(chunk) / 2 + 0.5

    @torch.no_grad()
    def __call__(self, prompt: str | list[str], *, num_frames: int | None = None, output_type: str = "pil", **options) -> Videos:
        """Videos of `num_frames` frames (by default as long as the clips it was trained on); options as for `latents`."""
        frames = self.contract.layout["shape"][0]
        chunk = self.contract.layout["chunk"]
        if output_type == "latent":
            wanted = num_frames or frames
            return Videos(torch.cat(list(islice(self.latents(prompt, **options), -(-wanted // chunk))), 1)[:, :wanted])
        wanted = num_frames or (frames if self.vae is None else 1 + (frames - 1) * self.vae.config.scale_factor_temporal)
        parts, have = [], 0
        for part in self.stream(prompt, **options):
            parts.append(part)
            have += part.shape[1]
            if have >= wanted:
                break
        video = torch.cat(parts, 1)[:, :wanted]
        if output_type == "pt":
            return Videos(video)
        from diffusers.image_processor import VaeImageProcessor
        return Videos([VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(one)) for one in video])


def causal_pipeline(teacher, transformer, contract: Contract) -> CausalVideoPipeline:
    """The student `transformer` with the parts of the teacher's WanPipeline."""
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.register_to_config(_fewstep=contract.to_json())
    return CausalVideoPipeline(tokenizer=teacher.tokenizer, text_encoder=teacher.text_encoder, transformer=transformer, scheduler=scheduler, vae=teacher.vae)
