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

    w is a float or a tensor [B]."""
    if not torch.is_tensor(w) and w == 1:
        return net(x, t, cond, to=to)
    both = {k: torch.cat([uncond[k], cond[k]]) for k in cond if k in uncond}
    out_u, out_c = net(torch.cat([x, x]), torch.cat([t, t]), both, to=to).chunk(2)
    w = per_sample(w, x) if torch.is_tensor(w) else w
    return out_u + w * (out_c - out_u)


def pseudo_huber(x: Tensor, y: Tensor, c: float = 1e-3) -> Tensor:
    """mean of sqrt(|x - y|^2 + c^2) - c per element (LCM form); quadratic below c, linear above."""
    return (((x.float() - y.float()) ** 2 + c * c).sqrt() - c).mean()


def adaptive(squared: Tensor, p: float = 1.0, c: float = 1e-3) -> Tensor:
    """Adaptively weighted squared error e / sg(e + c)^p, e = per-sample *sum* of squares [B] (MeanFlow, eq. 22)."""
    return (squared / (squared.detach() + c) ** p).mean()


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)
