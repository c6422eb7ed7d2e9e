"""Train the emoji teacher's autoencoder: AutoencoderKL, 64x64x3 -> 16x16x4, whitened latents.

    nice -n 10 python train_scripts/make_autoencoder.py --minutes 12 --decoder-minutes 20
    ... --data zoo/assets/avatars/avatars.parquet --out runs/avatars/vae --log runs/avatars/vae.jsonl     # one for avatars

First encoder and decoder are trained together (L1 + L1 of image gradients + a small KL). Then the affine map
that gives the latents zero mean and identity covariance is folded into the two 1x1 convolutions `quant_conv`
and `post_quant_conv`: the reconstruction is unchanged and `scaling_factor = 1` is right. The result is saved,
and from then on the encoder is frozen, so a teacher may already be trained on its latents while the decoder
alone is trained on for `decoder_minutes`. Only images of split "train" are used; PSNR is reported for both.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from emoji_parts import DEVICE, encode_all, load_images, save_atomically, to_unit


@dataclass
class Config:
    data: Path = Path("zoo/assets/emoji/emoji.parquet")
    out: Path = Path("runs/emoji/vae")
    log: Path = Path("benchmarks/teacher/autoencoder.jsonl")
    minutes: float = 12.0  # encoder and decoder
    decoder_minutes: float = 20.0  # decoder alone, encoder frozen
    skip_encoder: bool = False  # resume with the decoder phase
    batch: int = 16
    lr: float = 2e-3
    kl: float = 1e-3
    ema: float = 0.99
    seed: int = 0
    threads: int = 1  # small convolutions gain little from a second core


def image_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels plus L1 of their horizontal and vertical differences."""
    error = output.float() - target
    return error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold z -> W (z - mean), W = cov^(-1/2), into the 1x1 convolutions; switch the posterior noise off."""
    z = encode_all(vae, images).transpose(0, 1).flatten(1).double()
    mean = z.mean(dim=1)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    W = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    W_inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    quant, post, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    quant.weight[:c, :, 0, 0], quant.bias[:c] = (W @ weight[:c]).float(), (W @ (bias[:c] - mean)).float()
    quant.weight[c:], quant.bias[c:] = 0.0, -30.0  # log-variance: sample() equals mode()
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ W_inverse).float()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over images."""
    mse = [(vae.decode(encode_all(vae, b)).sample.clamp(-1, 1) - to_unit(b)).square().mean(dim=(1, 2, 3))
           for b in images.split(64)]
    return (10 * torch.log10(4.0 / torch.cat(mse))).mean().item()


def train(vae: AutoencoderKL, images: torch.Tensor, cfg: Config, minutes: float, phase: str) -> None:
    latents = encode_all(vae, images) if phase == "decoder" else None
    parameters = [p for p in vae.to(DEVICE).parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=cfg.ema)
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr, betas=(0.9, 0.95))
    start, step = time.time(), 0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        lr = cfg.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr
        picked = torch.randint(len(images), (cfg.batch,))
        target = to_unit(images[picked]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            if phase == "decoder":
                output, kl = vae.decode(latents[picked].to(DEVICE)).sample, torch.zeros((), device=DEVICE)
            else:
                posterior = vae.encode(target).latent_dist
                output, kl = vae.decode(posterior.sample()).sample, posterior.kl().mean() / (4 * 16 * 16)
        loss = image_loss(output, target)
        optimizer.zero_grad()
        (loss + cfg.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        step += 1
        if step % 100 == 0:
            record = {"phase": phase, "step": step, "minutes": round((time.time() - start) / 60, 2),
                      "loss": round(loss.item(), 5), "kl": round(kl.item(), 3)}
            print(record, flush=True)
            with open(cfg.log, "a") as file:
                file.write(json.dumps(record) + "\n")
    ema.copy_to(parameters)
    vae.cpu()


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    images, columns = load_images(cfg.data)
    in_train = torch.tensor([s == "train" for s in columns["split"]])
    cfg.log.parent.mkdir(parents=True, exist_ok=True)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)

    def finish(phase: str) -> None:
        save_atomically(vae, cfg.out)
        z = encode_all(vae, images).transpose(0, 1).flatten(1)
        record = {"phase": f"{phase} done", "psnr_train": round(psnr(vae, images[in_train][:512]), 2),
                  "psnr_heldout": round(psnr(vae, images[~in_train]), 2),
                  "latent_mean_max": z.mean(dim=1).abs().max().item(),
                  "latent_cov_error": (torch.cov(z) - torch.eye(len(z))).abs().max().item()}
        print(record, flush=True)
        with open(cfg.log, "a") as file:
            file.write(json.dumps(record) + "\n")

    if cfg.skip_encoder:
        vae = AutoencoderKL.from_pretrained(cfg.out)
    else:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
            mid_block_add_attention=False, sample_size=64, scaling_factor=1.0, force_upcast=False)
        train(vae, images[in_train], cfg, cfg.minutes, "joint")
        whiten(vae, images[in_train])
        finish("joint")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    train(vae, images[in_train], cfg, cfg.decoder_minutes, "decoder")
    finish("decoder")


if __name__ == "__main__":
    main(tyro.cli(Config))
