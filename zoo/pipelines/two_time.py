"""Sampling of networks with an extra scalar input (second time or guidance) that no stock pipeline feeds, and of toy students."""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from .. import process as processes
from .. import rollout
from ..denoiser import Denoiser
from ..errors import UserError
from ..hub.contract import Contract
from ..process import view


@dataclass
class Images:
    """images: PIL list, or tensor [B, C, H, W] in [0, 1] for output_type "pt"; for the toy, points [B, 2]."""
    images: list | Tensor


class SlotPipeline:
    """`pipe(prompt or class_labels, num_inference_steps=..., generator=...)` over a network with its extra input.

    model: the Backbone opened on the student's folder; net: its Denoiser, slot included; process: name of the one it was trained in.
    rule "jump" goes through evenly spaced times of that process, and any number of steps is meaningful; those outside the contract
    were not measured, and the first of them warns. The other rules follow the contract's knots, or for another number of steps, with a
    warning, times spaced as they are; a second time stays at 0."""

    def __init__(self, model, net: Denoiser, contract: Contract, process: str, rule: str):
        self.model, self.net, self.contract, self.rule = model, net, contract, rule
        kind = getattr(processes, process, None)
        if not (isinstance(kind, type) and issubclass(kind, processes.Process)):
            raise UserError(f"this student's record names the process {process!r}, which there is not: export it again")
        self.process = model.process if type(model.process) is kind else kind()
        self._warned = False

    def _times(self, steps: int) -> Tensor:
        if self.rule == "jump":
            return self.process.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)
        times = self.contract.times_for(steps, self.model.process)
        return times if self.process is self.model.process else self.process.time(self.model.process.angle(times))

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, *, class_labels: int | list[int] | Tensor | None = None,
                 num_inference_steps: int | None = None, guidance_scale: float | None = None, batch_size: int = 1,
                 generator: torch.Generator | None = None, output_type: str = "pil") -> Images:
        """One batch of images, drawn as the trainer drew them: the first noise, then one more per re-noising step."""
        from diffusers.utils.torch_utils import randn_tensor

        contract, family = self.contract, self.model.family
        steps = max(contract.knots) if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise UserError(f"num_inference_steps={steps}: give at least 1")
        if steps not in contract.knots and not self._warned:
            what = "measured at" if self.rule == "jump" else "trained for"
            warnings.warn(f"this student was {what} {', '.join(map(str, contract.steps))} steps, not {steps}", stacklevel=3)
            self._warned = True
        device = next(self.net.module.parameters()).device
        if hasattr(self.model, "conditions"):
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not prompts:
                raise UserError("give a prompt: pipe('a red heart')")
            cond, n = self.model.conditions(prompts), len(prompts)
        else:
            n = batch_size if class_labels is None else len(torch.as_tensor(class_labels).reshape(-1))
            cond = {} if class_labels is None else {"label": torch.as_tensor(class_labels, device=device).reshape(-1)}
            if not cond and (family == "toy" or self.model.classes):
                raise UserError("give class_labels: an integer or a list of integers")
        if self.net.slot == "guidance":
            cond["guidance"] = torch.full((n,), contract.guidance if guidance_scale is None else float(guidance_scale), device=device)
        draw: Callable[[], Tensor] = lambda: randn_tensor((n, *self.model.shape), generator=generator, device=device)
        net = view(self.net, self.process)
        if self.net.slot == "r" and self.rule != "jump":
            net = _ToData(net)
        x = rollout.sample(net, draw(), cond, self._times(steps), self.rule, draw)
        if family == "toy":
            return Images(x)
        images = (self.model.decode(x) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return Images(images)
        from diffusers.image_processor import VaeImageProcessor
        return Images(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images)))

    def to(self, device) -> "SlotPipeline":
        self.model.to(device)
        return self


class _ToData:
    """A two-time net read with its second time at 0: the clean end of the path."""

    def __init__(self, net):
        self.net, self.process = net, net.process

    def __call__(self, x, t, cond, *, to="x0"):
        return self.net(x, t, cond, r=torch.zeros_like(t), to=to)


class ToyModel:
    """What SlotPipeline needs of the toy backbone, without fitting its teacher."""

    family, shape, pred = "toy", (2,), "velocity"

    def __init__(self, state: dict[str, Tensor]):
        from ..backbones.toy import Toy
        from ..denoiser import add_slot
        from ..toy import ToyNet
        self.process = processes.RectifiedFlow()
        self.module = ToyNet(state["inp.weight"].shape[1], len(state["label.weight"]) - 1, len(state["inp.weight"]))
        if "time_embedding.cond_proj.weight" in state:
            add_slot(self.module)
        self.module.load_state_dict(state)
        self.module.requires_grad_(False)
        self.forward = lambda module, x, timestep, cond: Toy.forward(self, module, x, timestep, cond)

    def to(self, device) -> "ToyModel":
        self.module.to(device)
        return self
