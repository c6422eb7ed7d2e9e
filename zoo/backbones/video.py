"""Video: any `WanPipeline` (text to video, Wan 2.1), and the small pixel-space ones of make_video_teacher.py that have no autoencoder.

Samples are [F, C, H, W], frames first. The teacher and the critic are the stock transformer, bidirectional over all frames; a student
made with a `Layout` is the same network called causally (see wan_causal)."""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.feed import feed, fields, some_prompts
from ..data.sprites import Sprites
from ..denoiser import Denoiser
from ..errors import UserError
from ..process import RectifiedFlow
from ..rollout_causal import Layout
from .base import Examples, Prompted, Source, open_pipeline
from .wan_causal import causal_forward, open_attention

FACTS = "_fewstep_teacher"      # in the scheduler's config of our own teachers: shape, guidance, sprites


class Decoder:
    """Latent frames to pixels, as they come: Wan's autoencoder is causal, and its features are kept from one call to the next. Without
    an autoencoder the sample is the picture."""

    def __init__(self, vae: nn.Module | None):
        self.vae, self.features = vae, None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[B, f, C, h, w] -> [B, f', 3 or 1, H, W] in [-1, 1]; the first latent frame gives one picture, every other one four."""
        vae = self.vae
        if vae is None:
            return x.clamp(-1, 1)
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        z = vae.post_quant_conv((x.transpose(1, 2) * std + mean).to(vae.dtype))
        first = self.features is None
        if first:
            vae.clear_cache()
            self.features = vae._feat_map          # ours from here on: the next clear_cache makes a new list
        out = [vae.decoder(frame, feat_cache=self.features, feat_idx=[0], first_chunk=first and i == 0) for i, frame in enumerate(z.split(1, 2))]
        return torch.cat(out, 2).transpose(1, 2).float().clamp(-1, 1)


def mosaic(video: Tensor, most: int = 16, side: int = 128) -> Tensor:
    """Videos [B, F, C, H, W] as one picture each, frames in rows: at most `most`, evenly spaced, none larger than `side`."""
    f = video.shape[1]
    video = video[:, torch.linspace(0, f - 1, min(f, most)).round().long()]
    scale = side / max(video.shape[-2:])
    if scale < 1:
        small = [max(1, round(n * scale)) for n in video.shape[-2:]]
        video = F.interpolate(video.flatten(0, 1), small, mode="area").unflatten(0, video.shape[:2])
    columns = round(video.shape[1] ** 0.5 + 0.49)
    rows = -(-video.shape[1] // columns)
    blank = torch.ones_like(video[:, :1]).expand(-1, rows * columns - video.shape[1], -1, -1, -1)
    cells = torch.cat([video, blank], 1).unflatten(1, (rows, columns))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Video(Prompted):
    family, pred, part, watched = "video", "velocity", "transformer", (8, 2)
    pipeline_tag = "text-to-video"
    text_family = "wan"       # prompts are encoded as there: one cache serves both
    any_size = False
    lora_targets = r"blocks\..*(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"
    sprites: Sprites | None = None

    def __init__(self, folder: str, name: str, data: str = "", guidance: float = 0.0):
        from diffusers import WanPipeline

        index = WanPipeline.load_config(folder)
        if index.get("transformer_2", [None])[0] or index.get("expand_timesteps"):
            raise UserError(f"{name} is a Wan 2.2 model with two networks or one level per token, which has no adapter yet: use a Wan 2.1 text-to-video folder")
        bare = index["vae"][0] is None
        dtype = torch.float32 if bare else {"text_encoder": torch.bfloat16, "default": torch.float32}
        self._open(open_pipeline(folder, name, dtype, **({"vae": None} if bare else {})), name)
        self.folder, self.data, self.guidance = folder, data or self.data, guidance or self.guidance
        if not bare:
            self.watched = (4, 2)

    def _open(self, pipe, name: str):
        self.pipe, self.name, self.process = pipe, name, RectifiedFlow()
        pipe.set_progress_bar_config(disable=True)
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            if part is not None:
                part.requires_grad_(False).eval()
        self.module = pipe.transformer
        facts = pipe.scheduler.config.get(FACTS, {})
        self.shape = tuple(facts.get("shape", (21, 16, 60, 104)))         # Wan 2.1: 81 frames of 480 x 832
        self.guidance = facts.get("guidance", 5.0)                        # the stock pipeline's own default
        self.data = ""
        if "sprites" in facts:
            fields = {k: tuple(map(tuple, v)) if k == "speeds" else tuple(v) if isinstance(v, list) else v for k, v in facts["sprites"].items()}
            self.sprites, self.data = Sprites(**fields), "sprites"

    def forward(self, module, x, timestep, cond):
        z = x.transpose(1, 2).to(module.patch_embedding.weight.dtype)
        return module(z, timestep, cond["prompt"].to(z.dtype), return_dict=False)[0].transpose(1, 2)

    def make(self, role: str, *, layout: Layout | None = None, lora: int = 0, init: str = "", gradient_checkpointing: bool = False) -> Denoiser:
        """See Backbone.make. layout: make it a causal net (see rollout_causal); without one it is bidirectional, as the teacher."""
        if layout is not None and self.shape[0] < layout.chunk:
            raise UserError(f"a clip of {self.name} has {self.shape[0]} latent frames, fewer than one chunk of {layout.chunk}: "
                            f"choose --chunk {self.shape[0]} or less, or a teacher of longer clips")
        if layout is not None and self.shape[0] % layout.chunk:
            raise UserError(f"{self.shape[0]} frames are no whole number of chunks of {layout.chunk}: choose --chunk among its divisors")
        net = super().make(role, lora=lora, init=init, gradient_checkpointing=gradient_checkpointing)
        if layout is not None:
            open_attention(net.module)
            net.forward = partial(causal_forward, layout)
        return net

    # ---------------------------------------------------------------------------------------------- conditions and data
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """[n, tokens, width], exactly as the stock pipeline encodes them."""
        return encode_prompts(self.pipe, prompts)

    def conditions(self, prompts):
        return {"prompt": self.encode_prompts(prompts)}

    @property
    def length(self) -> int:
        return text_length(self.pipe)

    def batches(self, images=False):
        if self.data != "sprites":
            return feed(self, images)
        captions, sprites = self.sprites.captions, self.sprites
        self.texts.prepare(captions)

        def get(index):
            return fields(self.texts, [captions[i % len(captions)] for i in index.tolist()], sprites[index][0] if images else None)
        return Source(len(sprites) if images else len(captions), get)

    def examples(self, n, seeds=1):
        captions = sorted(set(self.sprites.captions if self.data == "sprites" else some_prompts(self)))
        pick = torch.randperm(len(captions), generator=torch.Generator().manual_seed(7)).tolist()
        names = [captions[pick[i % len(pick)]] for i in range(n) for _ in range(seeds)]
        found = fields(self.texts, names)
        return Examples(names, {k: v.to(self.module.device) for k, v in found["cond"].items()}, found["uncond"])

    @property
    def stock_size(self) -> dict:
        """Frames and pixels of a clip that is one sample."""
        (frames, _, height, width), pipe = self.shape, self.pipe
        if pipe.vae is None:
            return {"num_frames": frames, "height": height, "width": width}
        time, space = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
        return {"num_frames": (frames - 1) * time + 1, "height": height * space, "width": width * space}

    @property
    def picture_channels(self) -> int:
        return self.shape[1] if self.pipe.vae is None else 3

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3 or 1, F, H, W] in [-1, 1] to samples: scaled latents (mode), or the clips themselves without an autoencoder."""
        vae = self.pipe.vae
        if vae is None:
            return clips.transpose(1, 2)
        z = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(z) for v in (vae.config.latents_mean, vae.config.latents_std))
        return ((z - mean) / std).transpose(1, 2)

    def frames(self, x: Tensor) -> Tensor:
        """Samples [B, *shape] to videos [B, F, 3 or 1, H, W] in [-1, 1]."""
        return torch.cat([Decoder(self.pipe.vae)(one) for one in x.split(32 if self.pipe.vae is None else 1)])

    def decode(self, x):
        return mosaic(self.frames(x))

    def measure(self, x: Tensor, names: list[str]) -> dict[str, float]:
        """Where the truth is known (sprites): see Sprites.measure."""
        return self.sprites.measure(self.frames(x), names) if self.data == "sprites" else {}

    def to(self, device):
        self.pipe.to(device)
        return self


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str]) -> Tensor:
    """[n, tokens, width] float32, by the stock WanPipeline's own encoding; 512 tokens as it does, or the tokenizer's own length."""
    from diffusers import WanPipeline
    encode = partial(WanPipeline._get_t5_prompt_embeds, pipe)
    return encode(prompts, max_sequence_length=text_length(pipe), device=pipe.transformer.device).float()


def text_length(pipe) -> int:
    """Tokens of a prompt: 512, as the stock call has it, or the tokenizer's own number."""
    return min(512, pipe.tokenizer.model_max_length)
