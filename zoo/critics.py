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


class PatchHead(nn.Module):
    """Logits [B, positions] of a feature map [B, C, H, W], one per position (LADD); of a vector [B, C] or tokens [B, N, C] likewise.

    told: width of an embedding [B, told] it is given besides (0: none)."""

    def __init__(self, channels: int, flat: bool, told: int = 0, width: int = 128):
        super().__init__()
        if flat:
            self.first = nn.Linear(channels, width)
            self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        else:
            norm = lambda: nn.GroupNorm(min(32, width // 4), width)
            self.first = nn.Conv2d(channels, width, 1)
            self.rest = nn.Sequential(norm(), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), norm(), nn.SiLU(), nn.Conv2d(width, 1, 1))
        self.tell = nn.Linear(told, width) if told else None
        self.flat = flat

    def forward(self, features: Tensor, told: Tensor | None = None) -> Tensor:
        h = self.first(features.float())
        if self.tell is not None:
            e = self.tell(told.float())
            h = h + e.reshape(e.shape[:1] + (1,) * (h.ndim - 2) + e.shape[1:] if self.flat else e.shape + (1,) * (h.ndim - 2))
        return self.rest(h).flatten(1)


class Heads(nn.Module):
    """One PatchHead per tapped feature: a list of features to a list of logits [B, positions]. shapes: one feature's, without the batch."""

    def __init__(self, shapes: list[tuple[int, ...]], told: int = 0):
        super().__init__()
        self.each = nn.ModuleList(PatchHead(s[0] if len(s) == 3 else s[-1], len(s) < 3, told) for s in shapes)

    def forward(self, features: list[Tensor], told: Tensor | None = None) -> list[Tensor]:
        return [head(f, told) for head, f in zip(self.each, features, strict=True)]


def denoising(fake, x: Tensor, eps: Tensor, t: Tensor, cond: dict, r: Tensor | None = None) -> Tensor:
    """Denoising loss of the fake score on the student's samples x (detached here), as a v-MSE; r: a second scalar for a critic
    that has one (such as the student time x was made at).

    The v-MSE weights x0 errors by 1/sigma^2 on VP and flow paths and is bounded at both ends."""
    x = x.detach()
    x_t = fake.process.noise(x, eps, t)
    alpha, sigma, _, _ = (per_sample(c, x) for c in fake.process.coeffs(t))
    return F.mse_loss(fake(x_t, t, cond, r=r, to="v").float(), (alpha * eps - sigma * x).float())


def logits(net, samples: list[tuple[Tensor, Tensor]], cond: dict, r: Tensor | None = None) -> list[Tensor]:
    """Logits [B] of the network's GAN head for each (x_t [B, ...], t [B]) of one batch of conditions, all in one call."""
    n = len(samples)
    x, t = (torch.cat(parts) for parts in zip(*samples))
    repeated = {k: torch.cat([v] * n) for k, v in cond.items()}
    return list(net(x, t, repeated, r=None if r is None else torch.cat([r] * n), logits=True)[1].chunk(n))


def discriminator(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """Non-saturating discriminator loss, positive = real; 2 log 2 at logits 0."""
    return F.softplus(fake_logit).mean() + F.softplus(-real_logit).mean()


def generator(fake_logit: Tensor) -> Tensor:
    """Non-saturating generator loss softplus(-logit)."""
    return F.softplus(-fake_logit).mean()


def hinge_discriminator(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """Hinge discriminator loss relu(1 - real) + relu(1 + fake); 2 at logits 0."""
    return F.relu(1 - real_logit).mean() + F.relu(1 + fake_logit).mean()


def hinge_generator(fake_logit: Tensor) -> Tensor:
    """Generator loss beside the hinge, -logit."""
    return -fake_logit.mean()
