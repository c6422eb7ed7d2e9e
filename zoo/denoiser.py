"""`Net`: the one call that teacher, critic, student and closed-form toy answer to, and `Denoiser`, any torch module behind it.

Roles: with LoRA, teacher, student and critic are one frozen module whose adapters are switched per call (`role`).
peft's own `set_adapter` flips `requires_grad` and silently drops gradients of graphs built before it, so the switch here
only sets which adapter each layer reads, for the duration of the call."""
from __future__ import annotations

import math
import re
import sys
from contextlib import contextmanager
from typing import Callable, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import checkpoint

from . import compiled, sharding
from .critics import GanHead, Heads
from .process import Pred, Process

SLOT_DIM = 256    # width of the second-time / guidance embedding; also what stock SD pipelines read as `time_cond_proj_dim`


class Net(Protocol):
    """x [B, ...], t [B], cond dict of tensors [B, ...] -> reading `to` of the shape of x (and logits [B] with logits=True).

    r [B] is the second time of an average velocity over [r, t]; a net without one raises."""

    process: Process

    def __call__(self, x: Tensor, t: Tensor, cond: dict, *, r: Tensor | None = None, to: Pred = "x0", logits: bool = False): ...


class Calls:
    """What the networks of this process were asked for, in samples x (forward 1, forward and backward 3, forward-mode derivative 2):
    a budget that does not depend on the machine. A call is differentiated when autograd records its output; recomputation by
    activation checkpointing and gradients to the input alone are not told apart. `Run` takes the differences it wants."""

    def __init__(self):
        self.total = 0

    def add(self, out: Tensor) -> Tensor:
        """Count the call that returned `out` [B, ...]; returns it."""
        differentiated = torch.is_grad_enabled() and out.requires_grad
        along = unpack_dual(out).tangent is not None
        self.total += len(out) * (1 + along + 2 * differentiated)
        return out

    @contextmanager
    def paused(self):
        """Inside, calls are not counted: what only looks at a network is not training."""
        before = self.total
        try:
            yield
        finally:
            self.total = before


CALLS = Calls()


