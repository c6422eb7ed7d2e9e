"""Total derivatives along a direction, always detached."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def total_derivative(fn, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], how: str = "jvp", h: float = 5e-3) -> tuple[Tensor, Tensor]:
    """(fn(*primals), d/ds fn(*(primals + s tangents)) at s = 0), both without graph.

    how="jvp": exact forward-mode derivative (math attention is forced: fused attention has none on a CPU).
    how="fd": central difference with step `h` in s, for networks without forward mode or with stiff time embeddings
    (timesteps of 1000 t need h >= 5e-3: below it the difference resolves the embedding, not the flow).

    Mixed precision is off inside: a difference of nearby bf16 values is noise, and forward mode has no autocast."""
    with torch.no_grad(), torch.autocast(primals[0].device.type, enabled=False):
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(fn, primals, tangents)
        if how == "fd":
            ahead = fn(*(p + h * d for p, d in zip(primals, tangents)))
            behind = fn(*(p - h * d for p, d in zip(primals, tangents)))
            return fn(*primals), (ahead - behind) / (2 * h)
    raise ValueError(f"unknown derivative {how!r}: use 'jvp' or 'fd'")
