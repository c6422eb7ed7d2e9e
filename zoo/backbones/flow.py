"""What the transformer families of diffusers share: flow-matching times, text of one length, and guidance other than the plain rule."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UserError
from ..process import RectifiedFlow
from .base import Prompted
from .video import FACTS, mosaic


class Flow(Prompted):
    """A flow-matching transformer. A family sets the attributes below and gives `forward`, `conditions` and its default `shape`.

    tokens: the stock call's max_sequence_length; blocks: the list of transformer blocks, and the part of a block whose output is
    the picture's tokens [B, N, width] ("" for the block itself); patch: latent pixels a token covers, per axis."""

    part = "transformer"
    pred = "velocity"
    last = "proj_out"
    tokens = 512
    blocks = ("transformer_blocks", "norm2")
    patch: tuple[int, ...] = (2, 2)
    lora_targets = (r".*(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|linear_1|linear_2|cond_proj)"
                    r"|single_transformer_blocks\..*(proj_mlp|proj_out)")
    guide = None              # guide(net, x, t, cond, uncond, w, to): where the stock guidance is not D_u + w (D_c - D_u)

    def start(self, folder: str, name: str, data: str, guidance: float, tokenizer: str = "tokenizer") -> None:
        """`open`, and what follows from tokenizer and scheduler. Raises UserError for a scheduler that is not a flow-matching one."""
        self.open(folder, name, data, guidance)
        scheduler, found = self.pipe.scheduler, getattr(self.pipe, tokenizer, None)
        if not type(scheduler).__name__.startswith("FlowMatch") and scheduler.config.get("prediction_type") != "flow_prediction":
            raise UserError(f"{name} uses {type(scheduler).__name__}, not a flow-matching schedule of the {self.family} family: distil from the original model")
        self.process = RectifiedFlow()
        self.guidance = guidance or scheduler.config.get(FACTS, {}).get("guidance", self.guidance)
        self.length = min(self.tokens, found.model_max_length) if found is not None else self.tokens

    def size(self, *shape: int) -> None:
        """One sample is `shape`, that of a plain stock call, but where a teacher names another in its scheduler's config."""
        self.stock_shape = tuple(shape)
        self.shape = tuple(self.pipe.scheduler.config.get(FACTS, {}).get("shape", shape))

    @property
    def sequence(self) -> int:
        """Tokens of one sample."""
        return math.prod(self.shape[1:]) // math.prod(self.patch)

    @property
    def shift(self) -> float:
        """k of times.shifted with which the stock scheduler moves its times towards noise at this size."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("flow_shift") or config.get("shift") or 1.0
        mu = self.mu(config)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def mu(self, config) -> float:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(self.sequence, *(config.get(k, d) for k, d in zip(names, (256, 4096, 0.5, 1.15))))

    @property
    def stock_call(self) -> dict:
        """What a stock call of a student must be told besides the number of steps."""
        size = {} if self.shape[1:] == self.stock_shape[1:] else self.stock_size
        return self.student_call | size | ({} if self.length == self.tokens else {"max_sequence_length": self.length})

    @property
    def stock_size(self) -> dict:
        return dict(zip(("height", "width"), (n * self.pipe.vae_scale_factor for n in self.shape[-2:])))

    student_call: dict = {"guidance_scale": 1.0}

    def student_pipeline(self, module, scheduler):
        """The teacher's own pipeline around another network and scheduler, which keeps the sample shape where it is not the stock one."""
        if self.shape != self.stock_shape:
            scheduler.register_to_config(**{FACTS: {"shape": list(self.shape)}})
        return type(self.pipe)(**self.pipe.components | {self.part: module, "scheduler": scheduler}, **self.student_options)

    student_options: dict = {}       # of the pipeline class, besides its parts

    # -------------------------------------------------------------------------------------------------------- networks
    @property
    def teacher(self) -> Denoiser:
        return self._guided(super().teacher)

    def make(self, role: str, **options) -> Denoiser:
        return self._guided(super().make(role, **options))

    def _guided(self, net: Denoiser) -> Denoiser:
        if self.guide is not None:
            net.guide = self.guide
        return net

    @property
    def taps(self):
        name, leaf = self.blocks
        n = len(self.module.get_submodule(name))
        return [f"{name}.{i}" + f".{leaf}" * bool(leaf) for i in sorted({n // 4, n // 2, 3 * n // 4})]

    @property
    def tap(self):
        name, leaf = self.blocks
        return f"{name}.{len(self.module.get_submodule(name)) // 2}" + f".{leaf}" * bool(leaf)

    def head_shape(self):
        config = self.module.config
        return config.num_attention_heads * config.attention_head_dim, None


class FlowVideo(Flow):
    """Samples are [C, F, H, W]: latent frames after the channels, as the stock pipelines draw their noise."""

    watched = (4, 2)
    blocks = ("transformer_blocks", "")
    factors = ("vae_scale_factor_temporal", "vae_scale_factor_spatial")       # the pipeline's names for what its autoencoder folds

    @property
    def stock_size(self):
        time, space = (getattr(self.pipe, name) for name in self.factors)
        return {"num_frames": (self.shape[1] - 1) * time + 1, "height": self.shape[2] * space, "width": self.shape[3] * space}

    any_size = False

    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, F, H, W] in [-1, 1] to scaled latents (mode): what `decode_video` turns back."""
        raise NotImplementedError

    def frames(self, x: Tensor) -> Tensor:
        """Samples [B, C, F, H, W] to videos [B, F', 3, H', W'] in [-1, 1]."""
        return torch.cat([self.decode_video(one).transpose(1, 2).float().clamp(-1, 1) for one in x.split(1)])

    @torch.no_grad()
    def decode(self, x):
        return mosaic(self.frames(x))

    def decode_video(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] to [B, 3, F', H', W'] through the stock pipeline's own scaling."""
        raise NotImplementedError


def padded(embeddings: list[Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings [n_i, width] as prompt [B, length, width], zeros behind, and mask [B, length] of what is there."""
    mask = torch.stack([torch.arange(length) < len(e) for e in embeddings])
    rows = [torch.cat([e, e.new_zeros(length - len(e), e.shape[1])]) for e in (e[:length].float() for e in embeddings)]
    return {"prompt": torch.stack(rows), "mask": mask.to(rows[0].device)}


def trimmed(cond: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """prompt and mask up to the longest of the batch; mask None where nothing is padding, as the stock pipelines call."""
    longest = int(cond["mask"].sum(1).max())
    mask = cond["mask"][:, :longest]
    return cond["prompt"][:, :longest], None if mask.all() else mask
