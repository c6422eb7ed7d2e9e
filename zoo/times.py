"""Time samplers and grids. Random ones take uniform numbers u in [0, 1) (from `Batch.rand`), so that draws are indexed by sample."""
from __future__ import annotations

import torch
from torch import Tensor


def uniform(u: Tensor, lo: float, hi: float) -> Tensor:
    """t ~ U[lo, hi]."""
    return lo + (hi - lo) * u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std^2)) by inverting the normal CDF (SD3, Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).to(u)


def shift(t: Tensor, s: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t); s > 1 moves times towards noise."""
    return s * t / (1 + (s - 1) * t)


def ordered_pair(a: Tensor, b: Tensor, equal: Tensor, p_equal: float) -> tuple[Tensor, Tensor]:
    """(t, r) = (max, min) of two draws; with probability `p_equal` (uniform draw `equal`) r = t (MeanFlow, Sec. 4.3)."""
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(equal < p_equal, t, r)


def grid(n: int, t_max: float = 1.0) -> Tensor:
    """n+1 times from t_max to 0, uniform."""
    return torch.linspace(t_max, 0, n + 1, dtype=torch.float64)


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """n noise levels from sigma_max to sigma_min (EDM, eq. 5)."""
    i = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    return (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