def scalar_embedding(w: Tensor, dim: int = SLOT_DIM) -> Tensor:
    """Sinusoidal embedding [B, dim] of a scalar [B]: sin | cos of 1000 w over frequencies 1..1e-4, the form in which
    stock latent-consistency pipelines embed (guidance - 1)."""
    half = dim // 2
    freq = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=w.device, dtype=w.dtype))
    angles = 1000.0 * w[:, None] * freq
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SlotEmbedding(nn.Module):
    """A diffusers `TimestepEmbedding` with a zero-initialised second input (the `cond_proj` slot), fed through `condition`
    so that networks whose forward has no such argument (UNet2DModel) take one too. Exact at initialisation."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.linear_1, self.act, self.linear_2, self.post_act = (
            embedding.linear_1, embedding.act, embedding.linear_2, embedding.post_act)
        self.cond_proj = nn.Linear(SLOT_DIM, embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(self.cond_proj.weight)
        self.cond_proj.to(embedding.linear_1.weight)
        self.condition: Tensor | None = None

    def forward(self, sample, condition=None):
        condition = self.condition if condition is None else condition
        if condition is not None:
            extra = self.cond_proj(condition.to(sample))
            sample = sample + (extra if extra.ndim == sample.ndim else extra[:, None])       # one time per token [B, N, width]: the same for all
        sample = self.linear_2(self.act(self.linear_1(sample)))
        return sample if self.post_act is None else self.post_act(sample)


class SlotSequence(nn.Sequential):
    """`SlotEmbedding` for a time embedding that is a plain sequence of layers (Z-Image): they keep their names, `cond_proj` stands behind
    them and is added to what the first one reads."""

    def __init__(self, layers: nn.Sequential):
        super().__init__(*layers)
        self.cond_proj = nn.Linear(SLOT_DIM, layers[0].in_features, bias=False)
        nn.init.zeros_(self.cond_proj.weight)
        self.cond_proj.to(layers[0].weight)
        self.condition: Tensor | None = None

    def forward(self, sample):
        if self.condition is not None:
            sample = sample + self.cond_proj(self.condition.to(sample))
        for layer in list(self)[:-1]:
            sample = layer(sample)
        return sample


def add_slot(module: nn.Module) -> None:
    """Give a UNet a second scalar input (second time or guidance), zero at initialisation; no-op if it has one."""
    embedding = module.time_embedding
    if not hasattr(embedding, "condition"):
        slot = SlotEmbedding(embedding)
        if getattr(embedding, "cond_proj", None) is not None:     # a teacher that already embeds its guidance keeps it
            slot.cond_proj.weight.data.copy_(embedding.cond_proj.weight.data)
        module.time_embedding = slot


def fold_slot(module: nn.Module, value: float, one: Tensor | None = None) -> None:
    """Remove the slot by fixing its scalar: its projection becomes a constant in linear_1's bias. Exact (r = 0 fold).

    one [in_features]: for a linear_1 without a bias, the combination of its inputs that is 1 at every time, which carries the constant."""
    slot = module.time_embedding
    with torch.no_grad():
        constant = slot.cond_proj(scalar_embedding(torch.tensor([value], device=slot.cond_proj.weight.device)).to(slot.cond_proj.weight))
        constant = slot.linear_1.weight @ constant[0]
        if one is None:
            slot.linear_1.bias += constant
        else:
            slot.linear_1.weight += torch.outer(constant, one.to(constant))
        slot.cond_proj.weight.zero_()


# ----------------------------------------------------------------------------------------------------------- adapters
def _adapter_layers(module: nn.Module) -> list:
    if "peft" not in sys.modules:            # then nothing holds an adapter, and its import takes seconds
        return []
    if "_zoo_layers" not in module.__dict__:
        from peft.tuners.tuners_utils import BaseTunerLayer
        module.__dict__["_zoo_layers"] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return module.__dict__["_zoo_layers"]


@contextmanager
def role_active(module: nn.Module, role: str | None):
    """Inside, LoRA layers of `module` read adapter `role` (None: the bare base weights). Touches no requires_grad flag."""
    layers = _adapter_layers(module)
    before = [(m._active_adapter, m._disable_adapters) for m in layers], module.__dict__.get("_zoo_role")
    for m in layers:
        m._active_adapter, m._disable_adapters = [role] if role else [], role is None
    module.__dict__["_zoo_role"] = role
    try:
        yield
    finally:
        for m, (active, off) in zip(layers, before[0]):
            m._active_adapter, m._disable_adapters = active, off
        module.__dict__["_zoo_role"] = before[1]


def add_adapter(module: nn.Module, role: str, rank: int, targets: list[str] | str) -> None:
    """Inject a LoRA adapter named `role` (alpha = rank); freeze the base, keep every adapter trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True)
    inject_adapter_in_model(config, module, adapter_name=role)
    module.__dict__.pop("_zoo_layers", None)
    for name, p in module.named_parameters():
        p.requires_grad_("lora_" in name)


@contextmanager
def conditioned(embedding, condition: Tensor | None):
    """Inside, a time embedding with a slot (any other is left alone) reads `condition` as its second scalar."""
    if not hasattr(embedding, "condition"):
        yield
        return
    before, embedding.condition = embedding.condition, condition
    try:
        yield
    finally:
        embedding.condition = before


LOOKING: list[Callable] = []     # called with a checkpointed block and its inputs (plan.activation_bytes)


def checkpoint_activations(module: nn.Module) -> None:
    """Activation checkpointing whose recomputation uses the role and the second scalar of the forward pass, not those set at backward."""
    def run(block, *args):
        role, embedding = module.__dict__.get("_zoo_role"), getattr(module, "time_embedding", None)
        condition = getattr(embedding, "condition", None)

        def again(*inner):
            with role_active(module, role), conditioned(embedding, condition):
                return block(*inner)
        if LOOKING:                      # the memory estimate: what a backward pass will make again in this block
            LOOKING[-1](again, args)
        return checkpoint(again, *args, use_reentrant=False)
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing(gradient_checkpointing_func=run)
    else:                                # transformers
        module._set_gradient_checkpointing(True, run)


