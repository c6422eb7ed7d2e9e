"""Gaussian processes x_t = alpha(t) x0 + sigma(t) eps, and the one conversion between every reading of a network.

A reading is `a x0 + b eps`; with x_t = alpha x0 + sigma eps this is a 2x2 system, solved once in `Process.convert`:
    x0: (1, 0)   eps: (0, 1)   v: (-sigma, alpha)   velocity dx/dt: (alpha', sigma')   score: (0, -1/sigma)   flow: (-1, 1)
"""
from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Pred = Literal["x0", "eps", "v", "velocity", "score", "flow"]


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """Reshape `t` [B] so that it broadcasts over `x` [B, ...]. The only place that knows the layout."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Process:
    """A Gaussian path. Subclasses give `angle(t)` = atan2(sigma, alpha), its inverse, and `coeffs`.

    t_max is the time of pure noise (or the noisiest time); t = 0 is clean. Times are float tensors [B]."""

    t_max: float = 1.0

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, d alpha/dt, d sigma/dt, each of the shape of t."""
        raise NotImplementedError

    def angle(self, t: Tensor) -> Tensor:
        alpha, sigma, _, _ = self.coeffs(t)
        return torch.atan2(sigma, alpha)

    def time(self, angle: Tensor) -> Tensor:
        """Inverse of `angle`."""
        raise NotImplementedError

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        alpha, sigma, _, _ = (per_sample(c, x0) for c in self.coeffs(t))
        return alpha * x0 + sigma * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt for a fixed pair (x0, eps)."""
        _, _, dalpha, dsigma = (per_sample(c, x0) for c in self.coeffs(t))
        return dalpha * x0 + dsigma * eps

    def _reading(self, pred: Pred, t: Tensor, x: Tensor):
        alpha, sigma, dalpha, dsigma = (per_sample(c, x) for c in self.coeffs(t))
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        match pred:
            case "x0": a, b = one, zero
            case "eps": a, b = zero, one
            case "v": a, b = -sigma, alpha
            case "velocity": a, b = dalpha, dsigma
            case "score": a, b = zero, -1 / sigma
            case "flow": a, b = -one, one             # what a flow network returns, however its times are counted
            case _: raise ValueError(f"unknown prediction {pred!r}: use x0, eps, v, velocity, score or flow")
        return alpha, sigma, a, b

    def pair(self, out: Tensor, x: Tensor, t: Tensor, src: Pred) -> tuple[Tensor, Tensor]:
        """(x0, eps) implied by reading `out` of kind `src` at x_t = `x`."""
        alpha, sigma, a, b = self._reading(src, t, x)
        det = alpha * b - sigma * a
        return (b * x - sigma * out) / det, (alpha * out - a * x) / det

    def convert(self, out: Tensor, x: Tensor, t: Tensor, src: Pred, dst: Pred) -> Tensor:
        """Read a network output of kind `src` as `dst`. Exact where the 2x2 determinant is not zero
        (eps at sigma -> 1, x0 at sigma -> 0 and score at sigma = 0 are singular: keep samplers off those ends)."""
        return out if src == dst else self.read(*self.pair(out, x, t, src), t, dst)

    def read(self, x0: Tensor, eps: Tensor, t: Tensor, dst: Pred) -> Tensor:
        """The reading `dst` of a pair (x0, eps)."""
        if dst in ("x0", "eps"):
            return x0 if dst == "x0" else eps
        _, _, a, b = self._reading(dst, t, x0)
        return a * x0 + b * eps

    def step(self, x0: Tensor, eps: Tensor, r: Tensor) -> Tensor:
        """Deterministic (DDIM / Euler) move to time r along fixed (x0, eps)."""
        return self.noise(x0, eps, r)

    def timestep(self, t: Tensor) -> Tensor:
        """The number stock diffusers schedulers and networks of this process use for time t."""
        return 1000 * t

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return timestep / 1000


class RectifiedFlow(Process):
    """alpha = 1 - t, sigma = t; velocity = eps - x0 (Liu et al. 2022, Lipman et al. 2022).

    shift k: the same path with its times counted so that sigma = k t / (1 + (k - 1) t) (times.shifted): uniform draws and evenly spaced
    times of any method then lie where the stock schedulers' shift puts them."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def coeffs(self, t):
        one = torch.ones_like(t)
        if self.shift == 1:
            return 1 - t, t, -one, one
        d = 1 + (self.shift - 1) * t
        sigma, rate = self.shift * t / d, self.shift / d**2
        return 1 - sigma, sigma, -rate, rate

    def time(self, angle):
        s, c = angle.sin(), angle.cos()
        return self._unshifted(s / (s + c))

    def _unshifted(self, sigma):
        return sigma if self.shift == 1 else sigma / (self.shift - (self.shift - 1) * sigma)

    def timestep(self, t):
        return 1000 * self.coeffs(t)[1]

    def from_timestep(self, timestep):
        return self._unshifted(timestep / 1000)


