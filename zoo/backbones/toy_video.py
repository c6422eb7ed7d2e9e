"""Small worlds of video: a pipeline for clips of sprites, and `ToyVideo`, a closed-form world of clips that needs no training."""
from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from ..data.sprites import Sprites
from ..process import RectifiedFlow
from ..toy import Mixture
from . import ASSETS
from .base import Examples, Source
from .video import FACTS, Video


def small_pipeline(sprites: Sprites, *, patch: int, heads: int, head_dim: int, layers: int, guidance: float, seed: int = 0):
    """A WanPipeline without autoencoder for clips of `sprites`: one token per patch of pixels, a whole-word tokenizer, and a one-layer
    UMT5 encoder with random weights, which only has to tell words apart. guidance: the scale its adapter uses by default."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = sorted({word for caption in sprites.captions for word in caption.split()})
    length = 1 + max(len(caption.split()) for caption in sprites.captions)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(words) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0))
        transformer = WanTransformer3DModel(
            patch_size=(1, patch, patch), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=sprites.channels,
            out_channels=sprites.channels, text_dim=32, freq_dim=128, ffn_dim=4 * heads * head_dim, num_layers=layers)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shape = [sprites.frames, sprites.channels, sprites.size, sprites.size]
    scheduler.register_to_config(**{FACTS: {"shape": shape, "guidance": guidance, "sprites": asdict(sprites)}})
    return WanPipeline(tokenizer=tokenizer, text_encoder=text, vae=None, scheduler=scheduler, transformer=transformer)


class ClipWorld(Mixture):
    """Exact `Net` of a finite set of clips [N, ...], each a Gaussian of width std. cond["label"] [B] is one of the groups [N] of clips,
    or one past the last: any clip."""

    def __init__(self, clips: Tensor, groups: Tensor, std: float = 0.05):
        self.clips, self.groups, self.var = clips.double(), groups, std**2
        self.process, self.classes = RectifiedFlow(), int(groups.max()) + 1

    def denoise(self, x, t, label=None):
        alpha, sigma, _, _ = (c.double()[:, None] for c in self.process.coeffs(t))
        clips, flat = self.clips.to(x.device).flatten(1), x.double().flatten(1)
        total = alpha**2 * self.var + sigma**2
        logp = (alpha * (flat @ clips.T) - 0.5 * alpha**2 * clips.square().sum(1)) / total
        if label is not None:
            logp = logp.masked_fill((self.groups.to(x.device) != label[:, None]) & (label != self.classes)[:, None], -torch.inf)
        mean = logp.softmax(1) @ clips
        return (mean + alpha * self.var / total * (flat - alpha * mean)).view_as(x)


TOY = dict(patch=6, heads=4, head_dim=16, layers=3, guidance=1.0)


def toy_clips() -> tuple[Sprites, Tensor, Tensor]:
    """The world of `ToyVideo`: its sprites, all its clips [512, 8, 1, 12, 12] and the caption of each by number."""
    sprites = Sprites(frames=8, size=12, side=5, channels=1, names=("disk", "cross"), directions=4, speeds=(("", 1.0),))
    starts = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).repeat(len(sprites.captions), 1)
    groups = torch.arange(len(sprites.captions)).repeat_interleave(64)
    state = sprites.states([sprites.captions[i] for i in groups.tolist()], starts)
    return sprites, sprites.render(state.sprite, sprites.positions(state, sprites.frames)), groups


class ToyVideo(Video):
    """Two grey figures of 5 pixels drifting over 12x12 pixels in four directions for eight frames: 512 clips. The teacher is their exact
    denoiser; student and critic start from a small Wan transformer fitted to it (make_video_teacher.py --toy)."""

    watched = (8, 8)

    def __init__(self):
        super().__init__(str(ASSETS / "toy_video"), "toy-video")
        self.world = ClipWorld(*toy_clips()[1:])
        self.words = self.encode_prompts([*self.sprites.captions, ""])

    @property
    def teacher(self):
        return self.world

    def conditions(self, label: Tensor) -> dict:
        """Captions [B] by number; one past the last is the empty prompt."""
        return {"prompt": self.words[label.to(self.words.device)], "label": label}

    def batches(self, images=False):
        n, world = len(self.sprites.captions), self.world

        def get(index):
            label = world.groups[index] if images else index
            fields = {"cond": self.conditions(label), "uncond": self.conditions(torch.full_like(label, n))}
            return fields | ({"x0": world.clips[index].float()} if images else {})
        return Source(len(world.clips) if images else n, get)

    def examples(self, n, seeds=1):
        label = torch.arange(n).remainder(len(self.sprites.captions)).repeat_interleave(seeds)
        names = [self.sprites.captions[i] for i in label.tolist()]
        return Examples(names, self.conditions(label), self.conditions(torch.full_like(label, len(self.sprites.captions))))
