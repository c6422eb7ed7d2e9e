"""Closed-form worlds for token processes: the exact denoiser of Markov chains, the exact law of a few-step sampler, and a student
that is a table with a row for every state."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .denoiser import CALLS
from .tokens import Masked


class Chain:
    """Exact `Net` of x_1 ~ start, x_{l+1} ~ transition[x_l] over symbols 0 .. K-1 (the mask is K), and its exact likelihood.

    With the identity as transition all tokens are equal ("copy" data). start [K], transition [K, K], rows sum to 1."""

    def __init__(self, start: Tensor, transition: Tensor, length: int):
        self.start, self.transition = (torch.as_tensor(p, dtype=torch.float64) for p in (start, transition))
        self.symbols, self.length = len(self.start), length
        self.process = Masked(self.symbols)

    def posterior(self, z: Tensor) -> Tensor:
        """p(x_l | the other visible tokens) [B, L, K] by messages from both sides; uniform where these contradict one another."""
        start, step = self.start.to(z.device), self.transition.to(z.device)
        evidence = torch.cat([torch.eye(self.symbols, dtype=torch.float64), torch.ones(1, self.symbols, dtype=torch.float64)]).to(z.device)[z]
        unit = lambda p: p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        left, right = [start.expand(len(z), -1)], [torch.ones_like(evidence[:, 0])]
        for l in range(1, z.shape[1]):
            left.append(unit((left[-1] * evidence[:, l - 1]) @ step))
            right.append(unit((right[-1] * evidence[:, -l]) @ step.T))
        p = torch.stack(left, 1) * torch.stack(right[::-1], 1)
        total = p.sum(-1, keepdim=True)
        return torch.where(total > 0, p / total, 1 / self.symbols)

    def __call__(self, z, t=None, cond=None, *, r=None, to="x0", logits=False):
        if r is not None or logits:
            raise ValueError("a closed-form token teacher has no second time and no GAN head")
        p = F.pad(self.posterior(z), (0, 1))
        return CALLS.add(self.process.convert(p.clamp(min=1e-300).log(), z, t, "logits", to))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [B] in nats; impossible sequences count 1e-300 per impossible symbol."""
        log = lambda p: p.clamp(min=1e-300).log().to(x.device)
        return log(self.start)[x[:, 0]] + log(self.transition)[x[:, :-1], x[:, 1:]].sum(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n sequences [n, L]."""
        g = torch.Generator().manual_seed(seed)
        x = [torch.multinomial(self.start, n, replacement=True, generator=g)]
        for _ in range(self.length - 1):
            x.append(torch.multinomial(self.transition[x[-1]], 1, generator=g)[:, 0])
        return torch.stack(x, 1)

    def law(self) -> Tensor:
        """Probabilities [K^L] of all sequences, in the order of `states`."""
        return self.log_prob(states(self.symbols, self.length)).exp()


def copy(weights, length: int = 2) -> Chain:
    """All tokens equal; the symbol drawn from `weights`."""
    return Chain(weights, torch.eye(len(weights)), length)


def states(symbols: int, length: int) -> Tensor:
    """All sequences [symbols^length, length], the last position running fastest."""
    return torch.cartesian_prod(*[torch.arange(symbols)] * length).reshape(-1, length)


@torch.no_grad()
def sampler_law(net, knots, symbols: int, length: int) -> Tensor:
    """Exact probabilities [K^L] of what `tokens.sample` draws from all masks through `knots`: no Monte Carlo."""
    process, z = net.process, states(symbols + 1, length)
    mass = (z == process.mask_id).all(1).double()
    times = [*torch.as_tensor(knots).tolist(), 0.0]
    for here, there in zip(times, times[1:]):
        t, s = (torch.full((len(z),), time, dtype=torch.float64) for time in (here, there))
        p = net(z, t, {}).double().exp()
        stay = process.remains(t, s)[:, None, None] * (z == process.mask_id)[..., None]
        move = (1 - stay) * p + stay * F.one_hot(z, symbols + 1)
        joint = mass[:, None]
        for l in range(length):
            joint = (joint[..., None] * move[:, l, None]).flatten(1)
        mass = joint.sum(0)
    return mass.reshape([symbols + 1] * length)[(slice(symbols),) * length].flatten()


def divergences(p: Tensor, q: Tensor) -> dict[str, float]:
    """Total variation, KL(p || q), KL(q || p) and entropies (nats) of a sampler's law p and the truth q."""
    kl = lambda a, b: (a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log()).sum().item()
    return {"tv": 0.5 * (p - q).abs().sum().item(), "reverse_kl": kl(p, q), "forward_kl": kl(q, p),
            "entropy": -kl(p, torch.ones_like(p)), "entropy_of_truth": -kl(q, torch.ones_like(q))}


class Table(nn.Module):
    """Free logits for every state and position: the student that can represent anything. z [B, L] -> [B, L, K + 1]."""

    def __init__(self, symbols: int, length: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros((symbols + 1) ** length, length, symbols + 1))
        self.register_buffer("radix", (symbols + 1) ** torch.arange(length - 1, -1, -1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits[(z * self.radix).sum(1)]
