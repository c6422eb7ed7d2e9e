"""Time samplers. They take uniform numbers u in [0, 1) (from `Batch.rand`), so that draws are indexed by sample."""
from __future__ import annotations

import torch
from torch import Tensor


def uniform(u: Tensor, lo: float, hi: float) -> Tensor:
    """t ~ U[lo, hi]."""
    return lo + (hi - lo) * u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std^2)) by inverting the normal CDF (SD3, Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).to(u)


def ordered_pair(a: Tensor, b: Tensor, equal: Tensor, p_equal: float) -> tuple[Tensor, Tensor]:
    """(t, r) = (max, min) of two draws; with probability `p_equal` (uniform draw `equal`) r = t (MeanFlow, Sec. 4.3)."""
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(equal < p_equal, t, r)
