"""What a head on the output layer makes lies where the network's own output does; both files of families ask it of theirs."""
from __future__ import annotations

import torch
from torch import nn


class Twice(nn.Module):
    """The network's own output layer, and twice that behind it: on channels [B, C, ...] and on tokens [B, N, width] alike."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.width, self.axis = [layer], width, 1 if isinstance(layer, nn.Conv2d) else 2

    def forward(self, features):
        out = self.layer[0](features)
        return torch.cat([out, 2 * out], self.axis)


def cells(x: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """[B, C, *space] -> [B, values of a patch, patches]."""
    patch = (1,) * (x.ndim - 2 - len(patch)) + tuple(patch)
    x = x.reshape(*x.shape[:2], *(n for size, p in zip(x.shape[2:], patch) for n in (size // p, p)))
    within, grid = range(3, x.ndim, 2), range(2, x.ndim, 2)
    return x.permute(0, 1, *within, *grid).flatten(1, 1 + len(patch)).flatten(2)


def check(model, cond: dict) -> None:
    """The student with such a head starts as the teacher, and each place of the head's maps holds the values of the output at that place."""
    net = model.make("student", head=Twice)
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.35])
    with torch.no_grad():
        out, made = net(x, t, cond, to=model.pred, logits=True)
        assert torch.equal(out, model.teacher(x, t, cond, to=model.pred))
        raw = model.forward(net.module, x, model.process.timestep(t), cond)
    n = made.shape[1] // 2                               # two where the layer predicts a variance besides
    assert made.shape == (2, 2 * n, *x.shape[1:])
    torch.testing.assert_close(made[:, n:], 2 * made[:, :n])
    theirs, mine = (cells(v.abs(), model.patch) for v in (raw, made[:, :n].flatten(1, 2)))          # Z-Image returns minus what its layer makes
    apart = lambda a: (a[:, :, None] - mine[:, None]).abs().min(2).values.max()
    assert apart(theirs) == 0
    assert apart(theirs.roll(1, 2)) > 1e-2               # another place has other values, or the test would prove nothing
