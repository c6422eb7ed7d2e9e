"""Sampling loops, for training (backward simulation) and for looking (sample). Times `knots` are tensors [k] from noise to data."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from . import losses, sharding
from .process import per_sample


def start(process, noise: Tensor, t: Tensor) -> Tensor:
    """Where every sampler starts: noise at the norm of time t (pure noise even when alpha(t) is a little above 0)."""
    alpha, sigma, _, _ = process.coeffs(t)
    return noise * per_sample(torch.hypot(alpha, sigma), noise)


def expand(time: Tensor | float, x: Tensor) -> Tensor:
    """One time as a tensor [B] on x's device, in float32 or better."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.as_tensor(time, device=x.device).to(dtype).expand(len(x))


@torch.no_grad()
def backward_simulation(net, noise: Tensor, cond: dict, knots: Tensor, depth: int | Tensor, fresh: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The student's own input at knots[depth] (DMD2, Sec. 4.5): from pure noise, `depth` student steps, each re-noised with
    fresh() noise. knots: times [k], or of each sample [k, B]; depth: one number for the batch, or one per sample [B]. Returns
    (x_t, t [B]) without graph; the graded call is the caller's."""
    depth = torch.as_tensor(depth, device=noise.device).expand(len(noise))
    knots = knots.to(noise.device, torch.float64 if noise.dtype == torch.float64 else torch.float32)
    t = expand(knots[0], noise).clone()
    x = start(net.process, noise, t)
    for i in range(len(knots) - 1):
        eps, going = fresh(), depth > i       # the draws do not depend on the depths, which differ between ranks
        called = sharding.called(net, going)
        if called is not None:
            x0 = net(x[called], t[called], {k: v[called] for k, v in cond.items()})
            t[going] = expand(knots[i + 1], noise)[going]
            x[going] = net.process.noise(x0, eps[going], t[going]).to(x)
    return x, t


@torch.no_grad()
def sample(net, noise: Tensor, cond: dict, knots: Tensor, rule: str = "renoise", fresh: Callable[[], Tensor] | None = None,
           uncond: dict | None = None, guidance: float = 1.0, visit: Callable[[Tensor], None] | None = None) -> Tensor:
    """Samples x0 from `noise` [B, ...] by one of three rules between consecutive knots (the last goes to t = 0):

    renoise: x0 = net(x, t); x = alpha x0 + sigma fresh()      consistency and distribution-matching students (LCMScheduler)
    ode:     (x0, eps) = net(x, t); x = alpha x0 + sigma eps   teachers and trajectory students (DDIM, Euler)
    jump:    x = x - (t - r) u(x, t, r)                        two-time students (average velocity)

    visit: called with x before every step.
    """
    process = net.process
    x = start(process, noise, expand(knots[0], noise))
    for i, knot in enumerate(knots):
        t = expand(knot, noise)
        r = expand(knots[i + 1] if i + 1 < len(knots) else 0.0, noise)
        last = i + 1 == len(knots)
        if visit is not None:
            visit(x)
        if rule == "renoise":
            x0 = net(x, t, cond)
            x = x0 if last else process.noise(x0, fresh(), r)
        elif rule == "ode":
            v = losses.guided(net, x, t, cond, uncond, guidance, to="v") if uncond is not None else net(x, t, cond, to="v")
            x0, eps = process.pair(v, x, t, "v")
            x = x0 if last else process.noise(x0, eps, r)
        elif rule == "jump":
            x = x - per_sample(t - r, x) * net(x, t, cond, r=r, to="velocity")
        else:
            raise ValueError(f"unknown sampling rule {rule!r}: use renoise, ode or jump")
    return x
