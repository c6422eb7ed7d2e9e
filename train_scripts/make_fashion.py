"""The Fashion-MNIST teacher: a small class-conditional UNet trained as a v-prediction diffusion model.

    repeat  x_t = alpha_t x0 + sigma_t eps;   min over v of  | v(x_t, t, class) - (alpha_t eps - sigma_t x0) |^2

with a variance-preserving table rescaled to zero terminal signal-to-noise ratio (Lin et al. 2023,
https://arxiv.org/abs/2305.08891) and one label in ten dropped to the null class 10 for guidance (Ho and
Salimans 2022, https://arxiv.org/abs/2207.12598). The 28x28 images are padded to 32x32 with black. The result is
a stock diffusers folder, loadable without this package.

    python train_scripts/make_fashion.py --minutes 20                  # CPU; resumes runs/make_fashion
    python train_scripts/make_fashion.py --data folder/of/idx-gz-files # else Debian's package, else the Hub
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

from zoo.data.fashion_mnist import arrays

NULL = 10


@dataclass
class Config:
    data: str | None = None
    """Folder of the idx .gz files; when absent Debian's package folder, then the Hub."""
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


def build(width: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=1, down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        add_attention=False, norm_num_groups=8, num_class_embeds=NULL + 1,
    )


def table() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False,
    )


def save(cfg: Config, ema: dict, scheduler: DDIMScheduler) -> None:
    net = build(cfg.width)
    net.load_state_dict(ema)
    ConsistencyModelPipeline(unet=net.half(), scheduler=scheduler).save_pretrained(cfg.out)  # 2 MB


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (torch.from_numpy(a.copy()) for a in arrays("train", cfg.data))
    net = build(cfg.width).to(device).train()
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
        save(cfg, ema, scheduler)

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
        x0 = F.pad(images[pick].unsqueeze(1).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
        label = labels[pick].long().masked_fill(torch.rand(cfg.batch, generator=g) < cfg.drop, NULL)
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
    main(tyro.cli(Config))
