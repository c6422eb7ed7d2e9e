"""The Fashion-MNIST classifier of `zoo.metrics.classifier`: cross-entropy on the 60,000 training images.

Random shifts of up to two pixels; a one-cycle learning rate (Smith and Topin 2017,
https://arxiv.org/abs/1708.07120).

    python train_scripts/make_classifier.py                               # one to two minutes on a CPU
    python train_scripts/make_classifier.py --data folder/of/idx-gz-files # else Debian's package, else the Hub
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

from zoo.data.fashion_mnist import arrays
from zoo.metrics.classifier import WEIGHTS, Classifier, accuracy


@dataclass
class Config:
    data: str | None = None
    """Folder of the idx .gz files; when absent Debian's package folder, then the Hub."""
    out: Path = WEIGHTS
    epochs: int = 6
    batch: int = 128
    lr: float = 4e-3
    seed: int = 0


def tensors(split: str, path: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (torch.from_numpy(a.copy()) for a in arrays(split, path))
    return F.pad(images.unsqueeze(1).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0), labels.long()


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    x, y = tensors("train", cfg.data)
    net = Classifier()
    opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    steps = cfg.epochs * (len(x) // cfg.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, cfg.lr, total_steps=steps)
    for epoch in range(cfg.epochs):
        net.train()
        for pick in torch.randperm(len(x))[: len(x) // cfg.batch * cfg.batch].split(cfg.batch):
            dy, dx = torch.randint(-2, 3, (2,)).tolist()  # the border of two is black, so a roll is a shift
            loss = F.cross_entropy(net(x[pick].roll((dy, dx), (2, 3))), y[pick], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        print(f"epoch {epoch + 1}: test accuracy {accuracy(net.eval(), *tensors('test')):.4f}", flush=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, cfg.out)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, saved to {cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
