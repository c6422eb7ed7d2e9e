"""Measuring generated token sequences [N, L] against reference ones. Low-entropy text flatters every likelihood: read the bits of a
judge beside the entropy, and rank by `ngram_js`, which a collapsed sampler cannot win."""
from __future__ import annotations

import math
import re

import torch
from torch import Tensor


def _codes(x: Tensor, n: int, base: int) -> Tensor:
    """Every n-gram of the rows of x [N, L] as one integer, [N, L - n + 1]."""
    return (x.unfold(1, n, 1) * base ** torch.arange(n - 1, -1, -1, device=x.device)).sum(-1)


class NGram:
    """A character or token n-gram model, interpolated by Witten-Bell: p_n(v | c) = (count(c v) + types(c) p_{n-1}(v | c')) /
    (count(c) + types(c)), p_0 uniform over `symbols`. Properly normalised; the first tokens of a window use the context there is.

    tokens [T]: the running text; order is lowered until an n-gram fits into 62 bits."""

    def __init__(self, tokens: Tensor, symbols: int, order: int = 5):
        self.symbols, self.order = symbols, max(1, min(order, int(62 / math.log2(symbols))))
        self.tables = []
        for n in range(1, self.order + 1):
            grams, counts = _codes(tokens[None], n, symbols)[0].unique(return_counts=True)
            contexts, types = (grams // symbols).unique(return_counts=True)
            totals = torch.zeros(len(contexts), dtype=torch.long).index_add_(0, torch.searchsorted(contexts, grams // symbols), counts)
            self.tables.append((grams, counts, contexts, types, totals))

    @staticmethod
    def _look(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == wanted, values[at], 0).double()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [N] in nats of windows x [N, L]."""
        x = x.cpu()
        p = torch.full(x.shape, 1 / self.symbols, dtype=torch.float64)
        for n, (grams, counts, contexts, types, totals) in enumerate(self.tables[: x.shape[1]], 1):
            code = _codes(x, n, self.symbols)
            kinds = self._look(contexts, types, code // self.symbols)
            seen = self._look(contexts, totals, code // self.symbols) + kinds
            higher = (self._look(grams, counts, code) + kinds * p[:, n - 1:]) / seen.clamp(min=1)
            p[:, n - 1:] = torch.where(seen > 0, higher, p[:, n - 1:])
        return p.log().sum(1)


def entropy(x: Tensor) -> float:
    """Mean over samples of the entropy of a sample's own symbols, bits."""
    share = (x[:, :, None] == x[:, None]).double().mean(2)      # of each token's symbol, [N, L]
    return -share.log2().mean().item()


def ngram_js(x: Tensor, y: Tensor, symbols: int, n: int = 3) -> float:
    """Jensen-Shannon divergence, bits, of the n-grams of two sets of sequences, pooled. Finite samples are apart by chance:
    compare sets of equal size, beside a row of real data."""
    n = max(1, min(n, int(62 / math.log2(symbols))))
    a, b = _codes(x.cpu(), n, symbols).flatten(), _codes(y.cpu(), n, symbols).flatten()
    _, where = torch.cat([a, b]).unique(return_inverse=True)
    p, q = (torch.bincount(part, minlength=int(where.max()) + 1).double() / len(part) for part in (where[: len(a)], where[len(a):]))
    h = lambda r: -(r[r > 0] * r[r > 0].log2()).sum()
    return (h((p + q) / 2) - (h(p) + h(q)) / 2).item()


def distinct(x: Tensor, symbols: int, n: int = 4) -> float:
    """Share of all n-grams of the set that are different from one another."""
    codes = _codes(x.cpu(), min(n, x.shape[1], max(1, int(62 / math.log2(symbols)))), symbols).flatten()
    return len(codes.unique()) / len(codes)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def known_words(texts: list[str], lexicon: set[str]) -> float:
    """Share of generated words that are in `lexicon`, without the first and last of each text, which may be cut; nan if none is left."""
    found = [w for text in texts for w in words(text)[1:-1]]
    return sum(w in lexicon for w in found) / len(found) if found else math.nan
