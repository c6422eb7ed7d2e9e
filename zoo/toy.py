"""Closed-form worlds: the exact score, flow map and guidance of Gaussian mixtures on any Gaussian path, and a tiny network.

x_t of component k is N(alpha mu_k, alpha^2 S_k + sigma^2); every formula below follows from that."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .denoiser import CALLS
from .process import Process, RectifiedFlow, per_sample


class Mixture:
    """Exact `Net` of the mixture sum_k pi_k N(mu_k, s_k^2 I), optionally conditional: cond["label"] [B] picks component
    `label` alone and label K (the null class) the whole mixture.

    means [K, D], stds [K], weights [K]."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None, process: Process | None = None):
        self.means, self.stds = means.double(), stds.double()
        self.weights = torch.full((len(means),), 1 / len(means)).double() if weights is None else weights.double()
        self.process = process or RectifiedFlow()
        self.classes = len(means)

    def denoise(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], shape of x."""
        alpha, sigma, _, _ = (c.double()[:, None] for c in self.process.coeffs(t))
        means, var = self.means.to(x.device), self.stds.to(x.device) ** 2
        x64 = x.double()
        total = alpha**2 * var + sigma**2                                        # [B, K]
        diff = x64[:, None] - alpha[..., None] * means                           # [B, K, D]
        logp = self.weights.to(x.device).log() - 0.5 * (diff**2).sum(-1) / total - 0.5 * x.shape[1] * total.log()
        if label is not None:
            only = torch.nn.functional.one_hot(label, self.classes + 1)[:, :-1].bool()
            logp = torch.where(only | (label == self.classes)[:, None], logp, -math.inf)
        gamma = logp.softmax(1)
        each = means + (alpha * var / total)[..., None] * diff
        return (gamma[..., None] * each).sum(1)

    def __call__(self, x, t, cond=None, *, r=None, to="x0", logits=False):
        if logits:
            raise ValueError("a closed-form teacher has no GAN head")
        return CALLS.add(self._read(x, t, cond, r, to))      # it stands for a network: a toy run costs what a real one does

    def _read(self, x, t, cond, r, to):
        if r is not None:
            out = self.average_velocity(x, t, r)
            return out if to == "velocity" else self.process.convert(out, x, t, "velocity", to)
        x64, t64 = x.double(), t.double()
        x0 = self.denoise(x64, t64, (cond or {}).get("label"))
        if to == "x0":
            return x0.to(x)
        alpha, sigma, _, _ = (per_sample(c, x64) for c in self.process.coeffs(t64))
        eps = (x64 - alpha * x0) / sigma
        return self.process.read(x0, eps, t64, to).to(x)

    def sample(self, n: int, seed: int = 0, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n points [n, D] (float32) and their component labels [n]."""
        g = torch.Generator().manual_seed(seed)
        label = torch.multinomial(self.weights, n, replacement=True, generator=g) if label is None else label
        noise = torch.randn(n, self.means.shape[1], generator=g, dtype=torch.float64)
        return (self.means[label] + self.stds[label, None] * noise).float(), label


class Gaussian(Mixture):
    """N(mean, std^2 I) with its exact flow map."""

    def __init__(self, mean: float | Tensor, std: float | Tensor, dim: int = 1, process: Process | None = None):
        mean = torch.as_tensor(mean, dtype=torch.float64).expand(dim)[None]
        super().__init__(mean, torch.as_tensor([std], dtype=torch.float64).reshape(1), process=process)

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X(x_t, t -> r) = alpha_r m + sqrt(var_r / var_t) (x - alpha_t m), var = alpha^2 S + sigma^2."""
        (at, st, _, _), (ar, sr, _, _) = ([per_sample(c, x) for c in self.process.coeffs(s)] for s in (t, r))
        m, var = self.means[0].to(x), (self.stds[0] ** 2).to(x)
        return ar * m + ((ar**2 * var + sr**2) / (at**2 * var + st**2)).sqrt() * (x - at * m)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u = (x - X(x, t -> r)) / (t - r)."""
        gap = per_sample(t - r, x)
        return (x - self.flow_map(x, t, r)) / gap


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.15, process: Process | None = None) -> Mixture:
    """`modes` Gaussians on a circle, one class each: the 2-D toy teacher."""
    angle = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), torch.full((modes,), std), process=process)


class ToyNet(nn.Module):
    """MLP (x [B, D], timestep [B], label [B]) -> [B, D] with Fourier time features and a diffusers-style time embedding."""

    def __init__(self, dim: int = 2, classes: int = 8, width: int = 128):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding
        self.register_buffer("freq", 2.0 ** torch.arange(0, 5) * math.pi / 4, persistent=False)
        self.time_embedding = TimestepEmbedding(11, width)
        self.label = nn.Embedding(classes + 1, width)
        self.inp = nn.Linear(dim, width)
        self.mid_block = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x, timestep, label):
        t = (timestep / 1000)[:, None].to(x)
        fourier = torch.cat([t, (t * self.freq).sin(), (t * self.freq).cos()], 1)
        h = self.inp(x) + self.time_embedding(fourier) + self.label(label)
        return self.out(h + self.mid_block(h))


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Mean 1-Wasserstein distance between projections of two equally large point sets [n, D]."""
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(x.shape[1], projections, generator=g, dtype=torch.float64)
    d = d / d.norm(dim=0)
    return ((x.double().cpu() @ d).sort(0).values - (y.double().cpu() @ d).sort(0).values).abs().mean().item()
