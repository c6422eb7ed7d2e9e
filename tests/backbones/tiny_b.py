"""Tiny stock pipelines of the MMDiT and video families, random weights from configs, tokenizers built here: nothing is downloaded.

Every folder names its sample shape in the scheduler's config (`_fewstep_teacher`), since most pipelines have no smaller size of their own.
Nothing here imports the package."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

LENGTH = 12
WORDS = ("red", "blue", "green", "heart", "cat", "tree", "star", "a", "noto", "picture")
CHAT = "{% for m in messages %}<start> {{ m['content'] }} <end>{% endfor %}"


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Biases, norms and gates start at 0 and 1, which would hide mistakes in them: move every weight a little."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def tokenizer(length: int = LENGTH, pieces: bool = False):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "<start>", "<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace() if pieces else pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, pad_token="<pad>", unk_token="<unk>", bos_token="<start>",
                                   eos_token="<end>", chat_template=CHAT, padding_side="right")


def clip(projection: bool = False, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=14, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=LENGTH, projection_dim=width, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return perturb((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(kind: str = "T5"):
    import transformers
    config = getattr(transformers, f"{kind}Config")(vocab_size=14, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3)
    return perturb(getattr(transformers, f"{kind}EncoderModel")(config))


def qwen3(layers: int = 2, causal: bool = False):
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
    config = Qwen3Config(vocab_size=14, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return perturb((Qwen3ForCausalLM if causal else Qwen3Model)(config))


def kl(channels: int):
    from diffusers import AutoencoderKL
    return perturb(AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
                                 scaling_factor=0.7, shift_factor=0.1))


def euler(shape, **options):
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.register_to_config(_fewstep_teacher={"shape": list(shape)})
    return scheduler


def sd3(**options):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                                        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
                                        qk_norm="rms_norm", **options)
    return StableDiffusion3Pipeline(transformer=perturb(transformer), scheduler=euler((4, 8, 8), shift=3.0), vae=kl(4),
                                    text_encoder=clip(True), tokenizer=tokenizer(),
                                    text_encoder_2=clip(True), tokenizer_2=tokenizer(), text_encoder_3=t5(), tokenizer_3=tokenizer())


def flux(guidance_embeds: bool = True):
    from diffusers import FluxPipeline, FluxTransformer2DModel
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                                         joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4))
    return FluxPipeline(transformer=perturb(transformer), scheduler=euler((4, 8, 8), use_dynamic_shifting=True), vae=kl(4), text_encoder=clip(),
                        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer())


def flux2(is_distilled: bool = False):
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    transformer = Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                          joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    vae = perturb(AutoencoderKLFlux2(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16))
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(transformer=perturb(transformer), scheduler=euler((4, 8, 8), use_dynamic_shifting=True), vae=vae,
                              text_encoder=qwen3(28, causal=True), tokenizer=tokenizer(), is_distilled=is_distilled)


def qwen_image():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=14, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         max_position_embeddings=64,
                         rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16), vision_start_token_id=0, vision_end_token_id=0,
        image_token_id=0, video_token_id=0)
    vae = perturb(AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                                         latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]))
    transformer = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                                              joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    pipe = QwenImagePipeline(transformer=perturb(transformer), scheduler=euler((4, 8, 8), use_dynamic_shifting=True, shift_terminal=0.02), vae=vae,
                             text_encoder=perturb(Qwen2_5_VLForConditionalGeneration(text)),
                             tokenizer=tokenizer(24, pieces=True))       # its template alone is 37 pieces, of which 34 are dropped
    return pipe


def zimage():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    transformer = ZImageTransformer2DModel(in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                                           axes_dims=[4, 2, 2], axes_lens=[64, 16, 16])
    return ZImagePipeline(transformer=perturb(transformer), scheduler=euler((4, 8, 8), shift=3.0), vae=kl(4), text_encoder=qwen3(), tokenizer=tokenizer())


def wan(expand_timesteps: bool = False, two_networks: bool = False):
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    vae = perturb(AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                   latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0]))
    networks = [perturb(WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
                                              ffn_dim=32, num_layers=2, rope_max_seq_len=32)) for _ in range(1 + two_networks)]
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000)
    scheduler.register_to_config(_fewstep_teacher={"shape": [4, 2, 4, 4]})
    second = {"transformer_2": networks[1], "boundary_ratio": 0.875} if two_networks else {}
    return WanPipeline(transformer=networks[0], scheduler=scheduler, vae=vae, text_encoder=t5("UMT5"), tokenizer=tokenizer(),
                       expand_timesteps=expand_timesteps, **second)


def cogvideox():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    vae = perturb(AutoencoderKLCogVideoX(in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
                                         up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
                                         layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4))
    transformer = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
                                              num_layers=2,
                                              sample_width=4, sample_height=4, sample_frames=5, patch_size=2, max_text_seq_length=LENGTH,
                                              use_rotary_positional_embeddings=True)
    scheduler = CogVideoXDDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, snr_shift_scale=3.0, rescale_betas_zero_snr=True,
                                       prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    return CogVideoXPipeline(transformer=perturb(transformer), scheduler=scheduler, vae=vae, text_encoder=t5(), tokenizer=tokenizer())


def ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
    vae = perturb(AutoencoderKLLTXVideo(in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
                                        decoder_block_out_channels=(8, 8, 8, 8),
                                        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
                                        spatio_temporal_scaling=(True, True, False, False),
                                        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1,
                                        encoder_causal=True, decoder_causal=False))
    transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
                                             cross_attention_dim=16, num_layers=2, caption_channels=32)
    scheduler = euler((8, 2, 8, 8), use_dynamic_shifting=True, shift_terminal=0.1, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.95, max_shift=2.05)
    return LTXPipeline(transformer=perturb(transformer), scheduler=scheduler, vae=vae, text_encoder=t5(), tokenizer=tokenizer())


BUILDERS = {f.__name__: f for f in (sd3, flux, flux2, qwen_image, zimage, wan, cogvideox, ltx)}

# Members of these families whose networks are called otherwise: SD3.5-medium (a second attention in its first blocks), Wan 2.2 TI2V-5B (a time per token).
MEMBERS = {"sd35_medium": partial(sd3, dual_attention_layers=(0,)), "wan22_ti2v": partial(wan, expand_timesteps=True)}


def build(family: str, folder: str | Path, seed: int = 0, **options) -> Path:
    """Save the tiny pipeline of `family`, or of one of its members, at `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        (BUILDERS | MEMBERS)[family](**options).save_pretrained(folder, safe_serialization=True)
    return Path(folder)