class TrigFlow(Process):
    """alpha = cos t, sigma = s sin t, t in [0, pi/2], s = sigma_data (Lu & Song 2024); at s = 1 its velocity is its v."""

    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = sigma_data

    def coeffs(self, t):
        s = self.sigma_data
        return t.cos(), s * t.sin(), -t.sin(), s * t.cos()

    def time(self, angle):
        return angle if self.sigma_data == 1 else torch.atan2(angle.sin(), self.sigma_data * angle.cos())


class EDM(Process):
    """alpha = 1, sigma = t (Karras et al. 2022)."""

    t_max = 80.0

    def coeffs(self, t):
        one = torch.ones_like(t)
        return one, t, torch.zeros_like(t), one

    def time(self, angle):
        return angle.tan()

    def timestep(self, t):
        return 0.25 * t.log()

    def from_timestep(self, timestep):
        return (4 * timestep).exp()


class VP(Process):
    """Variance-preserving path given by a table of alpha_bar (DDPM, Stable Diffusion).

    Stock timestep k in 0..T-1 is time t = (k+1)/T, so 999, 749, 499, 249 are t = 1, .75, .5, .25 and t = 0 is exactly clean.
    Between table points the angle atan2(sigma, alpha) is interpolated linearly, so alpha^2 + sigma^2 = 1 always holds."""

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.double().cpu()
        angles = torch.atan2((1 - abar).clamp(min=0).sqrt(), abar.clamp(min=0).sqrt())
        self.angles = torch.cat([torch.zeros(1, dtype=torch.float64), angles])
        self.steps = len(abar)
        self._cache: dict = {}

    @classmethod
    def from_config(cls, config: dict) -> "VP":
        """From the config of any stock VP scheduler (betas, schedule name, zero-terminal-SNR flag)."""
        from diffusers import DDIMScheduler

        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        return cls(DDIMScheduler(**{k: config[k] for k in keys if k in config}).alphas_cumprod)

    def _table(self, device):
        if device not in self._cache:
            self._cache[device] = self.angles.to(device)
        return self._cache[device]

    def _segment(self, t):
        table = self._table(t.device)
        u = t.double() * self.steps
        # A float32 time such as 0.249 sits within rounding of its table point: floor the nudged value, keep u itself.
        i = (u.detach() + 1e-4).floor().long().clamp(0, self.steps - 1)
        lo, hi = table[i], table[i + 1]
        return lo + (hi - lo) * (u - i), (hi - lo) * self.steps

    def coeffs(self, t):
        phi, dphi = self._segment(t)
        c, s = phi.cos(), phi.sin()
        return c.to(t), s.to(t), (-s * dphi).to(t), (c * dphi).to(t)

    def angle(self, t):
        return self._segment(t)[0].to(t)

    def time(self, angle):
        table = self._table(angle.device)
        a = angle.double()
        i = (torch.searchsorted(table, a.detach().contiguous(), right=True) - 1).clamp(0, self.steps - 1)
        return ((i + (a - table[i]) / (table[i + 1] - table[i])) / self.steps).to(angle)

    def timestep(self, t):
        return self.steps * t - 1

    def from_timestep(self, timestep):
        return (timestep + 1) / self.steps


class View:
    """The same network read under another Gaussian path: match the SNR, rescale the input, re-read the output. Exact.

    x_t of the new path with angle phi is the old path's x at the time of equal angle, up to the norm sqrt(alpha^2 + sigma^2).
    A second time r is mapped the same way, its sign kept (a negative one can name a second branch of the network); the two-time
    output is read linearly with the coefficients at t."""

    def __init__(self, net, process: Process):
        self.net, self.process = net, process

    def __call__(self, x, t, cond, *, r=None, to: Pred = "x0", logits=False):
        old, new = self.net.process, self.process
        t_old = old.time(new.angle(t))
        r_old = None if r is None else r.sign() * old.time(new.angle(r.abs()))
        norm = [torch.hypot(*p.coeffs(s)[:2]) for p, s in ((old, t_old), (new, t))]
        x_old = x * per_sample(norm[0] / norm[1], x)
        out = self.net(x_old, t_old, cond, r=r_old, to="v", logits=logits)
        out, score = out if logits else (out, None)
        # v and x have determinant alpha^2 + sigma^2 > 0 on every path, so (x0, eps) are finite at both ends.
        x0, eps = old.pair(out, x_old, t_old, "v")
        out = new.read(x0, eps, t, to)
        return (out, score) if logits else out

    def reading(self, weights):
        """The view of `net.reading(weights)` (see `Denoiser.reading`)."""
        return View(self.net.reading(weights), self.process)

    def __getattr__(self, name):
        if name in ("net", "process"):
            raise AttributeError(name)
        return getattr(self.net, name)


def view(net, process: Process):
    """Read `net` under `process` (see `View`); the net itself when it already is."""
    return net if net.process is process else View(net, process)
