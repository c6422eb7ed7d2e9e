"""Masked token processes: the sibling of process.py for sequences of symbols.

z_t keeps each token of x0 with probability alpha(t) = 1 - t and shows the mask elsewhere (MDLM, Sahoo et al. 2024,
https://arxiv.org/abs/2406.07524). A network answers with log p(x0 | z_t), one categorical per position. Symbols are drawn by inverse
CDF in float64: Gumbel noise in float32 ends at 16.6, which cuts rare symbols off, lowers the temperature and flatters perplexity."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .process import per_sample

HIDDEN = -1e6      # log-probability of what cannot be: finite, so that zero times it is zero


def subs(logits: Tensor, z: Tensor, mask_id: int) -> Tensor:
    """log p(x0 | z) [B, L, V] of raw logits: never the mask, and a visible token is itself (SUBS, Sahoo et al., Sec. 3.2.3)."""
    symbols = torch.arange(logits.shape[-1], device=z.device)
    log_p = logits.masked_fill(symbols == mask_id, HIDDEN).log_softmax(-1)
    itself = torch.where(symbols == z[..., None], 0.0, HIDDEN).to(log_p)
    return torch.where((z == mask_id)[..., None], log_p, itself)


class Masked:
    """The process. Times are tensors [B] in [0, 1], 1 is all masks; uniform numbers u are float64 [B, L] in [0, 1)."""

    t_max = 1.0

    def __init__(self, mask_id: int):
        self.mask_id = mask_id

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is visible."""
        return 1 - t

    def remains(self, t: Tensor, s: Tensor) -> Tensor:
        """Probability that a token masked at t is still masked at s < t."""
        return (1 - self.alpha(s)) / (1 - self.alpha(t)).clamp(min=1e-12)

    def prior(self, n: int, length: int, device=None) -> Tensor:
        """[n, length], all masks."""
        return torch.full((n, length), self.mask_id, device=device)

    def mask(self, x0: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """z_t of x0 [B, L]. The same u at several times gives nested masks: masked at s implies masked at t > s."""
        return torch.where(u >= per_sample(self.alpha(t), u), self.mask_id, x0)

    def step(self, z: Tensor, log_p: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Ancestral step from z at t to s < t: a masked token stays with probability `remains`, else is drawn from log_p [B, L, V];
        visible ones never change. One uniform number per token decides both. At s = 0 no mask is left."""
        if u.dtype != torch.float64:
            raise ValueError("draw tokens with float64 uniform numbers: float32 ones cannot reach rare symbols")
        stay = per_sample(self.remains(t.double(), s.double()), u)
        reveal = (z == self.mask_id) & (u >= stay)
        cdf = log_p[reveal].double().exp().cumsum(-1)
        total = cdf[:, -1:]
        where = ((u - stay) / (1 - stay))[reveal][:, None] * total
        z = z.clone()
        z[reveal] = torch.searchsorted(cdf, torch.minimum(where, torch.nextafter(total, torch.zeros_like(total))), right=True)[:, 0]
        return z

    def convert(self, out: Tensor, z: Tensor, t: Tensor, src: str, dst: str) -> Tensor:
        """The one reading of a token network: log p(x0 | z) of its logits."""
        if (src, dst) != ("logits", "x0"):
            raise ValueError(f"a masked token network gives logits and is read as x0, not {src!r} as {dst!r}")
        return subs(out, z, self.mask_id)

    def timestep(self, t: Tensor) -> Tensor:
        """What contracts and networks of this process call time t: t itself."""
        return t

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return timestep


@torch.no_grad()
def sample(net, z: Tensor, cond: dict, knots: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
    """Ancestral sampling of z [B, L], masks at least where tokens are wanted, through times `knots` and then 0: exactly one network
    call and one fresh() (float64 uniform [B, L]) per knot."""
    times = [*torch.as_tensor(knots).tolist(), 0.0]
    for here, there in zip(times, times[1:]):
        t, s = (torch.full((len(z),), time, dtype=torch.float64, device=z.device) for time in (here, there))
        z = net.process.step(z, net(z, t, cond), t, s, fresh())
    return z
