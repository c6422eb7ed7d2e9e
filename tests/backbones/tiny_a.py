"""Randomly initialised pipelines of stock classes, one builder per family: SD (eps, v), SDXL, PixArt-alpha and -Sigma, DiT, DDPM, SANA.

Latents are [4, 8, 8] and images [3, 16, 16], twice that for SANA, whose stock sizes are multiples of 32; networks have less than 0.1 M
parameters. Scheduler settings are those of the published models; SANA's and PixArt-Sigma's were checked in diffusers' conversion scripts. Nothing here imports
the package."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

WORDS = ("red", "blue", "heart", "star", "cat", "tree", "a", "noto")
SIDE = 16
# What a stock call needs besides a prompt: labels, or sizes where the stock defaults are those of the real networks.
CALLS = {
    "pixart_alpha": {"use_resolution_binning": False},
    "pixart_alpha_512": {"use_resolution_binning": False},
    "pixart_sigma": {"use_resolution_binning": False},
    "sana": {"use_resolution_binning": False, "height": 32, "width": 32},
    "dit": {"class_labels": [3, 207]},
    "ddpm": {"batch_size": 2},
}


def word_tokenizer(length: int):
    """A word-level tokenizer of `length` tokens with start and end marks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "<start>", "<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, pad_token="<pad>", unk_token="<unk>",
                                   bos_token="<start>", eos_token="<end>")


def clip(width: int, projected: bool = False):
    """A CLIP text encoder of one width, with a projection when `projected`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=4 + len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=8, projection_dim=width, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int = 16):
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=4 + len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def autoencoder(scaling: float = 0.7):
    from diffusers import AutoencoderKL
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIDE, scaling_factor=scaling)


def perturb(*modules):
    """Norms, biases and zero-initialised layers hide mistakes in them: move every weight a little."""
    for module in modules:
        for p in module.parameters():
            p.data += 0.05 * torch.randn_like(p)


def _sd_unet(**more):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                attention_head_dim=4, norm_num_groups=4, **more)


def _sd(scheduler):
    from diffusers import StableDiffusionPipeline
    unet, text = _sd_unet(cross_attention_dim=16), clip(16)
    perturb(unet, text)
    return StableDiffusionPipeline(vae=autoencoder(), text_encoder=text, tokenizer=word_tokenizer(8), unet=unet, scheduler=scheduler,
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)


SD_BETAS = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def sd15():
    """Stable Diffusion 1.5: eps, PNDM."""
    from diffusers import PNDMScheduler
    return _sd(PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def sd21():
    """Stable Diffusion 2.1: v, DDIM."""
    from diffusers import DDIMScheduler
    return _sd(DDIMScheduler(**SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1))


def sdxl(**schedule):
    """SDXL base 1.0: eps, Euler, two text encoders, pooled text and six sizes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    unet = _sd_unet(cross_attention_dim=16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=6 * 8 + 24, use_linear_projection=True, transformer_layers_per_block=(1, 2))
    texts = clip(16), clip(24, projected=True)
    perturb(unet, *texts)
    return StableDiffusionXLPipeline(vae=autoencoder(), text_encoder=texts[0], text_encoder_2=texts[1], tokenizer=word_tokenizer(8),
                                     tokenizer_2=word_tokenizer(8), unet=unet, add_watermarker=False,
                                     scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1, **schedule))


def _pixart(pipeline, **more):
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
    network = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=24,
                                       patch_size=2, caption_channels=16, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
                                       norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, activation_fn="gelu-approximate", **more)
    text = t5()
    perturb(network, text)
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2)
    return pipeline(tokenizer=word_tokenizer(120), text_encoder=text, vae=autoencoder(), transformer=network, scheduler=scheduler)


def pixart_alpha():
    """PixArt-alpha at 1024: learned sigma, resolution and aspect-ratio conditions."""
    from diffusers import PixArtAlphaPipeline
    return _pixart(PixArtAlphaPipeline, sample_size=128, use_additional_conditions=True)


def pixart_alpha_512():
    """PixArt-alpha at 512: no size conditions."""
    from diffusers import PixArtAlphaPipeline
    return _pixart(PixArtAlphaPipeline, sample_size=8, use_additional_conditions=False)


def pixart_sigma():
    """PixArt-Sigma: learned sigma, no size conditions."""
    from diffusers import PixArtSigmaPipeline
    return _pixart(PixArtSigmaPipeline, sample_size=8, use_additional_conditions=False)


def dit():
    """DiT: 1000 classes and the null class 1000, learned sigma."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
                                    num_embeds_ada_norm=1000, norm_elementwise_affine=False)
    perturb(network)
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return DiTPipeline(transformer=network, vae=autoencoder(), scheduler=scheduler, id2label={"0": "tench", "1": "goldfish"})


def ddpm():
    """DDPM: unconditional pixels, eps, with attention."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)
    perturb(unet)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", variance_type="fixed_large")
    return DDPMPipeline(unet=unet, scheduler=scheduler)


def sana():
    """SANA: rectified flow at shift 3, deep-compression autoencoder, decoder-only text encoder; its solver on flow sigmas (--scheduler_type
    flow-dpm_solver of convert_sana_to_diffusers.py; the other choice there is FlowMatchEuler)."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model
    network = SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
                                     cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, mlp_ratio=2.0, sample_size=16, patch_size=1)
    vae = AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
                        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
                        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
                        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407)
    text = Gemma2Model(Gemma2Config(vocab_size=4 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    perturb(network, text, vae)
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2)
    return SanaPipeline(tokenizer=word_tokenizer(300), text_encoder=text, vae=vae, transformer=network, scheduler=scheduler)


BUILDERS = {f.__name__: f for f in (sd15, sd21, sdxl, pixart_sigma, dit, ddpm, sana)}
MEMBERS = {"sdxl_v": partial(sdxl, prediction_type="v_prediction"), "pixart_alpha_512": pixart_alpha_512}       # of the same families
LARGE = {"pixart_alpha": pixart_alpha}       # the stock pipeline passes sizes to networks of 128 latents a side alone: too slow to train in a test


def build(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Save the tiny pipeline `name` at `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        (BUILDERS | MEMBERS | LARGE)[name]().save_pretrained(folder, safe_serialization=True)
    return Path(folder)
