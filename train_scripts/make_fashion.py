"""The Fashion-MNIST teacher: a small class-conditional UNet trained as a v-prediction diffusion model.

    repeat  x_t = alpha_t x0 + sigma_t eps;   min over v of  | v(x_t, t, class) - (alpha_t eps - sigma_t x0) |^2

with a variance-preserving table rescaled to zero terminal signal-to-noise ratio (Lin et al. 2023,
https://arxiv.org/abs/2305.08891) and one label in ten dropped to a null class after the last for guidance (Ho and
Salimans 2022, https://arxiv.org/abs/2207.12598). The 28x28 images are padded to 32x32 with black. The result is
a stock diffusers folder, loadable without this package. With --images it is the same teacher, in colour, of other
labelled pictures, brought to 32x32.

    python train_scripts/make_fashion.py --minutes 20                  # CPU; resumes runs/make_fashion
    python train_scripts/make_fashion.py --data folder/of/idx-gz-files # else Debian's package, else the Hub
    python train_scripts/make_fashion.py --images 'cifar10/train.parquet?image=img' --width 128 --batch 128 --minutes 240 \\
        --out runs/cifar10/teacher --run runs/cifar10/run --log runs/cifar10/teacher.jsonl
"""
from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from zoo import data
from zoo.data.fashion_mnist import arrays
from zoo.errors import UserError


@dataclass
class Config:
    data: str | None = None
    """Folder of the idx .gz files; when absent Debian's package folder, then the Hub."""
    images: str | None = None
    """Other labelled pictures: a folder of class subfolders, or a parquet file with image and label."""
    out: str = "zoo/assets/fashion/teacher"
    run: str = "runs/make_fashion"
    """Checkpoint folder; an existing checkpoint is resumed."""
    log: str = "benchmarks/teacher/fashion.jsonl"
    minutes: float = 20.0
    """Training time, over all resumed parts; the learning rate decays to zero at its end."""
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.998
    drop: float = 0.1
    """Share of labels replaced by the null class."""
    width: int = 32
    seed: int = 0


def read(cfg: Config) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pictures, uint8 [N, 1 or 3, 32, 32], their labels [N], and how many classes there are."""
    if cfg.images is None:
        images, labels = (torch.from_numpy(a.copy()) for a in arrays("train", cfg.data))
        return F.pad(images.unsqueeze(1), (2, 2, 2, 2)), labels.long(), 10
    pixels, table = data.load(cfg.images, 32, 3)
    labels = list(table["label"]) if "label" in table.column_names else []
    if not labels or not all(isinstance(i, int) and i >= 0 for i in labels):
        raise UserError(f"{cfg.images} has no class numbers: give a folder of class subfolders, or a parquet file with a column label")
    return ((pixels + 1) * 127.5).round().to(torch.uint8), torch.tensor(labels), max(labels) + 1


def build(width: int, channels: int, classes: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=32, in_channels=channels, out_channels=channels, block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=1, down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        add_attention=False, norm_num_groups=8, num_class_embeds=classes + 1,
    )


def table() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False,
    )


def save(cfg: Config, ema: dict, scheduler: DDIMScheduler, channels: int, classes: int) -> None:
    net = build(cfg.width, channels, classes)
    net.load_state_dict(ema)
    ConsistencyModelPipeline(unet=net.half(), scheduler=scheduler).save_pretrained(cfg.out)  # 2 MB


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.data and cfg.images:
        raise UserError("--data is a folder of Fashion-MNIST's files and --images other pictures: give one of them")
    images, labels, null = read(cfg)
    net = build(cfg.width, images.shape[1], null).to(device).train()
    opt = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, 0.99))
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()}
    scheduler = table()
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()

    checkpoint, step, before = Path(cfg.run) / "state.safetensors", 0, 0.0
    params = dict(net.named_parameters())
    if checkpoint.exists():
        state = load_file(checkpoint, device=device)
        step, before = int(state.pop("step")), float(state.pop("seconds"))
        net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
        ema = {k[4:]: v for k, v in state.items() if k.startswith("ema.")}
        for k, p in params.items():
            opt.state[p] = {"step": torch.tensor(float(step)),
                            "exp_avg": state[f"m1.{k}"], "exp_avg_sq": state[f"m2.{k}"]}

    def store(seconds: float) -> None:
        parts = {"net": net.state_dict(), "ema": ema,
                 "m1": {k: opt.state[p]["exp_avg"] for k, p in params.items()},
                 "m2": {k: opt.state[p]["exp_avg_sq"] for k, p in params.items()}}
        flat = {f"{part}.{k}": v.contiguous() for part, d in parts.items() for k, v in d.items()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        new = checkpoint.with_suffix(".new")
        save_file(flat | {"step": torch.tensor(step), "seconds": torch.tensor(seconds)}, new)
        new.replace(checkpoint)
        save(cfg, ema, scheduler, images.shape[1], null)

    Path(cfg.log).parent.mkdir(parents=True, exist_ok=True)
    # a resumed run trains what came after its checkpoint again, so those lines go
    lines = Path(cfg.log).read_text().splitlines() if step and Path(cfg.log).exists() else []
    log = open(cfg.log, "w")
    log.writelines(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
    start = stored = time.monotonic()
    total, mean, count = 60 * cfg.minutes, 0.0, 0
    while (seconds := before + time.monotonic() - start) < total:
        g = torch.Generator().manual_seed(cfg.seed * 2**31 + step)  # every draw is a function of (seed, step)
        pick = torch.randint(len(images), (cfg.batch,), generator=g)
        x0 = images[pick].float() / 127.5 - 1
        label = labels[pick].masked_fill(torch.rand(cfg.batch, generator=g) < cfg.drop, null)
        t, eps = torch.randint(1000, (cfg.batch,), generator=g), torch.randn(x0.shape, generator=g)
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        xt, v = (a * x0 + s * eps).to(device), (a * eps - s * x0).to(device)

        lr = cfg.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * seconds / total))
        opt.param_groups[0]["lr"] = lr
        with torch.autocast(device, torch.bfloat16):
            out = net(xt, t.to(device), label.to(device)).sample
        loss = F.mse_loss(out.float(), v)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        decay = min(cfg.ema, (1 + step) / (10 + step))
        for k, value in net.state_dict().items():
            ema[k].lerp_(value, 1 - decay)
        step, mean, count = step + 1, mean + loss.item(), count + 1

        if step % 50 == 0:
            row = {"step": step, "seconds": round(seconds, 1), "loss": round(mean / count, 5), "lr": round(lr, 7)}
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
            mean, count = 0.0, 0
        if time.monotonic() - stored > 120:
            stored = time.monotonic()
            store(seconds)
    store(seconds)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {step} steps, saved to {cfg.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