# ----------------------------------------------------------------------------------------------------------- the adapter
class Denoiser:
    """A torch module read as a `Net`.

    forward(module, x, timestep, cond) -> raw output of kind `pred`; slot: None, "r" (second time) or "guidance"
    (cond["guidance"], the scale w as tensor [B]); tap: submodule whose output feeds the GAN head, or a list of them, in the order
    in which they run, for a head of several depths (`judge`); maps: the head reads what enters the tap, not what leaves it, and maps(its
    output, x) comes with logits=True; frozen: regular expression of parameters left out of `trainable`."""

    def __init__(self, module: nn.Module, process: Process, pred: Pred, forward: Callable, *, role: str | None = None,
                 slot: str | None = None, tap: str | list[str] | None = None, head: GanHead | Heads | None = None, frozen: str = "",
                 maps: Callable | None = None):
        self.module, self.process, self.pred, self.forward = module, process, pred, forward
        self.role, self.slot, self.head, self.frozen, self.maps = role, slot, head, frozen, maps
        self.weights: dict[str, Tensor] | None = None     # read these instead of the module's own (averages)
        self._tapped, self._enough = None, math.inf
        self.taps = [tap] if isinstance(tap, str) else tap or []
        if head is not None:
            for name in self.taps:
                module.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, _module, inputs, output):
        if self._tapped is not None:
            seen = inputs if self.maps else output
            self._tapped.append(seen[0] if isinstance(seen, tuple) else seen)
            if len(self._tapped) == self._enough:
                raise _Enough

    def __call__(self, x, t, cond, *, r=None, to: Pred = "x0", logits=False):
        if r is not None and self.slot != "r":
            raise ValueError("this network has no second time: build it with make(..., two_time=True)")
        if logits and self.head is None:
            raise ValueError("this network has no GAN head: build it with make(..., head=True)")
        condition = None
        if self.slot == "r":
            condition = scalar_embedding(t if r is None else r)
        elif self.slot == "guidance":
            condition = scalar_embedding(cond["guidance"] - 1)
        self._tapped = [] if logits else None
        with role_active(self.module, self.role), conditioned(getattr(self.module, "time_embedding", None), condition):
            out = self._raw(x, self.process.timestep(t), cond)
        CALLS.add(out)
        out = self.process.convert(out.float() if out.dtype in (torch.bfloat16, torch.float16) else out, x, t, self.pred, to)
        if not logits:
            return out
        features, self._tapped = self._tapped[-1], None
        made = self.head(features)
        return out, self.maps(made, x) if self.maps else made

    def judge(self, x: Tensor, t: Tensor, cond: dict, at: Tensor | None = None) -> list[Tensor]:
        """Logits [B, positions] of a head of several depths, one tensor per tap; at [B]: a number the head is told, where it listens to
        one. The network is left after the last tap."""
        self._tapped, self._enough = [], math.inf if sharding.together(self) else len(self.taps)      # a cut network is not left half-way
        try:
            with role_active(self.module, self.role):
                self._raw(x, self.process.timestep(t), cond)
        except _Enough:
            pass
        features, self._tapped, self._enough = self._tapped, None, math.inf
        CALLS.add(features[-1])
        return self.head(features, None if at is None else scalar_embedding(at))

    def _raw(self, *args):
        with compiled.fitting(self.module):
            return self._call(*args)

    def _call(self, *args):
        if self.weights is None:
            return self.forward(self.module, *args)
        if sharding.is_cut(self.module) and sharding.of_rows(self.module, self.weights):
            with sharding.holding(self.module, self.weights):
                return self.forward(self.module, *args)
        weights = {f"module.{k}": v.to(args[0].device) for k, v in self.weights.items()}      # averages may live on the CPU
        return torch.func.functional_call(_Bound(self.module, self.forward), weights, args)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters this role trains: its own adapter (LoRA) or the whole module, without the frozen ones, and its GAN head."""
        own = {n: p for n, p in self.module.named_parameters()
               if (self.role is None or f".{self.role}." in n) and not (self.frozen and re.search(self.frozen, n))}
        head = {} if self.head is None else {f"head.{n}": p for n, p in self.head.named_parameters()}
        return own | head

    def reading(self, weights: dict[str, Tensor]) -> "Denoiser":
        """The same network with other values of its trainable parameters (an average, a best checkpoint)."""
        other = object.__new__(Denoiser)
        other.__dict__.update(self.__dict__)
        other.weights = {n: w for n, w in weights.items() if not n.startswith("head.")}
        return other


class _Enough(Exception):
    """Every tap was seen: the rest of the network is not needed."""


class _Bound(nn.Module):
    """A module with its family's way of calling it, so that `functional_call` can replace its weights."""

    def __init__(self, module, forward):
        super().__init__()
        self.module, self.call = module, forward

    def forward(self, *args):
        return self.call(self.module, *args)
