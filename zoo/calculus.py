"""Total derivatives along a direction, always detached, and the step of those taken as differences."""
from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FINE = 2e-4              # float32: within 2 % of forward mode on trained teachers (benchmarks/leaderboard/steps.py)
STIFF = 1.5


@contextmanager
def full_precision(device_type: str):
    """float32 as float32: neither autocast nor TF32, under which a difference of nearby values is noise."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [s.allow_tf32 for s in settings]
    try:
        for s in settings:
            s.allow_tf32 = False
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for s, value in zip(settings, before):
            s.allow_tf32 = value


def total_derivative(fn, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], how: str = "jvp", h: float = FINE,
                     value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(fn(*primals), d/ds fn(*(primals + s tangents)) at s = 0), both without graph.

    how="jvp": exact forward-mode derivative (math attention is forced: fused kernels have none, on any device).
    how="fd": central difference of step `h` in s, for networks without forward mode; see `time_step`.
    value: fn(*primals) where it is there already, in full precision: a difference then takes two calls and not three.

    Mixed precision is off inside (`full_precision`), and forward mode has no autocast."""
    with torch.no_grad(), full_precision(primals[0].device.type):
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(fn, primals, tangents)
        if how == "fd":
            ahead = fn(*(p + h * d for p, d in zip(primals, tangents)))
            behind = fn(*(p - h * d for p, d in zip(primals, tangents)))
            return fn(*primals) if value is None else value.detach(), (ahead - behind) / (2 * h)
    raise ValueError(f"unknown derivative {how!r}: use 'jvp' or 'fd'")


def derivative(fn, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], how: str = "jvp", h: float = FINE) -> Tensor:
    """The second of `total_derivative` alone: two calls of a difference."""
    return total_derivative(fn, primals, tangents, how, h, value=primals[0])[1]


@torch.no_grad()
def along_the_flow(net, flow, cond: dict[str, Tensor], shape: tuple[int, ...]) -> list[tuple]:
    """Where a teacher read under `flow` is looked at: for five times (its velocity as a function of x, t; a state (x, t); the direction (dx/dt, 1)
    of its flow there), as `derivative` takes them. States are re-noised from what it sees in pure noise, one per condition [B, ...]. Deterministic."""
    n, device = len(next(iter(cond.values()))) if cond else 1, next(iter(cond.values())).device if cond else net_device(net)
    g = torch.Generator().manual_seed(11)
    draw = lambda: torch.randn(n, *shape, generator=g).to(device)
    velocity = lambda x, t: net(x, t, cond, to="velocity")
    states = []
    with full_precision(device.type):
        at = lambda share: torch.full((n,), share * flow.t_max, device=device)
        guess = net(draw(), at(1.0), cond)                          # near the mean of the data
        for share in torch.linspace(0.1, 0.9, 5).tolist():
            t = at(share)
            x = flow.noise(guess, draw(), t)
            states.append((velocity, (x, t), (velocity(x, t), torch.ones_like(t))))
    return states


@torch.no_grad()
def stiffness(net, flow, cond: dict[str, Tensor], shape: tuple[int, ...], coarse: float, fine: float = FINE) -> float:
    """How fast `net`, a teacher read under `flow`, changes with time: the size of its velocity's derivative along the flow at step `fine` over that
    at step `coarse`, root mean square over the conditions [B, ...], geometric mean over five times; 1 for a network that is smooth in time.
    Ripples of the embedding of 1000 t, and rounding of networks kept in few bits, make it larger. 26 calls of B samples."""
    logs = []
    for state in along_the_flow(net, flow, cond, shape):
        small, large = (derivative(*state, "fd", h).double().norm().clamp(min=1e-30) for h in (fine, coarse))
        logs.append(torch.log(small / large))
    return torch.stack(logs).mean().exp().item()


def net_device(net) -> torch.device:
    while not hasattr(net, "module"):
        net = net.net
    return next(net.module.parameters()).device


def time_step(run, flow, given: float, coarse: float, fine: float = FINE) -> float:
    """Step in t of the differences a method takes under `flow`, chosen for the Run's teacher: `given` where positive; else `fine`, or `coarse`
    for a teacher whose velocity is stiff in time (`stiffness` above 1.5). A difference of step h is the derivative's average over h.
    Following the ripples of a stiff network exactly distils worse than averaging over them; where there are none, averaging biases
    tangents that nearly cancel (both measured: benchmarks/leaderboard/README.md)."""
    from .denoiser import CALLS
    from .process import view
    if given > 0 or run.cfg.dry_run:
        return given
    model = run.model
    with CALLS.paused():
        ratio = stiffness(view(model.teacher, flow), flow, model.examples(2).cond, model.shape, coarse, fine)
    step = coarse if ratio > STIFF else fine
    if run.rank == 0:
        print(f"derivative in time: step {step:g} (the teacher's stiffness is {ratio:.2f}; --h sets it)", file=sys.stderr)
    return step
