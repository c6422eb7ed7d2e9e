"""Time samplers. They take uniform numbers u in [0, 1) (from `Batch.rand`), so that draws are indexed by sample."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform(u: Tensor, lo: float, hi: float) -> Tensor:
    """t ~ U[lo, hi]."""
    return lo + (hi - lo) * u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std^2)) by inverting the normal CDF (SD3, Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).to(u)


def shifted(u: Tensor, k: float) -> Tensor:
    """k u / (1 + (k - 1) u): uniform flow times moved towards noise for k > 1 (SD3, Esser et al. 2024, eq. 23)."""
    return k * u / (1 + (k - 1) * u)


def u_shaped(u: Tensor, a: float) -> Tensor:
    """Density proportional to exp(a t) + exp(-a t) about t = 1/2 over [0, 1], most at both ends, by its inverse CDF (rf++, Lee et al. 2024,
    who write it 4 exp(4 s) / (exp(4) - 1) with s = t or 1 - t)."""
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a


def ordered_pair(a: Tensor, b: Tensor, equal: Tensor, p_equal: float) -> tuple[Tensor, Tensor]:
    """(t, r) = (max, min) of two draws; with probability `p_equal` (uniform draw `equal`) r = t (MeanFlow, Sec. 4.3)."""
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(equal < p_equal, t, r)
