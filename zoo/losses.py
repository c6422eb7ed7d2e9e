"""Losses as pure functions of tensors and callables. B = batch, N = elements per sample."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .process import per_sample


def along(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to x is exactly -direction / (B N): descent moves x along `direction`.

    Written as 1/2 mean |x - sg(x + direction)|^2 (DMD2 code form; the 1/2 matters)."""
    return 0.5 * F.mse_loss(x.float(), (x + direction).detach().float())


def guided(net, x: Tensor, t: Tensor, cond: dict, uncond: dict, w: float | Tensor, to: str = "x0") -> Tensor:
    """Classifier-free guidance D_u + w (D_c - D_u); w = 1 (none) costs one call, else cond and uncond run as one batch.

    w is a float or a tensor [B]. A family whose pipeline guides in another way has its own rule, `net.guide`."""
    if getattr(net, "guide", None) is not None:
        return net.guide(net, x, t, cond, uncond, w, to)
    if not torch.is_tensor(w) and w == 1:
        return net(x, t, cond, to=to)
    both = {k: torch.cat([uncond[k], cond[k]]) for k in cond if k in uncond}
    out_u, out_c = net(torch.cat([x, x]), torch.cat([t, t]), both, to=to).chunk(2)
    w = per_sample(w, x) if torch.is_tensor(w) else w
    return out_u + w * (out_c - out_u)


def normalised(direction: Tensor, x: Tensor, x_real: Tensor) -> Tensor:
    """direction / mean |x - x_real|, sample by sample (DMD, eq. 8)."""
    return direction / per_sample(per_sample_mean((x - x_real).abs()).clamp(min=1e-5), x)


@torch.no_grad()
def dmd_direction(x: Tensor, x_t: Tensor, t: Tensor, cond: dict, uncond: dict, real, fake, guidance: float | Tensor,
                  at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Where distribution matching pushes student samples x (DMD2, eq. 2, with the weight of DMD, eq. 8, written on x0).

    (x_real - x_fake) / mean |x - x_real| from the guided teacher's and the critic's estimates at x_t: ascent of
    log p_real - log p_fake. fake: the critic, or its estimate at x_t where that is there already; at [B]: the student time x was made at,
    for a critic that is told it. Returns (direction, x_real, x_fake)."""
    x_real = guided(real, x_t, t, cond, uncond, guidance)
    x_fake = fake.detach() if torch.is_tensor(fake) else fake(x_t, t, cond, r=at)
    return normalised(x_real - x_fake, x, x_real), x_real, x_fake


def without_prompt(cond: dict, uncond: dict, dropped: Tensor) -> dict:
    """cond, the samples where `dropped` [B] is true replaced by uncond."""
    return {k: torch.where(per_sample(dropped, v), uncond[k], v) for k, v in cond.items()}


def pseudo_huber(x: Tensor, y: Tensor, c: float = 1e-3) -> Tensor:
    """mean of sqrt(|x - y|^2 + c^2) - c per element (LCM form); quadratic below c, linear above."""
    return (((x.float() - y.float()) ** 2 + c * c).sqrt() - c).mean()


def huber(x: Tensor, y: Tensor) -> Tensor:
    """[B] pseudo-Huber of whole samples, (sqrt(|x - y|^2 + c^2) - c) / N with c = 0.00054 N (rf++, Lee et al. 2024)."""
    n = x[0].numel()
    c = 0.00054 * n
    return (((x.float() - y.float()) ** 2).flatten(1).sum(1).add(c * c).sqrt() - c) / n


def adaptive(squared: Tensor, p: float = 1.0, c: float = 1e-3) -> Tensor:
    """Adaptively weighted squared error e / sg(e + c)^p, e = per-sample *sum* of squares [B] (MeanFlow, eq. 22)."""
    return (squared / (squared.detach() + c) ** p).mean()


def trigflow_tangent(v: Tensor, dv: Tensor, x: Tensor, t: Tensor, dx: Tensor, ramp: float = 1.0) -> Tensor:
    """cos t df/dt of the TrigFlow consistency function f = cos t x - sin t v(x, t), along dx/dt = `dx` (sCM, Alg. 1).

    dv = dv/dt is the total derivative along (dx, 1); `ramp` in [0, 1] scales the part that needs it (tangent warm-up)."""
    cos, sin = per_sample(t.cos(), x), per_sample(t.sin(), x)
    return -cos**2 * (v - dx) - ramp * cos * sin * (x + dv)


def bounded(g: Tensor, c: float = 0.1) -> Tensor:
    """g / (|g| + c), |g| the l2 norm of each sample (tangent normalisation of sCM)."""
    norm = g.flatten(1).norm(dim=1)
    return g / per_sample(norm + c, g)


def two_jumps(u, x_t: Tensor, t: Tensor, r: Tensor, fraction: float | Tensor) -> Tensor:
    """Average velocity over [r, t] of two jumps of u(x, t, r) that meet at q, a `fraction` (a number or [B]) of the way down; detached.

    (t - r) u is an integral along the flow, so an exact u meets it for every q (SplitMeanFlow, eq. 8)."""
    with torch.no_grad():
        fraction = torch.as_tensor(fraction, device=t.device, dtype=t.dtype).expand_as(t)
        q = t - fraction * (t - r)
        first = u(x_t, t, q)
        second = u(x_t - per_sample(t - q, x_t) * first, q, r)
        return second + per_sample(fraction, x_t) * (first - second)


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)
