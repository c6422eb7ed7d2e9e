"""The emoji teacher: a tiny text-to-image StableDiffusionPipeline, trained from nothing on the embedded set.

    net v(x_t, t, text):  x_t = alpha_t z0 + sigma_t eps;  min |v - (alpha_t eps - sigma_t z0)|^2

z0 are whitened autoencoder latents [4, 16, 16] (run `make_autoencoder.py` first); the text is encoded by a
two-layer CLIPTextModel over whole words, trained jointly. Variance-preserving table rescaled to zero terminal
signal-to-noise ratio (Lin et al. 2023, https://arxiv.org/abs/2305.08891), one caption in ten emptied for
guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598). Weight matrices and kernels are updated by
Muon (Jordan et al. 2024), all else by Adam. Only images of split "train" are used. The result is a stock
diffusers folder in half precision, replaced at every export.

    nice -n 10 python train_scripts/make_teacher.py --minutes 90  # CPU; the same line resumes
    ... --init zoo/assets/emoji/teacher --vae zoo/assets/emoji/teacher/vae     # trains the shipped one further

On avatars it is the same teacher, whose captions name every attribute; one combination in five is held out. The emoji's autoencoder
loses their small features, so train one first (`make_autoencoder.py`, the same --data):

    python train_scripts/make_teacher.py --data zoo/assets/avatars/avatars.parquet --vae runs/avatars/vae --out runs/avatars/teacher \\
        --checkpoint runs/avatars/teacher.safetensors --log runs/avatars/teacher.jsonl
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
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import emoji_parts as parts
from zoo.errors import UserError


@dataclass
class Config:
    data: Path = Path("zoo/assets/emoji/emoji.parquet")
    vae: Path = Path("runs/emoji/vae")
    out: Path = Path("zoo/assets/emoji/teacher")
    init: Path | None = None
    """Start from the weights of this pipeline folder; the optimisers start anew."""
    checkpoint: Path = Path("runs/emoji/teacher.safetensors")
    log: Path = Path("benchmarks/teacher/emoji.jsonl")
    minutes: float = 90.0
    """Training time over all resumed parts; the rate falls to zero over the last `cooldown` of it."""
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
    """Weight of the smileys (one image in six) in the draw of training images, relative to other groups."""
    seed: int = 0
    threads: int = 1
    """A second thread pays only where a second core is idle."""
    compile: bool = False
    """torch.compile the network (needs a C++ compiler on a CPU)."""


def export(cfg: Config, weights: list[torch.Tensor], tokenizer) -> None:
    """Write the averaged weights as a complete pipeline folder, in half precision."""
    copy = torch.nn.ModuleDict({"unet": parts.make_unet(), "text": parts.make_text_encoder(tokenizer)})
    for parameter, value in zip(copy.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(cfg.vae), text_encoder=copy["text"], tokenizer=tokenizer,
        unet=copy["unet"], scheduler=parts.make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    parts.save_atomically(parts.Portable(pipe.to(torch.float16)), cfg.out)


def save(path: Path, parameters, average, optimizers, step: int, seconds: float) -> None:
    """Everything that training needs to go on, written beside and renamed."""
    tensors = {f"{i}.{name}": value for i, p in enumerate(parameters) for optimizer in optimizers
               for name, value in optimizer.state.get(p, {}).items()}
    for i, (p, mean) in enumerate(zip(parameters, average, strict=True)):
        tensors |= {f"{i}.value": p.detach(), f"{i}.average": mean}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(path.with_suffix(".new"), path)


def restore(path: Path, parameters, average, optimizers) -> tuple[int, float]:
    """What `save` wrote; returns step and seconds."""
    for key, value in load_file(path).items():
        i, name = key.split(".")
        p = parameters[int(i)]
        if name in ("value", "average"):
            (p.data if name == "value" else average[int(i)]).copy_(value)
        else:
            owner = next(o for o in optimizers if any(p is q for q in o.param_groups[0]["params"]))
            owner.state[p][name] = value.to(p.device)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    device = parts.DEVICE
    for path in (cfg.log, cfg.checkpoint, cfg.out):
        path.parent.mkdir(parents=True, exist_ok=True)
    images, columns = parts.load_images(cfg.data)
    if cfg.emphasis != 1 and "group" not in columns:
        raise UserError(f"--emphasis {cfg.emphasis:g}: {cfg.data} has no groups, as the emoji have: leave it out")
    rows = [i for i, split in enumerate(columns["split"]) if split == "train"]
    latents = parts.encode_all(AutoencoderKL.from_pretrained(cfg.vae), images[rows]).to(device)
    tokenizer = parts.make_tokenizer(columns["caption"])
    texts = ["", *(columns["caption"][i] for i in rows)]
    empty, tokens = tokenizer(texts, padding="max_length", max_length=parts.LENGTH,
                              return_tensors="pt").input_ids.to(device).split([1, len(rows)])
    weights = torch.tensor([cfg.emphasis if cfg.emphasis != 1 and columns["group"][i] == "smileys" else 1.0 for i in rows])
    scheduler = parts.make_scheduler()
    alpha, sigma = (x.sqrt().to(device) for x in (scheduler.alphas_cumprod, 1 - scheduler.alphas_cumprod))

    net = torch.nn.ModuleDict({"unet": parts.make_unet(), "text": parts.make_text_encoder(tokenizer)}).to(device)
    parameters = list(net.parameters())
    hidden, others = parts.split_parameters(net)
    optimizers = {parts.Muon(hidden, cfg.lr): cfg.lr * cfg.muon,
                  torch.optim.Adam(others, cfg.lr, betas=(0.9, 0.99), fused=True): cfg.lr}
    if cfg.init:
        start = StableDiffusionPipeline.from_pretrained(cfg.init, safety_checker=None)
        net["unet"].load_state_dict(start.unet.state_dict())
        net["text"].load_state_dict(start.text_encoder.state_dict())
    # Plain attention: the fused kernel's backward pass takes a third of a step on a CPU, for a few dozen tokens.
    net["unet"].set_attn_processor(AttnProcessor())
    unet = torch.compile(net["unet"]) if cfg.compile else net["unet"]
    average = [p.detach().clone() for p in parameters]
    step, seconds = 0, 0.0
    if cfg.checkpoint.exists():
        step, seconds = restore(cfg.checkpoint, parameters, average, optimizers)
        torch.manual_seed(cfg.seed + step)

    def checkpoint() -> None:
        save(cfg.checkpoint, parameters, average, optimizers, step, seconds)
        export(cfg, average, tokenizer)

    losses, exported, clock, cpu = [], seconds, time.time(), time.process_time()
    while (done := seconds / (60 * cfg.minutes)) < 1:
        fall = min(1.0, (1 - done) / cfg.cooldown)
        for optimizer, lr in optimizers.items():
            warm = min(1.0, (step + 1) / 200)
            optimizer.param_groups[0]["lr"] = lr * warm * (1 - math.cos(math.pi * fall)) / 2
        picked = torch.multinomial(weights, cfg.batch).to(device)
        t = torch.randint(1000, (cfg.batch,)).to(device)
        z0, eps = latents[picked], torch.randn(cfg.batch, 4, 16, 16).to(device)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        ids = torch.where(torch.rand(cfg.batch, 1).to(device) < cfg.drop, empty, tokens[picked])
        with torch.autocast(device, torch.bfloat16):
            v = unet(a * z0 + s * eps, t, net["text"](ids).last_hidden_state).sample
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
            record = {"step": step, "minutes": round(seconds / 60, 2),
                      "loss": round(sum(losses) / len(losses), 5),
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
    try:
        main(tyro.cli(Config))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
