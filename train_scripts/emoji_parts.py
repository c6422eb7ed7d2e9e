"""What the emoji scripts share: reading the set (or that of `make_avatars.py`), the teacher's stock parts, saving, and Muon."""
from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from PIL.Image import Resampling
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from make_avatars import split_of

LENGTH = 16  # tokens of every prompt, with start and end
SIDE = 64  # pixels of a picture
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_images(path: Path) -> tuple[Tensor, dict[str, list[str]]]:
    """All images as a uint8 tensor [N, 3, 64, 64], and the other columns as lists.

    Images of another size are scaled as `zoo.data` scales them for the students; a set without a column `split` is avatars."""
    table = load_dataset("parquet", data_files=str(path), split="train")
    sized = (p.convert("RGB") if p.size == (SIDE, SIDE) else p.convert("RGB").resize((SIDE, SIDE), Resampling.LANCZOS)
             for p in table["image"])
    images = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8)
                          .view(SIDE, SIDE, 3).permute(2, 0, 1) for p in sized])
    columns = {name: table[name][:] for name in table.column_names if name != "image"}
    return images, {"split": [split_of(caption) for caption in columns["caption"]]} | columns


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


@torch.no_grad()
def encode_all(vae, images: Tensor) -> Tensor:
    """uint8 images [N, 3, 64, 64] to latents [N, 4, 16, 16]."""
    return torch.cat([vae.encode(to_unit(batch)).latent_dist.mode() for batch in images.split(128)])


def save_atomically(module, folder: Path) -> None:
    """Write beside `folder` and rename, so that a reader never sees half a model."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    module.save_pretrained(fresh)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class Portable:
    """A pipeline that, saved in half precision, loads with no dtype argument on a CPU and in older versions.

    transformers 5 would load the text encoder in the dtype its config names, and diffusers the rest in
    float32; and it writes a tokenizer class name that transformers 4 does not know.
    """

    pipe: StableDiffusionPipeline

    def save_pretrained(self, folder: Path) -> None:
        self.pipe.save_pretrained(folder)
        for file, old, new in (
                ("text_encoder/config.json", '"float16"', '"float32"'),
                ("model_index.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
                ("tokenizer/tokenizer_config.json", "TokenizersBackend", "PreTrainedTokenizerFast")):
            path = folder / file
            path.write_text(path.read_text().replace(old, new))


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, lower-cased, punctuation dropped; unknown words become <unk>."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", "<end>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([
        normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex("['\u2019]"), ""), normalizers.Replace(Regex("[^a-z0-9]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=LENGTH, pad_token="<pad>",
                                   unk_token="<unk>", bos_token="<start>", eos_token="<end>")


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=128,
        pad_token_id=0, bos_token_id=2, eos_token_id=3))


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 96, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16, use_linear_projection=True)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False, steps_offset=1)  # the offset is not used by "trailing"; 0 raises a warning


def orthogonalise(update: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix; kernels are [out, in * h * w]."""
    X = update.flatten(1).bfloat16()
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T if len(X) <= X.shape[1] else X.T @ X
        B = -4.7750 * A + 2.0315 * A @ A
        X = 3.4445 * X + (B @ X if len(X) <= X.shape[1] else X @ B)
    return X.float().view_as(update)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/) and scaled to the
    root-mean-square size 0.2 that Adam's steps have."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.add_(direction, alpha=-0.2 * group["lr"] * max(len(p), p[0].numel()) ** 0.5)


def split_parameters(net: torch.nn.Module) -> tuple[list, list]:
    """Hidden matrices and kernels, for Muon; embeddings, outer convolutions, biases and norms, for Adam."""
    outer = ("token_embedding", "position_embedding", "conv_in", "conv_out")
    named = list(net.named_parameters())
    hidden = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in outer)]
    ids = {id(p) for p in hidden}
    return hidden, [p for _, p in named if id(p) not in ids]
