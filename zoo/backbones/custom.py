"""Your own network as a teacher, in a few lines: any torch module and any data set of tensors."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..process import Pred, Process, RectifiedFlow
from .base import Backbone, Examples, Source


class Custom(Backbone):
    """A module called as network(x [B, *shape], timestep [B], **cond) whose output is a `pred` on `process`.

    data: dict of tensors [N, ...], one per keyword of the network, and `x0` [N, *shape] for methods that need data;
    uncond: the same keywords for one unconditional item, [1, ...] (needed when guidance is not 1).
    tap, features: name of the submodule whose output feeds a GAN head, and its (channels, side; None for vectors).
    The student is exported as safetensors beside fewstep.json, to be loaded into the same module class."""

    family = "custom"
    lora_targets = r".*"
    last = None

    def __init__(self, network: nn.Module, data: dict[str, Tensor], *, shape: tuple[int, ...], process: Process | None = None,
                 pred: Pred = "velocity", uncond: dict[str, Tensor] | None = None, guidance: float = 1.0, name: str = "custom",
                 tap: str = "", features: tuple[int, int | None] | None = None):
        self.module = network.requires_grad_(False).eval()
        self.table, self.shape, self.process, self.pred = data, tuple(shape), process or RectifiedFlow(), pred
        self.nothing, self.guidance, self.name, self.data = uncond, guidance, name, name
        self.tap, self.features = tap, features
        self.takes_guidance = uncond is not None
        if guidance != 1 and uncond is None:
            raise UserError("a guided teacher needs `uncond`: the network's keywords for one unconditional item, [1, ...]")
        if uncond is not None and set(uncond) != set(data) - {"x0"}:         # both halves run as one batch
            raise UserError(f"`uncond` has the keywords {', '.join(sorted(uncond)) or 'none'}, and `data` "
                            f"{', '.join(sorted(set(data) - {'x0'})) or 'none'} (x0 aside): give the same ones")
        if len({len(v) for v in data.values()}) != 1:
            raise UserError(f"the tensors of `data` are of different lengths ({', '.join(f'{k}: {len(v)}' for k, v in data.items())}): "
                            "one row per item in each")

    def forward(self, module, x, timestep, cond):
        return module(x, timestep, **cond)

    def head_shape(self):
        if self.features is None:
            raise UserError("a GAN head on a custom network needs tap=SUBMODULE and features=(channels, side)")
        return self.features

    def _conditions(self, index: Tensor) -> dict:
        cond = {k: v[index] for k, v in self.table.items() if k != "x0"}
        uncond = cond if self.nothing is None else {k: v.expand(len(index), *v.shape[1:]) for k, v in self.nothing.items()}
        return {"cond": cond, "uncond": uncond}

    def batches(self, images=False):
        return Source(len(next(iter(self.table.values()))),
                      lambda index: self._conditions(index) | ({"x0": self.table["x0"][index]} if images else {}))

    def examples(self, n, seeds=1):
        index = torch.arange(n).remainder(len(next(iter(self.table.values())))).repeat_interleave(seeds)
        return Examples([f"item {i}" for i in index.tolist()], *self._conditions(index).values())

    def decode(self, x):
        """Samples with 1 or 3 channels as they are; anything else as a grey strip of its first values."""
        if x.ndim == 4 and x.shape[1] in (1, 3):
            return x.clamp(-1, 1)
        return x.flatten(1)[:, None, None, :].clamp(-1, 1)
