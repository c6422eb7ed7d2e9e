"""Sampling of masked language students by their contract: no stock pipeline of transformers unmasks."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import tokens
from ..denoiser import Denoiser
from ..errors import UserError
from ..hub.contract import Contract


@dataclass
class Texts:
    """texts: strings; tokens [n, L]."""
    texts: list[str]
    tokens: Tensor


class UnmaskPipeline:
    """`pipe(prompt="", num_inference_steps=8, num_samples=4, generator=...)` over a masked language model: one network call a step.

    model: a token Backbone opened on the student. Step counts outside the contract were not trained for; the first of them warns."""

    def __init__(self, model, contract: Contract):
        self.model, self.contract = model, contract
        self.net = Denoiser(model.module, model.process, model.pred, model.forward)
        self._warned = False

    @torch.no_grad()
    def __call__(self, prompt: str = "", *, num_inference_steps: int | None = None, num_samples: int = 1,
                 generator: torch.Generator | None = None) -> Texts:
        """num_samples texts of the student's length that begin with `prompt`. The random numbers are drawn on the generator's device."""
        steps = max(self.contract.knots) if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise UserError(f"num_inference_steps={steps}: give at least 1")
        if steps in self.contract.knots:
            times = self.contract.times(steps, self.model.process)
        else:
            if not self._warned:
                warnings.warn(f"this student was trained for {', '.join(map(str, self.contract.steps))} steps, not {steps}", stacklevel=2)
                self._warned = True
            times = 1 - torch.arange(steps, dtype=torch.float64) / steps
        (length,), device = self.model.shape, next(self.model.module.parameters()).device
        z = self.model.process.prior(num_samples, length, device)
        start = self.model.encode(prompt) if prompt else []
        if len(start) >= length:
            raise UserError(f"the prompt has {len(start)} tokens and the student writes {length}: give a shorter one")
        z[:, : len(start)] = torch.as_tensor(start, dtype=z.dtype, device=device)
        where = generator.device if generator is not None else "cpu"
        fresh = lambda: torch.rand(num_samples, length, generator=generator, dtype=torch.float64, device=where).to(device)
        x = tokens.sample(self.net, z, {}, times, fresh)
        return Texts(self.model.decode(x), x)

    def to(self, device) -> "UnmaskPipeline":
        self.model.to(device)
        return self


def open_student(folder: Path, contract: Contract, record: dict) -> UnmaskPipeline:
    """The exported student at `folder`, of family "text" or "toy-text"."""
    from ..backbones.text import Text, ToyText
    if record["family"] == "text":
        return UnmaskPipeline(Text(str(folder), name=str(folder), length=record["length"]), contract)
    from safetensors.torch import load_file

    from ..toy_tokens import Chain
    state = load_file(folder / "toy-text.safetensors")
    _, length, symbols = state["logits"].shape
    k = symbols - 1
    model = ToyText(Chain(torch.full((k,), 1 / k), torch.full((k, k), 1 / k), length))
    model.module.load_state_dict(state)
    return UnmaskPipeline(model, contract)
