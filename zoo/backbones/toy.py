"""The toy backbone: a closed-form mixture on a ring as teacher, a tiny MLP fitted to it as the start of every trainable role."""
from __future__ import annotations

from pathlib import Path

import torch

from ..process import RectifiedFlow
from ..toy import ToyNet, ring
from .base import Backbone, Examples, Source


SHIPPED = Path(__file__).parents[1] / "assets/toy/network.safetensors"      # what the default fit ends at, in float16; `ship` makes it
DEFAULT = (8, 600, 128)
_fitted: dict[tuple, dict] = {}      # weights by (modes, steps, width)


class Toy(Backbone):
    """2-D, eight labelled modes, rectified flow. Data: 4096 draws of the mixture. Seconds on a CPU."""

    family, shape, pred, guidance = "toy", (2,), "velocity", 1.0
    last = "out.3"
    lora_targets = r"(mid_block|out)\.(1|3)|inp|time_embedding\.(linear_1|linear_2|cond_proj)"

    def __init__(self, modes: int = 8, fit_steps: int = 600, width: int = 128):
        self.name, self.data, self.process = "toy", "toy", RectifiedFlow()
        self.mixture = ring(modes, process=self.process)
        self.null = modes
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = ToyNet(2, modes, width)
            which = modes, fit_steps, width
            if which == DEFAULT and which not in _fitted and SHIPPED.exists():
                from safetensors.torch import load_file
                _fitted[which] = {k: v.float() for k, v in load_file(SHIPPED).items()}
            if which not in _fitted:
                self._fit(fit_steps)
                _fitted[which] = {k: v.clone() for k, v in self.module.state_dict().items()}
            self.module.load_state_dict(_fitted[which])
        self.module.requires_grad_(False)

    def _fit(self, steps: int):
        """Regress the exact velocity, so that students and critics start near the teacher as they would from its weights."""
        opt = torch.optim.Adam(self.module.parameters(), lr=2e-3)
        for i in range(steps):
            for group in opt.param_groups:
                group["lr"] = 2e-3 * (1 - i / steps)
            x0, label = self.mixture.sample(512, seed=i)
            label = torch.where(torch.rand(512) < 0.15, self.null, label)
            t = torch.rand(512).clamp(1e-3, 1)
            x = self.process.noise(x0, torch.randn(512, 2), t)
            loss = (self.module(x, 1000 * t, label) - self.mixture(x, t, {"label": label}, to="velocity")).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()

    @property
    def teacher(self):
        return self.mixture

    def forward(self, module, x, timestep, cond):
        return module(x, timestep, cond["label"])

    def head_shape(self):
        return self.module.inp.out_features, None

    @property
    def taps(self):
        return ["mid_block.1", "mid_block"]

    def batches(self, images=False):
        x0, label = self.mixture.sample(4096, seed=1)
        def get(index):
            fields = {"cond": {"label": label[index]}, "uncond": {"label": torch.full_like(index, self.null)}}
            return fields | ({"x0": x0[index]} if images else {})
        return Source(len(x0), get)

    def examples(self, n, seeds=1):
        label = torch.arange(n).remainder(self.null).repeat_interleave(seeds)
        return Examples([f"mode {i}" for i in label.tolist()], {"label": label}, {"label": torch.full_like(label, self.null)})

    def decode(self, x):
        """Points [B, 2] as 32x32 grey images of a dot on [-3, 3]^2."""
        grid = torch.linspace(-3, 3, 32, device=x.device)
        d = (grid[None, None, :] - x[:, 0, None, None]) ** 2 + (grid[None, :, None] - x[:, 1, None, None]) ** 2
        return 2 * (-d / 0.05).exp()[:, None] - 1


def ship():
    """Fit the default network anew, which takes seconds, and write SHIPPED."""
    from safetensors.torch import save_file
    SHIPPED.unlink(missing_ok=True)
    _fitted.pop(DEFAULT, None)
    SHIPPED.parent.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in Toy().module.state_dict().items()}, SHIPPED)
