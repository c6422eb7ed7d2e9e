"""What a critic adds to a score network: a denoising loss on the student's samples and a GAN head on tapped features."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .process import per_sample


class GanHead(nn.Module):
    """Logit [B] from a feature map [B, C, H, W] (strided convolutions down to 1x1) or a vector [B, C] (two-layer MLP).

    After DMD2: conv / GroupNorm / SiLU, halving the side each time."""

    def __init__(self, channels: int, side: int | None):
        super().__init__()
        if side is None:
            self.net = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
            return
        layers: list[nn.Module] = []
        while side > 1:
            layers += [nn.Conv2d(channels, channels, 4 if side >= 4 else side, 2, 1 if side >= 4 else 0),
                       nn.GroupNorm(min(32, channels // 4), channels), nn.SiLU()]
            side //= 2
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features.float()).flatten(1).mean(1)


def denoising(fake, x: Tensor, eps: Tensor, t: Tensor, cond: dict) -> Tensor:
    """Denoising loss of the fake score on the student's samples x (detached here), as a v-MSE.

    The v-MSE weights x0 errors by 1/sigma^2 on VP and flow paths and is bounded at both ends."""
    x = x.detach()
    x_t = fake.process.noise(x, eps, t)
    alpha, sigma, _, _ = (per_sample(c, x) for c in fake.process.coeffs(t))
    return F.mse_loss(fake(x_t, t, cond, to="v").float(), (alpha * eps - sigma * x).float())


def discriminator(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """Non-saturating discriminator loss, positive = real; 2 log 2 at logits 0."""
    return F.softplus(fake_logit).mean() + F.softplus(-real_logit).mean()


def generator(fake_logit: Tensor) -> Tensor:
    """Non-saturating generator loss softplus(-logit)."""
    return F.softplus(-fake_logit).mean()
