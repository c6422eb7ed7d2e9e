"""Randomly initialised pipelines of stock classes, small enough to sample in milliseconds: teachers for tests.

Both are variance-preserving, v-prediction, zero terminal SNR, as the embedded teachers. Nothing here imports the package."""
from __future__ import annotations

from pathlib import Path

import torch

LENGTH = 8      # tokens of a prompt
# What a script needs besides the common flags for two steps in a test (numbers of stored pairs, of stages ...).
TINY: dict[str, dict] = {
    "dmd_pairs": dict(pairs=6, pair_steps=2),
    "reflow": dict(pairs=6, pair_steps=2),
    "progressive": dict(guided_steps=1, first=4, last=2, phase_steps=1),
}
WORDS = ("red", "blue", "heart", "star", "smiling", "face", "noto", "fluent")


def _scheduler():
    from diffusers import DDIMScheduler
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                         rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, steps_offset=1)


def _perturb(module: torch.nn.Module):
    """Biases and norms start at 0 and 1, which would hide mistakes in them: move every weight a little."""
    for p in module.parameters():
        p.data += 0.05 * torch.randn_like(p)


def tiny_sd(folder: str | Path, seed: int = 0) -> Path:
    """A StableDiffusionPipeline: latents [4, 8, 8], images [3, 16, 16], word-level tokenizer, UNet below 0.1 M parameters."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "<start>", "<end>", *WORDS])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
        core.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=LENGTH, pad_token="<pad>", unk_token="<unk>",
                                            bos_token="<start>", eos_token="<end>")
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                            num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=16,
                                            pad_token_id=0, bos_token_id=2, eos_token_id=3))
        unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                    cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4)
        vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.7)
        for module in (unet, text):
            _perturb(module)
        pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=_scheduler(),
                                       safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_pixel(folder: str | Path, classes: int | None = 5, channels: int = 1, size: int = 8, seed: int = 0) -> Path:
    """A ConsistencyModelPipeline over UNet2DModel: images [channels, size, size]; the last of `classes` is the null class."""
    from diffusers import ConsistencyModelPipeline, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
                           norm_num_groups=4, num_class_embeds=classes)
        _perturb(unet)
        ConsistencyModelPipeline(unet=unet, scheduler=_scheduler()).save_pretrained(folder, safe_serialization=True)
    return Path(folder)
