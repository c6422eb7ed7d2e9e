"""The emoji teacher: a tiny text-to-image StableDiffusionPipeline, trained from nothing on the embedded set.

    net v(x_t, t, text):  repeat  x_t = alpha_t z0 + sigma_t eps;   min | v(x_t, t, text) - (alpha_t eps - sigma_t z0) |^2

z0 are whitened autoencoder latents [4, 16, 16] (`make_autoencoder.py` runs first), the text is encoded by a two-layer
CLIPTextModel over whole words, trained jointly. Variance-preserving table rescaled to zero terminal signal-to-noise
ratio (Lin et al. 2023, https://arxiv.org/abs/2305.08891), one caption in ten emptied for guidance (Ho and Salimans
2022, https://arxiv.org/abs/2207.12598). Weight matrices and kernels are updated by Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), all else by Adam. Only images of split "train" are used. The result is a
stock diffusers folder in half precision, replaced at every export.

    nice -n 10 python train_scripts/make_teacher.py --minutes 90        # CPU; the same line resumes runs/emoji/teacher.pt
"""
from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from make_autoencoder import encode_all, load_images, save_atomically

LENGTH = 16  # tokens of every prompt, with start and end


@dataclass
class Config:
    data: Path = Path("zoo/assets/emoji/emoji.parquet")
    vae: Path = Path("runs/emoji/vae")
    out: Path = Path("zoo/assets/emoji/teacher")
    checkpoint: Path = Path("runs/emoji/teacher.pt")
    log: Path = Path("benchmarks/teacher/emoji.jsonl")
    minutes: float = 90.0
    """Training time over all resumed parts; the learning rate falls to zero over the last `cooldown` of it."""
    cooldown: float = 0.35
    export_minutes: float = 10.0
    batch: int = 64
    lr: float = 1.5e-3
    """Adam's rate; Muon's, in the same root-mean-square scale, is `muon` times it."""
    muon: float = 1.4
    ema: float = 0.998
    drop: float = 0.1
    """Share of captions replaced by the empty one."""
    emphasis: float = 1.0
    """Weight of the smileys (one image in six) in the draw of training images, relative to all other groups."""
    seed: int = 0
    threads: int = 1
    """A second thread pays only where a second core is idle."""


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
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=128, pad_token_id=0, bos_token_id=2, eos_token_id=3))


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 96, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16, use_linear_projection=True)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                         rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
                         clip_sample=False, set_alpha_to_one=True)


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix; kernels count as [out, in * h * w]."""
    X = update.flatten(1).bfloat16()
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T if len(X) <= X.shape[1] else X.T @ X
        B = -4.7750 * A + 2.0315 * A @ A
        X = 3.4445 * X + (B @ X if len(X) <= X.shape[1] else X @ B)
    return X.float().view_as(update)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised and scaled to the root-mean-square size 0.2 that Adam's steps have."""

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
    """Hidden matrices and kernels for Muon; embeddings, first and last convolution, biases and norms for Adam."""
    outer = ("token_embedding", "position_embedding", "conv_in", "conv_out")
    named = list(net.named_parameters())
    hidden = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in outer)]
    ids = {id(p) for p in hidden}
    return hidden, [p for _, p in named if id(p) not in ids]


@dataclass
class Portable:
    """A pipeline that, once saved in half precision, loads with no dtype argument on a CPU and in older versions.

    transformers 5 would load the text encoder in the dtype its config names, and diffusers the rest in float32; and
    it writes a tokenizer class name that transformers 4 does not know.
    """

    pipe: StableDiffusionPipeline

    def save_pretrained(self, folder: Path) -> None:
        self.pipe.save_pretrained(folder)
        for file, old, new in (("text_encoder/config.json", '"float16"', '"float32"'),
                               ("model_index.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
                               ("tokenizer/tokenizer_config.json", "TokenizersBackend", "PreTrainedTokenizerFast")):
            path = folder / file
            path.write_text(path.read_text().replace(old, new))


def export(cfg: Config, weights: list[torch.Tensor], tokenizer) -> None:
    """Write the averaged weights as a complete pipeline folder, in half precision."""
    unet, text = make_unet(), make_text_encoder(tokenizer)
    copy = torch.nn.ModuleDict({"unet": unet, "text": text})
    for parameter, value in zip(copy.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(cfg.vae), text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    save_atomically(Portable(pipe.to(torch.float16)), cfg.out)


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    images, columns = load_images(cfg.data)
    rows = [i for i, split in enumerate(columns["split"]) if split == "train"]
    latents = encode_all(AutoencoderKL.from_pretrained(cfg.vae), images[rows])
    tokenizer = make_tokenizer(columns["caption"])
    encode = lambda texts: tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    tokens, empty = encode([columns["caption"][i] for i in rows]), encode([""])
    weights = torch.tensor([cfg.emphasis if columns["group"][i] == "smileys" else 1.0 for i in rows])
    scheduler = make_scheduler()
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()

    net = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(tokenizer)})
    parameters = list(net.parameters())
    hidden, others = split_parameters(net)
    optimizers = {Muon(hidden, cfg.lr): cfg.lr * cfg.muon,
                  torch.optim.Adam(others, cfg.lr, betas=(0.9, 0.99), fused=True): cfg.lr}
    average = [p.detach().clone() for p in parameters]
    step, seconds = 0, 0.0
    if cfg.checkpoint.exists():
        state = torch.load(cfg.checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average, step, seconds = state["average"], state["step"], state["seconds"]
        torch.manual_seed(cfg.seed + step)
    cfg.log.parent.mkdir(parents=True, exist_ok=True)
    cfg.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def checkpoint() -> None:
        state = {"net": net.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "average": average,
                 "step": step, "seconds": seconds}
        torch.save(state, cfg.checkpoint.with_suffix(".new"))
        os.replace(cfg.checkpoint.with_suffix(".new"), cfg.checkpoint)
        export(cfg, average, tokenizer)

    losses, exported, clock, cpu = [], seconds, time.time(), time.process_time()
    while (done := seconds / (60 * cfg.minutes)) < 1:
        fall = min(1.0, (1 - done) / cfg.cooldown)
        for optimizer, lr in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 200) * (1 - math.cos(math.pi * fall)) / 2
        picked = torch.multinomial(weights, cfg.batch)
        t = torch.randint(1000, (cfg.batch,))
        z0, eps = latents[picked], torch.randn(cfg.batch, 4, 16, 16)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        ids = torch.where(torch.rand(cfg.batch, 1) < cfg.drop, empty, tokens[picked])
        with torch.autocast("cpu", torch.bfloat16):
            text = net["text"](ids).last_hidden_state
            v = net["unet"](a * z0 + s * eps, t, text).sample
        loss = F.mse_loss(v.float(), a * eps - s * z0)
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(cfg.ema, step / (step + 10)))
        now = time.time()
        seconds, clock = seconds + now - clock, now
        losses.append(loss.item())
        if step % 200 == 0:
            record = {"step": step, "minutes": round(seconds / 60, 2), "loss": round(sum(losses) / len(losses), 5),
                      "epochs": round(step * cfg.batch / len(rows), 1),
                      "cpu_minutes": round((time.process_time() - cpu) / 60, 2)}
            losses.clear()
            print(record, flush=True)
            with open(cfg.log, "a") as file:
                file.write(json.dumps(record) + "\n")
        if seconds - exported > 60 * cfg.export_minutes:
            checkpoint()
            exported = seconds
    checkpoint()


if __name__ == "__main__":
    main(tyro.cli(Config))
